"""Where the configuration becomes groups, an engine, and the data of a run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spatialvlm.config import TrainConfig
from spatialvlm.config.data import LengthConfig
from spatialvlm.data.build import build_data
from spatialvlm.data.hooks import DrawMarks
from spatialvlm.data.loader import StepLoader
from spatialvlm.data.sample import World
from spatialvlm.errors import ConfigError
from spatialvlm.models.build import build_model, cost_coefficients
from spatialvlm.models.isolation import probe_isolation
from spatialvlm.models.lora import add_adapters
from spatialvlm.models.param_groups import freeze_modules, split_parts
from spatialvlm.models.spatial_vlm import SpatialVLM
from spatialvlm.scenes.blacklist import Blacklist, find_ids, load_list, shipped_lists
from spatialvlm.sequence.layout import TokenLayout
from spatialvlm.training.distributed import Processes
from spatialvlm.training.engines import Engine, make_engine
from spatialvlm.training.evaluate_loss import Forgiving, HeldOutLoss
from spatialvlm.training.launch import launch_plan, strategy_of
from spatialvlm.training.loop import EvalFn
from spatialvlm.training.memory import checkpoint_blocks, compile_blocks
from spatialvlm.training.optim import (
    Group,
    Parts,
    build_adamw,
    freeze_by_rate,
    plan_groups,
    verify_groups,
)
from spatialvlm.training.plan import check_memory
from spatialvlm.training.run import OpenRun
from spatialvlm.typing import CostCoefficients


def learning_rates(config: TrainConfig) -> dict[str, float | None]:
    """Peak rate of every part, ``lora`` included; adapters use the rate of the part they sit in.

    Raises:
        ConfigError: Adapted parts with different rates.
    """
    rates: dict[str, float | None] = dict(config.optim.lr_by_part())
    if config.lora is None:
        return rates
    own = {part: rates[part] for part in config.lora.parts}
    if len(set(own.values())) > 1:
        raise ConfigError(f"lora.parts have different learning rates {own}; give them one rate.")
    for part in config.lora.parts:
        rates[part] = None
    rates["lora"] = next(iter(own.values()))
    return rates


def load_dtype(config: TrainConfig) -> torch.dtype:
    """Type the initial weights are loaded in; what trains is promoted to fp32 masters afterwards."""
    return torch.bfloat16 if config.precision == "bf16" else torch.float32


def build_trainable(config: TrainConfig, run: OpenRun) -> tuple[SpatialVLM, list[Group], Cost]:
    """Load the initial weights and let the parts with a learning rate train; call it before wrapping.

    Prints which attention runs, the table of groups, and a warning when memory looks too small.

    Returns:
        The plain model, its optimizer groups, and its cost in FLOPs.

    Raises:
        CheckpointError: The weights cannot be loaded.
        ConfigError: Groups do not work out, or (``memory.strict``) memory is too small.
        IsolationError: Samples of one pack would see each other.
    """
    model = build_model(
        run.base,
        config.geometry,
        attention=config.packing.attention,
        liger=config.model.liger,
        head_rows=config.memory.head_rows,
        dtype=load_dtype(config),
        device=run.processes.device,
        trust_remote_code=run.trust_remote_code,
    )
    run.say(probe_isolation(model))
    parts, groups = build_groups(config, model)
    run.show_groups(parts, groups)
    trainable = sum(group.numel for group in groups)
    total = sum(parameter.numel() for members in parts.values() for _, parameter in members)
    run.memory, warning = check_memory(
        config,
        strategy_of(config)[0],
        run.processes,
        trainable=trainable,
        frozen=total - trainable,
    )
    if warning is not None:
        run.say(f"warning: {warning}")
    return model, groups, build_cost(config, model)


def build_groups(config: TrainConfig, model: SpatialVLM) -> tuple[dict[str, Any], list[Group]]:
    """Add adapters, freeze by learning rate, and plan the optimizer groups; call it before wrapping.

    Raises:
        ConfigError: See :func:`~spatialvlm.training.optim.plan_groups` and
            :func:`~spatialvlm.models.lora.add_adapters`.
    """
    rates = learning_rates(config)
    if config.lora is not None:
        add_adapters(
            model,
            config.lora.parts,
            rank=config.lora.r,
            alpha=config.lora.alpha,
            dropout=config.lora.dropout,
            dora=config.lora.dora,
        )
    parts: Parts = split_parts(model)
    freeze_by_rate(parts, rates)
    model.train()
    freeze_modules(model)
    by_part = {str(part): decay for part, decay in config.optim.weight_decay_by_part.items()}
    groups = plan_groups(
        model, parts, rates, weight_decay=config.optim.weight_decay, weight_decay_by_part=by_part
    )
    for members in parts.values():
        for _, parameter in members:
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return dict(parts), groups


def build_engine(
    config: TrainConfig, model: SpatialVLM, groups: Sequence[Group], processes: Processes
) -> Engine:
    """Activation checkpointing, optional compilation, optimizer, wrapper.

    Raises:
        ConfigError: Settings that do not work together.
        LaunchError: The launcher and ``parallel.strategy`` disagree.
    """
    strategy, settings = launch_plan(config, processes.device)
    dropout = any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
    adapter = model.adapter
    if config.memory.checkpoint_language_model:
        checkpoint_blocks(adapter.text_layers, preserve_rng=dropout)
    if config.memory.checkpoint_vision:
        checkpoint_blocks(adapter.vision_blocks, preserve_rng=dropout)
    if config.model.compile:
        compile_blocks([*adapter.text_layers, *adapter.vision_blocks])
    fused = processes.device.type == "cuda" if config.optim.fused == "auto" else config.optim.fused
    factory = partial(
        build_adamw,
        groups=groups,
        betas=config.optim.betas,
        eps=config.optim.eps,
        # DeepSpeed keeps masters in flat buffers and does not run fused kernels on them.
        fused=fused and not strategy.startswith("zero"),
    )
    engine = make_engine(
        strategy,
        model,
        groups,
        factory,
        processes,
        max_grad_norm=config.optim.max_grad_norm,
        bf16=config.precision == "bf16",
        deepspeed=settings,
    )
    verify_groups(engine.optimizer, groups, 1.0)
    return engine


@dataclass(frozen=True, slots=True)
class Cost:
    """FLOPs of a step as a function of its sizes."""

    balance: CostCoefficients
    """With recomputation: what ranks really spend, for balancing."""
    model: CostCoefficients
    """Without recomputation: what the model needs, for utilisation."""


def build_cost(config: TrainConfig, model: SpatialVLM) -> Cost:
    """Cost coefficients of the frozen and trained parts of ``model``."""
    return Cost(
        balance=cost_coefficients(
            model,
            recompute_text=config.memory.checkpoint_language_model,
            recompute_vision=config.memory.checkpoint_vision,
        ),
        model=cost_coefficients(model),
    )


class SceneLists:
    """Looks up scene and room ids in block lists; a plain object, so that index workers can receive it.

    Args:
        names: Built-in list names, or paths of text files with one scene id per line.

    Raises:
        ConfigError: A name is neither.
    """

    def __init__(self, names: Sequence[str]) -> None:
        shipped = {entry.name.lower().replace("-", "_"): entry for entry in shipped_lists()}
        unknown = [name for name in names if name not in shipped and not Path(name).is_file()]
        if unknown:
            raise ConfigError(
                f"data.decontamination.lists: {unknown} are neither files nor one of {sorted(shipped)}."
            )
        lists = [shipped[name] if name in shipped else load_list(name) for name in names]
        self.lists = [(entry.name, Blacklist([entry])) for entry in lists]
        text = repr([(entry.name, sorted(entry.scene_ids)) for entry in lists])
        self.key = hashlib.sha256(text.encode()).hexdigest()[:16]
        """Identity of the lists, part of the index key."""

    def __call__(self, text: str) -> tuple[str, ...] | None:
        """Names of the lists that ``text`` hits; ``None`` when it names no known scene or room."""
        if not find_ids(text):
            return (
                () if text.startswith("rooms/") else None
            )  # procedural rooms are nobody's test set
        return tuple(name for name, blacklist in self.lists if blacklist.hits(text))


def build_load(
    config: TrainConfig,
    run: OpenRun,
    layout: TokenLayout,
    cost: Cost,
    draw_marks: DrawMarks,
) -> Callable[..., StepLoader]:
    """:func:`~spatialvlm.data.build.build_data` with everything but the configuration bound.

    Training and held-out sources are loaded by the same function, block lists included.

    Raises:
        ConfigError: An unknown block list.
    """
    blocked = SceneLists(config.data.decontamination.lists)
    return partial(
        build_data,
        checkpoint_dir=run.base,
        layout=layout,
        cost=cost.balance,
        world=World(run.processes.rank, run.processes.size),
        blocked=blocked,
        blocked_key=blocked.key,
        draw_marks=draw_marks,
        new_order=any(key.split(".")[0] == "data" for key in config.run.resume_allow),
        report=run.say,
    )


def build_held_out(
    config: TrainConfig,
    load: Callable[..., Any],
    model: SpatialVLM,
    processes: Processes,
) -> EvalFn | None:
    """Loss on ``evaluation.sources`` for the loop; ``None`` when there are none.

    Args:
        config: Recipe.
        load: From :func:`build_load`.
        model: The plain model inside the engine.
        processes: Ranks.
    """
    sources = config.evaluation.sources
    if not sources:
        return None
    families = dict.fromkeys((source.family for source in sources), 1.0)
    data = config.data.model_copy(
        update={
            "sources": sources,
            "families": families,
            "length": LengthConfig(samples=config.evaluation.max_samples),
            "order": "shuffled",
            "tail": "pad",
        }
    )
    held_out = config.model_copy(update={"data": data})
    load(held_out).close()  # what cannot be read is told now, not at the first evaluation
    return HeldOutLoss(
        lambda: load(held_out),
        processes,
        tuple(source.name for source in sources),
        tuple(source.family for source in sources),
        partial(training_mode, model),
    )


def forgiving(evaluate: EvalFn | None, run: OpenRun) -> EvalFn | None:
    """An evaluation whose first failure does not end the run; ``None`` stays ``None``."""
    return None if evaluate is None else Forgiving(evaluate, run.say)


def training_mode(model: SpatialVLM) -> None:
    """Put the model back into training mode after an evaluation; frozen parts stay in eval mode."""
    model.train()
    freeze_modules(model)
