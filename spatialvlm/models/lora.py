"""LoRA and DoRA adapters on chosen parts, through peft, beside fully trained geometry modules.

Adapters are injected into the model, so module paths and the rest of the code stay as they are. Merging works on a
state dict: it needs no copy of the model and serves weights that an engine has gathered.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spatialvlm.errors import CheckpointError, ConfigError
from spatialvlm.models.geometry.loader import check_fingerprint
from spatialvlm.models.head import SupervisedHead
from spatialvlm.models.spatial_vlm import SpatialVLM

ADAPTER = "default"
"""Name that peft gives to a single adapter."""


def add_adapters(
    model: SpatialVLM,
    parts: Iterable[str],
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    dora: bool = False,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Put an adapter beside every linear layer of some parts; call it before sharding and after the fusion is built.

    Args:
        model: A model without adapters.
        parts: Of ``language_model``, ``vision_encoder``, ``projector``.
        rank: Of the update.
        alpha: The update is scaled by ``alpha / rank``.
        dropout: On the adapters' input.
        dora: Weight-decomposed adapters (arXiv 2402.09353).
        dtype: Of the adapters; engines need one dtype everywhere.

    Raises:
        ConfigError: A part that has no linear layers to adapt, or unknown.
    """
    from peft import LoraConfig, inject_adapter_in_model

    available = model.parts()
    targets: list[str] = []
    for part in parts:
        if part not in ("language_model", "vision_encoder", "projector"):
            raise ConfigError(
                f"lora.parts: {part!r} cannot carry adapters; choose of language_model, vision_encoder, projector"
            )
        targets += _linear_names(model, available[part], without=_deeper(available, part))  # type: ignore[index]
    settings = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        use_dora=dora,
        target_modules=targets,
        bias="none",
    )
    inject_adapter_in_model(settings, model.backbone, adapter_name=ADAPTER)
    for parameter in adapter_tensors(model).values():
        parameter.data = parameter.data.to(dtype)


def _deeper(available: Mapping[Any, list[nn.Module]], part: str) -> list[nn.Module]:
    """Modules of other parts, which may lie inside the modules of this one (projectors in a vision encoder)."""
    return [module for other, modules in available.items() if other != part for module in modules]


def _linear_names(
    model: SpatialVLM, modules: Iterable[nn.Module], without: Iterable[nn.Module]
) -> list[str]:
    wanted = {id(child) for module in modules for child in module.modules()}
    inside = {id(module) for module in modules}
    for module in without:
        if not inside & {
            id(child) for child in module.modules()
        }:  # skip parts that contain this one
            wanted -= {id(child) for child in module.modules()}
    return [
        name
        for name, module in model.backbone.named_modules()
        if id(module) in wanted
        and isinstance(module, nn.Linear)
        and not isinstance(module, SupervisedHead)
    ]


def adapter_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Adapter parameters by name."""
    return {
        f"{prefix}.{attribute}.{name}" if prefix else f"{attribute}.{name}": parameter
        for prefix, module in model.named_modules()
        for attribute in dict.fromkeys(getattr(module, "adapter_layer_names", ()))
        if isinstance(layers := getattr(module, attribute, None), nn.Module)
        for name, parameter in layers.named_parameters()
    }


def has_adapters(model: nn.Module) -> bool:
    """Whether any layer carries an adapter."""
    return any(hasattr(module, "adapter_layer_names") for module in model.modules())


@torch.no_grad()
def merge_state(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the plain model: updates added, adapter names gone.

    ``W + s B A`` for LoRA (arXiv 2106.09685, eq. 3); for DoRA its rows are rescaled to the learned magnitudes
    (arXiv 2402.09353, eq. 5). Products are fp32.

    Args:
        model: Says which layers have adapters, and their scale; may be sharded.
        state: Complete weights in the model's names.
    """
    merged = dict(state)
    for name, module in model.named_modules():
        if not hasattr(module, "adapter_layer_names"):
            continue
        low, high = (
            merged.pop(f"{name}.lora_{factor}.{ADAPTER}.weight").float() for factor in "AB"
        )
        weight = merged.pop(f"{name}.base_layer.weight")
        total = weight.float() + module.scaling[ADAPTER] * (high @ low)
        magnitude = merged.pop(f"{name}.lora_magnitude_vector.{ADAPTER}.weight", None)
        if magnitude is not None:
            total *= (magnitude.float() / total.norm(dim=1))[:, None]
        merged[f"{name}.weight"] = total.to(weight.dtype)
        bias = merged.pop(f"{name}.base_layer.bias", None)
        if bias is not None:
            merged[f"{name}.bias"] = bias
    return merged


def save_adapters(
    model: SpatialVLM, target: str | Path, *, state_dict: Mapping[str, Tensor] | None = None
) -> Path:
    """Write only what trains beside the backbone: adapters in peft's format, and the fusion modules if there are any.

    ``PeftModel.from_pretrained(backbone, folder)`` loads the adapters; ``tools/export.py --adapters`` merges everything
    into a model directory.

    Args:
        model: With adapters.
        target: Directory, created if needed.
        state_dict: Complete weights in this model's names, when an engine has sharded them.

    Raises:
        ConfigError: The model has no adapters.
    """
    from spatialvlm.models.directory import save_spatial

    if not has_adapters(model):
        raise ConfigError("the model has no adapters to save; set lora in the recipe")
    folder = Path(target)
    folder.mkdir(parents=True, exist_ok=True)
    state = model.state_dict() if state_dict is None else state_dict
    tensors = {
        f"base_model.model.{name.removeprefix('backbone.').replace(f'.{ADAPTER}', '')}": state[name]
        .contiguous()
        .cpu()
        for name in adapter_tensors(model)
    }
    # peft names the magnitude vector itself, not its weight.
    tensors = {
        k.replace("lora_magnitude_vector.weight", "lora_magnitude_vector"): v
        for k, v in tensors.items()
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = model.backbone.peft_config[ADAPTER].to_dict()
    settings |= {"base_model_name_or_path": str(model.source), "inference_mode": True}
    settings["target_modules"] = sorted(settings["target_modules"])
    text = json.dumps(settings, indent=2, default=str, sort_keys=True)
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    save_spatial(model, folder, state)
    return folder


def merge_saved(model: SpatialVLM, folder: Path) -> None:
    """Merge what :func:`save_adapters` wrote into a model: adapters, and the fusion modules beside them.

    Raises:
        CheckpointError: The saved fusion does not fit the model.
        FingerprintError: It was trained with another geometry encoder.
    """
    from peft import PeftModel

    from spatialvlm.models.directory import SPATIAL_WEIGHTS, saved_geometry

    PeftModel.from_pretrained(model.backbone, folder).merge_and_unload()
    saved = saved_geometry(folder)
    if saved is None:
        return
    if model.fusion is None or model.geometry is None or model.geometry.encoder is None:
        raise CheckpointError(f"{folder} has a geometry branch, the model has none")
    check_fingerprint(
        saved["encoder"]["fingerprint"],
        model.geometry.encoder.fingerprint,
        allow_mismatch=model.geometry.settings["allow_encoder_mismatch"],
    )
    try:
        model.fusion.load_state_dict(load_file(folder / SPATIAL_WEIGHTS))
    except (SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder / SPATIAL_WEIGHTS} does not fit the model: {error}"
        ) from error
