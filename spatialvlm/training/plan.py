"""What a run is about to do and need: memory of one device, and ``plan.json``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from spatialvlm.config import TrainConfig
from spatialvlm.training.base import backbone_config
from spatialvlm.training.distributed import Processes
from spatialvlm.training.engines import Strategy
from spatialvlm.training.estimate import (
    GB,
    MemoryRow,
    activation_bytes,
    memory_table,
    require_fit,
    text_decoder,
    vision_decoder,
)
from spatialvlm.training.optim import Schedule
from spatialvlm.training.state import write_json

VISUAL_SHARE = 0.5
"""Share of a pack's tokens that are visual, for activations and FLOPs before lengths are known."""
SUPERVISED_SHARE = 0.1


def pack_patches(config: TrainConfig, merge: int) -> int:
    """Vision patches of a full pack.

    Args:
        config: Recipe; where its geometry branch adds tokens, half of the visual ones are spatial twins without patches.
        merge: Patches per visual token.
    """
    geometry = config.geometry
    twins = geometry is not None and geometry.encoder != "none" and geometry.insertion != "in_place"
    return int(config.packing.max_tokens * VISUAL_SHARE * merge / (2 if twins else 1))


def plan_memory(
    config: TrainConfig,
    *,
    trainable: int,
    frozen: int,
    worlds: Sequence[int],
    device_bytes: float | None,
) -> tuple[dict[str, float], list[MemoryRow]]:
    """Activations of a full pack in bytes by component, and a row per strategy and number of devices.

    Args:
        config: Recipe.
        trainable: Trainable parameters.
        frozen: Frozen parameters.
        worlds: Numbers of devices.
        device_bytes: Memory of one device; ``None`` = unknown.
    """
    backbone: dict[str, Any] = backbone_config(config.model.backbone)
    text, vision = text_decoder(backbone), vision_decoder(backbone)
    tokens = config.packing.max_tokens
    activations = activation_bytes(
        text,
        vision,
        tokens=tokens,
        patches=pack_patches(config, 4),
        head_rows=config.memory.head_rows,
        supervised=int(tokens * SUPERVISED_SHARE),
        checkpoint_text=config.memory.checkpoint_language_model,
        checkpoint_vision=config.memory.checkpoint_vision,
        vision_trains=config.optim.vision_lr is not None,
    )
    rows = memory_table(
        trainable=trainable,
        frozen=frozen,
        worlds=tuple(worlds),
        activations=activations,
        largest_block=max(text.vocab * text.hidden, 1),
        geometry=config.geometry is not None and config.geometry.encoder != "none",
        bf16=config.precision == "bf16",
        device_bytes=device_bytes,
    )
    return activations, rows


def device_memory(processes: Processes) -> float:
    """Bytes one process may use: its GPU's, or its share of the machine's memory."""
    if processes.device.type == "cuda":
        return float(torch.cuda.get_device_properties(processes.device).total_memory)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) / local


def check_memory(
    config: TrainConfig, strategy: Strategy, processes: Processes, *, trainable: int, frozen: int
) -> tuple[MemoryRow, str | None]:
    """The estimate for this launch, and a warning when it does not fit the device.

    Raises:
        ConfigError: It does not fit and ``memory.strict`` is set.
    """
    available = device_memory(processes)
    _, rows = plan_memory(
        config,
        trainable=trainable,
        frozen=frozen,
        worlds=(processes.size,),
        device_bytes=available,
    )
    row = next(row for row in rows if row.strategy == strategy)
    return row, require_fit(row, strict=config.memory.strict, device_gb=available / GB)


def write_plan(
    path: Path,
    config: TrainConfig,
    schedule: Schedule,
    *,
    strategy: Strategy,
    world_size: int,
    positions: int,
    trainable: int,
    memory: MemoryRow,
) -> None:
    """``plan.json``: steps, schedule, what a step consumes, mixture, spread, memory.

    Args:
        path: The file.
        config: Recipe.
        schedule: Resolved schedule.
        strategy: How the model is spread.
        world_size: Processes.
        positions: Draws of the whole order.
        trainable: Trainable parameters.
        memory: Estimate for one device.
    """
    weights = {name: weight for name, weight in config.data.families.items() if weight > 0}
    per_step = (
        {"samples": config.step.global_batch_size}
        if config.step.unit == "samples"
        else {"packs": config.step.packs_per_step}
    )
    write_json(
        path,
        {
            "steps": schedule.total_steps,
            "warmup_steps": schedule.warmup_steps,
            "schedule": schedule.kind,
            "per_step": per_step,
            "max_tokens_per_pack": config.packing.max_tokens,
            "draws": positions,
            "mixture": {name: w / sum(weights.values()) for name, w in weights.items()},
            "strategy": strategy,
            "processes": world_size,
            "trainable_parameters": trainable,
            "memory_gb": {
                k: v for k, v in asdict(memory).items() if k not in ("strategy", "world")
            },
        },
    )
