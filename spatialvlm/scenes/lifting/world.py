"""The world of a lifted video: one scale for depth and poses, and which way is up."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from spatialvlm.errors import SceneError
from spatialvlm.scenes.transforms import Array, nearest_rotation

UP_TOLERANCE_DEG = 5.0
MIN_FLOOR_INLIERS = 0.3
FLOOR_BAND_M = 0.03
MAX_PAIRS = 24
MAX_POINTS = 400
SAME_DEPTH = 0.04
"""Relative difference of two depths of one point."""
MIN_AGREEMENT = 0.15
USUAL_DEPTH_M = 2.0
"""Median depth that scenes without a known scale are given, so that thresholds in metres make sense."""


def scale_factors(
    depths: Sequence[Float[np.ndarray, "H W"]],
    world_from_cam: Float[np.ndarray, "S 4 4"],
    intrinsics: Float[np.ndarray, "S 3 3"],
    *,
    metric_depth: bool,
    metric_poses: bool,
) -> tuple[float, float, bool]:
    """Factors that bring depth and poses to one scale, in metres where one of the two is.

    Returns:
        Factor of the depth, factor of the translations, and whether the result is metric. Without any
        metric source both are taken to share their unit, and the median depth becomes two metres.

    Raises:
        SceneError: Depth and poses agree at no scale.
    """
    if metric_depth and (metric_poses or len(depths) == 1):
        return 1.0, 1.0, True
    if not metric_depth and (not metric_poses or len(depths) == 1):
        valid = np.concatenate([depth[depth > 0] for depth in depths])
        factor = USUAL_DEPTH_M / float(np.median(valid)) if valid.size else 1.0
        return factor, factor, False
    relative = pose_scale(depths, world_from_cam, intrinsics)
    return (1.0, relative, True) if metric_depth else (1.0 / relative, 1.0, True)


def pose_scale(
    depths: Sequence[Float[np.ndarray, "H W"]],
    world_from_cam: Float[np.ndarray, "S 4 4"],
    intrinsics: Float[np.ndarray, "S 3 3"],
) -> float:
    """Factor of the translations at which most points of one frame have their depth in others.

    A coarse search over four orders of magnitude, then two finer ones.

    Raises:
        SceneError: No factor explains the depth.
    """
    pairs = _pairs(len(depths))
    clouds = [_sparse_cloud(depth, k) for depth, k in zip(depths, intrinsics, strict=True)]
    low, high, best = -2.0, 2.0, (0.0, 1.0)
    for count in (81, 21, 21):
        candidates = 10.0 ** np.linspace(low, high, count)
        shares = [
            _agreement(pairs, clouds, depths, world_from_cam, intrinsics, float(s))
            for s in candidates
        ]
        best = max(zip(shares, candidates.tolist(), strict=True))
        step, middle = (high - low) / (count - 1), float(np.log10(best[1]))
        low, high = middle - step, middle + step
    if best[0] < MIN_AGREEMENT:
        raise SceneError(
            f"lifting: depth and poses agree at no scale (best {best[0]:.0%} of the points). Use depth and "
            "poses of one source, or frames that overlap."
        )
    return best[1]


def _pairs(count: int) -> list[tuple[int, int]]:
    """Pairs of frames at growing steps, at most :data:`MAX_PAIRS`."""
    every = [(i, i + step) for step in (1, 2, 4) for i in range(0, count - step)]
    keep = np.linspace(0, len(every) - 1, min(len(every), MAX_PAIRS)).astype(int)
    return [every[i] for i in keep]


def _sparse_cloud(depth: Array, intrinsics: Array) -> Array:
    """Points ``[N, 3]`` of a few pixels in the camera frame."""
    rows, columns = np.nonzero(depth > 0)
    chosen = np.linspace(0, len(rows) - 1, min(len(rows), MAX_POINTS)).astype(int)
    rows, columns = rows[chosen], columns[chosen]
    rays = np.stack([columns + 0.5, rows + 0.5, np.ones(len(rows))], axis=1)
    points: Array = rays @ np.linalg.inv(intrinsics).T * depth[rows, columns][:, None]
    return points


def _agreement(
    pairs: Sequence[tuple[int, int]],
    clouds: Sequence[Array],
    depths: Sequence[Array],
    world_from_cam: Array,
    intrinsics: Array,
    scale: float,
) -> float:
    """Share of points that keep their depth in the other frame, times the share that land in it."""
    same = total = 0
    for i, j in pairs:
        turn = world_from_cam[j, :3, :3].T @ world_from_cam[i, :3, :3]
        shift = world_from_cam[j, :3, :3].T @ (world_from_cam[i, :3, 3] - world_from_cam[j, :3, 3])
        points = clouds[i] @ turn.T + scale * shift
        height, width = depths[j].shape
        front = points[:, 2] > 1e-6
        pixels = points[front] @ intrinsics[j].T
        u, v = (pixels[:, :2] / pixels[:, 2:]).T
        inside = (u >= 0) & (v >= 0) & (u < width) & (v < height)
        measured = depths[j][v[inside].astype(int), u[inside].astype(int)]
        expected = points[front][inside, 2]
        same += int((np.abs(measured - expected) < SAME_DEPTH * expected).sum())
        total += len(points)
    return same / max(1, total)


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
