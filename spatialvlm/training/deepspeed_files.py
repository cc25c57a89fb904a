"""Whole fp32 weights from the files that DeepSpeed's ``save_checkpoint`` writes, without running what is in them.

These files are pickles, so a file can name any Python object to be built or called. Every file is first searched for
such names without executing anything; besides tensors exactly three are accepted, and stand-ins of our own take their
place. The scripts beside a checkpoint (``zero_to_fp32.py``) are never run.

Layout of the files: https://github.com/deepspeedai/DeepSpeed/blob/v0.19.8/deepspeed/utils/zero_to_fp32.py
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from spatialvlm.errors import CheckpointError


class _Stage(int):
    """Stands for ``ZeroStageEnum``."""


class _Opaque:
    """Stands for a record whose fields are kept as attributes."""


STAND_INS: dict[str, type] = {
    "deepspeed.runtime.zero.config.ZeroStageEnum": _Stage,
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": _Opaque,
    "deepspeed.utils.tensor_fragment.fragment_address": _Opaque,
}
"""The only names besides tensors that a file may hold."""


_STATE_FIELDS = (
    ("single_partition_of_fp32_groups", "param_slice_mappings"),
    ("fp32_flat_groups",),
)
"""What an optimizer file has to hold: up to ZeRO-2, and in ZeRO-3."""


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Trained fp32 masters and frozen weights by parameter name, from any ZeRO stage and world size.

    Args:
        folder: A checkpoint directory (with ``latest``), or one of its ``global_step*`` folders.

    Raises:
        CheckpointError: No DeepSpeed checkpoint, a file that could run code, a link, a missing rank, or a
            file without a field that is needed.
    """
    folder = _step_folder(folder)
    optims = _by_rank(folder, "*zero_pp_rank_*_optim_states.pt")
    models = _by_rank(folder, "*mp_rank_*_model_states.pt")
    if not optims or not models:
        raise CheckpointError(
            f"{folder} holds no *_model_states.pt and *_optim_states.pt of DeepSpeed's ZeRO."
        )
    states = [_load(path, "optimizer_state_dict")["optimizer_state_dict"] for path in optims]
    heads = [_load(path, "param_shapes", "dp_world_size") for path in models]
    _require(optims[0], states[0], "zero_stage")
    stage, world = int(states[0]["zero_stage"]), int(heads[0]["dp_world_size"])
    if stage < 3:
        _require(models[0], heads[0], "module")
    for path, state in zip(optims, states, strict=True):
        _require(path, state, *_STATE_FIELDS[stage >= 3])
    if len(states) != world:
        raise CheckpointError(
            f"{folder} holds the optimizer files of {len(states)} ranks, it was written by {world}."
        )
    trained = _sharded(heads, states) if stage == 3 else _partitioned(heads[0], states)
    return _frozen(heads, stage) | trained


def _step_folder(folder: Path) -> Path:
    latest = folder / "latest"
    if latest.is_file():
        name = latest.read_text(encoding="utf-8").strip()
        if not re.fullmatch(r"[\w.-]+", name):
            raise CheckpointError(f"{latest} names {name!r}, which is no folder beside it.")
        folder = folder / name
    if not folder.is_dir() or folder.is_symlink():
        raise CheckpointError(f"{folder} is no checkpoint directory.")
    return folder


def _by_rank(folder: Path, pattern: str) -> list[Path]:
    def rank(path: Path) -> int:
        return int(re.findall(r"rank_(\d+)_", path.name)[0])

    found = sorted(folder.glob(pattern), key=rank)
    for path in found:
        if path.is_symlink():
            raise CheckpointError(f"{path} is a symbolic link; copy the file it points to.")
    return found


def _load(path: Path, *fields: str) -> dict[str, Any]:
    try:
        names = set(get_unsafe_globals_in_checkpoint(path))
        if foreign := sorted(names - set(STAND_INS)):
            raise CheckpointError(
                f"{path} would import {', '.join(foreign)}, which can run code; the file was refused and nothing of it "
                "executed. Export a safetensors model with the program that wrote it."
            )
        allowed: list[Any] = [(stand_in, name) for name, stand_in in STAND_INS.items()]
        with safe_globals(allowed):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    _require(path, content, *fields)
    checked: dict[str, Any] = content
    return checked


def _require(path: Path, content: Any, *fields: str) -> None:
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a checkpoint.")
    if missing := [name for name in fields if name not in content]:
        raise CheckpointError(
            f"{path} holds no {', '.join(missing)}: another layout than that of DeepSpeed 0.19. Export a safetensors model "
            "with the program that wrote it."
        )


def _partitioned(head: Mapping[str, Any], states: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """ZeRO-1 and -2: a group's parameters lie end to end in one buffer that is cut into equal pieces."""
    weights: dict[str, Tensor] = {}
    for group, shapes in enumerate(head["param_shapes"]):
        pieces: dict[str, list[Tensor]] = {name: [] for name in shapes}
        for state in states:
            flat = state["single_partition_of_fp32_groups"][group]
            for name, place in state["param_slice_mappings"][group].items():
                pieces[name].append(flat[place.start : place.start + place.numel])
        for name, shape in shapes.items():
            weights[name] = _whole(name, pieces[name], torch.Size(shape))
    return weights


def _sharded(
    heads: Sequence[Mapping[str, Any]], states: Sequence[Mapping[str, Any]]
) -> dict[str, Tensor]:
    """ZeRO-3: every parameter is cut into equal pieces; a rank's pieces lie end to end."""
    flats = [torch.cat([part.flatten() for part in state["fp32_flat_groups"]]) for state in states]
    weights: dict[str, Tensor] = {}
    at = 0
    for shapes in heads[0]["param_shapes"]:
        for name, shape in shapes.items():
            own = math.ceil(torch.Size(shape).numel() / len(states))
            pieces = [flat[at : at + own] for flat in flats]
            weights[name] = _whole(name, pieces, torch.Size(shape))
            at += own
    return weights


def _frozen(heads: Sequence[Mapping[str, Any]], stage: int) -> dict[str, Tensor]:
    if stage < 3:
        module: Mapping[str, Tensor] = heads[0]["module"]
        return {name: value.clone() for name, value in module.items()}
    shapes = heads[0].get("frozen_param_shapes") or {}
    return {
        name: _whole(
            name,
            [head["frozen_param_fragments"][name].flatten() for head in heads],
            torch.Size(shape),
        )
        for name, shape in shapes.items()
    }


def _whole(name: str, pieces: Sequence[Tensor], shape: torch.Size) -> Tensor:
    flat = torch.cat(list(pieces)) if pieces else torch.empty(0)
    if flat.numel() < shape.numel():
        raise CheckpointError(
            f"parameter {name} has {flat.numel()} of {shape.numel()} elements in the files; a rank's file is missing."
        )
    return flat[: shape.numel()].view(shape).clone()
