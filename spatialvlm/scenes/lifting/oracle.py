"""Backends that know the truth of a rendered room, plus controllable noise.

They answer by looking the image up in the room's frames, so they go through exactly the same pipeline
as neural backends; the noise curve of lifting is measured with them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numpy.random import Generator, Philox
from scipy import ndimage

from spatialvlm.scenes.cameras import Camera
from spatialvlm.scenes.lifting.protocols import (
    Backends,
    Detection,
    Mask,
    Poses,
    best_match,
    mask_box,
)
from spatialvlm.scenes.lifting.world import FloorGravity
from spatialvlm.scenes.schema import Scene
from spatialvlm.scenes.transforms import Array, rigid, rx, ry, rz


@dataclass(frozen=True)
class Noise:
    """How wrong the oracle is; zero everywhere means exact."""

    depth_rel: float = 0.0
    """Standard deviation of a smooth relative depth error."""
    depth_scale: float = 1.0
    """Factor on all depths."""
    edge_px: int = 0
    """Depth is mixed over this many pixels at edges."""
    rotation_deg: float = 0.0
    """Standard deviation of each rotation angle per frame."""
    translation_m: float = 0.0
    drift_m: float = 0.0
    """Standard deviation of a random walk per frame."""
    mask_erode_px: int = 0
    """Negative values dilate."""
    mask_drop: float = 0.0
    """Share of masks that are missed."""
    mask_merge: float = 0.0
    """Share of masks that swallow their nearest neighbour in the image."""
    label_swap: float = 0.0
    """Share of detections with another label of the room."""
    seed: int = 0


@dataclass(frozen=True, eq=False)
class View:
    """What the oracle knows of one frame."""

    image: npt.NDArray[np.uint8]
    depth: Array
    ids: npt.NDArray[np.uint16]
    camera: Camera


class Oracle:
    """All six backends of one rendered room.

    Args:
        scene: Labels of the objects.
        views: Image, depth, instance map and camera of every frame.
        noise: How wrong to be.
    """

    metric = True

    def __init__(self, scene: Scene, views: Sequence[View], noise: Noise | None = None) -> None:
        self.noise = noise or Noise()
        self.id = "oracle"
        self.version = repr(self.noise)
        self._labels = [item.label for item in scene.objects]
        self._views = list(views)
        self._by_image = {view.image.tobytes(): i for i, view in enumerate(self._views)}
        self.calls = 0

    def backends(self) -> Backends:
        """The oracle in all roles; gravity is estimated from its depth."""
        return Backends(self, self, self, self, self, FloorGravity())

    def _indices(self, images: Array) -> list[int]:
        self.calls += 1
        return [self._by_image[np.ascontiguousarray(image).tobytes()] for image in images]

    def _rng(self, purpose: int, frame: int) -> Generator:
        return Generator(Philox(key=[self.noise.seed * 1000 + purpose, frame]))

    def depth(self, images: Array) -> Array:
        """True depth with smooth relative noise, mixed edges and a scale error."""
        return np.stack([self._noisy_depth(i) for i in self._indices(images)])

    def _noisy_depth(self, index: int) -> Array:
        depth: Array = self._views[index].depth.astype(np.float32)
        noise = self.noise
        if noise.edge_px:
            depth = ndimage.uniform_filter(depth, 2 * noise.edge_px + 1)
        if noise.depth_rel:
            height, width = depth.shape
            coarse = self._rng(1, index).standard_normal((8, 8))
            smooth = ndimage.zoom(coarse, (height / 8, width / 8), order=1)[:height, :width]
            fine = self._rng(2, index).standard_normal(depth.shape)
            depth = depth * (1 + noise.depth_rel * (0.8 * smooth + 0.6 * fine)).astype(np.float32)
        return np.maximum(depth * np.float32(noise.depth_scale), 0)

    def intrinsics(self, images: Array) -> Array:
        """True calibration, for single images."""
        return np.stack([self._views[index].camera.intrinsics for index in self._indices(images)])

    def poses(self, images: Array) -> Poses:
        """True cameras with independent and accumulated errors."""
        poses, intrinsics, drift = [], [], np.zeros(3)
        for index in self._indices(images):
            camera, rng = self._views[index].camera, self._rng(3, index)
            angles = np.radians(rng.normal(0, 1, 3) * self.noise.rotation_deg)
            drift = drift + rng.normal(0, 1, 3) * self.noise.drift_m
            shift = drift + rng.normal(0, 1, 3) * self.noise.translation_m
            turn = rz(angles[2]) @ ry(angles[1]) @ rx(angles[0])
            poses.append(rigid(camera.rotation @ turn, camera.centre + shift))
            intrinsics.append(camera.intrinsics)
        return Poses(np.array(poses), np.array(intrinsics), metric=True)

    def tags(self, images: Array) -> list[list[str]]:
        """Labels of the objects with pixels in the image."""
        return [
            sorted({self._labels[i - 1] for i in np.unique(self._views[index].ids) if i > 0})
            for index in self._indices(images)
        ]

    def detect(self, images: Array, labels: Sequence[Sequence[str]]) -> list[list[Detection]]:
        """Tight boxes of the instances with an asked label; some get a wrong one."""
        return [
            [d for _, d in self._instances(index) if d.label in set(asked) or self.noise.label_swap]
            for index, asked in zip(self._indices(images), labels, strict=True)
        ]

    def _instances(self, index: int) -> list[tuple[int, Detection]]:
        view, rng = self._views[index], self._rng(4, index)
        found = []
        for i in np.unique(view.ids).tolist():
            if i == 0:
                continue
            dropped, swapped = (
                rng.random() < self.noise.mask_drop,
                rng.random() < self.noise.label_swap,
            )
            other = self._labels[int(rng.integers(len(self._labels)))]
            if dropped:
                continue
            label = other if swapped else self._labels[i - 1]
            found.append((i, Detection(label, mask_box(view.ids == i), 1.0)))
        return found

    def segment(self, images: Array, boxes: Sequence[Sequence[Detection]]) -> list[list[Mask]]:
        """Masks of the instances that fit the boxes best, grown or shrunk, some with a neighbour."""
        result = []
        for index, asked in zip(self._indices(images), boxes, strict=True):
            ids = self._views[index].ids
            present = [i for i in np.unique(ids).tolist() if i > 0]
            known = [mask_box(ids == i) for i in present]
            rng, masks = self._rng(5, index), []
            for d in asked:
                at = best_match(d.bbox, known)
                pixels = ids == present[at]
                if rng.random() < self.noise.mask_merge and len(present) > 1:
                    others = [box for i, box in enumerate(known) if i != at]
                    near = [i for i in present if i != present[at]][_nearest(known[at], others)]
                    pixels = pixels | (ids == near)
                masks.append(Mask(self._shape(pixels), 1.0))
            result.append(masks)
        return result

    def _shape(self, mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        pixels = self.noise.mask_erode_px
        if pixels > 0:
            return np.asarray(ndimage.binary_erosion(mask, iterations=pixels))
        if pixels < 0:
            return np.asarray(ndimage.binary_dilation(mask, iterations=-pixels))
        return mask


def _nearest(
    bbox: tuple[float, float, float, float], boxes: Sequence[tuple[float, float, float, float]]
) -> int:
    """Position of the box whose centre is closest."""
    x, y = (bbox[0] + bbox[2]) / 2, (bbox[1] + bbox[3]) / 2
    gaps = [np.hypot((b[0] + b[2]) / 2 - x, (b[1] + b[3]) / 2 - y) for b in boxes]
    return int(np.argmin(gaps))
