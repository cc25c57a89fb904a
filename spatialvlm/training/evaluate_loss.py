"""Teacher-forced loss on held-out sources at step borders; the same packs every time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spatialvlm.errors import USER_ERRORS, DataError, SpatialVLMError
from spatialvlm.training.distributed import Processes
from spatialvlm.training.engines import Engine
from spatialvlm.training.loop import Fetcher
from spatialvlm.training.loss import LossSums
from spatialvlm.training.state import TrainState
from spatialvlm.typing import Batch, LossOutput


class HeldOutLoss:
    """An evaluation function for the loop.

    Args:
        make_loader: Builds a fresh loader over the held-out sources.
        processes: Ranks.
        sources: Names in the order of ``Batch.source_index``.
        families: Family of every source.
        restore_mode: Puts the model back into training mode, frozen parts excepted.
    """

    def __init__(
        self,
        make_loader: Callable[[], Any],
        processes: Processes,
        sources: tuple[str, ...],
        families: tuple[str, ...],
        restore_mode: Callable[[], None],
    ) -> None:
        self.make_loader = make_loader
        self.processes = processes
        self.sources = sources
        self.families = families
        self.restore_mode = restore_mode

    @torch.no_grad()
    def __call__(self, state: TrainState, engine: Engine) -> dict[str, float]:
        """``eval/loss``, ``eval/token_acc``, ``eval/answer_acc``, the first and last also by source.

        ``answer_acc`` is the share of samples all of whose supervised tokens are right, given the right ones before.

        Raises:
            DataError: A held-out sample cannot be read.
        """
        del state
        loader = self.make_loader()
        capabilities = tuple(loader.lengths.encoder.capabilities)
        sums = LossSums(self.sources, self.families, capabilities, self.processes.device)
        answers = AnswerCounts(self.sources, self.processes.device)
        fetcher = Fetcher(loader, self.processes.device)
        engine.model.eval()
        try:
            for _ in range(loader.num_steps):
                step = fetcher.fetch()
                raise_on_all(self.processes, step.error)
                sums.start_step(step.denominator)
                for batch in step.batches:
                    out = engine(batch)
                    sums.add(out, batch)
                    answers.add(out, batch)
            broken = torch.tensor(fetcher.broken(), dtype=torch.float64).to(self.processes.device)
            fetcher.check_budget(self.processes.sum(broken).tolist())
        finally:  # training goes on after a first failure
            self.restore_mode()
            loader.close()
        denominators = torch.tensor(sums.denominators, dtype=torch.float64).to(
            self.processes.device
        )
        sums.denominators = self.processes.sum(denominators).tolist()
        _, scalars = sums.read(self.processes.sum(sums.flat()).cpu())
        scalars |= answers.read(self.processes.sum(answers.counts).cpu())
        return {
            "eval/" + name.replace("loss/source/", "loss/"): value
            for name, value in scalars.items()
        }


def raise_on_all(processes: Processes, error: SpatialVLMError | None) -> None:
    """Every rank raises when one of them failed, so that nobody waits for it inside a sharded forward.

    Raises:
        DataError: With the message of the first rank that failed.
    """
    failed = torch.tensor([float(error is not None)], dtype=torch.float64).to(processes.device)
    if processes.sum(failed).item():
        first = next(e for e in processes.gather(error) if e is not None)
        raise DataError(f"evaluation.sources: {first}") from error


class Forgiving:
    """One failed evaluation is reported and training goes on; a second one in a row ends the run.

    Args:
        evaluate: Function of the loop; it fails on all ranks or on none.
        say: Tells the user.
    """

    def __init__(
        self,
        evaluate: Callable[[TrainState, Engine], dict[str, float]],
        say: Callable[[str], None],
    ) -> None:
        self.evaluate = evaluate
        self.say = say
        self._failed = False

    def __call__(self, state: TrainState, engine: Engine) -> dict[str, float]:
        """Scalars, empty after a failure.

        Raises:
            SpatialVLMError: The evaluation before this one failed too.
        """
        try:
            scalars = self.evaluate(state, engine)
        except USER_ERRORS as error:
            if self._failed:
                raise
            self._failed = True
            self.say(
                f"evaluation after step {state.step} failed, training goes on: {type(error).__name__}: {error}"
            )
            return {}
        self._failed = False
        return scalars


class AnswerCounts:
    """How many samples are right from the first to the last supervised token, by source.

    Args:
        sources: Names in the order of ``Batch.source_index``.
        device: Where the counts live.
    """

    def __init__(self, sources: tuple[str, ...], device: torch.device) -> None:
        self.sources = sources
        self.counts = torch.zeros(2, len(sources), dtype=torch.float64, device=device)
        """Right samples and all samples, ``[2, num_sources]``."""

    def add(self, out: LossOutput, batch: Batch) -> None:
        """Count one micro-batch."""
        if not batch["uids"]:
            return
        asked = out.sample_weight > 0
        right = asked & (out.sample_wrong == 0)
        self.counts.index_add_(1, batch["source_index"], torch.stack([right, asked]).double())

    def read(self, counts: Tensor) -> dict[str, float]:
        """Scalars from counts that were summed over ranks."""
        total = counts.sum(1).tolist()
        found = {"answer_acc": total[0] / total[1]} if total[1] else {}
        for name, right, asked in zip(self.sources, *counts.tolist(), strict=True):
            if asked:
                found[f"answer_acc/{name}"] = right / asked
        return found
