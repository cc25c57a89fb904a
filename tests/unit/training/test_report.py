"""Trackers, log files and the page."""

import itertools
import json

import pytest

from spatialvlm.training.report import log_ticks, svg_lines, ticks, write_report
from spatialvlm.training.status import status_of
from spatialvlm.training.trackers import JsonLines, Trackers, read_metrics


def test_replayed_steps_win_and_a_torn_line_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = JsonLines(path, attempt=1)
    for step in range(3):
        first.log(step, {"loss": 1.0 + step, "bad": float("nan")})
    first.close()
    with path.open("a") as file:
        file.write('{"step": 3, "lo\n')
    second = JsonLines(path, attempt=2)
    second.log(2, {"loss": 7.0})
    second.close()
    found = read_metrics(path)
    assert [(r["step"], r["loss"], r["attempt"]) for r in found] == [
        (0, 1.0, 1),
        (1, 2.0, 1),
        (2, 7.0, 2),
    ]
    assert found[0]["bad"] is None


def test_a_long_log_is_read_evenly_with_its_end_and_its_evaluations(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    log = JsonLines(path, attempt=1)
    for step in range(1000):
        log.log(step, {"loss": float(step)})
        if step in (123, 500):
            log.log(step, {"eval/loss": 1.0})
    log.close()
    parsed = []
    monkeypatch.setattr(json, "loads", lambda line, original=json.loads: parsed.append(1) or original(line))  # fmt: skip
    found = read_metrics(path, limit=100)
    assert len(parsed) <= 100 + 3  # so neither time nor memory grows with the run
    assert [r["step"] for r in found if "eval/loss" in r] == [123, 500]
    steps = [r["step"] for r in found]
    assert steps[0] == 0
    assert steps[-1] == 999
    assert max(b - a for a, b in itertools.pairwise(steps)) <= 11


def test_a_failing_tracker_is_dropped_once(capsys):
    class Broken:
        calls = 0

        def log(self, step, scalars):
            self.calls += 1
            raise RuntimeError("offline")

        def close(self):
            raise AssertionError("a dropped tracker is not used again")

    broken = Broken()
    trackers = Trackers([broken])
    trackers.log(0, {})
    trackers.log(1, {})
    trackers.close()
    assert broken.calls == 1
    assert "Broken failed and is dropped: offline" in capsys.readouterr().err


def test_report_is_one_escaped_file(tmp_path):
    (tmp_path / "run.json").write_text(
        json.dumps({"state": "finished", "note": "<script>alert(1)</script>"})
    )
    (tmp_path / "config.resolved.yaml").write_text("stage: 1 # <b>")
    lines = JsonLines(tmp_path / "metrics.jsonl", attempt=1)
    for step in range(3000):
        lines.log(step, {"loss": 3.0 / (step + 1), "lr/projector": 1e-3, "loss/source/<x>": 1.0})
    lines.close()
    (tmp_path / "spikes.jsonl").write_text('{"step": 7}\n')
    page = write_report(tmp_path, configured_shares={"spatial": 0.5}).read_text()
    assert "<script>" not in page
    assert "<b>" not in page
    assert "loss/source/&lt;x&gt;" in page
    assert "http" not in page
    assert "spike 7" in page
    assert len(page) < 200_000


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (3.0, 1234.0, [500.0, 1000.0]),
        (2e-5, 9.86e-4, [2e-4, 4e-4, 6e-4, 8e-4]),
        (-0.3, 0.1, [-0.3, -0.2, -0.1, 0.0, 0.1]),
    ],
)
def test_axes_carry_round_numbers(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (-1.0, 1.2, ["0.1", "0.2", "0.5", "1", "2", "5", "10"]),
        (-6.0, 2.0, ["1e-6", "1e-5", "1e-4", "0.001", "0.01", "0.1", "1", "10", "100"]),
        (0.05, 0.15, ["1.12", "1.41"]),  # no round number inside: the ends
    ],
)
def test_logarithmic_axes_carry_round_numbers(low, high, labels):
    assert [label for _, label in log_ticks(low, high)] == labels


def test_equal_factors_are_equal_distances():
    page = svg_lines({"a": [(0.0, 100.0), (1.0, 10.0), (2.0, 1.0), (3.0, 0.0)]}, log_y=True)
    points = page.partition('points="')[2].partition('"')[0].split()
    heights = [float(point.split(",")[1]) for point in points]
    assert len(heights) == 3  # zero is left out
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=0.2)


def test_chart_survives_constant_single_and_infinite_values():
    assert svg_lines({"a": []}) == ""
    assert "circle" in svg_lines({"a": [(0.0, 1.0)]})
    assert "nan" not in svg_lines({"a": [(0.0, 1.0), (1.0, float("inf")), (2.0, 1.0)]})


def test_status_codes(tmp_path):
    assert status_of(tmp_path)[0] == 2
    for state, code in (
        ("finished", 0),
        ("preempted", 75),
        ("running", 75),
        ("failed", 1),
        ("odd", 2),
    ):
        (tmp_path / "run.json").write_text(json.dumps({"state": state, "step": 3}))
        assert status_of(tmp_path)[0] == code
    (tmp_path / "run.json").write_text("{")
    assert status_of(tmp_path)[0] == 2
