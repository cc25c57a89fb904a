"""Qwen3-VL, dense and mixture of experts: no windows, deepstack features, interleaved M-RoPE."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from spatialvlm.models.backbones.base import Backbone, VisionOutput
from spatialvlm.sequence.pixels import PixelSpec


class Qwen3VL(Backbone):
    """``model.visual`` holds encoder, merger and one merger per deepstack layer."""

    family = "qwen3vl"
    model_types = ("qwen3_vl", "qwen3_vl_moe")

    @property
    @override
    def vision_encoder(self) -> nn.Module:
        module: nn.Module = self.model.model.visual
        return module

    @property
    @override
    def projector(self) -> nn.Module:
        module: nn.Module = self.model.model.visual.merger
        return module

    @property
    @override
    def projectors(self) -> list[nn.Module]:
        return [self.projector, self.model.model.visual.deepstack_merger_list]

    @property
    @override
    def vision_blocks(self) -> list[nn.Module]:
        return list(self.model.model.visual.blocks)

    @override
    def see(self, pixel_values: Tensor, grid_thw: Tensor) -> VisionOutput:
        output = self.vision_encoder(pixel_values, grid_thw=grid_thw)
        return VisionOutput(
            output.pooler_output, output.last_hidden_state, list(output.deepstack_features)
        )

    @override
    def dummy_pixels(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        width = 3 * self.pixels.temporal * self.pixels.patch**2
        return torch.zeros(4, width, device=device, dtype=dtype), torch.tensor(
            [[1, 2, 2]], device=device
        )

    @classmethod
    @override
    def pixel_spec(cls, config: Any, processor: dict[str, Any]) -> PixelSpec:
        vision = config.vision_config
        return PixelSpec(
            "patches",
            tuple(processor.get("image_mean", (0.5, 0.5, 0.5))),
            tuple(processor.get("image_std", (0.5, 0.5, 0.5))),
            patch=vision.patch_size,
            merge=vision.spatial_merge_size,
            temporal=vision.temporal_patch_size,
        )
