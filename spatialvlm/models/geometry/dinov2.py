"""DINOv2 and DINOv3 through ``transformers``: every frame alone, the control without multi-view."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from spatialvlm.errors import CheckpointError, ConfigError
from spatialvlm.models.geometry.base import GeometryEncoder
from spatialvlm.models.geometry.loader import Weights, encoder_fingerprint
from spatialvlm.models.geometry.vggt import normalise

MODEL_TYPES = ("dinov2", "dinov2_with_registers", "dinov3_vit")
INCIDENTAL = ("architectures", "dtype", "transformers_version")  # in a config, without effect


class Dinov2Encoder(GeometryEncoder):
    """A self-supervised ViT as a frozen per-frame encoder.

    Args:
        model: ``Dinov2Model``, ``Dinov2WithRegistersModel`` or ``DINOv3ViTModel``. Its layers behind
            the last requested one are dropped.
        layers: Block indices that :meth:`forward` returns by default; negative from the end.
        precision: ``bf16`` runs matrix products in bfloat16 with a float32 residual stream.
        chunk: Frames per pass; does not change the result.
        output_dtype: Dtype of the features.
    """

    name = "dinov2"
    depends_on_first_frame = False

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[int] = (-2,),
        precision: Literal["bf16", "fp32"] = "bf16",
        chunk: int = 32,
        output_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        config: Any = model.config
        if precision not in ("bf16", "fp32"):
            raise ConfigError(f"geometry.precision={precision!r} is not one of: bf16, fp32")
        self.model = model
        self.precision = precision
        self.chunk = chunk
        self.output_dtype = output_dtype
        size = config.patch_size
        self.patch_size = self.pixel_multiple = size if isinstance(size, int) else size[0]
        self.feature_dim = config.hidden_size
        self.num_special = 1 + getattr(config, "num_register_tokens", 0)
        self.num_layers = config.num_hidden_layers
        self.default_layers = self.resolve_layers(layers)
        del self.blocks[max(self.default_layers) + 1 :]
        self.freeze()

    @property
    def blocks(self) -> nn.ModuleList:
        """Transformer blocks that were kept."""
        model: Any = self.model
        stack = model.model if model.config.model_type == "dinov3_vit" else model.encoder
        blocks: nn.ModuleList = stack.layer
        return blocks

    def encode(
        self, frames: UInt8[Tensor, "B S 3 H W"], layers: tuple[int, ...], return_special: bool
    ) -> tuple[dict[int, Float[Tensor, "B S gh gw C"]], Float[Tensor, "B S R C"] | None]:
        """Encode groups of one shape; layers are valid and not negative."""
        if max(layers) >= len(self.blocks):
            raise ConfigError(
                f"layer {max(layers)} was not loaded: this encoder was built for layers "
                f"{list(self.default_layers)}. Name all layers when loading it"
            )
        shape = frames.shape[:2]
        rows, cols = (side // self.patch_size for side in frames.shape[-2:])
        chunks = [
            self._states(chunk, layers) for chunk in torch.split(frames.flatten(0, 1), self.chunk)
        ]
        states = {layer: torch.cat([chunk[layer] for chunk in chunks]) for layer in layers}
        patches = {
            layer: state[:, self.num_special :].reshape(*shape, rows, cols, -1)
            for layer, state in states.items()
        }
        last = states[max(layers)][:, : self.num_special]
        return patches, last.reshape(*shape, *last.shape[1:]) if return_special else None

    def _states(
        self, frames: UInt8[Tensor, "F 3 H W"], layers: Sequence[int]
    ) -> dict[int, Float[Tensor, "F P C"]]:
        """Raw residual states behind the requested blocks."""
        kept: dict[int, Tensor] = {}

        def keep(layer: int) -> Any:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                state = output if isinstance(output, Tensor) else output[0]
                kept[layer] = state.to(self.output_dtype)

            return hook

        handles = [self.blocks[layer].register_forward_hook(keep(layer)) for layer in layers]
        try:
            with torch.autocast(
                frames.device.type, torch.bfloat16, enabled=self.precision == "bf16"
            ):
                self.model(normalise(frames.float() / 255))
        finally:
            for handle in handles:
                handle.remove()
        return kept


def load_dinov2(
    source: str | Path,
    *,
    layers: Sequence[int] = (-2,),
    precision: Literal["bf16", "fp32"] = "bf16",
    device: torch.device | str = "cpu",
    revision: str | None = None,
    vit_chunk: int = 32,
    output_dtype: torch.dtype = torch.bfloat16,
) -> Dinov2Encoder:
    """Build a frozen DINOv2 or DINOv3 encoder from a model folder or hub id.

    Args:
        source: Folder with ``config.json`` and weights, or hub id such as ``facebook/dinov2-large``.
        layers: Block indices whose features are wanted, 0-based, negative from the end.
        precision: ``bf16`` runs matrix products in bfloat16.
        device: Where the encoder lives.
        revision: Hub revision.
        vit_chunk: Frames per pass.
        output_dtype: Dtype of the features.

    Raises:
        CheckpointError: No such model, another architecture, or missing tensors.
    """
    from transformers import AutoConfig, AutoModel

    try:
        config = AutoConfig.from_pretrained(source, revision=revision)
        if config.model_type not in MODEL_TYPES:
            raise CheckpointError(
                f"{source} is a {config.model_type} model; geometry.encoder=dinov2 takes "
                f"{', '.join(MODEL_TYPES)}"
            )
        model, report = AutoModel.from_pretrained(
            source, revision=revision, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"geometry.source={source} cannot be loaded as a DINO model: {error}. Download it and give "
            f"the local folder (licence and access: https://huggingface.co/{source})"
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise CheckpointError(f"{source} lacks {len(missing)} tensors: {', '.join(missing[:5])}")
    encoder = Dinov2Encoder(model.to(device), layers, precision, vit_chunk, output_dtype)
    tensors = {name: value.cpu() for name, value in model.state_dict().items()}
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    settings = {k: v for k, v in config.to_diff_dict().items() if k not in INCIDENTAL}
    encoder.fingerprint = encoder_fingerprint(
        config.model_type,
        {**settings, "precision": precision},
        Weights((), shapes, tensors.__getitem__),
        tensors,
    )
    return encoder


def meta_dinov2(source: str | Path, layers: Sequence[int]) -> Dinov2Encoder:
    """The encoder without storage: sizes of the source's config; of DINOv2-L/14 if it cannot be reached."""
    from transformers import AutoConfig, AutoModel, Dinov2Config

    try:
        config = AutoConfig.from_pretrained(source)
    except OSError:
        config = Dinov2Config(
            hidden_size=1024,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=518,
            patch_size=14,
        )
    with torch.device("meta"):
        return Dinov2Encoder(AutoModel.from_config(config), layers)
