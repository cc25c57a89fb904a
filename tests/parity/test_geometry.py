"""The geometry branch against its definition, and the VGGT aggregator against reference tensors."""

import json

import pytest
import torch
from safetensors import safe_open

from spatialvlm.testing.rig import FAMILIES

pytestmark = pytest.mark.parity


def test_vggt_aggregator(check, data_dir):
    """Tensors computed by an independent run of the published architecture on random weights."""
    from spatialvlm.models.geometry.vggt_checkpoint import load_vggt

    file = data_dir / "vggt_tiny.safetensors"
    encoder = load_vggt(file, layers=(0, 1, 2), precision="fp32", output_dtype=torch.float32)
    with safe_open(file, "pt") as tensors:
        count = len(json.loads(tensors.metadata()["cases"]))
        for case in range(count):
            images = tensors.get_tensor(f"case{case}.images")
            found = encoder.aggregator(images, (0, 1, 2))
            for layer in range(3):
                expected = tensors.get_tensor(f"case{case}.layer{layer}")
                error = (found[layer] - expected).abs().max()
                check(
                    "vggt",
                    f"aggregator, case {case}, layer {layer}",
                    error,
                    1e-5,
                    "reference tensors",
                )


@pytest.mark.parametrize("family", FAMILIES)
def test_fusion_equations(rig, check, family):
    """SSR (arXiv 2603.00409) eq. 2-4, written out: tokens = projector_3d(v + fc2(gelu(fc1(norm(s)))))."""
    bench = rig(family, {"size_policy": "match_grid"})
    bench.randomise_fusion()
    fusion, adapter = bench.model.fusion, bench.model.adapter
    member = bench.members()[0]
    batch = bench.pack([member])
    with torch.no_grad():
        seen = bench.model._see(batch)
        found = bench.model._fuse(batch, seen, has_media=True).spatial_tokens
        features = bench.model.geometry.features(batch)[0].layers[1]  # [S, gh, gw, C]
        units, rows, columns = batch["media_grid_thw"][0].tolist()
        frames = torch.nn.functional.interpolate(
            features.permute(0, 3, 1, 2), size=(rows, columns), mode="bilinear", antialias=True
        ).permute(0, 2, 3, 1)
        tau, norm = fusion.tau, fusion.trans.norm[0]
        tokens = []
        for unit in range(units):
            own = [frames[min(unit * tau + slot, len(frames) - 1)] for slot in range(tau)]
            s = torch.cat(
                [
                    torch.nn.functional.layer_norm(x, x.shape[-1:], norm.weight, norm.bias)
                    for x in own
                ],
                -1,
            )
            s = fusion.trans.fc2(torch.nn.functional.gelu(fusion.trans.fc1(s)))  # [gh, gw, d_vit]
            patches = seen.patches.view(units, rows // 2, columns // 2, 2, 2, -1)[unit]
            for row in range(rows // 2):
                for column in range(columns // 2):
                    block = (
                        s[2 * row : 2 * row + 2, 2 * column : 2 * column + 2] + patches[row, column]
                    )
                    block = block.reshape(1, -1) if adapter.flatten_units else block.reshape(4, -1)
                    tokens.append(fusion.projector_3d(block))
        expected = torch.cat([token.reshape(1, -1) for token in tokens])
    error = ((found - expected).norm() / expected.norm()).item()
    check(family, "spatial tokens (relative)", error, 1e-5, "equations written out")


@pytest.mark.parametrize("family", FAMILIES)
def test_warm_start(rig, check, family):
    bench = rig(family, {})
    batch = bench.pack(bench.members()[:1])
    with torch.no_grad():
        seen = bench.model._see(batch)
        spatial = bench.model._fuse(batch, seen, has_media=True).spatial_tokens
    check(
        family,
        "warm start, spatial = visual tokens",
        (spatial - seen.tokens).abs().max(),
        1e-6,
        "2D tokens",
    )
    with torch.no_grad():
        in_place = rig(family, {"insertion": "in_place"})
        three = in_place.model(in_place.pack()).sample_loss
        two = rig(family).model(in_place.pack()).sample_loss
    check(
        family,
        "warm in_place, loss (relative)",
        ((three - two).abs() / two).max(),
        1e-6,
        "2D model",
    )
