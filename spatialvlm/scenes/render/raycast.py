"""Exact ray casting of solid boxes: slow, independent of the rasteriser, no mesh.

Used for scenes that consist of boxes alone and as the reference of the visibility code.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from jaxtyping import Float

from spatialvlm.scenes.boxes import Box
from spatialvlm.scenes.cameras import Camera


def slab_depths(
    box: Box, camera: Camera, pixels: Float[np.ndarray, "N 2"]
) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]:
    """Z-depths at which the rays through ``pixels`` enter and leave a box.

    Returns:
        Entry and exit depth in metres; entry > exit where the ray misses the box.
    """
    axes = box.rotation.T @ camera.rotation  # camera directions -> box frame
    direction = camera.rays(pixels) @ axes.T
    origin = box.rotation.T @ (camera.centre - box.center)
    with np.errstate(divide="ignore", invalid="ignore"):
        low = (-box.size / 2 - origin) / direction
        high = (box.size / 2 - origin) / direction
    # A ray parallel to a slab gives 0/0 exactly on its face: count that as inside.
    enter = np.fmax.reduce(np.minimum(low, high), axis=1)
    leave = np.fmin.reduce(np.maximum(low, high), axis=1)
    return enter, leave


def cast_boxes(
    boxes: Sequence[Box], camera: Camera
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint16]]:
    """Depth and instance map of solid boxes in front of nothing.

    Returns:
        Z-depth ``[H, W]`` (0 = background) and ids ``[H, W]`` (position in ``boxes`` + 1, 0 = none).
    """
    height, width = camera.height, camera.width
    v, u = np.mgrid[0:height, 0:width]
    pixels = np.stack([u.ravel() + 0.5, v.ravel() + 0.5], axis=1)
    depth = np.full(height * width, np.inf)
    ids = np.zeros(height * width, dtype=np.uint16)
    for index, box in enumerate(boxes):
        enter, leave = slab_depths(box, camera, pixels)
        nearer = (enter <= leave) & (enter > 0) & (enter < depth)
        depth[nearer] = enter[nearer]
        ids[nearer] = index + 1
    depth[~np.isfinite(depth)] = 0.0
    return depth.reshape(height, width).astype(np.float32), ids.reshape(height, width)
