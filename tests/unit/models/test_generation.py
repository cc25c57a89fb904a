import pytest
import torch

from spatialvlm.models.generation import generate, sampler, stop_tokens
from spatialvlm.testing.rig import FAMILIES


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


def test_vision_runs_once_per_group(rig):
    bench = rig("qwen3vl", {})
    calls = []
    bench.model.adapter.vision_encoder.register_forward_hook(lambda *_: calls.append(1))
    generate(bench.model, [bench.pack(prompts=True)], 4)
    assert calls == [1]


def test_no_tokens_are_asked_for(rig):
    bench = rig("qwen3vl")
    prompts = bench.pack(bench.members()[:1], prompts=True)
    assert generate(bench.model, [prompts], 0) == [[[], [], []]]
    assert generate(bench.model, [], 4) == []


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
