"""Masks of the fitted boxes: the pixels inside a box, sharpened by the segmenter."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from jaxtyping import Bool, Float, UInt8

from spatialvlm.scenes.boxes import Box
from spatialvlm.scenes.cameras import Camera
from spatialvlm.scenes.lifting.protocols import Detection, Segmenter, mask_box
from spatialvlm.scenes.lifting.stages import MIN_MASK_PX, LiftedObject
from spatialvlm.scenes.visibility import depth_tolerance, project_box

MIN_IOU = 0.5
"""A refined mask that agrees less with the pixels inside the box shows something else."""


def instance_map(
    image: UInt8[np.ndarray, "H W 3"],
    depth: Float[np.ndarray, "H W"],
    camera: Camera,
    fitted: Sequence[tuple[LiftedObject, Box]],
    segmenter: Segmenter,
    counters: Counter[str],
) -> npt.NDArray[np.uint16]:
    """Object index + 1 of every pixel, 0 = no object; of overlapping masks the nearer box wins."""
    coarse = {i: box_pixels(box, depth, camera) for i, (_, box) in enumerate(fitted)}
    coarse = {i: mask for i, mask in coarse.items() if mask.sum() >= MIN_MASK_PX}
    asked = [Detection(fitted[i][0].label, mask_box(mask), 1.0) for i, mask in coarse.items()]
    refined = segmenter.segment(image[None], [asked])[0]
    found: list[tuple[float, int, npt.NDArray[np.bool_]]] = []
    for (i, mask), better in zip(coarse.items(), refined, strict=True):
        shared = int((mask & better.pixels).sum())
        agrees = shared >= MIN_IOU * int((mask | better.pixels).sum())
        counters["coarse_mask"] += not agrees
        chosen = better.pixels if agrees else mask
        found.append((float(np.median(depth[mask])), i, chosen))
    ids = np.zeros(depth.shape, dtype=np.uint16)
    for _, i, mask in sorted(found, key=lambda entry: (-entry[0], entry[1])):
        ids[mask] = i + 1
    return ids


def box_pixels(
    box: Box, depth: Float[np.ndarray, "H W"], camera: Camera
) -> Bool[np.ndarray, "H W"]:
    """Pixels whose measured point lies inside a box, within the tolerance of the depth."""
    mask = np.zeros(depth.shape, dtype=bool)
    projection = project_box(box, camera)
    if projection is None:
        return mask
    x0, y0, x1, y1 = projection.bbox
    rows, columns = np.mgrid[int(y0) : int(np.ceil(y1)), int(x0) : int(np.ceil(x1))]
    values = depth[rows, columns].ravel().astype(np.float64)
    pixels = np.stack([columns.ravel() + 0.5, rows.ravel() + 0.5], axis=1)
    local = np.abs(box.to_box_frame(camera.back_project(pixels, values)))
    near = (local <= box.size / 2 + depth_tolerance(values)[:, None] / 2).all(axis=1)
    mask[rows, columns] = (near & (values > 0)).reshape(rows.shape)
    return mask
