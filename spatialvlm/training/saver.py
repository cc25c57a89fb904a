"""When to save, and what to do when saving fails."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from spatialvlm.errors import CheckpointError
from spatialvlm.training.checkpoint import CheckpointStore, Snapshot
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
        after: Called on rank 0 after every save (``run.json``, report).
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
        after: Callable[[TrainState, Path], None] | None = None,
        export_every: int | None = None,
        export: Callable[[Engine, Path, Path], None] | None = None,
    ) -> None:
        self.store = store
        self.snapshot = snapshot
        self.every = every
        self.every_s = every_s
        self.on_error = on_error
        self.after = after
        self.export_every = export_every
        self.export = export
        self.stall_s = 0.0
        """Time spent saving since it was last read."""
        self.last_step = -1
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

    def __call__(self, state: TrainState, engine: Engine, *, final: bool = False) -> None:
        """Save now.

        Args:
            state: Counters of the run.
            engine: Source of the slices.
            final: The run ends after this: a failure is raised whatever ``on_error`` says.

        Raises:
            CheckpointError: Not written, and no more tries are left.
        """
        if state.step == self.last_step:
            return
        started = time.monotonic()
        try:
            path = self.store.save(state.step, engine, self.snapshot(state))
        except CheckpointError as error:
            self._failures += 1
            if final or self.on_error == "stop" or self._failures > 2:
                raise
            self._retry_at = state.step + self._failures
            if self.store.processes.is_main:
                sys.stderr.write(
                    f"{error}\nTraining goes on; next try after step {self._retry_at}.\n"
                )
            return
        finally:
            self.stall_s += time.monotonic() - started
        self._failures = 0
        self._retry_at = None
        self._last = time.monotonic()
        self.last_step = state.step
        if self.after is not None and self.store.processes.is_main:
            self.after(state, path)
        if self.export is not None and self._export_due(state):
            self.export(engine, path, self.store.folder.parent / "exports" / path.name)

    def take_stall(self) -> float:
        """Seconds spent saving since the last call."""
        stall, self.stall_s = self.stall_s, 0.0
        return stall
