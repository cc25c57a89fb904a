"""Sources, weights, and a seed -> the order of training, one draw per position.

Levels: position -> family -> slot of ``B`` draws -> [capability] -> source -> lane -> unit -> row. A
*lane* holds the units of one size of one source; rows on the same media are cut into units of B, B/2,
..., 1 rows, and a slot of lane k is filled by B / k units. So every position can be computed alone, rows
of one unit stand next to each other, and each row is drawn once per epoch of its lane.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from spatialvlm.data.order import SplitTree, permute, permute_array, round_keys
from spatialvlm.data.sample import DRAW_DTYPE, Draw, Shares
from spatialvlm.errors import ConfigError, DataError, StateError

if TYPE_CHECKING:
    import numpy.typing as npt

    from spatialvlm.data.sample import DrawArray
    from spatialvlm.typing import IntArray


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


_ROWS_AT_ONCE = 1 << 20
"""Rows that are grouped together, to bound the memory of large sources."""


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


@dataclass(frozen=True, slots=True)
class _Level:
    """One inner level of the order: a tree and what its leaves are (further levels, or lane numbers)."""

    tree: SplitTree
    children: tuple[_Level | int, ...]


def _level(children: Sequence[_Level | int], weights: Sequence[Fraction]) -> _Level | int:
    return children[0] if len(children) == 1 else _Level(SplitTree(weights), tuple(children))


class Mixture:
    """The order: position -> :class:`Draw`. Pure, picklable, and equal on every rank and worker.

    Args:
        sources: The sources; their order breaks ties.
        families: Weight of every family.
        seed: Seed of the order.
        branches: Largest unit, rounded down to a power of two; 1 = rows are drawn singly.
        unit: What the weights of families and sources count.
        capabilities: Weights of capabilities inside a family that has one of them; sources then share a
            capability in proportion to their rows of it.
        curriculum_buckets: Quantile buckets of ``difficulty`` that are consumed in order; 0 = shuffled.
        epochs: Length in epochs of the family ``of``; exclusive with ``samples``.
        of: Family whose rows define an epoch; None = ``spatial``, or the only family.
        samples: Length in samples.
        mode: Any text that must stay equal for a run to be resumed, e.g. how lengths are known.

    Raises:
        ConfigError: Weights, lengths, or sources do not fit together.
    """

    def __init__(
        self,
        sources: Sequence[SourceRows],
        families: Mapping[str, float],
        *,
        seed: int = 0,
        branches: int = 1,
        unit: Literal["samples", "tokens"] = "samples",
        capabilities: Mapping[str, float] | None = None,
        curriculum_buckets: int = 0,
        epochs: float | None = None,
        of: str | None = None,
        samples: int | None = None,
        mode: str = "",
    ) -> None:
        if branches < 1:
            raise ConfigError(f"max_branches must be at least 1, got {branches}.")
        self.seed = seed
        self.branches = 1 << (branches.bit_length() - 1)
        self.source_names = tuple(source.name for source in sources)
        self.warnings: list[str] = []
        """What the user should know about the order: sources without effect, rows never drawn."""
        self._capabilities = {k: v for k, v in (capabilities or {}).items() if v > 0}
        _check_weights("capabilities", capabilities or {})
        named = sorted({name for source in sources for name in source.capabilities})
        for name in self._capabilities:
            if name not in named:
                raise ConfigError(
                    f"data.capabilities.{name}: no row has it; the rows have {', '.join(named) or 'none'}."
                )
        for source in sources:
            _check_source(source, families)
        self.family_names = self._active_families(sources, families)
        self.drawn_rows = {source.name: _num_chosen(source) for source in sources}
        """Rows of every source that can be drawn, after ``fraction`` and ``max_samples``."""
        self.lanes: list[Lane] = []
        self._families = [
            self._family(name, sources, unit, curriculum_buckets) for name in self.family_names
        ]
        weights = [_fraction(families[name]) for name in self.family_names]
        if unit == "tokens":
            for n, level in enumerate(self._families):
                mean = self._average(level, lambda lane: _mean_tokens(sources[lane.source]))
                weights[n] /= Fraction(mean)
        self._tree = SplitTree(weights)
        self._family_of = tuple(source.family for source in sources)
        self._capability_ids = [source.capability for source in sources]
        self._capability_names = [source.capabilities for source in sources]
        self._epoch_rows = {
            name: sum(
                (
                    _fraction(s.repeat) * self.drawn_rows[s.name]
                    for s in sources
                    if s.family == name and s.repeat > 0 and s.weight != 0
                ),
                start=Fraction(0),
            )
            for name in self.family_names
        }
        self.length = self._length(epochs, of, samples)
        """Number of positions."""
        self.parts = {
            "sources": _digest([(s.name, s.family, s.content_key) for s in sources]),
            "eligible rows": _digest([_bits(s.eligible) for s in sources]),
            "mixture": _digest(
                [
                    sorted(families.items()),
                    [
                        (s.weight, s.repeat, s.fraction, s.max_samples, s.mean_tokens)
                        for s in sources
                    ],
                    sorted((capabilities or {}).items()),
                    unit,
                    curriculum_buckets,
                ]
            ),
            "seed": str(seed),
            "branches": str(self.branches),
            "mode": mode,
        }
        """Everything the order depends on, as hashes or values."""

    def __getstate__(self) -> dict[str, Any]:
        # columns of the row tables stay here: they serve `shares`, which workers have no use for
        return self.__dict__ | {"_capability_ids": [None] * len(self.source_names)}

    @property
    def fingerprint(self) -> str:
        """Identity of the order; a state of another order cannot be resumed."""
        return _digest(self.parts)

    def check_state(self, parts: Mapping[str, str]) -> None:
        """Compare with the parts of a saved order.

        Raises:
            StateError: Names what differs.
        """
        differ = [k for k in sorted(self.parts | dict(parts)) if self.parts.get(k) != parts.get(k)]
        if differ:
            raise StateError(
                f"the saved position belongs to another order; differing: {', '.join(differ)}. Restore "
                "them, or add data to run.resume_allow to continue in the new order."
            )

    def at(self, position: int) -> Draw:
        """The draw at a position; positions may go beyond :attr:`length`."""
        family, q = self._tree.at(position)
        slot, within = divmod(q, self.branches)
        levels = self._families[family]
        while isinstance(levels, _Level):
            child, slot = levels.tree.at(slot)
            levels = levels.children[child]
        lane = self.lanes[levels]
        number = slot * (self.branches // lane.size) + within // lane.size
        epoch, index = divmod(number, lane.num_units)
        unit = _shuffled(lane, index, self.seed, epoch)
        branch = within % lane.size
        row = int(lane.rows[unit, branch])
        return Draw(position, lane.source, row, epoch, unit, branch, levels)

    def draws(self, start: int, stop: int) -> DrawArray:
        """:meth:`at` of the positions ``[start, stop)``, as records of ``DRAW_DTYPE``."""
        out = np.zeros(stop - start, DRAW_DTYPE)
        out["position"] = np.arange(start, stop)
        family, q = self._tree.at_array(out["position"])
        slot, within = np.divmod(q, self.branches)
        lane_of = np.empty(len(out), np.int64)
        number = np.empty(len(out), np.int64)

        def walk(level: _Level | int, where: IntArray, slots: IntArray) -> None:
            if isinstance(level, int):
                lane_of[where], number[where] = level, slots
            elif len(where):
                child, inner = level.tree.at_array(slots)
                for c in np.unique(child):
                    mine = child == c
                    walk(level.children[c], where[mine], inner[mine])

        for f in np.unique(family):
            mine = np.flatnonzero(family == f)
            walk(self._families[f], mine, slot[mine])
        out["lane"] = lane_of
        for n in np.unique(lane_of):
            lane, mine = self.lanes[n], np.flatnonzero(lane_of == n)
            units = number[mine] * (self.branches // lane.size) + within[mine] // lane.size
            epoch, index = np.divmod(units, lane.num_units)
            unit = np.empty(len(mine), np.int64)
            for e in np.unique(epoch):
                same = epoch == e
                unit[same] = _shuffled_array(lane, index[same], self.seed, int(e))
            branch = within[mine] % lane.size
            out["source"][mine] = lane.source
            out["epoch"][mine] = epoch
            out["unit"][mine] = unit
            out["branch"][mine] = branch
            out["row"][mine] = lane.rows[unit, branch]
        return out

    def unit_rows(self, lane: int, unit: int) -> IntArray:
        """Rows of one unit, int64 ``[size]``."""
        return np.asarray(self.lanes[lane].rows[unit], np.int64)

    def shares(self, start: int, stop: int) -> Shares:
        """Realised sample counts by family, source and capability of ``[start, stop)``."""
        draws = self.draws(start, stop)
        counts: dict[str, int] = {}
        lanes, num = np.unique(draws["lane"], return_counts=True)
        for lane, n in zip(lanes, num, strict=True):
            source = self.lanes[lane].source
            for key in (f"family/{self._family_of[source]}", f"source/{self.source_names[source]}"):
                counts[key] = counts.get(key, 0) + int(n)
        for source in np.unique(draws["source"]):
            ids = self._capability_ids[source]
            if ids is None:
                continue
            rows = draws["row"][draws["source"] == source]
            for c, n in zip(*np.unique(ids[rows], return_counts=True), strict=True):
                if c >= 0:
                    key = f"capability/{self._capability_names[source][c]}"
                    counts[key] = counts.get(key, 0) + int(n)
        return Shares(samples=dict(sorted(counts.items())))

    def distinct_media(self, draws: int) -> float:
        """Expected number of distinct media among ``draws`` draws, if no medium is met twice.

        A row without media counts as one of its own.
        """
        shares = [weight / sum(self._tree.weights) for weight in self._tree.weights]
        return draws * sum(
            share * self._average(level, lambda lane: 1 / lane.size)
            for share, level in zip(shares, self._families, strict=True)
        )

    def epochs(self, position: int) -> dict[str, float]:
        """How often every source has been read before ``position``, in passes over its drawn rows."""
        draws = dict.fromkeys(self.source_names, 0)

        def walk(level: _Level | int, slots: int) -> None:
            if isinstance(level, int):
                draws[self.source_names[self.lanes[level].source]] += slots * self.branches
            else:
                for child, inner in zip(level.children, level.tree.counts(slots), strict=True):
                    walk(child, inner)

        for level, q in zip(self._families, self._tree.counts(position), strict=True):
            walk(level, q // self.branches)
        return {name: n / rows for name, n in draws.items() if (rows := self.drawn_rows[name])}

    def _average(self, level: _Level | int, value: Callable[[Lane], float]) -> float:
        """Mean of a lane's value over the draws of a level."""
        if isinstance(level, int):
            return value(self.lanes[level])
        weights = level.tree.weights
        return sum(
            weight / sum(weights) * self._average(child, value)
            for weight, child in zip(weights, level.children, strict=True)
        )

    def _active_families(
        self, sources: Sequence[SourceRows], families: Mapping[str, float]
    ) -> tuple[str, ...]:
        _check_weights("families", families)
        known = [name for name, weight in families.items() if weight > 0]
        if not known:
            raise ConfigError(f"data.families: all weights are 0: {dict(families)}.")
        off = [s.name for s in sources if families.get(s.family) == 0 or 0 in (s.weight, s.repeat)]
        if off:
            self.warnings.append(f"never drawn because their weight is 0: {', '.join(off)}")
        for name in known:
            if not any(s.family == name and s.weight != 0 and s.repeat for s in sources):
                raise ConfigError(
                    f"data.families.{name} has weight {families[name]} and no source."
                )
        return tuple(known)

    def _family(
        self, name: str, sources: Sequence[SourceRows], unit: str, buckets: int
    ) -> _Level | int:
        """Levels below one family."""
        mine = [
            i for i, s in enumerate(sources) if s.family == name and s.weight != 0 and s.repeat > 0
        ]
        if len({sources[i].weight is None for i in mine}) > 1:
            raise ConfigError(
                f"family {name}: some sources have a weight and some count by rows; give all of them a "
                "weight, or none."
            )
        capabilities = [
            c for c in self._capabilities if any(c in sources[i].capabilities for i in mine)
        ]
        if capabilities:
            return self._split_by_capability(name, sources, mine, capabilities, buckets)
        children, weights = [], []
        for i in mine:
            source, rows = sources[i], self.drawn_rows[sources[i].name]
            if not rows:
                raise ConfigError(f"source {source.name} has no row to draw.")
            weight = _fraction(source.repeat) * rows
            if source.weight is not None:
                weight = _fraction(source.weight)
                if unit == "tokens":
                    weight /= Fraction(_mean_tokens(source))
            children.append(self._lanes(source, i, None, f"{name}/{source.name}", buckets)[0])
            weights.append(weight)
        return _level(children, weights)

    def _split_by_capability(
        self,
        name: str,
        sources: Sequence[SourceRows],
        mine: Sequence[int],
        capabilities: Sequence[str],
        buckets: int,
    ) -> _Level | int:
        children, weights, drawn = [], [], 0
        for capability in capabilities:
            inner, inner_weights = [], []
            for i in mine:
                source = sources[i]
                if capability not in source.capabilities or source.capability is None:
                    continue
                stream = f"{name}/{source.name}/{capability}"
                level, rows = self._lanes(source, i, capability, stream, buckets)
                if rows:
                    inner.append(level)
                    inner_weights.append(_fraction(source.repeat) * rows)
                    drawn += rows
            if not inner:
                raise ConfigError(
                    f"data.capabilities.{capability}: no row of family {name} has it."
                )
            children.append(_level(inner, inner_weights))
            weights.append(_fraction(self._capabilities[capability]))
        left = sum(self.drawn_rows[sources[i].name] for i in mine) - drawn
        if left:
            self.warnings.append(
                f"family {name}: {left} rows have none of the weighted capabilities and are never drawn"
            )
        return _level(children, weights)

    def _lanes(
        self, source: SourceRows, number: int, capability: str | None, stream: str, buckets: int
    ) -> tuple[_Level | int, int]:
        """Append the lanes of one source (and capability); their level and number of rows."""
        children: list[_Level | int] = []
        weights = []
        for unit in _units(source, capability, self.seed, self.branches, buckets):
            children.append(len(self.lanes))
            weights.append(Fraction(unit.num_units * unit.size))
            self.lanes.append(
                Lane(
                    number,
                    capability,
                    unit.size,
                    unit.num_units,
                    UnitRows(unit.rows),
                    f"{stream}/{unit.size}",
                    unit.buckets,
                    "shuffled" if source.row_group is not None and not buckets else "fixed",
                )
            )
            if unit.unknown:
                self.warnings.append(
                    f"source {source.name}: {unit.unknown} units without a key are in the middle bucket"
                )
        return (_level(children, weights), int(sum(weights))) if children else (-1, 0)

    def _length(self, epochs: float | None, of: str | None, samples: int | None) -> int:
        if (epochs is None) == (samples is None):
            raise ConfigError("set exactly one of data.length.epochs and data.length.samples.")
        if samples is not None:
            if samples < 1:
                raise ConfigError(f"data.length.samples must be at least 1, got {samples}.")
            return samples
        assert epochs is not None, "checked above"
        if not (epochs > 0 and math.isfinite(epochs)):
            raise ConfigError(f"data.length.epochs must be positive, got {epochs}.")
        names = self.family_names
        if of is None:
            of = "spatial" if "spatial" in names else names[0]
            if len(names) > 1 and of != "spatial":
                raise ConfigError(f"data.length.of: name one of {', '.join(names)}.")
        if of not in names:
            raise ConfigError(
                f"data.length.of is {of!r}; families with weight: {', '.join(names)}."
            )
        leaf = names.index(of)
        target = int(Fraction(epochs) * self._epoch_rows[of])
        if target < 1:
            raise ConfigError(f"{epochs} epochs of family {of} are less than one sample.")
        weights = self._tree.weights
        ideal = -(-target * sum(weights) // weights[leaf])
        # the family has been drawn `target` times in a range of lengths; take the one nearest the ideal
        while self._tree.counts(ideal)[leaf] < target:
            ideal += 1
        while self._tree.counts(ideal)[leaf] > target:
            ideal -= 1
        return ideal


def mixture_for_steps(
    sources: Sequence[SourceRows],
    families: Mapping[str, float],
    *,
    global_batch_size: int,
    max_branches: int,
    min_media_per_step: int | Literal["auto"] = "auto",
    **options: Any,
) -> Mixture:
    """A :class:`Mixture` whose steps hold enough distinct media.

    The number of branches is halved until a step of ``global_batch_size`` draws is expected to hold
    ``min_media_per_step`` distinct media.

    Args:
        sources: As for :class:`Mixture`.
        families: As for :class:`Mixture`.
        global_batch_size: Samples per optimizer step.
        max_branches: Largest unit to start from.
        min_media_per_step: ``auto`` = ``ceil(global_batch_size / max_branches)``.
        options: Further arguments of :class:`Mixture`.

    Raises:
        ConfigError: Even rows drawn singly do not give that many.
    """
    if min_media_per_step == "auto":
        min_media_per_step = -(-global_batch_size // max_branches)
    if min_media_per_step > global_batch_size:
        raise ConfigError(
            f"shared_prefix.min_media_per_step {min_media_per_step} is above "
            f"step.global_batch_size {global_batch_size}."
        )
    branches = max_branches
    while True:
        mixture = Mixture(sources, families, branches=branches, **options)
        expected = mixture.distinct_media(global_batch_size)
        if expected >= min_media_per_step - 1e-9:
            break
        if mixture.branches == 1:
            raise ConfigError(
                f"a step holds {expected:.0f} distinct media, min_media_per_step asks for "
                f"{min_media_per_step}."
            )
        branches = mixture.branches // 2
    if branches < max_branches:
        mixture.warnings.append(
            f"groups hold at most {mixture.branches} rows instead of {max_branches}, so that a step of "
            f"{global_batch_size} holds {min_media_per_step} distinct media (expected {expected:.0f})"
        )
    return mixture


def _fraction(value: float) -> Fraction:
    """A configured weight as a multiple of 2^-20."""
    return Fraction(max(1, round(value * 2**20)), 2**20)


def _check_weights(key: str, weights: Mapping[str, float]) -> None:
    bad = {name: w for name, w in weights.items() if not (w >= 0 and math.isfinite(w))}
    if bad:
        raise ConfigError(f"data.{key}: weights must be finite and not negative, got {bad}.")


def _check_source(source: SourceRows, families: Mapping[str, float]) -> None:
    where = f"source {source.name}"
    if source.family not in families:
        raise ConfigError(f"{where}: family {source.family!r} is not one of {', '.join(families)}.")
    if not (source.repeat >= 0 and math.isfinite(source.repeat)):
        raise ConfigError(f"{where}: repeat must be finite and not negative, got {source.repeat}.")
    if not 0 < source.fraction <= 1:
        raise ConfigError(f"{where}: fraction must be in (0, 1], got {source.fraction}.")
    if source.max_samples is not None and source.max_samples < 1:
        raise ConfigError(f"{where}: max_samples must be at least 1, got {source.max_samples}.")
    if source.weight is not None:
        _check_weights(f"sources.{source.name}", {"weight": source.weight})


def _mean_tokens(source: SourceRows) -> float:
    if source.mean_tokens is None:
        raise ConfigError(f"unit: tokens needs exact lengths; source {source.name} has none.")
    return source.mean_tokens


def _num_chosen(source: SourceRows) -> int:
    """Eligible rows after ``fraction`` and ``max_samples``."""
    rows = int(np.count_nonzero(source.eligible))
    keep = min(rows, max(1, round(source.fraction * rows)))
    return keep if source.max_samples is None else min(keep, source.max_samples)


def _chosen_rows(source: SourceRows, seed: int) -> IntArray:
    """Rows that are drawn, ascending: nested subsets for growing ``fraction``, spread over the files."""
    rows = np.flatnonzero(source.eligible)
    keep = _num_chosen(source)
    if keep == len(rows):
        return rows
    keys = round_keys(seed, f"subset/{source.name}", 0)
    return np.sort(rows[permute_array(np.arange(keep), len(rows), keys)])


class _Units(NamedTuple):
    """Units of one size, before they have a place in the mixture."""

    size: int
    num_units: int
    buckets: tuple[int, ...]
    unknown: int
    rows: IntArray | Path


def _units(
    source: SourceRows, capability: str | None, seed: int, branches: int, buckets: int
) -> list[_Units]:
    """Units of a source (and capability), largest first; from the cache when there is one."""
    if source.cache_dir is None:
        return _cut(source, capability, seed, branches, buckets)
    parts = [
        source.content_key,
        _bits(source.eligible),
        source.fraction,
        source.max_samples,
        capability,
    ]
    parts += [branches, buckets, seed if _num_chosen(source) < source.eligible.sum() else None]
    if source.row_group is not None:
        parts.append("row groups")
    if buckets and source.difficulty is not None:
        parts.append(hashlib.blake2b(np.asarray(source.difficulty).tobytes()).hexdigest())
    folder = source.cache_dir / f"units-{_digest(parts)}"
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
        _Units(size, num, tuple(starts), unknown, folder / name)
        for size, num, starts, unknown, name in json.loads(info.read_text())
    ]


def _cut(
    source: SourceRows, capability: str | None, seed: int, branches: int, buckets: int
) -> list[_Units]:
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
        found.append(_Units(size, len(table), starts, unknown, table))
    return found


def _bits(mask: npt.NDArray[np.bool_]) -> str:
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


@functools.lru_cache(maxsize=4096)
def _bucket_keys(seed: int, stream: str, epoch: int) -> tuple[int, ...]:
    return round_keys(seed, stream, epoch)


@functools.lru_cache(maxsize=256)
def _bucket_places(
    buckets: tuple[int, ...], shuffled: bool, seed: int, stream: str, epoch: int
) -> tuple[IntArray, IntArray]:
    """Buckets in the order of an epoch: their numbers, and where each begins in the epoch."""
    sizes = np.diff(buckets)
    order = np.arange(len(sizes))
    if shuffled:
        order = permute_array(order, len(sizes), _bucket_keys(seed, f"{stream}/groups", epoch))
    return order, np.cumsum(sizes[order]) - sizes[order]


def _shuffled(lane: Lane, index: int, seed: int, epoch: int) -> int:
    """Unit at a place of the epoch: bucket after bucket, shuffled inside."""
    if len(lane.buckets) == 2:
        return permute(index, lane.num_units, _bucket_keys(seed, lane.stream, epoch))
    return int(_shuffled_array(lane, np.array([index]), seed, epoch)[0])


def _shuffled_array(lane: Lane, index: IntArray, seed: int, epoch: int) -> IntArray:
    if len(lane.buckets) == 2:
        return permute_array(index, lane.num_units, _bucket_keys(seed, lane.stream, epoch))
    order, begins = _bucket_places(
        lane.buckets, lane.bucket_order == "shuffled", seed, lane.stream, epoch
    )
    out = np.empty(len(index), np.int64)
    place = np.searchsorted(begins, index, side="right") - 1
    for at in np.unique(place):
        mine, bucket = place == at, int(order[at])
        start, stop = lane.buckets[bucket], lane.buckets[bucket + 1]
        keys = _bucket_keys(seed, f"{lane.stream}/bucket{bucket}", epoch)
        out[mine] = start + permute_array(index[mine] - begins[at], stop - start, keys)
    return out


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
