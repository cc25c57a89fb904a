"""Exact depth and face rasteriser in numpy, for meshes of convex planar polygons.

Each face is filled between its left and right edge on every pixel row; 1/z is linear in the image, so
depth is exact at every pixel centre. Nothing is interpolated or blended.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from jaxtyping import Float

from spatialvlm.scenes.cameras import Camera
from spatialvlm.scenes.render.mesh import MAX_CORNERS, Mesh
from spatialvlm.scenes.transforms import Array

NEAR_CLIP_M = 0.03


@dataclass(frozen=True, eq=False)
class Raster:
    """What every pixel centre sees."""

    faces: npt.NDArray[np.int32]
    """``[H, W]`` face index, -1 = background."""
    depth: npt.NDArray[np.float32]
    """``[H, W]`` z-depth in metres, 0 = background."""
    ids: npt.NDArray[np.uint16]
    """``[H, W]`` object index + 1, 0 = shell or background."""


def rasterise(mesh: Mesh, camera: Camera) -> Raster:
    """Nearest face at every pixel centre; of two at the same depth the one with the lower index."""
    height, width = camera.height, camera.width
    polygons, faces, planes = _visible_polygons(mesh, camera)
    inverse_depth = np.zeros((height, width), dtype=np.float32)
    nearest = np.full((height, width), -1, dtype=np.int32)
    if len(faces):
        rows, columns, bounds, left, right = _spans(polygons, width, height)
        center_u = (np.arange(width) + 0.5).astype(np.float32)
        center_v = np.arange(height) + 0.5
        for i in np.flatnonzero((rows[:, 1] > rows[:, 0]) & (columns[:, 1] > columns[:, 0])):
            (r0, r1), (c0, c1) = rows[i].tolist(), columns[i].tolist()
            start = bounds[i]
            u = center_u[c0:c1]
            across, down, constant = planes[i]
            base = (down * center_v[r0:r1] + constant).astype(np.float32)
            value = np.float32(across) * u + base[:, None]
            closer = value > inverse_depth[r0:r1, c0:c1]
            closer &= u >= left[start : start + r1 - r0, None]
            closer &= u < right[start : start + r1 - r0, None]
            np.copyto(inverse_depth[r0:r1, c0:c1], value, where=closer)
            np.copyto(nearest[r0:r1, c0:c1], i, where=closer)
    hit = nearest >= 0
    depth = _plane_depth(nearest, planes, hit)
    lookup = np.append(faces, -1).astype(np.int32)
    owner = np.append(mesh.ids, 0).astype(np.uint16)
    face_map = lookup[nearest]
    return Raster(face_map, depth, owner[face_map])


def _plane_depth(nearest: Array, planes: Array, hit: Array) -> npt.NDArray[np.float32]:
    """Depth from each pixel's own plane in double precision, independent of the drawing order."""
    height, width = nearest.shape
    table = np.concatenate([planes, [[0.0, 0.0, 1.0]]])
    inverse = table[:, 0][nearest] * (np.arange(width) + 0.5)
    inverse += table[:, 1][nearest] * (np.arange(height) + 0.5)[:, None]
    inverse += table[:, 2][nearest]
    depth: npt.NDArray[np.float32] = (1.0 / inverse).astype(np.float32)
    depth[~hit] = 0.0
    return depth


def _visible_polygons(
    mesh: Mesh, camera: Camera
) -> tuple[Float[np.ndarray, "P 16 2"], npt.NDArray[np.int64], Float[np.ndarray, "P 3"]]:
    """Image polygons of the faces that look at the camera, their face index and 1/z planes."""
    to_camera = camera.centre - mesh.corners[:, 0]
    distance = np.einsum("fi,fi->f", mesh.normals, to_camera)
    facing = np.flatnonzero(distance > 1e-9)
    corners = mesh.corners[facing] @ camera.rotation - camera.centre @ camera.rotation  # [F, 16, 3]
    depth = corners[..., 2]
    in_front = (depth >= NEAR_CLIP_M).any(axis=1)
    facing, corners, depth = facing[in_front], corners[in_front], depth[in_front]
    for i in np.flatnonzero((depth < NEAR_CLIP_M).any(axis=1)):
        corners[i] = _clip_near(corners[i])
    pixels = corners[..., :2] / corners[..., 2:]
    pixels = pixels @ camera.intrinsics[:2, :2].T + camera.intrinsics[:2, 2]
    normals = mesh.normals[facing] @ camera.rotation
    planes = -(normals @ np.linalg.inv(camera.intrinsics)) / distance[facing][:, None]
    return pixels, facing, planes


def _clip_near(corners: Float[np.ndarray, "16 3"]) -> Float[np.ndarray, "16 3"]:
    """Part of a padded convex polygon with z >= the near plane, padded again."""
    kept: list[Array] = []
    for a, b in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        if a[2] >= NEAR_CLIP_M:
            kept.append(a)
        if (a[2] >= NEAR_CLIP_M) != (b[2] >= NEAR_CLIP_M):
            kept.append(a + (NEAR_CLIP_M - a[2]) / (b[2] - a[2]) * (b - a))
    points = np.array(kept)
    distinct = np.ones(len(points), dtype=bool)
    distinct[1:] = (points[1:] != points[:-1]).any(axis=1)
    points = points[distinct][:MAX_CORNERS]
    return np.concatenate([points, np.repeat(points[-1:], MAX_CORNERS - len(points), axis=0)])


def _spans(
    polygons: Float[np.ndarray, "P 16 2"], width: int, height: int
) -> tuple[Array, Array, Array, npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Pixel rows of every polygon and, for each of them, where it begins and ends.

    Faces look at the camera, so their image loops all turn the same way: edges that go down the image
    bound them on the left, edges that go up on the right. Between its lowest and highest corner a convex
    polygon is the intersection of those half-planes.

    Returns:
        ``rows [P, 2]`` and ``columns [P, 2]`` as half-open ranges, ``bounds [P]`` (where a polygon's
        rows start in the flat arrays), and the flat ``left`` and ``right`` pixel coordinates.
    """
    low, high = polygons.min(axis=1), polygons.max(axis=1)
    limit = np.array([width, height])
    first = np.clip(np.ceil(low - 0.5), 0, limit).astype(int)
    last = np.clip(np.ceil(high - 0.5), first, limit).astype(int)
    columns = np.stack([first[:, 0], last[:, 0]], axis=1)
    rows = np.stack([first[:, 1], last[:, 1]], axis=1)
    counts = rows[:, 1] - rows[:, 0]
    bounds = np.concatenate([[0], np.cumsum(counts)[:-1]])
    owner = np.repeat(np.arange(len(polygons)), counts)
    v = np.arange(counts.sum()) - bounds[owner] + rows[owner, 0] + 0.5

    # Edge k runs from corner k-1 to corner k, so edges beyond the number of corners are empty.
    previous = np.roll(polygons, 1, axis=1)
    falling = polygons[..., 1] > previous[..., 1]
    rising = polygons[..., 1] < previous[..., 1]
    # The same corner order for both faces of an edge: their spans then meet without a gap.
    upper = np.where(falling[..., None], previous, polygons)
    lower = np.where(falling[..., None], polygons, previous)
    rise = lower[..., 1] - upper[..., 1]
    slope = (lower[..., 0] - upper[..., 0]) / np.where(rise > 0, rise, 1.0)
    offset = upper[..., 0] - upper[..., 1] * slope
    num_edges = MAX_CORNERS - np.argmax((falling | rising)[:, ::-1], axis=1)
    left, right = np.full(len(v), -np.inf), np.full(len(v), np.inf)
    for k in range(int(num_edges.max())):
        for bound, edges, nearer in ((left, falling, np.maximum), (right, rising, np.minimum)):
            at = np.flatnonzero(edges[owner, k])
            face = owner[at]
            bound[at] = nearer(bound[at], offset[face, k] + v[at] * slope[face, k])
    return rows, columns, bounds, left.astype(np.float32), right.astype(np.float32)
