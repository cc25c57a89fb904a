"""Benchmarks between training steps change nothing about the training, and mark the best step."""

import json
from pathlib import Path

import pytest

from tests.recipes.conftest import read_jsonl, recipe_text, run_one
from tests.recipes.test_two_processes import GOLDEN, launch


def benchmark(rows, folder):
    """Twelve questions about the training pictures, in the form of the data engine."""
    lines = []
    for number, row in enumerate(read_jsonl(rows / "spatial.jsonl")[:12]):
        lines.append(
            {
                "id": f"q{number}",
                "task": row["type"],
                "answer_type": "text",
                "answer_json": json.dumps(row["messages"][1]["content"]),
                "options": [],
                "choice_idx": None,
                "scene_id": row["images"][0],
                "evidence": "{}",
                "marks": "[]",
                "images": row["images"],
                "media_kind": "images",
                "messages": row["messages"],
            }
        )
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def overrides(rows: Path, folder: Path) -> list[str]:
    """Ask eight of the questions after every second step."""
    return [
        "evaluation.every_steps=2",
        "evaluation.benchmarks=[spatialvlm_rows]",
        f"evaluation.files.spatialvlm_rows={benchmark(rows, folder)}",
        f"evaluation.media_root.spatialvlm_rows={rows}",
        "evaluation.select=spatialvlm_rows",
        "evaluation.max_samples=8",
    ]


@pytest.mark.smoke
def test_losses_are_the_same_with_and_without(rows, tiny_checkpoint, tmp_path, environment):
    config = tmp_path / "recipe.yaml"
    config.write_text(recipe_text(1, "qwen3vl", tiny_checkpoint("qwen3vl"), rows))
    evaluation = overrides(rows, tmp_path)
    found = {}
    for name, extra in {"plain": [], "evaluated": evaluation}.items():
        done = run_one(1, config, f"run.dir={tmp_path / name}", *extra, env=environment)
        assert done.returncode == 0, done.stderr
        lines = read_jsonl(tmp_path / name / "metrics.jsonl")
        found[name] = [(line["step"], line["loss"]) for line in lines if "loss" in line]
        scores = [line["eval/spatialvlm_rows"] for line in lines if "eval/spatialvlm_rows" in line]
        assert len(scores) == (3 if extra else 0)
    assert found["plain"] == found["evaluated"]
    out = tmp_path / "evaluated"
    best = json.loads((out / "eval" / "best.json").read_text())
    assert best["benchmark"] == "spatialvlm_rows"
    assert (out / "best" / "model.safetensors").is_file()
    result = json.loads(
        (out / "eval" / "step_00000002" / "spatialvlm_rows" / "result.json").read_text()
    )
    assert (result["n"], result["partial"]) == (8, True)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("file", "extra"),
    [("cpu2_zero3", []), ("cpu2_ddp", ["parallel.strategy=fsdp2"])],
    ids=["zero3", "fsdp2"],
)
def test_sharded_weights_are_gathered_for_the_pause(
    recipe, rows, tmp_path, environment, file, extra
):
    """Two processes with whole weights for the pause: same losses, and the answers of the model that was kept."""
    from spatialvlm.evaluation.generate import GenConfig
    from spatialvlm.evaluation.prompts import build_messages
    from spatialvlm.evaluation.registry import load_benchmark
    from spatialvlm.evaluation.subject import Subject

    out = tmp_path / "run"
    asked = overrides(rows, tmp_path)
    done = launch(file, 2, recipe(2, "qwen3vl"), f"run.dir={out}", *asked, *extra, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    golden = json.loads((GOLDEN / "stage2_qwen3vl.json").read_text())
    trained = [line["loss"] for line in read_jsonl(out / "metrics.jsonl") if "loss" in line]
    # The order of FSDP2's sums alone moves a loss by 2e-5; its losses without evaluation are the same to the bit.
    assert trained == pytest.approx(golden, rel=5e-5)
    step = json.loads((out / "eval" / "best.json").read_text())["step"]
    answers = read_jsonl(
        out / "eval" / f"step_{step:08d}" / "spatialvlm_rows" / "predictions.jsonl"
    )
    assert len(answers) == 8

    bench = load_benchmark("spatialvlm_rows", tmp_path / "questions.jsonl", media_root=rows)
    generator = Subject(out / "best").generator(rows)
    items = {item.id: item for item in bench.items}
    for line in answers:
        messages = build_messages(items[line["id"]], bench.spec, root=rows)
        (text,) = generator.generate(
            [generator.prepare([messages])], GenConfig(bench.spec.max_new_tokens)
        )
        assert text[0].text == line["prediction"]
