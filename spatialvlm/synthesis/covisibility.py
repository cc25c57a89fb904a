"""How much of the seen surface two frames share, from depth maps alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.random import Generator, Philox

from spatialvlm.scenes.cameras import Camera
from spatialvlm.scenes.transforms import Array
from spatialvlm.scenes.visibility import depth_tolerance

NUM_POINTS = 4096
VOXEL_M = 0.12
"""One surface point per voxel, so that near surfaces (many pixels) do not weigh more than far ones."""
POINTS_PER_FRAME = 16384
MAX_FRAMES = 400


def covisibility(
    cameras: Sequence[Camera],
    depth: Callable[[int], Array | None],
    *,
    num_points: int = NUM_POINTS,
    max_frames: int = MAX_FRAMES,
) -> Array:
    """Intersection over union of the surface that each pair of frames sees.

    Surface points are taken on a pixel grid of every frame, thinned to one per 12 cm voxel. A frame
    sees a point that projects into it at the measured depth (5 cm or 2 % tolerance).

    Args:
        cameras: One per frame.
        depth: Frame index -> z-depth ``[H, W]`` in metres, 0 = unknown.
        num_points: Surface points of the scene.
        max_frames: Frames beyond this many (evenly spread) share nothing.

    Returns:
        ``[F, F]``, symmetric, ones on the diagonal of frames that see anything.
    """
    count = len(cameras)
    used = np.unique(np.linspace(0, count - 1, min(count, max_frames)).round().astype(int)).tolist()
    points = _surface(cameras, depth, used, num_points)
    seen = np.zeros((count, len(points)), dtype=np.float32)
    for index in used:
        seen[index] = _sees(cameras[index], _known(depth(index)), points)
    shared = seen @ seen.T
    total = seen.sum(axis=1)
    union = total[:, None] + total[None] - shared
    overlap: Array = np.where(union > 0, shared / np.maximum(union, 1.0), 0.0)
    return overlap


def _surface(
    cameras: Sequence[Camera],
    depth: Callable[[int], Array | None],
    frames: list[int],
    num_points: int,
) -> Array:
    """At most ``num_points`` surface points ``[P, 3]``, evenly over the seen area."""
    clouds, keys = [np.zeros((0, 3))], [np.zeros(0, dtype=np.int64)]
    for index in frames:
        values, camera = _known(depth(index)), cameras[index]
        step = max(1, int(np.sqrt(values.size / POINTS_PER_FRAME)))
        rows, columns = np.mgrid[
            step // 2 : values.shape[0] : step, step // 2 : values.shape[1] : step
        ]
        rows, columns = rows.ravel(), columns.ravel()
        known = values[rows, columns] > 0
        rows, columns = rows[known], columns[known]
        pixels = np.stack([columns + 0.5, rows + 0.5], axis=1)
        points = camera.back_project(pixels, values[rows, columns].astype(np.float64))
        voxels, first = np.unique(_voxel_keys(points), return_index=True)
        clouds.append(points[first])
        keys.append(voxels)
    _, first = np.unique(np.concatenate(keys), return_index=True)
    points = np.concatenate(clouds)[first]
    if len(points) > num_points:
        order = Generator(Philox(key=0)).permutation(len(points))[:num_points]
        points = points[np.sort(order)]
    return points


def _known(depth: Array | None) -> Array:
    assert depth is not None, "co-visibility needs depth of every frame"
    return depth


def _voxel_keys(points: Array) -> Array:
    """One integer per voxel; rooms are far smaller than the 200 km that 21 bits per axis hold."""
    cells = np.floor(points / VOXEL_M).astype(np.int64) + (1 << 20)
    keys: Array = (cells[:, 0] << 42) | (cells[:, 1] << 21) | cells[:, 2]
    return keys


def _sees(camera: Camera, depth: Array, points: Array) -> Array:
    """Which points a frame sees."""
    pixels, z = camera.project(points)
    inside = (z > 0.05) & (pixels >= 0).all(axis=1)
    inside &= (pixels[:, 0] < camera.width) & (pixels[:, 1] < camera.height)
    seen = np.zeros(len(points), dtype=bool)
    column, row = pixels[inside].astype(int).T
    seen[inside] = np.abs(depth[row, column] - z[inside]) <= depth_tolerance(z[inside])
    return seen
