"""uint8 frames to the ``pixel_values`` of a vision encoder, on whatever device the frames are.

Equal to the Hugging Face processors on the same resized frames (1e-6, fp32). Frames travel as uint8 and become
floats here, at the head of the model's forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from spatialvlm.errors import AlignmentError

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class PixelSpec:
    """What a checkpoint's processor does after resizing.

    Attributes:
        layout: ``patches`` (Qwen: flattened patches in merge order) or ``frames`` (InternVL: ``[S, 3, H, W]``).
        mean: Per channel, of pixels scaled to [0, 1].
        std: Per channel, of pixels scaled to [0, 1].
        patch: Patch side in pixels.
        merge: Patches per token along each side.
        temporal: Frames per temporal patch; an image is repeated, an odd video repeats its last frame.
    """

    layout: Literal["patches", "frames"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    patch: int
    merge: int = 2
    temporal: int = 2

    def grid(self, shape: Shape) -> Shape:
        """Patch grid ``(units, rows, columns)`` before the merger of a medium of shape ``(S, H, W)``.

        Raises:
            AlignmentError: A side is not a whole number of merged patches.
        """
        frames, height, width = shape
        side = self.patch * self.merge
        if height % side or width % side or min(shape) < 1:
            raise AlignmentError(
                f"frames of {height} x {width} px do not divide into {side} px (patch {self.patch} x merge "
                f"{self.merge}); resize them to multiples of {side} first"
            )
        units = frames if self.layout == "frames" else -(-frames // self.temporal)
        return units, height // self.patch, width // self.patch


def split_frames(flat: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
    """Views ``[S, H, W, 3]`` of every medium in a flat uint8 buffer.

    Raises:
        TypeError: The buffer is not uint8.
        AlignmentError: Shapes and buffer disagree.
    """
    if flat.dtype != torch.uint8:
        raise TypeError(
            f"frames must be uint8 RGB, got {flat.dtype}; normalisation happens in the model"
        )
    sizes = [3 * frames * height * width for frames, height, width in shapes]
    if sum(sizes) != flat.numel():
        raise AlignmentError(
            f"frame shapes {list(shapes)} need {sum(sizes)} values, the buffer has {flat.numel()}"
        )
    pieces = torch.split(flat.reshape(-1), sizes)
    return [piece.view(*shape, 3) for piece, shape in zip(pieces, shapes, strict=True)]


def prepare(
    flat: Tensor,
    shapes: Sequence[Shape],
    units: Sequence[int],
    spec: PixelSpec,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Normalise and, for Qwen, cut into patches.

    Args:
        flat: uint8, all frames ``[S, H, W, 3]`` of all media, concatenated in sequence order.
        shapes: ``(S, H, W)`` of every medium.
        units: Temporal units of every medium: ``S`` if every frame is an image of its own, else ``ceil(S / temporal)``.
        spec: The processor's numbers.
        dtype: Result type; the arithmetic is fp32.

    Returns:
        ``[N, 3 * temporal * patch * patch]`` with patches of each 2 x 2 merge unit adjacent, or ``[S, 3, H, W]``.
    """
    media = split_frames(flat, shapes)
    # The processors normalise uint8 values directly, with mean and std scaled by 255.
    mean = torch.tensor(spec.mean, device=flat.device) * 255
    std = torch.tensor(spec.std, device=flat.device) * 255
    results = []
    begin = 0
    while begin < len(media):
        end = begin + 1
        while end < len(media) and (shapes[end], units[end]) == (shapes[begin], units[begin]):
            end += 1
        frames = torch.stack(media[begin:end]).float()  # [n, S, H, W, 3]
        frames = ((frames - mean) / std).to(dtype)
        if spec.layout == "patches":
            results.append(_patches(frames, units[begin], spec))
        else:
            results.append(frames.flatten(0, 1).movedim(-1, 1))
        begin = end
    return torch.cat(results)


def _patches(frames: Tensor, units: int, spec: PixelSpec) -> Tensor:
    """``[n, S, H, W, 3]`` to ``[n * units * rows * columns, 3 * temporal * patch * patch]``."""
    num, count, height, width, _ = frames.shape
    paired, rows, columns = spec.grid((count, height, width))
    if (
        units == count
    ):  # images, and videos whose frames are images: the frame fills its temporal patch
        frames = frames.repeat_interleave(spec.temporal, dim=1)
    elif units == paired:
        missing = units * spec.temporal - count
        frames = torch.cat([frames, frames[:, -1:].expand(-1, missing, -1, -1, -1)], dim=1)
    else:
        raise AlignmentError(
            f"{count} frames cannot make {units} temporal units of {spec.temporal} frames"
        )
    m, p = spec.merge, spec.patch
    frames = frames.view(num, units, spec.temporal, rows // m, m, p, columns // m, m, p, 3)
    # -> [n, units, rows/m, columns/m, m, m, channel, temporal, p, p]
    frames = frames.permute(0, 1, 3, 6, 4, 7, 9, 2, 5, 8)
    return frames.reshape(num * units * rows * columns, -1)
