"""Teacher-forced loss on held-out sources at step borders; the same packs every time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from spatialvlm.errors import DataError
from spatialvlm.training.distributed import Processes
from spatialvlm.training.engines import Engine
from spatialvlm.training.loop import Fetcher
from spatialvlm.training.loss import LossSums
from spatialvlm.training.state import TrainState


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
        """``eval/loss``, ``eval/loss/<source>``, ``eval/token_acc`` over all held-out steps.

        Raises:
            DataError: A held-out sample cannot be read.
        """
        del state
        loader = self.make_loader()
        capabilities = tuple(loader.lengths.encoder.capabilities)
        sums = LossSums(self.sources, self.families, capabilities, self.processes.device)
        fetcher = Fetcher(loader, self.processes.device)
        engine.model.eval()
        for _ in range(loader.num_steps):
            step = fetcher.fetch()
            if step.error is not None:
                raise DataError(f"evaluation.sources: {step.error}") from step.error
            sums.start_step(step.denominator)
            for batch in step.batches:
                sums.add(engine(batch), batch)
        loader.close()
        self.restore_mode()
        denominators = torch.tensor(sums.denominators, dtype=torch.float64).to(
            self.processes.device
        )
        sums.denominators = self.processes.sum(denominators).tolist()
        _, scalars = sums.read(self.processes.sum(sums.flat()).cpu())
        return {
            "eval/" + name.replace("loss/source/", "loss/"): value
            for name, value in scalars.items()
        }
