"""Oriented boxes: columns of ``rotation`` are the box axes, ``size`` are full extents in metres.

Corner ``4*[x+] + 2*[y+] + [z+]`` has the signs of its three bits in the box frame.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt
from jaxtyping import Float
from scipy.spatial import ConvexHull, QhullError

from spatialvlm.errors import BoxError
from spatialvlm.scenes.transforms import Array, checked_rotation, rz, yaw_of

Symmetry = Literal["none", "c2", "c4", "inf"]
"""Rotations about the vertical that leave the object unchanged: none, 180, 90 degrees, or all."""

MIN_SIZE_M = 1e-3
UPRIGHT_TILT_DEG = 10.0
"""Largest angle between box z and world z at which "height" still means something."""
SQUARE_TOLERANCE = 0.05
"""Footprints whose sides differ by less than this share of the larger side count as square."""

CORNER_SIGNS = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], dtype=float)
EDGES = np.array([(a, b) for a in range(8) for b in range(a) if (a ^ b) in (1, 2, 4)])
"""The 12 edges as pairs of corner indices."""


@dataclass(frozen=True, eq=False)
class Box:
    """A solid oriented box.

    Args:
        center: ``[3]`` metres.
        size: ``[3]`` full extents along the box axes, metres, at least 1 mm.
        rotation: ``[3, 3]``; columns are the box axes in the frame of ``center``.

    Raises:
        BoxError: Wrong shape, not finite, size too small, or not a rotation.
    """

    center: Array
    size: Array
    rotation: Array

    def __post_init__(self) -> None:
        center = np.asarray(self.center, dtype=np.float64)
        size = np.asarray(self.size, dtype=np.float64)
        if center.shape != (3,) or not np.isfinite(center).all():
            raise BoxError(f"box center must be 3 finite numbers, got {center.tolist()}.")
        if size.shape != (3,) or not np.isfinite(size).all() or size.min() < MIN_SIZE_M:
            raise BoxError(
                f"box size must be 3 finite numbers of at least {MIN_SIZE_M} m, got {size.tolist()}."
            )
        rotation = checked_rotation(self.rotation, what="box", error=BoxError)
        object.__setattr__(self, "center", center)
        object.__setattr__(self, "size", size)
        object.__setattr__(self, "rotation", rotation)

    @classmethod
    def upright(cls, center: npt.ArrayLike, size: npt.ArrayLike, yaw_rad: float = 0.0) -> "Box":
        """Box with vertical z axis, turned counter-clockwise by ``yaw_rad``."""
        return cls(np.asarray(center), np.asarray(size), rz(yaw_rad))

    @cached_property
    def corners(self) -> Float[np.ndarray, "8 3"]:
        """Corners in the order of the module docstring."""
        corners: Array = (CORNER_SIGNS * self.size / 2) @ self.rotation.T + self.center
        return corners

    @property
    def volume(self) -> float:
        """Cubic metres."""
        return float(self.size.prod())

    @property
    def z_min(self) -> float:
        """Lowest point."""
        return float(self.corners[:, 2].min())

    @property
    def z_max(self) -> float:
        """Highest point."""
        return float(self.corners[:, 2].max())

    @property
    def tilt_deg(self) -> float:
        """Angle between box z and world z, 0..180."""
        return float(np.degrees(np.arccos(np.clip(self.rotation[2, 2], -1.0, 1.0))))

    @property
    def is_upright(self) -> bool:
        """Whether the third extent is a height."""
        return self.tilt_deg <= UPRIGHT_TILT_DEG

    @property
    def yaw_rad(self) -> float:
        """Heading of box +x on the ground, (-pi, pi]."""
        return yaw_of(self.rotation)

    @cached_property
    def footprint(self) -> Float[np.ndarray, "N 2"]:
        """Counter-clockwise convex hull of the corners seen from above; 4 points when upright."""
        if self.rotation[2, 2] > 1 - 1e-12:
            rectangle: Array = self.corners[[1, 5, 7, 3], :2]
            return rectangle
        points = self.corners[:, :2]
        try:
            hull: Array = points[ConvexHull(points).vertices]
        except QhullError as error:
            raise BoxError(f"footprint of box at {self.center.tolist()} is degenerate.") from error
        return hull

    def to_box_frame(self, points: Float[np.ndarray, "N 3"]) -> Float[np.ndarray, "N 3"]:
        """Coordinates of ``points`` in the box frame (origin at the centre)."""
        local: Array = (points - self.center) @ self.rotation
        return local

    def contains(
        self, points: Float[np.ndarray, "N 3"], margin: float = 0.0
    ) -> npt.NDArray[np.bool_]:
        """Which points lie inside the box grown by ``margin`` metres on every side."""
        inside: npt.NDArray[np.bool_] = (
            np.abs(self.to_box_frame(points)) <= self.size / 2 + margin
        ).all(axis=1)
        return inside

    def distance_to_point(self, point: npt.ArrayLike) -> float:
        """Euclidean distance from ``point`` to the solid box; 0 inside."""
        local = np.abs(self.to_box_frame(np.asarray(point, dtype=np.float64)[None])[0])
        return float(np.linalg.norm(np.maximum(local - self.size / 2, 0.0)))

    def transformed(self, a_from_b: Float[np.ndarray, "4 4"]) -> "Box":
        """The same solid in another frame."""
        return Box(
            a_from_b[:3, :3] @ self.center + a_from_b[:3, 3],
            self.size,
            a_from_b[:3, :3] @ self.rotation,
        )


def refit_upright(box: Box) -> Box:
    """Upright box around the corners: minimum-area rectangle on the ground times [z_min, z_max]."""
    center_xy, size_xy, yaw = minimum_area_rectangle(box.corners[:, :2])
    return Box.upright(
        [*center_xy, (box.z_min + box.z_max) / 2], [*size_xy, box.z_max - box.z_min], yaw
    )


def minimum_area_rectangle(
    points: Float[np.ndarray, "N 2"],
) -> tuple[Float[np.ndarray, " 2"], Float[np.ndarray, " 2"], float]:
    """Smallest rectangle around 2D points; one side lies on an edge of the convex hull.

    Returns:
        Centre, side lengths ``(along yaw, across)`` with the longer one first, and yaw in radians in
        (-pi/2, pi/2].

    Raises:
        BoxError: Fewer than three points or all on one line.
    """
    try:
        hull = points[ConvexHull(points).vertices]
    except (QhullError, ValueError) as error:
        raise BoxError(
            "minimum-area rectangle needs three points that are not on a line."
        ) from error
    edges = np.roll(hull, -1, axis=0) - hull
    angles = np.unique(np.round(np.mod(np.arctan2(edges[:, 1], edges[:, 0]), np.pi / 2), 12))
    axes = np.stack([np.cos(angles), np.sin(angles)], axis=1)  # [A, 2]
    normals = np.stack([-axes[:, 1], axes[:, 0]], axis=1)
    along, across = hull @ axes.T, hull @ normals.T  # [N, A]
    lengths = np.stack([np.ptp(along, axis=0), np.ptp(across, axis=0)], axis=1)
    best = int(np.argmin(np.round(lengths.prod(axis=1), 12)))
    middle = np.array([along[:, best].min() + along[:, best].max(), 0.0]) / 2
    middle[1] = (across[:, best].min() + across[:, best].max()) / 2
    center = middle[0] * axes[best] + middle[1] * normals[best]
    size, yaw = lengths[best], float(angles[best])
    if size[1] > size[0]:
        size, yaw = size[::-1], yaw + np.pi / 2
    return center, size, yaw if yaw <= np.pi / 2 else yaw - np.pi


def canonicalise_axes(
    box: Box, *, has_front: bool = False, canonical: Literal["long_x", "source"] = "long_x"
) -> Box:
    """Relabel the box axes so that z is the one closest to world z, right-handed, pointing up.

    Args:
        box: Any box in a z-up world.
        has_front: Box +x is the front and stays where it is when it is horizontal.
        canonical: ``long_x`` also makes size x >= size y for boxes without a front; ``source`` keeps
            the order of the two horizontal axes.

    Returns:
        The same solid.
    """
    vertical = int(np.argmax(np.abs(box.rotation[2])))
    horizontal = [axis for axis in range(3) if axis != vertical]
    if (
        not has_front
        and canonical == "long_x"
        and box.size[horizontal[0]] < box.size[horizontal[1]]
    ):
        horizontal.reverse()
    order = [*horizontal, vertical]
    rotation, size = box.rotation[:, order].copy(), box.size[order]
    if rotation[2, 2] < 0:
        rotation[:, 2] *= -1
    if np.linalg.det(rotation) < 0:
        rotation[:, 1] *= -1
    return Box(box.center, size, rotation)


def yaw_period_rad(symmetry: Symmetry, size: npt.ArrayLike, *, has_front: bool) -> float:
    """Angle after which the box looks the same; 0 when the yaw has no meaning at all."""
    size_x, size_y = np.asarray(size, dtype=np.float64)[:2]
    if has_front or (symmetry == "none"):
        return 2 * np.pi
    if symmetry == "inf":
        return 0.0
    square = abs(size_x - size_y) <= SQUARE_TOLERANCE * max(size_x, size_y)
    return np.pi / 2 if symmetry == "c4" or square else np.pi


def canonical_yaw_rad(
    yaw_rad: float, symmetry: Symmetry, size: npt.ArrayLike, *, has_front: bool
) -> float:
    """Reduce a yaw to (-period/2, period/2] of the object's symmetry."""
    period = yaw_period_rad(symmetry, size, has_front=has_front)
    if period == 0.0:
        return 0.0
    reduced = period / 2 - (period / 2 - yaw_rad) % period
    # Float noise of an angle that sits on the open end must not flip its sign.
    return float(period / 2 if reduced <= -period / 2 + 1e-9 else reduced)
