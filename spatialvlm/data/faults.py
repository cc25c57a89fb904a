"""What is broken, how much of it is tolerated, and what takes its place."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from spatialvlm.errors import BudgetError, DataError, MediaError

if TYPE_CHECKING:
    from spatialvlm.data.mixture import Mixture
    from spatialvlm.data.sample import Draw, LengthArray, MediaRef, Sample
    from spatialvlm.typing import IntArray

logger = logging.getLogger(__name__)

INDEX_REASONS = (
    "bad_json", "schema", "turn_order", "no_answer", "empty_answer", "marker_count",
    "marker_in_answer", "spar_type", "coord_range", "refused_path", "excluded",
)  # fmt: skip
"""Why a row leaves the eligible set when it is indexed. ``excluded`` is a wish of the user, not a defect."""

LOAD_REASONS = (
    "overlong", "missing", "refused_path", "not_an_image", "truncated", "too_many_pixels", "aspect",
    "frame_decode", "no_frames", "frame_size", "bad_cell", "mark", "format", "timeout", "coord_range",
)  # fmt: skip
"""Why a sample is replaced when it is planned or loaded."""

_CANDIDATES = 256
_MIN_FAULTS = 20


class Quarantine:
    """Record of every broken sample of this rank, one JSON line each, and the tolerance.

    Args:
        path: The file of the run folder, appended to.
        sources: Names of all sources, in the mixture's order.
        limits: Source name -> tolerated fraction of its draws; 0 = the first fault is an error.
        default_limit: Tolerated fraction over all sources without a limit of their own.
        rank: Rank that is written with the events.
    """

    def __init__(
        self,
        path: str | Path,
        sources: Sequence[str],
        *,
        limits: Mapping[str, float] | None = None,
        default_limit: float = 0.001,
        rank: int = 0,
    ) -> None:
        self.path = Path(path)
        self.sources = tuple(sources)
        self.limits = dict(limits or {})
        self.default_limit = default_limit
        self.rank = rank
        self.counts: Counter[tuple[str, str]] = Counter()
        """(source, reason) -> events of this rank."""
        self._uids: dict[tuple[str, str], list[str]] = {}

    def add(
        self,
        sample: Sample,
        error: DataError,
        *,
        step: int,
        file: str = "",
        row: int = -1,
        media: MediaRef | None = None,
        replaced_by: str | None = None,
    ) -> None:
        """Write one event.

        Args:
            sample: The broken sample.
            error: What is wrong with it; its ``reason`` is counted.
            step: Optimizer step that drew it.
            file: Data file of the row.
            row: Row of the file.
            media: The broken medium, if it is one.
            replaced_by: Uid that was loaded instead; None = the slot stays empty.

        Raises:
            MediaError: The source tolerates no fault.
        """
        key = sample.source, error.reason
        self.counts[key] += 1
        uids = self._uids.setdefault(key, [])
        if len(uids) < 3:
            uids.append(sample.uid)
        event = {
            "uid": sample.uid,
            "source": sample.source,
            "file": file,
            "row": row,
            "media": "" if media is None else f"{media.path}:{media.member}".rstrip(":"),
            "reason": error.reason,
            "message": str(error),
            "step": step,
            "rank": self.rank,
            "replaced_by": replaced_by,
        }
        try:
            with self.path.open("a") as out:
                out.write(json.dumps(event) + "\n")
        except OSError as failure:  # a full disk; the event is counted and told all the same
            logger.warning("cannot write %s (%s): %s", self.path, failure, json.dumps(event))
        if self.limits.get(sample.source) == 0:
            raise MediaError(
                f"{sample.uid}: {error} Source {sample.source} tolerates no broken sample: repair it, or "
                "set max_bad_fraction for this source.",
                reason=error.reason,
            ) from error

    def faults(self) -> IntArray:
        """int64 ``[num_sources]``: events of this rank per source, to be summed over ranks."""
        out = np.zeros(len(self.sources), np.int64)
        for (source, _), count in self.counts.items():
            out[self.sources.index(source)] += count
        return out

    def check(self, faults: IntArray, draws: IntArray) -> None:
        """Compare the faults of all ranks with the tolerance. The same call on every rank.

        Args:
            faults: int64 ``[num_sources]``, summed over ranks since the start of the order.
            draws: int64 ``[num_sources]``: positions drawn since then.

        Raises:
            BudgetError: Too many; names the commonest reasons.
        """
        shared = [n for n, name in enumerate(self.sources) if name not in self.limits]
        budgets = [("all sources", shared, self.default_limit)]
        budgets += [(f"source {s}", [self.sources.index(s)], x) for s, x in self.limits.items()]
        for name, members, limit in budgets:
            bad, seen = int(faults[members].sum()), int(draws[members].sum())
            judged = bad >= _MIN_FAULTS or (seen <= 100 and bad >= max(2, 0.2 * seen))
            if judged and bad > limit * seen:
                raise BudgetError(
                    f"{name}: {bad} of {seen} drawn samples are broken, more than max_bad_fraction "
                    f"{limit}. {self.summary()} See {self.path}."
                )

    def summary(self) -> str:
        """The ten commonest (source, reason) of this rank with up to three uids each."""
        if not self.counts:
            return "None of them on this rank."
        return "Commonest: " + "; ".join(
            f"{source} {reason} {count} ({', '.join(self._uids[source, reason])})"
            for (source, reason), count in self.counts.most_common(10)
        )


def unit_tokens(lengths: LengthArray) -> int:
    """Planned tokens of a unit: its shared prefix once, where its rows can share it."""
    keys = lengths["group_key"]
    if len(lengths) > 1 and keys[0] != 0 and np.all(keys == keys[0]):
        prefix = int(lengths["prefix_tokens"].min())
        return prefix + int((lengths["tokens"] - prefix).sum())
    return int(lengths["tokens"].sum())


def fits_plan(planned: LengthArray, candidate: LengthArray) -> bool:
    """Whether a unit can stand in for another without changing the plan.

    Args:
        planned: Lengths of the unit's rows ``[n]``.
        candidate: Lengths of the other unit's rows ``[n]``; ``tokens`` 0 = not measured.

    Returns:
        True when it needs no more tokens and has the same kinds of media.
    """
    if np.any(candidate["tokens"] == 0) or unit_tokens(candidate) > unit_tokens(planned):
        return False
    kinds = ("images", "videos", "geometry_tokens")
    return all(bool(planned[k].any()) == bool(candidate[k].any()) for k in kinds)


def replacement(
    mixture: Mixture, draw: Draw, usable: Callable[[IntArray], bool]
) -> tuple[int, IntArray] | None:
    """The unit that takes the place of a broken one: a function of the data, equal on every rank.

    Args:
        mixture: The order.
        draw: Any draw of the broken unit.
        usable: Whether the rows ``[size]`` fit the plan and load.

    Returns:
        Number and rows of the next usable unit of the same lane in file order, cyclic; None when none of
        256 is usable, and the slots stay empty.
    """
    total = mixture.lanes[draw.lane].num_units
    for offset in range(1, min(_CANDIDATES, total - 1) + 1):
        unit = (draw.unit + offset) % total
        rows = mixture.unit_rows(draw.lane, unit)
        if usable(rows):
            return unit, rows
    return None
