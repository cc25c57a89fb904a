"""Rows on the same media become units, units of one size a lane: what the order draws from.

Rows of one source with equal prefix keys are cut into units of B, B/2, ..., 1 rows. A lane holds the units
of one size, in file order, and shuffles them anew each epoch. Large sources keep their units on disk,
memory-mapped, so that opening a mixture of millions of rows takes milliseconds.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from spatialvlm.data.order import permute, permute_array, round_keys
from spatialvlm.errors import DataError

if TYPE_CHECKING:
    import numpy.typing as npt

    from spatialvlm.typing import IntArray

_ROWS_AT_ONCE = 1 << 20
"""Rows that are grouped together, to bound the memory of large sources."""


@dataclass(frozen=True)
class SourceRows:
    """What the order needs to know of one source. Arrays have one entry per row of its table."""

    name: str
    family: str
    prefix_key: npt.NDArray[np.uint64]
    """Rows with equal keys share media; 0 = drawn singly."""
    eligible: npt.NDArray[np.bool_]
    content_key: str = ""
    """Identity of the rows, part of the order's fingerprint."""
    weight: float | None = None
    """Share inside the family; None = eligible rows times ``repeat``."""
    repeat: float = 1.0
    fraction: float = 1.0
    max_samples: int | None = None
    capability: npt.NDArray[np.int16] | None = None
    capabilities: tuple[str, ...] = ()
    mean_tokens: float | None = None
    """Mean tokens of the eligible rows; needed for ``unit: tokens``."""
    difficulty: npt.NDArray[np.float32] | None = None
    """Key of the curriculum, small = early; NaN = unknown."""
    row_group: IntArray | None = None
    """Part of the file a row is decoded with; parts are shuffled whole, rows inside them. None = no parts."""
    cache_dir: Path | None = None
    """Where units are kept between runs, memory-mapped; None = in memory."""


class UnitRows:
    """Rows of all units of a lane, ``[units, size]``; memory-mapped, and pickled by path, if from a file.

    Args:
        source: The array, or the ``.npy`` file that holds it.
    """

    def __init__(self, source: IntArray | Path) -> None:
        self._source = source

    @functools.cached_property
    def array(self) -> IntArray:
        """Integers ``[units, size]``."""
        if isinstance(self._source, Path):
            mapped: IntArray = np.load(self._source, mmap_mode="r")
            return mapped
        return self._source

    def __getstate__(self) -> dict[str, Any]:
        return {"_source": self._source}


@dataclass(frozen=True, slots=True)
class Lane:
    """All units of one size of one source (and capability), in file order."""

    source: int
    capability: str | None
    size: int
    """Rows per unit."""
    num_units: int
    units: UnitRows
    stream: str
    """Name of its shuffle."""
    buckets: tuple[int, ...]
    """First unit of every bucket, and the number of units: one bucket, those of the curriculum, or one
    per row group."""
    bucket_order: Literal["fixed", "shuffled"] = "fixed"
    """Curriculum buckets are drawn in order, row groups in another order each epoch."""

    @property
    def rows(self) -> IntArray:
        """Integers ``[units, size]``: rows of the source's table."""
        return self.units.array

    def shuffled_one(self, index: int, seed: int, epoch: int) -> int:
        """Unit at a place of an epoch: bucket after bucket, shuffled inside."""
        if len(self.buckets) == 2:
            return permute(index, self.num_units, _keys(seed, self.stream, epoch))
        return int(self.shuffled(np.array([index]), seed, epoch)[0])

    def shuffled(self, index: IntArray, seed: int, epoch: int) -> IntArray:
        """:meth:`shuffled_one` of many places, int64 ``[n]``."""
        if len(self.buckets) == 2:
            return permute_array(index, self.num_units, _keys(seed, self.stream, epoch))
        order, begins = _bucket_places(
            self.buckets, self.bucket_order == "shuffled", seed, self.stream, epoch
        )
        out = np.empty(len(index), np.int64)
        place = np.searchsorted(begins, index, side="right") - 1
        for at in np.unique(place):
            mine, bucket = place == at, int(order[at])
            start, stop = self.buckets[bucket], self.buckets[bucket + 1]
            keys = _keys(seed, f"{self.stream}/bucket{bucket}", epoch)
            out[mine] = start + permute_array(index[mine] - begins[at], stop - start, keys)
        return out


@functools.lru_cache(maxsize=4096)
def _keys(seed: int, stream: str, epoch: int) -> tuple[int, ...]:
    return round_keys(seed, stream, epoch)


@functools.lru_cache(maxsize=256)
def _bucket_places(
    buckets: tuple[int, ...], shuffled: bool, seed: int, stream: str, epoch: int
) -> tuple[IntArray, IntArray]:
    """Buckets in the order of an epoch: their numbers, and where each begins in the epoch."""
    sizes = np.diff(buckets)
    order = np.arange(len(sizes))
    if shuffled:
        order = permute_array(order, len(sizes), _keys(seed, f"{stream}/groups", epoch))
    return order, np.cumsum(sizes[order]) - sizes[order]


def cut_units(prefix_key: npt.NDArray[np.uint64], rows: IntArray, size: int) -> dict[int, IntArray]:
    """Cut rows with equal keys into units of ``size``, ``size / 2``, ..., 1 rows.

    Args:
        prefix_key: ``[rows of the table]``; 0 = alone.
        rows: int64 ``[n]``, ascending: the rows to cut.
        size: Largest unit, a power of two.

    Returns:
        Unit size -> int64 ``[units, size]``, in file order. Thirteen rows at ``size`` 8 give 8 + 4 + 1.
    """
    keys = prefix_key[rows]
    single = keys == 0 if size > 1 else np.ones(len(rows), np.bool_)
    found: dict[int, list[IntArray]] = {1: [rows[single][:, None]]}
    parts = 1 + len(rows) // _ROWS_AT_ONCE
    for part in range(parts):
        mine = np.flatnonzero(~single & (keys % np.uint64(parts) == part))
        for k, pieces in _cut_groups(rows[mine], keys[mine], size):
            found.setdefault(k, []).append(pieces)
    units: dict[int, IntArray] = {}
    for k, pieces_of_k in found.items():
        joined = np.concatenate(pieces_of_k)
        if len(joined):
            units[k] = joined[np.argsort(joined[:, 0], kind="stable")]
    return units


def _cut_groups(
    rows: IntArray, keys: npt.NDArray[np.uint64], size: int
) -> Iterator[tuple[int, IntArray]]:
    """Pieces ``[n, k]`` of rows with equal keys, for k = ``size``, ``size / 2``, ..., 1."""
    if not len(rows):
        return
    order = np.argsort(keys, kind="stable")
    rows, keys = rows[order], keys[order]
    starts = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]])
    counts = np.diff(np.r_[starts, len(rows)])
    rank = np.arange(len(rows)) - np.repeat(starts, counts)
    total = np.repeat(counts, counts)
    done = np.zeros(len(rows), np.int64)  # rows of the group in larger pieces
    k = size
    while k:
        pieces = (total - done) // k
        inside = (rank >= done) & (rank < done + pieces * k)
        yield k, rows[inside].reshape(-1, k)
        done += pieces * k
        k //= 2


class Units(NamedTuple):
    """Units of one size, before they have a place in the mixture."""

    size: int
    num_units: int
    buckets: tuple[int, ...]
    unknown: int
    rows: IntArray | Path


def build_units(
    source: SourceRows, capability: str | None, seed: int, branches: int, buckets: int
) -> list[Units]:
    """Units of a source (and capability), largest first; from the cache when there is one."""
    if source.cache_dir is None:
        return _cut(source, capability, seed, branches, buckets)
    parts = [
        source.content_key,
        mask_digest(source.eligible),
        source.fraction,
        source.max_samples,
        capability,
    ]
    parts += [branches, buckets, seed if num_chosen(source) < source.eligible.sum() else None]
    if source.row_group is not None:
        parts.append("row groups")
    if buckets and source.difficulty is not None:
        parts.append(hashlib.blake2b(np.asarray(source.difficulty).tobytes()).hexdigest())
    folder = source.cache_dir / f"units-{digest(parts)}"
    info = folder / "info.json"
    if not info.is_file():
        partial = folder.with_suffix(f".{os.getpid()}")
        try:
            partial.mkdir(parents=True, exist_ok=True)
            units = _cut(source, capability, seed, branches, buckets)
            small = len(source.eligible) < 2**31
            for unit in units:
                assert not isinstance(unit.rows, Path), "cut in memory"
                rows = unit.rows.astype(np.int32) if small else unit.rows
                np.save(partial / f"{unit.size}.npy", rows)
            table = [unit._replace(rows=f"{unit.size}.npy") for unit in units]  # type: ignore[arg-type]
            (partial / "info.json").write_text(json.dumps(table))
            if not folder.exists():
                partial.replace(folder)
        except OSError as error:
            if not info.is_file():  # another rank may have been first
                raise DataError(f"cannot write {folder}: {error}") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return [
        Units(size, num, tuple(starts), unknown, folder / name)
        for size, num, starts, unknown, name in json.loads(info.read_text())
    ]


def _cut(
    source: SourceRows, capability: str | None, seed: int, branches: int, buckets: int
) -> list[Units]:
    rows = _chosen_rows(source, seed)
    if capability is not None:
        assert source.capability is not None, "checked by the caller"
        rows = rows[source.capability[rows] == source.capabilities.index(capability)]
    cut = cut_units(source.prefix_key, rows, branches)
    found = []
    for size in sorted(cut, reverse=True):
        table: IntArray = cut[size]
        starts: tuple[int, ...] = (0, len(table))
        unknown = 0
        if buckets:
            table, starts, unknown = _by_difficulty(table, source.difficulty, buckets)
        elif source.row_group is not None:
            groups = np.asarray(source.row_group)[table[:, 0]]
            starts = (0, *(np.flatnonzero(np.diff(groups)) + 1).tolist(), len(table))
        found.append(Units(size, len(table), starts, unknown, table))
    return found


def mask_digest(mask: npt.NDArray[np.bool_]) -> str:
    """Identity of a set of rows."""
    return hashlib.blake2b(np.packbits(mask).tobytes(), digest_size=12).hexdigest()


def _by_difficulty(
    units: IntArray, difficulty: npt.NDArray[np.float32] | None, buckets: int
) -> tuple[IntArray, tuple[int, ...], int]:
    """Units sorted into quantile buckets of their mean key, file order inside; bucket borders; unknown."""
    keys = np.full(len(units), np.nan)
    if difficulty is not None:
        keys = np.asarray(difficulty, np.float64)[units].mean(axis=1)
    known = np.flatnonzero(~np.isnan(keys))
    bucket = np.full(len(units), buckets // 2)
    ranked = known[np.argsort(keys[known], kind="stable")]
    bucket[ranked] = np.arange(len(ranked)) * buckets // max(1, len(ranked))
    order = np.argsort(bucket, kind="stable")
    starts = np.searchsorted(bucket[order], np.arange(buckets + 1))
    return units[order], tuple(dict.fromkeys(starts.tolist())), len(units) - len(known)


def num_chosen(source: SourceRows) -> int:
    """Eligible rows after ``fraction`` and ``max_samples``."""
    rows = int(np.count_nonzero(source.eligible))
    keep = min(rows, max(1, round(source.fraction * rows)))
    return keep if source.max_samples is None else min(keep, source.max_samples)


def _chosen_rows(source: SourceRows, seed: int) -> IntArray:
    """Rows that are drawn, ascending: nested subsets for growing ``fraction``, spread over the files."""
    rows = np.flatnonzero(source.eligible)
    keep = num_chosen(source)
    if keep == len(rows):
        return rows
    keys = round_keys(seed, f"subset/{source.name}", 0)
    return np.sort(rows[permute_array(np.arange(keep), len(rows), keys)])


def digest(value: Any) -> str:
    """Identity of a JSON value."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
