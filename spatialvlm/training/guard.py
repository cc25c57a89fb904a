"""Non-finite steps are skipped, counted, and end the run with a diagnosis; spikes are only written down."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from spatialvlm.errors import DataError, NonFiniteError


@dataclass(slots=True)
class Guard:
    """State machine over optimizer steps; equal on all ranks because its inputs are.

    Args:
        max_skipped_in_row: Non-finite steps in a row that end the run.
        max_skipped_fraction: Share of the last ``window`` steps that may be skipped.
        window: Steps remembered for the fraction.
        max_empty_in_row: Steps without any supervised token in a row that end the run.
        spike_loss: A loss above median + this many MADs is a spike.
        spike_grad: A part norm above this many medians is a spike.
        trace: Look for the first bad module before the run ends.
    """

    max_skipped_in_row: int = 5
    max_skipped_fraction: float = 0.01
    window: int = 1000
    max_empty_in_row: int = 10
    spike_loss: float = 6.0
    spike_grad: float = 5.0
    trace: bool = True
    skipped_in_row: int = 0
    empty_in_row: int = 0
    recent: deque[int] = field(default_factory=deque)
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=200))
    norms: dict[str, deque[float]] = field(default_factory=dict)
    last_spike: int = -10

    def update(self, step: int, *, applied: bool, empty: bool = False) -> None:
        """Count one step.

        Raises:
            NonFiniteError: Too many skipped steps.
            DataError: Too many steps without a supervised token.
        """
        self.empty_in_row = self.empty_in_row + 1 if empty else 0
        self.skipped_in_row = 0 if applied or empty else self.skipped_in_row + 1
        self.recent.append(int(not applied and not empty))
        while len(self.recent) > self.window:
            self.recent.popleft()
        if self.empty_in_row >= self.max_empty_in_row:
            raise DataError(
                f"{self.empty_in_row} steps in a row (until {step}) had no supervised token on any rank. "
                "Check that the rows end with an assistant turn and that data.train_on fits them.",
                reason="no_answer",
            )
        if self.skipped_in_row >= self.max_skipped_in_row:
            first = step - self.skipped_in_row + 1
            raise NonFiniteError(
                f"Gradients were non-finite in steps {first}-{step} ({self.skipped_in_row} in a row)."
            )
        skipped = sum(self.recent)
        if skipped >= self.max_skipped_in_row and skipped > self.max_skipped_fraction * self.window:
            raise NonFiniteError(
                f"Gradients were non-finite in {skipped} of the last {len(self.recent)} steps (until {step}), "
                f"more than guard.max_skipped_fraction={self.max_skipped_fraction} of {self.window}."
            )

    def spikes(self, step: int, loss: float, norms: Mapping[str, float]) -> list[str]:
        """Names of the values that jumped in ``step``; the values are remembered afterwards."""
        found: list[str] = []
        if len(self.losses) >= 20:
            middle = statistics.median(self.losses)
            spread = statistics.median(abs(value - middle) for value in self.losses)
            if loss > middle + self.spike_loss * max(spread, 1e-12):
                found.append("loss")
        self.losses.append(loss)
        for part, norm in norms.items():
            history = self.norms.setdefault(part, deque(maxlen=200))
            if len(history) >= 20 and norm > self.spike_grad * statistics.median(history):
                found.append(f"grad_norm/{part}")
            history.append(norm)
        if not found or step - self.last_spike < 10:
            return []
        self.last_spike = step
        return found

    def state_dict(self) -> dict[str, Any]:
        """JSON values for the checkpoint."""
        return {
            "skipped_in_row": self.skipped_in_row,
            "empty_in_row": self.empty_in_row,
            "recent": list(self.recent),
            "losses": list(self.losses),
            "norms": {part: list(values) for part, values in self.norms.items()},
            "last_spike": self.last_spike,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where a checkpoint left off."""
        self.skipped_in_row = state["skipped_in_row"]
        self.empty_in_row = state["empty_in_row"]
        self.recent = deque(state["recent"])
        self.losses = deque(state["losses"], maxlen=200)
        self.norms = {part: deque(values, maxlen=200) for part, values in state["norms"].items()}
        self.last_spike = state["last_spike"]
