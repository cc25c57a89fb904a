"""When to save, and what to do when saving fails."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from spatialvlm.errors import CheckpointError
from spatialvlm.training.checkpoint import CheckpointStore, PendingSave, Snapshot
from spatialvlm.training.engines import Engine
from spatialvlm.training.state import TrainState


class Saver:
    """Writes checkpoints at step borders.

    Args:
        store: Where they go.
        snapshot: Current small state (counters, guard, config) as it is saved.
        every: Steps between checkpoints.
        every_s: Seconds between checkpoints in addition, on rank 0's clock.
        on_error: ``retry`` = warn and try again at later borders; ``stop`` = raise at once.
        background: Training goes on while a copy of the state is written; the save counts when all ranks are done.
        after: Called with the checkpoint on rank 0 after every save (``run.json``, report).
        export_every: Steps between exported model directories; each comes with a checkpoint.
        export: Writes one from a checkpoint, on all ranks.
    """

    def __init__(
        self,
        store: CheckpointStore,
        snapshot: Callable[[TrainState], Snapshot],
        *,
        every: int,
        every_s: float | None = None,
        on_error: Literal["retry", "stop"] = "retry",
        background: bool = False,
        after: Callable[[Path], None] | None = None,
        export_every: int | None = None,
        export: Callable[[Engine, Path, Path], None] | None = None,
    ) -> None:
        self.store = store
        self.snapshot = snapshot
        self.every = every
        self.every_s = every_s
        self.on_error = on_error
        self.background = background
        self.after = after
        self.export_every = export_every
        self.export = export
        self.stall_s = 0.0
        """Time spent saving since it was last read."""
        self.last_step = -1
        self._pending: PendingSave | None = None
        self._failures = 0
        self._retry_at: int | None = None
        self._last = time.monotonic()

    def due(self, state: TrainState) -> bool:
        """Whether the border after ``state.step`` steps asks for a checkpoint; equal on all ranks."""
        return (
            state.step % self.every == 0 or state.step == self._retry_at or self._export_due(state)
        )

    def _export_due(self, state: TrainState) -> bool:
        return self.export_every is not None and state.step % self.export_every == 0

    def clock_due(self) -> bool:
        """Whether rank 0's clock asks for one; travels in the step header."""
        if self.every_s is None or not self.store.processes.is_main:
            return False
        return time.monotonic() - self._last >= self.every_s

    def written(self) -> bool:
        """Whether this rank's files of a background save are on disk; travels in the step header."""
        return self._pending is not None and self._pending.files.done()

    def __call__(self, state: TrainState, engine: Engine, *, final: bool = False) -> None:
        """Save now, or start a background save; one that is still being written is waited for.

        Args:
            state: Counters of the run.
            engine: Source of the slices.
            final: The run ends after this: it is written on return, and a failure is raised whatever ``on_error`` says.

        Raises:
            CheckpointError: Not written, and no more tries are left.
        """
        self.complete(state)
        if state.step == self.last_step:
            return
        self._last = time.monotonic()
        export_due = self.export is not None and self._export_due(state)
        with self._failures_counted(state, final=final):
            self._pending = self.store.begin(
                state.step,
                engine,
                self.snapshot(state),
                background=self.background and not final and not export_due,
            )
        if not self.background or final or export_due:
            self.complete(state, final=final)
        if self.export is not None and export_due and state.step == self.last_step:
            path = self.store.path(state.step)
            self.export(engine, path, self.store.folder.parent / "exports" / path.name)

    def complete(self, state: TrainState, *, final: bool = False) -> None:
        """Wait until the save in flight is written and make it valid, on all ranks; without one nothing happens.

        Raises:
            CheckpointError: Not written, and no more tries are left.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        with self._failures_counted(state, final=final):
            self.store.commit(pending)
            self._failures, self._retry_at, self.last_step = 0, None, pending.step
        if (
            self.after is not None
            and self.last_step == pending.step
            and self.store.processes.is_main
        ):
            self.after(self.store.path(pending.step))

    @contextmanager
    def _failures_counted(self, state: TrainState, *, final: bool) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        except CheckpointError as error:
            self._failures += 1
            if final or self.on_error == "stop" or self._failures > 2:
                raise
            self._retry_at = state.step + self._failures
            if self.store.processes.is_main:
                sys.stderr.write(
                    f"{error}\nTraining goes on; next try after step {self._retry_at}.\n"
                )
        finally:
            self.stall_s += time.monotonic() - started

    def take_stall(self) -> float:
        """Seconds spent saving since the last call."""
        stall, self.stall_s = self.stall_s, 0.0
        return stall
