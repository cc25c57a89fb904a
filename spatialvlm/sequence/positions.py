"""Multimodal rotary positions of text, visual, spatial and camera tokens (integers only).

The rule is the one of the Qwen2-VL paper (arXiv 2409.12191, section 2.1): text advances all three
axes by one; a vision run starts at ``next`` and text goes on at one plus the largest position used so
far on any axis. The frame-interleaved times of spatial tokens follow SSR (arXiv 2603.00409).

``get_rope_index`` of transformers 5 departs from it: after a run it advances by ``max(h, w)`` and
ignores time, so text behind a long video gets positions inside the video's own range.
``text_after_vision="stock"`` reproduces that.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from spatialvlm.errors import ConfigError
from spatialvlm.typing import KIND_CAMERA

if TYPE_CHECKING:
    from spatialvlm.typing import IntArray

Insertion = Literal["none", "interleaved", "sequential", "in_place"]
INSERTIONS = ("none", "interleaved", "sequential", "in_place")


@dataclass(frozen=True, slots=True)
class Block:
    """One grid of tokens inside a vision run.

    Attributes:
        kind: One of the ``KIND_*`` numbers of :mod:`spatialvlm.typing`.
        unit: Number of the temporal unit inside its video or image group.
        t: Time of the block relative to the start of its run.
        h: Rows of tokens; 0 for a camera token.
        w: Columns of tokens; 0 for a camera token.
    """

    kind: int
    unit: int
    t: int
    h: int
    w: int

    @property
    def num_tokens(self) -> int:
        """Tokens of the block; a camera block is one token."""
        return 1 if self.kind == KIND_CAMERA else self.h * self.w


def unit_times(
    num_units: int, insertion: Insertion, time: Literal["index", "seconds"], step: float
) -> tuple[list[int], list[int]]:
    """Times of the units of one video that forms a single run (Qwen2.5-VL).

    Args:
        num_units: Temporal units of the video.
        insertion: Where spatial tokens stand; ``none`` and ``in_place`` have none.
        time: ``index`` counts blocks in sequence order; ``seconds`` is proportional to real time.
        step: Position steps per unit, ``tokens_per_second * second_per_grid_t``; only for ``seconds``.

    Returns:
        Times of the visual and of the spatial blocks, relative to the run's start.
    """
    unit = np.arange(num_units, dtype=np.float32)
    has_spatial = insertion in ("interleaved", "sequential")
    if time == "index":
        spread = 2 if insertion == "interleaved" else 1
        offset = 1 if insertion == "interleaved" else num_units
        visual, spatial = unit * spread, unit * spread + offset
    elif time == "seconds":
        # float32 products and truncation, as transformers computes them from a float32 tensor.
        seconds = np.float32(step)
        if insertion == "interleaved" and seconds < 2:
            warnings.warn(
                f"geometry.positions.time=seconds with {step:g} positions per unit: visual and spatial "
                "tokens of a unit can share a time; use time=index or fewer frames per second",
                stacklevel=2,
            )
        offset_units = np.float32(0.5 if insertion == "interleaved" else num_units)
        visual, spatial = unit * seconds, (unit + offset_units) * seconds
    else:
        raise ConfigError(f"geometry.positions.time={time!r} is not one of: index, seconds")
    return (
        visual.astype(np.int64).tolist(),
        spatial.astype(np.int64).tolist() if has_spatial else [],
    )


def mrope_positions(
    segments: Sequence[int | tuple[Block, ...]],
    text_after_vision: Literal["original", "stock"] = "original",
) -> "IntArray":
    """Positions of one sample on the time, height and width axis.

    Args:
        segments: In sequence order, either a number of text tokens or the blocks of one vision run.
        text_after_vision: ``original`` continues behind everything used so far; ``stock`` advances
            by the larger side of the grid, as transformers 5 does.

    Returns:
        int64 ``[3, L]``.
    """
    columns: list[IntArray] = []
    base = 0
    for segment in segments:
        if isinstance(segment, int):
            columns.append(np.tile(np.arange(base, base + segment), (3, 1)))
            base += segment
            continue
        run = _run_positions(segment)
        columns.append(run + base)
        if text_after_vision == "original":
            base += 1 + int(run.max())
        else:
            base += max(max(block.h, block.w) for block in segment)
    if not columns:
        return np.zeros((3, 0), dtype=np.int64)
    return np.concatenate(columns, axis=1).astype(np.int64)


def position_delta(position_ids: "IntArray") -> int:
    """``rope_deltas`` of one sample: what to add to a cache length to get the next position.

    Args:
        position_ids: int64 ``[3, L]`` as from :func:`mrope_positions`.
    """
    return int(position_ids.max()) + 1 - int(position_ids.shape[1])


def _run_positions(blocks: tuple[Block, ...]) -> "IntArray":
    """Positions ``[3, L]`` of one vision run, relative to its start."""
    columns: list[IntArray] = []
    rows = cols = 0
    for block in blocks:
        if block.kind == KIND_CAMERA:
            # The camera token sits in the middle of the spatial grid it follows.
            columns.append(np.array([[block.t], [rows // 2], [cols // 2]]))
            continue
        rows, cols = block.h, block.w
        grid = np.indices((rows, cols)).reshape(2, -1)  # [2, rows*cols]
        columns.append(np.concatenate([np.full((1, rows * cols), block.t), grid]))
    return np.concatenate(columns, axis=1)
