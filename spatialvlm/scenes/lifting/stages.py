"""The geometric steps of lifting: points of masks, merging over frames, boxes."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from spatialvlm.errors import BoxError
from spatialvlm.scenes.boxes import Box
from spatialvlm.scenes.obb_fit import fit_upright_box, inlier_mask, largest_component
from spatialvlm.scenes.transforms import Array

MIN_SCORE = 0.6
MIN_MASK_PX = 25
MAX_MASK_SHARE = 0.75
MIN_POINTS = 16
VOXEL_M = 0.05
MERGE_IOU = 0.3
MERGE_CONTAINMENT = 0.5
MERGE_CENTRE = 0.4
"""Two things of one label cannot stand closer than this share of their width."""
MIN_FRAMES = 2
MAX_ASPECT = 30.0
MAX_POINTS_PER_MASK = 2_000
SIMILAR_DEPTH = 0.03


@dataclass(frozen=True, eq=False)
class Observation:
    """One masked object in one frame, lifted to points."""

    frame: int
    label: str
    score: float
    points: Array
    """``[N, 3]`` world."""


@dataclass(frozen=True, eq=False)
class LiftedObject:
    """Observations of one thing."""

    label: str
    points: Array
    frames: tuple[int, ...]
    score: float


def keep_mask(mask: Bool[np.ndarray, "H W"], score: float) -> bool:
    """Whether a mask is good and large enough, and not most of the picture."""
    count = int(mask.sum())
    return score >= MIN_SCORE and MIN_MASK_PX <= count <= MAX_MASK_SHARE * mask.size


def mask_points(
    mask: Bool[np.ndarray, "H W"],
    depth: Float[np.ndarray, "H W"],
    intrinsics: Float[np.ndarray, "3 3"],
) -> Float[np.ndarray, "N 3"] | None:
    """Back-project a mask into the camera frame and clean the points; ``None`` when too few are left.

    Pixels of which fewer than two neighbours in the mask have a similar depth are dropped (depth is mixed
    at edges), then points whose mean distance to ten neighbours is more than one standard deviation above
    the average. Nothing depends on the unit of the depth.
    """
    rows, columns = np.nonzero(mask & (depth > 0) & (_similar_neighbours(mask, depth) >= 2))
    if len(rows) < MIN_POINTS:
        return None
    if len(rows) > MAX_POINTS_PER_MASK:
        chosen = np.linspace(0, len(rows) - 1, MAX_POINTS_PER_MASK).astype(int)
        rows, columns = rows[chosen], columns[chosen]
    z = depth[rows, columns].astype(np.float64)
    homogeneous = np.stack([columns + 0.5, rows + 0.5, np.ones(len(rows))], axis=1)
    points = homogeneous @ np.linalg.inv(intrinsics).T * z[:, None]
    points = points[inlier_mask(points, sigmas=1.0)]
    return points if len(points) >= MIN_POINTS else None


def _similar_neighbours(mask: Bool[np.ndarray, "H W"], depth: Array) -> Array:
    """How many of the four neighbours are in the mask and within 3 % in depth."""
    count = np.zeros(mask.shape, dtype=np.int64)
    for axis in (0, 1):
        near = np.abs(np.diff(depth, axis=axis)) <= SIMILAR_DEPTH * np.minimum(
            np.delete(depth, 0, axis), np.delete(depth, -1, axis)
        )
        first = [slice(None), slice(None)]
        second = [slice(None), slice(None)]
        first[axis], second[axis] = slice(None, -1), slice(1, None)
        a, b = (first[0], first[1]), (second[0], second[1])
        near &= mask[a] & mask[b]
        count[a] += near
        count[b] += near
    return count


def _voxels(points: Array) -> set[tuple[int, ...]]:
    return set(map(tuple, np.unique(np.floor(points / VOXEL_M).astype(int), axis=0).tolist()))


def merge(observations: Sequence[Observation]) -> list[LiftedObject]:
    """Join observations of one thing: same label, and voxels that overlap or are contained.

    Noisy depth moves surfaces by more than a voxel; observations whose centres on the floor are closer
    than 0.4 of their width are joined too.

    Union-find in (frame, falling score) order, so the result does not depend on timing.
    """
    ordered = sorted(observations, key=lambda o: (o.frame, -o.score, o.label))
    parent = list(range(len(ordered)))
    voxels = [_voxels(o.points) for o in ordered]
    spans = [np.percentile(o.points[:, :2], [5, 50, 95], axis=0) for o in ordered]

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for j in range(len(ordered)):
        for i in range(j):
            if ordered[i].label != ordered[j].label or find(i) == find(j):
                continue
            a, b = voxels[find(i)], voxels[find(j)]
            shared = len(a & b)
            width = max(float((spans[k][2] - spans[k][0]).max()) for k in (i, j))
            close = float(np.hypot(*(spans[i][1] - spans[j][1]))) < MERGE_CENTRE * width
            if close or (
                shared
                and (
                    shared / (len(a) + len(b) - shared) >= MERGE_IOU
                    or shared / min(len(a), len(b)) >= MERGE_CONTAINMENT
                )
            ):
                low, high = sorted((find(i), find(j)))
                parent[high] = low
                voxels[low] = a | b
    groups: dict[int, list[Observation]] = {}
    for i, observation in enumerate(ordered):
        groups.setdefault(find(i), []).append(observation)
    return [
        LiftedObject(
            members[0].label,
            np.concatenate([m.points for m in members]),
            tuple(sorted({m.frame for m in members})),
            max(m.score for m in members),
        )
        for _, members in sorted(groups.items())
    ]


def fit_box(points: Float[np.ndarray, "N 3"]) -> Box:
    """Smallest upright box around the largest connected part of the points.

    Raises:
        BoxError: Too few points, or flat.
    """
    return fit_upright_box(_evenly(points[largest_component(points)]))


def fit_objects(
    objects: Sequence[LiftedObject],
    counters: Counter[str],
    *,
    fitter: Callable[[Array], Box] = fit_box,
    min_frames: int = MIN_FRAMES,
) -> list[tuple[LiftedObject, Box]]:
    """Upright boxes; what is seen in too few frames, flat, or a needle is dropped and counted."""
    fitted = []
    for item in objects:
        if len(item.frames) < min_frames:
            counters["single_frame"] += 1
            continue
        try:
            box = fitter(item.points)
        except BoxError:
            counters["bad_box"] += 1
            continue
        if box.size.max() / box.size.min() > MAX_ASPECT:
            counters["aspect"] += 1
            continue
        fitted.append((item, box))
    return fitted


def _evenly(points: Array, cell_m: float = 0.02) -> Array:
    """One point per 2 cm cell: parts seen often would otherwise make the rest look like outliers."""
    first = np.unique(np.floor(points / cell_m).astype(int), axis=0, return_index=True)[1]
    even: Array = points[np.sort(first)]
    return even
