"""Benchmarks between training steps change nothing about the training, and mark the best step."""

import json

import pytest

from tests.recipes.conftest import read_jsonl, recipe_text, run_one


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


@pytest.mark.smoke
def test_losses_are_the_same_with_and_without(rows, tiny_checkpoint, tmp_path, environment):
    config = tmp_path / "recipe.yaml"
    config.write_text(recipe_text(1, "qwen3vl", tiny_checkpoint("qwen3vl"), rows))
    questions = benchmark(rows, tmp_path)
    evaluation = [
        "evaluation.every_steps=2",
        "evaluation.benchmarks=[spatialvlm_rows]",
        f"evaluation.files.spatialvlm_rows={questions}",
        f"evaluation.media_root.spatialvlm_rows={rows}",
        "evaluation.select=spatialvlm_rows",
        "evaluation.max_samples=8",
    ]
    losses = {}
    for name, extra in {"plain": [], "evaluated": evaluation}.items():
        done = run_one(1, config, f"run.dir={tmp_path / name}", *extra, env=environment)
        assert done.returncode == 0, done.stderr
        lines = read_jsonl(tmp_path / name / "metrics.jsonl")
        losses[name] = [(line["step"], line["loss"]) for line in lines if "loss" in line]
        scores = [line["eval/spatialvlm_rows"] for line in lines if "eval/spatialvlm_rows" in line]
        assert len(scores) == (3 if extra else 0)
    assert losses["plain"] == losses["evaluated"]
    out = tmp_path / "evaluated"
    best = json.loads((out / "eval" / "best.json").read_text())
    assert best["benchmark"] == "spatialvlm_rows"
    assert (out / "best" / "model.safetensors").is_file()
    result = json.loads(
        (out / "eval" / "step_00000002" / "spatialvlm_rows" / "result.json").read_text()
    )
    assert (result["n"], result["partial"]) == (8, True)
