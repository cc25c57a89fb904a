"""Distances between solid boxes, and between footprints on the ground."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from jaxtyping import Float
from scipy.optimize import lsq_linear

from spatialvlm.scenes.boxes import CORNER_SIGNS, Box
from spatialvlm.scenes.transforms import Array

ITERATIONS = 64
SETTLED_M = 1e-6
"""Pairs that still move by more than this in the second half of the iterations are solved exactly."""
VERTICAL = 1.0 - 1e-12


def box_distances(boxes: Sequence[Box]) -> Float[np.ndarray, "N N"]:
    """Smallest distance between the surfaces of every pair of boxes, metres; 0 when they overlap.

    Boxes with vertical axes are products of a rectangle and an interval, so their distance splits into
    a horizontal and a vertical part and is exact. Other pairs are solved by alternating projection,
    and by bounded least squares where that converges slowly. Error at most 1e-6 m.
    """
    count = len(boxes)
    distances = np.zeros((count, count))
    if count < 2:
        return distances
    centers = np.array([box.center for box in boxes])
    half = np.array([box.size for box in boxes]) / 2
    rotations = np.array([box.rotation for box in boxes])
    first, second = np.triu_indices(count, k=1)
    upright = np.abs(rotations[:, 2, 2]) > VERTICAL
    both = upright[first] & upright[second]
    values = np.empty(len(first))
    a, b = first[both], second[both]
    flat = _rectangle_distances(centers, half, rotations, a, b)
    gap = np.abs(centers[a, 2] - centers[b, 2]) - half[a, 2] - half[b, 2]
    values[both] = np.hypot(flat, np.maximum(gap, 0.0))
    a, b = first[~both], second[~both]
    values[~both] = _general_distances(centers, half, rotations, a, b)
    distances[first, second] = values
    distances[second, first] = values
    return distances


def box_distance(a: Box, b: Box) -> float:
    """Smallest distance between two solid boxes, metres."""
    return float(box_distances([a, b])[0, 1])


def footprint_gaps(boxes: Sequence[Box]) -> Float[np.ndarray, "N N"]:
    """Distances between the outlines seen from above, metres; 0 when they overlap."""
    import shapely

    polygons = np.array([shapely.Polygon(box.footprint) for box in boxes], dtype=object)
    gaps: Array = shapely.distance(polygons[:, None], polygons[None, :])
    return gaps


def box_iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes; tilted ones are compared by their upright hulls."""
    from shapely.geometry import Polygon

    flat = Polygon(a.footprint).intersection(Polygon(b.footprint)).area
    height = min(a.z_max, b.z_max) - max(a.z_min, b.z_min)
    shared = flat * max(height, 0.0)
    volumes = [Polygon(box.footprint).area * (box.z_max - box.z_min) for box in (a, b)]
    return float(shared / (sum(volumes) - shared))


def _rectangle_distances(
    centers: Array,
    half: Array,
    rotations: Array,
    a: npt.NDArray[np.int64],
    b: npt.NDArray[np.int64],
) -> Float[np.ndarray, " P"]:
    """Distance of rectangles on the ground: some corner is one end of the shortest segment.

    Overlap is decided by separating axes, because two crossing rectangles need not contain a corner.
    """
    axes = rotations[:, :2, :2]  # columns
    signs = CORNER_SIGNS[::2, :2]
    corners = centers[:, None, :2] + np.einsum(
        "nij,nkj->nki", axes, signs[None] * half[:, None, :2]
    )
    best = np.full(len(a), np.inf)
    apart = np.zeros(len(a), dtype=bool)
    for one, other in ((a, b), (b, a)):
        local = np.einsum("pki,pij->pkj", corners[other] - centers[one][:, None, :2], axes[one])
        outside = np.maximum(np.abs(local) - half[one][:, None, :2], 0.0)
        best = np.minimum(best, np.sqrt((outside**2).sum(axis=2)).min(axis=1))
        apart |= (local.min(axis=1) > half[one][:, :2]).any(axis=1)
        apart |= (local.max(axis=1) < -half[one][:, :2]).any(axis=1)
    return np.where(apart, best, 0.0)


def _general_distances(
    centers: Array,
    half: Array,
    rotations: Array,
    a: npt.NDArray[np.int64],
    b: npt.NDArray[np.int64],
) -> Float[np.ndarray, " P"]:
    """Alternating projection between two boxes, exact least squares for slow pairs."""
    if not len(a):
        return np.zeros(0)

    def project(points: Array, index: npt.NDArray[np.int64]) -> Array:
        local = np.einsum("pi,pij->pj", points - centers[index], rotations[index])
        clipped = np.clip(local, -half[index], half[index])
        nearest: Array = centers[index] + np.einsum("pij,pj->pi", rotations[index], clipped)
        return nearest

    on_b = centers[b]
    middle = np.zeros(len(a))
    for iteration in range(ITERATIONS):
        on_a = project(on_b, a)
        on_b = project(on_a, b)
        if iteration == ITERATIONS // 2:
            middle = np.linalg.norm(on_a - on_b, axis=1)
    values: Array = np.linalg.norm(project(on_b, a) - on_b, axis=1)
    for pair in np.flatnonzero(middle - values > SETTLED_M):
        i, j = a[pair], b[pair]
        matrix = np.concatenate([rotations[i] * half[i], -rotations[j] * half[j]], axis=1)
        solved = lsq_linear(
            matrix, centers[j] - centers[i], bounds=(-1, 1), method="bvls", tol=1e-14
        )
        values[pair] = min(values[pair], float(np.sqrt(2 * solved.cost)))
    values[values < SETTLED_M] = 0.0
    return values
