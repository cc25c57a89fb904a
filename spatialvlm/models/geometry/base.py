"""What every geometry encoder offers: uint8 frames in, features per group of frames out."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from spatialvlm.errors import ConfigError, GeometryError
from spatialvlm.sequence.sizes import Size, SizePolicy

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
"""Statistics of ImageNet; DINOv2 and VGGT were trained with them."""

EncoderT = TypeVar("EncoderT", bound="GeometryEncoder")


@dataclass(frozen=True, slots=True)
class GeometryFeatures:
    """Features of one group of frames.

    Attributes:
        layers: Layer index (not negative) -> ``[S, g'h, g'w, C]``, raw residual states: a norm must follow.
        special: ``[S, num_special, C]`` of the last requested layer, camera token first, or ``None``.
        grid: ``(S, g'h, g'w)``.
    """

    layers: dict[int, Float[Tensor, "S gh gw C"]]
    special: Float[Tensor, "S R C"] | None
    grid: tuple[int, int, int]


class GeometryEncoder(nn.Module, ABC):
    """A frozen image or video encoder that knows about 3D.

    It stays in eval mode and outside autograd whatever the surrounding model does; keep it in a plain
    attribute (not a registered submodule) so that optimizers, wrappers and checkpoints do not see it.

    Attributes:
        name: Name of the encoder in configs.
        patch_size: Side of a patch in pixels.
        pixel_multiple: Frame sizes must be multiples of this.
        feature_dim: Channels of one layer's features, 0 without features.
        num_special: Tokens per frame that are no patches.
        depends_on_first_frame: Whether features are relative to the first frame.
        default_layers: Layers that :meth:`forward` returns if not told otherwise.
        frames_per_pass: Groups of equal shape share a pass up to this many frames; limits memory.
        fingerprint: Identifies weights, configuration and numerics; 64 hexadecimal digits.
    """

    name: str
    patch_size: int
    pixel_multiple: int
    feature_dim: int
    num_special: int
    depends_on_first_frame: bool
    num_layers: int
    default_layers: tuple[int, ...]
    frames_per_pass: int = 32
    fingerprint: str = ""
    reference_frame: Literal["first", "last"] = "first"
    output_dtype: torch.dtype = torch.bfloat16

    def target_size(self, src_hw: Size, grid_hw: Size, policy: SizePolicy) -> Size:
        """Frame size this encoder wants; the loader calls the same policy.

        Args:
            src_hw: Size of the source frame in pixels.
            grid_hw: Patch grid of the vision-language model before its merger.
            policy: Policy with this encoder's patch size.
        """
        return policy.target(src_hw, grid_hw)

    @abstractmethod
    def encode(
        self, frames: UInt8[Tensor, "B S 3 H W"], layers: tuple[int, ...], return_special: bool
    ) -> tuple[dict[int, Float[Tensor, "B S gh gw C"]], Float[Tensor, "B S R C"] | None]:
        """Encode groups of one shape; layers are valid and not negative."""

    @torch.no_grad()
    def forward(
        self,
        videos: Sequence[UInt8[Tensor, "_ 3 _ _"]],
        layers: Iterable[int] | None = None,
        return_special: bool = False,
    ) -> list[GeometryFeatures]:
        """Encode groups of frames; small groups of equal shape share a pass.

        Args:
            videos: uint8 RGB groups on the encoder's device. Values are normalised in here.
            layers: Layer indices, negative from the end; ``None`` = ``default_layers``.
            return_special: Also return the camera and register tokens.

        Returns:
            One entry per group, in input order.

        Raises:
            GeometryError: Wrong dtype, shape or size of frames.
            ConfigError: A layer that does not exist.
        """
        wanted = self.resolve_layers(self.default_layers if layers is None else layers)
        by_shape: dict[torch.Size, list[int]] = {}
        for index, video in enumerate(videos):
            self._check(video)
            by_shape.setdefault(video.shape, []).append(index)
        results: dict[int, GeometryFeatures] = {}
        for indices in self._passes(by_shape):
            frames = torch.stack([videos[index] for index in indices])
            if self.reference_frame == "last":
                frames = frames.flip(1)
            with torch.autocast(frames.device.type, enabled=False), exact_float32():
                features, special = self.encode(frames, wanted, return_special)
            if self.reference_frame == "last":
                features = {layer: x.flip(1) for layer, x in features.items()}
                special = None if special is None else special.flip(1)
            for row, index in enumerate(indices):
                one = {layer: x[row] for layer, x in features.items()}
                grid = next(iter(one.values())).shape[:3]
                results[index] = GeometryFeatures(
                    one, None if special is None else special[row], (grid[0], grid[1], grid[2])
                )
        return [results[index] for index in range(len(videos))]

    def _passes(self, by_shape: dict[torch.Size, list[int]]) -> Iterator[list[int]]:
        """Groups per pass: as many of one shape as stay below ``frames_per_pass``, at least one."""
        for shape, indices in by_shape.items():
            size = max(1, self.frames_per_pass // shape[0])
            for start in range(0, len(indices), size):
                yield indices[start : start + size]

    def resolve_layers(self, layers: Iterable[int]) -> tuple[int, ...]:
        """Layer indices counted from the first layer, ascending.

        Raises:
            ConfigError: The encoder has no such layer, or one is named twice.
        """
        layers = tuple(layers)
        if not layers or any(not -self.num_layers <= k < self.num_layers for k in layers):
            raise ConfigError(
                f"geometry.layers={list(layers)}: {self.name} has layers "
                f"{-self.num_layers}..{self.num_layers - 1}"
            )
        known: dict[int, int] = {}
        for k in layers:
            if k % self.num_layers in known:
                raise ConfigError(
                    f"geometry.layers={list(layers)}: {known[k % self.num_layers]} and {k} are the same of the "
                    f"{self.num_layers} layers of {self.name}; name it once"
                )
            known[k % self.num_layers] = k
        return tuple(sorted(known))

    def train(self: EncoderT, mode: bool = True) -> EncoderT:  # noqa: ARG002  (an outer model.train() must not reach in)
        """Stay in eval mode."""
        return super().train(False)

    def freeze(self: EncoderT) -> EncoderT:
        """Eval mode, no gradients."""
        return self.requires_grad_(False).eval()

    def _check(self, video: Tensor) -> None:
        shape = tuple(video.shape)
        if video.dtype != torch.uint8:
            raise GeometryError(
                f"{self.name} takes uint8 RGB frames and normalises them itself, got {video.dtype} "
                f"of shape {shape}. Pass the decoded frames, not pixel_values"
            )
        if len(shape) != 4 or shape[0] == 0 or shape[1] != 3:
            raise GeometryError(
                f"{self.name} takes groups of frames [S, 3, H, W] with S >= 1, got shape {shape}"
            )
        if shape[2] % self.pixel_multiple or shape[3] % self.pixel_multiple:
            raise GeometryError(
                f"frames of {shape[2]}x{shape[3]} pixels do not fit {self.name}: height and width "
                f"must be multiples of {self.pixel_multiple} (patch size {self.patch_size}). "
                "Use layout.geometry_size to choose the size"
            )


@contextmanager
def exact_float32() -> Iterator[None]:
    """Float32 matrix products and convolutions without TF32 inside the block.

    Through the per-operation settings of PyTorch 2.9 and later: the older ``allow_tf32`` flags cannot be
    read once somebody has used these.
    """
    cudnn: Any = torch.backends.cudnn
    settings: list[Any] = [torch.backends.cuda.matmul, cudnn.conv]
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value


def assert_frozen(encoder: nn.Module, optimized: Iterable[nn.Parameter] = ()) -> None:
    """Fail if anything could train, shard or change the encoder.

    Args:
        encoder: The geometry encoder.
        optimized: All parameters of the optimizer.

    Raises:
        GeometryError: It is in train mode, requires grad, is partitioned, or is in the optimizer.
    """
    if any(module.training for module in encoder.modules()):
        raise GeometryError("the geometry encoder is in train mode; call encoder.eval()")
    ids = {id(parameter) for parameter in optimized}
    for name, parameter in encoder.named_parameters():
        problem = (
            "requires grad"
            if parameter.requires_grad
            else "is partitioned by DeepSpeed"
            if hasattr(parameter, "ds_id")
            else "is a DTensor"
            if hasattr(parameter, "_local_tensor")
            else "is in the optimizer"
            if id(parameter) in ids
            else None
        )
        if problem:
            raise GeometryError(
                f"parameter {name} of the geometry encoder {problem}. The encoder is frozen: build it "
                "after sharding contexts and keep it outside the wrapped model"
            )
