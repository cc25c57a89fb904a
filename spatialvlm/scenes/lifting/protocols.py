"""What a lifting backend looks like: numpy in, numpy out, one call per batch of frames.

Every backend names itself (``id`` and ``version``, both part of cache keys). Images are uint8
``[B, H, W, 3]``. A user's own model plugs in by having the right method; nothing is registered.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from jaxtyping import Bool, Float, UInt8

from spatialvlm.scenes.transforms import Array


@dataclass(frozen=True, eq=False)
class Poses:
    """Cameras of all frames of one video.

    Args:
        world_from_cam: ``[S, 4, 4]``, OpenCV camera axes; the world may be turned and scaled.
        intrinsics: ``[S, 3, 3]`` pixels of the given images.
        metric: Whether translations are metres.
    """

    world_from_cam: Array
    intrinsics: Array
    metric: bool


@dataclass(frozen=True)
class Detection:
    """A labelled box ``[x0, y0, x1, y1)`` in pixels."""

    label: str
    bbox: tuple[float, float, float, float]
    score: float


@dataclass(frozen=True, eq=False)
class Mask:
    """Pixels of one detection."""

    pixels: npt.NDArray[np.bool_]
    score: float


class Backend(Protocol):
    """Common part of all backends."""

    @property
    def id(self) -> str:
        """Short name."""

    @property
    def version(self) -> str:
        """Changes when outputs change: weights hash, settings."""


class DepthEstimator(Backend, Protocol):
    """Z-depth per frame."""

    @property
    def metric(self) -> bool:
        """Whether the depth is in metres."""

    def depth(self, images: UInt8[np.ndarray, "B H W 3"]) -> Float[np.ndarray, "B H W"]:
        """Z-depth; 0 = unknown."""


class PoseEstimator(Backend, Protocol):
    """Cameras of a whole video."""

    def poses(self, images: UInt8[np.ndarray, "S H W 3"]) -> Poses:
        """Poses and intrinsics of all frames together."""


class Tagger(Backend, Protocol):
    """Which things are in a picture."""

    def tags(self, images: UInt8[np.ndarray, "B H W 3"]) -> list[list[str]]:
        """Labels per image."""


class Detector(Backend, Protocol):
    """Where they are."""

    def detect(
        self, images: UInt8[np.ndarray, "B H W 3"], labels: Sequence[Sequence[str]]
    ) -> list[list[Detection]]:
        """Boxes per image for the labels of that image."""


class Segmenter(Backend, Protocol):
    """Which pixels they have."""

    def segment(
        self, images: UInt8[np.ndarray, "B H W 3"], boxes: Sequence[Sequence[Detection]]
    ) -> list[list[Mask]]:
        """One mask per detection."""


class GravityEstimator(Backend, Protocol):
    """Which way is up."""

    def up(
        self, points: Float[np.ndarray, "N 3"], camera_up: Float[np.ndarray, "S 3"]
    ) -> Array | None:
        """Unit vector ``[3]``, ``None`` when it cannot be told within five degrees."""


@dataclass(frozen=True, eq=False)
class Backends:
    """The parts of one lifting run."""

    depth: DepthEstimator
    pose: PoseEstimator
    tagger: Tagger
    detector: Detector
    segmenter: Segmenter
    gravity: GravityEstimator


def mask_box(mask: Bool[np.ndarray, "H W"]) -> tuple[float, float, float, float]:
    """Half-open pixel box of a mask with at least one pixel."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
