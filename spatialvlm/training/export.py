"""A plain model directory from a checkpoint: the same bytes whatever strategy trained it."""

from __future__ import annotations

import json
import shutil
import struct
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from spatialvlm.config import TrainConfig
from spatialvlm.errors import CheckpointError
from spatialvlm.models.lora import save_adapters
from spatialvlm.models.spatial_vlm import SpatialVLM
from spatialvlm.training.base import folder_manifest
from spatialvlm.training.checkpoint_files import SliceReader
from spatialvlm.training.engines import Engine
from spatialvlm.training.run import OpenRun
from spatialvlm.training.state import write_json


def export(
    config: TrainConfig, run: OpenRun, engine: Engine, checkpoint: Path, target: Path
) -> None:
    """Write a model directory from the masters of a checkpoint and the frozen weights; all ranks take part.

    The result does not depend on the strategy that trained it.

    Raises:
        CheckpointError: It cannot be written.
    """
    reader = SliceReader(checkpoint)
    frozen = engine.frozen(reader.index.shapes)
    model = engine.model
    assert isinstance(model, SpatialVLM)

    def write() -> None:
        write_model(config, run.base, model, full_state(model, reader, frozen), target)
        write_json(target.with_name(f"{target.name}.manifest.json"), folder_manifest(target))

    run.processes.on_main(write)


def write_model(
    config: TrainConfig, base: Path, model: SpatialVLM, state: dict[str, Tensor], target: Path
) -> None:
    """Model directory, or adapters alone, appearing under its name only when it is whole."""
    work = target.with_name(target.name + ".tmp")
    shutil.rmtree(work, ignore_errors=True)
    work.parent.mkdir(parents=True, exist_ok=True)
    dtype = torch.float32 if config.export.dtype == "fp32" else stored_dtype(base)
    try:
        if config.lora is not None and not config.export.merge_lora:
            save_adapters(model, work, state_dict=state)
        else:
            model.save_pretrained(work, state_dict=state, dtype=dtype)
        shutil.rmtree(target, ignore_errors=True)
        work.rename(target)
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error}") from error


def full_state(
    model: SpatialVLM, reader: SliceReader, frozen: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """State dict of the plain model: trained weights from fp32 masters, the rest as it was loaded."""
    first: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in first:
            first[id(parameter)] = (
                reader.tensor(name) if name in reader.index.shapes else frozen[name]
            )
        state[name] = first[id(parameter)]
    return state


def stored_dtype(folder: Path) -> torch.dtype:
    """The type most tensors of a model directory are stored in, read from the safetensors headers."""
    names = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    counts: Counter[str] = Counter()
    for file in folder.glob("model*.safetensors"):
        with file.open("rb") as opened:
            size = struct.unpack("<Q", opened.read(8))[0]
            header = json.loads(opened.read(size))
        counts.update(entry["dtype"] for name, entry in header.items() if name != "__metadata__")
    known = [name for name, _ in counts.most_common() if name in names]
    return names[known[0]] if known else torch.float32
