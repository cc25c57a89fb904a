"""Whole optimizer steps, in order, resumable by one integer."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import numpy as np
import torch

from spatialvlm.data.collate import LossWeighting, denominator
from spatialvlm.data.faults import LOAD_REASONS, Quarantine, replacement
from spatialvlm.data.lengths import LengthTable
from spatialvlm.data.packs import BuiltPack, Fault, PackBuilder, PackTask
from spatialvlm.data.plan import PackingArgs, distinct_media, plan_step, split_window
from spatialvlm.data.sample import Draw, Shares, StepPlan, World, count_notes
from spatialvlm.data.units import digest
from spatialvlm.data.workers import Report, WorkerPool
from spatialvlm.errors import DataError, StateError
from spatialvlm.typing import Batch, CostCoefficients

if TYPE_CHECKING:
    from spatialvlm.data.mixture import Mixture
    from spatialvlm.data.sample import DrawArray, LengthArray
    from spatialvlm.typing import IntArray

STATE_VERSION = 1
_PACKS = "packs (of packing, step.lookahead, step.packs_per_step and the model)"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepBatches:
    """One optimizer step of one rank."""

    batches: list[Batch]
    """One per micro-step."""
    denominator_local: float
    """This rank's part of what the step's loss is divided by."""
    label_tokens: int
    """Supervised tokens of this rank."""
    plan: StepPlan
    shares: Shares
    """Counts of the whole step, over all ranks."""
    wait_s: float
    """Time the caller waited for this step."""


@dataclass(frozen=True, slots=True)
class StepComposition:
    """What one optimizer step consumes.

    ``unit: samples``: ``global_batch_size`` samples, whatever the number of ranks; the last incomplete step
    is dropped or filled by drawing on (``tail``). ``unit: packs``: ``packs_per_step`` packs out of windows of
    ``lookahead`` samples. ``steps`` fixes the number of steps. A step should hold ``min_media`` distinct media.
    """

    global_batch_size: int
    unit: Literal["samples", "packs"] = "samples"
    tail: Literal["drop", "pad"] = "drop"
    lookahead: int = 1024
    packs_per_step: int | None = None
    steps: int | None = None
    min_media: int = 1
    strict_diversity: bool = False


class PlannedStep(NamedTuple):
    """A planned step and where the order goes on behind it."""

    plan: StepPlan
    draws: DrawArray
    sizes: LengthArray
    after: tuple[int, int]
    """Position, and number of the next step inside its window."""


class StepLoader:
    """Yields :class:`StepBatches` from the position of its state to the end of the order.

    Args:
        mixture: The order.
        lengths: Sizes of rows; holds the encoder.
        cost: FLOPs coefficients that balance the ranks.
        world: Rank and number of ranks.
        packing: Limits of packs and groups.
        composition: What one step consumes.
        loss_weighting: See :func:`~spatialvlm.data.collate.token_weight`.
        align: Packs are padded to a multiple of this.
        num_workers: Processes that build packs; 0 = in this process.
        prefetch_steps: Steps that are built ahead.
        prefetch_mb: Memory of finished packs that wait.
        timeout_s: Longest time for one pack.
        pin_memory: Put batches into page-locked memory, for copies that overlap with computing.
        quarantine: Where broken samples are recorded and counted; None = nowhere.
        state: From :meth:`state_dict` of an equal order.
        new_order: Continue at the state's position even if the order is another one.

    Raises:
        StateError: The state belongs to another order or a newer version.
    """

    def __init__(
        self,
        mixture: Mixture,
        lengths: LengthTable,
        cost: CostCoefficients,
        *,
        world: World,
        packing: PackingArgs,
        composition: StepComposition,
        loss_weighting: LossWeighting = "token",
        align: int = 1,
        num_workers: int = 0,
        prefetch_steps: int = 1,
        prefetch_mb: int = 2048,
        timeout_s: float = 120.0,
        pin_memory: bool = False,
        quarantine: Quarantine | None = None,
        state: Mapping[str, Any] | None = None,
        new_order: bool = False,
    ) -> None:
        self.mixture, self.lengths, self.cost = mixture, lengths, cost
        self.world, self.packing = world, packing
        self.composition = composition
        self.loss_weighting: LossWeighting = loss_weighting
        self.prefetch_steps = prefetch_steps
        self.pin_memory = pin_memory
        self.quarantine = quarantine
        self.builder = PackBuilder(lengths.encoder, mixture, loss_weighting, align)
        self.pool: WorkerPool | None = None
        if num_workers:
            self.pool = WorkerPool(
                _work,
                self.builder,
                num_workers,
                timeout_s=timeout_s,
                max_ready_bytes=prefetch_mb << 20,
            )
        self._position, self._pack, self._step = 0, 0, 0
        self._said_few_media = False
        num_sources = len(lengths.encoder.indices)
        # Over all ranks since the start of the order; those of the past come from the state.
        self._drawn = np.zeros(num_sources, np.int64)
        self._past_faults = np.zeros(num_sources, np.int64)
        self._faults = self._past_faults
        self._planned_faults: list[tuple[int, Fault]] = []
        if state:
            self._restore(state, new_order)

    @cached_property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run, those already done included.

        With ``unit: packs`` and no fixed number this plans the whole order, which needs exact lengths.
        """
        wanted = self.composition
        if wanted.steps is not None:
            return wanted.steps
        if wanted.unit == "packs":
            return self._step + sum(1 for _ in self.plans())
        left, size = self.mixture.length - self._position, wanted.global_batch_size
        return self._step + (-(-left // size) if wanted.tail == "pad" else left // size)

    def plans(self) -> Iterator[PlannedStep]:
        """Plans from the current position to the end; equal on every rank, nothing is read but lengths."""
        plans = (
            self._plans_of_samples if self.composition.unit == "samples" else self._plans_of_packs
        )
        return plans()

    def _plans_of_samples(self) -> Iterator[PlannedStep]:
        position, size = self._position, self.composition.global_batch_size
        for step in range(self._step, self.num_steps):
            draws = self.mixture.draws(position, position + size)
            draws, sizes = self._usable(draws, step)
            plan = plan_step(draws, sizes, self.cost, self.world.size, self.packing, step=step)
            position += size
            self._check_diversity(step, sizes)
            yield PlannedStep(plan, draws, sizes, (position, 0))

    def _plans_of_packs(self) -> Iterator[PlannedStep]:
        """Windows of draws are packed together; their packs are consumed a few at a time."""
        wanted, position, pack, step = self.composition, self._position, self._pack, self._step
        assert wanted.packs_per_step is not None, "unit packs has a number of packs"
        end = None if wanted.steps is not None else self.mixture.length
        while step < wanted.steps if wanted.steps is not None else position < self.mixture.length:
            stop = position + wanted.lookahead
            draws = self.mixture.draws(position, stop if end is None else min(stop, end))
            draws, sizes = self._usable(draws, step)
            if pack:  # the window was begun before: its unusable rows are recorded
                self._planned_faults.clear()
            window = plan_step(draws, sizes, self.cost, wanted.packs_per_step, self.packing)
            parts = split_window(window, draws, sizes, self.world.size, step - pack)
            for number, (plan, mask) in list(enumerate(parts))[pack:]:
                if wanted.steps is not None and step >= wanted.steps:
                    return
                step += 1
                after = (position, number + 1) if number + 1 < len(parts) else (stop, 0)
                yield PlannedStep(plan, draws[mask], sizes[mask], after)
            position, pack = stop, 0

    def _check_diversity(self, step: int, sizes: LengthArray) -> None:
        found, wanted = distinct_media(sizes), self.composition.min_media
        if found >= wanted:
            return
        text = (
            f"step {step} holds {found} distinct media, shared_prefix.min_media_per_step asks for {wanted}; lower "
            "shared_prefix.max_branches or raise step.global_batch_size"
        )
        if self.composition.strict_diversity:
            raise DataError(text, reason="diversity")
        if not self._said_few_media:
            logger.warning("%s (said once; data/notes/few_media counts such steps)", text)
        self._said_few_media = True

    def _usable(self, draws: DrawArray, step: int) -> tuple[DrawArray, LengthArray]:
        """Lengths of the draws; a unit that turns out to be unusable gives way to the next of its lane."""
        sizes = self.lengths.lookup(draws)
        bad = np.flatnonzero(sizes["tokens"] == 0)
        if not len(bad):
            return draws, sizes
        draws = draws.copy()
        for key in np.unique(draws[bad][["lane", "unit", "epoch"]]):
            members = np.flatnonzero(draws[["lane", "unit", "epoch"]] == key)
            first = Draw(*draws[members[0]].item())

            def usable(rows: IntArray, source: int = first.source) -> bool:
                self.lengths.measure(source, rows)
                return bool(np.all(self.lengths.records[source]["tokens"][rows] > 0))

            chosen = replacement(self.mixture, first, usable)
            for at in members.tolist():
                if chosen is None and sizes["tokens"][at]:
                    continue  # fine by itself, and there is no other unit
                draw = Draw(*draws[at].item())
                row = -1 if chosen is None else int(chosen[1][draw.branch])
                if draw.position % self.world.size == self.world.rank:
                    self._record_unusable(draw, row, step)
                if chosen is not None:
                    draws["unit"][at], draws["row"][at] = chosen[0], row
        return draws, self.lengths.lookup(draws)

    def _record_unusable(self, draw: Draw, replaced_by: int, step: int) -> None:
        index = self.lengths.encoder.indices[draw.source]
        code = int(self.lengths.reasons[draw.source][draw.row])
        message = "another row of its unit is unusable"
        if code:
            message = self.lengths.message(draw.source, draw.row)
        fault = Fault(
            sample=index.sample(draw.row, draw.epoch),
            error=DataError(message, reason=LOAD_REASONS[code - 1] if code else "missing"),
            file=index.source.files[int(index.column("file")[draw.row])],
            row=int(index.column("row")[draw.row]),
            replaced_by=index.uid(replaced_by) if replaced_by >= 0 else None,
        )
        self._planned_faults.append((step, fault))

    def __iter__(self) -> Iterator[StepBatches]:
        self.lengths.encoder.require_marks()
        pending: deque[_Pending] = deque()
        self._planned_faults.clear()  # of plans that nobody asked batches of
        plans = self.plans()
        ahead = self.prefetch_steps if self.pool else 0
        try:
            while True:
                asked = time.perf_counter()
                pending.extend(
                    self._submit(planned) for planned in islice(plans, 1 + ahead - len(pending))
                )
                if not pending:
                    return
                after = pending[0].after
                ready = self._collect(pending.popleft(), asked)
                self._count(ready)
                if self.world.size == 1:  # else the training loop sums over ranks
                    self.check_budget(self.own_faults())
                self._position, self._pack = after
                self._step = ready.plan.step + 1
                yield ready
        finally:
            self.close()

    def state_dict(self) -> dict[str, Any]:
        """Position behind the last yielded step; everything else follows from the order."""
        return {
            "version": STATE_VERSION,
            "position": self._position,
            "pack": self._pack,
            "step": self._step,
            "order": self.mixture.fingerprint,
            "parts": self._parts(),
            "world": self.world.size,
            "drawn": self._drawn.tolist(),
            "faults": self._faults.tolist(),
        }

    def close(self) -> None:
        """Stop the workers; rank 0 keeps the lengths that were measured on the way."""
        if self.pool is not None:
            self.pool.close()
        if self.world.rank == 0:
            self.lengths.save()

    def _parts(self) -> dict[str, str]:
        """Everything that decides which draws a position stands for."""
        parts = dict(self.mixture.parts)
        wanted = self.composition
        if wanted.unit == "packs":  # a number inside a window counts packs, which these decide
            parts[_PACKS] = digest(
                [repr(self.packing), repr(self.cost), wanted.lookahead, wanted.packs_per_step]
            )
        return parts

    def _restore(self, state: Mapping[str, Any], new_order: bool) -> None:
        if state["version"] > STATE_VERSION:
            raise StateError(
                f"the loader state has version {state['version']}, this program reads up to {STATE_VERSION}; "
                "resume with the newer program"
            )
        self._position, self._step = int(state["position"]), int(state["step"])
        self._pack = int(state["pack"])
        parts, saved = self._parts(), state["parts"]
        differ = [name for name in sorted(parts | saved) if parts.get(name) != saved.get(name)]
        if differ == [_PACKS] and not self._pack:
            differ = []  # a new window begins
        if not differ:
            if len(state["drawn"]) == len(self._drawn):
                self._drawn += np.array(state["drawn"], np.int64)
                self._past_faults += np.array(state["faults"], np.int64)
                self._faults = self._past_faults
            return
        if not new_order:
            raise StateError(
                f"the saved position belongs to another order; differing: {', '.join(differ)}. "
                "Restore them, or add data to run.resume_allow to continue in the new order."
            )
        if self._pack:  # the rest of a window has no counterpart
            self._position, self._pack = self._position + self.composition.lookahead, 0
        logger.warning(
            "continuing at position %d of a new order; differing: %s",
            self._position,
            ", ".join(differ),
        )

    def own_faults(self) -> IntArray:
        """int64 ``[num_sources]``: broken samples of this rank in this process; sum them over ranks."""
        if self.quarantine is None:
            return np.zeros_like(self._past_faults)
        return self.quarantine.faults()

    def check_budget(self, faults: IntArray) -> None:
        """Compare the broken samples of all ranks with the tolerance; the same call on every rank.

        Args:
            faults: int64 ``[num_sources]``: :meth:`own_faults`, summed over ranks.

        Raises:
            BudgetError: Too many.
        """
        self._faults = self._past_faults + faults
        if self.quarantine is not None:
            self.quarantine.check(self._faults, self._drawn)

    def _count(self, step: StepBatches) -> None:
        for packs in step.plan.packs:
            for pack in packs:
                for draw in pack.draws:
                    self._drawn[draw.source] += 1

    def _submit(self, step: PlannedStep) -> _Pending:
        plan, draws, sizes, after = step
        place = {position: at for at, position in enumerate(draws["position"].tolist())}
        own = [packs[self.world.rank] for packs in plan.packs]
        tasks = [
            PackTask(pack, sizes[[place[draw.position] for draw in pack.draws]], flags)
            for pack, flags in zip(own, plan.flags, strict=True)
        ]
        tickets = [self.pool.submit(task) for task in tasks] if self.pool else []
        return _Pending(plan, self.shares(draws, sizes), tasks, tickets, after)

    def _collect(self, pending: _Pending, asked: float) -> StepBatches:
        if self.pool:
            built = [_from_numpy(*self.pool.get(ticket)) for ticket in pending.tickets]
        else:
            built = [self.builder(task) for task in pending.tasks]
        if self.quarantine is not None:
            events = [event for event in self._planned_faults if event[0] == pending.plan.step]
            events += [(pending.plan.step, fault) for pack in built for fault in pack.faults]
            self._planned_faults = [e for e in self._planned_faults if e[0] != pending.plan.step]
            for step, fault in events:
                media = fault.sample.media[0] if len(fault.sample.media) == 1 else None
                self.quarantine.add(
                    fault.sample, fault.error, step=step, file=fault.file, row=fault.row, media=media,
                    replaced_by=fault.replaced_by,
                )  # fmt: skip
        labels = [count for pack in built for count in pack.label_tokens]
        return StepBatches(
            batches=[_pinned(pack.batch) if self.pin_memory else pack.batch for pack in built],
            denominator_local=denominator(labels, self.loss_weighting),
            label_tokens=sum(labels),
            plan=pending.plan,
            shares=pending.shares,
            wait_s=time.perf_counter() - asked,
        )

    def shares(self, draws: DrawArray, sizes: LengthArray) -> Shares:
        """Realised samples, tokens, label tokens and patches of some draws, and what was done to them."""
        columns = {
            "samples": (sizes["tokens"] > 0).astype(np.int64),
            "tokens": sizes["tokens"],
            "label_tokens": sizes["label_tokens"],
            "patches": sizes["patches"],
        }
        counts: dict[str, dict[str, int]] = {name: {} for name in columns}
        notes: dict[str, int] = {}
        for source in np.unique(draws["source"]).tolist():
            index = self.lengths.encoder.indices[source]
            mine = draws["source"] == source
            names = [f"family/{index.source.family}", f"source/{index.source.name}"]
            found = count_notes(sizes["notes"][mine])
            notes |= {f"{index.source.name}/{name}": count for name, count in found.items()}
            capability = np.asarray(index.column("capability"))[draws["row"][mine]]
            for name, values in columns.items():
                own = values[mine]
                for key in names:
                    counts[name][key] = counts[name].get(key, 0) + int(own.sum())
                for code in np.unique(capability[capability >= 0]).tolist():
                    key = f"capability/{index.capabilities[code]}"
                    total = int(own[capability == code].sum())
                    counts[name][key] = counts[name].get(key, 0) + total
        epochs = self.mixture.epochs(int(draws["position"].max()) + 1)
        if distinct_media(sizes) < self.composition.min_media:
            notes["few_media"] = 1
        return Shares(**counts, epochs=epochs, notes=notes)


@dataclass(frozen=True, slots=True)
class _Pending:
    plan: StepPlan
    shares: Shares
    tasks: Sequence[PackTask]
    tickets: Sequence[int]
    after: tuple[int, int]


def _work(builder: PackBuilder, task: PackTask, report: Report) -> tuple[dict[str, Any], Any, Any]:
    """Build a pack in a worker; tensors travel as arrays."""
    built = builder(task, report)
    arrays = {
        key: value.numpy() if isinstance(value, torch.Tensor) else value
        for key, value in built.batch.items()
    }
    return arrays, built.label_tokens, built.faults


def _from_numpy(
    arrays: dict[str, Any], label_tokens: tuple[int, ...], faults: tuple[Fault, ...]
) -> BuiltPack:
    tensors = {
        key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        for key, value in arrays.items()
    }
    return BuiltPack(cast("Batch", tensors), label_tokens, faults)


def _pinned(batch: Batch) -> Batch:
    tensors = {
        key: value.pin_memory() if isinstance(value, torch.Tensor) and value.numel() else value
        for key, value in batch.items()
    }
    return cast("Batch", tensors)
