"""What happens to a run when it is killed, asked to stop, or meets a scene that fails, hangs or crashes."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from spatialvlm.errors import SynthesisError
from spatialvlm.scenes.io import load_scene, save_scene
from spatialvlm.synthesis import engine
from spatialvlm.synthesis.engine import synthesize, time_limit
from spatialvlm.synthesis.executors import run_parts, run_separately
from spatialvlm.synthesis.generate import generate_scene
from spatialvlm.synthesis.parts import RowWriter, list_scenes, write_rows
from spatialvlm.synthesis.plan import make_plan

ROOT = Path(__file__).resolve().parents[3]
TASKS = "left_right,size_rel,dist_abs,locate_cell,is_position,vsi_rel_dir,vsi_rel_dist,ssr_lcm,depth_order"
NUM_SCENES = 16


@pytest.fixture(scope="module")
def scenes(tmp_path_factory, data_dir):
    """Copies of the hand room with ids of their own."""
    folder = tmp_path_factory.mktemp("scenes")
    room = load_scene(data_dir / "scenes" / "hand_room.json")
    for i in range(NUM_SCENES):
        frames = [replace(f, rgb=f"rgb/{f.frame_id}.jpg") for f in room.frames]
        copy = replace(room, scene_id=f"rooms/hand-{i:02d}", frames=frames, root=None)
        save_scene(copy, folder / f"hand-{i:02d}")
    return folder


@pytest.fixture(scope="module")
def expected(scenes, tmp_path_factory):
    """Bytes of every file of an undisturbed run."""
    out = tmp_path_factory.mktemp("expected")
    synthesize(scenes, out, make_plan(TASKS, per_task=200), executor="serial")
    return digests(out)


def digests(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*.parquet"))}


def start(scenes, out, workers):
    command = [
        sys.executable, str(ROOT / "tools" / "synthesize.py"), "--scenes", str(scenes), "--out", str(out),
        "--tasks", TASKS, "--per-task", "200", "--workers", str(workers),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def wait_for_part(run, out):
    while not list(out.glob("part-*.json")):
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.002)


def children_of(pid):
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


@pytest.mark.fault
@pytest.mark.parametrize(("number", "workers"), [(signal.SIGKILL, 2), (signal.SIGTERM, 2), (signal.SIGTERM, 1)])  # fmt: skip
def test_a_stopped_run_resumes_without_a_lost_or_doubled_row(scenes, expected, tmp_path, number, workers):  # fmt: skip
    run = start(scenes, tmp_path, workers)
    wait_for_part(run, tmp_path)
    workers_left = children_of(run.pid)
    run.send_signal(number)
    run.wait()
    before = len(list(tmp_path.glob("part-*.json")))
    assert run.returncode == (-9 if number == signal.SIGKILL else 143)
    assert 1 <= before < NUM_SCENES
    assert not (tmp_path / "_SUCCESS").exists()
    if number == signal.SIGTERM:
        assert "the same command continues" in run.stderr.read()
    while any(Path(f"/proc/{pid}/cmdline").exists() for pid in workers_left):
        time.sleep(0.05)  # workers of a killed run end by themselves, or this test hangs
    summary = synthesize(scenes, tmp_path, make_plan(TASKS, per_task=200), executor="serial")
    assert summary.skipped_parts >= before
    assert digests(tmp_path) == expected
    assert list(tmp_path.glob(".*")) == []
    ids = [i for p in tmp_path.glob("*.parquet") for i in pq.read_table(p)["id"].to_pylist()]
    assert len(ids) == len(set(ids)) == summary.rows
    assert (tmp_path / "_SUCCESS").exists()


def test_a_failed_scene_is_listed_and_made_up_for_by_the_next_run(
    scenes, expected, tmp_path, monkeypatch
):
    copies, out = tmp_path / "scenes", tmp_path / "rows"
    for path in sorted(scenes.iterdir()):
        (copies / path.name).mkdir(parents=True)
        (copies / path.name / "scene.json").write_text((path / "scene.json").read_text())
    broken = copies / "hand-05" / "scene.json"
    good = broken.read_text()
    values = json.loads(good)
    values["objects"][0]["size"] = [0.0, 1.0, 1.0]
    broken.write_text(json.dumps(values))
    plan = make_plan(TASKS, per_task=200)
    with pytest.raises(SynthesisError, match=r"1 of 16 scenes failed(.|\n)*box size"):
        synthesize(copies, out, plan, executor="serial")
    summary = synthesize(copies, out, plan, executor="serial", max_failed=0.2)
    assert list(summary.failed_scenes) == ["rooms/hand-05"]
    assert "BoxError" in summary.failed_scenes["rooms/hand-05"]
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["failed_scenes"] == ["rooms/hand-05"]
    assert sum(name in expected and data == expected[name] for name, data in digests(out).items()) == 15  # fmt: skip

    broken.write_text(good)
    summary = synthesize(copies, out, plan, executor="serial")
    assert summary.skipped_parts == 15
    assert summary.failed_scenes == {}
    assert digests(out) == expected


def test_a_scene_that_takes_too_long_is_a_failed_scene(scenes, tmp_path):
    with pytest.raises(SynthesisError, match=r"takes longer than 0\.0001 s"):
        synthesize(
            scenes, tmp_path, make_plan(TASKS), executor="serial", limit=1, scene_timeout_s=1e-4
        )


def test_a_time_limit_ends_an_endless_loop_and_leaves_no_alarm():
    def forever():
        with time_limit(0.01, "this"):
            while True:
                pass

    with pytest.raises(SynthesisError, match="--scene-timeout"):
        forever()
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL
    with time_limit(0, "nothing"):
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_worker_that_dies_is_named_instead_of_waited_for():
    with pytest.raises(SynthesisError, match="a worker process died"):
        list(run_parts("process", 2, os._exit, [3, 3]))
    with pytest.raises(SynthesisError, match="the process died"):
        run_separately(os._exit, 3)
    assert run_separately(abs, -3) == 3


def test_a_writer_holds_one_row_group_and_leaves_nothing_behind_after_an_error(expected, tmp_path):
    first = tmp_path / sorted(expected)[0]
    first.write_bytes(expected[first.name])
    rows = pq.read_table(first).to_pylist()
    many = [{**row, "id": f"{i}-{row['id']}"} for i in range(32) for row in rows]
    whole, pieces = tmp_path / "whole.parquet", tmp_path / "pieces.parquet"
    write_rows(whole, many)
    with RowWriter(pieces) as writer:
        for start_at in range(0, len(many), 500):
            writer.add(many[start_at : start_at + 500])
    assert pieces.read_bytes() == whole.read_bytes()
    assert pq.read_metadata(whole).row_group(0).num_rows == 4096
    assert pq.read_table(whole).to_pylist() == many

    def stopped():
        with RowWriter(tmp_path / "half.parquet") as writer:
            writer.add(many)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([first.name, "pieces.parquet", "whole.parquet"])  # fmt: skip


@pytest.mark.parametrize("fails", ["ParquetWriter.write_table", "ParquetWriter.close"])
def test_a_full_disk_leaves_nothing_behind(fails, monkeypatch, tmp_path):
    def full(writer, *_):
        if writer.is_open:  # pyarrow closes again when it drops the object
            writer.is_open = False
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"pyarrow.parquet.{fails}", full)
    with pytest.raises(OSError, match="No space left"):
        write_rows(tmp_path / "rows.parquet", [])
    assert list(tmp_path.iterdir()) == []


def test_rows_that_do_not_say_their_answer_are_not_written(scenes, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        rows, counters = generate_scene(*args, **kwargs)
        return [{**row, "answer_text": "perhaps"} for row in rows], counters

    monkeypatch.setattr(engine, "generate_scene", broken)
    job = engine.Job(scenes, tmp_path, make_plan("left_right"))
    monkeypatch.setattr(engine, "SELF_CHECK", 1.0)
    with pytest.raises(SynthesisError, match="'perhaps' is not a terse"):
        engine.scene_rows(job, list_scenes(scenes)[0])
