"""The 2D model against plain ``transformers``: logits, gradients, generation."""

import pytest
import torch
from torch.nn import functional as F

from spatialvlm.models.generation import generate
from spatialvlm.models.spatial_vlm import SpatialVLM
from spatialvlm.sequence.pixels import prepare
from spatialvlm.testing.packs import Clip, Member
from spatialvlm.testing.rig import FAMILIES, gradients, worst_relative

pytestmark = pytest.mark.parity


def cases(bench):
    """Media for which the library's positions equal ours: stills and short videos."""
    tiles = {"tiles": Member((Clip("image", 3, 56, 56),))} if bench.family == "internvl3" else {}
    return tiles | {
        "one image": Member((bench.clip(),)),
        "two images": Member((bench.clip(), bench.clip()), branches=(9,)),
        "video": Member((bench.clip("video", 4, wide=True),)),
        "odd video": Member((bench.clip("video", 3, wide=True),)),
        "single frame video": Member((bench.clip("video", 1),)),
        "text": Member(),
    }


def stock_inputs(bench, batch):
    """The same sample as the library's own keyword arguments."""
    inputs = {
        "input_ids": batch["input_ids"],
        "attention_mask": torch.ones_like(batch["input_ids"]),
    }
    if bench.family != "internvl3":
        kind = batch["token_kind"].int()
        inputs["mm_token_type_ids"] = kind
    if not batch["frames_u8"].numel():
        return inputs
    shapes = [tuple(shape) for shape in batch["frame_shapes"].tolist()]
    grid = batch["media_grid_thw"]
    pixels = prepare(batch["frames_u8"], shapes, grid[:, 0].tolist(), bench.model.adapter.pixels)
    if bench.family == "internvl3":
        return inputs | {"pixel_values": pixels}
    if batch["media_kind"][0] == 1:
        return inputs | {"pixel_values": pixels, "image_grid_thw": grid}
    inputs |= {"pixel_values_videos": pixels, "video_grid_thw": grid}
    if bench.family == "qwen2_5vl":  # 2 frames per unit at 2 frames per second
        inputs["second_per_grid_ts"] = torch.ones(len(grid))
    return inputs


def stock_model(bench):
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(
        bench.folder, attn_implementation="sdpa"
    ).train()


def stock_loss(logits, batch):
    rows = logits[0, batch["logit_index"]].float()
    return F.cross_entropy(rows, batch["target_ids"], reduction="sum")


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients(rig, check, family):
    exact, ours, gradient = 0.0, 0.0, 0.0
    for name in cases(rig(family)):
        bench = rig(family)
        reference = stock_model(bench)
        batch = bench.pack([cases(bench)[name]])
        logits = reference(**stock_inputs(bench, batch), use_cache=False).logits
        stock_loss(logits, batch).backward()
        wanted = {f"backbone.{k}": v for k, v in gradients(reference).items()}

        bench.model(batch).loss_sum.backward()
        found = gradients(bench.model)
        unused = [
            key for key in found if key not in wanted
        ]  # touched by the dummy of a text-only pack
        assert all((found.pop(key) == 0).all() for key in unused)
        gradient = max(gradient, worst_relative(found, wanted))
        with torch.no_grad():
            hidden, _ = bench.model.hidden_states(batch)
            difference = bench.model.backbone.lm_head(hidden) - logits
            ours = max(ours, (difference.norm() / logits.norm()).item())
            plain = SpatialVLM.from_pretrained(
                bench.folder, vision_attention="sdpa", linear_patches=False
            )
            plain.adapter.text_config._attn_implementation_internal = "sdpa"
            hidden, _ = plain.hidden_states(batch)
            exact = max(exact, (plain.backbone.lm_head(hidden) - logits).abs().max().item())
    check(family, "2D logits, the library's attention and patch embedding", exact, 0.0)
    check(family, "2D logits, our attention and patch embedding (relative)", ours, 1e-5)
    check(family, "2D gradients, ours (worst tensor, relative)", gradient, 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation(rig, check, family):
    """Stills: the library's own positions, cache and loop against groups of prompts."""
    bench = rig(family)
    members = [
        Member((bench.clip(),), branches=(5,), seed=1),
        Member((bench.clip(), bench.clip()), seed=2),
    ]
    different = 0
    for member in members:
        prompts = bench.pack([member], prompts=True)
        ours = generate(bench.model, [prompts], 12, stop_ids=[0])[0][0]
        reference = stock_model(bench).eval()
        inputs = stock_inputs(bench, prompts)
        tokens = reference.generate(
            **inputs, max_new_tokens=12, do_sample=False, eos_token_id=0, pad_token_id=0
        )
        theirs = tokens[0, prompts["input_ids"].shape[1] :].tolist()
        theirs = theirs[: theirs.index(0)] if 0 in theirs else theirs
        different += sum(a != b for a, b in zip(ours, theirs, strict=True))
    check(family, "greedy generation, tokens that differ", different, 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_prefix(rig, check, family):
    """Packed groups against separate samples, with the geometry branch, all weights."""
    bench = rig(family, {"camera_token": True})
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
    separate = torch.stack(losses)
    error = ((packed.sample_loss - separate).abs() / separate).max()
    check(family, "packed groups, loss (relative)", error, 1e-5, "separate samples")
    error = worst_relative(found, gradients(bench.model))
    check(
        family, "packed groups, gradients (worst tensor, relative)", error, 1e-4, "separate samples"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_pixels(check, family, checkpoints):
    from transformers import AutoProcessor

    from spatialvlm.models.backbones import adapter_of, image_processor_config, require_config

    folder = checkpoints[family]
    processor = AutoProcessor.from_pretrained(folder)
    config = require_config(folder)
    from transformers import AutoConfig

    spec = adapter_of(config["model_type"]).pixel_spec(
        AutoConfig.from_pretrained(folder), image_processor_config(folder)
    )
    side = {"qwen2_5vl": 84, "qwen3vl": 96, "internvl3": 56}[family]
    generator = torch.Generator().manual_seed(0)
    video = torch.randint(0, 256, (5, side, side, 3), dtype=torch.uint8, generator=generator)
    found = processor.video_processor(
        [video.permute(0, 3, 1, 2)], do_resize=False, do_sample_frames=False, return_tensors="pt"
    )["pixel_values_videos"]
    shape = (5, side, side)
    ours = prepare(video, [shape], [spec.grid(shape)[0]], spec)
    check(family, "pixel values", (ours - found.reshape(ours.shape)).abs().max(), 1e-6)
