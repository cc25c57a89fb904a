"""Faults one after the other in one run: each ends as it must, nothing is left over, replayed steps are equal."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.fault
@pytest.mark.slow
def test_every_fault_in_turn(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "soak.py"), "--out", str(tmp_path)]
    options = ["--steps", "1500", "--faults-every", "100"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=1500, check=False)  # fmt: skip
    report = json.loads((tmp_path / "soak.json").read_text())
    assert report["problems"] == [], done.stdout[-3000:]
    endings = [launch["ending"] for launch in report["launches"]]
    assert endings == ["kill", "term", "worker", "kill in save", "end"]
    assert report["skipped"] == report["nan_steps"] > 0
    assert report["trained_twice"]["log_lines"] > 0
