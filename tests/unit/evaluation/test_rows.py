"""Rows of the data engine: how each answer type is read and scored."""

import json

import pytest

from spatialvlm.errors import DataError
from spatialvlm.evaluation.benchmarks.rows import ROWS, judge
from spatialvlm.evaluation.predictions import Prediction
from spatialvlm.evaluation.registry import load_benchmark
from spatialvlm.evaluation.scoring import score


def row(kind, answer, **fields):
    return {
        "id": "r",
        "task": "t",
        "answer_type": kind,
        "answer_json": json.dumps(answer),
        "options": [],
        "choice_idx": None,
        "scene_id": "s",
        "evidence": "{}",
        "images": [],
        "messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}],
        **fields,
    }


MCQ = {"options": ["chair", "bed", "sofa"], "choice_idx": 1}
BOX = [{"label": "chair", "bbox_3d": [0, 0, 0, 2, 1, 1, 0]}]
GROUNDING = {"task": "ssr_grounding7", "evidence": '{"values": {"front_known": false}}'}


@pytest.mark.parametrize(
    ("kind", "answer", "fields", "text", "value"),
    [
        ("mcq", "bed", MCQ, "B", 1),
        ("mcq", "bed", MCQ, "The answer is (B).", 1),
        ("mcq", "bed", MCQ, "C", 0),
        ("mcq", "bed", MCQ, "no idea", None),
        ("yesno", True, {}, "Yes.", 1),
        ("yesno", False, {}, "I say NO", 1),
        ("yesno", True, {}, "nothing known", None),
        ("number", 2.0, {}, "about 2.2 m", 0.9),
        ("number", 0, {}, "0", 1),
        ("number", 0, {}, "1", 0),
        ("number", 2.0, {}, "two", None),
        ("number", 90, {"unit": "deg"}, "100 degrees", 1),
        ("number", 90, {"unit": "deg"}, "120", 0),
        ("number", 90, {"unit": "deg"}, "-90", 1),  # the size of a turn
        ("number", 90, {"unit": "deg", "task": "is_rotation"}, "-90", 0),
        ("number", -45, {"unit": "deg", "task": "is_rotation"}, "45 degrees clockwise", 1),
        ("number", 45, {"unit": "deg", "task": "is_rotation"}, "50° counter-clockwise", 1),
        ("number", 45, {"unit": "deg", "task": "is_rotation"}, "50° anti clockwise", 1),
        ("text", "red", {}, " Red. ", 1),
        ("text", "red", {}, "", None),
        ("list", ["bed", "lamp"], {}, "Bed, lamp.", 1),
        ("list", ["bed", "lamp"], {}, '["bed", "lamp"]', 1),
        ("list", ["bed", "lamp"], {}, "lamp\nbed", 0),
        ("coord", [7, 3], {}, "[7, 3]", 1),
        ("coord", [7, 3], {}, "[7, 4]", 0),
        ("coord", [7, 3], {}, "7, 3", None),
        ("box", [0, 0, 100, 100], {}, "[0, 0, 100, 60]", 1),
        ("box", [0, 0, 100, 100], {}, "[0, 0, 100, 40]", 0),
        ("box", [0, 0, 100, 100], {}, "[0, 0]", None),
        ("json", BOX, GROUNDING, '[{"label": "chair", "bbox_3d": [0.5, 0, 0, 2, 1, 1, 0]}]', 1),
        ("json", BOX, GROUNDING, "[3, 0, 0, 2, 1, 1, 0]", 0),
        ("json", BOX, GROUNDING, "somewhere", None),
    ],
)
def test_scores(kind, answer, fields, text, value):
    item = ROWS.parse(row(kind, answer, **fields), "r")
    verdict = judge(item, text)
    assert (verdict.unparsed, verdict.score) == (value is None, value or 0)


@pytest.mark.parametrize(
    "fields",
    [
        {"task": "scene_caption"},
        {"task": "location_text"},
        {"form": "SENT"},
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}] * 2},
    ],
)
def test_rows_without_a_score_are_counted(fields, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [row("text", "x", **fields), row("text", "red", id="ok")]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    bench = load_benchmark("spatialvlm_rows", path)
    result = score(bench, {("ok", ""): Prediction("ok", "red")})
    assert (bench.unscored, result.n, result.extra["unscored_rows"]) == (1, 1, 1)


def test_chance_of_angles_is_the_best_constant(tmp_path):
    """Judged as the answers are: within 15 degrees, with the direction where the task has one."""
    path = tmp_path / "rows.jsonl"
    angles = [30, 40, -30, 150]
    rows = [row("number", a, id=str(a), unit="deg", task="is_rotation") for a in angles]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = score(
        load_benchmark("spatialvlm_rows", path),
        {(str(a), ""): Prediction(str(a), "35") for a in angles},
    )
    assert found.headline["value"] == 50
    assert found.chance["per_type"] == {"is_rotation": 50.0}


def test_cognitive_maps_report_cell_errors(tmp_path):
    path = tmp_path / "rows.jsonl"
    evidence = '{"values": {"target_xy": [7.2, 3.1]}}'
    path.write_text(json.dumps(row("coord", [7, 3], task="ssr_lcm", evidence=evidence)) + "\n")
    result = score(load_benchmark("spatialvlm_rows", path), {("r", ""): Prediction("r", "[7, 5]")})
    assert result.extra["localcogmap"]["mean_error"] == 2
    assert result.headline["value"] == 0


def test_bad_rows():
    with pytest.raises(DataError, match="column answer_json is not JSON"):
        ROWS.parse({**row("text", "x"), "answer_json": "{"}, "r")
    for gold in (float("nan"), float("inf"), "two", None):
        with pytest.raises(DataError, match=r"item r: gold .* is not a finite number"):
            ROWS.parse(row("number", gold), "r")
    with pytest.raises(DataError, match="item r has 0 <image> markers and 1 media"):
        ROWS.parse(row("text", "x", images=["a.png"]), "r")
    with pytest.raises(DataError, match="unknown answer_type 'poem'"):
        ROWS.parse(row("poem", "x"), "r")
    with pytest.raises(DataError, match="gold 'C' is not among"):
        ROWS.parse(row("mcq", "x", options=["a", "b"], choice_idx=2), "r")
