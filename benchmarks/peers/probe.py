"""What a run of ``checks.py`` writes down: first gradient, losses, weights after every step, what each rank saw.

Like the stopwatch it replaces nothing of the framework: it hangs on PyTorch's hooks around the optimizer step, and looks at
batches and logits as they pass.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stopwatch import Stopwatch, cpu_seconds, versions, watch_trainer
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)


def recorder(args: argparse.Namespace) -> Stopwatch | Probe:
    """The stopwatch, or with ``--probe`` the probe; both know ``write``."""
    return Probe() if args.probe else Stopwatch(args.warmup)


def watch(found: Stopwatch | Probe) -> None:
    """Look into whatever ``transformers.Trainer`` runs next in this process."""
    if isinstance(found, Stopwatch):
        watch_trainer(found)
    else:
        probe_trainer(found)


class Probe:
    """Records one run; the parameters are those of the optimizer, in its order."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.losses: list[float] = []
        """Of every forward, not rounded."""
        self.images: list[bool] = []
        """Whether a forward had pictures."""
        self.answers: dict[str, float] = {}
        """Mean loss of every answer when it was last seen, by what identifies the answer."""
        self.forwards: list[int] = []
        """Answers in each forward."""
        self.weights: list[str] = []
        self.gradient: torch.Tensor | None = None
        self.first_step_at_cpu_s = 0.0
        register_optimizer_step_pre_hook(self._before)
        register_optimizer_step_post_hook(self._after)

    def answered(self, answers: dict[str, float]) -> None:
        """Mean loss of every answer of one forward."""
        self.answers |= answers
        self.forwards.append(len(answers))

    def _before(self, optimizer: Optimizer, *_: Any) -> None:
        if self.gradient is None:
            self.first_step_at_cpu_s = cpu_seconds()
            found = [
                p.grad if p.grad is not None else torch.zeros_like(p) for p in owned(optimizer)
            ]
            self.gradient = torch.cat([value.detach().float().flatten() for value in found])

    def _after(self, optimizer: Optimizer, *_: Any) -> None:
        digest = hashlib.sha256()
        for parameter in owned(optimizer):
            digest.update(parameter.detach().numpy().tobytes())
        self.weights.append(digest.hexdigest()[:16])

    def write(self, file: Path, options: dict[str, Any], packages: tuple[str, ...]) -> None:
        """One JSON line and the gradient beside it; rank 1 adds ``.1`` to the name."""
        if self.gradient is None:
            raise RuntimeError("no optimizer step was made")
        rank = os.environ.get("RANK", "0")
        file = file if rank == "0" else file.with_name(f"{file.name}.{rank}")
        np.save(file.with_name(f"{file.name}.npy"), self.gradient.numpy())
        record = {
            "losses": self.losses,
            "images": self.images,
            "answers": self.answers,
            "forwards": self.forwards,
            "weights": self.weights,
            "first_step_at_cpu_s": self.first_step_at_cpu_s,
            "options": options,
            "versions": {"python": platform.python_version(), **versions(packages)},
        }
        file.write_text(json.dumps(record) + "\n", encoding="utf-8")


def owned(optimizer: Optimizer) -> list[torch.Tensor]:
    """Everything the optimizer updates."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def probe_trainer(probe: Probe) -> None:
    """Losses and pictures of the trainer's batches, answers of the model's logits."""
    import transformers
    from transformers import Qwen2_5_VLForConditionalGeneration as Model

    step, forward = transformers.Trainer.training_step, Model.forward

    @functools.wraps(step)
    def training_step(
        self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        pictures = inputs["input_ids"] == self.model.config.image_token_id
        mask = inputs["attention_mask"]  # some append a masked picture to text
        probe.images.append(
            bool((pictures & (mask > 0)).any() if mask.ndim == 2 else pictures.any())
        )
        loss = step(self, model, inputs, *args, **kwargs)
        probe.losses.append(float(loss))
        return loss

    @functools.wraps(forward)
    def logits(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        if kwargs.get("labels") is not None and getattr(output, "logits", None) is not None:
            probe.answered(answer_losses(output.logits.detach(), kwargs["labels"]))
        return output

    transformers.Trainer.training_step = training_step
    Model.forward = logits


def answer_losses(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Mean cross entropy of every run of supervised tokens.

    Args:
        logits: ``[B, T, V]``.
        labels: ``[B, T]``, -100 where nothing is supervised; a row of one conversation or a pack of several.
    """
    found = {}
    for row, target in zip(logits[:, :-1].float(), labels[:, 1:], strict=True):
        supervised = target != -100
        edge = torch.diff(supervised.int(), prepend=supervised.new_zeros(1).int())
        run = (edge == 1).cumsum(0)
        for number in range(1, int(run.max()) + 1):
            at = supervised & (run == number)
            found[answer_name(target[at])] = float(
                torch.nn.functional.cross_entropy(row[at], target[at])
            )
    return found


def answer_name(tokens: torch.Tensor) -> str:
    """Equal for equal answers."""
    return hashlib.sha256(str(tokens.tolist()).encode()).hexdigest()[:8]
