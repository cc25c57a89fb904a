"""Rewriting box numbers in a conversation into the convention the backbone was trained with.

Recognised are ``"bbox_2d": [x0, y0, x1, y1]`` and ``"point_2d": [x, y]``, InternVL's
``<box>[[x0, y0, x1, y1], ...]</box>``, and Qwen2-VL's ``<|box_start|>(x0,y0),(x1,y1)<|box_end|>``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from spatialvlm.data.sample import CoordConvention, Sample, Turn
from spatialvlm.errors import DataError

_NUMBER = r"-?\d+(?:\.\d+)?"
_SPANS = re.compile(
    rf"""(["'](?:bbox_2d|point_2d)["']\s*:\s*\[)(\s*{_NUMBER}(?:\s*,\s*{_NUMBER})+\s*)(\])"""
    rf"|(<box>)(.*?)(</box>)"
    rf"|(<\|box_start\|>)(.*?)(<\|box_end\|>)",
    re.DOTALL,
)
_TOLERANCE = 0.02


class ImageSizes(NamedTuple):
    """Sizes (height, width) in pixels of one medium: as stored, and as the model sees it."""

    stored: tuple[int, int]
    resized: tuple[int, int]


def rewrite_coords(
    sample: Sample, sizes: Sequence[ImageSizes], target: CoordConvention
) -> tuple[Sample, int]:
    """The sample with its box numbers in another convention.

    Args:
        sample: Its ``coords`` names the convention of its text.
        sizes: One entry per medium.
        target: Convention of the result, not ``none``.

    Returns:
        The sample and how many boxes were rewritten. Text without boxes, and samples whose convention is
        ``none`` or already the target, come back unchanged.

    Raises:
        DataError: ``coord_range`` when a box leaves its image by more than 2 %, or when pixels are meant
            and the media have different sizes.
    """
    if sample.coords in ("none", target) or not sample.media:
        return sample, 0
    count = 0

    def rewrite(match: re.Match[str]) -> str:
        nonlocal count
        opening, body, closing = (g for g in match.groups() if g is not None)
        count += 1
        axes = iter(range(len(body)))

        def number(digits: re.Match[str]) -> str:
            axis = next(axes) % 2  # x, y, x, y
            return _convert(float(digits.group()), axis, sample, sizes, target)

        return opening + re.sub(_NUMBER, number, body) + closing

    turns = tuple(
        Turn(
            turn.role,
            tuple(_SPANS.sub(rewrite, p) if isinstance(p, str) else p for p in turn.parts),
            turn.train,
        )
        for turn in sample.turns
    )
    return (sample._replace(turns=turns, coords=target), count) if count else (sample, 0)


def _convert(
    value: float,
    axis: int,
    sample: Sample,
    sizes: Sequence[ImageSizes],
    target: CoordConvention,
) -> str:
    fraction = value / _extent(sample.coords, axis, sample, sizes)
    if not -_TOLERANCE <= fraction <= 1 + _TOLERANCE:
        raise DataError(
            f"{sample.uid}: the coordinate {value:g} lies outside its image under the convention "
            f"{sample.coords}; set coords of source {sample.source} to what its text uses.",
            reason="coord_range",
        )
    result = min(1.0, max(0.0, fraction)) * _extent(target, axis, sample, sizes)
    return f"{result:.3f}" if target == "norm1" else str(round(result))


def _extent(
    convention: CoordConvention, axis: int, sample: Sample, sizes: Sequence[ImageSizes]
) -> float:
    """Largest coordinate along x (axis 0) or y (axis 1)."""
    if convention == "norm1000":
        return 1000.0
    if convention == "norm1":
        return 1.0
    extents = {(s.stored if convention == "abs_source" else s.resized)[1 - axis] for s in sizes}
    if len(extents) > 1:
        raise DataError(
            f"{sample.uid}: boxes in pixels cannot be rewritten, its media have different sizes "
            f"{sorted(extents)}. Set coords_to: keep, or coords: none for source {sample.source}.",
            reason="coord_range",
        )
    return float(extents.pop())
