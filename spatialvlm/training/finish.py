"""What a run leaves behind: last checkpoint, exported model, summary, report."""

from __future__ import annotations

import sys
from typing import Any

from spatialvlm.config import TrainConfig
from spatialvlm.training.build import Session
from spatialvlm.training.engines import Engine
from spatialvlm.training.export import export
from spatialvlm.training.loop import Outcome
from spatialvlm.training.progress import duration
from spatialvlm.training.report import write_summary
from spatialvlm.training.run import OpenRun, update_report
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
