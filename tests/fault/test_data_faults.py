"""Broken media and dead workers under the shipped recipe: named, counted, and nothing is lost."""

import json
import os
import signal
from pathlib import Path

import psutil
import pytest

from spatialvlm.data.workers import WorkerPool
from spatialvlm.training.recorder import Recorder
from tests.recipes.conftest import recipe_text, run, write_rows

__all__ = ["run"]  # a fixture


@pytest.fixture
def damaged(tmp_path, tiny_checkpoint):
    """A recipe on 100 images, one of which ends in the middle of its pixels."""
    rows = write_rows(tmp_path / "rows", num=100)
    image = rows / "042.png"
    image.write_bytes(image.read_bytes()[:150])
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_text(1, "qwen3vl", tiny_checkpoint("qwen3vl"), rows))
    return path


def losses(run_dir: Path) -> dict[int, float]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return {record["step"]: record["loss"] for record in map(json.loads, lines)}


@pytest.mark.fault
def test_one_percent_of_broken_media_is_replaced_and_recorded(run, damaged, tmp_path):
    out = tmp_path / "run"
    once_through = ("data.length={epochs: 1.0, of: spatial}", "checkpoint.every=100")
    allowed = ("data.max_bad_fraction=0.02", "export.final=false")
    assert run(1, damaged, f"run.dir={out}", *once_through, *allowed) == 0
    events = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert {event["source"] for event in events} == {"squares", "chat"}
    assert all("042.png" in event["media"] and event["reason"] == "truncated" for event in events)
    assert all(event["replaced_by"] for event in events)
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["faults/truncated"] == len(events)
    record = json.loads((out / "run.json").read_text())
    assert record["summary"]["samples"] == 8 * record["step"]  # every slot was filled


@pytest.mark.fault
def test_a_source_without_tolerance_ends_the_run_with_the_file(run, damaged, tmp_path, capsys):
    strict = ("data.sources.0.max_bad_fraction=0", "data.length={epochs: 1.0, of: spatial}")
    assert run(1, damaged, f"run.dir={tmp_path / 'run'}", *strict) == 3
    message = capsys.readouterr().err
    assert "042.png" in message
    assert "tolerates no broken sample" in message
    assert json.loads((tmp_path / "run" / "run.json").read_text())["state"] == "failed"


@pytest.mark.fault
def test_a_killed_worker_ends_the_run_and_the_next_start_continues(
    run, damaged, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "run"
    options = ("loader.num_workers=1", "checkpoint.every=1", "export.final=false", "data.max_bad_fraction=1.0")  # fmt: skip
    assert run(1, damaged, f"run.dir={tmp_path / 'straight'}", *options) == 0
    original, calls = WorkerPool.get, []

    def get(self, ticket):
        calls.append(ticket)
        if len(calls) == 4:
            os.kill(self._workers[0].process.pid, signal.SIGKILL)
        return original(self, ticket)

    with monkeypatch.context() as patch:
        patch.setattr(WorkerPool, "get", get)
        assert run(1, damaged, f"run.dir={out}", *options) == 3
    message = capsys.readouterr().err
    assert "a loader worker died (signal SIGKILL) while it read" in message
    assert json.loads((out / "run.json").read_text())["state"] == "failed"
    assert run(1, damaged, f"run.dir={out}", *options) == 0
    assert losses(out) == losses(tmp_path / "straight")


@pytest.mark.fault
@pytest.mark.slow
def test_hundreds_of_steps_leave_no_files_open_and_no_memory_behind(
    run, damaged, tmp_path, monkeypatch
):
    """Saves, log lines, broken samples and a restart on the way; counted between steps 150 and 400."""
    process = psutil.Process()
    seen: dict[int, tuple[int, int]] = {}
    original = Recorder.end_step

    def end_step(self, state, **kwargs):
        original(self, state, **kwargs)
        seen[state.step] = (process.num_fds(), process.memory_info().rss)

    monkeypatch.setattr(Recorder, "end_step", end_step)
    options = (
        f"run.dir={tmp_path / 'run'}", "data.length.steps=400", "checkpoint.every=20", "data.max_bad_fraction=1.0",
        "loader.num_workers=1", "export.final=false",
    )  # fmt: skip
    assert run(1, damaged, *options, "run.stop_after_steps=100") == 0
    assert run(1, damaged, *options) == 0
    files, memory = zip(*(seen[step] for step in range(150, 401)), strict=True)
    assert max(files) - files[0] <= 1  # a save may be in flight
    # The first half may still fill caches; the second half may not keep growing.
    assert max(memory[125:]) - max(memory[:125]) < 4 << 20
    assert (tmp_path / "run" / "quarantine.jsonl").is_file()
