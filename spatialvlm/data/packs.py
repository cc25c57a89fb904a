"""One pack: planned draws -> a batch, with a fixed rule for what cannot be loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from spatialvlm.data.collate import LossWeighting, Prepared, collate
from spatialvlm.data.faults import LOAD_REASONS, fits_plan, replacement
from spatialvlm.data.prefix import common_prefix
from spatialvlm.data.prepare import SampleEncoder, check_length
from spatialvlm.data.sample import LENGTH_DTYPE, Draw, PackPlan, Sample
from spatialvlm.data.workers import Report
from spatialvlm.errors import DataError
from spatialvlm.typing import Batch, ModalityFlags

if TYPE_CHECKING:
    from spatialvlm.data.mixture import Mixture
    from spatialvlm.data.sample import LengthArray
    from spatialvlm.typing import IntArray


class PackTask(NamedTuple):
    """What a worker needs to build one pack."""

    pack: PackPlan
    sizes: LengthArray
    """What every draw was planned with; media may have become unreadable since."""
    flags: ModalityFlags


Planned = dict[Draw, np.void]
"""Draw -> its record of ``LENGTH_DTYPE``."""


class Fault(NamedTuple):
    """A sample that could not be loaded."""

    sample: Sample
    error: DataError
    file: str
    row: int
    replaced_by: str | None


class BuiltPack(NamedTuple):
    """A batch and what happened while it was built."""

    batch: Batch
    label_tokens: tuple[int, ...]
    """Per sample."""
    faults: tuple[Fault, ...]


@dataclass(frozen=True)
class PackBuilder:
    """Plans of packs -> batches; sent to every worker once.

    Rows of a unit whose media cannot be loaded are replaced by those of the next unit of its lane that can,
    need no more tokens than planned, and have the same kinds of media. That is a function of the data alone,
    so every rank and every number of workers makes the same choice and the plan stays valid.
    """

    encoder: SampleEncoder
    mixture: Mixture
    loss_weighting: LossWeighting
    align: int

    def __call__(self, task: PackTask, report: Report = lambda _: None) -> BuiltPack:
        """Read, decode and collate one pack.

        Raises:
            DataError: A sample has another length than planned, or its row cannot be read any more.
        """
        samples: list[Prepared] = []
        groups: list[tuple[int, ...]] = []
        faults: list[Fault] = []
        planned = dict(zip(task.pack.draws, task.sizes, strict=True))
        for group in task.pack.groups:
            draws = [task.pack.draws[i] for i in group]
            for found in self._group(draws, planned, faults, report):
                groups.append(tuple(range(len(samples), len(samples) + len(found))))
                samples += found
        batch = collate(
            samples,
            groups,
            flags=task.flags,
            position_rows=self.encoder.layout.num_position_rows,
            loss_weighting=self.loss_weighting,
            align=self.align,
            pad_id=self.encoder.template.pad_id,
        )
        labels = tuple(sample.encoded.num_label_tokens for sample in samples)
        return BuiltPack(batch, labels, tuple(faults))

    def _group(
        self, draws: list[Draw], planned: Planned, faults: list[Fault], report: Report
    ) -> list[list[Prepared]]:
        """The samples of a group; after a fault, one group per replaced unit."""
        prepared: list[Prepared] = []
        for draw in draws:
            report(f"{self.encoder.indices[draw.source].uid(draw.row)} (position {draw.position})")
            try:
                sample = self.encoder.prepare(draw, pixels=not prepared)
            except DataError as error:
                if error.reason not in LOAD_REASONS:
                    raise
                return self._replace(draws, planned, error, faults)
            check_length(sample.uid, int(planned[draw]["tokens"]), sample.encoded)
            prepared.append(sample)
        if len(draws) > 1 and not common_prefix([sample.encoded for sample in prepared]):
            raise DataError(
                f"{prepared[0].uid} and {prepared[1].uid} were planned as one group but do not start alike; their "
                "rows or media changed. Rebuild the index"
            )
        return [prepared]

    def _replace(
        self, draws: list[Draw], planned: Planned, error: DataError, faults: list[Fault]
    ) -> list[list[Prepared]]:
        out: list[list[Prepared]] = []
        units = {(draw.lane, draw.unit, draw.epoch): draw for draw in draws}
        for (lane, unit, epoch), first in units.items():
            members = [
                draw for draw in draws if (draw.lane, draw.unit, draw.epoch) == (lane, unit, epoch)
            ]
            wanted = np.array([planned[draw].item() for draw in members], LENGTH_DTYPE)
            branches = [draw.branch for draw in members]
            found: dict[int, list[Prepared]] = {}

            def usable(
                candidate: IntArray,
                wanted: LengthArray = wanted,
                members: list[Draw] = members,
                branches: list[int] = branches,
                found: dict[int, list[Prepared]] = found,
            ) -> bool:
                sizes = self._measure(members[0].source, candidate[branches], members[0].epoch)
                if sizes is None or not fits_plan(wanted, sizes):
                    return False
                keys = set(sizes["group_key"].tolist())
                prepared = self._load(members, candidate, alike=len(keys) == 1 and 0 not in keys)
                if prepared is not None:
                    found[int(candidate[0])] = prepared
                return prepared is not None

            chosen = replacement(self.mixture, first, usable)
            taken = found[int(chosen[1][0])] if chosen is not None else []
            for at, draw in enumerate(members):
                index = self.encoder.indices[draw.source]
                faults.append(
                    Fault(
                        sample=index.sample(draw.row, draw.epoch),
                        # Its traceback holds this list, and with it every picture of the pack, until a collection.
                        error=error.with_traceback(None),
                        file=index.source.files[int(index.column("file")[draw.row])],
                        row=int(index.column("row")[draw.row]),
                        replaced_by=taken[at].uid if taken else None,
                    )
                )
            shares = (
                bool(common_prefix([sample.encoded for sample in taken]))
                if len(taken) > 1
                else True
            )
            out += [taken] if shares and taken else [[sample] for sample in taken]
        return out

    def _measure(self, source: int, rows: IntArray, epoch: int) -> LengthArray | None:
        """Sizes of a unit's rows; None when one cannot be used."""
        out = np.zeros(len(rows), LENGTH_DTYPE)
        for at, row in enumerate(rows.tolist()):
            try:
                out[at] = self.encoder.measure(source, row, epoch)
            except DataError as error:
                if error.reason not in LOAD_REASONS:
                    raise
                return None
        return out

    def _load(self, members: list[Draw], rows: IntArray, *, alike: bool) -> list[Prepared] | None:
        """The rows of a unit in the places of some draws; None when one cannot be loaded."""
        prepared: list[Prepared] = []
        for draw in members:
            other = draw._replace(row=int(rows[draw.branch]))
            try:
                prepared.append(self.encoder.prepare(other, pixels=not (alike and prepared)))
            except DataError as error:
                if error.reason not in LOAD_REASONS:
                    raise
                return None
        return prepared
