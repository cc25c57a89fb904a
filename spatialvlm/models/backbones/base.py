"""What a backbone family has to answer; everything else treats all families alike.

A new family is one file with a subclass of :class:`Backbone` and one entry in
:data:`spatialvlm.models.backbones.FAMILIES`.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from spatialvlm.errors import CheckpointError, ConfigError
from spatialvlm.models.attention import VISION_ATTENTION, Tree, register
from spatialvlm.sequence.pixels import PixelSpec

Part = Literal[
    "language_model", "vision_encoder", "projector", "geometry_fusion", "embeddings", "lora"
]


@dataclass
class VisionOutput:
    """One pass of the vision encoder over all media of a pack.

    Attributes:
        tokens: ``[N / 4, D]``, what the language model sees (2D).
        patches: ``[N, d_vit]`` before the projector; the four patches of a merge unit are adjacent.
        deepstack: Per injected layer ``[N / 4, D]``; empty without deepstack.
    """

    tokens: Tensor
    patches: Tensor
    deepstack: list[Tensor] = field(default_factory=list)


class PatchLinear(nn.Module):
    """A patch convolution as a matrix product, with the convolution's own parameters and names.

    Kernel and stride of these convolutions are the whole input, so both compute the same; ``Conv3d`` is 10 to 20
    times slower in some PyTorch releases.
    """

    def __init__(self, conv: nn.Conv3d) -> None:
        super().__init__()
        self.weight = conv.weight
        self.bias = conv.bias

    def forward(self, patches: Tensor) -> Tensor:
        """``[N, channels, temporal, height, width]`` to ``[N, d_vit]``."""
        return nn.functional.linear(patches.flatten(1), self.weight.flatten(1), self.bias)


class Backbone(ABC):
    """One model family behind one interface.

    The object holds no parameters; ``model`` is the ``transformers`` model and is registered elsewhere.

    Args:
        model: A ``...ForConditionalGeneration`` model.
        pixels: What the checkpoint's processor does after resizing.
    """

    family: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    uses_mrope: ClassVar[bool] = True
    tau: ClassVar[int] = 2
    """Frames of a video per temporal unit."""
    frames_are_images: ClassVar[bool] = False
    """Whether the library encodes every frame of a video as an image of its own."""
    flatten_units: ClassVar[bool] = False
    """Whether the projector takes a merge unit as one row (else as four consecutive rows)."""

    def __init__(self, model: Any, pixels: PixelSpec) -> None:
        self.model = model
        self.pixels = pixels

    # -- modules ---------------------------------------------------------------------------------

    @property
    @abstractmethod
    def vision_encoder(self) -> nn.Module:
        """Vision encoder; may contain the projector."""

    @property
    @abstractmethod
    def projector(self) -> nn.Module:
        """Module from merged patches to language-model width; the 3D projector is a copy of it."""

    @property
    def projectors(self) -> list[nn.Module]:
        """All modules of the part ``projector``."""
        return [self.projector]

    @property
    def language_model(self) -> Any:
        """Decoder without head."""
        return self.model.model.language_model

    @property
    def embeddings(self) -> nn.Embedding:
        """Input embedding table."""
        table: nn.Embedding = self.model.get_input_embeddings()
        return table

    @property
    @abstractmethod
    def vision_blocks(self) -> list[nn.Module]:
        """Blocks that activation checkpointing, compilation and FSDP wrap one by one."""

    @property
    def text_layers(self) -> list[nn.Module]:
        """Decoder layers, as :attr:`vision_blocks`."""
        return list(self.language_model.layers)

    def parts(self) -> dict[Part, list[nn.Module]]:
        """Modules of every part; the deepest listed module owns a parameter."""
        tables: list[nn.Module] = [self.embeddings, self.model.lm_head]
        return {
            "language_model": [self.language_model],
            "vision_encoder": [self.vision_encoder],
            "projector": self.projectors,
            "embeddings": tables,
        }

    # -- sizes -----------------------------------------------------------------------------------

    @property
    def text_config(self) -> Any:
        """Configuration of the language model."""
        return self.model.config.text_config

    @property
    def vision_config(self) -> Any:
        """Configuration of the vision encoder."""
        return self.model.config.vision_config

    @property
    def d_vit(self) -> int:
        """Width of a patch before the projector."""
        return int(self.vision_config.hidden_size)

    @property
    def d_llm(self) -> int:
        """Width of the language model."""
        return int(self.text_config.hidden_size)

    # -- computation -----------------------------------------------------------------------------

    @abstractmethod
    def see(self, pixel_values: Tensor, grid_thw: Tensor) -> VisionOutput:
        """Run vision encoder and projector once on all media.

        Args:
            pixel_values: From :func:`spatialvlm.sequence.pixels.prepare`.
            grid_thw: int64 ``[num_media, 3]``, patch grids before the merger, on the same device.
        """

    @abstractmethod
    def dummy_pixels(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Zeros for one merge unit (4 patches) and their grid ``[[1, 2, 2]]``."""

    def project(self, patches: Tensor) -> Tensor:
        """Vision projector on ``[N, d_vit]`` patches in merge order, to ``[N / 4, D]``."""
        if self.flatten_units:
            patches = patches.reshape(-1, 4 * patches.shape[-1])
        tokens: Tensor = self.projector(patches)
        return tokens

    def read(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        *,
        tree: Tree | None = None,
        mask: Tensor | None = None,
        cache: Any = None,
        visual: Tensor | None = None,
        deepstack: list[Tensor] | None = None,
    ) -> Tensor:
        """Run the decoder without head.

        Args:
            inputs_embeds: ``[B, T, D]``.
            position_ids: ``[4, B, T]``, or ``[B, T]`` without M-RoPE.
            tree: Segments of a pack (B = 1).
            mask: bool ``[B, 1, T, keys]`` instead of ``tree``, for generation steps.
            cache: A ``transformers`` cache that receives keys and values.
            visual: bool ``[B, T]``, positions that receive ``deepstack``.
            deepstack: Features of the visual positions, per layer.

        Returns:
            Hidden states ``[B, T, D]`` after the final norm.
        """
        extra: dict[str, Any] = {}
        if deepstack:
            extra = {"visual_pos_masks": visual, "deepstack_visual_embeds": deepstack}
        output = self.language_model(
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=cache is not None,
            tree=tree,
            **extra,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    # -- set-up ----------------------------------------------------------------------------------

    def configure(
        self,
        *,
        attention: str,
        vision_attention: str = VISION_ATTENTION,
        linear_patches: bool = True,
    ) -> None:
        """Choose attention functions and the patch embedding.

        Args:
            attention: Name for the language model, ``tree_*`` for packs.
            vision_attention: Name for the vision encoder; ``sdpa`` is the library's.
            linear_patches: Replace the patch convolution by a matrix product.
        """
        register()
        self.refuse_unsupported()
        self.text_config._attn_implementation_internal = attention
        self.vision_config._attn_implementation_internal = vision_attention
        if linear_patches:
            self.use_linear_patches()

    def use_linear_patches(self) -> None:
        """Replace the patch convolution; a family with a fast convolution keeps it."""
        embed: Any = self.vision_encoder.patch_embed
        if isinstance(embed.proj, nn.Conv3d):
            embed.proj = PatchLinear(embed.proj)

    def refuse_unsupported(self) -> None:
        """Raise for models whose layers mix samples of a pack outside attention.

        Raises:
            ConfigError: Sliding-window or recurrent layers, attention dropout, router balance losses.
        """
        name, text = self.model.config.model_type, self.text_config
        kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"}:
            raise ConfigError(
                f"packs need full attention in every layer, {name} has {sorted(kinds)}; "
                "set use_sliding_window to false in config.json, or train another model"
            )
        if text.attention_dropout:
            raise ConfigError(
                f"{name} has attention_dropout={text.attention_dropout}, which tree attention does not apply; "
                "set it to 0 in config.json"
            )
        if getattr(text, "output_router_logits", False):
            raise ConfigError(
                f"{name} asks for a router balance loss, which mixes the samples of a pack; set "
                "output_router_logits to false in config.json"
            )

    def to(self, device: torch.device) -> Self:
        """Move the model; returns the adapter."""
        self.model.to(device)
        return self

    # -- loading ---------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def pixel_spec(cls, config: Any, processor: dict[str, Any]) -> PixelSpec:
        """From ``config.json`` and ``preprocessor_config.json``."""


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object of a model directory, ``{}`` when the file does not exist.

    Raises:
        CheckpointError: The file is not a JSON object.
    """
    path = folder / name
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path} is not valid JSON ({error}); download or export the model again"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected an object")
    return content


def image_processor_config(folder: Path) -> dict[str, Any]:
    """Image processor settings, from ``preprocessor_config.json`` or the newer ``processor_config.json``."""
    old = read_json(folder, "preprocessor_config.json")
    return old or dict(read_json(folder, "processor_config.json").get("image_processor", {}))
