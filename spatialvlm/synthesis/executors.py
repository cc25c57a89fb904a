"""Run one function over many parts: in this process, in a pool of processes, or on a ray cluster.

Results come back in any order; nothing written to disk depends on it.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Literal, TypeVar

from spatialvlm.errors import BackendUnavailableError

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
    try:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(workers, len(items)), mp_context=context) as pool:
            for future in as_completed([pool.submit(function, item) for item in items]):
                yield future.result()
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _run_ray(
    workers: int, function: Callable[[Item], Result], items: Sequence[Item]
) -> Iterator[Result]:
    try:
        import ray
    except ImportError as error:
        raise BackendUnavailableError(
            "executor 'ray' needs the ray package: pip install spatialvlm[ray]"
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
