"""Which image size the geometry encoder sees; one function for the loader and the encoder."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from spatialvlm.errors import ConfigError

Size = tuple[int, int]
"""``(height, width)``."""


@dataclass(frozen=True, slots=True)
class SizePolicy:
    """Size policy of a geometry encoder with square patches.

    VGGT was trained with square pixels and a long side of 37 patches. ``match_grid`` gives one encoder
    patch per patch of the vision-language model; ``native`` keeps the aspect ratio at the training
    size, and features are resampled to the grid later; ``auto`` matches while that stays close to the
    training distribution.

    Attributes:
        patch_size: Side of an encoder patch in pixels.
        policy: ``auto``, ``match_grid`` or ``native``.
        native_long: Long side in pixels under ``native``.
        grid_min: Smallest long side of the grid, in patches, that ``auto`` matches.
        grid_max: Largest long side of the grid, in patches, that ``auto`` matches.
        max_distortion: Largest change of the aspect ratio that ``auto`` accepts.
    """

    patch_size: int = 14
    policy: Literal["auto", "match_grid", "native"] = "auto"
    native_long: int = 518
    grid_min: int = 24
    grid_max: int = 44
    max_distortion: float = 1.10

    def __post_init__(self) -> None:
        if self.policy not in ("auto", "match_grid", "native"):
            raise ConfigError(
                f"geometry.size_policy={self.policy!r} is not one of: auto, match_grid, native"
            )

    def target(self, src_hw: Size, grid_hw: Size) -> Size:
        """Encoder size of one frame.

        Args:
            src_hw: Size of the source frame in pixels, before any resize.
            grid_hw: Patch grid of the vision-language model before its merger.

        Returns:
            Height and width in pixels, multiples of ``patch_size``.
        """
        rows, cols = grid_hw
        distortion = (cols / rows) / (src_hw[1] / src_hw[0])
        close = self.grid_min <= max(grid_hw) <= self.grid_max and (
            max(distortion, 1 / distortion) <= self.max_distortion
        )
        if self.policy == "match_grid" or (self.policy == "auto" and close):
            return rows * self.patch_size, cols * self.patch_size
        scale = self.native_long / max(src_hw)
        return self._whole_patches(src_hw[0] * scale), self._whole_patches(src_hw[1] * scale)

    def group(self, targets: Sequence[Size]) -> "GroupSize":
        """Common size of frames that are encoded together.

        Frames whose own target has nearly the aspect ratio of the first one are resized to it. With
        larger differences every frame keeps its own target inside a canvas that holds them all, and
        the features of the padding are cropped away.

        Args:
            targets: :meth:`target` of every frame, in order.
        """
        first = targets[0]
        aspect = [width / height for height, width in targets]
        if all(max(a / aspect[0], aspect[0] / a) <= self.max_distortion for a in aspect):
            return GroupSize(first, (first,) * len(targets))
        canvas = (max(size[0] for size in targets), max(size[1] for size in targets))
        return GroupSize(canvas, tuple(targets))

    def _whole_patches(self, pixels: float) -> int:
        return max(1, round(pixels / self.patch_size)) * self.patch_size


class GroupSize(NamedTuple):
    """Canvas of a geometry group, and the part of it (from the top left) that each frame fills."""

    canvas: Size
    content: tuple[Size, ...]
