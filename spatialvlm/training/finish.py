"""What a run leaves behind: last checkpoint, exported model, summary, report."""

from __future__ import annotations

import json
import shutil
import struct
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spatialvlm.config import TrainConfig
from spatialvlm.errors import CheckpointError
from spatialvlm.models.lora import save_adapters
from spatialvlm.models.spatial_vlm import SpatialVLM
from spatialvlm.training.build import Session
from spatialvlm.training.checkpoint import SliceReader
from spatialvlm.training.engines import Engine
from spatialvlm.training.loop import Outcome
from spatialvlm.training.progress import duration
from spatialvlm.training.report import write_summary
from spatialvlm.training.run import OpenRun, folder_manifest, update_report
from spatialvlm.training.state import TrainState, write_json


def close_run(
    config: TrainConfig,
    run: OpenRun,
    state: TrainState,
    engine: Engine,
    session: Session,
    outcome: Outcome,
) -> None:
    """End a run: when it is finished, save, export and summarise; ``run.json`` tells which it was.

    Raises:
        CheckpointError: The last checkpoint or the export cannot be written.
    """
    if outcome == "finished":
        session.save(state, engine, final=True)
        checkpoint = run.store.folder / f"step-{state.step:08d}"
        if config.export.final:
            export(config, run, engine, checkpoint, run.path / "final")
    session.close()
    if not run.processes.is_main:
        return
    values = summary(run, state, session, outcome)
    write_summary(run.path, values)
    reason = None if outcome == "finished" else session.stop.name or "asked to stop on another rank"
    run.folder.record(state=outcome, step=state.step, reason=reason, summary=values)
    if config.log.report:
        update_report(run.path, config)
    run.folder.unlock()
    sys.stderr.write(
        f"{outcome} at step {state.step}: {state.samples:,} samples, {state.tokens:,} tokens in "
        f"{duration(state.wall_s)}; {run.path}\n"
    )


def summary(run: OpenRun, state: TrainState, session: Session, outcome: Outcome) -> dict[str, Any]:
    """Totals of the run as plain values."""
    last = session.record.last
    size = run.processes.size
    seconds = max(state.wall_s, 1e-9)
    return {
        "outcome": outcome,
        "steps": state.step,
        "samples": state.samples,
        "tokens": state.tokens,
        "label_tokens": state.label_tokens,
        "wall_s": round(state.wall_s, 2),
        "device_hours": round(state.wall_s * size / 3600, 4),
        "tokens_per_s": round(state.tokens / seconds, 1),
        "tflops_per_device": round(state.flops / seconds / size / 1e12, 4),
        "mfu": last.get("mfu"),
        "mfu_gemm": last.get("mfu_gemm"),
        "skipped": state.skipped,
        "empty": state.empty,
        "spikes": state.spikes,
        "final": {k: v for k, v in last.items() if k.startswith("loss") or k == "token_acc"},
        "checkpoint": f"checkpoints/step-{state.step:08d}",
        "export": "final" if outcome == "finished" and (run.path / "final").is_dir() else None,
        "lineage": run.lineage,
    }


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
        work = target.with_name(target.name + ".tmp")
        shutil.rmtree(work, ignore_errors=True)
        dtype = torch.float32 if config.export.dtype == "fp32" else stored_dtype(run.base)
        try:
            state = full_state(engine, reader, frozen)
            if config.lora is not None and not config.export.merge_lora:
                save_adapters(model, work, state_dict=state)
            else:
                model.save_pretrained(work, state_dict=state, dtype=dtype)
            shutil.rmtree(target, ignore_errors=True)
            work.rename(target)
            write_json(target.with_name(f"{target.name}.manifest.json"), folder_manifest(target))
        except OSError as error:
            raise CheckpointError(f"{target} cannot be written: {error}") from error

    run.processes.on_main(write)


def full_state(
    engine: Engine, reader: SliceReader, frozen: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """State dict of the plain model: trained weights from fp32 masters, the rest as it was loaded."""
    first: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    for name, parameter in engine.model.named_parameters(remove_duplicate=False):
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
