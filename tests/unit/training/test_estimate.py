"""Published sizes of real backbones against the formulas."""

import json
from pathlib import Path

import pytest

from spatialvlm.errors import ConfigError
from spatialvlm.training.estimate import (
    activation_bytes,
    format_memory,
    memory_table,
    require_fit,
    state_bytes,
    text_decoder,
    vision_decoder,
)

BACKBONES = Path(__file__).resolve().parents[3] / "configs" / "backbones"
SIZES = {"qwen2_5vl_3b": 3_754_622_976, "qwen2_5vl_7b": 8_292_166_656, "qwen3vl_8b": 8_767_123_696}


def _config(name):
    return json.loads((BACKBONES / f"{name}.json").read_text())


@pytest.mark.parametrize(
    ("name", "expected"),
    [("qwen2_5vl_7b", 225_656), ("qwen2_5vl_3b", 130_376), ("qwen3vl_8b", 215_592)],
)
def test_activation_bytes_per_token_and_layer(name, expected):
    assert text_decoder(_config(name)).activation_bytes() == expected


@pytest.mark.parametrize(
    ("name", "world", "strategy", "gigabytes"),
    [
        ("qwen2_5vl_3b", 1, "ddp", 60.1),
        ("qwen2_5vl_3b", 1, "zero2", 67.6),
        ("qwen2_5vl_7b", 8, "zero1", 45.6),
        ("qwen2_5vl_7b", 8, "zero2", 33.2),
        ("qwen2_5vl_7b", 8, "zero3", 18.7),
        ("qwen2_5vl_7b", 8, "fsdp2", 16.6),
        ("qwen3vl_8b", 64, "zero2", 19.7),
        ("qwen3vl_8b", 64, "zero3", 2.5),
    ],
)
def test_state_table(name, world, strategy, gigabytes):
    found = state_bytes(strategy, trainable=SIZES[name], frozen=0, world=world)
    assert found / 1e9 == pytest.approx(gigabytes, abs=0.06)


def test_activations_of_a_full_pack():
    config = _config("qwen2_5vl_7b")
    kwargs = {"tokens": 16_384, "patches": 0, "head_rows": 1024, "supervised": 16_384, "checkpoint_vision": False, "vision_trains": False}  # fmt: skip
    text, vision = text_decoder(config), vision_decoder(config)
    full = activation_bytes(text, vision, checkpoint_text=False, **kwargs)
    light = activation_bytes(text, vision, checkpoint_text=True, **kwargs)
    assert full["language model"] / 1e9 == pytest.approx(103.5, abs=0.1)
    assert light["language model"] / 1e9 == pytest.approx(7.0, abs=0.1)
    assert full["head"] / 1e9 == pytest.approx(1.87, abs=0.01)
    assert full["vision encoder"] == 0


def test_table_names_the_largest_item_and_what_fits():
    rows = memory_table(
        trainable=SIZES["qwen2_5vl_7b"],
        frozen=0,
        worlds=(1, 8),
        activations={"language model": 7e9, "head": 1.9e9},
        largest_block=233_000_000,
        geometry=True,
        bf16=True,
        device_bytes=80e9,
    )
    by_key = {(r.strategy, r.world): r for r in rows}
    assert by_key["ddp", 1].fits is False
    assert by_key["zero2", 8].fits is True
    assert by_key["ddp", 1].largest == "states"
    assert "zero3" in format_memory(rows)
    assert require_fit(by_key["zero2", 8], strict=True, device_gb=80) is None
    assert "of 80.0 GB" in require_fit(by_key["ddp", 1], strict=False, device_gb=80)
    with pytest.raises(ConfigError, match=r"Lower packing.max_tokens"):
        require_fit(by_key["ddp", 1], strict=True, device_gb=80)
