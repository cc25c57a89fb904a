"""Reading and scoring structured answers: grid cells, 7-DoF boxes, counts, rotations.

Boxes are ``[xc, yc, zc, l, w, h, yaw]`` in metres and radians, z up, ``l w h`` along the box's own axes.
"""

import math
import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from spatialvlm.evaluation.extract import last_number_plain, lower, strip_think

Box = Sequence[float]

_NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?"
_GROUP = re.compile(rf"[\[(]\s*({_NUMBER}(?:\s*,\s*{_NUMBER})*)\s*[\])]")
_ROTATION = re.compile(rf"({_NUMBER})\s*(rad)?", re.IGNORECASE)

_LEFTWARDS = re.compile(r"(?:counter|anti)[\s-]*clockwise")

SLACK = 1e-9
"""Added to a value before it is compared with a bin edge or threshold."""

CELL_EDGES = (0.0, 0.5, 1.5, 2.5, 3.5, 4.5, math.inf)
CELL_MISS = math.sqrt(162)
"""Penalty of an unreadable cell: the diagonal of the 10 x 10 grid."""
CENTER_EDGES = (*(round(0.1 * i, 1) for i in range(21)), math.inf)
YAW_EDGES = tuple(10.0 * i for i in range(19))


def number_groups(text: str, size: int) -> list[list[float]]:
    """All bracketed groups of exactly ``size`` finite numbers after the thinking, in order."""
    groups = []
    for found in _GROUP.finditer(strip_think(text)):
        values = [float(part) for part in found.group(1).split(",")]
        if len(values) == size and all(math.isfinite(value) for value in values):
            groups.append(values)
    return groups


def parse_cell(text: str) -> list[float] | None:
    """Cell of a LocalCogMap answer: the last group of two numbers."""
    groups = number_groups(text, 2)
    return groups[-1] if groups else None


def parse_box7(text: str) -> list[float] | None:
    """Box of a 7-DoF answer: the first group of seven numbers; a size that is not positive is unreadable."""
    groups = number_groups(text, 7)
    if not groups or min(groups[0][3:6]) <= 0:
        return None
    return groups[0]


def parse_rotation(text: str) -> float | None:
    """Last number in degrees, counter-clockwise seen from above positive; "rad" right after it converts."""
    text = strip_think(text)
    found = _ROTATION.findall(text)
    if not found:
        return None
    number, radians = found[-1]
    value = math.degrees(float(number)) if radians else float(number)
    if not math.isfinite(value):
        return None
    words = lower(text)
    if _LEFTWARDS.search(words):
        return abs(value)
    return -abs(value) if "clockwise" in words else value


def rotation_error(predicted: float, gold: float, *, unsigned: bool = False) -> float:
    """Smallest angle between two rotations in degrees, in [0, 180]."""
    if unsigned:
        predicted, gold = (abs((v + 180) % 360 - 180) for v in (predicted, gold))
    return abs((predicted - gold + 180) % 360 - 180)


def count_error(predicted: float | None, gold: float) -> float:
    """Relative error of a count; unreadable 1; for gold 0 it is 0 or 1."""
    if predicted is None:
        return 1.0
    if gold == 0:
        return 0.0 if predicted == 0 else 1.0
    return abs(predicted - gold) / gold


def parse_count(text: str) -> float | None:
    """Last plain numeral."""
    return last_number_plain(text)


# ----------------------------------------------------------------------------------------------------- boxes


def footprint(box: Box) -> Float[np.ndarray, "4 2"]:
    """Corners of a box seen from above, counter-clockwise, in metres."""
    x, y, _, length, width, _, yaw = box
    half = 0.5 * np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) * (length, width)
    c, s = math.cos(yaw), math.sin(yaw)
    corners: Float[np.ndarray, "4 2"] = half @ np.array([[c, s], [-s, c]]) + (x, y)
    return corners


def _clip(
    polygon: list[tuple[float, float]], a: Sequence[float], b: Sequence[float]
) -> list[tuple[float, float]]:
    """The part of a polygon left of the line from ``a`` to ``b`` (Sutherland-Hodgman)."""
    side = [(b[0] - a[0]) * (y - a[1]) - (b[1] - a[1]) * (x - a[0]) for x, y in polygon]
    kept: list[tuple[float, float]] = []
    for i, (x, y) in enumerate(polygon):
        before = i - 1
        if side[before] * side[i] < 0:
            t = side[before] / (side[before] - side[i])
            px, py = polygon[before]
            kept.append((px + t * (x - px), py + t * (y - py)))
        if side[i] >= 0:
            kept.append((x, y))
    return kept


def _area(polygon: Sequence[tuple[float, float]]) -> float:
    if len(polygon) < 3:
        return 0.0
    x, y = np.array(polygon).T
    return 0.5 * abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))))


def iou3d(first: Box, second: Box) -> float:
    """Intersection over union of two upright boxes with yaw, in [0, 1]."""
    centre = np.array([first[0], first[1]])
    polygon = [tuple(corner) for corner in footprint(first) - centre]
    other = footprint(second) - centre
    for i in range(4):
        polygon = _clip(polygon, other[i], other[(i + 1) % 4]) if polygon else []
    top = min(first[2] + first[5] / 2, second[2] + second[5] / 2)
    bottom = max(first[2] - first[5] / 2, second[2] - second[5] / 2)
    shared = _area(polygon) * max(0.0, top - bottom)
    union = math.prod(first[3:6]) + math.prod(second[3:6]) - shared
    return min(1.0, shared / union)


def iou2d(first: Sequence[float], second: Sequence[float]) -> float:
    """Intersection over union of two ``[x0, y0, x1, y1]`` rectangles; 0 for an empty one."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    if width <= 0 or height <= 0 or min(areas) <= 0:
        return 0.0
    return width * height / (sum(areas) - width * height)


def yaw_error(predicted: Box, gold: Box, *, front_known: bool) -> float:
    """Difference of heading in degrees, up to what the box's shape leaves undetermined.

    With a known front in [0, 180]; a nearly square gold footprint (sides within 5 %) repeats every 90°, in
    [0, 45]; otherwise both boxes are turned to l >= w and repeat every 180°, in [0, 90].
    """
    p, g = math.degrees(predicted[6]), math.degrees(gold[6])
    if front_known:
        return abs((p - g + 180) % 360 - 180)
    if abs(gold[3] - gold[4]) < 0.05 * max(gold[3], gold[4]):
        return abs((p - g + 45) % 90 - 45)
    p += 90 if predicted[3] < predicted[4] else 0
    g += 90 if gold[3] < gold[4] else 0
    return abs((p - g + 90) % 180 - 90)


def box_errors(predicted: Box, gold: Box, *, front_known: bool) -> dict[str, float]:
    """Centre errors in metres, IoU, yaw error in degrees, relative size error of one readable box."""
    offset = [predicted[i] - gold[i] for i in range(3)]
    return {
        "center_error": math.sqrt(math.fsum(d * d for d in offset)),
        "bev_error": math.hypot(offset[0], offset[1]),
        "iou3d": iou3d(predicted, gold),
        "yaw_error_deg": yaw_error(predicted, gold, front_known=front_known),
        "size_error": sum(abs(predicted[i] - gold[i]) / gold[i] for i in (3, 4, 5)) / 3,
    }


# ------------------------------------------------------------------------------------------------- aggregates


def histogram(values: Sequence[float], edges: Sequence[float]) -> list[int]:
    """Counts in half-open bins; the last bin also takes values beyond a finite last edge."""
    counts = [0] * (len(edges) - 1)
    for value in values:
        index = int(np.searchsorted(edges, value + SLACK, side="right")) - 1
        counts[min(max(index, 0), len(counts) - 1)] += 1
    return counts


def mean_or_none(values: Sequence[float]) -> float | None:
    """Mean, or ``None`` without values."""
    return float(np.mean(values)) if len(values) else None


def median_or_none(values: Sequence[float]) -> float | None:
    """Median, or ``None`` without values."""
    return float(np.median(values)) if len(values) else None


def assign_cells(
    predicted: Sequence[Sequence[float]], gold: Sequence[Sequence[float]]
) -> tuple[list[float], int, int]:
    """Match the cells of one category of a global map at minimum total distance.

    Returns:
        Distances of the matched pairs in cells, missing gold cells, extra predicted cells.
    """
    from scipy.optimize import linear_sum_assignment

    if not len(predicted) or not len(gold):
        return [], len(gold), len(predicted)
    difference = np.asarray(predicted, float)[:, None] - np.asarray(gold, float)[None]
    cost = np.hypot(difference[..., 0], difference[..., 1])
    rows, columns = linear_sum_assignment(cost)
    matched = [float(cost[r, c]) for r, c in zip(rows, columns, strict=True)]
    return matched, len(gold) - len(matched), len(predicted) - len(matched)
