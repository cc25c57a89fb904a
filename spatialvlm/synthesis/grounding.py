"""Boxes in the frame of one view: nine numbers in the camera, or seven in the frame of SSR.

SSR (arXiv 2603.00409) writes ``[xc, yc, zc, l, w, h, yaw]`` in a gravity-aligned frame at the optical
centre of the **first** frame: x along the ground projection of its optical axis, y to the left, z up.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from spatialvlm.answers import round_half_up
from spatialvlm.scenes.boxes import canonical_yaw_rad, canonicalise_axes, refit_upright
from spatialvlm.scenes.cameras import MIN_GROUND_PROJECTION, Camera
from spatialvlm.scenes.codecs import box_codec
from spatialvlm.scenes.schema import Object
from spatialvlm.scenes.transforms import Array, rigid
from spatialvlm.synthesis.rows import Reason, Reject

SSR_CONVENTION = (
    "The origin is the optical center of the first frame; x points along the ground projection of its "
    "viewing direction, y to the left, z up. Write bbox_3d as [xc, yc, zc, l, w, h, yaw]: center and "
    "extents in meters along the box axes, yaw in radians counter-clockwise from x seen from above."
)
CAM9_CONVENTION = (
    "Boxes are given in the camera frame with x to the right, y down and z forward, in meters."
)
JSON_SHAPE = '[{"label": "...", "bbox_3d": [...]}]'


def ssr_frame(camera: Camera, on_vertical: Literal["reject", "camera_up"] = "reject") -> Array:
    """``ssr_from_world`` ``[4, 4]`` of a first frame.

    Args:
        camera: The first view.
        on_vertical: What to do when the optical axis is within 5.7 degrees of vertical: give up, or
            take the direction of image-up projected to the ground as forward.

    Raises:
        Reject: ``vertical_axis``.
    """
    axis = camera.rotation[:, 2]
    if float(np.hypot(axis[0], axis[1])) >= MIN_GROUND_PROJECTION:
        return camera.level_frame("x")
    if on_vertical == "reject":
        raise Reject(Reason.VERTICAL_AXIS)
    # Looking down, image-up is the way ahead; looking up it is the way back.
    forward = -camera.rotation[:, 1] * (1.0 if axis[2] < 0 else -1.0)
    forward = np.array([forward[0], forward[1], 0.0])
    forward /= np.linalg.norm(forward)
    up = np.array([0.0, 0.0, 1.0])
    rotation = np.stack([forward, np.cross(up, forward), up])
    return rigid(rotation, -rotation @ camera.centre)


def ssr_box(
    item: Object,
    ssr_from_world: Array,
    *,
    tilt: Literal["drop", "refit"] = "drop",
    canonical: Literal["long_x", "source"] = "long_x",
) -> list[float]:
    """Seven numbers of an object, unrounded.

    Args:
        item: The object.
        ssr_from_world: Result of :func:`ssr_frame`.
        tilt: Reject boxes tilted by more than 10 degrees, or replace them by an upright box.
        canonical: ``long_x`` gives every solid one description (length >= width without a front);
            ``source`` keeps the axes of the annotation.

    Raises:
        Reject: ``tilted``.
    """
    box = item.box
    if not box.is_upright:
        if tilt == "drop":
            raise Reject(Reason.TILTED, f"object {item.index}")
        box = refit_upright(box)
    box = canonicalise_axes(box, has_front=item.has_front, canonical=canonical)
    local = box.transformed(ssr_from_world)
    yaw = local.yaw_rad
    if canonical == "long_x":
        yaw = canonical_yaw_rad(yaw, item.symmetry, box.size, has_front=item.has_front)
    elif yaw <= -np.pi + 1e-9:
        yaw = np.pi
    return [*local.center.tolist(), *local.size.tolist(), float(yaw)]


def camera_box(item: Object, camera: Camera, codec: str) -> list[float]:
    """Nine numbers of an object in the camera frame, in a codec of the base model."""
    return box_codec(codec).encode(item.box.transformed(camera.cam_from_world))


def labelled(label: str, values: list[float]) -> dict[str, Any]:
    """One entry of a JSON answer, rounded as it is printed."""
    return {"label": label, "bbox_3d": [round_half_up(value, 2) for value in values]}
