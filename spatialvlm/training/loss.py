"""Sums of one optimizer step and of a log interval; they stay on the device until a log line is due.

The loss of a step is ``sum(w * cross entropy) / D`` with ``D`` global over ranks and micro-steps. Means per
source or capability use the same weights, so they are exact whatever the packing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spatialvlm.typing import Batch, LossOutput


class LossSums:
    """Numerators and denominators by source and capability, plus token accuracy.

    Args:
        sources: Source names in the order of ``data.sources``, which ``Batch.source_index`` counts.
        families: Family of every source.
        capabilities: Capability names, sorted, which ``Batch.capability_index`` counts.
        device: Where the sums live.
    """

    def __init__(
        self,
        sources: tuple[str, ...],
        families: tuple[str, ...],
        capabilities: tuple[str, ...],
        device: torch.device,
    ) -> None:
        self.sources = sources
        self.families = families
        self.capabilities = capabilities
        self.device = device
        self.reset()

    def reset(self) -> None:
        """Start a new interval."""
        self.step_losses: list[Tensor] = []
        self.denominators: list[float] = []
        width = 2 * (len(self.sources) + 1 + len(self.capabilities) + 1)
        self._by_name = torch.zeros(width, dtype=torch.float64, device=self.device)
        self._counts = torch.zeros(4, dtype=torch.float64, device=self.device)

    def start_step(self, denominator: float) -> None:
        """Begin the sums of one optimizer step."""
        self.step_losses.append(torch.zeros((), dtype=torch.float64, device=self.device))
        self.denominators.append(denominator)

    @torch.no_grad()
    def add(self, out: LossOutput, batch: Batch) -> None:
        """Add one micro-batch; no host synchronisation."""
        self.step_losses[-1] += out.loss_sum.detach().double()
        self._counts[0] += out.num_correct
        self._counts[1] += out.num_supervised
        self._counts[2:] += out.geometry_norm_ratio.double()
        if not batch.get("uids"):
            return
        at = 0
        for index, names in (
            (batch["source_index"], self.sources),
            (batch["capability_index"], self.capabilities),
        ):
            slots = torch.where(index < 0, len(names), index)
            width = len(names) + 1
            self._by_name[at : at + width].index_add_(0, slots, out.sample_loss.double())
            self._by_name[at + width : at + 2 * width].index_add_(
                0, slots, out.sample_weight.double()
            )
            at += 2 * width

    def flat(self) -> Tensor:
        """All sums of the interval as one float64 vector, ready for one all-reduce."""
        losses = torch.stack(self.step_losses) if self.step_losses else self._counts[:0]
        return torch.cat([losses, self._counts, self._by_name])

    def read(self, flat: Tensor) -> tuple[list[float], dict[str, float]]:
        """Turn a reduced :meth:`flat` into the loss of every step and the scalars of the log line."""
        values = flat.tolist()
        steps = len(self.denominators)
        losses = [
            n / d if d else 0.0 for n, d in zip(values[:steps], self.denominators, strict=True)
        ]
        correct, supervised, ratio, patches = values[steps : steps + 4]
        total = sum(self.denominators)
        scalars = {"loss": sum(values[:steps]) / total} if total else {}
        if supervised:
            scalars["token_acc"] = correct / supervised
        if patches:
            scalars["geometry/norm_ratio"] = ratio / patches
        at = steps + 4
        for kind, names in (("source", self.sources), ("capability", self.capabilities)):
            width = len(names) + 1
            for i, name in enumerate(names):
                weight = values[at + width + i]
                if weight:
                    scalars[f"loss/{kind}/{name}"] = values[at + i] / weight
            if kind == "source":
                for family in sorted(set(self.families)):
                    own = [i for i, name in enumerate(self.families) if name == family]
                    weight = sum(values[at + width + i] for i in own)
                    if weight:
                        scalars[f"loss/family/{family}"] = sum(values[at + i] for i in own) / weight
            at += 2 * width
        return losses, scalars
