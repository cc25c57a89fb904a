"""What the launcher decides, judged before any weight is read: strategy, DeepSpeed file, precision, accumulation."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from spatialvlm.config import TrainConfig
from spatialvlm.errors import ConfigError, LaunchError
from spatialvlm.training.distributed import launched_with_deepspeed
from spatialvlm.training.engines import Strategy, deepspeed_settings


def launch_plan(
    config: TrainConfig, device: torch.device
) -> tuple[Strategy, dict[str, Any] | None]:
    """Strategy of this launch, and the complete DeepSpeed settings under ZeRO.

    Args:
        config: Recipe.
        device: Where this process trains.

    Raises:
        LaunchError: The launcher shards by itself, or against ``parallel.strategy``.
        ConfigError: The launcher's file decides what the recipe decides, or settings exclude each other.
    """
    strategy, path = strategy_of(config)
    _leaves_decisions_to_the_recipe(config)
    in_tests = os.environ.get("SPATIALVLM_TEST") == "1"
    if config.precision == "bf16" and device.type == "cpu" and not in_tests:
        raise ConfigError("precision: bf16 is not for training on a CPU; set precision=fp32.")
    if config.model.compile and strategy == "zero3":
        raise ConfigError(
            "model.compile is refused with ZeRO-3; use zero2 or fsdp2, or switch it off."
        )
    if path is None:
        return strategy, None
    return strategy, deepspeed_settings(
        json.loads(path.read_text()),
        bf16=config.precision == "bf16",
        max_grad_norm=config.optim.max_grad_norm,
        reduce_dtype=config.parallel.reduce_dtype,
    )


def strategy_of(config: TrainConfig) -> tuple[Strategy, Path | None]:
    """Strategy of the run, and the launcher's DeepSpeed JSON under ZeRO.

    Raises:
        LaunchError: FSDP2 was asked for under a DeepSpeed launcher, or by Accelerate's own plug-in.
        ConfigError: The JSON cannot be read.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise LaunchError(
            "distributed_type: FSDP shards outside of the recipe. Use configs/accelerate/fsdp2.yaml "
            "(distributed_type: MULTI_GPU) with parallel.strategy=fsdp2."
        )
    wanted = config.parallel.strategy
    if not launched_with_deepspeed():
        return ("ddp" if wanted == "auto" else wanted), None
    if wanted != "auto":
        raise LaunchError(
            f"parallel.strategy={wanted} under a DeepSpeed launcher. Set it to auto, or use an accelerate file "
            "without deepspeed_config."
        )
    name = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "")
    if not name or name == "none":
        raise ConfigError(
            "The accelerate file has deepspeed_config without deepspeed_config_file; name a JSON there, e.g. "
            "configs/deepspeed/zero2.json."
        )
    path = Path(name)
    try:
        settings: dict[str, Any] = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        msg = f"deepspeed_config_file={name!r} of the accelerate file cannot be read: {error}"
        raise ConfigError(msg) from error
    stage = settings.get("zero_optimization", {}).get("stage")
    if stage not in (1, 2, 3):
        raise ConfigError(f"{path}: zero_optimization.stage={stage!r} is not one of 1, 2, 3.")
    return f"zero{stage}", path  # type: ignore[return-value]


def _leaves_decisions_to_the_recipe(config: TrainConfig) -> None:
    """Refuse what an accelerate file can ask for and the recipe would ignore."""
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps not in ("1", "auto"):
        raise ConfigError(
            f"gradient_accumulation_steps={steps} of the launcher has no effect: remove it; the recipe decides with "
            "step.global_batch_size (packing.max_tokens bounds a micro-step)."
        )
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", config.precision):
        raise ConfigError(
            f"mixed_precision={precision} of the launcher against precision: {config.precision} of the recipe. Remove "
            "it from the accelerate file; the recipe decides."
        )
