"""Pinhole cameras: OpenCV axes (x right, y down, z forward) in a z-up world in metres.

Pixel coordinates are continuous: pixel (0, 0) covers [0, 1) x [0, 1) and its centre is (0.5, 0.5).
Depth always means z-depth.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float

from spatialvlm.errors import CameraError
from spatialvlm.scenes.transforms import (
    Array,
    checked_rotation,
    invert_rigid,
    rigid,
    transform_points,
    wrap_deg,
)

MIN_GROUND_PROJECTION = 0.1
"""Shortest ground projection of the optical axis (5.7 degrees from vertical) with a level frame."""


@dataclass(frozen=True, eq=False)
class Camera:
    """A calibrated view.

    Args:
        intrinsics: ``[3, 3]`` pinhole matrix in pixels.
        world_from_cam: ``[4, 4]`` pose; its translation **is** the camera centre.
        width: Image width in pixels.
        height: Image height in pixels.

    Raises:
        CameraError: Wrong shape, not finite, focal length <= 0, principal point outside twice the
            image, or a pose that is not rigid.
    """

    intrinsics: Array
    world_from_cam: Array
    width: int
    height: int

    def __post_init__(self) -> None:
        intrinsics = np.asarray(self.intrinsics, dtype=np.float64)
        pose = np.asarray(self.world_from_cam, dtype=np.float64)
        if intrinsics.shape != (3, 3):
            raise CameraError(
                f"camera: intrinsics must be 3x3, got shape {intrinsics.shape}. "
                "Pass the upper left 3x3 block of a 4x4 matrix."
            )
        if pose.shape != (4, 4) or not np.isfinite(pose).all():
            raise CameraError(
                f"camera: world_from_cam must be 4x4 and finite, got {pose.tolist()}. "
                "Drop frames without a pose."
            )
        if not np.isfinite(intrinsics).all() or intrinsics[0, 0] <= 0 or intrinsics[1, 1] <= 0:
            raise CameraError(
                f"camera: focal lengths must be positive, got fx={intrinsics[0, 0]}, "
                f"fy={intrinsics[1, 1]}."
            )
        cx, cy = intrinsics[0, 2], intrinsics[1, 2]
        if abs(cx - self.width / 2) > self.width or abs(cy - self.height / 2) > self.height:
            raise CameraError(
                f"camera: principal point ({cx:.1f}, {cy:.1f}) lies outside twice the image "
                f"{self.width}x{self.height}. Do the intrinsics belong to another resolution?"
            )
        rotation = checked_rotation(pose[:3, :3], what="camera pose", error=CameraError)
        object.__setattr__(self, "intrinsics", intrinsics)
        object.__setattr__(self, "world_from_cam", rigid(rotation, pose[:3, 3]))

    @classmethod
    def look(
        cls,
        centre: tuple[float, float, float],
        heading_deg: float,
        pitch_deg: float = 0.0,
        *,
        hfov_deg: float,
        width: int,
        height: int,
    ) -> "Camera":
        """Camera without roll at ``centre``; heading counter-clockwise from +x, pitch up positive."""
        heading, pitch = np.radians(heading_deg), np.radians(pitch_deg)
        forward = np.array(
            [np.cos(pitch) * np.cos(heading), np.cos(pitch) * np.sin(heading), np.sin(pitch)]
        )
        right = np.array([np.sin(heading), -np.cos(heading), 0.0])
        rotation = np.stack([right, np.cross(forward, right), forward], axis=1)
        focal = width / 2 / np.tan(np.radians(hfov_deg) / 2)
        intrinsics = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1.0]])
        return cls(intrinsics, rigid(rotation, centre), width, height)

    @cached_property
    def cam_from_world(self) -> Float[np.ndarray, "4 4"]:
        """Inverse of the pose."""
        return invert_rigid(self.world_from_cam)

    @property
    def centre(self) -> Float[np.ndarray, " 3"]:
        """Optical centre in world metres."""
        centre: Array = self.world_from_cam[:3, 3]
        return centre

    @property
    def rotation(self) -> Float[np.ndarray, "3 3"]:
        """Columns: image right, image down, optical axis, in the world."""
        rotation: Array = self.world_from_cam[:3, :3]
        return rotation

    @property
    def hfov_deg(self) -> float:
        """Horizontal field of view."""
        fx, cx = self.intrinsics[0, 0], self.intrinsics[0, 2]
        return float(np.degrees(np.arctan(cx / fx) + np.arctan((self.width - cx) / fx)))

    @property
    def vfov_deg(self) -> float:
        """Vertical field of view."""
        fy, cy = self.intrinsics[1, 1], self.intrinsics[1, 2]
        return float(np.degrees(np.arctan(cy / fy) + np.arctan((self.height - cy) / fy)))

    @property
    def heading_deg(self) -> float:
        """Ground direction of the optical axis, counter-clockwise from +x, (-180, 180]."""
        return wrap_deg(np.degrees(np.arctan2(self.rotation[1, 2], self.rotation[0, 2])))

    @property
    def pitch_deg(self) -> float:
        """Elevation of the optical axis; up is positive."""
        return float(np.degrees(np.arcsin(np.clip(self.rotation[2, 2], -1.0, 1.0))))

    @property
    def roll_deg(self) -> float:
        """Angle of the image's right direction above the horizon."""
        return float(np.degrees(np.arcsin(np.clip(self.rotation[2, 0], -1.0, 1.0))))

    def to_cam(self, points_world: Float[np.ndarray, "N 3"]) -> Float[np.ndarray, "N 3"]:
        """World metres to camera metres."""
        return transform_points(self.cam_from_world, points_world)

    def project(
        self, points_world: Float[np.ndarray, "N 3"]
    ) -> tuple[Float[np.ndarray, "N 2"], Float[np.ndarray, " N"]]:
        """Project world points.

        Returns:
            Pixel coordinates (NaN for points that are not in front of the camera) and z-depth.
        """
        points = self.to_cam(points_world)
        return self.project_cam(points), points[:, 2]

    def project_cam(self, points_cam: Float[np.ndarray, "N 3"]) -> Float[np.ndarray, "N 2"]:
        """Project points given in the camera frame; NaN where z <= 0."""
        depth = np.where(points_cam[:, 2:] > 0, points_cam[:, 2:], np.nan)
        pixels: Array = (points_cam @ self.intrinsics.T)[:, :2] / depth
        return pixels

    def rays(self, pixels: Float[np.ndarray, "N 2"]) -> Float[np.ndarray, "N 3"]:
        """Viewing rays through pixels in the **camera** frame, scaled to z = 1."""
        homogeneous = np.concatenate([pixels, np.ones((len(pixels), 1))], axis=1)
        rays: Array = homogeneous @ np.linalg.inv(self.intrinsics).T
        return rays

    def back_project(
        self, pixels: Float[np.ndarray, "N 2"], depth: Float[np.ndarray, " N"]
    ) -> Float[np.ndarray, "N 3"]:
        """World points at z-depth ``depth`` behind ``pixels``."""
        return transform_points(self.world_from_cam, self.rays(pixels) * depth[:, None])

    def level_frame(self, forward_axis: str = "x") -> Float[np.ndarray, "4 4"]:
        """Gravity-aligned frame at the camera centre, as ``level_from_world``.

        Args:
            forward_axis: ``"x"`` gives axes (forward, left, up), ``"y"`` gives (right, forward, up).

        Raises:
            CameraError: The optical axis is within 5.7 degrees of vertical.
        """
        axis = self.rotation[:, 2]
        length = float(np.hypot(axis[0], axis[1]))
        if length < MIN_GROUND_PROJECTION:
            raise CameraError(
                f"level frame: the optical axis is vertical (ground projection {length:.3f} is "
                f"below {MIN_GROUND_PROJECTION}), so there is no forward direction."
            )
        forward = np.array([axis[0], axis[1], 0.0]) / length
        up = np.array([0.0, 0.0, 1.0])
        right = np.cross(forward, up)
        rows = {"x": (forward, -right, up), "y": (right, forward, up)}[forward_axis]
        rotation = np.stack(rows)
        return rigid(rotation, -rotation @ self.centre)

    def resized(self, width: int, height: int) -> "Camera":
        """Camera of the image resized to ``width`` x ``height`` (rows of K scale with the size)."""
        scale = np.array([[width / self.width], [height / self.height], [1.0]])
        return Camera(self.intrinsics * scale, self.world_from_cam, width, height)


def ray_to_z_depth(
    distance: Float[np.ndarray, "H W"], intrinsics: Float[np.ndarray, "3 3"]
) -> Float[np.ndarray, "H W"]:
    """Turn distance along the viewing ray (metres) into z-depth."""
    height, width = distance.shape
    u = (np.arange(width) + 0.5 - intrinsics[0, 2]) / intrinsics[0, 0]
    v = (np.arange(height) + 0.5 - intrinsics[1, 2]) / intrinsics[1, 1]
    depth: Array = distance / np.sqrt(u[None] ** 2 + v[:, None] ** 2 + 1.0)
    return depth
