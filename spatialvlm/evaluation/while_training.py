"""Benchmarks between two training steps: same prompts, engine and scorers as a full evaluation.

Training is not disturbed: random states are put back, the model returns to its training mode, and nothing of the
optimizer or the loader is touched, so the losses of a run are the same with and without this.
"""

import json
import math
import random
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from spatialvlm.errors import SpatialVLMError
from spatialvlm.evaluation.asks import limited, make_asks
from spatialvlm.evaluation.generate import Generator, Place, answer, merge
from spatialvlm.evaluation.predictions import read_predictions
from spatialvlm.evaluation.schema import Benchmark
from spatialvlm.evaluation.scoring import score, write_result

T = TypeVar("T")


class Ranks(Protocol):
    """The processes of a run."""

    rank: int
    size: int

    def barrier(self) -> None:
        """Wait for all."""

    def gather(self, value: T) -> list[T]:
        """``value`` of every rank, on every rank."""

    def on_main(self, function: Callable[[], T]) -> T:
        """Run on rank 0, return the result on every rank."""


class HasStep(Protocol):
    """A training state."""

    step: int


class HoldsWeights(Protocol):
    """A training engine."""

    def whole_weights(self) -> AbstractContextManager[Any]:
        """Whole weights on every rank; entered and left by all ranks."""


def together(
    *functions: Callable[[Any, Any], dict[str, float]] | None,
) -> Callable[[Any, Any], dict[str, float]] | None:
    """One evaluation function that returns the scalars of several; ``None`` if all are ``None``."""
    present = [function for function in functions if function is not None]
    if not present:
        return None

    def run(state: Any, engine: Any) -> dict[str, float]:
        scalars: dict[str, float] = {}
        for function in present:
            scalars |= function(state, engine)
        return scalars

    return run


class BenchmarkProbe:
    """An evaluation function for the training loop.

    Args:
        benchmarks: What is asked.
        generator: Benchmark -> generator over the model that is being trained.
        folder: ``eval/`` of the run; receives ``step_<n>/<benchmark>/``.
        ranks: All of them answer a share.
        max_samples: Items per benchmark, stratified by question type.
        batch_size: Prompts generated together.
        allow_absolute: Accept absolute media paths.
        restore: Puts the model back into training mode.
        select: Benchmark whose headline marks the best step.
        on_best: Called on rank 0 when ``select`` has a new best, for example to export the model.
    """

    def __init__(
        self,
        benchmarks: Sequence[Benchmark],
        generator: Callable[[Benchmark], Generator],
        folder: Path,
        ranks: Ranks,
        *,
        max_samples: int = 512,
        batch_size: int = 16,
        allow_absolute: bool = False,
        restore: Callable[[], None] = lambda: None,
        select: str | None = None,
        on_best: Callable[[], Any] = lambda: None,
    ) -> None:
        self.benchmarks, self.generator = list(benchmarks), generator
        self.folder, self.ranks = folder, ranks
        self.max_samples, self.batch_size = max_samples, batch_size
        self.allow_absolute = allow_absolute
        self.restore, self.select, self.on_best = restore, select, on_best

    def __call__(self, state: HasStep, engine: HoldsWeights) -> dict[str, float]:
        """``eval/<benchmark>`` and ``eval/<benchmark>/<question type>`` in percent, ``evaluation/pause_s`` of the pause.

        Where the engine shards the weights (ZeRO-3, FSDP2) they are gathered once for the pause.
        """
        start = time.perf_counter()
        with engine.whole_weights():
            scalars = self._all(state.step)
            if self.select is not None:
                value = scalars[f"eval/{self.select}"]
                lower = next(
                    b.spec.lower_is_better for b in self.benchmarks if b.spec.name == self.select
                )
                self.ranks.on_main(lambda: self._mark(state.step, value, lower=lower))
        return scalars | {"evaluation/pause_s": time.perf_counter() - start}

    def _all(self, step: int) -> dict[str, float]:
        """Scalars of every benchmark; random states and modes are as before."""
        import torch

        states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        scalars: dict[str, float] = {}
        try:
            for benchmark in self.benchmarks:
                scalars |= self._one(benchmark, step)
        finally:
            self.restore()
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
            torch.set_rng_state(states[2])
            if cuda:
                torch.cuda.set_rng_state_all(cuda)
        return scalars

    def _one(self, benchmark: Benchmark, step: int) -> dict[str, float]:
        name = benchmark.spec.name
        folder = self.folder / f"step_{step:08d}" / name
        # Answers of an earlier attempt at this step were made with other weights.
        self.ranks.on_main(lambda: shutil.rmtree(folder, ignore_errors=True))
        self.ranks.barrier()
        items = limited(benchmark.items, self.max_samples)
        asks = make_asks(benchmark, items, protocol="official", allow_absolute=self.allow_absolute)
        problem: SpatialVLMError | None = None
        try:
            answer(
                benchmark,
                asks,
                self.generator(benchmark),
                folder,
                place=Place(self.ranks.rank, self.ranks.size),
                batch_size=self.batch_size,
                num_workers=1,
                quiet=True,
            )
        except SpatialVLMError as error:
            problem = error
        # All ranks fail together, else the others would wait for one that has left.
        problem = next((e for e in self.ranks.gather(problem) if e is not None), None)
        if problem is not None:
            raise problem

        def finish() -> dict[str, float]:
            predictions, _ = read_predictions(merge(folder, asks))
            result = score(benchmark, predictions, allow_partial=True)
            write_result(result, folder)
            found = {f"eval/{name}": result.headline["value"]}
            return found | {f"eval/{name}/{k}": row["value"] for k, row in result.per_type.items()}

        return self.ranks.on_main(finish)

    def _mark(self, step: int, value: float, *, lower: bool) -> None:
        """Keep ``best.json``: the step with the highest headline so far, the lowest if it is an error."""
        if math.isnan(value):  # not one readable answer
            return
        path = self.folder / "best.json"
        before: Mapping[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        # A replayed step after a resume is not a new best; an equal value keeps the earlier step.
        worse = before and (before["value"] <= value if lower else before["value"] >= value)
        if worse or (before and before["step"] == step):
            return
        self.on_best()
        text = json.dumps({"step": step, "benchmark": self.select, "value": value})
        partial = path.with_suffix(".tmp")
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(path)
