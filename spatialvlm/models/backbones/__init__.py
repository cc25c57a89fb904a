"""One adapter per model family. SenseNova-SI's Bagel has no ``transformers`` class, so it has no adapter here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spatialvlm.errors import CheckpointError, ConfigError
from spatialvlm.models.backbones.base import (
    Backbone,
    VisionOutput,
    image_processor_config,
    read_json,
)
from spatialvlm.models.backbones.internvl3 import InternVL3
from spatialvlm.models.backbones.qwen2_5vl import Qwen2_5VL
from spatialvlm.models.backbones.qwen3vl import Qwen3VL

FAMILIES: dict[str, type[Backbone]] = {
    adapter.family: adapter for adapter in (Qwen2_5VL, Qwen3VL, InternVL3)
}
MODEL_TYPES: dict[str, type[Backbone]] = {
    name: adapter for adapter in FAMILIES.values() for name in adapter.model_types
}


def adapter_of(model_type: str) -> type[Backbone]:
    """The adapter of a ``config.json`` ``model_type``.

    Raises:
        ConfigError: No adapter; lists the supported types.
    """
    if model_type not in MODEL_TYPES:
        raise ConfigError(
            f"model_type {model_type!r} has no backbone adapter; supported: {', '.join(sorted(MODEL_TYPES))}"
        )
    return MODEL_TYPES[model_type]


def family_of(folder: str | Path) -> str:
    """Family of a model directory, from its ``config.json`` alone.

    Raises:
        CheckpointError: The directory or its ``config.json`` does not exist.
        ConfigError: The family is not supported.
    """
    return adapter_of(require_config(folder)["model_type"]).family


def require_config(folder: str | Path) -> dict[str, Any]:
    """``config.json`` of a model directory.

    Raises:
        CheckpointError: It is missing, broken, or names no ``model_type``.
    """
    path = Path(folder)
    config = read_json(path, "config.json")
    if "model_type" not in config:
        what = "does not exist" if not path.exists() else "holds no config.json with a model_type"
        raise CheckpointError(
            f"{path} {what}, so it is no model directory; point model.init_from at one (or a run's final/)"
        )
    return config


__all__ = [
    "FAMILIES",
    "Backbone",
    "VisionOutput",
    "adapter_of",
    "family_of",
    "image_processor_config",
    "require_config",
]
