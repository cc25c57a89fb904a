"""What state is a run in? ``python -m spatialvlm.training.status RUN_DIR`` answers with its exit code.

0 finished, 75 resumable (preempted, or running without a live process), 1 failed, 2 unknown. A run that died three
times in a row before its next checkpoint has failed: the fourth launch would die like them. Needs no torch, so a batch
script can call it cheaply before it decides to requeue.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

FINISHED, FAILED, UNKNOWN, RESUMABLE = 0, 1, 2, 75
MAX_FRUITLESS = 3
"""Launches that may die without a checkpoint, one after the other."""


def status_of(run_dir: Path) -> tuple[int, str]:
    """Exit code and one line of explanation for a run directory."""
    path = run_dir / "run.json"
    if not path.is_file():
        return UNKNOWN, f"{path} does not exist"
    try:
        record = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        return UNKNOWN, f"{path} is not valid JSON: {error}"
    state, step = record.get("state"), record.get("step")
    line = f"{state} at step {step}: {record.get('reason') or 'no reason recorded'}"
    if state == "finished":
        return FINISHED, line
    if state == "running" and record.get("fruitless", 0) + 1 >= MAX_FRUITLESS:
        return FAILED, (
            f"{MAX_FRUITLESS} launches in a row died after step {record.get('started_at')} before the next checkpoint; see "
            f"logs/rank-*.log in {run_dir}, then start it by hand"
        )
    if state in ("preempted", "running"):
        return RESUMABLE, line
    return (FAILED, line) if state == "failed" else (UNKNOWN, line)


def main(argv: list[str] | None = None) -> int:
    """Print the state of a run and return its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m spatialvlm.training.status RUN_DIR\n")
        return UNKNOWN
    code, line = status_of(Path(arguments[0]))
    sys.stdout.write(line + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
