"""InternVL3 and InternVL3.5 through the ``-hf`` classes: square tiles, 1-D positions, a Qwen2 or Qwen3 decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from spatialvlm.errors import ConfigError
from spatialvlm.models.backbones.base import Backbone, VisionOutput
from spatialvlm.models.geometry.align import to_merge_units
from spatialvlm.sequence.pixels import PixelSpec

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class InternVL3(Backbone):
    """Every frame or tile is one image of ``image_size``; pixel shuffle at ratio 1/2 equals merge units."""

    family = "internvl3"
    model_types = ("internvl",)
    uses_mrope = False
    tau = 1
    frames_are_images = True
    flatten_units = True

    @property
    @override
    def vision_encoder(self) -> nn.Module:
        module: nn.Module = self.model.model.vision_tower
        return module

    @property
    @override
    def projector(self) -> nn.Module:
        module: nn.Module = self.model.model.multi_modal_projector
        return module

    @property
    @override
    def vision_blocks(self) -> list[nn.Module]:
        return list(self.model.model.vision_tower.encoder.layer)

    @override
    def see(self, pixel_values: Tensor, grid_thw: Tensor) -> VisionOutput:
        hidden = self.vision_encoder(pixel_values).last_hidden_state[
            :, 1:
        ]  # [F, gh * gw, d_vit], without CLS
        # All frames of a pack have one size: the checkpoint's tile, or the dummy's.
        rows, columns = (int(side) for side in grid_thw[0, 1:])
        patches = to_merge_units(hidden.unflatten(1, (rows, columns)))
        return VisionOutput(self.project(patches), patches)

    @override
    def dummy_pixels(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        side = 2 * self.pixels.patch
        return torch.zeros(1, 3, side, side, device=device, dtype=dtype), torch.tensor(
            [[1, 2, 2]], device=device
        )

    @override
    def use_linear_patches(self) -> None:
        """``Conv2d`` is fast; nothing to replace."""

    @override
    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        config = self.model.config
        if config.vision_feature_layer != -1 or config.downsample_ratio != 0.5:
            raise ConfigError(
                f"InternVL with vision_feature_layer={config.vision_feature_layer} and downsample_ratio="
                f"{config.downsample_ratio} is not supported; released checkpoints have -1 and 0.5"
            )

    @classmethod
    @override
    def pixel_spec(cls, config: Any, processor: dict[str, Any]) -> PixelSpec:
        size = processor.get("size", {})
        expected = list(config.vision_config.image_size)
        if size and [size.get("height"), size.get("width")] != expected:
            raise ConfigError(
                f"the image processor resizes to {size}, the vision encoder was trained at {expected}; "
                "correct `size` in preprocessor_config.json"
            )
        return PixelSpec(
            "frames",
            tuple(processor.get("image_mean", IMAGENET_MEAN)),
            tuple(processor.get("image_std", IMAGENET_STD)),
            patch=config.vision_config.patch_size[0],
        )
