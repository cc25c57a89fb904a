"""The geometric steps of lifting: points of masks, merging over frames, gravity, boxes, the scene."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from spatialvlm.errors import BoxError
from spatialvlm.scenes.boxes import Box
from spatialvlm.scenes.cameras import Camera
from spatialvlm.scenes.obb_fit import fit_upright_box, inlier_mask, largest_component
from spatialvlm.scenes.transforms import Array, nearest_rotation

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
UP_TOLERANCE_DEG = 5.0
MIN_FLOOR_INLIERS = 0.3
FLOOR_BAND_M = 0.03
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


def observe(
    frame: int,
    label: str,
    score: float,
    mask: Bool[np.ndarray, "H W"],
    depth: Array,
    camera: Camera,
) -> Observation | None:
    """Back-project a mask and clean the points; ``None`` when too few are left.

    Pixels of which fewer than two neighbours in the mask have a similar depth are dropped (depth is mixed
    at edges), then points whose mean distance to ten neighbours is more than one standard deviation above
    the average.
    """
    rows, columns = np.nonzero(mask & (depth > 0) & (_similar_neighbours(mask, depth) >= 2))
    if len(rows) < MIN_POINTS:
        return None
    if len(rows) > MAX_POINTS_PER_MASK:
        chosen = np.linspace(0, len(rows) - 1, MAX_POINTS_PER_MASK).astype(int)
        rows, columns = rows[chosen], columns[chosen]
    pixels = np.stack([columns, rows], axis=1) + 0.5
    points = camera.back_project(pixels, depth[rows, columns].astype(np.float64))
    points = points[inlier_mask(points, sigmas=1.0)]
    if len(points) < MIN_POINTS:
        return None
    return Observation(frame, label, score, points)


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


def fit_objects(
    objects: Sequence[LiftedObject], counters: dict[str, int]
) -> list[tuple[LiftedObject, Box]]:
    """Upright boxes; what is seen in one frame only, flat, or a needle is dropped and counted."""
    fitted = []
    for item in objects:
        if len(item.frames) < MIN_FRAMES:
            counters["single_frame"] = counters.get("single_frame", 0) + 1
            continue
        try:
            box = fit_upright_box(_evenly(item.points[largest_component(item.points)]))
        except BoxError:
            counters["bad_box"] = counters.get("bad_box", 0) + 1
            continue
        if box.size.max() / box.size.min() > MAX_ASPECT:
            counters["aspect"] = counters.get("aspect", 0) + 1
            continue
        fitted.append((item, box))
    return fitted


def _evenly(points: Array, cell_m: float = 0.02) -> Array:
    """One point per 2 cm cell: parts seen often would otherwise make the rest look like outliers."""
    first = np.unique(np.floor(points / cell_m).astype(int), axis=0, return_index=True)[1]
    even: Array = points[np.sort(first)]
    return even


class FloorGravity:
    """Up direction from the floor: RANSAC plane whose normal is near the cameras' up direction."""

    id = "floor-ransac"
    version = "1"

    def __init__(self, seed: int = 0, trials: int = 400) -> None:
        self.seed, self.trials = seed, trials

    def up(
        self, points: Float[np.ndarray, "N 3"], camera_up: Float[np.ndarray, "S 3"]
    ) -> Array | None:
        """Normal of the lowest large plane, or ``None``.

        Args:
            points: Scene points.
            camera_up: Up direction of every image (minus its y axis); their mean is the first guess.
        """
        guess = camera_up.mean(axis=0)
        guess /= np.linalg.norm(guess)
        height = points @ guess
        low = points[height <= np.percentile(height, 35)]
        if len(low) < 100:
            return None
        rng = np.random.Generator(np.random.Philox(key=self.seed))
        best, best_normal = 0.0, None
        for _ in range(self.trials):
            a, b, c = low[rng.integers(0, len(low), 3)]
            normal = np.cross(b - a, c - a)
            length = np.linalg.norm(normal)
            if length < 1e-9:
                continue
            normal = normal / length * np.sign(normal @ guess)
            if normal @ guess < np.cos(np.radians(35)):
                continue
            share = float((np.abs((low - a) @ normal) < FLOOR_BAND_M).mean())
            if share > best:
                best, best_normal = share, normal
        if best_normal is None or best < MIN_FLOOR_INLIERS:
            return None
        return self._refined(low, best_normal)

    def _refined(self, points: Array, normal: Array) -> Array:
        """Least-squares normal of the inliers."""
        offset = np.median(points @ normal)
        near = points[np.abs(points @ normal - offset) < 2 * FLOOR_BAND_M]
        if len(near) < 50:
            return normal
        refined = np.linalg.svd(near - near.mean(axis=0), full_matrices=False)[2][2]
        better: Array = refined * np.sign(refined @ normal)
        return better if better @ normal > np.cos(np.radians(UP_TOLERANCE_DEG)) else normal


def level_rotation(up: Float[np.ndarray, " 3"]) -> Float[np.ndarray, "3 3"]:
    """Rotation that takes ``up`` to +z by the shortest way."""
    up = up / np.linalg.norm(up)
    helper = np.array([1.0, 0, 0]) if abs(up[0]) < 0.9 else np.array([0.0, 1, 0])
    x = np.cross(np.cross(up, helper), up)
    x /= np.linalg.norm(x)
    return nearest_rotation(np.stack([x, np.cross(up, x), up]))
