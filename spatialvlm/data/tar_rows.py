"""Rows of WebDataset shards, and the bytes of their media."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spatialvlm.data.containers import Container, RawRow, parse_json, value_or_error
from spatialvlm.data.formats.base import IMAGE_SUFFIXES, VIDEO_SUFFIXES, suffix
from spatialvlm.data.media.video import natural_key
from spatialvlm.data.sample import MediaRef
from spatialvlm.errors import ConfigError, DataError, MediaError

if TYPE_CHECKING:
    import numpy.typing as npt


class TarRows(Container):
    """A WebDataset shard: ``<key>.json`` with the media members ``<key>.*`` beside it.

    Media members stand in place of the row's own media fields, images and videos each in natural order;
    the images of a row that has a ``video`` field are that video's frames.

    Args:
        path: The shard.
        table: Where the list of members is kept, so that the headers are read once; None = nowhere.
    """

    def __init__(self, path: Path, table: Path | None = None) -> None:
        self.path = path
        if table is not None and table.is_file():
            with np.load(table) as found:
                names = found["names"].tobytes().decode("utf-8", "surrogateescape").split("\0")
                self._spans = found["spans"]
        else:
            names, self._spans = _tar_members(path)
            if table is not None:
                _save_members(table, names, self._spans)
        self._members = {name: number for number, name in enumerate(names)}
        self._keys: dict[str, list[str]] = {}
        for name in names:
            self._keys.setdefault(_tar_key(name), []).append(name)
        self._order = list(self._keys)

    def scan(self) -> Iterator[RawRow]:
        """All rows in file order."""
        for number, key in enumerate(self._order):
            text = self._members.get(f"{key}.json", -1)
            offset, length = (0, 0) if text < 0 else self._spans[text].tolist()
            yield RawRow(number, offset, length, value_or_error(partial(self._row, key)))

    def read(self, row: int, offset: int, length: int) -> Any:
        """One row at the address that :meth:`scan` gave."""
        del offset, length
        return self._row(self._order[row])

    def media_bytes(self, ref: MediaRef) -> list[bytes]:
        """Embedded bytes of one medium: one entry, or one per frame."""
        return [self._bytes(name) for name in ref.member.split("\n")]

    def _bytes(self, name: str) -> bytes:
        if name not in self._members:
            raise MediaError(f"{self.path.name} has no member {name!r}.", reason="missing")
        offset, size = self._spans[self._members[name]].tolist()
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def _row(self, key: str) -> Any:
        names = self._keys[key]
        if key.startswith("/") or ".." in key.split("/"):
            raise DataError(
                f"{self.path.name}: member {names[0]!r} names a place outside the shard.",
                reason="refused_path",
            )
        if f"{key}.json" not in names:
            raise DataError(f"{self.path.name}: {names[0]} has no {key}.json.", reason="schema")
        row = parse_json(self._bytes(f"{key}.json"), self.path, lambda: 1)
        media = sorted((name for name in names if name != f"{key}.json"), key=natural_key)
        if not media or not isinstance(row, dict):
            return row
        frames = bool(row.get("video") or row.get("videos"))
        row = {k: v for k, v in row.items() if k not in ("image", "images", "video", "videos")}
        videos = [name for name in media if suffix(name) in VIDEO_SUFFIXES]
        images = [name for name in media if suffix(name) in IMAGE_SUFFIXES]
        if frames and images and not videos:
            return row | {"videos": [{"tar": "\n".join(images)}]}
        return row | {
            "images": [{"tar": n} for n in images],
            "videos": [{"tar": n} for n in videos],
        }


def _tar_members(path: Path) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Names of all files of a shard, and ``[members, 2]`` offset and size of their data."""
    names, spans = [], []
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                if member.isfile():
                    names.append(member.name)
                    spans.append((member.offset_data, member.size))
                tar.members.clear()  # type: ignore[attr-defined]  # it remembers every header
            end = tar.offset
        with path.open("rb") as file:
            file.seek(end)
            if file.read(512).strip(b"\0"):  # tarfile takes a broken header for the end
                raise ConfigError(
                    f"{path} is damaged at byte {end}, so the members behind cannot be found. Fetch or write it again."
                )
    except tarfile.TarError as error:
        raise ConfigError(
            f"{path} is not an uncompressed tar file ({error}); unpack compressed shards first."
        ) from error
    return names, np.array(spans, np.int64).reshape(-1, 2)


def _save_members(table: Path, names: list[str], spans: npt.NDArray[np.int64]) -> None:
    table.parent.mkdir(parents=True, exist_ok=True)
    unfinished = table.with_name(f"{table.name}.{os.getpid()}")
    joined = "\0".join(names).encode("utf-8", "surrogateescape")
    try:
        with unfinished.open("wb") as out:
            np.savez(out, names=np.frombuffer(joined, np.uint8), spans=spans)
        unfinished.replace(table)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise DataError(f"cannot write {table}: {error}") from error


def _tar_key(name: str) -> str:
    folder, _, base = name.rpartition("/")
    stem = base.split(".", 1)[0]
    return f"{folder}/{stem}" if folder else stem
