"""Sources, weights, and a seed -> the order of training, one draw per position.

Levels: position -> family -> slot of ``B`` draws -> [capability] -> source -> lane -> unit -> row. A slot
of a lane of size k is filled by B / k units, so every position can be computed alone, rows of one unit
stand next to each other, and each row is drawn once per epoch of its lane.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from spatialvlm.data.order import SplitTree
from spatialvlm.data.sample import DRAW_DTYPE, Draw
from spatialvlm.data.units import (
    Lane,
    SourceRows,
    UnitRows,
    build_units,
    digest,
    mask_digest,
    num_chosen,
)
from spatialvlm.errors import ConfigError

if TYPE_CHECKING:
    from spatialvlm.data.sample import DrawArray
    from spatialvlm.typing import IntArray


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
        self.drawn_rows = {source.name: num_chosen(source) for source in sources}
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
            "sources": digest([(s.name, s.family, s.content_key) for s in sources]),
            "eligible rows": digest([mask_digest(s.eligible) for s in sources]),
            "mixture": digest(
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

    @property
    def fingerprint(self) -> str:
        """Identity of the order; a state of another order cannot be resumed."""
        return digest(self.parts)

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
        unit = lane.shuffled_one(index, self.seed, epoch)
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
                unit[same] = lane.shuffled(index[same], self.seed, int(e))
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
        for unit in build_units(source, capability, self.seed, self.branches, buckets):
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
