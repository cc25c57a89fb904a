"""The shipped launcher files with two real processes: DeepSpeed ZeRO-2 and ZeRO-3, FSDP2, and moves between them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).parent / "golden"


def launch(
    file: str, stage: int, config: Path, *overrides: str, env: dict[str, str]
) -> subprocess.CompletedProcess:
    """``accelerate launch`` as in the README."""
    accelerate = shutil.which("accelerate", path=str(Path(sys.executable).parent))
    command = [
        accelerate,
        "launch",
        "--config_file",
        f"configs/accelerate/{file}.yaml",
        f"recipes/stage{stage}.py",
    ]
    return subprocess.run(
        [*command, str(config), *overrides],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def losses(run_dir: Path) -> list[float]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines]


@pytest.mark.smoke
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_stage_2_equals_one_process(recipe, tmp_path, environment, strategy):
    """Also the warm start: with ZeRO-3 it must be copied before the parameters are cut."""
    out = tmp_path / "run"
    done = launch(f"cpu2_{strategy}", 2, recipe(2, "qwen3vl"), f"run.dir={out}", env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(out) == pytest.approx(
        json.loads((GOLDEN / "stage2_qwen3vl.json").read_text()), rel=1e-5
    )
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    parts = {"language_model", "vision_encoder", "projector", "embeddings", "geometry_fusion"}
    assert {name[3:] for name in last if name.startswith("lr/")} == parts
    assert {name[10:] for name in last if name.startswith("grad_norm/")} == parts | {"total"}
    assert all(last[f"grad_norm/{part}"] > 0 for part in parts)
    assert json.loads((out / "run.json").read_text())["state"] == "finished"
    assert sorted(p.name for p in (out / "logs").iterdir()) == ["rank-00000.log", "rank-00001.log"]
    assert (
        json.loads((out / "checkpoints" / "step-00000006" / "manifest.json").read_text())[
            "strategy"
        ]
        == strategy
    )


@pytest.mark.smoke
def test_one_run_moves_from_one_process_to_zero2_to_zero3_to_fsdp2_and_back(
    run, recipe, tmp_path, environment
):
    """World 1 -> 2 -> 2 -> 2 -> 1: same samples per step, same losses, same groups."""
    config, out = recipe(1, "qwen3vl"), f"run.dir={tmp_path / 'run'}"
    assert run(1, config, out, "run.stop_after_steps=1") == 0
    for file, steps, *more in (
        ("cpu2_zero2", 1),
        ("cpu2_zero3", 2),
        ("cpu2_ddp", 1, "parallel.strategy=fsdp2"),
    ):
        stop = f"run.stop_after_steps={steps}"
        done = launch(file, 1, config, out, stop, *more, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        assert json.loads((tmp_path / "run" / "run.json").read_text())["state"] == "preempted"
    assert run(1, config, out) == 0
    golden = json.loads((GOLDEN / "stage1_qwen3vl.json").read_text())
    assert losses(tmp_path / "run") == pytest.approx(golden, rel=1e-5)
    written = {
        p.name: json.loads((p / "manifest.json").read_text())["strategy"]
        for p in (tmp_path / "run" / "checkpoints").iterdir()
    }
    assert written == {"step-00000005": "fsdp2", "step-00000006": "ddp"}
