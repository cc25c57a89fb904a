"""Backends whose results lie on disk, one ``.npz`` per frame, written by any tool.

``<folder>/<index>.npz`` holds ``depth [H, W]`` (metres or relative), ``world_from_cam [4, 4]``,
``intrinsics [3, 3]``, ``masks [N, H, W]`` (bool), ``labels [N]`` (text) and ``scores [N]``. ``meta.json`` holds
``{"metric_depth": bool, "metric_poses": bool}``.
"""

import hashlib
import io
import json
import zipfile
import zlib
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
    version: str
    """Digest of all files, so that stored results of other files are not taken for these."""

    def __init__(self, folder: Path, images: Array) -> None:
        meta_path = folder / "meta.json"
        try:
            meta = json.loads(meta_path.read_bytes())
        except (OSError, ValueError) as error:
            raise ImporterError(f"{meta_path}: missing or not JSON: {error}.") from error
        for key in ("metric_depth", "metric_poses"):
            if not isinstance(meta, dict) or not isinstance(meta.get(key), bool):
                raise ImporterError(f"{meta_path}: needs {key!r}: true or false.")
        self.metric, self._metric_poses = meta["metric_depth"], meta["metric_poses"]
        digest = hashlib.blake2b(json.dumps(meta, sort_keys=True).encode(), digest_size=8)
        self._frames = [
            self._load(folder / f"{index:06d}.npz", digest) for index in range(len(images))
        ]
        self.version = digest.hexdigest()
        self._by_image = {
            np.ascontiguousarray(image).tobytes(): i for i, image in enumerate(images)
        }

    @staticmethod
    def _load(path: Path, digest: hashlib.blake2b) -> dict[str, Array]:
        try:
            data = path.read_bytes()
            digest.update(data)
            with np.load(io.BytesIO(data), allow_pickle=False) as file:
                missing = [key for key in KEYS if key not in file]
                if missing:
                    raise ImporterError(f"{path}: array {missing[0]!r} is missing.")
                return {key: file[key] for key in KEYS}
        except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
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
