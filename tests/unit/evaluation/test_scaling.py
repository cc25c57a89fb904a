"""Nested subsets, fitted laws, published slopes, and a sweep that is interrupted."""

import itertools
import json
import math
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from spatialvlm.config.evaluation import SweepConfig
from spatialvlm.config.load import load_config
from spatialvlm.errors import ConfigError, run_command
from spatialvlm.evaluation.metrics import composite
from spatialvlm.evaluation.scaling import (
    check_extrapolation,
    fit_log,
    fit_power,
    intervals_by_errors,
    intervals_by_items,
    is_monotone,
    nested_subset,
)

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def tool():
    return SimpleNamespace(**runpy.run_path(str(ROOT / "tools" / "scaling.py")))


# ----------------------------------------------------------------------------------------------------- subsets

IDS = {f"a{n}": "spatial" for n in range(200)} | {f"b{n}": "general" for n in range(100)}


def test_subsets_are_nested_and_keep_shares():
    subsets = [set(nested_subset(IDS, f)) for f in (0.1, 0.2, 0.5, 1.0)]
    for small, large in itertools.pairwise(subsets):
        assert small < large
    for share, chosen in zip((0.1, 0.2, 0.5, 1.0), subsets, strict=True):
        assert sum(IDS[i] == "spatial" for i in chosen) == 200 * share
        assert sum(IDS[i] == "general" for i in chosen) == 100 * share


def test_subsets_do_not_depend_on_the_order_of_rows():
    backwards = dict(reversed(IDS.items()))
    assert set(nested_subset(backwards, 0.3)) == set(nested_subset(IDS, 0.3))
    assert nested_subset(IDS, 0.3, seed=1) != nested_subset(IDS, 0.3)
    assert len(nested_subset(IDS, 0.001, floor=3)) == 6


def test_subsets_of_a_file(tmp_path, capsys):
    tool = runpy.run_path(str(ROOT / "tools" / "subset_data.py"))["main"]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"id": i, "task": t}) + "\n" for i, t in IDS.items()))
    base = ["--file", str(path), "--category", "task", "--out", str(tmp_path / "out")]
    assert tool([*base, "--fractions", "0.1", "0.5"]) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    small, large = ((tmp_path / "out" / name).read_text().splitlines() for name in manifest)
    assert set(small) < set(large) < set(path.read_text().splitlines())
    assert manifest["rows.010.jsonl"]["categories"] == {"general": 10, "spatial": 20}
    assert (len(large), manifest["rows.050.jsonl"]["rows"]) == (150, 150)
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    assert tool([*base, "--fractions", "0.1"]) == 0
    again = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert again["rows.010.jsonl"] == manifest["rows.010.jsonl"]  # whatever the order of rows
    for arguments, message in (
        ([*base, "--fractions", "0.5", "0.1"], "must increase"),
        ([*base, "--fractions", "1.5"], "must increase"),
        ([*base[:3], "nothing", *base[4:], "--fractions", "0.5"], "rows.jsonl:1 has no 'nothing'"),
    ):
        assert run_command(lambda given=arguments: tool(given)) == 2
        assert message in capsys.readouterr().err
    path.write_text("\n" + path.read_text().replace("\n", "\n \n"))  # blank lines
    assert tool([*base, "--fractions", "0.01", "0.014", "0.1"]) == 0
    fine = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert list(fine) == ["rows.001.jsonl", "rows.1.4.jsonl", "rows.010.jsonl"]
    assert fine["rows.010.jsonl"] == manifest["rows.010.jsonl"]
    assert (tmp_path / "out" / "rows.010.jsonl").read_text().count("\n") == 30


# -------------------------------------------------------------------------------------------------------- fits


def test_power_law_is_recovered():
    x = [1e3, 3e3, 1e4, 3e4, 1e5, 1e6]
    fit = fit_power(x, [70 - 30 * n**-0.3 for n in x])
    assert fit.params["c"] == pytest.approx(70, abs=0.5)
    assert fit.params["alpha"] == pytest.approx(0.3, abs=0.01)
    assert fit.r2 == pytest.approx(1, abs=1e-6)
    assert fit.predict(1e4) == pytest.approx(70 - 30 * 1e4**-0.3, abs=1e-3)


def test_log_law():
    x = [1, 2, 4, 8]
    fit = fit_log(x, [10, 12, 14, 16])
    assert fit.params == pytest.approx({"a": 10, "b": 2})
    assert fit.predict(16) == pytest.approx(18)
    assert math.isinf(fit_log([1, 2, 4], [1, 2, 3]).aicc)  # too few points for the correction
    with pytest.raises(
        ConfigError, match=r"at least three different positive sizes, got \[1.0, 2.0\]"
    ):
        fit_log([1, 2, 2], [1, 2, 3])


# OpenSpatial Table 4: BLINK AllAngles ERQA VSI 3DSR MMSI CV-3D RealWorldQA at 20, 40, 60, 80, 100 %
TABLE_4 = {
    20: [64.9, 55.0, 41.0, 51.8, 52.0, 34.7, 91.8, 69.5],
    40: [66.2, 56.8, 42.1, 52.4, 52.9, 35.8, 91.0, 71.1],
    60: [66.9, 56.7, 42.0, 53.2, 52.3, 36.0, 92.1, 70.7],
    80: [66.2, 59.7, 41.2, 53.5, 53.0, 37.6, 91.5, 70.5],
    100: [65.9, 58.4, 41.8, 56.7, 54.3, 39.6, 92.5, 68.3],
}


def test_slopes_of_a_published_table():
    sizes = list(TABLE_4)
    average = fit_log(sizes, [composite(row) for row in TABLE_4.values()])
    assert average.params["b"] == pytest.approx(0.837, abs=1e-3)
    assert average.r2 == pytest.approx(0.967, abs=1e-3)
    columns = list(zip(*TABLE_4.values(), strict=True))
    slopes = [round(fit_log(sizes, column).params["b"], 2) for column in columns]
    assert slopes == [0.49, 1.71, 0.20, 1.70, 0.74, 1.86, 0.25, -0.26]
    assert [is_monotone(sizes, column) for column in columns] == [
        False,
        False,
        False,
        True,
        False,
        True,
        False,
        False,
    ]


def test_intervals_are_those_of_the_headline():
    """A type with few questions weighs as much as one with many; plain means would miss the fitted value."""
    clusters = {f"i{n}": f"s{n % 20}" for n in range(400)}
    few = [f"i{n}" for n in range(40)]
    weights = {i: (0.5 / 40 if i in few else 0.5 / 360) for i in clusters}
    runs = [{i: (p if i in few else 0.2) for i in clusters} for p in (0.2, 0.4, 0.6)]
    low, high = intervals_by_items([1, 2, 4], runs, clusters, "log", weights=weights, draws=50)["b"]
    assert (low, high) == pytest.approx((10, 10))  # half of 20 points per doubling, no noise
    low, high = intervals_by_items([1, 2, 4], runs, clusters, "log", draws=50)["b"]
    assert high < 5


def test_intervals():
    rng = np.random.default_rng(0)
    clusters = {f"i{n}": f"s{n // 4}" for n in range(400)}
    runs = [{i: float(rng.random() < p) for i in clusters} for p in (0.3, 0.4, 0.5)]
    low, high = intervals_by_items([1, 2, 4], runs, clusters, "log", draws=200)["b"]
    assert 5 < low < 10 < high < 15
    low, high = intervals_by_errors([1, 2, 4], [30, 40, 50], [1, 1, 1], "log", draws=400)["b"]
    assert low == pytest.approx(10 - 1.96 / math.sqrt(2), abs=0.4)
    assert high == pytest.approx(10 + 1.96 / math.sqrt(2), abs=0.4)


def test_no_prediction_far_outside():
    check_extrapolation([1, 2, 4], 8, allowed=False)
    with pytest.raises(ConfigError, match="--extrapolate"):
        check_extrapolation([1, 2, 4], 9, allowed=False)
    check_extrapolation([1, 2, 4], 9, allowed=True)


# -------------------------------------------------------------------------------------------------------- sweep


def sweep_of(tmp_path, **changes):
    train = tmp_path / "train.yaml"
    train.write_text("data: {length: {epochs: 1}}\n")
    (tmp_path / "eval.yaml").write_text("run: {dir: x}\n")
    fields = {
        "out": str(tmp_path / "sweep"),
        "recipe": "recipes/stage1.py",
        "config": str(train),
        "values": (0.25, 0.5, 1.0),
        "hold": "epochs",
        "samples": 1000,
        "eval_config": str(tmp_path / "eval.yaml"),
        "seeds_at_smallest": 2,
        **changes,
    }
    return SweepConfig(**fields)


class Launcher:
    """Writes an evaluation result instead of training; stops after some calls."""

    def __init__(self, stop_after=None, fail=()):
        self.calls, self.stop_after, self.fail = [], stop_after, fail

    def __call__(self, command, cwd, check):
        if self.stop_after is not None and len(self.calls) >= self.stop_after:
            raise KeyboardInterrupt
        self.calls.append(command)
        out = Path(
            next(part for part in command if part.startswith("run.dir=")).removeprefix("run.dir=")
        )
        if any(name in str(out) for name in self.fail):
            return SimpleNamespace(returncode=1)
        if command[1] == "recipes/evaluate.py":
            share = float(out.parent.name.split("_")[0])
            folder = out / "bench"
            folder.mkdir(parents=True, exist_ok=True)
            head = {"value": 50 + 5 * math.log2(share), "se": 1.0, "name": "micro"}
            (folder / "result.json").write_text(
                json.dumps({"benchmark": "bench", "headline": head})
            )
            lines = "".join(
                f"i{n},,s{n % 5},t,,g,e,{(n % 10) / 10 * share},0,eos,\n" for n in range(40)
            )
            header = "id,variant,cluster,question_type,category,gold,extracted,score,unparsed,finish,group\n"
            (folder / "per_item.csv").write_text(header + lines)
        return SimpleNamespace(returncode=0)


def states(tmp_path):
    state = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    return {name: point["state"] for name, point in state.items()}


def test_an_interrupted_sweep_continues(tool, tmp_path, capsys):
    sweep = sweep_of(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        tool.run_sweep(sweep, dry_run=False, call=Launcher(stop_after=3))
    assert states(tmp_path) == {
        "0.25_seed0": "done",
        "0.25_seed1": "running",
        "0.5_seed0": "pending",
        "1.0_seed0": "pending",
    }
    rest = Launcher(fail=("0.5_seed0",))
    assert tool.run_sweep(sweep, dry_run=False, call=rest) == 1
    assert states(tmp_path)["0.5_seed0"] == "failed"
    assert states(tmp_path)["1.0_seed0"] == "done"
    assert not any("0.25_seed0" in part for command in rest.calls for part in command)
    again = Launcher()
    assert tool.run_sweep(sweep, dry_run=False, call=again) == 0
    assert len(again.calls) == 2  # only the failed point: training and evaluation
    train = again.calls[0]
    assert train[1:3] == ["recipes/stage1.py", sweep.config]
    assert {"data.fraction=0.5", "run.seed=0"} < set(train)
    assert "0.25_seed0: done before" in capsys.readouterr().out

    rows, items = tool.collect(sweep)
    lines, fits = tool.fit_all(rows, items, draws=50)
    assert fits["bench", "log"].params["b"] == pytest.approx(5)
    assert {(line["model"], line["param"]) for line in lines} == {
        ("log", "a"), ("log", "b"), ("power", "c"), ("power", "A"), ("power", "alpha"),
    }  # fmt: skip
    tool.write_page(tmp_path / "page.html", rows, fits, lines, "same epochs")
    page = (tmp_path / "page.html").read_text()
    assert "bench (same epochs)" in page
    assert "Monotone (never falls with size): bench." in page


def test_dry_run_prints_commands(tool, tmp_path, capsys):
    assert tool.run_sweep(sweep_of(tmp_path), dry_run=True, call=None) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 8
    assert all("recipes/" in line for line in printed)


def test_a_changed_recipe_does_not_mix_with_old_points(tool, tmp_path):
    sweep = sweep_of(tmp_path)
    tool.run_sweep(sweep, dry_run=False, call=Launcher())
    with pytest.raises(ConfigError, match="made with another configuration"):
        tool.load_state(sweep_of(tmp_path, overrides=("optim.lr=1e-4",)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": (0.5, 0.25)}, "must be increasing"),
        ({"values": (0.5, 2.0)}, "cannot exceed the data"),
        ({"hold": "steps"}, r"hold: steps needs data.length.steps"),
    ],
)
def test_bad_plans(changes, message, tool, tmp_path):
    with pytest.raises(ConfigError, match=message):
        tool.check_sweep(sweep_of(tmp_path, **changes))


def test_numbers_from_elsewhere(tool, tmp_path, capsys):
    lines = ["benchmark,size,value,se"]
    lines += [f"3d_avg,{size},{composite(row)},0.5" for size, row in TABLE_4.items()]
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    base = [
        "fit",
        "--table",
        str(tmp_path / "t.csv"),
        "--out",
        str(tmp_path / "out"),
        "--draws",
        "50",
    ]
    assert tool.main([*base, "--predict", "200"]) == 0
    assert "b 0.8368, R² 0.967" in capsys.readouterr().out
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "table.csv",
        "fits.csv",
        "scaling.html",
        "scaling_plots",
    }
    assert tool.main([*base, "--predict", "1000"]) == 1
    assert "--extrapolate" in capsys.readouterr().err
    (tmp_path / "t.csv").write_text("benchmark,size,value\nx,1,2\nx,2,3\n")
    assert tool.main(base) == 1
    assert "at least three different sizes, got [1.0, 2.0]" in capsys.readouterr().err


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "sweeps").glob("*.yaml")), ids=lambda p: p.name
)
def test_shipped_sweeps_load(tool, path):
    sweep = load_config(path, [], SweepConfig)
    tool.check_sweep(sweep)
    for point in tool.points(sweep):
        train, evaluate = tool.commands(sweep, point)
        assert (ROOT / sweep.config).is_file()
        assert f"model.init_from={sweep.out}/{point['name']}/run/final" in evaluate
        assert train.count(f"run.dir={sweep.out}/{point['name']}/run") == 1
