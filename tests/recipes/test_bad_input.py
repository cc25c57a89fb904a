"""What a user can get wrong around a run, and the answer: what, where, which value, how to fix it."""

import errno
import json
import os
import runpy
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from spatialvlm.config import TrainConfig, load_config
from spatialvlm.errors import CheckpointError, ConfigError, LaunchError
from spatialvlm.training.base import check_base
from spatialvlm.training.distributed import Processes, same_everywhere
from spatialvlm.training.entry import exit_code, parse_arguments
from spatialvlm.training.run import changed_keys
from spatialvlm.training.state import RunFolder

ROOT = Path(__file__).resolve().parents[2]


def test_wrong_recipes_are_answered_at_once_and_without_torch(recipe, tmp_path, environment):
    path = tmp_path / "bad.yaml"
    text = recipe(1, "qwen3vl").read_text()
    path.write_text(
        text.replace("weight_decay: 0.01", "weight_dekay: 0.01").replace(
            "precision: fp32", "precision: fp64"
        )
    )
    code = (
        "import sys; sys.argv = ['stage1.py', *sys.argv[1:]]\n"
        "import runpy\n"
        "try: runpy.run_path('recipes/stage1.py', run_name='__main__')\n"
        "except SystemExit as stop: print('exit', stop.code, 'torch' in sys.modules)\n"
    )
    root = str(environment["PYTHONPATH"])
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        cwd=root,
        env=environment,
        check=False,
    )
    assert done.stdout.strip() == "exit 2 False"
    assert "did you mean 'weight_decay'?" in done.stderr
    assert "precision" in done.stderr
    assert "2 problems" in done.stderr


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stage=2", "geometry={}"], "run it with recipes/stage2.py"),
        (["optim.geometry_lr=1.0e-3"], "there is no geometry branch"),
        (["optim={lr: null}"], "nothing would train"),
        (["lora={parts: [embeddings]}"], "adapters on 'embeddings' are not supported"),
        (["lora={parts: [vision_encoder]}", "optim.vision_lr=null"], "has no learning rate"),
        (["schedule={warmup_steps: 5, warmup_ratio: 0.1}"], "not both"),
        (["checkpoint.keep_last=1"], "at least 2"),
        (["run.dir=${oc.env:HOME}"], "interpolation is not allowed"),
        (
            ["log.wandb={project: hf_abcdefghijklmnopqrstuvwxyz}", "run.seed=hf_secrettoken"],
            "looks like a token",
        ),
    ],
)
def test_contradictions_exit_2(run, recipe, overrides, message, capsys):
    assert run(1, recipe(1, "qwen3vl"), *overrides) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "code", "message"),
    [
        (["model.init_from=nowhere/at/all"], 1, "does not exist"),
        (["model.backbone=tiny_internvl3"], 2, "is a 'qwen3_vl' model"),
        (["model.backbone=gpt5"], 2, "is not one of: internvl3_14b"),
        (["precision=bf16"], 2, "set precision=fp32"),
        (
            ["schedule={warmup_steps: 30, warmup_ratio: null}", "data.length.steps=20"],
            2,
            "would never be used",
        ),
        (["lora={parts: [language_model, projector]}"], 2, "give them one rate"),
        (["data.sources.0.files=[none.jsonl]"], 2, "none.jsonl"),
        (["run.resume=runs/none/step-00000001"], 1, "not a checkpoint directory"),
        (["data.decontamination.lists=[mine]"], 2, "are neither files nor one of"),
        (["parallel.world_size=4"], 1, "parallel.world_size=4"),
        (["model.liger=true"], 2, "needs liger-kernel"),
    ],
)
def test_wrong_surroundings(run, recipe, tmp_path, monkeypatch, overrides, code, message, capsys):
    monkeypatch.delenv("SPATIALVLM_TEST", raising=False)
    assert run(1, recipe(1, "qwen3vl"), f"run.dir={tmp_path / 'run'}", *overrides) == code
    assert message in capsys.readouterr().err
    record = tmp_path / "run" / "run.json"
    if record.is_file():
        assert json.loads(record.read_text())["state"] == "failed"


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe"])
def test_files_that_hold_something_else_are_named(
    run, recipe, tmp_path, tiny_checkpoint, content, capsys
):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_bytes(content)
    assert run(1, recipe(1, "qwen3vl"), f"run.dir={folder}") == 1
    assert f"{folder / 'run.json'} is no record of a run" in capsys.readouterr().err
    assert (folder / "run.json").read_bytes() == content
    assert not (folder / "lock").exists()
    model = tmp_path / "model"
    shutil.copytree(tiny_checkpoint("qwen3vl"), model)
    (model / "config.json").write_bytes(content)
    overrides = [f"run.dir={tmp_path / 'other'}", f"model.init_from={model}"]
    assert run(1, recipe(1, "qwen3vl"), *overrides) == 1
    assert f"{model / 'config.json'} is no model configuration" in capsys.readouterr().err


def test_a_model_without_its_processor_and_a_folder_that_cannot_be_written(
    run, recipe, tmp_path, tiny_checkpoint, capsys
):
    model = tmp_path / "model"
    shutil.copytree(tiny_checkpoint("qwen3vl"), model)
    for file in model.glob("*processor*"):
        file.unlink()
    here = f"run.dir={tmp_path / 'run'}"
    assert run(1, recipe(1, "qwen3vl"), here, f"model.init_from={model}") == 1
    assert f"{model} has no usable processor" in capsys.readouterr().err
    (tmp_path / "run" / "config.resolved.yaml").unlink()
    (tmp_path / "run" / "data.json").mkdir()  # in the place of a file
    assert run(1, recipe(1, "qwen3vl"), here) == 1
    assert "data.json" in capsys.readouterr().err.splitlines()[-1]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["state"] == "failed"
    assert not (tmp_path / "run" / "lock").exists()  # another machine may try again at once


def test_a_full_disk_is_named_and_the_record_of_the_run_stays_whole(
    run, recipe, tmp_path, monkeypatch, capsys
):
    from spatialvlm.training import state

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("spatialvlm.data.build.write_record", full)
    writes = iter([state.write_json])  # run.json once
    monkeypatch.setattr(state, "write_json", lambda *args: next(writes, full)(*args))
    assert run(1, recipe(1, "qwen3vl"), f"run.dir={tmp_path / 'run'}") == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"No space left on device in run.dir={tmp_path / 'run'} or data.index_dir" in message
    assert json.loads((tmp_path / "run" / "run.json").read_text())["state"] == "running"


def test_broken_rows_and_wrong_marker_counts_name_file_and_line(
    run, recipe, rows, tmp_path, capsys
):
    good = (rows / "spatial.jsonl").read_text().splitlines()
    without_image = json.dumps({k: v for k, v in json.loads(good[1]).items() if k != "images"})
    (rows / "broken.jsonl").write_text(
        "\n".join([*good[:4], '{"messages": [', without_image]) + "\n"
    )
    overrides = [f"run.dir={tmp_path / 'run'}", "data.sources.0.files=[broken.jsonl]"]
    assert run(1, recipe(1, "qwen3vl"), *overrides) == 3
    message = capsys.readouterr().err
    assert "broken.jsonl:5 column 15: Expecting value" in message
    assert "broken.jsonl:6 has 1 <image> marker and 0 images" in message


def test_a_missing_image_is_told_and_left_out_many_end_the_run(run, recipe, rows, tmp_path, capsys):
    good = (rows / "spatial.jsonl").read_text().splitlines()
    lost = json.dumps(json.loads(good[0]) | {"images": ["gone.png"]})
    place = f"lost.jsonl:3: no such file: {rows / 'gone.png'}"
    where = f"run.dir={tmp_path / 'run'}"
    for others, code, message in ((30, 0, "1 of 31 rows"), (2, 3, "1 of 3 rows")):
        lines = [*good[:2], lost, *good[2:others]]
        (rows / "lost.jsonl").write_text("\n".join(lines) + "\n")
        overrides = [where, "data.sources.0.files=[lost.jsonl]", "data.length={steps: 1}"]
        assert run(1, recipe(1, "qwen3vl"), *overrides) == code
        text = capsys.readouterr().err
        assert f"source squares: {message} cannot be used: missing 1 (first: {place})" in text
        where = f"run.dir={tmp_path / 'other'}"


def test_a_missing_geometry_encoder_says_which_key_names_it(run, recipe, tmp_path, capsys):
    overrides = [f"run.dir={tmp_path / 'run'}", "geometry.source=/nowhere/vggt.safetensors"]
    assert run(2, recipe(2, "qwen3vl"), *overrides) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert "geometry.source=/nowhere/vggt.safetensors is neither" in message
    assert "model.geometry_source in evaluation" in message


def test_pickled_weights_are_refused(recipe, tmp_path, tiny_checkpoint):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text((tiny_checkpoint("qwen3vl") / "config.json").read_text())
    (folder / "pytorch_model.bin").write_bytes(b"x")
    config = load_config(recipe(1, "qwen3vl"), [f"model.init_from={folder}"], TrainConfig)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*Pickled weights can run code"):
        check_base(config)


def test_a_run_folder_inside_the_data_or_the_package_is_refused(run, recipe, rows, capsys):
    assert run(1, recipe(1, "qwen3vl"), f"run.dir={rows / 'run'}") == 2
    assert "choose a directory of its own" in capsys.readouterr().err
    assert not (rows / "run").exists()


def test_a_folder_in_use_is_refused_and_a_dead_owner_replaced(tmp_path):
    first = RunFolder(tmp_path, private=False)
    first.open()
    lock = tmp_path / "lock"
    lock.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getppid()}))
    with pytest.raises(LaunchError, match=f"in use by process {os.getppid()}"):
        RunFolder(tmp_path, private=False).open()
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    with pytest.raises(LaunchError, match="on elsewhere"):
        RunFolder(tmp_path, private=False).open()
    os.utime(lock, (0, 0))  # no heartbeat for a long time
    RunFolder(tmp_path, private=False).open()
    lock.write_text(json.dumps({"host": socket.gethostname(), "pid": 2**22 - 7}))
    RunFolder(tmp_path, private=False).open()
    assert json.loads(lock.read_text())["pid"] == os.getpid()
    (tmp_path / "file").write_text("")
    with pytest.raises(LaunchError, match="cannot be written"):
        RunFolder(tmp_path / "file" / "run", private=False).open()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("render_rooms.py --num 1 --size 64 --out FOLDER/file", "File exists: 'FOLDER/file'"),
        ("make_general.py --num 1 --out FOLDER/file/x", "Not a directory: 'FOLDER/file"),
        ("make_tiny.py FOLDER/file", "Not a directory: 'FOLDER/file"),
        ("synthesize.py --scenes FOLDER --out FOLDER/qa", "FOLDER/scene.json: not a JSON file"),
        (
            "synthesize.py --scenes FOLDER --out FOLDER/qa --tasks FOLDER/a.yaml",
            "is not valid YAML",
        ),
        (
            "synthesize.py --merge-manifest --out FOLDER/none",
            "FOLDER/none: no sidecar part-*-of-*.json to merge",
        ),
        ("verify_qa.py FOLDER --scenes FOLDER", "FOLDER/scene.json: not a JSON file"),
        ("audit_qa.py FOLDER", "FOLDER/a.parquet is not a readable parquet file"),
        ("plot_run.py FOLDER --out FOLDER/file/a.html", "'FOLDER/file'"),
    ],
)
def test_tools_answer_with_one_line(command, message, tmp_path, monkeypatch, capsys):
    for name, content in {
        "file": b"",
        "scene.json": b"\xff{",
        "a.yaml": b"tasks: [\xff",
        "a.parquet": b"\0" * 99,
        "metrics.jsonl": b'{"step": 1, "loss": 2.0}\n\xff\n{"step"',
    }.items():
        (tmp_path / name).write_bytes(content)
    tool, *arguments = command.replace("FOLDER", str(tmp_path)).split()
    monkeypatch.setattr(sys, "argv", [tool, *arguments])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "tools" / tool), run_name="__main__")
    lines = capsys.readouterr().err.splitlines()
    assert (stop.value.code, message.replace("FOLDER", str(tmp_path)) in lines[-1]) == (2, True)


def test_private_runs_are_readable_by_their_owner_only(tmp_path):
    RunFolder(tmp_path / "run", private=True).open()
    assert (tmp_path / "run").stat().st_mode & 0o077 == 0


def test_what_may_change_on_resume():
    old = {
        "optim": {"lr": 1.0, "betas": [0.9]},
        "log": {"every": 1},
        "run": {"dir": "a", "seed": 1},
    }
    new = {
        "optim": {"lr": 2.0, "betas": [0.9]},
        "log": {"every": 5},
        "run": {"dir": "b", "seed": 2},
    }
    assert changed_keys(old, new, ()) == [("optim.lr", 1.0, 2.0), ("run.seed", 1, 2)]
    assert changed_keys(old, new, ("optim",)) == [("run.seed", 1, 2)]
    assert changed_keys(old, new, ("optim.lr", "run.seed")) == []


def test_ranks_that_differ_are_listed():
    class Two(Processes):
        def gather(self, value):
            return [value, {**value, "torch": "2.9"}]

    with pytest.raises(LaunchError, match=r"torch: rank 0=2\.15, rank 1=2\.9"):
        same_everywhere(Two(0, 2, None), {"torch": "2.15", "config": "a"})


def test_command_line_and_exit_codes():
    found = parse_arguments(None, ["a.yaml", "x=1", "y=2", "--dry-run"])
    assert (found.overrides, found.dry_run) == (("x=1", "y=2"), True)
    assert parse_arguments(None, ["a.yaml", "--dry-run", "x=1", "y=2"]) == found  # in any order
    with pytest.raises(SystemExit):
        parse_arguments(
            None, ["a.yaml", "--dry"]
        )  # no abbreviations: launchers have flags of their own
    assert [exit_code(e("")) for e in (ConfigError, LaunchError, CheckpointError)] == [2, 1, 1]
