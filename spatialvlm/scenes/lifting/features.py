"""What backends have computed, kept by (backend, version, input), so that nothing is computed twice.

``remembered(backends, store)`` gives backends that look into the store first: a second run, another task or
another label list makes no call for what is known. Neural backends may keep their image embeddings there too.
"""

import hashlib
import os
import threading
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from spatialvlm.errors import SceneError
from spatialvlm.scenes.lifting.protocols import (
    Backend,
    Backends,
    DepthEstimator,
    Detection,
    Detector,
    Mask,
    PoseEstimator,
    Poses,
    Segmenter,
    Tagger,
)
from spatialvlm.scenes.transforms import Array

Features = Mapping[str, Array]
MEMORY_BYTES = 2**30


class FeatureStore:
    """Named arrays by key; the last ones used stay in memory, all on disk when a folder is given.

    Args:
        folder: Where files go; ``None`` keeps nothing beyond this object.
        memory_bytes: Arrays beyond this are dropped from memory, oldest use first.
    """

    def __init__(self, folder: Path | None = None, memory_bytes: int = MEMORY_BYTES) -> None:
        self.folder = folder
        self.misses = 0
        self._memory: OrderedDict[str, Features] = OrderedDict()
        self._limit, self._held = memory_bytes, 0
        self._lock = threading.Lock()
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    @staticmethod
    def key(backend: Backend, *inputs: Array | str) -> str:
        """Identity of a computation."""
        digest = hashlib.blake2b(f"{backend.id}\x1f{backend.version}".encode(), digest_size=16)
        for value in inputs:
            if isinstance(value, str):
                digest.update(f"\x1f{value}".encode())
                continue
            digest.update(f"\x1f{value.shape}{value.dtype}".encode())
            digest.update(np.ascontiguousarray(value).tobytes())
        return digest.hexdigest()

    def lookup(
        self, keys: Sequence[str], compute: Callable[[list[int]], Sequence[Features]]
    ) -> list[Features]:
        """Features of all keys; ``compute`` gets the positions of those that are missing, once.

        Raises:
            SceneError: A stored file is damaged.
        """
        known = [self._find(key) for key in keys]
        missing = [position for position, found in enumerate(known) if found is None]
        if missing:
            self.misses += len(missing)
            for position, features in zip(missing, compute(missing), strict=True):
                self._write(keys[position], features)
                known[position] = features
        return [found for found in known if found is not None]

    def _find(self, key: str) -> Features | None:
        with self._lock:
            if key in self._memory:
                self._memory.move_to_end(key)
                return self._memory[key]
        path = self._path(key)
        if path is None or not path.is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as file:
                features = dict(file)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise SceneError(
                f"{path}: stored features are damaged: {error}. Delete the file."
            ) from error
        self._keep(key, features)
        return features

    def _write(self, key: str, features: Features) -> None:
        path = self._path(key)
        if path is not None:
            temporary = path.with_suffix(f".{os.getpid()}.tmp.npz")
            np.savez(temporary, allow_pickle=False, **features)
            temporary.replace(path)
        self._keep(key, features)

    def _keep(self, key: str, features: Features) -> None:
        with self._lock:
            self._held += _size(features) - _size(self._memory.get(key, {}))
            self._memory[key] = features
            while self._held > self._limit and len(self._memory) > 1:
                _, dropped = self._memory.popitem(last=False)
                self._held -= _size(dropped)

    def _path(self, key: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{key}.npz"


def _size(features: Features) -> int:
    return sum(array.nbytes for array in features.values())


def remembered(backends: Backends, store: FeatureStore) -> Backends:
    """The same backends, which ask ``store`` before they compute."""
    return replace(
        backends,
        depth=_Depth(backends.depth, store),
        pose=_Poses(backends.pose, store),
        tagger=_Tags(backends.tagger, store),
        detector=_Boxes(backends.detector, store),
        segmenter=_Masks(backends.segmenter, store),
    )


class _Remembered:
    """Passes the name of the backend on."""

    def __init__(self, backend: Any, store: FeatureStore) -> None:
        self._backend, self._store = backend, store
        self.id: str = backend.id
        self.version: str = backend.version


class _Depth(_Remembered):
    _backend: DepthEstimator

    @property
    def metric(self) -> bool:
        return self._backend.metric

    def depth(self, images: Array) -> Array:
        keys = [self._store.key(self, "depth", image) for image in images]

        def compute(missing: list[int]) -> list[Features]:
            return [{"depth": depth} for depth in self._backend.depth(images[missing])]

        return np.stack([found["depth"] for found in self._store.lookup(keys, compute)])


class _Poses(_Remembered):
    _backend: PoseEstimator

    def poses(self, images: Array) -> Poses:
        def compute(_: list[int]) -> list[Features]:
            found = self._backend.poses(images)
            return [
                {
                    "world_from_cam": found.world_from_cam,
                    "intrinsics": found.intrinsics,
                    "metric": np.array(found.metric),
                }
            ]

        (found,) = self._store.lookup([self._store.key(self, "poses", images)], compute)
        return Poses(found["world_from_cam"], found["intrinsics"], bool(found["metric"]))


class _Tags(_Remembered):
    _backend: Tagger

    def tags(self, images: Array) -> list[list[str]]:
        keys = [self._store.key(self, "tags", image) for image in images]

        def compute(missing: list[int]) -> list[Features]:
            return [
                {"tags": np.array(tags, dtype=str)} for tags in self._backend.tags(images[missing])
            ]

        return [found["tags"].tolist() for found in self._store.lookup(keys, compute)]


class _Boxes(_Remembered):
    _backend: Detector

    def detect(self, images: Array, labels: Sequence[Sequence[str]]) -> list[list[Detection]]:
        keys = [
            self._store.key(self, "boxes", image, "\x1e".join(asked))
            for image, asked in zip(images, labels, strict=True)
        ]

        def compute(missing: list[int]) -> list[Features]:
            found = self._backend.detect(images[missing], [labels[i] for i in missing])
            return [
                {
                    "labels": np.array([d.label for d in boxes], dtype=str),
                    "boxes": np.array([d.bbox for d in boxes], dtype=np.float64).reshape(-1, 4),
                    "scores": np.array([d.score for d in boxes], dtype=np.float64),
                }
                for boxes in found
            ]

        return [
            [
                Detection(str(label), (box[0], box[1], box[2], box[3]), float(score))
                for label, box, score in zip(
                    found["labels"], found["boxes"].tolist(), found["scores"], strict=True
                )
            ]
            for found in self._store.lookup(keys, compute)
        ]


class _Masks(_Remembered):
    _backend: Segmenter

    def segment(self, images: Array, boxes: Sequence[Sequence[Detection]]) -> list[list[Mask]]:
        keys = [
            self._store.key(self, "masks", image, repr([(d.label, d.bbox) for d in asked]))
            for image, asked in zip(images, boxes, strict=True)
        ]

        def compute(missing: list[int]) -> list[Features]:
            found = self._backend.segment(images[missing], [boxes[i] for i in missing])
            height, width = images.shape[1:3]
            return [
                {
                    "bits": np.packbits(
                        np.array([m.pixels for m in masks], bool).reshape(-1, height * width),
                        axis=1,
                    ),
                    "scores": np.array([m.score for m in masks], dtype=np.float64),
                }
                for masks in found
            ]

        height, width = images.shape[1:3]
        results = []
        for found in self._store.lookup(keys, compute):
            pixels = np.unpackbits(found["bits"], axis=1, count=height * width).astype(bool)
            results.append(
                [
                    Mask(mask.reshape(height, width), float(score))
                    for mask, score in zip(pixels, found["scores"], strict=True)
                ]
            )
        return results
