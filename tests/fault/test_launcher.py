"""What a scheduler does to a job that runs under the real launcher: signals to everything at once, and kill -9."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from spatialvlm.training.status import status_of
from tests.recipes.conftest import environment, recipe, rows, run

__all__ = ["environment", "recipe", "rows", "run"]  # fixtures

ROOT = Path(__file__).resolve().parents[2]
LONG = ("data.length.steps=5000", "schedule={kind: constant, warmup_ratio: 0.0}", "checkpoint.every=5", "loader.num_workers=1")  # fmt: skip


def wait_for(launcher: subprocess.Popen, condition, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert launcher.poll() is None, launcher.communicate()[0][-3000:]
        assert time.monotonic() < end
        time.sleep(0.05)


def launch(config: Path, out: Path, env: dict[str, str]) -> tuple[subprocess.Popen, list]:
    """Two processes under ``accelerate launch``, from their first new checkpoint on; the launcher and its ranks."""
    before = set((out / "checkpoints").glob("step-????????"))
    accelerate = shutil.which("accelerate", path=str(Path(sys.executable).parent))
    command = [accelerate, "launch", "--config_file", "configs/accelerate/cpu2_ddp.yaml", "recipes/stage1.py"]  # fmt: skip
    process = subprocess.Popen(
        [*command, str(config), f"run.dir={out}", *LONG],
        cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    wait_for(process, lambda: set((out / "checkpoints").glob("step-????????")) - before)
    ranks = [p for p in psutil.Process(process.pid).children(recursive=True) if str(config) in p.cmdline()]  # fmt: skip
    assert len(ranks) == 2
    return process, ranks


@pytest.mark.fault
def test_a_job_that_is_signalled_and_one_that_is_killed_go_on(
    run, recipe, tmp_path, environment, capsys
):
    config, out = recipe(1, "qwen3vl"), tmp_path / "run"
    environment["PET_SIGNALS_TO_HANDLE"] = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = "120"
    launcher, ranks = launch(config, out, environment)
    # As SLURM does: to the launcher, which passes it on, to the ranks, and to their loader workers.
    everything = psutil.Process(launcher.pid).children(recursive=True)
    assert len(everything) >= 2 + 2 * 3  # per rank a worker, and the two helpers that start it
    for process in (launcher, *everything):
        os.kill(process.pid, signal.SIGUSR1)
    text = launcher.communicate(timeout=120)[0]
    record = json.loads((out / "run.json").read_text())
    assert (record["state"], record["reason"]) == ("preempted", "SIGUSR1"), text[-3000:]
    assert status_of(out)[0] == 75
    assert (out / "checkpoints" / f"step-{record['step']:08d}" / "COMPLETE").is_file()

    launcher, ranks = launch(config, out, environment)
    os.kill(ranks[1].pid, signal.SIGKILL)
    launcher.communicate(timeout=120)
    assert launcher.returncode != 0
    assert not any(process.is_running() for process in ranks)
    assert status_of(out)[0] == 75
    assert run(1, config, f"run.dir={out}", *LONG, "run.stop_after_steps=1") == 0
    assert "was held by process" in capsys.readouterr().err
    again = json.loads((out / "run.json").read_text())
    assert (again["attempts"], again["state"]) == (3, "preempted")
    assert again["step"] > record["step"]
