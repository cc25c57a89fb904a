"""Collects what the loop produces and hands it on: log lines, spikes, skipped steps, progress."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spatialvlm.errors import NonFiniteError
from spatialvlm.training.distributed import Processes, StepHeader
from spatialvlm.training.guard import Guard
from spatialvlm.training.metrics import Meter, PackSize, pack_size
from spatialvlm.training.progress import Progress
from spatialvlm.training.saver import Saver
from spatialvlm.training.state import RunFolder, TrainState
from spatialvlm.training.trackers import Trackers, append_json
from spatialvlm.typing import Batch, CostCoefficients, LossOutput

if TYPE_CHECKING:
    from spatialvlm.training.loop import FetchedStep

FIRST_STEPS = 5
"""Steps of every attempt that are logged one by one."""


class Recorder:
    """Rank-local accumulation, one reduction per log line, files on rank 0.

    Args:
        processes: Ranks.
        meter: Interval counts and loss sums.
        trackers: Sinks, on rank 0 only.
        progress: What the user sees, on rank 0 only.
        guard: Spike rule.
        folder: Run folder.
        log_every: Steps between log lines.
        cost: FLOPs of the model without recomputation; ``None`` = not known.
        save: Its stall time goes into the log line.
        faults: Broken samples of this rank so far, by reason.
        max_grad_norm: For the share of clipped steps.
    """

    def __init__(
        self,
        processes: Processes,
        meter: Meter,
        *,
        trackers: Trackers | None,
        progress: Progress | None,
        guard: Guard,
        folder: RunFolder,
        log_every: int,
        total_steps: int,
        cost: CostCoefficients | None,
        save: Saver,
        max_grad_norm: float,
        faults: Callable[[], Mapping[str, int]] = dict,
    ) -> None:
        self.processes = processes
        self.meter = meter
        self.trackers = trackers
        self.progress = progress
        self.guard = guard
        self.folder = folder
        self.log_every = log_every
        self.total_steps = total_steps
        self.cost = cost
        self.save = save
        self.max_grad_norm = max_grad_norm
        self.faults = faults
        self.last: dict[str, float] = {}
        """Scalars of the newest log line."""
        self._first: int | None = None
        self._uids: list[list[str]] = []
        self._finite: list[Tensor] = []
        self._ratio_finite: list[tuple[list[str], Tensor]] = []
        self._window: list[tuple[int, list[list[str]]]] = []
        self._shares: dict[str, dict[str, float]] = {}
        self._epochs: dict[str, float] = {}
        self._notes: Counter[str] = Counter()
        self._started = time.perf_counter()

    def due(self, step: int) -> bool:
        """Whether step ``step`` (from 0) ends a log interval; equal on all ranks."""
        first = step if self._first is None else self._first
        done = step + 1
        return step - first < FIRST_STEPS or done % self.log_every == 0 or done == self.total_steps

    def start_step(self, step: FetchedStep, head: StepHeader) -> None:
        """A fetched step is about to be trained on."""
        interval = self.meter.interval
        interval.wait_s += step.wait_s
        interval.packs += len(step.batches)
        for batch in step.batches:
            size = pack_size(batch)
            self._count(size)
        self._add_shares(step.source)
        self.meter.sums.start_step(head.denominator)
        self._uids = [list(batch["uids"]) for batch in step.batches]
        self._finite = []
        self._clock = time.perf_counter()

    def _count(self, size: PackSize) -> None:
        interval = self.meter.interval
        interval.samples += size.samples
        interval.tokens += size.tokens
        interval.allocated += size.allocated
        interval.label_tokens += size.label_tokens
        interval.saved += size.saved
        if self.cost is not None:
            interval.flops += size.flops(self.cost)

    def _add_shares(self, source: Any) -> None:
        shares = getattr(source, "shares", None)
        self._epochs = dict(getattr(shares, "epochs", None) or {})
        self._notes.update(getattr(shares, "notes", None) or {})
        for unit in ("samples", "tokens", "label_tokens", "patches"):
            counts = getattr(shares, unit, None)
            if counts:
                own = self._shares.setdefault("labels" if unit == "label_tokens" else unit, {})
                for name, value in counts.items():
                    own[name] = own.get(name, 0.0) + value

    def add(self, out: LossOutput, batch: Batch) -> None:
        """One micro-step is done."""
        self.meter.sums.add(out, batch)
        self._finite.append(torch.isfinite(out.loss_sum.detach()))
        self._ratio_finite.append((batch["uids"], torch.isfinite(out.geometry_norm_ratio).all()))

    def end_backward(self) -> None:
        """All micro-steps are done; what follows is the optimizer's time."""
        if self.processes.device.type == "cuda":
            torch.cuda.synchronize(
                self.processes.device
            )  # the optimizer step waits for the same anyway
        now = time.perf_counter()
        self.meter.interval.compute_s += now - self._clock
        self._clock = now

    def end_step(
        self,
        state: TrainState,
        *,
        lrs: Mapping[str, float],
        norms: Mapping[str, Tensor] | None,
        applied: bool,
        empty: bool,
    ) -> None:
        """The step is over (``state.step`` counts it); writes a log line when one is due.

        Raises:
            NonFiniteError: The geometry branch gave NaN or Inf since the line before; names the samples.
        """
        done = state.step - 1
        if self._first is None:
            self._first = done
        interval = self.meter.interval
        interval.steps += 1
        interval.optimizer_s += time.perf_counter() - self._clock
        interval.empty += empty
        interval.skipped += not applied and not empty
        if norms is not None:
            interval.measured += 1
            interval.clipped += bool(norms["total"] > self.max_grad_norm)
        self._window.append((done, self._uids))
        if not applied and not empty:
            self._skipped(done, lrs, norms)
        if self.due(done):
            interval.stall_s += self.save.take_stall()
            self._line(state, lrs, norms)
        if self.progress is not None:
            self.progress.advance()

    def _line(
        self, state: TrainState, lrs: Mapping[str, float], norms: Mapping[str, Tensor] | None
    ) -> None:
        scalars, losses = self.meter.read(state.step, lrs=lrs, norms=norms, faults=self.faults())
        state.flops += self.meter.flops
        self._check_geometry(scalars)
        self._spikes(state, losses, scalars)
        scalars["spikes"] = float(state.spikes)
        state.wall_s += time.perf_counter() - self._started
        self._started = time.perf_counter()
        for unit, counts in self._shares.items():
            for kind in ("source", "family", "capability"):
                own = {n: v for n, v in counts.items() if n.startswith(kind + "/")}
                total = sum(own.values())
                scalars |= {
                    f"share/{unit}/{n.removeprefix('source/')}": v / total
                    for n, v in own.items()
                    if total
                }
        self._shares = {}
        scalars |= {f"data/epoch/{name}": value for name, value in self._epochs.items()}
        scalars |= {f"data/notes/{name}": float(value) for name, value in self._notes.items()}
        self.last = scalars
        if self.trackers is not None:
            self.trackers.log(state.step - 1, scalars)
        if self.progress is not None:
            self.progress.show(state.step, scalars)
        if self.processes.is_main:
            self.folder.record(state="running", step=state.step)

    def _check_geometry(self, scalars: Mapping[str, float]) -> None:
        """A frozen encoder gives the same NaN in every epoch, so skipping such a step would not help."""
        window, self._ratio_finite = self._ratio_finite, []
        ratio = scalars.get("geometry/norm_ratio", 0.0)
        if math.isfinite(ratio):
            return
        gathered = self.processes.gather([uids for uids, finite in window if not bool(finite)])
        packs = [
            f"{uids[:8]} on rank {rank}" for rank, found in enumerate(gathered) for uids in found
        ]
        raise NonFiniteError(
            f"geometry/norm_ratio is {ratio} in steps {self._window[0][0]}-{self._window[-1][0]}: geometry encoder, "
            f"vision encoder or fusion gave NaN or Inf for samples {'; '.join(packs[:4])}. Look at their frames, remove their entries "
            "from geometry.cache.dir, set geometry.precision to fp32, or lower optim.geometry_lr."
        )

    def _spikes(self, state: TrainState, losses: list[float], scalars: Mapping[str, float]) -> None:
        norms = {
            k.removeprefix("grad_norm/"): v
            for k, v in scalars.items()
            if k.startswith("grad_norm/")
        }
        for i, ((step, uids), loss) in enumerate(zip(self._window, losses, strict=True)):
            newest = i + 1 == len(losses)
            found = self.guard.spikes(step, loss, norms if newest else {})
            if found:
                state.spikes += 1
                gathered = self.processes.gather(uids)
                if self.processes.is_main:
                    record = {
                        "step": step,
                        "what": found,
                        "loss": loss,
                        "norms": norms,
                        "uids": gathered,
                    }
                    append_json(self.folder.path / "spikes.jsonl", record)
        self._window = []

    def _skipped(
        self, step: int, lrs: Mapping[str, float], norms: Mapping[str, Tensor] | None
    ) -> None:
        finite = [bool(value) for value in self._finite]
        gathered = self.processes.gather((self._uids, finite))
        if not self.processes.is_main:
            return
        for rank, (uids, flags) in enumerate(gathered):
            for micro_step, ok in enumerate(flags):
                record = {
                    "step": step,
                    "rank": rank,
                    "micro_step": micro_step,
                    "loss_finite": ok,
                    "uids": uids[micro_step],
                    "norms": {k: str(float(v)) for k, v in (norms or {}).items()},
                    "lr": dict(lrs),
                    "last_losses": [round(v, 6) for v in list(self.guard.losses)[-20:]],
                }
                append_json(self.folder.path / "nonfinite.jsonl", record)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What happens inside is no training: it counts for the speed of the interval, not for ``step_s``."""
        started = time.perf_counter()
        yield
        self.meter.interval.pause_s += time.perf_counter() - started

    def evaluation(self, state: TrainState, scalars: Mapping[str, float]) -> None:
        """Scalars of an evaluation at this step border."""
        if self.trackers is not None and scalars:
            self.trackers.log(state.step - 1, scalars)
