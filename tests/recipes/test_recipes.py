"""The shipped recipes on small models: losses on file, files left behind, resume, stage 1 to stage 2."""

import json
import math
from pathlib import Path

import pytest
from safetensors.torch import load_file

from spatialvlm.errors import CheckpointError
from spatialvlm.training.export_checkpoint import export_checkpoint
from spatialvlm.training.status import status_of

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = ("qwen3vl", "qwen2_5vl", "internvl3")
RUN_FILES = {
    "checkpoints", "config.resolved.yaml", "data.json", "environment.json", "final", "final.manifest.json", "groups.txt",
    "logs", "metrics.jsonl", "plan.json", "report.html", "run.json", "summary.json",
}  # fmt: skip


def lines(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def numbers(run_dir: Path, last_attempt: bool = True) -> dict[int, tuple]:
    """Step -> everything that must not depend on how often a run was interrupted."""
    keys = ("loss", "token_acc", "tokens")
    return {
        line["step"]: tuple(line[k] for k in keys)
        + tuple(
            sorted((k, v) for k, v in line.items() if k.startswith(("lr/", "grad_norm/", "loss/")))
        )
        for line in lines(run_dir)
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stage", [1, 2])
def test_golden_losses(run, recipe, tmp_path, stage, family):
    out = tmp_path / "run"
    assert run(stage, recipe(stage, family), f"run.dir={out}") == 0
    losses = [line["loss"] for line in lines(out)]
    golden = json.loads((GOLDEN / f"stage{stage}_{family}.json").read_text())
    assert losses == pytest.approx(golden, rel=1e-5)
    assert losses[-1] < losses[0] - 0.5
    assert {p.name for p in out.iterdir()} == RUN_FILES
    assert status_of(out)[0] == 0
    kept = sorted(p.name for p in (out / "checkpoints").iterdir())
    assert kept == ["step-00000003", "step-00000006"]
    last = lines(out)[-1]
    parts = {"language_model", "vision_encoder", "projector", "embeddings"}
    parts |= {"geometry_fusion"} if stage == 2 else set()
    assert {k[3:] for k in last if k.startswith("lr/")} == parts
    assert {k[10:] for k in last if k.startswith("grad_norm/")} == parts | {"total"}
    assert all(last[f"grad_norm/{part}"] > 0 for part in parts)
    squares = sum(last[f"grad_norm/{part}"] ** 2 for part in parts)
    assert math.sqrt(squares) == pytest.approx(last["grad_norm/total"], rel=1e-5)
    assert last["share/samples/squares"] == last["share/samples/chat"] == 0.5
    assert {"loss/source/squares", "loss/source/chat", "loss/family/spatial"} <= set(last)
    assert {"loss/capability/side", "loss/capability/height"} <= {
        k for line in lines(out) for k in line
    }


@pytest.mark.parametrize("stage", [1, 2])
def test_a_checkpoint_becomes_the_model_that_final_would_hold(run, recipe, tmp_path, stage):
    out = tmp_path / "run"
    short = (f"run.dir={out}", "data.length.steps=2", "checkpoint.every=1")
    assert run(stage, recipe(stage, "qwen3vl"), *short) == 0
    model = export_checkpoint(out / "checkpoints" / "step-00000002", tmp_path / "model")
    for file in (out / "final").iterdir():
        assert (model / file.name).read_bytes() == file.read_bytes(), file.name
    with pytest.raises(CheckpointError, match="exists; choose a new directory"):
        export_checkpoint(out / "checkpoints" / "step-00000002", model)


def test_a_run_that_always_dies_is_not_requeued_for_ever(run, recipe, tmp_path, monkeypatch):
    """Whether it dies at once or logs steps first; a launch that leaves a checkpoint may be requeued."""
    config, folder = recipe(1, "qwen3vl"), f"run.dir={tmp_path / 'run'}"

    def dies_at(step):
        def at(name, *, step, rank, last=step):
            if step == last:
                raise RuntimeError("a bug")

        with monkeypatch.context() as patched:
            patched.setattr("spatialvlm.training.loop.fault_point", at)
            with pytest.raises(RuntimeError, match="a bug"):
                run(1, config, folder)
        return status_of(tmp_path / "run")

    assert [dies_at(step)[0] for step in (0, 1, 2)] == [75, 75, 1]
    assert "launches in a row died after step 0 before" in status_of(tmp_path / "run")[1]
    assert dies_at(4)[0] == 75  # started by hand it reached the checkpoint of step 3
    assert run(1, config, folder) == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["started_at"], record["fruitless"]) == (3, 0)
    assert status_of(tmp_path / "run")[0] == 0


def test_resume_equals_straight_bit_for_bit(run, recipe, tmp_path):
    config = recipe(1, "qwen3vl")
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert run(1, config, f"run.dir={straight}") == 0
    for stop in (2, 1):  # in the middle of a checkpoint interval, then at a save border
        assert run(1, config, f"run.dir={broken}", f"run.stop_after_steps={stop}") == 0
        assert status_of(broken)[0] == 75
    assert run(1, config, f"run.dir={broken}") == 0
    assert numbers(broken) == numbers(straight)
    assert [line["attempt"] for line in lines(broken)] == [1, 1, 2, 3, 3, 3]
    for name in ("state-00000-of-00001.safetensors", "rng-00000-of-00001.safetensors"):
        a = (straight / "checkpoints" / "step-00000006" / name).read_bytes()
        assert a == (broken / "checkpoints" / "step-00000006" / name).read_bytes()
    a, b = (load_file(d / "final" / "model.safetensors") for d in (straight, broken))
    assert all((a[k] == b[k]).all() for k in a)


def test_finished_runs_are_left_alone_and_other_configurations_refused(
    run, recipe, tmp_path, capsys
):
    config, out = recipe(1, "qwen3vl"), tmp_path / "run"
    short = (f"run.dir={out}", "data.length.steps=2", "checkpoint.every=1", "export.final=false")
    assert run(1, config, *short) == 0
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and p.name != "lock"}
    assert run(1, config, *short) == 0
    assert "has finished" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()} == before
    assert run(1, config, *short, "optim.lr=0.5", "data.seed=3") == 1
    message = capsys.readouterr().err
    assert "optim.lr: was 0.001, now 0.5" in message
    assert "data.seed: was 0, now 3" in message
    assert "run.resume_allow" in message
    assert run(1, config, *short, "run.resume=none") == 1
    assert "already holds a run" in capsys.readouterr().err
    assert status_of(out)[0] == 0


def test_an_unfinished_run_goes_on_with_other_data(run, recipe, tmp_path, caplog):
    config, out = recipe(1, "qwen3vl"), tmp_path / "run"
    short = (f"run.dir={out}", "data.length.steps=2", "checkpoint.every=1", "export.final=false")
    assert run(1, config, *short, "run.stop_after_steps=1") == 0
    assert run(1, config, *short, "data.seed=3", "run.resume_allow=[data.seed]") == 0
    assert "of a new order; differing: seed" in caplog.text
    assert [line["step"] for line in lines(out)] == [0, 1]


def test_stage_2_starts_from_a_finished_stage_1(run, recipe, tmp_path, capsys):
    one, two = tmp_path / "one", tmp_path / "two"
    short = ("data.length.steps=2", "checkpoint.every=1")
    assert run(1, recipe(1, "qwen3vl"), f"run.dir={one}", "run.stop_after_steps=1", *short) == 0
    start = (f"run.dir={two}", f"model.init_from={one / 'final'}", *short)
    assert run(2, recipe(2, "qwen3vl"), *start) == 1  # not exported yet
    assert "does not exist" in capsys.readouterr().err
    assert run(1, recipe(1, "qwen3vl"), f"run.dir={one}", *short) == 0
    assert run(2, recipe(2, "qwen3vl"), f"run.dir={two}", f"model.init_from={one}", *short) == 1
    assert f"Did you mean {one / 'final'}" in capsys.readouterr().err
    record = json.loads((one / "run.json").read_text())
    (one / "run.json").write_text(json.dumps({**record, "state": "preempted"}))
    assert run(2, recipe(2, "qwen3vl"), *start) == 1
    assert "model.allow_unfinished=true" in capsys.readouterr().err
    (one / "run.json").write_text(json.dumps(record))
    capsys.readouterr()
    assert run(2, recipe(2, "qwen3vl"), *start) == 0
    assert "without stage 1" not in capsys.readouterr().err
    lineage = json.loads((two / "checkpoints" / "step-00000002" / "manifest.json").read_text())[
        "lineage"
    ]
    assert (lineage["stage"], lineage["step"]) == (1, 2)
    assert {"spatial.safetensors", "spatialvlm.json"} <= {p.name for p in (two / "final").iterdir()}
    weights = one / "final" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert run(2, recipe(2, "qwen3vl"), f"run.dir={tmp_path / 'x'}", *start[1:]) == 1
    assert "another sha256 than when it was exported" in capsys.readouterr().err
    other = (f"run.dir={tmp_path / 'other'}", *short)
    assert run(2, recipe(2, "qwen3vl"), *other) == 0
    assert "is no export of stage 1; without stage 1" in capsys.readouterr().err


def test_adapters_are_merged_into_the_names_of_the_base(run, recipe, tiny_checkpoint, tmp_path):
    out = tmp_path / "run"
    overrides = (
        "lora={r: 4, alpha: 8}",
        "optim.vision_lr=null",
        "optim.embedding_lr=null",
        "checkpoint.export_every=4",
    )
    assert run(1, recipe(1, "qwen3vl"), f"run.dir={out}", *overrides) == 0
    base = load_file(tiny_checkpoint("qwen3vl") / "model.safetensors")
    final = load_file(out / "final" / "model.safetensors")
    assert {k: (v.shape, v.dtype) for k, v in final.items()} == {
        k: (v.shape, v.dtype) for k, v in base.items()
    }
    assert [p.name for p in (out / "exports").iterdir() if p.is_dir()] == ["step-00000004"]
    middle = load_file(out / "exports" / "step-00000004" / "model.safetensors")
    assert middle.keys() == final.keys()
    moved = {k for k in base if not (base[k] == final[k]).all()}
    assert any("language_model.layers" in k for k in moved)
    assert not any(
        "patch_embed" in k or "embed_tokens" in k for k in moved
    )  # frozen parts are bit-equal
    assert {k for k in lines(out)[-1] if k.startswith("lr/")} == {"lr/lora", "lr/projector"}


def test_held_out_loss_is_logged(run, recipe, rows, tmp_path):
    out = tmp_path / "run"
    source = f"{{name: held, family: spatial, files: [spatial.jsonl], root: {rows}}}"
    evaluation = f"evaluation={{every_steps: 15, max_samples: 16, sources: [{source}]}}"
    more = ("data.length.steps=30", "checkpoint.every=30", "export.final=false")
    assert run(1, recipe(1, "qwen3vl"), f"run.dir={out}", evaluation, *more) == 0
    found = [line for line in lines(out) if "eval/loss/held" in line]
    assert len(found) == 2
    assert found[1]["eval/loss/held"] < found[0]["eval/loss/held"]
    # A sample counts only when all of its tokens do.
    for line in found:
        assert 0 <= line["eval/answer_acc/held"] <= line["eval/token_acc"]
    assert found[1]["eval/answer_acc"] > 0


def test_trackers_and_no_secret_anywhere(run, recipe, tmp_path, monkeypatch, capfd):
    canaries = {
        "WANDB_API_KEY": "canary0000000000000000000000000000000001",
        "HF_TOKEN": "hf_canary2",
        "AWS_SECRET_ACCESS_KEY": "canary3",
        "HTTPS_PROXY": "http://user:canary4@127.0.0.1:9",
        "HF_ENDPOINT": "https://me:canary5@localhost",
    }
    for name, value in canaries.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "run"
    assert run(1, recipe(1, "qwen3vl"), f"run.dir={out}", "data.length.steps=2", "log.tensorboard=true",
               "log.wandb={project: p, mode: offline}", "checkpoint.every=2", "export.final=false") == 0  # fmt: skip
    assert list((out / "tensorboard").glob("events*"))
    assert list((out / "wandb").glob("offline-run*/*.wandb"))
    state = json.loads((out / "checkpoints" / "step-00000002" / "train_state.json").read_text())
    assert state["counters"]["trackers"]["wandb"]
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert b"canary" not in path.read_bytes(), path
    assert (out / "logs" / "rank-00000.log").is_file()
    printed = capfd.readouterr()
    assert "language_model" in printed.err
    assert "canary" not in printed.out + printed.err
