"""Run one function over many parts: in this process, in a pool of processes, or on a ray cluster.

Results come back in any order; nothing written to disk depends on it.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Literal, TypeVar

from spatialvlm.errors import BackendUnavailableError, SynthesisError

Executor = Literal["serial", "process", "ray"]
Item = TypeVar("Item")
Result = TypeVar("Result")

_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def run_parts(
    executor: Executor, workers: int, function: Callable[[Item], Result], items: Sequence[Item]
) -> Iterator[Result]:
    """Yield ``function(item)`` for every item as soon as it is done.

    Args:
        executor: ``serial``, ``process`` (spawned pool, one BLAS thread each) or ``ray``.
        workers: Processes of the pool, or most tasks in flight on the cluster.
        function: Importable by name, because other processes load it.
        items: Its arguments.

    Raises:
        BackendUnavailableError: ``ray`` is not installed.
    """
    if executor == "serial" or (executor == "process" and (workers == 1 or len(items) < 2)):
        yield from map(function, items)
    elif executor == "process":
        yield from _run_processes(workers, function, items)
    else:
        yield from _run_ray(workers, function, items)


def _run_processes(
    workers: int, function: Callable[[Item], Result], items: Sequence[Item]
) -> Iterator[Result]:
    before = {name: os.environ.get(name) for name in _ONE_THREAD}
    os.environ.update(_ONE_THREAD)
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        min(workers, len(items)), mp_context=context, initializer=_end_with_parent
    )
    try:
        for future in as_completed([pool.submit(function, item) for item in items]):
            yield future.result()
        pool.shutdown()
    except BrokenProcessPool as error:
        raise SynthesisError(
            "a worker process died (killed by the system, mostly for memory). Finished parts are kept: run the "
            "same command again, with fewer workers if memory was short."
        ) from error
    finally:
        # After an exception or a signal: what runs is dropped, so that nothing goes on behind the caller's back.
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        pool.shutdown(cancel_futures=True)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _end_with_parent() -> None:
    """In a worker: end when the process that started it is gone; workers of a killed run would wait forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_separately(function: Callable[[Item], Result], item: Item) -> Result:
    """``function(item)`` in a new process; its exception is raised here.

    Raises:
        SynthesisError: The process died.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_end_with_parent) as pool:
        try:
            return pool.submit(function, item).result()
        except BrokenProcessPool as error:
            raise SynthesisError(
                f"{item}: the process died (killed by the system, mostly for memory). Use fewer workers or "
                "fewer frames."
            ) from error


def _run_ray(
    workers: int, function: Callable[[Item], Result], items: Sequence[Item]
) -> Iterator[Result]:
    try:
        import ray
    except ImportError as error:
        raise BackendUnavailableError(
            "executor 'ray' needs the ray package: pip install -e '.[ray]'"
        ) from error
    started = not ray.is_initialized()
    if started:
        ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False)
    try:
        # Ray takes plain functions only, and `function` may be a partial.
        remote = ray.remote(num_cpus=1)(lambda item: function(item))
        waiting = list(items)
        running = [remote.remote(waiting.pop(0)) for _ in range(min(workers, len(waiting)))]
        while running:
            done, running = ray.wait(running)
            yield ray.get(done[0])
            if waiting:
                running.append(remote.remote(waiting.pop(0)))
    finally:
        if started:
            ray.shutdown()
