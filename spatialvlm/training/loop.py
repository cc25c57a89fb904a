"""The training loop. It exists once, here, for every stage, engine and device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from spatialvlm.errors import DataError, NonFiniteError, OutOfMemoryError, SpatialVLMError
from spatialvlm.models.device import to_device
from spatialvlm.training.distributed import Processes, StepHeader, exchange
from spatialvlm.training.engines import Engine
from spatialvlm.training.faults import fault_point
from spatialvlm.training.guard import Guard
from spatialvlm.training.optim import Schedule, set_lrs
from spatialvlm.training.recorder import Recorder
from spatialvlm.training.saver import Saver
from spatialvlm.training.signals import StopFlag
from spatialvlm.training.state import TrainState
from spatialvlm.training.trace import explain_non_finite
from spatialvlm.training.watchdog import Watchdog
from spatialvlm.typing import Batch

EvalFn = Callable[[TrainState, Engine], dict[str, float]]
"""Called at step borders on all ranks; returns scalars for the log."""
Outcome = Literal["finished", "preempted"]


@dataclass(frozen=True, slots=True)
class Run:
    """What stays the same from the first step to the last."""

    processes: Processes
    schedule: Schedule
    stop_after_steps: int | None = None
    """Save and leave after this many steps of this process."""
    eval_every: int | None = None
    expected_gb: float | None = None
    """Estimate of the memory per device, for the message when it is not enough."""

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.schedule.total_steps


def train(
    run: Run,
    state: TrainState,
    engine: Engine,
    steps: Fetcher,
    *,
    record: Recorder,
    save: Saver,
    guard: Guard,
    stop: StopFlag,
    watch: Watchdog,
    eval_fn: EvalFn | None = None,
) -> Outcome:
    """Train until the last step, or until any rank is asked to stop.

    The gradient of a step is ``sum(w * cross entropy) / D`` with ``D`` summed over ranks and micro-steps
    before the first forward, so it does not depend on packing, accumulation, or world size. Engines average
    over ranks, hence the factor ``world size / D``.

    Raises:
        DataError: The data path failed on any rank; all ranks raise together.
        NonFiniteError: Too many steps had non-finite gradients, or the geometry branch gave NaN or Inf.
        CheckpointError: Checkpoints cannot be written any more.
        OutOfMemoryError: The device ran out of memory.
    """
    first_step = state.step
    while state.step < run.total_steps:
        watch.at(state.step, "data")
        fault_point("loop.data", step=state.step, rank=run.processes.rank)
        step = steps.fetch()
        if run.stop_after_steps is not None and state.step - first_step >= run.stop_after_steps:
            stop.request("run.stop_after_steps")
        watch.at(state.step, "exchange")
        head = exchange(run.processes, _header(step, steps, stop, save))
        _raise_together(run.processes, head, step)
        steps.check_budget(head.broken)
        if head.written == run.processes.size:
            watch.at(state.step, "save")
            save.complete(state)
        if head.stop:
            watch.at(state.step, "save")
            save(state, engine, final=True)
            return "preempted"

        lrs = set_lrs(engine.optimizer, engine.groups, run.schedule.factor(state.step))
        record.start_step(step, head)
        empty = head.denominator == 0
        for i, batch in enumerate([] if empty else step.batches):
            last = i + 1 == len(step.batches)
            with engine.micro_step(last=last), _memory_errors_explained(run, state, batch):
                watch.at(state.step, "forward", i, batch["uids"])
                out = engine(batch)
                watch.at(state.step, "backward", i, batch["uids"])
                engine.backward(out.loss_sum * (run.processes.size / head.denominator))
            record.add(out, batch)

        record.end_backward()
        watch.at(state.step, "optimizer")
        norms = None if empty else engine.grad_norms(due=record.due(state.step))
        applied = not empty and engine.step(norms)
        done = state.step
        _advance(state, head, steps, applied=applied, empty=empty)
        watch.at(done, "log")
        record.end_step(state, lrs=lrs, norms=norms, applied=applied, empty=empty)
        try:
            guard.update(done, applied=applied, empty=empty)
        except NonFiniteError as error:
            if not guard.trace:
                raise
            raise explain_non_finite(error, engine, step.batches, run.processes) from error

        if save.due(state) or head.save_due:
            watch.at(done, "save")
            save(state, engine)
        if eval_fn is not None and run.eval_every and state.step % run.eval_every == 0:
            watch.at(done, "eval")
            with record.pause():
                record.evaluation(state, eval_fn(state, engine))
    return "finished"


def _header(step: FetchedStep, steps: Fetcher, stop: StopFlag, save: Saver) -> StepHeader:
    return StepHeader(
        denominator=step.denominator,
        label_tokens=float(step.label_tokens),
        samples=float(step.samples),
        tokens=float(step.tokens),
        packs=float(len(step.batches)),
        stop=float(bool(stop)),
        save_due=float(save.clock_due()),
        written=float(save.written()),
        fault=float(step.error is not None),
        broken=steps.broken(),
    )


def _raise_together(processes: Processes, head: StepHeader, step: FetchedStep) -> None:
    """A data fault on one rank ends all ranks with its message; so does a plan that differs between ranks."""
    if head.fault:
        errors = [e for e in processes.gather(step.error) if e is not None]
        raise errors[0]
    if head.packs != processes.size * len(step.batches):
        raise DataError(
            f"The ranks planned different numbers of micro-steps (here {len(step.batches)}, {head.packs:.0f} in all "
            f"on {processes.size} ranks). Check that every rank reads the same data files and index.",
            reason="plan",
        )


def _advance(
    state: TrainState, head: StepHeader, steps: Fetcher, *, applied: bool, empty: bool
) -> None:
    state.step += 1
    state.adam_step += applied
    state.skipped += not applied and not empty
    state.empty += empty
    state.samples += int(head.samples)
    state.tokens += int(head.tokens)
    state.label_tokens += int(head.label_tokens)
    state.loader = steps.state_dict()


class _memory_errors_explained:  # noqa: N801 - reads as a phrase in the with statement
    """Turns the device's out-of-memory error into one that names the step and the samples."""

    def __init__(self, run: Run, state: TrainState, batch: Batch) -> None:
        self.run = run
        self.state = state
        self.batch = batch

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        if isinstance(error, torch.OutOfMemoryError):
            peak = torch.cuda.max_memory_allocated() / 1e9
            expected = self.run.expected_gb
            planned = "" if expected is None else f" ({expected:.1f} GB were expected)"
            raise OutOfMemoryError(
                f"Out of memory in step {self.state.step}: pack of {self.batch['input_ids'].numel()} tokens, samples "
                f"{self.batch['uids'][:8]}, peak {peak:.1f} GB{planned}. Lower packing.max_tokens, turn on "
                "memory.checkpoint_language_model or memory.checkpoint_vision, or shard more (zero3, fsdp2). "
                "`--dry-run` prints the estimate."
            ) from error


@dataclass(slots=True)
class FetchedStep:
    """One optimizer step on this rank: batches on the device, or the error that prevented them."""

    batches: list[Batch]
    denominator: float = 0.0
    label_tokens: int = 0
    samples: int = 0
    tokens: int = 0
    wait_s: float = 0.0
    source: Any = None
    """The loader's ``StepBatches`` (plan, shares)."""
    error: SpatialVLMError | None = None


class Fetcher:
    """Pulls optimizer steps from the data path and moves them to the device.

    Args:
        loader: Iterable of ``StepBatches`` with ``state_dict()``; it prefetches by itself.
        device: Target of the tensors.
    """

    def __init__(self, loader: Any, device: torch.device) -> None:
        self.loader = loader
        self.device = device
        self._iterator: Iterator[Any] | None = None

    def fetch(self) -> FetchedStep:
        """Next step; an error of the data path is returned, not raised, so that all ranks can agree on it."""
        try:
            # Starting workers draws from the global generator; training must not notice.
            with torch.random.fork_rng(devices=[]):
                if self._iterator is None:
                    self._iterator = iter(self.loader)
                step = next(self._iterator, None)
        except SpatialVLMError as error:
            return FetchedStep([], error=error)
        if step is None:
            ended = "The data ended before the last planned step; rebuild the index."
            return FetchedStep([], error=DataError(ended, reason="plan"))
        real = [batch for batch in step.batches if batch["uids"]]
        return FetchedStep(
            batches=[to_device(batch, self.device) for batch in step.batches],
            denominator=float(step.denominator_local),
            label_tokens=int(step.label_tokens),
            samples=sum(len(batch["uids"]) for batch in real),
            tokens=sum(int(batch["segment_len"].sum()) for batch in real),
            wait_s=float(step.wait_s),
            source=step,
        )

    def broken(self) -> tuple[float, ...]:
        """Broken samples of this rank so far, by source."""
        return tuple(float(count) for count in self.loader.own_faults())

    def check_budget(self, broken: Sequence[float]) -> None:
        """Judge the broken samples of all ranks.

        Args:
            broken: :meth:`broken`, summed over ranks.

        Raises:
            BudgetError: Too many; the same on every rank.
        """
        self.loader.check_budget(np.array(broken, np.int64))

    def state_dict(self) -> dict[str, Any]:
        """Position after the last fetched step."""
        state: dict[str, Any] = self.loader.state_dict()
        return state
