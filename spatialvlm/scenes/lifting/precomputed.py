"""Backends whose results lie on disk, one ``.npz`` per frame, written by any tool.

``<folder>/<index>.npz`` holds ``depth [H, W]`` (metres or relative), ``world_from_cam [4, 4]``,
``intrinsics [3, 3]``, ``masks [N, H, W]`` (bool), ``labels [N]`` (text) and ``scores [N]``. ``meta.json`` holds
``{"metric_depth": bool, "metric_poses": bool, "version": text}``.
"""

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from spatialvlm.errors import ImporterError
from spatialvlm.scenes.lifting.protocols import (
    Backends,
    Detection,
    Mask,
    Poses,
    best_match,
    mask_box,
)
from spatialvlm.scenes.lifting.world import FloorGravity
from spatialvlm.scenes.transforms import Array

KEYS = ("depth", "world_from_cam", "intrinsics", "masks", "labels", "scores")


class Precomputed:
    """All backends of one video from files.

    Args:
        folder: See the module docstring.
        images: ``[S, H, W, 3]`` the frames the files belong to, in order.

    Raises:
        ImporterError: A file is missing, damaged, or lacks a key.
    """

    id = "precomputed"

    def __init__(self, folder: Path, images: Array) -> None:
        meta_path = folder / "meta.json"
        try:
            meta = json.loads(meta_path.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise ImporterError(f"{meta_path}: missing or not JSON: {error}.") from error
        self.version = str(meta.get("version", "1"))
        self.metric = bool(meta["metric_depth"])
        self._metric_poses = bool(meta["metric_poses"])
        self._frames = [self._load(folder / f"{index:06d}.npz") for index in range(len(images))]
        self._by_image = {
            np.ascontiguousarray(image).tobytes(): i for i, image in enumerate(images)
        }

    @staticmethod
    def _load(path: Path) -> dict[str, Array]:
        try:
            with np.load(path, allow_pickle=False) as file:
                missing = [key for key in KEYS if key not in file]
                if missing:
                    raise ImporterError(f"{path}: array {missing[0]!r} is missing.")
                return {key: file[key] for key in KEYS}
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise ImporterError(f"{path}: not a readable npz file: {error}.") from error

    def backends(self) -> Backends:
        """The files in all roles."""
        return Backends(self, self, self, self, self, FloorGravity())

    def _of(self, images: Array) -> list[dict[str, Array]]:
        return [
            self._frames[self._by_image[np.ascontiguousarray(image).tobytes()]] for image in images
        ]

    def depth(self, images: Array) -> Array:
        """Stored depth."""
        return np.stack([frame["depth"] for frame in self._of(images)]).astype(np.float32)

    def poses(self, images: Array) -> Poses:
        """Stored cameras."""
        frames = self._of(images)
        return Poses(
            np.stack([frame["world_from_cam"] for frame in frames]),
            np.stack([frame["intrinsics"] for frame in frames]),
            self._metric_poses,
        )

    def tags(self, images: Array) -> list[list[str]]:
        """Stored labels."""
        return [sorted(set(map(str, frame["labels"]))) for frame in self._of(images)]

    def detect(self, images: Array, labels: Sequence[Sequence[str]]) -> list[list[Detection]]:
        """Boxes of the stored masks with an asked label."""
        return [
            [
                Detection(str(label), mask_box(mask), float(score))
                for label, mask, score in zip(
                    frame["labels"], frame["masks"], frame["scores"], strict=True
                )
                if mask.any() and str(label) in set(asked)
            ]
            for frame, asked in zip(self._of(images), labels, strict=True)
        ]

    def intrinsics(self, images: Array) -> Array:
        """Stored calibration, for single images."""
        return np.stack([frame["intrinsics"] for frame in self._of(images)])

    def segment(self, images: Array, boxes: Sequence[Sequence[Detection]]) -> list[list[Mask]]:
        """The stored mask of the asked label that fits each box best; empty when there is none."""
        result = []
        for image, frame, asked in zip(images, self._of(images), boxes, strict=True):
            nothing = Mask(np.zeros(image.shape[:2], dtype=bool), 0.0)
            stored: dict[str, list[Mask]] = {}
            for label, mask, score in zip(
                frame["labels"], frame["masks"], frame["scores"], strict=True
            ):
                if mask.any():
                    found = Mask(mask.astype(bool), float(score))
                    stored.setdefault(str(label), []).append(found)
            masks = []
            for d in asked:
                same = stored.get(d.label, [nothing])
                boxes_of = [mask_box(m.pixels) if m.pixels.any() else (0, 0, 0, 0) for m in same]
                masks.append(same[best_match(d.bbox, boxes_of)])
            result.append(masks)
        return result
