"""Target sizes of the three backbone families, and the one resize kernel.

The size rules reproduce the Hugging Face processors (transformers 5.23: ``qwen2_vl``, ``qwen3_vl``,
``got_ocr2``), rounding included; tests compare them over random sizes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spatialvlm.typing import UInt8Array


def fit_pixels(
    height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Size of an image, or of one Qwen2.5-VL video frame.

    Both sides become multiples of ``factor``, the area lies in ``[min_pixels, max_pixels]``, and the
    aspect is kept as well as that allows.
    """
    new_h, new_w = round(height / factor) * factor, round(width / factor) * factor
    return _into_budget(
        height, width, new_h, new_w, new_h * new_w, height * width, factor, min_pixels, max_pixels
    )


def fit_video_pixels(
    num_frames: int,
    height: int,
    width: int,
    *,
    factor: int,
    temporal_factor: int,
    min_pixels: int,
    max_pixels: int,
) -> tuple[int, int]:
    """Size of a Qwen3-VL video frame: the budget counts the pixels of all frames together."""
    if height < factor or width < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    new_h, new_w = round(height / factor) * factor, round(width / factor) * factor
    new_t = max(round(num_frames / temporal_factor), 1) * temporal_factor
    return _into_budget(
        height, width, new_h, new_w, new_t * new_h * new_w, num_frames * height * width, factor, min_pixels, max_pixels
    )  # fmt: skip


def _into_budget(
    height: int,
    width: int,
    new_h: int,
    new_w: int,
    new_volume: int,
    volume: int,
    factor: int,
    min_pixels: int,
    max_pixels: int,
) -> tuple[int, int]:
    if new_volume > max_pixels:
        beta = math.sqrt(volume / max_pixels)
        return (
            max(factor, math.floor(height / beta / factor) * factor),
            max(factor, math.floor(width / beta / factor) * factor),
        )
    if new_volume < min_pixels:
        beta = math.sqrt(min_pixels / volume)
        return math.ceil(height * beta / factor) * factor, math.ceil(width * beta / factor) * factor
    return new_h, new_w


def tile_grid(height: int, width: int, tile: int, max_tiles: int) -> tuple[int, int]:
    """Rows and columns of square tiles whose aspect is nearest to the image's (InternVL).

    Among equally near grids the one with more tiles wins, as long as the image has more than half as
    many pixels as its tiles.
    """
    grids = sorted(
        ((cols, rows) for cols in range(1, max_tiles + 1) for rows in range(1, max_tiles + 1) if cols * rows <= max_tiles),
        key=lambda grid: grid[0] * grid[1],
    )  # fmt: skip
    aspect, best, best_gap = width / height, (1, 1), math.inf
    for cols, rows in grids:
        gap = abs(aspect - cols / rows)
        if gap < best_gap or (gap == best_gap and height * width > 0.5 * tile * tile * cols * rows):
            best, best_gap = (cols, rows), gap
    return best[1], best[0]


def resize(frames: UInt8Array, size: tuple[int, int]) -> UInt8Array:
    """Resize uint8 ``[S, H, W, 3]`` to ``[S, *size, 3]``: bicubic, antialiased, rounded and clipped.

    The same kernel as the Hugging Face processors' torchvision backend, so the result is equal bit by
    bit (Pillow's differs by up to two grey levels).
    """
    import torch
    import torch.nn.functional as F

    if frames.shape[1:3] == size:
        return frames
    # A view with canonical strides: numpy's [None] leaves a stride of 0, which hides the fast layout.
    tensor = torch.from_numpy(frames.reshape(-1)).view(frames.shape).permute(0, 3, 1, 2)
    out = F.interpolate(tensor, size=size, mode="bicubic", antialias=True, align_corners=False)
    result: UInt8Array = out.permute(0, 2, 3, 1).contiguous().numpy()
    return result


def split_tiles(image: UInt8Array, rows: int, cols: int, tile: int) -> UInt8Array:
    """InternVL tiles of one image ``[1, H, W, 3]`` -> ``[rows * cols (+ 1), tile, tile, 3]``.

    Row by row; the whole image as a thumbnail comes last unless there is only one tile.
    """
    import numpy as np

    if rows * cols == 1:
        return resize(image, (tile, tile))
    canvas = resize(image, (rows * tile, cols * tile))[0]
    tiles = canvas.reshape(rows, tile, cols, tile, 3).swapaxes(1, 2).reshape(-1, tile, tile, 3)
    return np.concatenate([tiles, resize(image, (tile, tile))])
