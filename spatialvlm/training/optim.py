"""Parameter groups by module identity, AdamW, and a learning rate that is a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spatialvlm.errors import ConfigError

PARTS = (
    "language_model",
    "vision_encoder",
    "projector",
    "geometry_fusion",
    "embeddings",
    "lora",
)
"""The named regions of a model, in the order of every table and log."""

Parts = Mapping[str, Sequence[tuple[str, nn.Parameter]]]
"""Part -> (name inside the plain model, parameter)."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """Warm-up, then cosine, linear or constant; a factor on every group's peak rate.

    Args:
        kind: Shape after the warm-up.
        total_steps: Optimizer steps of the whole run.
        warmup_steps: Optimizer steps until the peak.
        min_ratio: Factor reached at the end.
    """

    kind: Literal["cosine", "linear", "constant"]
    total_steps: int
    warmup_steps: int
    min_ratio: float = 0.0

    def factor(self, step: int) -> float:
        """Factor used by optimizer step ``step`` (from 0); the first step is never wasted at rate 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.kind == "constant":
            return 1.0
        done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        done = min(1.0, done)
        shape = 0.5 * (1 + math.cos(math.pi * done)) if self.kind == "cosine" else 1 - done
        return self.min_ratio + (1 - self.min_ratio) * shape


def make_schedule(
    kind: Literal["cosine", "linear", "constant"],
    total_steps: int,
    *,
    warmup_ratio: float | None = None,
    warmup_steps: int | None = None,
    min_ratio: float = 0.0,
) -> Schedule:
    """Resolve the warm-up of a run.

    Raises:
        ConfigError: Both or neither warm-up is given, or a run of 10 or more steps would only warm up.
    """
    if (warmup_ratio is None) == (warmup_steps is None):
        raise ConfigError(
            f"schedule.warmup_ratio={warmup_ratio} and schedule.warmup_steps={warmup_steps}: "
            "give exactly one of the two."
        )
    steps = warmup_steps if warmup_steps is not None else math.ceil(warmup_ratio * total_steps)  # type: ignore[operator]
    if steps >= total_steps and total_steps >= 10:
        raise ConfigError(
            f"The warm-up takes {steps} steps and the run has {total_steps}: the peak learning rate would "
            "never be used. Lower schedule.warmup_steps or lengthen data.length."
        )
    return Schedule(kind, total_steps, steps, min_ratio)


@dataclass(frozen=True, slots=True)
class Group:
    """One optimizer group: a part, split by weight decay.

    Args:
        part: One of :data:`PARTS`.
        decay: Whether ``weight_decay`` is applied.
        lr: Peak learning rate.
        weight_decay: 0 when ``decay`` is false.
        fqns: Names in the plain model, in model order.
        shapes: Logical shapes, before any sharding.
    """

    part: str
    decay: bool
    lr: float
    weight_decay: float
    fqns: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def name(self) -> str:
        """``part/decay`` or ``part/no_decay``."""
        return f"{self.part}/{'decay' if self.decay else 'no_decay'}"

    @property
    def numel(self) -> int:
        """Logical number of parameters."""
        return sum(math.prod(shape) for shape in self.shapes)


def logical_shape(parameter: Tensor) -> tuple[int, ...]:
    """Shape before partitioning (a ZeRO-3 parameter looks empty and one-dimensional)."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def freeze_by_rate(parts: Parts, rates: Mapping[str, float | None]) -> None:
    """Let exactly the parts with a learning rate train; works on parameters, never on modules."""
    for part, members in parts.items():
        for _, parameter in members:
            parameter.requires_grad_(rates.get(part) is not None)


def plan_groups(
    model: nn.Module,
    parts: Parts,
    rates: Mapping[str, float | None],
    *,
    weight_decay: float = 0.0,
    weight_decay_by_part: Mapping[str, float] | None = None,
) -> list[Group]:
    """Assign every trainable parameter to exactly one group.

    No decay for logical rank <= 1 (biases, norms, layer scales), embedding tables, learned position and
    class tokens (leading axis 1), and adapters.

    Args:
        model: The plain model, before wrapping; its parameters must all be listed in ``parts``.
        parts: Part -> (name, parameter), by object identity.
        rates: Part -> peak learning rate; ``None`` = frozen.
        weight_decay: AdamW's decoupled decay.
        weight_decay_by_part: Replaces ``weight_decay`` for some parts.

    Raises:
        ConfigError: A trainable parameter outside the parts, a parameter listed twice, a part with a rate
            but without parameters, or nothing to train.
    """
    by_part = weight_decay_by_part or {}
    owners = _embedding_weights(model)
    problems: list[str] = []
    seen: dict[int, str] = {}
    groups: list[Group] = []
    for part in [*PARTS, *(name for name in parts if name not in PARTS)]:
        members = parts.get(part, ())
        rate = rates.get(part)
        if rate is None:
            problems += [
                f"{n} trains but part {part} has no rate" for n, p in members if p.requires_grad
            ]
            continue
        trainable = [(n, p) for n, p in members if p.requires_grad]
        if not trainable:
            problems.append(
                f"part {part} has learning rate {rate} but no parameters; set its rate to null"
            )
        split: dict[bool, list[tuple[str, nn.Parameter]]] = {True: [], False: []}
        for name, parameter in trainable:
            if id(parameter) in seen:
                problems.append(f"{name} is in {seen[id(parameter)]} and in {part}")
            seen[id(parameter)] = part
            shape = logical_shape(parameter)
            plain = part in ("embeddings", "lora") or id(parameter) in owners
            split[not (plain or len(shape) <= 1 or shape[0] == 1)].append((name, parameter))
        groups += [
            Group(
                part=part,
                decay=decay,
                lr=rate,
                weight_decay=by_part.get(part, weight_decay) if decay else 0.0,
                fqns=tuple(n for n, _ in split[decay]),
                shapes=tuple(logical_shape(p) for _, p in split[decay]),
            )
            for decay in (True, False)
            if split[decay]
        ]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in seen:
            problems.append(
                f"{name} trains but belongs to no part; freeze it or add its module to a part"
            )
    if not groups and not problems:
        problems.append("all learning rates are null, nothing would train; set optim.lr")
    if problems:
        raise ConfigError("Parameter groups are wrong:\n  " + "\n  ".join(problems[:20]))
    return groups


def _embedding_weights(model: nn.Module) -> set[int]:
    return {
        id(p)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for p in module.parameters(recurse=False)
    }


def build_adamw(
    model: nn.Module,
    groups: Sequence[Group],
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    fused: bool = False,
) -> torch.optim.AdamW:
    """AdamW over ``groups``; parameters are looked up by name, so a sharded model works too."""
    named = dict(model.named_parameters())
    param_groups: list[dict[str, Any]] = [
        {
            "params": [named[name] for name in group.fqns],
            "lr": group.lr,
            "weight_decay": group.weight_decay,
            "name": group.name,
        }
        for group in groups
    ]
    return torch.optim.AdamW(param_groups, betas=betas, eps=eps, fused=fused, foreach=None)


def set_lrs(optimizer: Any, groups: Sequence[Group], factor: float) -> dict[str, float]:
    """Write ``peak * factor`` into every optimizer group; returns part -> rate for the log.

    Every step, so every step also finds out whether something changed the groups meanwhile.

    Raises:
        ConfigError: The optimizer's groups are not the planned ones (:func:`verify_groups`).
    """
    for group, target in zip(groups, optimizer.param_groups, strict=False):
        target["lr"] = group.lr * factor
    verify_groups(optimizer, groups, factor)
    return {group.part: group.lr * factor for group in groups}


def verify_groups(optimizer: Any, groups: Sequence[Group], factor: float) -> None:
    """Check that an engine still trains what was planned (names, rates, decay).

    Raises:
        ConfigError: A wrapper merged, reordered, or equalised groups.
    """
    found = [(g.get("name"), g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
    planned = [(g.name, g.lr * factor, g.weight_decay) for g in groups]
    if found != planned:
        raise ConfigError(
            f"The engine's optimizer groups differ from the plan.\n  planned {planned}\n  found   {found}\n"
            "Remove what changes optimizer.param_groups; rates and decay come from the optim section alone."
        )


def group_table(parts: Parts, groups: Sequence[Group]) -> str:
    """The table printed at start and saved as ``groups.txt``."""
    rows = [("part", "tensors", "parameters", "trainable", "lr", "decayed", "not decayed", "dtype")]
    for part in [p for p in PARTS if parts.get(p)]:
        members = parts[part]
        own = {g.decay: g for g in groups if g.part == part}
        lr = next(iter(own.values())).lr if own else None
        rows.append(
            (
                part,
                f"{len(members):,}",
                f"{sum(math.prod(logical_shape(p)) for _, p in members):,}",
                f"{sum(g.numel for g in own.values()):,}",
                "frozen" if lr is None else f"{lr:g}",
                f"{own[True].numel:,}" if True in own else "0",
                f"{own[False].numel:,}" if False in own else "0",
                "/".join(sorted({str(p.dtype).removeprefix("torch.") for _, p in members})),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i in (0, 7) else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
