"""Rows of Arrow and parquet files, without the bytes of embedded media until these are asked for."""

from __future__ import annotations

import bisect
import logging
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spatialvlm.data.containers import Container, RawRow
from spatialvlm.data.sample import MediaRef
from spatialvlm.errors import ConfigError, DataError, MediaError

_AMPLIFICATION_AFTER, _MAX_AMPLIFICATION = 1000, 4.0
_LOG = logging.getLogger(__name__)


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
        self._checked: set[int] = set()
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
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
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
        with _damage_explained(self.path):
            batch = self._load(group)
            if group not in self._checked and not self._decodes:
                batch.validate(full=True)  # reading a damaged batch would end the process
                self._checked.add(group)
        self.rows_decoded += batch.num_rows if self._decodes else 0
        self._open[group] = batch, _without_bytes(batch)
        if len(self._open) > self._groups_open:
            self._open.popitem(last=False)
        return self._open[group]


@contextmanager
def _damage_explained(path: Path) -> Iterator[None]:
    """What pyarrow says about damaged data, with the name of the file."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} is damaged: {str(error).strip()}. Fetch or write it again."
        ) from error


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
        ConfigError: The file is damaged, or no parquet file.
        DataError: A page is damaged, or the disk is too small.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(source, memory_map=True)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source} is not a readable parquet file: {error}") from error
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
            for batch in _batches(file, source):
                out.write_batch(batch)
        unfinished.replace(target)
    except OSError as error:
        raise DataError(f"cannot write {target}: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def _batches(file: Any, path: Path) -> Iterator[Any]:
    with _damage_explained(path):
        yield from file.iter_batches(batch_size=256)
