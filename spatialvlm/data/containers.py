"""Random access to the rows of one file: JSON lines, a JSON array, Arrow, parquet, a tar shard.

A container lists where its rows are (:meth:`Container.scan`) and reads one of them again by that address
(:meth:`Container.read`). No file is ever loaded whole. Bytes of embedded media never enter a row: a true
value stands in their place, and :meth:`Container.media_bytes` fetches them when they are decoded.
"""

from __future__ import annotations

import bisect
import json
import logging
import os
import re
import shutil
import tarfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from spatialvlm.data.formats.base import IMAGE_SUFFIXES, VIDEO_SUFFIXES, suffix
from spatialvlm.data.media.video import natural_key
from spatialvlm.data.sample import MediaRef
from spatialvlm.errors import ConfigError, DataError, MediaError

if TYPE_CHECKING:
    import numpy.typing as npt

_BLOCK = 1 << 20
_AMPLIFICATION_AFTER, _MAX_AMPLIFICATION = 1000, 4.0
_LOG = logging.getLogger(__name__)


class RawRow(NamedTuple):
    """One row and its address."""

    row: int
    """Number inside the file, from 0; of JSON lines, the line number less one."""
    offset: int
    length: int
    value: Any
    """The parsed row, or the :class:`DataError` that it is."""


class Container:
    """Rows of one file."""

    path: Path

    def scan(self) -> Iterator[RawRow]:
        """All rows in file order."""
        raise NotImplementedError

    def read(self, row: int, offset: int, length: int) -> Any:
        """One row at an address that :meth:`scan` gave.

        Raises:
            DataError: ``bad_json``.
        """
        raise NotImplementedError

    def media_bytes(self, ref: MediaRef) -> list[bytes]:
        """Embedded bytes of one medium: one entry, or one per frame.

        Raises:
            MediaError: ``bad_cell`` or ``missing``.
        """
        raise MediaError(
            f"{self.path} holds no media, asked for {ref.member!r}.", reason="bad_cell"
        )


def parse_json(data: bytes, path: Path, line: Callable[[], int]) -> Any:
    """Parse one row, or say where it is broken."""
    try:
        return json.loads(data.decode())
    except json.JSONDecodeError as error:
        around = error.doc[max(0, error.pos - 40) : error.pos + 40]
        raise DataError(
            f"{path.name}:{line() + error.lineno - 1} column {error.colno}: {error.msg}, near {around!r}.",
            reason="bad_json",
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path.name}:{line()}: {type(error).__name__}: {str(error)[:80]}.", reason="bad_json"
        ) from error


def _value_or_error(parse: Callable[[], Any]) -> Any:
    try:
        return parse()
    except DataError as error:
        return error


class JsonLines(Container):
    """One JSON value per line; blank lines are skipped."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def scan(self, start: int = 0, stop: int | None = None, row: int = 0) -> Iterator[RawRow]:
        """All rows, or those whose line starts in ``[start, stop)`` bytes, ``row`` being the first."""
        with self.path.open("rb") as file:
            file.seek(start)
            offset = start
            if offset == 0 and file.read(3) != b"\xef\xbb\xbf":
                file.seek(0)
            offset = file.tell()
            for number, line in enumerate(file, start=row):
                if stop is not None and offset >= stop:
                    return
                if not line.isspace():
                    try:
                        value = self._parse(line, number)
                    except DataError as error:
                        value = error
                    yield RawRow(number, offset, len(line), value)
                offset += len(line)

    def read(self, row: int, offset: int, length: int) -> Any:
        """One row at the address that :meth:`scan` gave."""
        with self.path.open("rb") as file:
            file.seek(offset)
            return self._parse(file.read(length), row)

    def ranges(self, parts: int) -> list[tuple[int, int, int]]:
        """The file cut at line starts: (start byte, stop byte, first line number) per part."""
        size = self.path.stat().st_size
        cuts, rows = [0], [0]
        lines = position = 0
        with self.path.open("rb") as file:
            while block := file.read(16 * _BLOCK):
                target = size * len(cuts) // parts
                while len(cuts) < parts and position <= target < position + len(block):
                    line_end = block.find(b"\n", target - position)
                    if line_end < 0:
                        break
                    cuts.append(position + line_end + 1)
                    rows.append(lines + block.count(b"\n", 0, line_end + 1))
                    target = size * len(cuts) // parts
                lines += block.count(b"\n")
                position += len(block)
        return list(zip(cuts, [*cuts[1:], size], rows, strict=True))

    def _parse(self, data: bytes, row: int) -> Any:
        return parse_json(data, self.path, lambda: row + 1)


class JsonArray(Container):
    """A JSON array; its elements' byte ranges are found by brackets and strings, block by block."""

    _TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|["\[\]{},]', re.DOTALL)

    def __init__(self, path: Path) -> None:
        self.path = path

    def scan(self) -> Iterator[RawRow]:
        """All rows in file order."""
        for number, (offset, data) in enumerate(self._elements()):
            value = _value_or_error(partial(self._parse, data, offset))
            yield RawRow(number, offset, len(data), value)

    def read(self, row: int, offset: int, length: int) -> Any:
        """One row at the address that :meth:`scan` gave."""
        del row
        with self.path.open("rb") as file:
            file.seek(offset)
            return self._parse(file.read(length), offset)

    def _elements(self) -> Iterator[tuple[int, bytes]]:
        """Byte offset and bytes of every element, without the white space around it."""
        depth, base, begin = 0, 0, 0
        buffer, position, ended = b"", 0, False
        with self.path.open("rb") as file:
            while not ended:
                block = file.read(_BLOCK)
                buffer += block
                for token in self._TOKEN.finditer(buffer, position):
                    char = buffer[token.start()]
                    if char == 0x22 and token.end() - token.start() == 1:
                        break  # a string that the next block ends
                    position = token.end()
                    if char in b"[{":
                        depth += 1
                        if depth == 1:
                            begin = position
                    elif char in b"]}":
                        depth -= 1
                    if (depth == 1 and char == 0x2C) or depth == 0:
                        element = buffer[begin : token.start()].lstrip()
                        if element:
                            yield base + token.start() - len(element), element.rstrip()
                        begin = position
                    if depth == 0:
                        ended = True
                        break
                if not block and not ended:
                    raise DataError(
                        f"{self.path} ends inside the row at line {self._line(base + begin)}: the array "
                        "is cut off or a quote is missing, so later rows cannot be found. Repair the file.",
                        reason="bad_json",
                    )
                buffer, base, position, begin = buffer[begin:], base + begin, position - begin, 0
            rest = (buffer + file.read(_BLOCK)).strip()
            if rest:
                raise DataError(
                    f"{self.path} goes on after its array, near line {self._line(base)}: {rest[:40]!r}. "
                    "Join the arrays or split the file.",
                    reason="bad_json",
                )

    def _parse(self, data: bytes, offset: int) -> Any:
        return parse_json(data, self.path, partial(self._line, offset))

    def _line(self, offset: int) -> int:
        count, left = 1, offset
        with self.path.open("rb") as file:
            while left and (block := file.read(min(_BLOCK, left))):
                count += block.count(b"\n")
                left -= len(block)
        return count


class JoinedRows(Container):
    """Rows held in memory, for small sets whose rows are joined from several files."""

    def __init__(self, path: Path, rows: list[dict[str, Any]]) -> None:
        self.path = path
        self._rows = rows

    def scan(self) -> Iterator[RawRow]:
        """All rows in file order."""
        for number, value in enumerate(self._rows):
            yield RawRow(number, number, 0, value)

    def read(self, row: int, offset: int, length: int) -> Any:
        """One row at the address that :meth:`scan` gave."""
        del offset, length
        return self._rows[row]


class ArrowRows(Container):
    """Rows of a memory-mapped Arrow file, or of a parquet file read by row groups.

    Args:
        path: An Arrow IPC file or stream, or a parquet file.
        groups_open: Batches (Arrow) or row groups (parquet) kept at a time.
    """

    def __init__(self, path: Path, groups_open: int = 4) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path = path
        self._open: OrderedDict[int, tuple[Any, Any]] = OrderedDict()
        self._groups_open = groups_open
        self._decodes = False
        self.rows_read = self.rows_decoded = 0
        try:
            if path.suffix == ".parquet":
                file = pq.ParquetFile(path, memory_map=True)
                sizes = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
                self._load: Callable[[int], Any] = lambda g: _one_batch(file.read_row_group(g))
                self._decodes = True
            else:
                source = pa.memory_map(str(path))
                try:
                    reader = pa.ipc.open_file(source)
                    sizes = [reader.get_batch(b).num_rows for b in range(reader.num_record_batches)]
                    self._load = reader.get_batch
                except pa.ArrowInvalid:
                    batches = pa.ipc.open_stream(source).read_all().to_batches()
                    sizes = [batch.num_rows for batch in batches]
                    self._load = batches.__getitem__
        except (pa.ArrowInvalid, OSError) as error:
            raise ConfigError(f"{path} is not a readable Arrow or parquet file: {error}") from error
        self._starts = [0]
        for size in sizes:
            self._starts.append(self._starts[-1] + size)

    def __len__(self) -> int:
        return self._starts[-1]

    def scan(self) -> Iterator[RawRow]:
        """All rows in file order."""
        number = 0
        for group in range(len(self._starts) - 1):
            for value in self._group(group)[1].to_pylist():
                yield RawRow(number, number, 0, value)
                number += 1

    def read(self, row: int, offset: int, length: int) -> Any:
        """One row at the address that :meth:`scan` gave."""
        del offset, length
        group, index = self._find(row)
        self.rows_read += 1
        if self.rows_read == _AMPLIFICATION_AFTER and self.read_amplification > _MAX_AMPLIFICATION:
            _LOG.warning(
                "%s: %.1f rows are decoded for every row that is read; set access: arrow for this source",
                self.path,
                self.read_amplification,
            )
        return self._group(group)[1].slice(index, 1).to_pylist()[0]

    def media_bytes(self, ref: MediaRef) -> list[bytes]:
        """Embedded bytes of one medium: one entry, or one per frame."""
        return [self._cell(member) for member in ref.member.split("\n")]

    def _cell(self, member: str) -> bytes:
        try:
            row, field, item = member.split("/")
            group, index = self._find(int(row))
            scalar = self._group(group)[0].column(field)[index]
            if int(item) >= 0 and scalar.is_valid:
                scalar = scalar.values[int(item)]
            value = scalar.as_py()
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise MediaError(
                f"{self.path.name} has no cell {member!r}: {error}", reason="bad_cell"
            ) from error
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes) or not data:
            raise MediaError(
                f"{self.path.name}: the cell {member} holds no bytes.", reason="bad_cell"
            )
        return data

    @property
    def read_amplification(self) -> float:
        """Rows of parquet that were decoded per row that was asked for."""
        return self.rows_decoded / max(1, self.rows_read)

    @property
    def group_starts(self) -> tuple[int, ...]:
        """First row of every batch or row group, and the number of rows."""
        return tuple(self._starts)

    def _find(self, row: int) -> tuple[int, int]:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        group = bisect.bisect_right(self._starts, row) - 1
        return group, row - self._starts[group]

    def _group(self, group: int) -> tuple[Any, Any]:
        """A batch and the same batch without media bytes."""
        if group in self._open:
            self._open.move_to_end(group)
            return self._open[group]
        batch = self._load(group)
        self.rows_decoded += batch.num_rows if self._decodes else 0
        self._open[group] = batch, _without_bytes(batch)
        if len(self._open) > self._groups_open:
            self._open.popitem(last=False)
        return self._open[group]


def _one_batch(table: Any) -> Any:
    import pyarrow as pa

    batches = table.combine_chunks().to_batches()
    return batches[0] if batches else pa.RecordBatch.from_pylist([], schema=table.schema)


def _without_bytes(batch: Any) -> Any:
    import pyarrow as pa

    columns = [_strip(column) for column in batch.columns]
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _strip(array: Any) -> Any:
    """The same array with every binary value replaced by whether it is there."""
    import pyarrow as pa

    kind = array.type
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return array.is_valid()
    if pa.types.is_struct(kind) and _holds_bytes(kind):
        children = [_strip(array.field(i)) for i in range(kind.num_fields)]
        return pa.StructArray.from_arrays(children, [f.name for f in kind], mask=array.is_null())
    if (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and _holds_bytes(kind):
        build = pa.ListArray if pa.types.is_list(kind) else pa.LargeListArray
        return build.from_arrays(array.offsets, _strip(array.values), mask=array.is_null())
    return array


def _holds_bytes(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return True
    return any(_holds_bytes(kind.field(i).type) for i in range(kind.num_fields))


def parquet_to_arrow(source: Path, target: Path) -> None:
    """Write a parquet file as a memory-mappable Arrow file, once.

    Raises:
        DataError: The disk is too small.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = pq.ParquetFile(source, memory_map=True)
    groups = [file.metadata.row_group(g) for g in range(file.num_row_groups)]
    need = sum(group.total_byte_size for group in groups)
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if need > 0.95 * free:
        raise DataError(
            f"{source} needs {need / 1e9:.1f} GB as Arrow, {target.parent} has {free / 1e9:.1f} GB free. "
            "Point data.index_dir to a larger disk, or set access: row_group for this source."
        )
    _LOG.info("converting %s to %s, %.2f GB, once", source, target, need / 1e9)
    unfinished = target.with_suffix(".partial")
    try:
        with (
            pa.OSFile(str(unfinished), "wb") as sink,
            pa.ipc.new_file(sink, file.schema_arrow) as out,
        ):
            for batch in file.iter_batches(batch_size=256):
                out.write_batch(batch)
        unfinished.replace(target)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise DataError(f"cannot write {target}: {error}") from error


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
            yield RawRow(number, offset, length, _value_or_error(partial(self._row, key)))

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
