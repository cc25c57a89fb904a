import math
from pathlib import Path

import pytest

from spatialvlm.config.geometry import GeometryConfig
from spatialvlm.models.build import build_meta_model, cost_coefficients
from spatialvlm.models.param_groups import split_parts

BACKBONES = Path(__file__).resolve().parents[3] / "configs" / "backbones"
# Parameters of the released checkpoints: language model without embeddings, vision encoder, projector, embeddings.
COUNTS = {
    "qwen2_5vl_7b": (6_525_621_760, 631_975_680, 44_574_464, 2 * 544_997_376),
    "qwen3vl_8b": (6_946_075_648, 415_891_440, 160_496_896, 2 * 622_329_856),
    "internvl3_8b": (6_525_621_760, 304_012_288, 27_540_480, 2 * 543_599_616),
}
FUSION = {"qwen2_5vl_7b": 51_462_400, "qwen3vl_8b": 46_171_136, "internvl3_8b": 30_692_352}
POST = {"qwen2_5vl_7b": 81_800_704, "qwen3vl_8b": 83_898_368, "internvl3_8b": 48_246_272}


def count(members):
    return sum(math.prod(p.shape) for _, p in members)


@pytest.mark.parametrize("name", COUNTS)
def test_released_sizes_by_part(name):
    parts = split_parts(build_meta_model(BACKBONES / f"{name}.json", GeometryConfig()))
    names = ("language_model", "vision_encoder", "projector", "embeddings")
    assert tuple(count(parts[part]) for part in names) == COUNTS[name]
    assert count(parts["geometry_fusion"]) == FUSION[name]


@pytest.mark.parametrize("name", POST)
def test_post_projector_sizes(name):
    section = GeometryConfig(fusion="post_projector")
    parts = split_parts(build_meta_model(BACKBONES / f"{name}.json", section))
    assert count(parts["geometry_fusion"]) == POST[name]


def test_tied_table_counts_once():
    parts = split_parts(build_meta_model(BACKBONES / "qwen2_5vl_3b.json"))
    assert count(parts["embeddings"]) == 311_164_928
    assert sum(count(members) for members in parts.values()) == 3_754_622_976


# Totals of the public model cards, in billions.
@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("qwen2_5vl_32b", 33.45),
        ("qwen2_5vl_72b", 73.41),
        ("qwen3vl_2b", 2.13),
        ("qwen3vl_4b", 4.44),
        ("qwen3vl_32b", 33.36),
        ("qwen3vl_30b_a3b", 31.07),
        ("internvl3_1b", 0.938),
        ("internvl3_2b", 2.09),
        ("internvl3_14b", 15.1),
        ("internvl3_5_8b", 8.53),
    ],
)
def test_total_sizes(name, billions):
    total = sum(
        count(members)
        for members in split_parts(build_meta_model(BACKBONES / f"{name}.json")).values()
    )
    assert total / 1e9 == pytest.approx(billions, rel=5e-3)


def test_flops_of_a_real_step():
    """Qwen2.5-VL-7B, 8 samples of 2,048 tokens with 1,024 visual tokens each and 512 supervised tokens in all."""
    model = build_meta_model(BACKBONES / "qwen2_5vl_7b.json")

    def step(cost):
        pairs = 8 * 2048 * 2049 / 2
        patches = 8 * 4096
        return (
            cost.per_token * 16384
            + cost.per_pair * pairs
            + cost.per_head_row * 512
            + cost.per_patch * patches
            + cost.per_patch_pair * patches * 4096
        )

    assert step(cost_coefficients(model)) / 1e12 == pytest.approx(798.8, rel=2e-3)
    recomputed = step(cost_coefficients(model, recompute_text=True))
    assert recomputed > step(cost_coefficients(model)) * 1.2
    for _, parameter in split_parts(model)["vision_encoder"]:
        parameter.requires_grad_(False)
    assert step(cost_coefficients(model)) / 1e12 == pytest.approx(710.0, rel=2e-3)


def test_geometry_terms_are_the_encoders_forward():
    model = build_meta_model(BACKBONES / "qwen2_5vl_7b.json", GeometryConfig())
    cost = cost_coefficients(model)
    frames, patches = 32, 936
    tokens = patches + 5
    total = (
        cost.geometry_per_frame_pair * frames * tokens**2
        + cost.geometry_per_global_pair * (frames * tokens) ** 2
    )
    assert total / 1e12 == pytest.approx(2.8 * 2 * 47 / 48 + 89.1 * 23 / 24, rel=1e-2)


def test_experts_count_by_use():
    dense = build_meta_model(BACKBONES / "qwen3vl_8b.json")
    sparse = build_meta_model(BACKBONES / "qwen3vl_30b_a3b.json")
    assert cost_coefficients(sparse).per_token < 0.5 * cost_coefficients(dense).per_token
