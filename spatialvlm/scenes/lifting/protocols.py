"""What a lifting backend looks like: numpy in, numpy out, one call per batch of frames.

Every backend names itself (``id`` and ``version``, both part of cache keys). Images are uint8
``[B, H, W, 3]``. A user's own model plugs in by having the right method; nothing is registered.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from jaxtyping import Bool, Float, UInt8

from spatialvlm.scenes.boxes import Box
from spatialvlm.scenes.lifting.stages import LiftedObject, Observation, fit_box, merge
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


class CameraEstimator(Backend, Protocol):
    """Intrinsics of single images."""

    def intrinsics(self, images: UInt8[np.ndarray, "B H W 3"]) -> Float[np.ndarray, "B 3 3"]:
        """Pinhole matrices in pixels of the given images."""


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


class Captioner(Backend, Protocol):
    """What an object looks like, in a few words."""

    def captions(
        self, crops: Sequence[UInt8[np.ndarray, "h w 3"]], labels: Sequence[str]
    ) -> list[str]:
        """One phrase per picture of an object."""


KeyframeSelector = Callable[[Array, int], list[int]]
"""``(images [S, H, W, 3], at most so many)`` to the indices of the frames that are used."""
Merger = Callable[[Sequence[Observation]], list[LiftedObject]]
"""Observations of all frames to things."""
BoxFitter = Callable[[Array], Box]
"""World points ``[N, 3]`` of a thing to its upright box; raises ``BoxError`` when there is none."""


def choose_keyframes(images: UInt8[np.ndarray, "S H W 3"], count: int) -> list[int]:
    """Evenly spaced frames, each the sharpest of its stretch; a camera at rest gives one frame."""
    grey = images[:, ::2, ::2].astype(np.float32).mean(axis=3)
    sharpness = np.abs(np.diff(grey, axis=1)).mean(axis=(1, 2)) + np.abs(
        np.diff(grey, axis=2)
    ).mean(axis=(1, 2))
    chosen: list[int] = []
    for part in np.array_split(np.arange(len(images)), min(count, len(images))):
        best = int(part[sharpness[part].argmax()])
        if not chosen or np.abs(grey[best] - grey[chosen[-1]]).mean() >= MIN_CHANGE:
            chosen.append(best)
    return chosen


MIN_CHANGE = 1.0
"""Mean change of grey levels below which two frames show the same view."""


@dataclass(frozen=True, eq=False)
class Backends:
    """The parts of one lifting run; what is not neural has a default."""

    depth: DepthEstimator
    pose: PoseEstimator
    tagger: Tagger
    detector: Detector
    segmenter: Segmenter
    gravity: GravityEstimator
    captioner: Captioner | None = None
    """Describes the objects; ``None`` = no captions."""
    keyframes: KeyframeSelector = choose_keyframes
    merger: Merger = merge
    fitter: BoxFitter = fit_box


def mask_box(mask: Bool[np.ndarray, "H W"]) -> tuple[float, float, float, float]:
    """Half-open pixel box of a mask with at least one pixel."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def best_match(
    bbox: tuple[float, float, float, float], boxes: Sequence[tuple[float, float, float, float]]
) -> int:
    """Position of the box that overlaps ``bbox`` most (intersection over union); ties: the first."""

    def overlap(other: tuple[float, float, float, float]) -> float:
        width = min(bbox[2], other[2]) - max(bbox[0], other[0])
        height = min(bbox[3], other[3]) - max(bbox[1], other[1])
        shared = max(width, 0.0) * max(height, 0.0)
        areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (bbox, other)]
        return shared / max(sum(areas) - shared, 1e-9)

    return max(range(len(boxes)), key=lambda i: overlap(boxes[i]))
