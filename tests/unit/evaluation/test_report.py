"""The HTML page: self-contained, escaped, complete with missing media, comparable over runs."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from spatialvlm.errors import DataError
from spatialvlm.evaluation import charts, report
from spatialvlm.evaluation.__main__ import main
from spatialvlm.evaluation.predictions import Prediction, write_predictions
from spatialvlm.evaluation.registry import load_benchmark
from spatialvlm.evaluation.report import pick_samples, read_baselines, text_table, write_report
from spatialvlm.evaluation.report_samples import state_of
from spatialvlm.evaluation.report_tables import overall_bars
from spatialvlm.evaluation.runs import paired_runs, read_metrics, read_runs
from spatialvlm.evaluation.scoring import score, write_result
from tests.unit.evaluation.test_golden import scored

EVIL = '<script>alert(1)</script> & "quotes"'


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        Image.fromarray(rng.integers(0, 255, (60, 80, 3), dtype=np.uint8)).save(folder / name)
    mark = json.dumps([{"image": 0, "kind": "box", "color": "red", "bbox": [5, 5, 40, 40]}])
    rows = []
    for n in range(40):
        kind = ["yesno", "mcq", "number", "coord"][n % 4]
        rows.append(
            {
                "id": f"q{n}",
                "task": f"task_{kind}" if kind != "coord" else "ssr_lcm",
                "answer_type": kind,
                "answer_json": json.dumps(
                    {"yesno": True, "mcq": "bed", "number": 3, "coord": [4, 4]}[kind]
                ),
                "options": ["chair", "bed"] if kind == "mcq" else [],
                "choice_idx": 1 if kind == "mcq" else None,
                "scene_id": f"scene{n % 5}",
                "evidence": '{"values": {"target_xy": [4, 4]}}',
                "marks": mark if n == 0 else "[]",
                "images": [["a.png"], ["b.png"], ["gone.png"]][n % 3],
                "media_kind": "images",
                "messages": [
                    {"role": "user", "content": f"<image>\nQuestion {n} {EVIL}?"},
                    {"role": "assistant", "content": "x"},
                ],
            }
        )
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_run(folder, data, seed, media="real"):
    """A finished run with answers of different quality."""
    bench = load_benchmark("spatialvlm_rows", data)
    rng = np.random.default_rng(seed)
    good = {"yesno": "Yes", "mcq": "B", "number": "3", "coord": "[4, 4]"}
    bad = {"yesno": "no", "mcq": EVIL, "number": "7", "coord": "[1, 2]"}
    answers = {
        item.key: Prediction(item.id, (good if rng.random() < 0.2 + 0.3 * seed else bad)[item.kind])
        for item in bench.items
    }
    out = folder / "spatialvlm_rows"
    write_result(score(bench, answers), out)
    write_predictions(
        out / "predictions.jsonl", ({"id": p.id, "prediction": p.text} for p in answers.values())
    )
    manifest = {
        "data_file": str(data),
        "media_root": str(data.parent),
        "media": media,
        "checkpoint": EVIL,
    }
    (out / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    found = [
        make_run(folder / f"eval_{name}", data, seed)
        for seed, name in enumerate(("stage1", "stage2"))
    ]
    found.append(make_run(folder / "eval_blind", data, 0, "drop"))
    training = folder / "train"
    training.mkdir()
    steps = [
        {"step": s, "loss": 3.0 / (s + 1), "lr/language_model": 1e-3, "grad_norm/total": 1.0}
        for s in range(30)
    ]
    steps.insert(9, {**steps[9], "loss": 99.0})  # a step that was replayed later
    (training / "metrics.jsonl").write_text(
        "".join(json.dumps(s) + "\n" for s in steps) + '{"step": 30, "lo'
    )
    return found, training


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "report.html"
    benchmarks = write_report(runs[0], out, training=[runs[1]], title="Demo")
    return out, out.read_text(), benchmarks


def test_nothing_is_loaded_from_elsewhere(page):
    _, text, _ = page
    assert not re.search(r"(?:src|href)\s*=\s*[\"']?(?:https?:)?//", text)
    assert "<small>read as yes</small>" not in text  # "Yes" needs no reading
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text


def test_the_page_has_all_parts(page):
    out, text, _ = page
    for part in (
        "Scores by task",
        "Paired differences",
        "Tasks",
        "Training loss",
        "Learning rate per group",
        "Sample answers, failures first",
        "chance",
        "stage1",
        "blind",
        "missing<br>gone.png",
        "Cell error (SSR reports",
        "Numbers: stage2",
    ):
        assert part in text, part
    assert text.count("data:image/jpeg;base64,") >= 4
    tasks = re.findall(r"<details[^>]*><summary>(\w+) <small>.*?</details>", text, re.DOTALL)
    assert sorted(tasks) == ["ssr_lcm", "task_mcq", "task_number", "task_yesno"]
    for part in re.findall(r'<div class="samples">.*?</div></details>', text, re.DOTALL):
        states = re.findall(r'<article class="sample (\w+)"', part)
        assert states == sorted(states, key=["unparsed", "wrong", "right"].index)
        assert max(states.count(state) for state in set(states)) <= 3
    table = out.with_suffix(".csv").read_text().splitlines()
    assert table[0] == "benchmark,run,task,value,se,n,unparsed_rate,chance"
    assert len(table) == 1 + 3 * 4


def test_tags_are_balanced(page):
    """Every opened element is closed, so browsers build the tree we meant."""
    from html.parser import HTMLParser

    void = {"meta", "img", "br", "line", "circle", "polyline", "rect"}
    stack: list[str] = []

    class Checker(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag not in void:
                stack.append(tag)

        def handle_endtag(self, tag):
            if tag not in void:
                assert stack.pop() == tag

    Checker().feed(page[1])
    assert not stack


def test_terminal_table(page):
    text = text_table(page[2])
    lines = text.splitlines()
    assert lines[0].startswith("spatialvlm_rows  (protocol official")
    assert lines[1].split() == ["task", "n", "stage1", "stage2", "blind", "chance"]
    assert [line.split()[0] for line in lines[2:7]] == [
        "ssr_lcm",
        "task_mcq",
        "task_number",
        "task_yesno",
        "macro",
    ]


def test_paired_difference(runs):
    a, b, blind = read_runs(runs[0])["spatialvlm_rows"]
    pair = paired_runs(b, a)
    direct = b.result["headline"]["value"] - a.result["headline"]["value"]
    assert pair.difference == pytest.approx(direct)
    assert (pair.n, pair.clusters) == (40, 5)
    assert blind.blind
    assert not a.blind


def test_metrics_keep_the_last_attempt_and_skip_a_cut_line(runs):
    steps = read_metrics(runs[1])
    assert [s["step"] for s in steps] == list(range(30))
    assert all(s["loss"] < 10 for s in steps)


def test_nothing_of_an_earlier_attempt_is_left_in_a_step(tmp_path):
    lines = [
        {"step": 4, "attempt": 1, "loss": 3.0, "faults/truncated": 1.0},
        {"step": 4, "attempt": 2, "loss": 2.0},
        {"step": 4, "attempt": 2, "eval/loss": 1.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_metrics(tmp_path) == [{"step": 4, "attempt": 2, "loss": 2.0, "eval/loss": 1.0}]


def test_any_words_of_a_model_can_be_shown(tmp_path):
    """Answers of text questions are their own extraction: broken JSON, odd digits, anything."""
    said = ["{broken", "--3", "²", "[" * 5000, '{"cell": [1, 2]}', "<script>alert(1)</script>", ""]
    row = {
        "messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}],
        "task": "t",
        "answer_type": "text",
        "answer_json": '"red"',
        "scene_id": "s",
    }
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({**row, "id": str(n)}) + "\n" for n in range(len(said))))
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps({"id": n, "prediction": text}) + "\n" for n, text in enumerate(said))
    )
    command = ["score", "--bench", "spatialvlm_rows", "--data", str(path)]
    assert main([*command, "--pred", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "o")]) == 0
    write_report([tmp_path / "o"], tmp_path / "page.html", samples=10)
    page = (tmp_path / "page.html").read_text()
    assert "{broken" in page
    assert "<script>alert" not in page


def test_report_without_the_benchmark_file(runs, tmp_path):
    import shutil

    copy = tmp_path / "eval_copy"
    shutil.copytree(runs[0][0], copy)
    manifest = copy / "spatialvlm_rows" / "manifest.json"
    manifest.write_text(json.dumps({"data_file": "/gone.jsonl"}))
    write_report([copy], tmp_path / "r.html")
    assert "No samples" in (tmp_path / "r.html").read_text()
    with pytest.raises(DataError, match=r"holds no result.json"):
        write_report([tmp_path / "nothing"], tmp_path / "x.html")
    with pytest.raises(DataError, match=r"metrics.jsonl does not exist"):
        write_report([copy], tmp_path / "x.html", training=[tmp_path])


def test_a_large_page_gets_smaller_pictures_and_says_so(runs, tmp_path, monkeypatch):
    write_report(runs[0], tmp_path / "whole.html")
    whole = (tmp_path / "whole.html").read_text()
    assert "Pictures were reduced" not in whole
    monkeypatch.setattr(report, "SIDES", (384, 24))
    monkeypatch.setattr(report, "MAX_BYTES", len(whole.encode()) - 1)
    write_report(runs[0], tmp_path / "small.html")
    small = (tmp_path / "small.html").read_text()
    assert len(small) < len(whole)
    assert "Pictures were reduced to 24 pixels" in small


def test_samples_are_seeded_and_failures_first(runs):
    items = read_runs(runs[0])["spatialvlm_rows"][1].items()
    chosen = pick_samples(items, 3)
    assert chosen == pick_samples(items, 3) != pick_samples(items, 3, seed=1)
    assert len(chosen) == 4
    states = [[state_of(item) for item in part] for part in chosen.values()]
    assert {state for part in states for state in part} == {"unparsed", "wrong", "right"}
    for part in states:
        assert part == sorted(part, key=["unparsed", "wrong", "right"].index)
        assert all(part.count(state) <= 3 for state in part)
    means = [np.mean([i.score for i in items if i.question_type == task]) for task in chosen]
    assert means == sorted(means)  # the hardest task first
    assert sum(map(len, pick_samples(items, 1000).values())) == len(items)


def test_one_model_in_two_papers_is_told_apart():
    run = SimpleNamespace(
        label="ours",
        color="#000000",
        result={
            "headline": {"value": 50.0, "se": 1.0, "name": "macro of 8"},
            "benchmark": "vsi_bench",
        },
    )
    known = [row for row in read_baselines() if row.benchmark == "vsi_bench"]
    gallery = charts.Gallery()
    page = overall_bars([run], known, gallery, partial=False)
    labels = [row[0] for row in gallery.plots[0][1].rows]
    assert len(labels) == len(set(labels)) == len(known) + 1
    assert {"Qwen3-VL-8B (SSR)", "Qwen3-VL-8B (OpenSpatial)", "SSR-3D"} <= set(labels)
    assert "Qwen3-VL-8B (SSR): SSR" in page
    assert "not shown beside a partial" in overall_bars([run], known, gallery, partial=True)


def test_baselines_name_their_source():
    rows = read_baselines()
    assert all(row.source and row.model for row in rows)
    notes = {(row.model, row.benchmark, row.source.split()[0]): row.note for row in rows}
    assert "61.6" in notes["SSR-3D", "viewspatial", "SSR"]
    assert "16 frames" in notes["OpenSpatial-Qwen2.5-VL-7B", "vsi_bench", "OpenSpatial"]
    assert "does not follow" in notes["Qwen3-VL-8B", "vsi_bench", "SSR"]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (0, 0.002, [0, 0.0005, 0.001, 0.0015, 0.002]), (3, 3, [3])],
)
def test_ticks(low, high, expected):
    assert charts.ticks(low, high) == pytest.approx(expected)


def test_charts_leave_out_what_cannot_be_drawn():
    nothing = charts.Series("a", [1], [float("nan")], "#000000")
    assert charts.line_chart("t", [nothing], "x", "y") is None
    assert charts.scatter_chart("t", [(0, 1)], "x", "y", "#000000") is None
    assert charts.line_chart(
        "t", [charts.Series("a", [1, 2], [0.0, 1.0], "#000")], "x", "y", log_y=True
    )
    rows = charts.bar_rows("t", [charts.Bar("a", None), charts.Bar("b", 50.0, 2.0)]).html
    assert rows.count('class="bar"') == 1
    assert "50.0 ± 2.0" in rows
    assert charts.number(float("nan")) == "–"


def test_every_chart_is_also_a_picture_and_a_table(page, runs, tmp_path):
    out, text, _ = page
    folder = out.with_name("report_plots")
    names = sorted(path.stem for path in folder.glob("*.png"))
    assert names == sorted(path.stem for path in folder.glob("*.csv"))
    shown = (
        text.count("<figcaption>") - text.count("<figcaption>Letters") + text.count('class="bars"')
    )
    assert len(names) == shown
    for path in folder.glob("*.png"):
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("L"))
        assert min(pixels.shape) > 80
        assert pixels.min() < 100, path
        assert pixels[0].min() == 255, path  # nothing is cut off at the upper edge
    (curve,) = folder.glob("*training_loss.csv")
    lines = curve.read_text().splitlines()
    assert lines[:2] == ["series,step,loss,se", "train,0,3.0,"]
    assert len(lines) == 31
    (bars,) = (path for path in folder.glob("*task_yesno.csv"))
    assert bars.read_text().splitlines()[0] == "label,value,se"
    write_report([runs[0][0]], out.with_name("report.html"))  # fewer charts: no old ones stay
    assert len(list(folder.glob("*.png"))) < len(names)


def test_a_picture_shows_what_the_page_shows(tmp_path):
    """Bars and points lie where their numbers say, in the right colour."""
    plot = charts.bar_rows("t", [charts.Bar("a", 50.0, None, "#0072B2")])
    plot.drawing.png(tmp_path / "bar.png")
    with Image.open(tmp_path / "bar.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    blue = (abs(pixels - (0x00, 0x72, 0xB2)).sum(-1) < 12).sum(1).max()
    assert blue == pytest.approx(0.5 * 2 * (560 - 150 - 110), abs=4)
    series = charts.Series("a", [1, 10, 100], [1.0, 2.0, 3.0], "#D55E00", [0.5, 0.5, 0.5])
    plot = charts.line_chart("t", [series], "x", "y", log_x=True)
    assert plot.html.count("<circle") == 3
    assert [row[3] for row in plot.rows] == [0.5] * 3
    middle = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', plot.html)
    steps = np.diff([[float(v) for v in pair] for pair in middle], axis=0)
    assert steps[0] == pytest.approx(steps[1], abs=0.2)  # equal factors are equal distances


def test_training_curves_alone(runs, tmp_path):
    import runpy
    from pathlib import Path

    tool = runpy.run_path(str(Path(__file__).resolve().parents[3] / "tools" / "plot_run.py"))[
        "main"
    ]
    assert tool([str(runs[1]), "--out", str(tmp_path / "c.html")]) == 0
    assert "Learning rate per group" in (tmp_path / "c.html").read_text()
    assert len(list((tmp_path / "c_plots").glob("*.png"))) == 3
    lines = (tmp_path / "c.csv").read_text().splitlines()
    assert lines[0] == "run,step,key,value"
    assert len(lines) == 1 + 30 * 3
    assert tool([str(tmp_path), "--out", str(tmp_path / "d.html")]) == 1


def test_runs_of_one_name_are_told_apart(tmp_path):
    from spatialvlm.evaluation.report import run_names

    assert run_names(["a/stage1", "a/stage2", "b/c/stage1"]) == ["a/stage1", "stage2", "c/stage1"]
    assert run_names(["a/stage1", "a/stage1"]) == ["stage1", "stage1"]


def test_curves_of_runs_show_what_each_of_them_logged(tmp_path):
    import runpy
    from pathlib import Path

    tool = runpy.run_path(str(Path(__file__).resolve().parents[3] / "tools" / "plot_run.py"))[
        "main"
    ]
    for name, more in (("cpu", {"mfu_gemm": 0.6}), ("gpu", {"mfu": 0.5, "mfu_gemm": 0.6})):
        steps = [
            {
                "step": s,
                "loss": 10.0 ** (1 - s),
                "data_wait": 0.1 * s,
                "memory/peak_gib": 2.0,
                **more,
            }
            for s in range(3)
        ]
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))
    runs = [str(tmp_path / name) for name in ("cpu", "gpu")]
    assert tool([*runs, "--out", str(tmp_path / "c.html")]) == 0
    page = (tmp_path / "c.html").read_text()

    def chart(title: str) -> str:
        return page.partition(f"<figcaption>{title}")[2].partition("</figure>")[0]

    heights = [
        float(y) for y in re.findall(r'<circle cx="[\d.]+" cy="([\d.]+)"', chart("Training loss"))
    ]
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=0.2)  # logarithmic
    for title, names in (
        ("Time spent waiting for data", {"cpu", "gpu"}),
        ("Peak memory", {"cpu", "gpu"}),
        ("Model FLOP utilisation, of this machine", {"cpu", "gpu"}),
        ("Model FLOP utilisation, of the data sheet", {"gpu"}),
        ("Held-out loss", set()),
    ):
        shown = chart(title).partition('class="legend"')[2]
        assert {name for name in ("cpu", "gpu") if f"</i>{name}" in shown} == names, title


def test_composite_needs_all_members():
    from spatialvlm.evaluation.report import COMPOSITE, composite_table
    from spatialvlm.evaluation.runs import BenchRun

    def run(name, value, missing=None):
        extra = {"acc_3d": 90.0} if name == "cv_bench" else {}
        facts = {"partial": missing is not None, "missing_types": missing or []}
        result = {"headline": {"value": value}, "extra": extra, **facts}
        return [BenchRun("model", "#000", None, result, {})]

    values = dict.fromkeys(COMPOSITE, 50.0)
    page = composite_table({name: run(name, value) for name, value in values.items()})
    assert "<td>55.0</td></tr>" in page  # seven times 50 and 90 for the 3D half of CV-Bench
    whole = {name: run(name, value) for name, value in values.items()}
    assert "<td>–</td></tr>" in composite_table({**whole, "mmsi": run("mmsi", 50.0, [])})
    half = run("cv_bench", 50.0, ["COCO", "ADE20K"])
    assert "<td>55.0</td></tr>" in composite_table({**whole, "cv_bench": half})
    del values["erqa"]
    assert "<td>–</td></tr>" in composite_table({name: run(name, 50.0) for name in values})
    assert composite_table({"vsi_bench": run("vsi_bench", 50.0)}) == ""


def test_structured_answers_have_histograms(tmp_path):
    for name in ("localcogmap", "grounding7dof", "counting", "rotation"):
        write_result(scored(name, name, "official"), tmp_path / "run" / name)
    write_report([tmp_path / "run"], tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    for title, bins in (
        ("Cell error (SSR reports a mean of 0.71 for LocalCogMap)", 6),
        ("Centre error of 7-DoF boxes", 21),
        ("Yaw error of 7-DoF boxes", 18),
    ):
        figure = page.partition(f"<figcaption>{title}</figcaption>")[2].partition("</svg>")[0]
        assert figure.count("<rect") == bins, title
