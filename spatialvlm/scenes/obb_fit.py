"""Upright boxes around point clouds of single objects."""

import numpy as np
from jaxtyping import Bool, Float
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from spatialvlm.errors import BoxError
from spatialvlm.scenes.boxes import Box, minimum_area_rectangle

NEIGHBOURS = 10
VOXEL_M = 0.1
Z_PERCENTILES = (0.5, 99.5)
MIN_VOLUME_M3 = 1e-6
MIN_POINTS = 16


def inlier_mask(points: Float[np.ndarray, "N 3"], *, sigmas: float = 2.0) -> Bool[np.ndarray, " N"]:
    """Points whose mean distance to 10 neighbours is within ``sigmas`` of the average."""
    if len(points) <= NEIGHBOURS:
        return np.ones(len(points), dtype=bool)
    found = np.asarray(cKDTree(points).query(points, k=NEIGHBOURS + 1)[0])
    distances = found[:, 1:].mean(axis=1)
    mask: Bool[np.ndarray, " N"] = distances <= distances.mean() + sigmas * distances.std() + 1e-12
    return mask


def largest_component(
    points: Float[np.ndarray, "N 3"], voxel_m: float = VOXEL_M
) -> Bool[np.ndarray, " N"]:
    """Points of the largest 26-connected group of occupied voxels."""
    cells, owner = np.unique(np.floor(points / voxel_m).astype(int), axis=0, return_inverse=True)
    pairs = cKDTree(cells).query_pairs(1.0, p=np.inf, output_type="ndarray")
    graph = coo_matrix((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(len(cells),) * 2)
    labels = connected_components(graph, directed=False)[1][owner.ravel()]
    mask: Bool[np.ndarray, " N"] = labels == np.bincount(labels).argmax()
    return mask


def fit_upright_box(points: Float[np.ndarray, "N 3"], *, clean: bool = True) -> Box:
    """Smallest upright box around the points of an object.

    Args:
        points: World points, metres, z up.
        clean: Drop statistical outliers and everything but the largest connected part first.

    Raises:
        BoxError: Too few points, all on a line, or a volume below 1e-6 cubic metres.
    """
    points = np.asarray(points, dtype=np.float64)
    points = points[np.isfinite(points).all(axis=1)]
    if clean and len(points) >= MIN_POINTS:
        points = points[inlier_mask(points)]
        points = points[largest_component(points)]
    if len(points) < MIN_POINTS:
        raise BoxError(
            f"box fit needs at least {MIN_POINTS} points after cleaning, got {len(points)}."
        )
    center, size, yaw = minimum_area_rectangle(points[:, :2])
    low, high = np.percentile(points[:, 2], Z_PERCENTILES)
    if size.prod() * (high - low) < MIN_VOLUME_M3:
        raise BoxError(
            f"box fit: {len(points)} points span a volume of {size.prod() * (high - low):.2g} m3; "
            "flat or tiny objects have no box."
        )
    return Box.upright([*center, (low + high) / 2], [*size, high - low], yaw)
