"""A whole scaling study on tiny models: nested fractions, training, evaluation, fits, page; then nothing left to do."""

import json
import runpy
from pathlib import Path

import pytest

from tests.recipes.conftest import read_jsonl, recipe_text
from tests.recipes.test_evaluate_while_training import benchmark

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_sweep_over_data_fractions(rows, tiny_checkpoint, tmp_path, capsys):
    train = tmp_path / "train.yaml"
    text = recipe_text(1, "qwen3vl", tiny_checkpoint("qwen3vl"), rows)
    train.write_text(text.replace("length: {steps: 6}", "length: {steps: 3}"))
    questions = benchmark(rows, tmp_path)
    evaluate = tmp_path / "eval.yaml"
    evaluate.write_text(
        f"run: {{dir: unset}}\nevaluation:\n  benchmarks: [spatialvlm_rows]\n  dtype: fp32\n  max_new_tokens: 4\n"
        f"  files: {{spatialvlm_rows: {questions}}}\n  media_root: {{spatialvlm_rows: {rows}}}\n"
    )
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(
        f"out: {tmp_path / 'sweep'}\nrecipe: recipes/stage1.py\nconfig: {train}\neval_config: {evaluate}\n"
        "axis: data.fraction\nvalues: [0.25, 0.5, 1.0]\nhold: steps\nsamples: 48\nseeds_at_smallest: 1\n"
    )
    main = runpy.run_path(str(ROOT / "tools" / "scaling.py"))["main"]
    assert main(["run", "--config", str(sweep)]) == 0
    state = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [point["state"] for point in state.values()] == ["done"] * 3
    for point in state.values():
        steps = read_jsonl(tmp_path / "sweep" / point["name"] / "run" / "metrics.jsonl")
        assert max(line["step"] for line in steps) == 2  # counted from 0
    manifest = json.loads((tmp_path / "sweep" / "manifest.json").read_text())
    drawn = [point["rows"] for point in manifest.values()]
    assert [rows["squares"] for rows in drawn] == [12, 24, 48]
    assert len({point["order"]["eligible rows"] for point in manifest.values()}) == 1
    assert all(abs(sum(point["share"].values()) - 1) < 1e-3 for point in manifest.values())
    assert main(["fit", "--config", str(sweep), "--draws", "20"]) == 0
    assert {"table.csv", "fits.csv", "scaling.html"} <= {
        p.name for p in (tmp_path / "sweep").iterdir()
    }
    table = (tmp_path / "sweep" / "table.csv").read_text().splitlines()
    assert [line.split(",")[3] for line in table[1:]] == ["12.0", "24.0", "48.0"]
    capsys.readouterr()
    assert main(["run", "--config", str(sweep)]) == 0
    assert capsys.readouterr().out.count("done before") == 3
