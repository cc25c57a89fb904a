"""FLOPs of a step as a function of a pack's sizes, read off the modules of the model.

A matrix of N weights costs 2N per row forward, 2N for the gradient of its input (when anything in front of it or the
matrix itself trains) and 2N for its own gradient (when it trains); recomputation adds the forward again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from spatialvlm.models.spatial_vlm import SpatialVLM
from spatialvlm.typing import CostCoefficients

WINDOW_PATCHES = 64
"""Patches of one attention window of Qwen2.5-VL (112 px / 14 px, squared)."""


def cost_coefficients(
    model: SpatialVLM, *, recompute_text: bool = False, recompute_vision: bool = False
) -> CostCoefficients:
    """Coefficients of a model whose parts are already frozen; works on the meta device.

    Args:
        model: With ``requires_grad`` as in training.
        recompute_text: Decoder layers and head recompute in the backward pass.
        recompute_vision: Vision blocks recompute.
    """
    adapter = model.adapter
    vision, projectors = (
        _count([adapter.vision_encoder], without=adapter.projectors),
        _count(adapter.projectors),
    )
    fusion = _count([] if model.fusion is None else [model.fusion])
    text = _count(adapter.text_layers, active=_active_experts(adapter.text_config))
    vision_flows = vision.trained > 0
    text_flows = vision_flows or (projectors.trained + fusion.trained + text.trained) > 0
    text_flows = text_flows or adapter.embeddings.weight.requires_grad
    head = adapter.model.lm_head.weight
    width = adapter.text_config.num_attention_heads * _head_dim(adapter.text_config)
    blocks, windowed = _vision_attention(adapter)
    vision_pass = _passes(vision_flows, recompute_vision)
    unit = 1 / adapter.pixels.merge**2  # projectors run once per merge unit
    return CostCoefficients(
        per_token=text.flops(text_flows, recompute_text),
        per_pair=4.0 * width * len(adapter.text_layers) * _passes(text_flows, recompute_text),
        per_head_row=2.0 * head.numel() * (1 + text_flows + head.requires_grad + recompute_text),
        per_patch=vision.flops(vision_flows, recompute_vision)
        + projectors.flops(vision_flows or projectors.trained > 0, recompute=False) * unit
        + 4.0 * adapter.d_vit * windowed * WINDOW_PATCHES * vision_pass,
        per_patch_pair=4.0 * adapter.d_vit * blocks * vision_pass,
        **_geometry_costs(model, fusion.flops(fusion.trained > 0, recompute=False)),
    )


@dataclass(frozen=True, slots=True)
class _Matrices:
    """Weights of matrix products: all that run per row, and those that train."""

    active: float
    trained: float

    def flops(self, flows: bool, recompute: bool) -> float:
        return 2 * self.active * (1 + flows + recompute) + 2 * self.trained


def _count(
    modules: Iterable[nn.Module], *, without: Iterable[nn.Module] = (), active: float = 1.0
) -> _Matrices:
    """Matrices of ``modules``; stacked expert matrices count with the share that a token uses."""
    skipped = {id(parameter) for module in without for parameter in module.parameters()}
    skipped |= {
        id(parameter)
        for module in modules
        for table in module.modules()
        if isinstance(table, nn.Embedding)
        for parameter in table.parameters()
    }
    total = trained = 0.0
    for module in modules:
        for name, parameter in module.named_parameters():
            if parameter.ndim < 2 or id(parameter) in skipped or _is_token(name):
                continue
            size = parameter.numel() * (active if parameter.ndim == 3 else 1.0)
            total += size
            trained += size if parameter.requires_grad else 0.0
    return _Matrices(total, trained)


def _is_token(name: str) -> bool:
    """Learned vectors that are added, not multiplied."""
    return name.endswith(("cls_token", "mask_token", "position_embeddings"))


def _passes(flows: bool, recompute: bool) -> int:
    """Attention products per pair, in units of the forward: its backward has twice as many."""
    return 1 + 2 * flows + recompute


def _active_experts(config: Any) -> float:
    experts = getattr(config, "num_experts", None)
    return config.num_experts_per_tok / experts if experts else 1.0


def _head_dim(config: Any) -> int:
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def _vision_attention(adapter: Any) -> tuple[int, int]:
    """Vision blocks with full attention, and with windows."""
    full = getattr(adapter.vision_config, "fullatt_block_indexes", None)
    blocks = len(adapter.vision_blocks)
    return (blocks, 0) if full is None else (len(full), blocks - len(full))


def _geometry_costs(model: SpatialVLM, fusion_flops: float) -> dict[str, float]:
    """Frozen encoder, forward only, per encoder token and pair; plus the fusion modules per token.

    The fusion runs per patch of the vision grid; encoder grid and vision grid have about the same number of patches.
    """
    if model.geometry is None or model.fusion is None:
        return {}
    merge = model.fusion.merge_size**2
    shared = fusion_flops / (
        model.fusion.tau * merge
    )  # upper bound: the MLP runs per patch, the projector per unit
    encoder: Any = model.geometry.encoder
    encoder = getattr(encoder, "encoder", encoder)  # behind the cache
    if not hasattr(encoder, "aggregator"):  # one ViT, every frame alone
        config = encoder.model.config
        channels, layers = config.hidden_size, 1 + max(encoder.default_layers)
        return {
            "geometry_per_token": 24.0 * channels**2 * layers + shared,
            "geometry_per_frame_pair": 4.0 * channels * layers,
        }
    config = encoder.aggregator.config
    channels, pairs = config.embed_dim, 1 + max(encoder.default_layers)
    block = 24.0 * channels**2
    patch_embed = 6.0 * channels * config.patch_size**2
    return {
        "geometry_per_token": block * (config.vit_depth + 2 * pairs) + patch_embed + shared,
        "geometry_per_frame_pair": 4.0 * channels * (config.vit_depth + pairs),
        "geometry_per_global_pair": 4.0 * channels * pairs,
    }
