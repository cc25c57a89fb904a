"""The row table of a source: where every sample is, which rows share media, what is not eligible.

One pass over the files writes a few columns (64 bytes a row) that are memory-mapped afterwards. The
table's key is the files' content, the reader, and its options; the mixture is no part of it.
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spatialvlm.data.arrow_rows import ArrowRows
from spatialvlm.data.sample import MediaRef, Sample
from spatialvlm.data.sources import Source
from spatialvlm.errors import DataError

if TYPE_CHECKING:
    import numpy.typing as npt

    from spatialvlm.typing import IntArray


COLUMNS = np.dtype(
    [
        ("offset", np.int64),
        ("media_key", np.uint64),
        ("prefix_key", np.uint64),
        ("row", np.uint32),
        ("length", np.uint32),
        ("prompt_chars", np.uint32),
        ("answer_chars", np.uint32),
        ("scene_key", np.uint32),
        ("difficulty", np.float32),
        ("margin", np.float32),
        ("file", np.uint16),
        ("sub", np.uint16),
        ("images", np.uint16),
        ("capability", np.int16),
        ("turns", np.uint8),
        ("videos", np.uint8),
        ("flags", np.uint8),
        ("reason", np.uint8),
    ]
)
"""One record per sample; a rejected row has one record with its reason."""

FLAG_MARKS, FLAG_VARIABLE, FLAG_BLOCKED, FLAG_NO_ID = 1, 2, 4, 8
"""Has marks to draw; its text depends on the epoch; names a blocked scene; names no known scene."""


def media_and_prefix_key(sample: Sample, salt: bytes = b"") -> tuple[int, int]:
    """Identity of the ordered media list, and of the media prefix; 0 without media.

    The prefix key is equal for rows of one source that may share their prefix. It covers the system text,
    the first user turn up to its last medium, the media, marks, and the geometry flag; rows with media
    after the first answer get 0. Whether rows really share is decided from their tokens and pixels when a
    step is planned; this key only brings them together.
    """
    if not sample.media:
        return 0, 0
    system = ""
    for turn in sample.turns:
        if turn.role == "user":
            break
        system = turn.text
    parts, last = turn.parts, len(sample.media) - 1
    head = parts[: parts.index(last) + 1] if last in parts else None
    marks = str(sample.marks) if sample.marks else ""
    flags = (sample.geometry, sample.same_scene, sample.frames_pinned)
    return _media_and_prefix_hash(salt, sample.media, system, head, marks, flags)


@functools.lru_cache(maxsize=1024)  # neighbouring rows often share their media
def _media_and_prefix_hash(
    salt: bytes,
    media: tuple[MediaRef, ...],
    system: str,
    head: tuple[str | int, ...] | None,
    marks: str,
    flags: tuple[object, ...],
) -> tuple[int, int]:
    refs = "\0".join(
        [
            f"{r.kind}\0{r.store}\0{r.path}\0{r.member}\0{r.clip_s or ''}\0{r.frames or ''}"
            for r in media
        ]
    )
    if head is None:
        return stable_hash(salt, refs), 0
    text = "\0".join([p if isinstance(p, str) else f"\1{p}" for p in head])
    prefix = f"{system}\0{text}\0{marks}\0{''.join(map(str, flags))}\0{refs}"
    return stable_hash(salt, refs), stable_hash(salt, prefix)


@functools.lru_cache(maxsize=1024)
def stable_hash(salt: bytes, text: str) -> int:
    """64 bits of blake2b, never 0."""
    data = salt + text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") or 1


class SourceIndex:
    """A source with its row table.

    Args:
        source: The source.
        folder: Folder that :func:`build_index` wrote.

    Raises:
        DataError: The folder is damaged.
    """

    def __init__(self, source: Source, folder: Path) -> None:
        self.source = source
        self.folder = folder
        try:
            self.info: dict[str, Any] = json.loads((folder / "info.json").read_bytes())
        except ValueError as error:
            raise DataError(
                f"{folder / 'info.json'} is damaged ({error}). Delete {folder}; it is built again."
            ) from error
        self.capabilities: tuple[str, ...] = tuple(self.info["capabilities"])
        self._columns: dict[str, npt.NDArray[Any]] = {}
        self._checked: set[int] = set()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_columns": {}}

    def __len__(self) -> int:
        return int(self.info["rows"])

    @property
    def content_key(self) -> str:
        """Hash of the files' content and the reader; equal on every machine."""
        return str(self.info["content_key"])

    def column(self, name: str) -> npt.NDArray[Any]:
        """One memory-mapped column ``[rows]`` of :data:`COLUMNS`."""
        if name not in self._columns:
            self._columns[name] = np.load(self.folder / f"{name}.npy", mmap_mode="r")
        return self._columns[name]

    def row_groups(self) -> IntArray | None:
        """int64 ``[rows]``: the row group a row is decoded with; None when rows are read one by one."""
        if self.source.access != "row_group":
            return None
        file, row = np.asarray(self.column("file"), np.int64), np.asarray(self.column("row"))
        groups = np.zeros(len(self), np.int64)
        first = 0
        for number in range(len(self.source.files)):
            container = self.source.container(number)
            if not isinstance(container, ArrowRows):
                return None
            mine = file == number
            groups[mine] = first + np.searchsorted(container.group_starts, row[mine], side="right")
            first += len(container.group_starts)
        return groups

    def eligible(self, *, drop_blocked: bool = False) -> npt.NDArray[np.bool_]:
        """Bool ``[rows]``: rows that may be drawn."""
        good = self.column("reason") == 0
        if drop_blocked:
            good &= (self.column("flags") & FLAG_BLOCKED) == 0
        return np.asarray(good)

    def uid(self, row: int) -> str:
        """The uid without reading the row; exact unless one row became several samples."""
        stem = self.source.stems[int(self.column("file")[row])]
        return f"{self.source.name}/{stem}#{int(self.column('row')[row])}"

    def sample(self, row: int, epoch: int = 0) -> Sample:
        """The sample of a row of the table.

        Args:
            row: Number in the table.
            epoch: Pass over the source, for ``answers: cycle``.

        Raises:
            DataError: The row was rejected, or its file changed since it was indexed.
        """
        file = int(self.column("file")[row])
        self._check_unchanged(file, row)
        samples = self.source.read(
            file,
            int(self.column("row")[row]),
            int(self.column("offset")[row]),
            int(self.column("length")[row]),
            epoch,
        )
        return samples[int(self.column("sub")[row])]

    def rejected(self) -> dict[str, int]:
        """Rejected rows per reason."""
        return dict(self.info["rejected"])

    def _check_unchanged(self, file: int, row: int) -> None:
        if file in self._checked:
            return
        path = self.source.root / self.source.files[file]
        size, _ = self.info["files"][file]
        found = path.stat().st_size if path.is_file() else 0
        if found != size:
            raise DataError(
                f"{self.uid(row)}: {path} has {found} bytes and had {size} when it was "
                "indexed. Restore the file or start a new run, which indexes it again."
            )
        self._checked.add(file)
