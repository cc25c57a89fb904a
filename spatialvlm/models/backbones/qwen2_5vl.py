"""Qwen2.5-VL: window attention in the vision encoder, M-RoPE in three sections."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from spatialvlm.models.backbones.base import Backbone, VisionOutput
from spatialvlm.models.geometry.align import from_window_order
from spatialvlm.sequence.pixels import PixelSpec

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class Qwen2_5VL(Backbone):  # noqa: N801  (the model's own name)
    """The encoder permutes patches into windows; its last hidden state comes back in that order."""

    family = "qwen2_5vl"
    model_types = ("qwen2_5_vl",)

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
    def vision_blocks(self) -> list[nn.Module]:
        return list(self.model.model.visual.blocks)

    @override
    def see(self, pixel_values: Tensor, grid_thw: Tensor) -> VisionOutput:
        from transformers.vision_utils import get_vision_window_index

        config = self.vision_config
        window_index, window_ends = get_vision_window_index(
            grid_thw,
            spatial_merge_size=config.spatial_merge_size,
            window_size=config.window_size,
            patch_size=config.patch_size,
        )
        window_index = window_index.to(pixel_values.device)
        output = self.vision_encoder(
            pixel_values,
            grid_thw=grid_thw,
            window_index=window_index,
            cu_window_seqlens=window_ends,
        )
        patches = from_window_order(
            output.last_hidden_state, window_index, config.spatial_merge_size
        )
        return VisionOutput(output.pooler_output, patches)

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
            tuple(processor.get("image_mean", CLIP_MEAN)),
            tuple(processor.get("image_std", CLIP_STD)),
            patch=vision.patch_size,
            merge=vision.spatial_merge_size,
            temporal=vision.temporal_patch_size,
        )
