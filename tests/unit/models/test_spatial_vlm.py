import pytest
import torch

from spatialvlm.errors import AlignmentError
from spatialvlm.testing.packs import Member
from spatialvlm.testing.rig import FAMILIES, gradients, worst_relative


@pytest.mark.parametrize("attention", ["tree_sdpa", "tree_mask"])
@pytest.mark.parametrize("geometry", [None, {}], ids=["2d", "3d"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_separate_in_loss_and_gradient(rig, family, geometry, attention):
    bench = rig(family, geometry, attention=attention)
    if geometry is not None:
        bench.randomise_fusion()
    packed = bench.model(bench.pack())
    packed.loss_sum.backward()
    found = gradients(bench.model)
    bench.model.zero_grad()
    losses = []
    for member in bench.separate():
        output = bench.model(bench.pack(member))
        output.loss_sum.backward()
        losses.append(output.loss_sum.detach())
    torch.testing.assert_close(packed.sample_loss, torch.stack(losses), rtol=1e-5, atol=1e-5)
    assert worst_relative(found, gradients(bench.model)) < 1e-4
    assert packed.num_supervised == packed.sample_weight.sum()
    assert (packed.geometry_norm_ratio[1] > 0) == (geometry is not None)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_module_is_in_the_graph_of_a_text_only_pack(rig, family):
    bench = rig(family, {"camera_token": True, "insertion": "sequential"})
    bench.model(bench.pack([Member()])).loss_sum.backward()
    missing = [name for name, p in bench.model.named_parameters() if p.grad is None]
    assert missing == []
    vision = [p.grad for p in bench.model.adapter.vision_encoder.parameters()]
    assert all((grad == 0).all() for grad in vision)


def test_frozen_vision_without_fusion_runs_no_dummy(rig):
    bench = rig("qwen3vl")
    bench.model.adapter.vision_encoder.requires_grad_(False)
    calls = []
    bench.model.adapter.vision_encoder.register_forward_hook(lambda *_: calls.append(1))
    bench.model(bench.pack([Member()])).loss_sum.backward()
    assert calls == []


def test_vision_and_head_run_once_per_forward(rig):
    bench = rig("qwen3vl", {})
    calls = {"vision": 0, "head": 0, "projector_3d": 0}

    def count(name):
        return lambda *_: calls.update({name: calls[name] + 1})

    bench.model.adapter.vision_encoder.register_forward_hook(count("vision"))
    bench.model.backbone.lm_head.register_forward_hook(count("head"))
    bench.model.fusion.projector_3d.register_forward_hook(count("projector_3d"))
    bench.model(bench.pack())
    assert calls == {"vision": 1, "head": 1, "projector_3d": 1}


def test_warm_start_spatial_tokens_equal_visual_tokens(rig):
    for family in FAMILIES:
        bench = rig(family, {"camera_token": False})
        batch = bench.pack(bench.members()[:1])
        seen = bench.model._see(batch)
        fused = bench.model._fuse(batch, seen, has_media=True)
        torch.testing.assert_close(fused.spatial_tokens, seen.tokens, atol=1e-6, rtol=1e-5)


def test_equal_groups_are_encoded_once_and_remembered(rig):
    bench = rig("qwen3vl", {})
    batch = bench.pack()
    encoded = []
    encoder = bench.model.geometry.encoder
    original = encoder.forward

    def spy(videos, **kwargs):
        encoded.append(len(videos))
        return original(videos, **kwargs)

    encoder.forward = spy
    batch["geometry_keys"] = ["a", "b"]
    first = bench.model(batch).loss_sum
    assert torch.equal(bench.model(batch).loss_sum, first)
    batch["geometry_keys"] = ["", ""]
    bench.model(batch)
    assert encoded == [2, 2]  # first forward, none in the second, both when unknown


def test_the_encoder_is_invisible(rig):
    bench = rig("qwen3vl", {})
    model = bench.model
    encoder = model.geometry.encoder
    model.train()
    assert not any(module.training for module in encoder.modules())
    ids = {id(parameter) for parameter in model.parameters()}
    assert not any(id(parameter) in ids for parameter in encoder.parameters())
    assert not any(
        "encoder.aggregator" in name or "frame_blocks" in name for name in model.state_dict()
    )


def test_wrong_number_of_tokens_names_the_sample(rig):
    bench = rig("qwen3vl", {})
    batch = bench.pack(bench.members()[:1])
    batch["token_kind"][0, 0] = 1
    with pytest.raises(AlignmentError, match=r"random#0.*13 visual positions.*12 visual tokens"):
        bench.model(batch)
    batch = bench.pack(bench.members()[:1])
    batch["token_kind"][batch["token_kind"] == 3] = 0
    with pytest.raises(AlignmentError, match="0 spatial positions"):
        bench.model(batch)


def test_positions_must_belong_to_the_pack(rig):
    bench = rig("qwen3vl")
    batch = bench.pack()
    three_rows = dict(batch, position_ids=batch["position_ids"][1:])
    with pytest.raises(ValueError, match="row 0 counts the tokens"):
        bench.model(three_rows)
    shifted = dict(batch, position_ids=batch["position_ids"] + 1)
    with pytest.raises(ValueError, match="start at"):
        bench.model(shifted)
    short = dict(batch, position_ids=batch["position_ids"][..., :-1])
    with pytest.raises(ValueError, match="shape"):
        bench.model(short)


def test_deepstack_reaches_visual_positions_only(rig):
    bench = rig("qwen3vl", {})
    batch = bench.pack(bench.members()[:1])
    seen_masks = []
    original = bench.model.adapter.language_model._deepstack_process

    def spy(hidden, mask, embeds):
        seen_masks.append(mask)
        return original(hidden, mask, embeds)

    bench.model.adapter.language_model._deepstack_process = spy
    bench.model(batch)
    kind = batch["token_kind"]
    assert len(seen_masks) == 2
    assert all(torch.equal(mask, (kind == 1) | (kind == 2)) for mask in seen_masks)
