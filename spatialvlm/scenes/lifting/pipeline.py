"""Overlapped stages: each runs in its own thread behind a bounded queue, results keep the input order.

While one stage works on batch 3, the one before it already works on batch 4. A slow stage holds the
others back through the queues, so memory stays bounded.
"""

import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from spatialvlm.errors import SceneError

CAPACITY = 2
"""Batches that wait between two stages."""
_END = object()


@dataclass(frozen=True)
class Stage:
    """One step of a pipeline.

    Args:
        name: Shown in errors.
        call: Takes a list of items, returns as many results.
        batch_size: Items per call.
    """

    name: str
    call: Callable[[list[Any]], list[Any]]
    batch_size: int = 1


@dataclass
class PipelineStats:
    """What happened: for tests and benchmarks."""

    calls: dict[str, int] = field(default_factory=dict)
    longest_queue: float = 0.0
    """Most batches that ever waited before one stage."""


class StageError(SceneError):
    """A stage failed; the message names the stage and the item."""


class _Cancelled(Exception):  # noqa: N818 - ends the other threads, is not an error
    pass


def run_stages(
    stages: Sequence[Stage],
    items: Iterable[Any],
    *,
    capacity: int = CAPACITY,
    stats: PipelineStats | None = None,
) -> list[Any]:
    """Run items through all stages, overlapped; the results are in the order of the items.

    Args:
        stages: First to last.
        items: Anything.
        capacity: Most batches that wait before a stage.
        stats: Filled when given.

    Raises:
        StageError: A stage failed; names the stage and the first item of the batch. The other stages
            stop after their current batch.
    """
    stats = stats or PipelineStats()
    batches = [stage.batch_size for stage in stages] + [1]
    queues: list[queue.Queue[Any]] = [queue.Queue(maxsize=capacity * size) for size in batches]
    cancelled = threading.Event()
    failures: list[StageError] = []

    def put(target: queue.Queue[Any], value: Any) -> None:
        while not cancelled.is_set():
            try:
                target.put(value, timeout=0.05)
            except queue.Full:
                continue
            waiting = target.qsize() * capacity / target.maxsize
            stats.longest_queue = max(stats.longest_queue, waiting)
            return
        raise _Cancelled

    def get(source: queue.Queue[Any]) -> Any:
        while not cancelled.is_set():
            try:
                return source.get(timeout=0.05)
            except queue.Empty:
                continue
        raise _Cancelled

    def work(stage: Stage, source: queue.Queue[Any], target: queue.Queue[Any]) -> None:
        waiting: list[tuple[int, Any]] = []
        ended = False
        try:
            while not (ended and not waiting):
                while not ended and len(waiting) < stage.batch_size:
                    received = get(source)
                    if received is _END:
                        ended = True
                    else:
                        waiting.append(received)
                batch, waiting = waiting[: stage.batch_size], waiting[stage.batch_size :]
                if batch:
                    results = _call(stage, batch, stats)
                    for (index, _), result in zip(batch, results, strict=True):
                        put(target, (index, result))
            put(target, _END)
        except _Cancelled:
            return
        except StageError as error:
            failures.append(error)
            cancelled.set()

    def feed() -> None:
        try:
            for index, item in enumerate(items):
                put(queues[0], (index, item))
            put(queues[0], _END)
        except _Cancelled:
            return

    threads = [threading.Thread(target=feed, daemon=True)]
    threads += [
        threading.Thread(target=work, args=(stage, queues[i], queues[i + 1]), daemon=True)
        for i, stage in enumerate(stages)
    ]
    for thread in threads:
        thread.start()
    results: list[Any] = []
    try:
        while (received := get(queues[-1])) is not _END:
            results.append(received[1])
    except _Cancelled:
        pass
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return results


def _call(stage: Stage, batch: list[tuple[int, Any]], stats: PipelineStats) -> list[Any]:
    """One call of a stage; any exception is reported with the stage and the item."""
    stats.calls[stage.name] = stats.calls.get(stage.name, 0) + 1
    try:
        results = stage.call([item for _, item in batch])
    except StageError:
        raise
    except Exception as error:
        raise StageError(
            f"lifting stage {stage.name!r} failed on item {batch[0][0]}: {type(error).__name__}: {error}"
        ) from error
    if len(results) != len(batch):
        raise StageError(
            f"lifting stage {stage.name!r} returned {len(results)} results for {len(batch)} items, "
            f"beginning with item {batch[0][0]}."
        )
    return results
