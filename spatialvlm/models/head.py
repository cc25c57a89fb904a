"""Language-model head on supervised rows only, with the loss inside.

Logits of a 150k vocabulary are the largest tensor of a step (12 bytes x rows x vocabulary with their gradient).
Rows are processed in chunks whose logits are recomputed in the backward pass, inside one module call, so that
sharded engines gather the matrix once and every rank makes the same number of calls.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spatialvlm.errors import ConfigError


class HeadOutput(NamedTuple):
    """Per supervised row.

    Attributes:
        cross_entropy: float32 ``[M]``.
        correct: bool ``[M]``, whether the arg-max is the target.
    """

    cross_entropy: Tensor
    correct: Tensor


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Cross entropy of ``hidden @ weight.T`` without keeping logits."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, rows: int
    ) -> tuple[Tensor, Tensor]:
        losses, corrects, normalisers = [], [], []
        for chunk, wanted in zip(torch.split(hidden, rows), torch.split(target, rows), strict=True):
            logits = F.linear(chunk, weight).float()
            normaliser = logits.logsumexp(dim=-1)
            losses.append(normaliser - logits.gather(1, wanted[:, None])[:, 0])
            corrects.append(logits.argmax(dim=-1) == wanted)
            normalisers.append(normaliser)
        ctx.save_for_backward(hidden, weight, target, torch.cat(normalisers))
        ctx.rows = rows
        correct = torch.cat(corrects)
        ctx.mark_non_differentiable(correct)
        return torch.cat(losses), correct

    @staticmethod
    def backward(
        ctx: Any, grad_loss: Tensor, _grad_correct: Any
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, weight, target, normaliser = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = []
        grad_weight = torch.zeros_like(weight) if need_weight else None
        pieces = zip(
            *(torch.split(x, ctx.rows) for x in (hidden, target, normaliser, grad_loss)),
            strict=True,
        )
        for chunk, wanted, log_sum, grad in pieces:
            logits = F.linear(chunk, weight).float()
            scores = (logits - log_sum[:, None]).exp_()  # softmax
            scores.scatter_add_(
                1, wanted[:, None], -torch.ones_like(wanted[:, None], dtype=scores.dtype)
            )
            scores = (scores * grad[:, None]).to(weight.dtype)
            if need_hidden:
                grad_hidden.append((scores @ weight).to(hidden.dtype))
            if grad_weight is not None:
                grad_weight.addmm_(scores.t(), chunk)
        return torch.cat(grad_hidden) if need_hidden else None, grad_weight, None, None


class SupervisedHead(nn.Linear):
    """Drop-in for ``lm_head`` that can also return the loss of its rows.

    It shares the parameter of the head it replaces, so names, tying and checkpoints stay as they were.

    Args:
        head: The model's ``lm_head``.
        rows: Rows whose logits are held at once.
    """

    def __init__(self, head: nn.Linear, rows: int) -> None:
        nn.Module.__init__(self)
        if getattr(head, "bias", None) is not None:
            raise ConfigError("a language-model head with a bias is not supported")
        self.in_features, self.out_features = head.in_features, head.out_features
        self.weight = head.weight
        self.register_parameter("bias", None)
        self.rows: int = rows

    def forward(self, hidden: Tensor, target: Tensor | None = None) -> Any:
        """Logits ``[..., V]``; with ``target`` int64 ``[M]`` and hidden ``[M, D]``, a :class:`HeadOutput`."""
        if target is None:
            return F.linear(hidden, self.weight)
        device = hidden.device.type
        dtype = (
            torch.get_autocast_dtype(device)
            if torch.is_autocast_enabled(device)
            else self.weight.dtype
        )
        with torch.autocast(device, enabled=False):
            return HeadOutput(
                *_ChunkedCrossEntropy.apply(
                    hidden.to(dtype), self.weight.to(dtype), target, self.rows
                )
            )
