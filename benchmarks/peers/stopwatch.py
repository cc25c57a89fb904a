"""How every framework is measured: CPU seconds between optimizer steps, tokens of every forward.

Nothing of the framework is replaced: the stopwatch hangs on PyTorch's hook behind every optimizer step, and looks at the
batches on their way into the training step. It runs inside the framework's own process and environment.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook


def arguments() -> argparse.ArgumentParser:
    """The command line that every framework's script understands."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("mix")
    parser.add_argument("out", type=Path)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--model", type=Path, help="instead of FOLDER/model")
    parser.add_argument("--probe", action="store_true", help="record for checks.py, do not time")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="more options")
    return parser


def overrides(pairs: list[str]) -> dict[str, Any]:
    """Options of ``--set``; a value is JSON, or else text."""
    found: dict[str, Any] = {}
    for key, value in (pair.split("=", 1) for pair in pairs):
        try:
            found[key] = json.loads(value)
        except json.JSONDecodeError:
            found[key] = value
    return found


def cpu_seconds() -> float:
    """CPU time of this process and its finished children."""
    return sum(os.times()[:4])


def gemm_rate(size: int = 512, repeats: int = 3) -> float:
    """Best rate of a square fp32 matrix product in FLOP per CPU-second: how fast this core is right now."""
    left = torch.ones(size, size)
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        left @ left
        best = min(best, time.process_time() - start)
    return 2 * size**3 / best


class Stopwatch:
    """Counts from the end of the last warm-up step to the end of the last step.

    Args:
        warmup: Optimizer steps that are not measured.
    """

    def __init__(self, warmup: int = 2) -> None:
        torch.set_num_threads(1)
        self.warmup = warmup
        self.losses: list[float] = []
        self.marks: list[dict[str, float]] = []
        self.gemm: list[float] = []
        self._excluded = 0.0
        self.sums = {"tokens": 0, "allocated": 0, "samples": 0, "forwards": 0}
        self.hook = register_optimizer_step_post_hook(self._step_done)

    def count(self, tokens: int, allocated: int, samples: int) -> None:
        """One forward: real tokens, positions computed, questions answered."""
        for name, value in (
            ("tokens", tokens),
            ("allocated", allocated),
            ("samples", samples),
            ("forwards", 1),
        ):
            self.sums[name] += value

    def _step_done(self, *_: Any) -> None:
        now = cpu_seconds()
        self.marks.append({"cpu_s": now - self._excluded, **self.sums})
        self.gemm.append(gemm_rate())
        self._excluded += cpu_seconds() - now

    def result(self) -> dict[str, Any]:
        """Rates of the measured steps."""
        if len(self.marks) <= self.warmup:
            raise RuntimeError(f"{len(self.marks)} steps were made, {self.warmup} of them warm up")
        first, last = self.marks[self.warmup - 1], self.marks[-1]
        spent = {name: last[name] - first[name] for name in last}
        steps = len(self.marks) - self.warmup
        return {
            "steps": steps,
            "gemm_gflops": statistics.median(self.gemm[self.warmup :]) / 1e9,
            "cpu_s_per_step": spent["cpu_s"] / steps,
            "tokens_per_cpu_s": spent["tokens"] / spent["cpu_s"],
            "samples_per_cpu_s": spent["samples"] / spent["cpu_s"],
            "tokens_per_sample": spent["tokens"] / spent["samples"],
            "padding": 1 - spent["tokens"] / spent["allocated"],
            "samples_per_forward": spent["samples"] / spent["forwards"],
            "first_step_at_cpu_s": self.marks[0]["cpu_s"],
            "first_loss": self.losses[0] if self.losses else None,
            "last_loss": self.losses[-1] if self.losses else None,
        }

    def write(self, file: Path, options: dict[str, Any], packages: tuple[str, ...]) -> None:
        """Append one JSON line."""
        record = {
            **self.result(),
            "options": options,
            "versions": {"python": platform.python_version(), **versions(packages)},
        }
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Installed versions, those of PyTorch and ``transformers`` included."""
    found = {}
    for name in ("torch", "transformers", *packages):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def read_mask(mask: torch.Tensor) -> tuple[int, int]:
    """Real tokens and samples of a batch.

    Args:
        mask: ``[B, T]``, positive where a token is real, one sample per row; or ``[B, 1, T, T]`` of packs, true or zero where a
            query may see a key: a sample begins where a token sees itself and not the one before.
    """
    if mask.ndim == 2:
        return int((mask > 0).sum()), len(mask)
    seen = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
    real = seen.diagonal(dim1=1, dim2=2)
    continued = seen.diagonal(offset=-1, dim1=1, dim2=2)
    return int(real.sum()), int(real.sum() - (real[:, 1:] & continued).sum())


def watch_trainer(stopwatch: Stopwatch) -> None:
    """Count the batches and losses of whatever ``transformers.Trainer`` runs next in this process."""
    import transformers

    original = transformers.Trainer.training_step

    @functools.wraps(original)
    def training_step(
        self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        tokens, samples = read_mask(inputs["attention_mask"])
        stopwatch.count(tokens, inputs["input_ids"].numel(), samples)
        return original(self, model, inputs, *args, **kwargs)

    log = transformers.Trainer.log

    @functools.wraps(log)
    def record(self: Any, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            stopwatch.losses.append(float(logs["loss"]))
        log(self, logs, *args, **kwargs)

    transformers.Trainer.training_step = training_step
    transformers.Trainer.log = record
