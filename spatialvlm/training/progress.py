"""What rank 0 shows while training: a bar on a terminal, one line per log step elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Literal

from tqdm import tqdm


class Progress:
    """Step, loss, rate, tokens per second, utilisation, data wait, remaining time.

    Args:
        total: Optimizer steps of the run.
        start: Steps already done.
        kind: ``auto`` = bar when standard error is a terminal, lines otherwise.
    """

    def __init__(
        self, total: int, start: int, kind: Literal["auto", "bar", "lines", "none"] = "auto"
    ) -> None:
        if kind == "auto":
            kind = "bar" if sys.stderr.isatty() else "lines"
        self.kind = kind
        self.total = total
        self.bar = (
            tqdm(total=total, initial=start, unit="step", dynamic_ncols=True, file=sys.stderr)
            if kind == "bar"
            else None
        )

    def advance(self) -> None:
        """One optimizer step is done."""
        if self.bar is not None:
            self.bar.update(1)

    def show(self, step: int, scalars: Mapping[str, float]) -> None:
        """A log line is due; ``step`` counts from 1 here."""
        text = describe(scalars)
        if self.bar is not None:
            self.bar.set_postfix_str(text)
        elif self.kind == "lines":
            sys.stderr.write(f"step {step}/{self.total}  {text}\n")
            sys.stderr.flush()

    def close(self) -> None:
        """Leave the terminal clean."""
        if self.bar is not None:
            self.bar.close()


def describe(scalars: Mapping[str, float]) -> str:
    """The few numbers of a log line that fit on a terminal."""
    parts = []
    if "loss" in scalars:
        parts.append(f"loss {scalars['loss']:.4f}")
    rate = scalars.get("lr/language_model", scalars.get("lr/lora", scalars.get("lr/projector")))
    if rate is not None:
        parts.append(f"lr {rate:.2e}")
    parts.append(f"{scalars['tokens_per_s']:,.0f} tok/s")
    if "mfu" in scalars:
        parts.append(f"mfu {scalars['mfu']:.1%}")
    elif "mfu_gemm" in scalars:  # no data sheet: against the matrix products of this process
        parts.append(f"{scalars['mfu_gemm']:.0%} of gemm")
    parts.append(f"wait {scalars['data_wait']:.0%}")
    parts.append(f"eta {duration(scalars['eta_s'])}")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    whole = int(seconds)
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes}:{left:02d}"
