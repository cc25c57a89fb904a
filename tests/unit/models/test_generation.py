import pytest
import torch
from transformers.generation.utils import GenerationMixin

from spatialvlm.errors import AlignmentError, ConfigError
from spatialvlm.models import generation
from spatialvlm.models.device import HOST_READ
from spatialvlm.models.generation import generate, sampler, stop_tokens
from spatialvlm.models.library_generation import library_generate
from spatialvlm.models.spatial_vlm import SpatialVLM
from spatialvlm.testing.packs import Member
from spatialvlm.testing.rig import FAMILIES

needs_encoder_outputs = pytest.mark.skipif(
    not hasattr(GenerationMixin, "_supports_mm_encoder_outputs"),
    reason="library_generate needs transformers 5.18",
)


def uncached(bench, batch, steps, stops):
    """Greedy by running the whole sequence again for every token."""
    tokens = []
    for _ in range(steps):
        with torch.no_grad():
            hidden, _ = bench.model.hidden_states(batch)
        token = bench.model.backbone.lm_head(hidden[0, -1]).argmax().item()
        if token in stops:
            break
        tokens.append(token)
        batch["input_ids"] = torch.cat([batch["input_ids"], torch.tensor([[token]])], 1)
        batch["token_kind"] = torch.nn.functional.pad(batch["token_kind"], (0, 1))
        last = batch["position_ids"][..., -1:] + 1
        batch["position_ids"] = torch.cat([batch["position_ids"], last], -1)
        batch["segment_len"] = batch["segment_len"] + 1
    return tokens


@pytest.mark.parametrize("geometry", [None, {}], ids=["2d", "3d"])
@pytest.mark.parametrize("family", FAMILIES)
def test_groups_equal_uncached_single_generation(rig, family, geometry):
    bench = rig(family, geometry)
    if geometry is not None:
        bench.randomise_fusion()
    bench.model.train()
    prompts = bench.pack(prompts=True)
    free = [uncached(bench, bench.pack(member, prompts=True), 8, ()) for member in bench.separate()]
    stop = free[0][4]  # a token that really occurs
    expected = [tokens[: tokens.index(stop)] if stop in tokens else tokens for tokens in free]
    groups = generate(bench.model, [prompts, prompts], 8, stop_ids=[stop], max_rows=9)
    assert groups == [expected, expected]
    assert bench.model.training


def test_long_prompts_beside_short_ones(rig):
    bench = rig("qwen2_5vl", {})
    bench.randomise_fusion()
    video = bench.clip("video", 3, group=0)
    long, short = Member((video,), text=4500, seed=4), Member(branches=(5,), seed=5)
    expected = [uncached(bench, bench.pack([m], prompts=True), 3, ()) for m in (long, short)]
    groups = [bench.pack([member], prompts=True) for member in (long, short)]
    assert groups[0]["input_ids"].shape[1] > 4500
    assert generate(bench.model, groups, 3, stop_ids=[-1]) == [[tokens] for tokens in expected]


def test_encoders_run_once_per_group(rig):
    bench = rig("qwen3vl", {})
    calls = []
    bench.model.adapter.vision_encoder.register_forward_hook(lambda *_: calls.append("vision"))
    bench.model.geometry.encoder.register_forward_hook(lambda *_: calls.append("geometry"))
    generate(bench.model, [bench.pack(prompts=True)], 4)
    assert sorted(calls) == ["geometry", "vision"]


def test_no_tokens_are_asked_for(rig):
    bench = rig("qwen3vl")
    prompts = bench.pack(bench.members()[:1], prompts=True)
    assert generate(bench.model, [prompts], 0) == [[[], [], []]]
    assert generate(bench.model, [], 4) == []


def test_groups_are_moved_to_the_model(rig, monkeypatch):
    """What the model reads as Python numbers stays on the host."""
    bench = rig("qwen3vl", {})
    seen = []

    def prefill(model, group):
        seen.append({key: x.device.type for key, x in group.items() if torch.is_tensor(x)})
        raise InterruptedError

    monkeypatch.setattr(generation, "_prefill", prefill)
    monkeypatch.setattr(SpatialVLM, "device", torch.device("meta"))
    with pytest.raises(InterruptedError):
        generate(bench.model, [bench.pack(prompts=True)], 2, stop_ids=[0])
    moved = {key for key, device in seen[0].items() if device == "meta"}
    assert moved >= {"input_ids", "position_ids", "frames_u8", "token_kind"}
    assert set(seen[0]) - moved == HOST_READ & set(seen[0])


def test_stop_tokens_come_from_the_checkpoint(rig):
    bench = rig("qwen3vl")
    from spatialvlm.testing.tokenizer import token_ids

    ids = token_ids("qwen3vl")
    assert stop_tokens(bench.model) == sorted([ids["<|im_end|>"], ids["<|endoftext|>"]])


def test_sampling_stays_inside_the_nucleus_and_follows_the_seed():
    logits = torch.tensor([[0.0, 2.0, 1.9, -1.0]]).repeat(200, 1)
    draw = sampler(1.0, 0.6, torch.Generator().manual_seed(0))(logits)
    assert set(draw.tolist()) == {1, 2}
    again = sampler(1.0, 0.6, torch.Generator().manual_seed(0))(logits)
    assert torch.equal(draw, again)


@needs_encoder_outputs
@pytest.mark.parametrize("geometry", [None, {}], ids=["2d", "3d"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_librarys_loop_gives_the_same_tokens(rig, family, geometry):
    bench = rig(family, geometry)
    if geometry is not None:
        bench.randomise_fusion()
    members = bench.members()
    expected = [
        row for group in generate(bench.model, [bench.pack(prompts=True)], 6) for row in group
    ]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    # One call for all prompts (left-padded), and one per group.
    together = library_generate(bench.model, [bench.pack(prompts=True)], **options)
    apart = [
        row
        for member in members
        for row in library_generate(
            bench.model, [bench.pack([member], prompts=True)], **options
        ).tolist()
    ]
    stops = stop_tokens(bench.model)
    for found in (together.tolist(), apart):
        cut = [row[: next((i for i, t in enumerate(row) if t in stops), len(row))] for row in found]
        assert cut == expected
    assert getattr(bench.model.backbone.model, "rope_deltas", None) is None
    bench.model(bench.pack())  # a training forward after generation still works


@needs_encoder_outputs
@pytest.mark.parametrize("family", FAMILIES)
def test_beams_and_returned_sequences_equal_single_runs(rig, family):
    bench = rig(family, {})
    bench.randomise_fusion()
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 3, "num_return_sequences": 2}
    options |= {"pad_token_id": 0, "eos_token_id": None}
    members = [bench.members()[0], bench.members()[3]]
    together = library_generate(
        bench.model, [bench.pack([m], prompts=True) for m in members], **options
    )
    alone = [
        library_generate(bench.model, [bench.pack([m], prompts=True)], **options) for m in members
    ]
    assert torch.equal(together, torch.cat(alone))
    assert together.shape == (2 * 4, 5)


def test_an_old_library_is_named(rig, monkeypatch):
    monkeypatch.delattr(GenerationMixin, "_supports_mm_encoder_outputs", raising=False)
    with pytest.raises(ConfigError, match=r"needs transformers 5\.18 or newer"):
        library_generate(rig("qwen3vl").model, [])


@needs_encoder_outputs
@pytest.mark.parametrize("family", ["qwen2_5vl", "qwen3vl"])
def test_the_placeholder_is_never_emitted(rig, family):
    bench = rig(family, {})
    spatial_id = bench.model.geometry.spatial_id
    prompts = bench.pack(bench.members()[:1], prompts=True)
    expected = generate(bench.model, [prompts], 4)
    with torch.no_grad():  # a head that prefers the placeholder to everything else
        head = bench.model.backbone.lm_head.weight
        head[spatial_id] = 100.0 * head[expected[0][0][0]]
    assert generate(bench.model, [prompts], 4)[0][0] == expected[0][0]
    found = library_generate(
        bench.model, [prompts], max_new_tokens=4, do_sample=False, pad_token_id=0
    )
    assert spatial_id not in found


def test_spatial_ids_without_geometry_and_the_reverse_are_errors(rig):
    bench = rig("qwen3vl", {})
    prompts = bench.pack(bench.members()[:1], prompts=True)
    without = dict(prompts, media_group=torch.full_like(prompts["media_group"], -1))
    with pytest.raises(AlignmentError, match="12 spatial positions"):
        generate(bench.model, [without], 2)
    plain = dict(
        prompts, token_kind=prompts["token_kind"].masked_fill(prompts["token_kind"] == 3, 0)
    )
    with pytest.raises(AlignmentError, match="0 spatial positions"):
        generate(bench.model, [plain], 2)
