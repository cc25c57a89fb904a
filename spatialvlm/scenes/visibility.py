"""What is seen of each object in each frame: projection, three visibility states, occupancy.

Follows the occupancy idea of OpenSpatial (arXiv 2604.07296): a box counts as seen only when measured
points fill enough of it. States: ``visible`` (questions may use the object), ``hidden`` (questions may
say it is not there), ``ambiguous`` (neither).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import shapely
from jaxtyping import Bool, Float
from scipy import ndimage
from scipy.spatial import ConvexHull, QhullError

from spatialvlm.scenes.boxes import EDGES, Box
from spatialvlm.scenes.cameras import Camera
from spatialvlm.scenes.render.raycast import cast_boxes, slab_depths
from spatialvlm.scenes.schema import Vis, VisibilityState
from spatialvlm.scenes.transforms import Array

OccupancyRule = Literal["robust", "openspatial", "none"]

NEAR_M = 0.05
MAX_RAYS = 256
VISIBLE_FRAC = 0.30
HIDDEN_FRAC = 0.05
MIN_PX = 64.0
"""Least visible pixels of a visible object, at 640x480; scales with the number of pixels."""
REFERENCE_PIXELS = 640 * 480

THIN_AXIS_M = 0.10
MIN_HULL_RATIO = 0.07
MIN_FACE_COVERAGE = 0.25
OPENSPATIAL_SHRINK = 0.9
OPENSPATIAL_MIN_POINTS = 50
OPENSPATIAL_MIN_IMAGE_SHARE = 0.02
OPENSPATIAL_MIN_IN_IMAGE = 0.1


@dataclass(frozen=True, eq=False)
class Projection:
    """A box in an image."""

    hull: Float[np.ndarray, "P 2"]
    """Convex outline of the part in front of the camera, not clipped to the image."""
    clipped: Float[np.ndarray, "Q 2"]
    """The same outline inside the image; empty when outside."""
    in_frustum_frac: float
    """area(clipped) / area(hull)."""

    @property
    def area_px(self) -> float:
        """Pixels of the clipped outline."""
        return _polygon_area(self.clipped)

    @property
    def bbox(self) -> tuple[float, float, float, float]:
        """Around the clipped outline."""
        (x0, y0), (x1, y1) = self.clipped.min(axis=0), self.clipped.max(axis=0)
        return float(x0), float(y0), float(x1), float(y1)


def project_box(box: Box, camera: Camera) -> Projection | None:
    """Outline of a box in an image; ``None`` when no part is in front of the camera and inside."""
    corners = camera.to_cam(box.corners)
    front = corners[:, 2] >= NEAR_M
    if not front.any():
        return None
    points = corners[front]
    if not front.all():
        cut = EDGES[front[EDGES[:, 0]] != front[EDGES[:, 1]]]
        a, b = corners[cut[:, 0]], corners[cut[:, 1]]
        share = (NEAR_M - a[:, 2:]) / (b[:, 2:] - a[:, 2:])
        points = np.concatenate([points, a + share * (b - a)])
    outline = shapely.convex_hull(shapely.multipoints(camera.project_cam(points)))
    if outline.area <= 0:
        return None
    inside = shapely.clip_by_rect(outline, 0, 0, camera.width, camera.height)
    if inside.is_empty or inside.area <= 0:
        return None
    return Projection(
        shapely.get_coordinates(outline)[:-1],
        shapely.get_coordinates(inside)[:-1],
        min(1.0, float(inside.area / outline.area)),
    )


def depth_tolerance(entry_depth: Array) -> Array:
    """How far a measured depth may be off the box surface: 5 cm or 2 %."""
    tolerance: Array = np.maximum(0.05, 0.02 * entry_depth)
    return tolerance


@dataclass(frozen=True, eq=False)
class RayCounts:
    """Rays through the projected box, by what they meet."""

    hit: int
    occluded: int
    see_through: int
    points: Float[np.ndarray, "N 3"]
    """World points of the hits."""
    depths: Float[np.ndarray, " N"]
    step_px: float
    """Spacing of the ray grid."""

    @property
    def fraction(self) -> float:
        """Hits over hits and occluded rays; rays that pass the object by say nothing about it."""
        return self.hit / (self.hit + self.occluded) if self.hit else 0.0


def count_rays(
    box: Box,
    projection: Projection,
    camera: Camera,
    depth: Float[np.ndarray, "H W"],
    own: Bool[np.ndarray, "H W"] | None = None,
) -> RayCounts:
    """Compare measured depth with the entry and exit depth of the box on about 256 pixel rays.

    Args:
        box: The annotated solid.
        projection: Of ``box`` in ``camera``.
        camera: The view.
        depth: Z-depth in metres, 0 = unknown (such rays are skipped).
        own: Pixels that the instance map gives to the object.
    """
    pixels, step = _pixel_grid(projection.clipped, camera)
    row, column = pixels[:, 1].astype(int), pixels[:, 0].astype(int)
    measured = depth[row, column].astype(np.float64)
    enter, leave = slab_depths(box, camera, pixels)
    valid = (enter <= leave) & (leave > 0) & (measured > 0)
    tolerance = depth_tolerance(np.maximum(enter, 0.0))
    occluded = valid & (measured < enter - tolerance)
    hit = valid & ~occluded & (measured <= leave + tolerance)
    if own is not None:
        hit &= own[row, column]
    return RayCounts(
        int(hit.sum()),
        int(occluded.sum()),
        int((valid & ~hit & ~occluded).sum()),
        camera.back_project(pixels[hit], measured[hit]),
        measured[hit],
        step,
    )


def _pixel_grid(polygon: Float[np.ndarray, "Q 2"], camera: Camera) -> tuple[Array, float]:
    """About 256 evenly spaced pixel centres inside a convex polygon, and their spacing."""
    limit = np.array([camera.width, camera.height])
    low, span = polygon.min(axis=0), np.ptp(polygon, axis=0)
    spacing = max(1.0, float(np.sqrt(_polygon_area(polygon) / MAX_RAYS)))
    count = np.maximum(1, np.floor(span / spacing)).astype(int)
    u, v = (
        np.clip(
            np.floor(low[i] + (np.arange(count[i]) + 0.5) * span[i] / count[i]), 0, limit[i] - 1
        )
        + 0.5
        for i in (0, 1)
    )
    pixels = np.stack(np.meshgrid(u, v), axis=-1).reshape(-1, 2)
    edges = np.roll(polygon, -1, axis=0) - polygon
    offset = pixels[None] - polygon[:, None]  # [Q, N, 2]
    side = edges[:, None, 0] * offset[..., 1] - edges[:, None, 1] * offset[..., 0]
    inside = (side >= 0).all(axis=0) | (side <= 0).all(axis=0)
    if not inside.any():
        return np.floor(polygon.mean(axis=0))[None].clip(0, limit - 1) + 0.5, 1.0
    return pixels[inside], spacing


def _polygon_area(polygon: Array) -> float:
    x, y = polygon[:, 0], polygon[:, 1]
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


def passes_occupancy(
    box: Box,
    points: Float[np.ndarray, "N 3"],
    camera: Camera,
    *,
    rule: OccupancyRule = "robust",
    image_share: float = 1.0,
    in_frustum_frac: float = 1.0,
) -> bool:
    """Whether the measured points fill enough of the box.

    Args:
        box: The annotated solid.
        points: Measured world points in and around the box.
        camera: The view; decides which faces can be seen.
        rule: ``openspatial`` is the published rule: box shrunk by 0.9, at least 50 points, hull volume
            at least 7 % of the shrunk box, mask at least 2 % of the image, at least 10 % in the image.
            ``robust`` grows thin axes to 10 cm instead, and accepts a camera-facing face of which the
            points cover 25 %: a cabinet seen frontally has coplanar points and no hull volume.
        image_share: Share of the image covered by the object (``openspatial`` only).
        in_frustum_frac: Share of the projection inside the image (``openspatial`` only).
    """
    if rule == "none":
        return True
    if rule == "openspatial":
        size = box.size * OPENSPATIAL_SHRINK
        inside = box.to_box_frame(points)
        inside = inside[(np.abs(inside) <= size / 2).all(axis=1)]
        return (
            len(inside) >= OPENSPATIAL_MIN_POINTS
            and image_share >= OPENSPATIAL_MIN_IMAGE_SHARE
            and in_frustum_frac >= OPENSPATIAL_MIN_IN_IMAGE
            and _hull_measure(inside) >= MIN_HULL_RATIO * size.prod()
        )
    size = np.maximum(box.size, THIN_AXIS_M)
    local = box.to_box_frame(points)
    distance = np.linalg.norm(points - camera.centre, axis=1)
    tolerance = depth_tolerance(distance)[:, None]
    keep = (np.abs(local) <= size / 2 + tolerance).all(axis=1)
    local, tolerance = local[keep], tolerance[keep]
    eye = box.to_box_frame(camera.centre[None])[0]
    for axis in range(3):
        if abs(eye[axis]) <= size[axis] / 2:
            continue
        face = np.sign(eye[axis]) * box.size[axis] / 2
        near = np.abs(local[:, axis] - face) <= tolerance[:, 0]
        others = [other for other in range(3) if other != axis]
        area = _hull_measure(local[near][:, others])
        if area >= MIN_FACE_COVERAGE * box.size[others].prod():
            return True
    return _hull_measure(local) >= MIN_HULL_RATIO * float(size.prod())


def _hull_measure(points: Array) -> float:
    """Area (2D) or volume (3D) of the convex hull; 0 for too few or degenerate points."""
    if len(points) <= points.shape[1]:
        return 0.0
    if np.linalg.matrix_rank(points - points[0], tol=1e-6) < points.shape[1]:
        return 0.0
    try:
        return float(ConvexHull(points).volume)
    except QhullError:
        return 0.0


def state_of(vis_frac: float, px: float, num_pixels: int) -> VisibilityState:
    """Three-state visibility; the pixel threshold scales with the image."""
    if vis_frac < HIDDEN_FRAC:
        return "hidden"
    enough = px >= MIN_PX * num_pixels / REFERENCE_PIXELS
    return "visible" if vis_frac >= VISIBLE_FRAC and enough else "ambiguous"


def frame_visibility(
    boxes: Sequence[Box],
    camera: Camera,
    depth: Float[np.ndarray, "H W"] | None,
    ids: npt.NDArray[np.uint16] | None,
    *,
    occupancy: OccupancyRule = "robust",
) -> list[Vis]:
    """Visibility records of one frame.

    Args:
        boxes: One per object.
        camera: The view.
        depth: Z-depth ``[H, W]`` in metres, 0 = unknown. Without it the boxes themselves are cast, so
            that they at least hide each other, and occupancy stays unknown.
        ids: Instance map ``[H, W]`` (object index + 1) or ``None``.
        occupancy: Which rule, see :func:`passes_occupancy`.

    Returns:
        One record per object whose box projects into the image, in the order of ``boxes``.
    """
    measured = depth is not None
    if depth is None:
        depth, ids = cast_boxes(boxes, camera)
    num_pixels = camera.width * camera.height
    regions = (
        ndimage.find_objects(ids.astype(np.int32), max_label=len(boxes)) if ids is not None else []
    )
    records = []
    for index, box in enumerate(boxes):
        projection = project_box(box, camera)
        if projection is None:
            continue
        own = ids == index + 1 if ids is not None else None
        rays = count_rays(box, projection, camera, depth, own)
        vis_frac = projection.in_frustum_frac * rays.fraction
        bbox, px, centroid, depths = projection.bbox, 0.0, None, rays.depths
        if ids is not None:
            region = regions[index]
            if region is not None:
                mask = ids[region] == index + 1
                bbox, px, centroid = _mask_extent(mask, region)
                depths = depth[region][mask]
        elif rays.hit:
            px = min(rays.hit * rays.step_px**2, projection.area_px)
            pixels, _ = camera.project(rays.points)
            centroid = (float(pixels[:, 0].mean()), float(pixels[:, 1].mean()))
        state = state_of(vis_frac, px, num_pixels)
        filled = None
        if measured and occupancy != "none" and state == "visible":
            filled = passes_occupancy(
                box,
                rays.points,
                camera,
                rule=occupancy,
                image_share=px / num_pixels,
                in_frustum_frac=projection.in_frustum_frac,
            )
            state = state if filled else "ambiguous"
        near, middle = np.percentile(depths, [10, 50]) if len(depths) else (None, None)
        records.append(
            Vis(
                obj=index,
                bbox2d=bbox,
                px=round(px),
                px_frac=px / num_pixels,
                in_frustum_frac=projection.in_frustum_frac,
                vis_frac=vis_frac,
                state=state,
                occupancy=filled,
                trunc=projection.in_frustum_frac < 1 - 1e-9,
                centroid_px=centroid,
                depth_near=None if near is None else float(near),
                depth_med=None if middle is None else float(middle),
            )
        )
    return records


def _mask_extent(
    mask: Bool[np.ndarray, "h w"], region: tuple[slice, ...]
) -> tuple[tuple[float, float, float, float], float, tuple[float, float]]:
    """Half-open pixel box, number of pixels, and centroid of a mask cut out at ``region``."""
    rows, columns = mask.sum(axis=1), mask.sum(axis=0)
    px = int(rows.sum())
    top, left = region[0].start, region[1].start
    centroid = (
        left + float(columns @ (np.arange(len(columns)) + 0.5)) / px,
        top + float(rows @ (np.arange(len(rows)) + 0.5)) / px,
    )
    bbox = (float(left), float(top), float(region[1].stop), float(region[0].stop))
    return bbox, float(px), centroid


def encode_rle(mask: Bool[np.ndarray, "H W"]) -> dict[str, list[int]]:
    """COCO uncompressed run lengths: column-major, zeros first."""
    flat = np.asarray(mask, dtype=bool).ravel(order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    bounds = np.concatenate([[0], changes, [flat.size]])
    counts = np.diff(bounds).tolist()
    if flat.size and flat[0]:
        counts = [0, *counts]
    return {"size": list(mask.shape), "counts": counts}


def decode_rle(rle: dict[str, list[int]]) -> Bool[np.ndarray, "H W"]:
    """Mask of :func:`encode_rle`."""
    height, width = rle["size"]
    values = np.arange(len(rle["counts"])) % 2 == 1
    mask: npt.NDArray[np.bool_] = np.repeat(values, rle["counts"]).reshape(
        (height, width), order="F"
    )
    return mask
