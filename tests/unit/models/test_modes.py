"""Every fusion, insertion, start and temporal merge trains a step on every backbone."""

import itertools

import pytest
import torch

from spatialvlm.errors import ConfigError
from spatialvlm.testing.packs import Member
from spatialvlm.testing.rig import FAMILIES
from spatialvlm.typing import KIND_SPATIAL, KIND_VIDEO

MODES = [
    dict(zip(("fusion", "insertion", "init"), values, strict=True))
    for values in itertools.product(
        ("pre_projector", "post_projector"),
        ("interleaved", "sequential", "in_place"),
        ("warm", "scratch"),
    )
]
OPTIONS = [
    {"temporal_merge": "mean"},
    {"temporal_merge": "first", "insertion": "in_place"},
    {"camera_token": True},
    {"camera_token": True, "insertion": "sequential", "init": "scratch"},
    {"layers": (0, 1)},
    {"layers": (-1,), "parts": "frame", "fusion": "post_projector"},
    {"frames_as_images": True},
    {"frames_as_images": True, "insertion": "sequential"},
    {"detach_vit": True},
    {"reference_frame": "last", "vit_chunk": 1},
    {"trans": {"hidden": 16}, "size_policy": "match_grid"},
    {"precision": "bf16", "parts": "global"},
]


def name(mode):
    return "-".join(f"{v}" if isinstance(v, str) else f"{k}={v}" for k, v in mode.items())


@pytest.mark.parametrize("mode", [*MODES, *OPTIONS], ids=name)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_step(rig, family, mode):
    if family == "internvl3" and mode.get("frames_as_images"):
        with pytest.raises(ConfigError, match="frames_as_images has no effect on InternVL3"):
            rig(family, mode)
        return
    bench = rig(family, mode)
    batch = bench.pack(bench.members()[:2])
    optimizer = torch.optim.SGD(bench.model.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        output = bench.model(batch)
        output.loss_sum.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in bench.model.parameters())
        torch.nn.utils.clip_grad_norm_(bench.model.parameters(), 1.0)
        optimizer.step()
        losses.append(output.loss_sum.item())
    assert losses[-1] < losses[0]
    assert output.geometry_norm_ratio[1] > 0
    # A warm start has zero fc2, so fc1 gets its first gradient in the second step.
    assert [key for key, p in bench.model.fusion.named_parameters() if p.grad.norm() == 0] == []
    text = bench.pack([Member()])
    bench.model.zero_grad()
    bench.model(text).loss_sum.backward()
    assert all(p.grad is not None for p in bench.model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fusion", ["pre_projector", "post_projector"])
def test_warm_in_place_equals_the_2d_model(rig, family, fusion):
    bench = rig(family, {"insertion": "in_place", "fusion": fusion})
    with torch.no_grad():
        three = bench.model(bench.pack()).sample_loss
        two = rig(family).model(bench.pack()).sample_loss
    torch.testing.assert_close(three, two, atol=1e-5, rtol=1e-6)


def test_warm_and_scratch_differ_and_detach_stops_the_gradient(rig):
    norms = {}
    for key, mode in {
        "warm": {},
        "scratch": {"init": "scratch"},
        "detached": {"init": "scratch", "detach_vit": True},
    }.items():
        torch.manual_seed(0)
        bench = rig("qwen3vl", mode)
        batch = bench.pack(bench.members()[:1])
        # Only spatial tokens reach the loss: the visual tokens are cut off behind the encoder.
        see = bench.model.adapter.see

        def cut(pixels, grid, see=see):
            seen = see(pixels, grid)
            return type(seen)(
                seen.tokens.detach(), seen.patches, [x.detach() for x in seen.deepstack]
            )

        bench.model.adapter.see = cut
        loss = bench.model(batch).loss_sum
        loss.backward()
        grads = [p.grad for p in bench.model.adapter.vision_blocks[0].parameters()]
        norms[key] = sum(0.0 if g is None else g.norm().item() for g in grads)
    assert norms["warm"] > 0
    assert norms["scratch"] > 0
    assert norms["detached"] == 0


def test_batches_where_only_some_samples_have_geometry(rig):
    bench = rig("qwen3vl", {})
    bench.randomise_fusion()
    mixed = [bench.members()[2], bench.members()[0], bench.members()[3]]
    together = bench.model(bench.pack(mixed)).sample_loss
    alone = torch.cat([bench.model(bench.pack([member])).sample_loss for member in mixed])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("insertion", ["interleaved", "sequential", "in_place"])
@pytest.mark.parametrize("family", FAMILIES)
def test_videos_of_one_and_of_odd_numbers_of_frames(rig, family, insertion):
    bench = rig(family, {"insertion": insertion})
    bench.randomise_fusion()
    clips = [bench.clip("video", frames, group=0) for frames in (1, 5)]
    members = [Member((clip,), seed=index) for index, clip in enumerate(clips)]
    together = bench.pack(members)
    units = [1, 5] if family == "internvl3" else [1, 3]
    assert together["media_grid_thw"][:, 0].tolist() == units
    alone = torch.cat([bench.model(bench.pack([member])).sample_loss for member in members])
    torch.testing.assert_close(bench.model(together).sample_loss, alone, atol=1e-5, rtol=1e-5)
    spatial = int((together["token_kind"] == KIND_SPATIAL).sum())
    visual = int((together["token_kind"] == KIND_VIDEO).sum())
    assert spatial == (0 if insertion == "in_place" else visual)


def test_dinov2_as_the_per_frame_control(rig, tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
        mlp_ratio=2,
    )
    Dinov2Model(config).save_pretrained(tmp_path / "dino")
    bench = rig(
        "qwen3vl", {"encoder": "dinov2", "source": str(tmp_path / "dino"), "init": "scratch"}
    )
    bench.model(bench.pack()).loss_sum.backward()
    assert bench.model.fusion.trans.fc1.weight.grad.abs().sum() > 0
    folder = bench.model.save_pretrained(tmp_path / "out")
    from spatialvlm.models.spatial_vlm import SpatialVLM

    again = SpatialVLM.from_pretrained(folder)
    assert torch.equal(again(bench.pack()).loss_sum, bench.model(bench.pack()).loss_sum)


def test_same_loss_with_the_feature_cache(rig, tmp_path):
    plain = rig("qwen3vl", {"init": "scratch"})
    cached = rig(
        "qwen3vl",
        {"init": "scratch", "cache": {"dir": str(tmp_path), "dtype": "fp32", "lru_items": 0}},
    )
    cached.model.fusion.load_state_dict(plain.model.fusion.state_dict())
    expected = plain.model(plain.pack()).loss_sum
    assert torch.equal(cached.model(cached.pack()).loss_sum, expected)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2
    assert torch.equal(cached.model(cached.pack()).loss_sum, expected)  # read back
    assert cached.model.geometry.encoder.stats.hits == 2
