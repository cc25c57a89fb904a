"""Global maps: reading, matching, rates, and their place in the histogram of LocalCogMap."""

import json

import pytest

from spatialvlm.errors import DataError
from spatialvlm.evaluation.benchmarks.global_map import GLOBALMAP, judge, parse_map
from spatialvlm.evaluation.predictions import Prediction
from spatialvlm.evaluation.registry import load_benchmark
from spatialvlm.evaluation.report import write_report
from spatialvlm.evaluation.scoring import score, write_result

GOLD = {"table": [[0, 3], [5, 7]], "Chair": [2, 2]}


def item(gold=GOLD):
    return GLOBALMAP.parse({"id": "m", "scene": "s", "gt_map": gold}, "m")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('<map>{"table":[[0,3],[5,7]]}</map>', {"table": [(0, 3), (5, 7)]}),
        ('<think>{"a":[1,1]}</think> Here: {"Table ": [4, 2.5]}.', {"table": [(4, 2.5)]}),
        ('{"a": []}', {"a": []}),
        (
            "```python\n{'Table': [(0, 3), (5, 7)], 'tv': (1, 1)}\n```",
            {"table": [(0, 3), (5, 7)], "tv": [(1, 1)]},
        ),
        (
            "The map:\n- table: (0, 3), [5, 7]\n* 'Office chair' : (1, 2.5)\n",
            {"table": [(0, 3), (5, 7)], "office chair": [(1, 2.5)]},
        ),
        ("<map>table: (0, 3)\ntable: (1, 1)</map> lamp: (2, 2)", {"table": [(0, 3), (1, 1)]}),
        ("{1: [2, 3]}", None),
        ("distance: 3", None),
        ('{"a": [1, 2, 3]}', None),
        ('{"a": [[1, NaN]]}', None),
        ('{"a": [true, 1]}', None),
        ('{"a": "x"}', None),
        ("[[1, 2]]", None),
        ("{}", None),
        ('{"a": ' + "[" * 5000, None),
        ("", None),
    ],
)
def test_parse(text, expected):
    assert parse_map(text) == expected


def test_cells_are_matched_within_their_category():
    verdict = judge(item(), '{"table": [[5, 6], [0, 3], [9, 9]], "lamp": [1, 1]}')
    assert sorted(verdict.details["errors"]) == [0.0, 1.0]
    assert (verdict.details["missing"], verdict.details["extra"]) == (1, 2)
    assert verdict.score == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    "gold", [{}, {"a": [10, 0]}, {"a": []}, {"a": [1, 2, 3]}, "x", {"a": [float("nan"), 1]}]
)
def test_bad_gold(gold):
    with pytest.raises(DataError, match="item m: gold map"):
        item(gold)


def test_rates_and_report(tmp_path):
    maps = tmp_path / "maps.jsonl"
    rows = [{"id": n, "scene": f"s{n}", "gt_map": GOLD} for n in range(3)]
    maps.write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [json.dumps(GOLD), '{"table": [[0, 4], [5, 7], [1, 1]]}', "no idea"]
    answers = {(str(n), ""): Prediction(str(n), text) for n, text in enumerate(texts)}
    result = score(load_benchmark("globalmap", maps), answers)
    assert result.headline["value"] == pytest.approx(1 / 5)
    assert result.extra["missing_rate"] == pytest.approx(100 * 4 / 9)
    assert result.extra["extra_rate"] == pytest.approx(100 / 9)
    assert result.extra["histogram"] == [4, 1, 0, 0, 0, 0]
    assert result.unparsed_rate == pytest.approx(1 / 3)
    lost = score(load_benchmark("globalmap", maps), {k: Prediction(k[0], "") for k in answers})
    assert lost.extra["missing_rate"] == 100
    write_result(lost, tmp_path / "lost")
    write_report([tmp_path / "lost"], tmp_path / "lost.html")
    written = json.loads(
        (tmp_path / "lost" / "result.json").read_text(), parse_constant=pytest.fail
    )
    assert (written["headline"]["value"], written["chance"]["macro"]) == (None, None)

    cells = tmp_path / "cells.jsonl"
    cells.write_text('{"id": 1, "scene": "a", "gt_cell": [4, 4]}\n')
    local = score(load_benchmark("localcogmap", cells), {("1", ""): Prediction("1", "[4, 4]")})
    write_result(result, tmp_path / "run" / "globalmap")
    write_result(local, tmp_path / "run" / "localcogmap")
    write_report([tmp_path / "run"], tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "run, global maps</span>" in page.partition("<h1>localcogmap</h1>")[2]
