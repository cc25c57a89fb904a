"""Worker processes with ordered results, no shared state, and an end that is always explained.

A worker says which sample it touches before it touches it; when it dies or hangs, the error names that
sample. Tasks are pure, so nothing is lost but time.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import signal
import threading
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
_POLL_S = 0.5
"""How often time limits are looked at."""
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

    A thread takes results from the workers as they come and hands out the next tasks, so that the workers
    go on while the caller computes.

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
    _wanted: int = -1
    """Ticket that :meth:`get` waits for."""
    _error: WorkerError | None = None
    _closing: bool = False
    _collector: threading.Thread | None = None
    _changed: threading.Condition = field(default_factory=threading.Condition)
    """Guards everything above."""

    def submit(self, task: Any) -> int:
        """Queue a task; the ticket fetches its result."""
        with self._changed:
            self._waiting.append((self._next, task))
            self._next += 1
            if self._collector is None:
                self._closing, self._error = False, None
                self._workers = [self._launch() for _ in range(self.num_workers)]
                # At exit the library would ask them to end with a signal, and they ignore it.
                atexit.register(self.close)
                self._collector = threading.Thread(target=self._collect, daemon=True)
                self._collector.start()
            self._start_tasks()
            return self._next - 1

    def get(self, ticket: int) -> Any:
        """Result of a task; waits for it.

        Raises:
            WorkerError: A worker died or ran out of time.
            SpatialVLMError: What the task raised.
        """
        with self._changed:
            self._wanted = ticket
            self._start_tasks()
            while ticket not in self._ready and self._error is None and self._collects():
                self._changed.wait(_POLL_S)
            self._wanted = -1
            done = self._ready.pop(ticket, None)
            self._start_tasks()
        if done is None:
            error = self._error or WorkerError("the loader was closed", reason="worker")
            self.close()
            raise error
        result, _ = done
        if isinstance(result, SpatialVLMError):
            raise result
        return result

    @property
    def ready_bytes(self) -> int:
        """Size of finished results that nobody fetched yet."""
        return sum(size for _, size in self._ready.values())

    def close(self) -> None:
        """Stop the workers and forget unfinished tasks."""
        atexit.unregister(self.close)
        with self._changed:
            self._closing = True
            self._waiting.clear()
        for worker in self._workers:
            worker.process.kill()
        if self._collector is not None:
            self._collector.join()
        for worker in self._workers:
            worker.process.join()
            worker.pipe.close()
        self._workers.clear()
        self._ready.clear()
        self._collector = None

    def _collects(self) -> bool:
        return self._collector is not None and self._collector.is_alive()

    def _start_tasks(self) -> None:
        full = self.ready_bytes > self.max_ready_bytes
        for worker in self._workers:
            if not self._waiting or worker.ticket >= 0:
                continue
            if full and self._waiting[0][0] != self._wanted:
                return
            worker.ticket, task = self._waiting.popleft()
            worker.since, worker.at = max(time.monotonic(), worker.since), ""
            with contextlib.suppress(BrokenPipeError):  # the collector sees that it died
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

    def _collect(self) -> None:
        """Thread: receive what the workers send until one fails or the pool is closed."""
        try:
            self._receive_all()
        except Exception as error:  # whoever waits for a result must not wait for a dead thread
            self._fail(
                f"what a loader worker sent cannot be read ({type(error).__name__}: {error}). If the workers run another "
                "version of a package, or a file system of this machine is full, start again; else report this",
                reason="worker",
            )
            raise

    def _receive_all(self) -> None:
        by_pipe = {worker.pipe: worker for worker in self._workers}
        while not self._closing and self._error is None:
            ready = wait(list(by_pipe), timeout=_POLL_S)
            for pipe in ready:
                assert isinstance(pipe, Connection)
                self._receive(by_pipe[pipe])
            self._check_time([by_pipe[pipe] for pipe in by_pipe if pipe not in ready])

    def _check_time(self, silent: list[_Worker]) -> None:
        for worker in silent:
            if worker.ticket >= 0 and time.monotonic() - worker.since > self.timeout_s:
                worker.process.kill()
                self._fail(
                    f"a loader worker spent more than loader.timeout_s={self.timeout_s} on one pack; it was at "
                    f"{worker.at or 'its start'}. Check that file, or raise the limit",
                    reason="timeout",
                )

    def _receive(self, worker: _Worker) -> None:
        try:
            kind, value, size = worker.pipe.recv()
        except (EOFError, ConnectionResetError):
            if self._closing:
                return
            worker.process.join(timeout=5)
            code = worker.process.exitcode
            cause = (
                f"signal {signal.Signals(-code).name}" if code and code < 0 else f"exit code {code}"
            )
            self._fail(
                f"a loader worker died ({cause}) while it read {worker.at or 'nothing yet'}. SIGKILL usually means the machine ran "
                "out of memory: lower loader.num_workers, loader.prefetch_mb or data.media.cache_mb",
                reason="worker",
            )
            return
        with self._changed:
            if kind == "at":
                if not worker.at:
                    worker.since = time.monotonic()
                worker.at = value
                return
            self._ready[worker.ticket] = (value, size)
            worker.ticket = -1
            self._start_tasks()
            self._changed.notify_all()

    def _fail(self, text: str, reason: str) -> None:
        with self._changed:
            self._error = WorkerError(text, reason=reason)
            self._changed.notify_all()


def _serve(pipe: Connection, work: Work, context: Any) -> None:
    """Main loop of a worker."""
    import torch

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        # A scheduler signals every process of a job; the run saves first and then ends its workers.
        signal.signal(number, signal.SIG_IGN)
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
