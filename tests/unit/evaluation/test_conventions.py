"""Switches for conventions of single papers: what they change, that they are recorded, and where they are refused."""

import json

import pytest

from spatialvlm.evaluation.__main__ import main

VSI = [
    {"id": n, "question_type": "object_counting", "ground_truth": "4", "options": None, "scene_name": f"s{n}",
     "dataset": "scannet"}
    for n in range(2)
]  # fmt: skip
PAIR = [
    {"id": f"e{n}", "category": "existence", "answer": "A", "options": ["A. yes", "B. no"], "image": f"{n}.jpg",
     "pair_id": "p"}
    for n in range(2)
]  # fmt: skip
SITE = [
    {"options": options, "answer": "A", "category": "count", "dataset": "d", "visual": [f"{n}.jpg"]}
    for n, options in enumerate((["A. x", "B. y"], ["unreadable"]))
]
CASES = {
    "mra": ("vsi_bench", VSI, ["3", "4"], ["--mra", "strict"], 80.0, 75.0),
    "existence": ("internspatial", PAIR, ["A", "B"], ["--existence", "single"], 0.0, 50.0),
    "options": ("site", SITE, ["A", "B"], ["--caa-default-options", "4"], None, 20.0),
}


@pytest.fixture
def run(tmp_path, capsys):
    def call(bench, rows, answers, *flags):
        data, pred = tmp_path / "data.jsonl", tmp_path / "pred.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        lines = [
            {"id": row.get("id", n), "prediction": text}
            for n, (row, text) in enumerate(zip(rows, answers, strict=True))
        ]
        pred.write_text("".join(json.dumps(line) + "\n" for line in lines))
        out = tmp_path / "out"
        command = ["score", "--bench", bench, "--data", str(data), "--pred", str(pred)]
        code = main([*command, "--out", str(out), *flags])
        told = capsys.readouterr()
        return code, told, json.loads((out / "result.json").read_text()) if code == 0 else None

    return call


@pytest.mark.parametrize("name", CASES)
def test_a_convention_changes_the_score_and_is_told(name, run):
    bench, rows, answers, flags, plain, switched = CASES[name]
    code, told, result = run(bench, rows, answers)
    if plain is None:
        assert code == 1
        assert "--caa-default-options 4" in told.err
    else:
        assert result["headline"]["value"] == pytest.approx(plain)
        assert result["conventions"] == {}
    code, told, result = run(bench, rows, answers, *flags)
    assert code == 0, told.err
    assert result["headline"]["value"] == pytest.approx(switched)
    ((key, value),) = result["conventions"].items()
    assert f"{key}={value}" in told.out


def test_a_convention_without_effect_is_refused(run):
    for name, (_, _, _, flags, _, _) in CASES.items():
        bench, rows, answers = CASES["existence" if name != "existence" else "mra"][:3]
        code, told, _ = run(bench, rows, answers, *flags)
        assert code == 1
        assert f"changes nothing in {bench}" in told.err
    code, told, _ = run(*CASES["options"][:3], "--caa-default-options", "1")
    assert "at least 2" in told.err
