"""Floor area of a room: from its polygon, or from the points of its floor plan."""

from pathlib import Path

import numpy as np
from jaxtyping import Float
from scipy.spatial import Delaunay, QhullError, cKDTree

from spatialvlm.scenes.ply import read_vertices
from spatialvlm.scenes.schema import Room, Scene

MAX_POINTS = 10_000
MIN_POINTS = 2_000
"""Fewer points than this do not support an area."""
DENSE_SPACING_M = 0.07
ALPHA_DENSE = 5.0
ALPHA_SPARSE = 2.0


def polygon_area(polygon_xy: Float[np.ndarray, "N 2"]) -> float:
    """Area of a simple polygon, square metres."""
    x, y = np.asarray(polygon_xy, dtype=np.float64).T
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


def alpha_area(points_xy: Float[np.ndarray, "N 2"], alpha: float | None = None) -> float | None:
    """Area of the alpha complex of floor-plan points (Edelsbrunner et al. 1983), square metres.

    Triangles of the Delaunay triangulation with a circumradius below ``1 / alpha`` count.

    Args:
        points_xy: Points of the scan seen from above; at most 10,000 are used.
        alpha: 1/metres; ``None`` takes 5 for dense points (mean spacing below 7 cm) and 2 otherwise.

    Returns:
        ``None`` for too few or degenerate points.
    """
    points = np.asarray(points_xy, dtype=np.float64)
    points = points[np.isfinite(points).all(axis=1)]
    if len(points) < 4:
        return None
    if len(points) > MAX_POINTS:
        points = points[np.linspace(0, len(points) - 1, MAX_POINTS).astype(int)]
    points = np.unique(np.round(points, 6), axis=0)
    if alpha is None:
        spacing = float(np.asarray(cKDTree(points).query(points, k=2)[0])[:, 1].mean())
        alpha = ALPHA_DENSE if spacing < DENSE_SPACING_M else ALPHA_SPARSE
    try:
        triangles = points[Delaunay(points).simplices]
    except QhullError:
        return None
    sides = np.linalg.norm(triangles - np.roll(triangles, 1, axis=1), axis=2)
    a, b = triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]
    area = np.abs(a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        circumradius = sides.prod(axis=1) / (4 * area)
    return float(area[circumradius < 1 / alpha].sum())


def room_of_points(points: Float[np.ndarray, "N 3"]) -> Room:
    """Floor height and area of a room from the points of its scan.

    Args:
        points: Vertices of the whole scan in the world, z up, metres.

    Returns:
        A room without polygon; the area stays unknown with fewer than 2,000 points.
    """
    area = alpha_area(points[:, :2]) if len(points) >= MIN_POINTS else None
    return Room(
        floor_z=float(np.percentile(points[:, 2], 1.0)) if len(points) else 0.0,
        area_m2=area,
        area_method="none" if area is None else "alpha",
    )


def scanned_room(path: Path) -> Room | None:
    """Room of a scan's mesh or point file (PLY); ``None`` when there is no such file."""
    return room_of_points(read_vertices(path)) if path.is_file() else None


def floor_area(scene: Scene) -> float | None:
    """Floor area in square metres: stated, of the polygon, or of the points; ``None`` when unknown."""
    room = scene.room
    if room is not None and room.area_m2 is not None:
        return float(room.area_m2)
    if room is not None and room.polygon_xy is not None:
        return polygon_area(np.array(room.polygon_xy))
    if scene.points is None:
        return None
    found = scanned_room(scene.path(scene.points))
    return None if found is None else found.area_m2
