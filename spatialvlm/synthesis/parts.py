"""Parts: fixed blocks of the scene list, each one parquet file and one sidecar, written atomically.

Part boundaries are a function of the scene list alone, so files do not depend on workers or shards.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from spatialvlm.errors import SceneSchemaError
from spatialvlm.scenes.io import load_scene, scene_files, scene_from_dict
from spatialvlm.scenes.schema import Scene
from spatialvlm.synthesis.rows import SCHEMA

MAX_SCENES_PER_PART = 64
ROW_GROUP = 4096


@dataclass(frozen=True, order=True)
class SceneRef:
    """Where a scene is stored."""

    scene_id: str
    path: str
    position: int = 0
    """Row inside a parquet file; 0 for JSON."""
    room_id: str = ""


@dataclass(frozen=True)
class Part:
    """A block of scenes."""

    index: int
    total: int
    scenes: tuple[SceneRef, ...]

    @property
    def stem(self) -> str:
        """File name without suffix."""
        return f"part-{self.index:05d}-of-{self.total:05d}"


def list_scenes(folder: Path) -> list[SceneRef]:
    """All scenes below ``folder``, sorted by scene id; only their ids are looked at.

    Raises:
        SceneSchemaError: A file cannot be read, or a scene occurs twice.
    """
    found = []
    for path in scene_files(folder):
        if path.suffix == ".parquet":
            ids = pq.read_table(path, columns=["scene_id", "room_id"]).to_pylist()
            found += [
                SceneRef(row["scene_id"], str(path), i, row["room_id"]) for i, row in enumerate(ids)
            ]
        else:
            scene_id, room_id = _ids(path)
            found.append(SceneRef(scene_id, str(path), room_id=room_id))
    found.sort()
    for one, two in pairwise(found):
        if one.scene_id and one.scene_id == two.scene_id:
            raise SceneSchemaError(
                f"scene {one.scene_id} is in {one.path} and in {two.path}; its rows would occur twice. Remove one, "
                "or name the folder of one set of scenes."
            )
    return found


def _ids(path: Path) -> tuple[str, str]:
    """Scene id and room id."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SceneSchemaError(
            f"{path}: not a JSON file: {error}. Write the scene again or remove it."
        ) from error
    found = values if isinstance(values, dict) else {}
    return str(found.get("scene_id", "")), str(found.get("room_id", ""))


def read_scene(ref: SceneRef) -> Scene:
    """Load and validate a scene.

    Raises:
        SceneSchemaError: It cannot be read, or its file has fewer rows than when it was listed.
    """
    path = Path(ref.path)
    if path.suffix != ".parquet":
        return load_scene(path)
    try:
        skip = ref.position
        for batch in pq.ParquetFile(path).iter_batches(batch_size=16, columns=["root", "scene"]):
            if skip < batch.num_rows:
                row = batch.slice(skip, 1).to_pylist()[0]
                root = Path(row["root"]) if row["root"] else path.parent
                return scene_from_dict(json.loads(row["scene"]), root=root, where=str(path))
            skip -= batch.num_rows
    except (pa.ArrowException, OSError, ValueError) as error:
        raise SceneSchemaError(
            f"{path}, row {ref.position}: not a readable scene: {error}. Import the scenes again."
        ) from error
    raise SceneSchemaError(
        f"{path} has no row {ref.position} any more. Import the scenes again and do not change them "
        "while rows are made."
    )


def image_prefix(scene: Scene, folder: Path) -> str:
    """Folder of the scene's media below the scenes folder."""
    root = scene.root or folder
    base = folder if folder.is_dir() else folder.parent
    return Path(os.path.relpath(root, base)).as_posix()


def split_into_parts(scenes: Sequence[SceneRef]) -> list[Part]:
    """Cut the sorted scene list into at most 64 parts (more only beyond 4096 scenes)."""
    size = min(max(math.ceil(len(scenes) / 64), 1), MAX_SCENES_PER_PART)
    total = math.ceil(len(scenes) / size)
    return [Part(i, total, tuple(scenes[i * size : (i + 1) * size])) for i in range(total)]


class RowWriter:
    """Writes rows as zstd parquet, a row group at a time; the file appears when it is complete.

    A context manager: rows go to a temporary name, which moves into place at the end of the block and is removed
    when an exception ends it.

    Args:
        target: File to write.
    """

    def __init__(self, target: Path) -> None:
        self.rows = 0
        self._target = target
        self._temporary = target.with_name(f".{target.name}.tmp")
        self._waiting: list[dict[str, Any]] = []

    def __enter__(self) -> RowWriter:
        """Open the file."""
        self._file = pq.ParquetWriter(
            self._temporary, SCHEMA, compression="zstd", compression_level=3
        )
        return self

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Append rows; at most one row group waits in memory."""
        self._waiting += rows
        while len(self._waiting) >= ROW_GROUP:
            self._write(self._waiting[:ROW_GROUP])
            del self._waiting[:ROW_GROUP]

    def _write(self, rows: list[dict[str, Any]]) -> None:
        self._file.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))
        self.rows += len(rows)

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Move the file into place, or remove it after an exception."""
        try:
            if kind is None and (self._waiting or not self.rows):
                self._write(self._waiting)
            self._file.close()
            if kind is None:
                _sync(self._temporary)
                self._temporary.replace(self._target)
        finally:  # a full disk also fails while the footer is written
            self._temporary.unlink(missing_ok=True)


def write_rows(target: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write all rows of a file."""
    with RowWriter(target) as writer:
        writer.add(rows)


def finish_part(folder: Path, part: Part, sidecar: dict[str, Any]) -> None:
    """Write the sidecar of a written part; its presence marks the part as complete."""
    sidecar = {**sidecar, "sha256": sha256(folder / f"{part.stem}.parquet")}
    write_text(folder / f"{part.stem}.json", json.dumps(sidecar, indent=1, sort_keys=True))


def write_text(target: Path, text: str) -> None:
    """Write a text file atomically."""
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    _sync(temporary)
    temporary.replace(target)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Checksum of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def finished_sidecar(folder: Path, part: Part) -> dict[str, Any] | None:
    """Sidecar of a part that is complete and intact, else ``None``; failed scenes are tried again."""
    try:
        sidecar: dict[str, Any] = json.loads((folder / f"{part.stem}.json").read_text("utf-8"))
        intact = sidecar["sha256"] == sha256(folder / f"{part.stem}.parquet")
        same_scenes = sidecar["scenes"] == [ref.scene_id for ref in part.scenes]
    except (OSError, ValueError, KeyError):
        return None
    return sidecar if intact and same_scenes and not sidecar.get("failed_scenes") else None
