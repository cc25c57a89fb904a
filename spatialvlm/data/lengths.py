"""Sizes of rows, measured from headers and token counts, kept per source and cached on disk.

The cache key covers tokenizer, template, layout, media policy and over-long policy, and lies inside the
folder of the row table, whose key covers the files. The mixture is no part of it.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import multiprocessing
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spatialvlm.data.faults import LOAD_REASONS
from spatialvlm.data.index import FLAG_VARIABLE
from spatialvlm.data.prepare import SampleEncoder
from spatialvlm.data.sample import LENGTH_DTYPE, count_notes
from spatialvlm.errors import BudgetError, DataError

if TYPE_CHECKING:
    import numpy.typing as npt

    from spatialvlm.data.sample import DrawArray, LengthArray

logger = logging.getLogger(__name__)

_VERSION = 2
_CHUNK = 2048
"""Rows measured at a time by a process."""


class LengthTable:
    """Sizes of all rows of all sources.

    Attributes:
        records: Per source, ``[rows]`` of ``LENGTH_DTYPE``; 0 tokens = not measured or not usable.
        reasons: Per source, uint8 ``[rows]``: 0 = fine or not measured, else 1 + index into ``LOAD_REASONS``.
        messages: Source and row -> why it cannot be used.
    """

    def __init__(self, encoder: SampleEncoder) -> None:
        self.encoder = encoder
        self.records: list[LengthArray] = []
        self.reasons: list[npt.NDArray[np.uint8]] = []
        self.messages: dict[tuple[int, int], str] = {}
        self._changed: set[int] = set()
        for source in range(len(encoder.indices)):
            records, reasons = self._load(source)
            self.records.append(records)
            self.reasons.append(reasons)

    def unmeasured(self, source: int) -> int:
        """Number of eligible rows whose size is not known."""
        known = (self.records[source]["tokens"] > 0) | (self.reasons[source] > 0)
        return int(np.sum(~known & self.encoder.indices[source].eligible()))

    def complete(self, source: int) -> bool:
        """Every eligible row of a source is measured."""
        return self.unmeasured(source) == 0

    def measure(self, source: int, rows: Sequence[int] | npt.NDArray[np.int64]) -> None:
        """Measure rows that are not measured yet."""
        records, reasons = self.records[source], self.reasons[source]
        for row in rows:
            if records["tokens"][row] or reasons[row]:
                continue
            self._changed.add(source)
            try:
                records[row] = self.encoder.measure(source, int(row))
            except DataError as error:
                if error.reason not in LOAD_REASONS:
                    raise
                reasons[row] = 1 + LOAD_REASONS.index(error.reason)
                self.messages[source, int(row)] = str(error)

    def measure_all(self, source: int, workers: int = 1) -> None:
        """Measure every eligible row of a source and write the cache.

        One process per host does it, others wait and read the result.

        Args:
            source: Its number.
            workers: Processes.
        """
        if self.complete(source):
            return
        lock = self._folder(source).with_suffix(".lock")
        with lock.open("w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            self.records[source], self.reasons[source] = self._load(source)
            if self.complete(source):
                return
            rows = np.flatnonzero(self.encoder.indices[source].eligible())
            if workers > 1 and len(rows) > _CHUNK:
                self._measure_in_parallel(source, rows, workers)
            else:
                self.measure(source, rows)
            self._save(source)
            self._changed.discard(source)

    def _measure_in_parallel(self, source: int, rows: npt.NDArray[np.int64], workers: int) -> None:
        chunks = [rows[at : at + _CHUNK] for at in range(0, len(rows), _CHUNK)]
        context = multiprocessing.get_context("forkserver")
        with context.Pool(workers, _start_measuring, (self.encoder, source)) as pool:
            for chunk, (records, reasons) in zip(
                chunks, pool.imap(_measure_chunk, chunks), strict=True
            ):
                self.records[source][chunk] = records
                self.reasons[source][chunk] = reasons

    def save(self) -> None:
        """Write what was measured since the start, so that the next run need not measure it again."""
        for source in self._changed:
            try:
                self._save(source)
            except DataError as error:
                logger.warning("%s The next run measures them again.", error)
        self._changed.clear()

    def usable(self, source: int) -> npt.NDArray[np.bool_]:
        """Rows that can be trained on, as far as measured."""
        usable: npt.NDArray[np.bool_] = self.encoder.indices[source].eligible() & (
            self.reasons[source] == 0
        )
        return usable

    def lookup(self, draws: DrawArray) -> LengthArray:
        """One record per draw; rows are measured as needed."""
        out = np.zeros(len(draws), LENGTH_DTYPE)
        for source in np.unique(draws["source"]):
            mine = draws["source"] == source
            rows = draws["row"][mine]
            self.measure(int(source), rows)
            out[mine] = self.records[source][rows]
        for at in np.flatnonzero(draws["epoch"] > 0):
            draw = draws[at]
            if self._varies(int(draw["source"]), int(draw["row"])):
                out[at] = self._measure_again(draw, out[at])
        return out

    def _varies(self, source: int, row: int) -> bool:
        """Whether a row reads differently in another epoch."""
        index = self.encoder.indices[source]
        if index.source.attrs.answers != "cycle" and self.encoder.expand_format is None:
            return False
        return bool(index.column("flags")[row] & FLAG_VARIABLE)

    def _measure_again(self, draw: npt.NDArray[np.void], first: npt.NDArray[np.void]) -> Any:
        """Sizes in the draw's epoch; those of the first one when it cannot be used, and is replaced later."""
        try:
            return self.encoder.measure(int(draw["source"]), int(draw["row"]), int(draw["epoch"]))
        except DataError as error:
            if error.reason not in LOAD_REASONS:
                raise
            return first

    def rejected(self, source: int) -> dict[str, int]:
        """Unusable rows per reason."""
        counts = Counter(self.reasons[source][self.reasons[source] > 0].tolist())
        return {LOAD_REASONS[code - 1]: n for code, n in sorted(counts.items())}

    def check(self, source: int, *, max_bad: float, max_overlong: float) -> list[str]:
        """Judge what measuring all rows of a source found.

        Args:
            source: Its number.
            max_bad: Tolerated share of rows whose media cannot be used, judged from 20 rows or 20 % on.
            max_overlong: Tolerated share of rows that are too long.

        Returns:
            Lines about rows that are left out or were shortened; empty when there are none.

        Raises:
            BudgetError: Too many; names reasons and first messages, or the lengths.
        """
        found, rows = self.rejected(source), int(self.encoder.indices[source].eligible().sum())
        name = self.encoder.indices[source].source.name
        overlong = found.pop("overlong", 0)
        bad = sum(found.values())
        notes = []
        if bad:
            details = "; ".join(f"{reason} {count}" for reason, count in found.items())
            text = f"source {name}: {bad} of {rows} rows cannot be used: {details} (first: {self._first(source, found)})"
            if bad > max_bad * rows and (bad >= 20 or bad >= 0.2 * rows):
                raise BudgetError(f"{text}. Repair them, or raise max_bad_fraction {max_bad}")
            notes.append(f"{text}; left out")
        if overlong > max_overlong * rows:
            tokens = self.records[source]["tokens"]
            kept = (
                np.quantile(tokens[tokens > 0], [0.5, 0.95, 1.0]) if np.any(tokens) else [0, 0, 0]
            )
            raise BudgetError(
                f"source {name}: {overlong} of {rows} rows are overlong (more than "
                f"packing.max_length={self.encoder.overlong.max_length} tokens), the share allowed by "
                f"max_rejected_fraction is {max_overlong}. Rows that fit have median {kept[0]:.0f}, 95 % {kept[1]:.0f}, "
                f"largest {kept[2]:.0f}; first that does not: {self._first(source, ['overlong'])}"
            )
        if overlong:
            notes.append(
                f"source {name}: {overlong} of {rows} rows have more than packing.max_length="
                f"{self.encoder.overlong.max_length} tokens; left out"
            )
        shortened, removed = self.shortened(source)
        if shortened:
            details = ", ".join(f"{what} {count}" for what, count in shortened.items())
            notes.append(
                f"source {name}: data.overlong shortened rows ({details}; {removed} tokens removed)"
            )
        return notes

    def shortened(self, source: int) -> tuple[dict[str, int], int]:
        """Rows that the over-long policy shortened, by what it dropped, and tokens removed; as far as measured."""
        notes = count_notes(self.records[source]["notes"])
        dropped = {name: count for name, count in notes.items() if name.endswith("_dropped")}
        return dropped, int(self.records[source]["tokens_removed"].sum())

    def _first(self, source: int, reasons: Iterable[str]) -> str:
        codes = {1 + LOAD_REASONS.index(reason) for reason in reasons}
        rows = np.flatnonzero(np.isin(self.reasons[source], list(codes)))
        index, row = self.encoder.indices[source], int(rows[0])
        place = index.source.place(int(index.column("file")[row]), int(index.column("row")[row]))
        return f"{place}: {self.message(source, row)}"

    def message(self, source: int, row: int) -> str:
        """Why a row cannot be used."""
        if (source, row) not in self.messages:  # known from the cache on disk
            try:
                self.encoder.measure(source, row)
            except DataError as error:
                self.messages[source, row] = str(error)
        return self.messages.get((source, row), "usable now; delete the index folder")

    def _folder(self, source: int) -> Path:
        encoder = self.encoder
        what = (
            _VERSION,
            encoder.template.fingerprint,
            encoder.layout,
            encoder.media[source].policy,
            encoder.overlong,
            encoder.train_on,
            encoder.coords,
            getattr(encoder.expand_format, "__qualname__", repr(encoder.expand_format)),
        )
        key = hashlib.blake2b(repr(what).encode(), digest_size=8).hexdigest()
        return encoder.indices[source].folder / f"lengths-{key}"

    def _load(self, source: int) -> tuple[LengthArray, npt.NDArray[np.uint8]]:
        """Both arrays, memory-mapped and private to this process; zeros without a cache."""
        folder, rows = self._folder(source), len(self.encoder.indices[source])
        if (folder / "records.npy").is_file():
            records = np.load(folder / "records.npy", mmap_mode="c")
            return records, np.load(folder / "reasons.npy", mmap_mode="c")
        return np.zeros(rows, LENGTH_DTYPE), np.zeros(rows, np.uint8)

    def _save(self, source: int) -> None:
        # Media that cannot be read today may be repaired tomorrow; only lengths are remembered.
        overlong = 1 + LOAD_REASONS.index("overlong")
        reasons = np.where(self.reasons[source] == overlong, overlong, 0).astype(np.uint8)
        folder = self._folder(source)
        try:
            folder.mkdir(exist_ok=True)
            for name, values in (("reasons", reasons), ("records", self.records[source])):
                partial = folder / f"{name}.partial.npy"
                np.save(partial, values)
                partial.replace(folder / f"{name}.npy")
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise DataError(
                f"cannot write the lengths of {self.encoder.indices[source].source.name} to {folder}: {error}. Free "
                "space or point data.index_dir elsewhere; nothing was left behind."
            ) from error


_measured: list[tuple[LengthTable, int]] = []
"""Table and source of a measuring process."""


def _start_measuring(encoder: SampleEncoder, source: int) -> None:
    _measured[:] = [(LengthTable(encoder), source)]


def _measure_chunk(
    rows: npt.NDArray[np.int64],
) -> tuple[LengthArray, npt.NDArray[np.uint8]]:
    table, source = _measured[0]
    table.measure(source, rows)
    return table.records[source][rows], table.reasons[source][rows]
