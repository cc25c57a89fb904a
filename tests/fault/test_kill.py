"""kill -9 at named points of a save and at random moments, then resume: bit for bit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.fault
@pytest.mark.parametrize("cases", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_runs_resume_bit_for_bit(tmp_path, cases):
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "kill_harness.py"),
        "--cases",
        str(cases),
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False)
    results = json.loads((tmp_path / "kill.json").read_text())
    assert len(results) == cases
    assert [r for r in results if r["problems"]] == [], done.stdout[-2000:]
    assert any(-9 in r["first_exit"] for r in results)
