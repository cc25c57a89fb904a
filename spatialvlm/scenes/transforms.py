"""Rotations and rigid transforms: right-handed, column vectors, ``a_from_c = a_from_b @ b_from_c``."""

from typing import Any

import numpy as np
import numpy.typing as npt
from jaxtyping import Float

from spatialvlm.errors import SceneError

Array = npt.NDArray[Any]
"""Any numpy array; shapes are in the jaxtyping annotations or the docstrings."""

ROTATION_TOLERANCE = 1e-3
"""Largest entry of ``|R @ R.T - I|`` that counts as rounding; beyond it the matrix is refused."""


def rx(angle_rad: float) -> Float[np.ndarray, "3 3"]:
    """Rotation about x by ``angle_rad``, counter-clockwise seen from +x."""
    c, s = np.cos(angle_rad), np.sin(angle_rad)
    return np.array([[1.0, 0.0, 0.0], [0.0, c, -s], [0.0, s, c]])


def ry(angle_rad: float) -> Float[np.ndarray, "3 3"]:
    """Rotation about y by ``angle_rad``, counter-clockwise seen from +y."""
    c, s = np.cos(angle_rad), np.sin(angle_rad)
    return np.array([[c, 0.0, s], [0.0, 1.0, 0.0], [-s, 0.0, c]])


def rz(angle_rad: float) -> Float[np.ndarray, "3 3"]:
    """Rotation about z by ``angle_rad``, counter-clockwise seen from +z."""
    c, s = np.cos(angle_rad), np.sin(angle_rad)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


def wrap_deg(angle_deg: float) -> float:
    """Wrap degrees to (-180, 180]; -180 maps to +180."""
    wrapped = 180.0 - (180.0 - float(angle_deg)) % 360.0
    return wrapped if wrapped != -180.0 else 180.0


def bearing_deg(from_xy: Array, to_xy: Array) -> float:
    """Direction of ``to_xy`` seen from ``from_xy``: degrees counter-clockwise from +x, (-180, 180]."""
    return wrap_deg(np.degrees(np.arctan2(to_xy[1] - from_xy[1], to_xy[0] - from_xy[0])))


def yaw_of(rotation: Float[np.ndarray, "3 3"]) -> float:
    """Heading of the rotated x axis on the ground in radians, (-pi, pi]."""
    return float(np.arctan2(rotation[1, 0], rotation[0, 0]))


def geodesic_deg(a: Float[np.ndarray, "3 3"], b: Float[np.ndarray, "3 3"]) -> float:
    """Angle in degrees of the rotation that takes ``a`` to ``b``, 0..180.

    The sine part keeps small angles exact where the arc cosine alone loses half of the digits.
    """
    relative = a.T @ b
    cosine = (np.trace(relative) - 1.0) / 2.0
    axis = np.array(
        [
            relative[2, 1] - relative[1, 2],
            relative[0, 2] - relative[2, 0],
            relative[1, 0] - relative[0, 1],
        ]
    )
    return float(np.degrees(np.arctan2(np.linalg.norm(axis) / 2.0, cosine)))


def nearest_rotation(matrix: Float[np.ndarray, "3 3"]) -> Float[np.ndarray, "3 3"]:
    """Closest rotation in the Frobenius norm (SVD); the determinant is +1."""
    u, _, vt = np.linalg.svd(matrix)
    u[:, 2] *= np.sign(np.linalg.det(u @ vt))
    closest: Array = u @ vt
    return closest


def checked_rotation(
    matrix: npt.ArrayLike, *, what: str, error: type[SceneError]
) -> Float[np.ndarray, "3 3"]:
    """Return ``matrix`` re-orthonormalised, or raise ``error`` when it is not a rotation.

    Args:
        matrix: Anything that converts to a 3x3 array.
        what: Where the matrix comes from; begins the message.
        error: Class to raise.

    Raises:
        SceneError: Of class ``error``: wrong shape, not finite, not orthonormal within
            :data:`ROTATION_TOLERANCE`, or a reflection. A reflection is never repaired.
    """
    rotation = np.asarray(matrix, dtype=np.float64)
    if rotation.shape != (3, 3) or not np.isfinite(rotation).all():
        raise error(f"{what}: rotation must be 3x3 and finite, got {rotation.tolist()}.")
    deviation = float(np.abs(rotation @ rotation.T - np.eye(3)).max())
    if deviation > ROTATION_TOLERANCE:
        raise error(
            f"{what}: rotation is not orthonormal, |R R^T - I| = {deviation:.2g} exceeds "
            f"{ROTATION_TOLERANCE}. Rows and columns must be unit vectors at right angles."
        )
    if np.linalg.det(rotation) < 0:
        raise error(
            f"{what}: rotation has determinant -1 (a mirror image). Check the handedness of the "
            "source axes; a reflection is never repaired."
        )
    return rotation if deviation < 1e-12 else nearest_rotation(rotation)


def rigid(rotation: npt.ArrayLike, translation: npt.ArrayLike) -> Float[np.ndarray, "4 4"]:
    """Homogeneous matrix of ``x -> rotation @ x + translation``."""
    matrix = np.eye(4)
    matrix[:3, :3] = rotation
    matrix[:3, 3] = translation
    return matrix


def invert_rigid(matrix: Float[np.ndarray, "4 4"]) -> Float[np.ndarray, "4 4"]:
    """Inverse of a rigid transform."""
    rotation = matrix[:3, :3].T
    return rigid(rotation, -rotation @ matrix[:3, 3])


def transform_points(
    matrix: Float[np.ndarray, "4 4"], points: Float[np.ndarray, "N 3"]
) -> Float[np.ndarray, "N 3"]:
    """Apply a rigid transform to points."""
    moved: Array = points @ matrix[:3, :3].T + matrix[:3, 3]
    return moved
