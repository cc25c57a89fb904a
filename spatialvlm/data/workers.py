"""Worker processes with ordered results, no shared state, and an end that is always explained.

A worker says which sample it touches before it touches it; when it dies or hangs, the error names that
sample. Tasks are pure, so nothing is lost but time.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from spatialvlm.errors import SpatialVLMError, WorkerError

Report = Callable[[str], None]
"""Called with the name of the sample that is about to be read."""
STARTUP_S = 60.0
"""Added to the time limit of a worker's first task, which waits for imports."""
Work = Callable[[Any, Any, Report], Any]
"""``work(context, task, report) -> result``; a module-level function."""


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    ticket: int = -1
    since: float = 0.0
    """When the task began; in the future while the worker starts."""
    at: str = ""


@dataclass
class WorkerPool:
    """Runs tasks in processes; results are fetched by ticket.

    Args:
        work: What a worker does with a task.
        context: Sent to every worker once.
        num_workers: At least 1.
        timeout_s: Longest time for one task.
        max_ready_bytes: No new task starts while finished results hold more than this, unless the
            result that is waited for is not among them.
    """

    work: Work
    context: Any
    num_workers: int
    timeout_s: float = 120.0
    max_ready_bytes: int = 2048 << 20
    _workers: list[_Worker] = field(default_factory=list)
    _waiting: deque[tuple[int, Any]] = field(default_factory=deque)
    _ready: dict[int, tuple[Any, int]] = field(default_factory=dict)
    _next: int = 0

    def submit(self, task: Any) -> int:
        """Queue a task; the ticket fetches its result."""
        self._waiting.append((self._next, task))
        self._next += 1
        self._start_tasks()
        return self._next - 1

    def get(self, ticket: int) -> Any:
        """Result of a task; waits for it.

        Raises:
            WorkerError: A worker died or ran out of time.
            SpatialVLMError: What the task raised.
        """
        while ticket not in self._ready:
            self._start_tasks(wanted=ticket)
            self._receive()
        result, _ = self._ready.pop(ticket)
        self._start_tasks()
        if isinstance(result, SpatialVLMError):
            raise result
        return result

    @property
    def ready_bytes(self) -> int:
        """Size of finished results that nobody fetched yet."""
        return sum(size for _, size in self._ready.values())

    def close(self) -> None:
        """Stop the workers and forget unfinished tasks."""
        for worker in self._workers:
            worker.pipe.close()
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join()
        self._workers.clear()
        self._waiting.clear()
        self._ready.clear()

    def _start_tasks(self, wanted: int = -1) -> None:
        if not self._workers and self._waiting:
            self._workers = [self._launch() for _ in range(self.num_workers)]
        full = self.ready_bytes > self.max_ready_bytes
        for worker in self._workers:
            if not self._waiting or worker.ticket >= 0:
                continue
            if full and self._waiting[0][0] != wanted:
                return
            worker.ticket, task = self._waiting.popleft()
            worker.since, worker.at = max(time.monotonic(), worker.since), ""
            worker.pipe.send(task)

    def _launch(self) -> _Worker:
        # Never fork a process that may have started CUDA or threads.
        methods = multiprocessing.get_context("forkserver")
        methods.set_forkserver_preload(["spatialvlm.data.loader"])
        ours, theirs = methods.Pipe()
        process = methods.Process(
            target=_serve, args=(theirs, self.work, self.context), daemon=True
        )
        process.start()
        theirs.close()
        return _Worker(process, ours, since=time.monotonic() + STARTUP_S)

    def _receive(self) -> None:
        """Wait for the next message of any worker."""
        busy = [worker for worker in self._workers if worker.ticket >= 0]
        deadline = min(worker.since for worker in busy) + self.timeout_s
        ready = wait([w.pipe for w in busy], timeout=max(deadline - time.monotonic(), 0))
        for worker in busy:
            if worker.pipe in ready:
                self._read(worker)
            elif time.monotonic() - worker.since > self.timeout_s:
                worker.process.kill()
                self.close()
                raise WorkerError(
                    f"a loader worker spent more than loader.timeout_s={self.timeout_s} on one pack; it was at "
                    f"{worker.at or 'its start'}. Check that file, or raise the limit",
                    reason="timeout",
                )

    def _read(self, worker: _Worker) -> None:
        try:
            kind, value, size = worker.pipe.recv()
        except (EOFError, ConnectionResetError):
            worker.process.join(timeout=5)
            code = worker.process.exitcode
            cause = (
                f"signal {signal.Signals(-code).name}" if code and code < 0 else f"exit code {code}"
            )
            self.close()
            raise WorkerError(
                f"a loader worker died ({cause}) while it read {worker.at or 'nothing yet'}. SIGKILL usually means the machine ran "
                "out of memory: lower loader.num_workers, loader.prefetch_mb or data.media.cache_mb",
                reason="worker",
            ) from None
        if kind == "at":
            if not worker.at:
                worker.since = time.monotonic()
            worker.at = value
            return
        self._ready[worker.ticket] = (value, size)
        worker.ticket = -1


def _serve(pipe: Connection, work: Work, context: Any) -> None:
    """Main loop of a worker."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"

    def report(name: str) -> None:
        pipe.send(("at", name, 0))

    while True:
        try:
            task = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            result = work(context, task, report)
        except SpatialVLMError as error:
            result = error
        pipe.send(("done", result, _num_bytes(result)))


def _num_bytes(result: Any) -> int:
    """Bytes of the arrays in a result: a dict of arrays, or a tuple that starts with one."""
    first = result[0] if isinstance(result, tuple) else result
    values = first.values() if isinstance(first, dict) else ()
    return sum(int(getattr(value, "nbytes", 0)) for value in values)
