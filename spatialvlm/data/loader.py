"""Whole optimizer steps, in order, resumable by one integer."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import numpy as np
import torch

from spatialvlm.data.collate import LossWeighting, Prepared, collate, denominator
from spatialvlm.data.lengths import LengthTable
from spatialvlm.data.plan import PackingArgs, plan_step
from spatialvlm.data.prefix import common_prefix
from spatialvlm.data.prepare import SampleEncoder, check_length
from spatialvlm.data.sample import PackPlan, Shares, StepPlan, World
from spatialvlm.data.workers import Report, WorkerPool
from spatialvlm.errors import DataError, StateError
from spatialvlm.typing import Batch, CostCoefficients, ModalityFlags

if TYPE_CHECKING:
    from spatialvlm.data.mixture import Mixture
    from spatialvlm.data.sample import DrawArray, LengthArray

STATE_VERSION = 1


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


class PackTask(NamedTuple):
    """What a worker needs to build one pack."""

    pack: PackPlan
    tokens: tuple[int, ...]
    """Planned tokens per draw."""
    flags: ModalityFlags


@dataclass(frozen=True)
class PackBuilder:
    """Plans of packs -> batches; sent to every worker once."""

    encoder: SampleEncoder
    loss_weighting: LossWeighting
    align: int

    def __call__(self, task: PackTask, report: Report = lambda _: None) -> Batch:
        """Read, decode and collate one pack.

        Raises:
            DataError: A sample cannot be read, or has another length than planned.
        """
        samples: list[Prepared] = []
        first = {group[0] for group in task.pack.groups}
        for index, draw in enumerate(task.pack.draws):
            report(f"{self.encoder.indices[draw.source].uid(draw.row)} (position {draw.position})")
            sample = self.encoder.prepare(draw, pixels=index in first)
            check_length(sample.uid, task.tokens[index], sample.encoded)
            samples.append(sample)
        for group in task.pack.groups:
            if len(group) > 1 and not common_prefix([samples[i].encoded for i in group]):
                raise DataError(
                    f"{samples[group[0]].uid} and {samples[group[1]].uid} were planned as one group but do not start "
                    "alike; their rows or media changed. Rebuild the index"
                )
        return collate(
            samples,
            task.pack.groups,
            flags=task.flags,
            position_rows=self.encoder.layout.num_position_rows,
            loss_weighting=self.loss_weighting,
            align=self.align,
            pad_id=self.encoder.template.pad_id,
        )


class StepLoader:
    """Yields :class:`StepBatches` from the position of its state to the end of the order.

    Args:
        mixture: The order.
        lengths: Sizes of rows; holds the encoder.
        cost: FLOPs coefficients that balance the ranks.
        world: Rank and number of ranks.
        packing: Limits of packs and groups.
        global_batch_size: Samples per step over all ranks.
        loss_weighting: See :func:`~spatialvlm.data.collate.token_weight`.
        align: Packs are padded to a multiple of this.
        tail: The last incomplete step is dropped, or filled by drawing on.
        num_workers: Processes that build packs; 0 = in this process.
        prefetch_steps: Steps that are built ahead.
        prefetch_mb: Memory of finished packs that wait.
        timeout_s: Longest time for one pack.
        state: From :meth:`state_dict` of an equal order.

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
        global_batch_size: int,
        loss_weighting: LossWeighting = "token",
        align: int = 1,
        tail: Literal["drop", "pad"] = "drop",
        num_workers: int = 0,
        prefetch_steps: int = 1,
        prefetch_mb: int = 2048,
        timeout_s: float = 120.0,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.mixture, self.lengths, self.cost = mixture, lengths, cost
        self.world, self.packing = world, packing
        self.global_batch_size = global_batch_size
        self.loss_weighting: LossWeighting = loss_weighting
        self.tail = tail
        self.prefetch_steps = prefetch_steps
        self.builder = PackBuilder(lengths.encoder, loss_weighting, align)
        self.pool: WorkerPool | None = None
        if num_workers:
            self.pool = WorkerPool(
                _work,
                self.builder,
                num_workers,
                timeout_s=timeout_s,
                max_ready_bytes=prefetch_mb << 20,
            )
        self._position, self._step = 0, 0
        if state:
            self._restore(state)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run, those already done included."""
        left = self.mixture.length - self._position
        return self._step + (
            -(-left // self.global_batch_size)
            if self.tail == "pad"
            else left // self.global_batch_size
        )

    def plan(self, position: int, step: int) -> tuple[StepPlan, DrawArray, LengthArray]:
        """The plan of the step that starts at a position; equal on every rank."""
        draws = self.mixture.draws(position, position + self.global_batch_size)
        sizes = self.lengths.lookup(draws)
        plan = plan_step(draws, sizes, self.cost, self.world.size, self.packing, step=step)
        return plan, draws, sizes

    def __iter__(self) -> Iterator[StepBatches]:
        pending: deque[_Pending] = deque()
        position, step, last = self._position, self._step, self.num_steps
        try:
            while True:
                asked = time.perf_counter()
                while step < last and len(pending) <= (self.prefetch_steps if self.pool else 0):
                    pending.append(self._submit(position, step))
                    position, step = position + self.global_batch_size, step + 1
                if not pending:
                    return
                ready = self._collect(pending.popleft(), asked)
                self._position = ready.plan.positions.stop
                self._step = ready.plan.step + 1
                yield ready
        finally:
            self.close()

    def state_dict(self) -> dict[str, Any]:
        """Position behind the last yielded step; everything else follows from the order."""
        return {
            "version": STATE_VERSION,
            "position": self._position,
            "step": self._step,
            "order": self.mixture.fingerprint,
            "parts": dict(self.mixture.parts),
            "world": self.world.size,
        }

    def close(self) -> None:
        """Stop the workers."""
        if self.pool is not None:
            self.pool.close()

    def _restore(self, state: Mapping[str, Any]) -> None:
        if state["version"] > STATE_VERSION:
            raise StateError(
                f"the loader state has version {state['version']}, this program reads up to {STATE_VERSION}; "
                "resume with the newer program"
            )
        if state["order"] != self.mixture.fingerprint:
            self.mixture.check_state(state["parts"])
        self._position, self._step = int(state["position"]), int(state["step"])

    def _submit(self, position: int, step: int) -> _Pending:
        plan, draws, sizes = self.plan(position, step)
        planned = dict(zip(draws["position"].tolist(), sizes["tokens"].tolist(), strict=True))
        labels = dict(zip(draws["position"].tolist(), sizes["label_tokens"].tolist(), strict=True))
        own = [packs[self.world.rank] for packs in plan.packs]
        tasks = [
            PackTask(pack, tuple(planned[draw.position] for draw in pack.draws), flags)
            for pack, flags in zip(own, plan.flags, strict=True)
        ]
        own_labels = [labels[draw.position] for pack in own for draw in pack.draws]
        tickets = [self.pool.submit(task) for task in tasks] if self.pool else []
        return _Pending(plan, self.shares(draws, sizes), own_labels, tasks, tickets)

    def _collect(self, pending: _Pending, asked: float) -> StepBatches:
        if self.pool:
            batches = [_from_numpy(self.pool.get(ticket)) for ticket in pending.tickets]
        else:
            batches = [self.builder(task) for task in pending.tasks]
        return StepBatches(
            batches=batches,
            denominator_local=denominator(pending.own_labels, self.loss_weighting),
            label_tokens=sum(pending.own_labels),
            plan=pending.plan,
            shares=pending.shares,
            wait_s=time.perf_counter() - asked,
        )

    def shares(self, draws: DrawArray, sizes: LengthArray) -> Shares:
        """Realised samples, tokens, label tokens and patches of some draws."""
        columns = {
            "samples": (sizes["tokens"] > 0).astype(np.int64),
            "tokens": sizes["tokens"],
            "label_tokens": sizes["label_tokens"],
            "patches": sizes["patches"],
        }
        counts: dict[str, dict[str, int]] = {name: {} for name in columns}
        for source in np.unique(draws["source"]).tolist():
            index = self.lengths.encoder.indices[source]
            mine = draws["source"] == source
            names = [f"family/{index.source.family}", f"source/{index.source.name}"]
            capability = np.asarray(index.column("capability"))[draws["row"][mine]]
            for name, values in columns.items():
                own = values[mine]
                for key in names:
                    counts[name][key] = counts[name].get(key, 0) + int(own.sum())
                for code in np.unique(capability[capability >= 0]).tolist():
                    key = f"capability/{index.capabilities[code]}"
                    total = int(own[capability == code].sum())
                    counts[name][key] = counts[name].get(key, 0) + total
        return Shares(**counts)


@dataclass(frozen=True, slots=True)
class _Pending:
    plan: StepPlan
    shares: Shares
    own_labels: Sequence[int]
    tasks: Sequence[PackTask]
    tickets: Sequence[int]


def _work(builder: PackBuilder, task: PackTask, report: Report) -> dict[str, Any]:
    """Build a pack in a worker; tensors travel as arrays."""
    batch = builder(task, report)
    return {
        key: value.numpy() if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
    }


def _from_numpy(arrays: dict[str, Any]) -> Batch:
    tensors = {
        key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        for key, value in arrays.items()
    }
    return cast("Batch", tensors)
