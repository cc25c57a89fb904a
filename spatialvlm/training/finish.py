"""What a run leaves behind: last checkpoint, exported model, summary, report."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spatialvlm.config import TrainConfig
from spatialvlm.training.engines import Engine
from spatialvlm.training.export import export
from spatialvlm.training.loop import Outcome
from spatialvlm.training.progress import duration
from spatialvlm.training.report import write_summary
from spatialvlm.training.run import OpenRun, update_report
from spatialvlm.training.session import Session
from spatialvlm.training.state import TrainState


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
    session.watch.at(state.step, "save")  # what follows takes its time
    if outcome == "finished":
        session.save(state, engine, final=True)
        checkpoint = run.store.path(state.step)
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
    sys.stderr.write(describe_end(run.path, values))


def describe_end(path: Path, values: Mapping[str, Any]) -> str:
    """The summary as it is printed: what was done, how fast, what went wrong, where it is.

    Args:
        path: Run folder.
        values: From :func:`summary`.
    """
    speed = f"{values['tokens_per_s']:,.0f} tokens/s"
    if values["mfu"] is not None:
        speed += f", MFU {values['mfu']:.1%}"
    elif values["mfu_gemm"] is not None:
        speed += f", {values['mfu_gemm']:.0%} of this machine's matrix products"
    lines = [
        f"{values['outcome']} at step {values['steps']:,}: {values['samples']:,} samples, {values['tokens']:,} tokens in "
        f"{duration(values['wall_s'])} ({values['device_hours']:,.2f} device hours, {speed})"
    ]
    if "loss" in values["final"]:
        counted = ", ".join(f"{values[name]} {name}" for name in ("skipped", "empty", "spikes"))
        faults = sum(values["faults"].values())
        lines.append(
            f"last loss {values['final']['loss']:.4f}; steps: {counted}; broken samples: {faults:.0f}"
        )
    lines.append(f"checkpoint {path / values['checkpoint']}")
    if values["export"]:
        lines.append(f"model {path / values['export']}")
    return "\n".join(lines) + "\n"


def summary(run: OpenRun, state: TrainState, session: Session, outcome: Outcome) -> dict[str, Any]:
    """Totals of the run as plain values; utilisation is the mean over all attempts, faults are those of this one."""
    last = session.record.last
    size = run.processes.size
    seconds = max(state.wall_s, 1e-9)
    rate = state.flops / seconds / size
    meter = session.record.meter
    return {
        "outcome": outcome,
        "steps": state.step,
        "samples": state.samples,
        "tokens": state.tokens,
        "label_tokens": state.label_tokens,
        "wall_s": round(state.wall_s, 2),
        "device_hours": round(state.wall_s * size / 3600, 4),
        "tokens_per_s": round(state.tokens / seconds, 1),
        "tflops_per_device": round(rate / 1e12, 4),
        "mfu": rate / meter.peak if meter.peak else None,
        "mfu_gemm": rate / meter.gemm if meter.gemm else None,
        "skipped": state.skipped,
        "empty": state.empty,
        "spikes": state.spikes,
        "faults": {
            k.removeprefix("faults/"): v for k, v in last.items() if k.startswith("faults/")
        },
        "final": {k: v for k, v in last.items() if k.startswith("loss") or k == "token_acc"},
        "checkpoint": f"checkpoints/step-{state.step:08d}",
        "export": "final" if outcome == "finished" and (run.path / "final").is_dir() else None,
        "lineage": run.lineage,
    }
