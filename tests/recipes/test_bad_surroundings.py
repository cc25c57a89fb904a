"""What goes wrong around a run: damaged checkpoints, changed weights, full disks, signals, trackers, evaluations."""

import itertools
import json
import os
import shutil
import signal
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from spatialvlm.errors import CheckpointError, DataError, LaunchError
from spatialvlm.training import build, finish, plan, session
from spatialvlm.training.distributed import start_processes
from spatialvlm.training.evaluate_loss import HeldOutLoss
from spatialvlm.training.export_checkpoint import export_checkpoint
from spatialvlm.training.watchdog import Watchdog

GOLDEN = Path(__file__).parent / "golden" / "stage1_qwen3vl.json"


def record(run_dir: Path) -> dict:
    return json.loads((run_dir / "run.json").read_text())


def losses(run_dir: Path) -> list[float]:
    return [
        json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()
    ]


def test_damaged_checkpoints_are_named_and_never_thrown_away(run, recipe, tmp_path, capsys):
    config, out = recipe(1, "qwen3vl"), tmp_path / "run"
    assert run(1, config, f"run.dir={out}", "run.stop_after_steps=4") == 0
    states = sorted((out / "checkpoints").glob("*/state-*"))
    intact = [path.read_bytes() for path in states]
    for path in states:
        path.write_bytes(path.read_bytes()[:-1])
    assert run(1, config, f"run.dir={out}") == 1
    message = capsys.readouterr().err
    assert "None of the 2 checkpoints" in message
    for name in ("step-00000003", "step-00000004"):
        assert f"{name}: state-00000-of-00001.safetensors has" in message
    assert "Restore one from a copy" in message
    assert not (out / "lock").exists()
    assert record(out)["state"] == "preempted"
    states[0].write_bytes(intact[0])  # the older one is back: the newer is reported, the older used
    assert run(1, config, f"run.dir={out}") == 0
    assert "checkpoint rejected" in (out / "logs" / "rank-00000.log").read_text()
    assert losses(out)[-3:] == pytest.approx(json.loads(GOLDEN.read_text())[-3:], rel=1e-5)
    capsys.readouterr()
    assert run(1, config, f"run.dir={out}") == 0
    text = capsys.readouterr().err
    assert f"{out} has finished: 6 steps, 48 samples, 0:0" in text
    assert f"The model is in {out / 'final'}." in text


def test_going_back_to_an_earlier_checkpoint_leaves_the_later_ones_behind(
    run, recipe, tmp_path, capsys
):
    """Otherwise the next start would continue what the user has gone back from, without a word."""
    config, out = recipe(1, "qwen3vl"), tmp_path / "run"
    every = (f"run.dir={out}", "checkpoint.every=2")
    assert run(1, config, *every, "run.stop_after_steps=4") == 0
    copy = shutil.copytree(out / "checkpoints" / "step-00000002", tmp_path / "good")
    capsys.readouterr()
    assert run(1, config, *every, f"run.resume={copy}", "run.stop_after_steps=1") == 0
    text = capsys.readouterr().err
    assert "resumed good: step 2" in text
    assert "step-00000004: later than step 2, set aside as step-00000004.rejected" in text
    assert record(out)["step"] == 3
    assert run(1, config, *every) == 0
    assert "resumed step-00000003" in capsys.readouterr().err
    assert losses(out)[-3:] == pytest.approx(json.loads(GOLDEN.read_text())[-3:], rel=1e-5)


def test_other_weights_under_the_same_name_are_refused(
    run, recipe, tiny_checkpoint, tmp_path, capsys
):
    """Frozen weights are not in a checkpoint: resuming on changed ones would mix two models."""
    base = tmp_path / "model"
    shutil.copytree(tiny_checkpoint("qwen3vl"), base)
    options = (f"run.dir={tmp_path / 'run'}", f"model.init_from={base}", "optim.vision_lr=null")
    assert run(1, recipe(1, "qwen3vl"), *options, "run.stop_after_steps=1") == 0
    weights = base / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert run(1, recipe(1, "qwen3vl"), *options) == 1
    assert "was trained from other weights" in capsys.readouterr().err
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000001"
    with pytest.raises(CheckpointError, match="was trained from other weights"):
        export_checkpoint(checkpoint, tmp_path / "exported")


def test_quantised_weights_are_refused(run, recipe, tiny_checkpoint, tmp_path, capsys):
    base = tmp_path / "model"
    shutil.copytree(tiny_checkpoint("qwen3vl"), base)
    values = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(values | {"quantization_config": {"bits": 4}}))
    options = (f"run.dir={tmp_path / 'run'}", f"model.init_from={base}", "lora={r: 4}")
    assert run(1, recipe(1, "qwen3vl"), *options) == 2
    assert "holds quantised weights" in capsys.readouterr().err


def test_memory_is_judged_at_the_real_start(run, recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plan, "device_memory", lambda processes: 1e6)
    short = ("data.length.steps=1", "schedule.warmup_ratio=0.0", "export.final=false")
    strict = (f"run.dir={tmp_path / 'a'}", "memory.strict=true")
    assert run(1, recipe(1, "qwen3vl"), *strict) == 2
    assert "of 0.0 GB per device" in capsys.readouterr().err
    assert not (tmp_path / "a" / "metrics.jsonl").exists()
    assert run(1, recipe(1, "qwen3vl"), f"run.dir={tmp_path / 'b'}", *short) == 0
    assert "warning: ddp on 1 devices needs about" in capsys.readouterr().err
    written = json.loads((tmp_path / "b" / "plan.json").read_text())
    assert (written["steps"], written["per_step"], written["mixture"]) == (1, {"samples": 8}, {"spatial": 0.5, "general": 0.5})  # fmt: skip
    assert written["memory_gb"]["fits"] is False


def test_a_disk_without_room_for_a_checkpoint_is_refused_before_the_first_step(
    run, recipe, tmp_path, monkeypatch, capsys
):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("spatialvlm.training.checkpoint.shutil.disk_usage", lambda _: usage(9, 9, 9))  # fmt: skip
    assert run(1, recipe(1, "qwen3vl"), f"run.dir={tmp_path / 'run'}") == 1
    assert "MB needed. Free space" in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_unknown_number_of_steps_is_refused_with_the_way_to_know_it(
    run, recipe, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("spatialvlm.data.build.MEASURE_AT_ONCE", 0)
    packs = ("step={unit: packs, packs_per_step: 2}", "data.length={epochs: 1.0}", f"data.index_dir={tmp_path}/i")  # fmt: skip
    assert run(1, recipe(1, "qwen3vl"), f"run.dir={tmp_path / 'run'}", *packs) == 2
    assert "data.length={steps: n}" in capsys.readouterr().err
    exact = (*packs, "data.lengths=exact", "run.stop_after_steps=1", "export.final=false")
    assert run(1, recipe(1, "qwen3vl"), f"run.dir={tmp_path / 'run'}", *exact) == 0
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["per_step"] == {"packs": 2}


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(LaunchError, match="2 processes on this machine but 1 visible GPUs"):
        start_processes(timeout_s=5)


def test_a_signal_while_weights_load_is_answered_at_step_0(run, recipe, tmp_path, monkeypatch):
    config, out = recipe(1, "qwen3vl"), f"run.dir={tmp_path / 'run'}"
    before = signal.getsignal(signal.SIGTERM)
    original = build.probe_isolation

    def probe(model):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(model)

    with monkeypatch.context() as patch:
        patch.setattr(build, "probe_isolation", probe)
        assert run(1, config, out) == 0
    assert signal.getsignal(signal.SIGTERM) == before
    found = record(tmp_path / "run")
    assert (found["state"], found["step"], found["reason"]) == ("preempted", 0, "SIGTERM")
    assert run(1, config, out) == 0
    assert losses(tmp_path / "run") == pytest.approx(json.loads(GOLDEN.read_text()), rel=1e-5)


def test_a_tracker_that_cannot_be_reached_is_logged_offline_under_the_same_id(
    run, recipe, tmp_path, monkeypatch, capsys
):
    import wandb

    modes, ids, original = [], [], wandb.init

    def init(*, mode, **options):
        modes.append(mode)
        if mode == "online":
            raise wandb.errors.CommError("no network")
        started = original(mode=mode, **options)
        ids.append((options["id"], started.id))
        return started

    monkeypatch.setattr(wandb, "init", init)
    options = (
        f"run.dir={tmp_path / 'run'}",
        "log.wandb={project: p}",
        "data.length.steps=2",
        "export.final=false",
    )
    assert run(1, recipe(1, "qwen3vl"), *options, "run.stop_after_steps=1") == 0
    assert "`wandb sync` uploads it later" in capsys.readouterr().err
    assert run(1, recipe(1, "qwen3vl"), *options) == 0
    assert modes == ["online", "offline"] * 2
    assert list((tmp_path / "run" / "wandb").glob("offline-run*/*.wandb"))
    (asked, first), (again, second) = ids
    assert asked is None
    assert again == second == first  # the resumed run continues the same curves


def test_a_clock_that_jumps_back_is_seen_in_log_stamps_only(run, recipe, tmp_path, monkeypatch):
    hours = itertools.count(2e9, -3600)
    monkeypatch.setattr(time, "time", lambda: next(hours))
    short = ("data.length.steps=3", "checkpoint={every: 100, every_s: 1e-3}", "export.final=false")
    assert run(1, recipe(1, "qwen3vl"), f"run.dir={tmp_path / 'run'}", *short) == 0
    lines = [json.loads(t) for t in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["time"] > lines[1]["time"] > lines[2]["time"]
    assert all(0 < line["step_s"] < 60 and line["tokens_per_s"] > 0 for line in lines)
    assert all(line["eta_s"] >= 0 for line in lines)
    kept = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-00000002", "step-00000003"]  # saves that the clock asked for
    assert record(tmp_path / "run")["summary"]["wall_s"] > 0


def test_a_tracker_that_is_not_installed_is_told_before_the_first_step(
    run, recipe, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    options = (f"run.dir={tmp_path / 'run'}", "log.wandb={project: p}")
    assert run(1, recipe(1, "qwen3vl"), *options) == 2
    assert "pip install wandb" in capsys.readouterr().err
    assert record(tmp_path / "run")["state"] == "failed"
    assert losses(tmp_path / "run") == []


def test_a_warm_up_as_long_as_a_very_short_run_is_a_warning(run, recipe, tmp_path, capsys):
    short = ("data.length.steps=2", "schedule={warmup_steps: 2, warmup_ratio: null}", "export.final=false")  # fmt: skip
    assert run(1, recipe(1, "qwen3vl"), f"run.dir={tmp_path / 'run'}", *short) == 0
    assert "warning: the warm-up takes all 2 steps" in capsys.readouterr().err


def test_evaluations_are_checked_at_the_start_and_forgiven_once(
    run, recipe, rows, tmp_path, monkeypatch, capsys
):
    def held_out(file, every):
        source = f"{{name: held, family: spatial, files: [{file}], root: {rows}}}"
        return f"evaluation={{every_steps: {every}, max_samples: 8, sources: [{source}]}}"

    out = (f"run.dir={tmp_path / 'run'}", "export.final=false")
    assert run(1, recipe(1, "qwen3vl"), *out, held_out("none.jsonl", 5)) == 2
    assert "none.jsonl" in capsys.readouterr().err
    empty = rows / "empty.jsonl"
    empty.touch()
    assert run(1, recipe(1, "qwen3vl"), *out, held_out("empty.jsonl", 5)) == 3
    assert f"source held: {empty} holds no rows" in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()

    def fails(*_):
        raise DataError("a benchmark file was deleted")

    monkeypatch.setattr(HeldOutLoss, "__call__", fails)
    assert run(1, recipe(1, "qwen3vl"), *out, held_out("spatial.jsonl", 4)) == 0
    assert "evaluation after step 4 failed, training goes on: DataError" in capsys.readouterr().err
    twice = (f"run.dir={tmp_path / 'twice'}", held_out("spatial.jsonl", 2))
    assert run(1, recipe(1, "qwen3vl"), *twice) == 3
    assert record(tmp_path / "twice")["step"] == 4


def test_a_run_folder_that_disappears_is_named(run, recipe, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    monkeypatch.setattr(
        session, "update_report", lambda *_: shutil.rmtree(out)
    )  # after the first save
    assert run(1, recipe(1, "qwen3vl"), f"run.dir={out}") == 1
    assert str(out) in capsys.readouterr().err.splitlines()[-1]


def test_a_slow_export_is_no_hang(run, recipe, tmp_path, monkeypatch):
    """The last save and the export of a large model on a slow disk outlast the time limit of a step."""
    phases, limits = [], []
    original = Watchdog.at

    def at(self, step, phase, *more):
        original(self, step, phase, *more)
        phases.append((phase, self.limit()))

    monkeypatch.setattr(Watchdog, "at", at)
    monkeypatch.setattr(finish, "export", lambda *_: limits.append(phases[-1]))
    short = ("data.length.steps=2", "schedule.warmup_ratio=0.0", "parallel.timeout_s=60")
    assert run(1, recipe(1, "qwen3vl"), f"run.dir={tmp_path / 'run'}", *short) == 0
    assert ("log", 60.0) in phases
    assert limits == [("save", 3600.0)]


CODE = {"auto_map": {"AutoModelForImageTextToText": "modeling_mine.Mine"}}


def test_code_of_a_model_directory_is_refused_unless_asked_for_by_name(
    run, recipe, tiny_checkpoint, tmp_path, capsys
):
    base, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(tiny_checkpoint("qwen3vl"), base)
    values = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(values | CODE))
    (base / "modeling_mine.py").write_text(
        "from pathlib import Path\nfrom transformers import Qwen3VLForConditionalGeneration\n"
        f"Path({str(ran)!r}).touch()\n\n\nclass Mine(Qwen3VLForConditionalGeneration):\n    pass\n"
    )
    options = (f"run.dir={tmp_path / 'run'}", f"model.init_from={base}", "data.length.steps=1", "schedule.warmup_ratio=0.0")  # fmt: skip
    config = recipe(1, "qwen3vl")
    assert run(1, config, *options) == 1
    message = capsys.readouterr().err
    assert "asks to run its own code" in message
    assert "modeling_mine.py" in message
    assert run(1, config, *options, "--trust-remote-code") == 2
    assert "needs model.revision" in capsys.readouterr().err
    assert run(1, config, *options, "model.trust_remote_code=true") == 2  # there is no such key
    assert not ran.exists()
    capsys.readouterr()
    pinned = f"model.revision={'0123456789' * 4}"
    assert run(1, config, *options, pinned, "--trust-remote-code") == 0
    assert "trusted code of" in capsys.readouterr().err
    assert ran.exists()
    lineage = record(tmp_path / "run")["summary"]["lineage"]
    assert set(lineage["code"]) == {"modeling_mine.py"}
