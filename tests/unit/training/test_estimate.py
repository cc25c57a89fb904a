"""Published sizes of real backbones against the formulas."""

import importlib
import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode
from transformers import CONFIG_MAPPING

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


def _saved_bytes(make, call, *, real):
    """Bytes of the storages that a bf16 layer keeps for its backward pass, its parameters left out."""
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            storages[storage._cdata] = storage
        return tensor

    with nullcontext() if real else FakeTensorMode():
        torch.set_default_dtype(torch.bfloat16)
        try:
            layer = make()
        finally:
            torch.set_default_dtype(torch.float32)
        own = {p.untyped_storage()._cdata for p in layer.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            out = call(layer)
    del out
    return sum(storage.nbytes() for storage in storages.values())


LAYERS = {
    "qwen2_5vl_7b": ("qwen2_5_vl.modeling_qwen2_5_vl", "Qwen2_5_VLDecoderLayer", "Qwen2_5_VLVisionBlock"),
    "qwen3vl_8b": ("qwen3_vl.modeling_qwen3_vl", "Qwen3VLTextDecoderLayer", "Qwen3VLVisionBlock"),
    "internvl3_8b": ("internvl.modeling_internvl", None, "InternVLVisionLayer"),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_activation_formulas_against_saved_tensors_of_real_layers(name):
    values = _config(name)
    config = CONFIG_MAPPING[values["model_type"]].from_dict(values)
    config.text_config._attn_implementation = config.vision_config._attn_implementation = "sdpa"
    file, text_class, vision_class = LAYERS[name]
    module = importlib.import_module(f"transformers.models.{file}")
    text, vision = text_decoder(values), vision_decoder(values)

    def hidden(count, width, batch=(1,)):
        return torch.randn(*batch, count, width, dtype=torch.bfloat16, requires_grad=True)

    if text_class is not None:
        found = _saved_bytes(
            lambda: getattr(module, text_class)(config.text_config, 0),
            lambda layer: layer(
                hidden(4096, text.hidden),
                position_embeddings=(torch.ones(1, 4096, text.head_dim, dtype=torch.bfloat16),) * 2,
                attention_mask=None,
                position_ids=None,
            ),
            real=False,
        )
        assert text.activation_bytes() == pytest.approx(found / 4096, rel=0.002)
    tables = 0.0

    def see(block):
        nonlocal tables
        if name.startswith("internvl"):
            return block(hidden(64, vision.hidden))
        tables = 2 * 4 * vision.head_dim  # rotary tables in fp32, the same for all blocks
        rotary = (torch.randn(64, vision.head_dim), torch.randn(64, vision.head_dim))
        ends = torch.tensor([0, 64], dtype=torch.int32)
        return block(hidden(64, vision.hidden, ()), cu_seqlens=ends, position_embeddings=rotary)

    # Real tensors: the blocks read segment lengths on the host.
    found = _saved_bytes(
        lambda: getattr(module, vision_class)(config.vision_config), see, real=True
    )
    assert vision.activation_bytes() == pytest.approx(found / 64 - tables, rel=0.002)


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
