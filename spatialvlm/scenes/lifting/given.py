"""Backends whose answers the user states: labels, calibration, poses."""

import hashlib
import io
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from spatialvlm.errors import CameraError, ImporterError
from spatialvlm.scenes.lifting.protocols import Poses
from spatialvlm.scenes.transforms import Array


class FixedTags:
    """Looks for the same labels in every picture."""

    id = "fixed-tags"

    def __init__(self, labels: Sequence[str]) -> None:
        self._labels = list(labels)
        self.version = ",".join(self._labels)

    def tags(self, images: Array) -> list[list[str]]:
        """The labels, once per image."""
        return [list(self._labels) for _ in images]


class KnownCamera:
    """The same calibrated lens for every picture.

    Args:
        fx, fy, cx, cy: Pinhole parameters in pixels of the given images.
    """

    id = "known-camera"

    def __init__(self, fx: float, fy: float, cx: float, cy: float) -> None:
        self._k = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]])
        self.version = f"{fx:g},{fy:g},{cx:g},{cy:g}"

    def intrinsics(self, images: Array) -> Array:
        """``[B, 3, 3]``."""
        return np.repeat(self._k[None], len(images), axis=0)


class AssumedFov:
    """A guess for pictures of unknown origin: square pixels, the given horizontal field of view."""

    id = "assumed-fov"

    def __init__(self, hfov_deg: float = 60.0) -> None:
        if not 5.0 <= hfov_deg <= 150.0:
            raise CameraError(f"field of view must lie in 5..150 degrees, got {hfov_deg}.")
        self._hfov_deg, self.version = hfov_deg, f"{hfov_deg:g}"

    def intrinsics(self, images: Array) -> Array:
        """``[B, 3, 3]`` with the principal point in the middle."""
        height, width = images.shape[1:3]
        focal = width / 2 / np.tan(np.radians(self._hfov_deg) / 2)
        return KnownCamera(focal, focal, width / 2, height / 2).intrinsics(images)


class StoredPoses:
    """Cameras of a video from an ``.npz`` file, as structure from motion or a tracker writes them.

    Args:
        path: ``world_from_cam [S, 4, 4]`` (OpenCV axes), ``intrinsics [S, 3, 3]`` or ``[3, 3]``, ``metric`` (bool).
        images: ``[S, H, W, 3]`` the frames they belong to, in order.

    Raises:
        ImporterError: Missing, damaged, or another number of frames.
    """

    id = "stored-poses"

    def __init__(self, path: Path, images: Array) -> None:
        try:
            data = path.read_bytes()
            with np.load(io.BytesIO(data), allow_pickle=False) as file:
                self._poses = np.asarray(file["world_from_cam"], dtype=np.float64)
                self._k = np.asarray(file["intrinsics"], dtype=np.float64)
                self._metric = bool(file["metric"])
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise ImporterError(
                f"{path}: needs the arrays world_from_cam, intrinsics and metric: {error}."
            ) from error
        if self._k.ndim == 2:
            self._k = np.repeat(self._k[None], len(images), axis=0)
        if self._poses.shape != (len(images), 4, 4) or self._k.shape != (len(images), 3, 3):
            raise ImporterError(
                f"{path}: poses {self._poses.shape} and intrinsics {self._k.shape} for {len(images)} frames."
            )
        self._by_image = {
            np.ascontiguousarray(image).tobytes(): i for i, image in enumerate(images)
        }
        self.version = hashlib.blake2b(data, digest_size=8).hexdigest()

    def poses(self, images: Array) -> Poses:
        """Stored cameras of the chosen frames."""
        at = [self._by_image[np.ascontiguousarray(image).tobytes()] for image in images]
        return Poses(self._poses[at], self._k[at], self._metric)
