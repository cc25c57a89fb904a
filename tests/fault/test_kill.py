"""kill -9 at random moments and at named points of a save, then resume: bit for bit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.fault
@pytest.mark.parametrize("kills", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_runs_resume_bit_for_bit(tmp_path, kills):
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "kill_harness.py"),
        "--kills",
        str(kills),
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False)
    results = json.loads((tmp_path / "kill.json").read_text())["cases"]
    assert len(results) == kills
    assert [r for r in results if r["problems"]] == [], done.stdout[-2000:]
    assert any(-9 in r["first_exit"] for r in results)
