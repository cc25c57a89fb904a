r"""Scores against data size, or against any config key: run or resume a sweep, fit it, draw it.

    python tools/scaling.py plan --config configs/sweeps/scaling_demo.yaml
    python tools/scaling.py run  --config configs/sweeps/scaling_demo.yaml [--dry-run]
    python tools/scaling.py fit  --config configs/sweeps/scaling_demo.yaml [--predict 1e6] [--extrapolate]
    python tools/scaling.py fit  --table table.csv --out DIR        # numbers from elsewhere: benchmark,size,value,se
    python tools/scaling.py plot --config configs/sweeps/scaling_demo.yaml

``sweep.json`` keeps the state (pending, running, done, failed) of every point. ``run`` skips points that are done
under the same configuration, continues stopped ones from their last checkpoint, and starts one at a time; then
``manifest.json`` says what every point was trained on (rows and shares per source, blocked rows, order hashes).
Outputs: ``table.csv``, ``fits.csv``, ``scaling.html`` with one curve per benchmark (mean and standard error, fitted
laws) and a heat map coloured from worst to best, and ``scaling_plots/`` with every chart as PNG and CSV.
"""

import argparse
import csv
import hashlib
import html
import json
import shlex
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

from spatialvlm.config.evaluation import SweepConfig
from spatialvlm.config.load import load_config, read_yaml
from spatialvlm.errors import ConfigError, DataError, SpatialVLMError, run_command
from spatialvlm.evaluation import charts
from spatialvlm.evaluation.runs import headline_weights, read_runs
from spatialvlm.evaluation.scaling import (
    LAWS,
    check_extrapolation,
    intervals_by_errors,
    intervals_by_items,
    is_monotone,
)

ROOT = Path(__file__).resolve().parents[1]


# ------------------------------------------------------------------------------------------------------- points


def check_sweep(sweep: SweepConfig) -> None:
    """Refuse a plan that cannot answer its question."""
    numbers = [v for v in sweep.values if isinstance(v, (int, float)) and not isinstance(v, bool)]
    if sweep.axis == "data.fraction":
        if len(numbers) != len(sweep.values) or numbers != sorted(set(numbers)):
            raise ConfigError(f"values {list(sweep.values)} must be increasing fractions")
        if not 0 < numbers[0] <= numbers[-1] <= 1:
            raise ConfigError(f"values {numbers} must lie in (0, 1]: a size cannot exceed the data")
    length = read_yaml(ROOT / sweep.config).get("data", {}).get("length", {})
    changed = [
        o.removeprefix("data.length.").partition("=")
        for o in sweep.overrides
        if o.startswith("data.length.")
    ]
    stated = {**length, **{key: None if value == "null" else value for key, _, value in changed}}
    wanted = {
        "epochs": ("epochs",),
        "steps": ("steps", "samples"),
        "tokens": ("steps", "samples", "tokens"),
    }[sweep.hold]
    if not any(stated.get(key) is not None for key in wanted):
        raise ConfigError(
            f"hold: {sweep.hold} needs data.length.{wanted[0]}, but {sweep.config} states {stated or 'nothing'}"
        )


def points(sweep: SweepConfig) -> list[dict]:
    """All runs: every value once, the first one with several seeds."""
    found = []
    for number, value in enumerate(sweep.values):
        for extra in range(sweep.seeds_at_smallest if number == 0 else 1):
            seed = sweep.seed + extra
            name = f"{str(value).replace('/', '_')}_seed{seed}"
            found.append(
                {"name": name, "value": value, "seed": seed, "hash": point_hash(sweep, value, seed)}
            )
    return found


def point_hash(sweep: SweepConfig, value, seed: int) -> str:
    """Identity of everything that decides a point's scores."""
    facts = [
        (ROOT / sweep.config).read_text(),
        (ROOT / sweep.eval_config).read_text(),
        sweep.recipe,
        sweep.axis,
        value,
        seed,
        list(sweep.overrides),
        list(sweep.eval_overrides),
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def commands(sweep: SweepConfig, point: dict) -> list[list[str]]:
    """Training and evaluation of one point."""
    out = Path(sweep.out)
    launcher = shlex.split(sweep.launcher)
    launcher = [sys.executable] if launcher == ["python"] else launcher
    run, result = out / point["name"] / "run", out / point["name"] / "eval"
    train = [
        *launcher,
        sweep.recipe,
        sweep.config,
        *sweep.overrides,
        f"{sweep.axis}={json.dumps(point['value'])}",
    ]
    train += [f"run.seed={point['seed']}", f"run.dir={run}"]
    score = [*launcher, "recipes/evaluate.py", sweep.eval_config, *sweep.eval_overrides]
    return [train, [*score, f"model.init_from={run / 'final'}", f"run.dir={result}"]]


def load_state(sweep: SweepConfig) -> dict:
    """Points with their state; a point whose configuration changed is pending again."""
    path = Path(sweep.out) / "sweep.json"
    before = json.loads(path.read_text()) if path.is_file() else {}
    state = {}
    for point in points(sweep):
        old = before.get(point["name"], {})
        same = old.get("hash") == point["hash"]
        state[point["name"]] = {**point, "state": old["state"] if same else "pending"}
        if not same and old.get("state") in ("done", "running"):
            raise ConfigError(
                f"{path.parent / point['name']} was made with another configuration; use another `out` or remove it"
            )
    return state


def save_state(sweep: SweepConfig, state: dict) -> None:
    """Write ``sweep.json`` in one piece."""
    path = Path(sweep.out) / "sweep.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(state, indent=1) + "\n")
    partial.replace(path)


def run_sweep(sweep: SweepConfig, *, dry_run: bool, call=subprocess.run) -> int:
    """Start what is not done, one point at a time; returns the number of failed points."""
    state = load_state(sweep)
    failed = 0
    for point in state.values():
        if point["state"] == "done":
            print(f"{point['name']}: done before")
            continue
        if dry_run:
            for command in commands(sweep, point):
                print(shlex.join(command))
            continue
        point["state"] = "running"
        save_state(sweep, state)
        codes = []
        for command in commands(sweep, point):
            codes.append(call(command, cwd=ROOT, check=False).returncode)
            if codes[-1]:
                break
        point["state"] = "failed" if any(codes) else "done"
        failed += point["state"] == "failed"
        save_state(sweep, state)
        print(f"{point['name']}: {point['state']}")
    if not dry_run:
        write_manifest(sweep)
    return failed


def write_manifest(sweep: SweepConfig) -> None:
    """``manifest.json``: what every finished point was trained on, from the data report of its run."""
    found = {}
    for point in load_state(sweep).values():
        report = Path(sweep.out) / point["name"] / "run" / "data.json"
        if point["state"] != "done" or not report.is_file():
            continue
        last = list(json.loads(report.read_text()).values())[-1]
        sources = last["sources"].items()
        rows = {name: source["drawn_from"] for name, source in sources}
        total = sum(rows.values()) or 1
        found[point["name"]] = {
            "value": point["value"],
            "seed": point["seed"],
            "hold": sweep.hold,
            "rows": rows,
            "share": {name: round(count / total, 4) for name, count in rows.items()},
            "blocked": {name: source["blocked"] for name, source in sources},
            "block_lists": last["block_lists"],
            "order": last["order"],
        }
    path = Path(sweep.out) / "manifest.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


# ----------------------------------------------------------------------------------------------------- numbers


def size_of(sweep: SweepConfig, value) -> float | None:
    """Position on the x axis; ``None`` for values that are no numbers."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return (
        value * sweep.samples if sweep.axis == "data.fraction" and sweep.samples else float(value)
    )


def collect(sweep: SweepConfig) -> tuple[list[dict], dict]:
    """Scores of all finished points, and ``{(benchmark, point): (items, weights in the headline)}``."""
    rows, items = [], {}
    for point in load_state(sweep).values():
        if point["state"] != "done":
            continue
        for bench, runs in read_runs([Path(sweep.out) / point["name"] / "eval"]).items():
            head = runs[0].result["headline"]
            rows.append(
                {
                    "benchmark": bench,
                    "point": point["name"],
                    "label": str(point["value"]),
                    "size": size_of(sweep, point["value"]),
                    "seed": point["seed"],
                    "value": head["value"],
                    "se": head["se"],
                }
            )
            items[bench, point["name"]] = runs[0].items(), headline_weights(runs[0])
    if not rows:
        raise DataError(f"{sweep.out} has no finished point; run `scaling.py run` first")
    return rows, items


def read_table(path: Path) -> list[dict]:
    """Rows ``benchmark,size,value[,se]`` from elsewhere."""
    with path.open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    missing = {"benchmark", "size", "value"} - set(found[0] if found else {})
    if missing:
        raise DataError(
            f"{path} needs columns benchmark, size, value; missing: {', '.join(sorted(missing))}"
        )
    return [
        {
            "benchmark": row["benchmark"],
            "point": str(number),
            "label": row["size"],
            "size": float(row["size"]),
            "seed": 0,
            "value": float(row["value"]),
            "se": float(row["se"]) if row.get("se") else None,
        }
        for number, row in enumerate(found)
    ]


def write_csv(path: Path, rows: list[dict]) -> None:
    """Rows with the keys of the first one as header."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def fit_all(rows: list[dict], items: dict, draws: int) -> tuple[list[dict], dict]:
    """Both laws for every benchmark with at least three sizes."""
    lines, fits = [], {}
    for bench in sorted({row["benchmark"] for row in rows}):
        part = [row for row in rows if row["benchmark"] == bench and row["size"] is not None]
        if len({row["size"] for row in part}) < 3:
            continue
        x, y = [row["size"] for row in part], [row["value"] for row in part]
        for law, function in LAWS.items():
            fit = function(x, y)
            fits[bench, law] = fit
            bounds = {}
            first, weights = items.get((bench, part[0]["point"]), ([], None))
            if weights is not None:
                scores = [{i.id: i.score for i in items[bench, row["point"]][0]} for row in part]
                clusters = {i.id: i.cluster for i in first}
                bounds = intervals_by_items(x, scores, clusters, law, weights=weights, draws=draws)
            elif all(row["se"] is not None for row in part):
                bounds = intervals_by_errors(x, y, [row["se"] for row in part], law, draws=draws)
            for param, value in fit.params.items():
                low, high = bounds.get(param, (None, None))
                lines.append(
                    {
                        "benchmark": bench,
                        "model": law,
                        "param": param,
                        "value": value,
                        "lo": low,
                        "hi": high,
                        "r2": fit.r2,
                        "aicc": fit.aicc,
                        "n": fit.n,
                    }
                )
    return lines, fits


# ---------------------------------------------------------------------------------------------------------- page


def heat_map(rows: list[dict]) -> charts.Plot:
    """Means per benchmark and value, each row coloured from worst to best."""
    labels = list(dict.fromkeys(row["label"] for row in rows))
    benchmarks = sorted({row["benchmark"] for row in rows})
    values = []
    for bench in benchmarks:
        found = [
            [r["value"] for r in rows if (r["benchmark"], r["label"]) == (bench, x)] for x in labels
        ]
        values.append([sum(part) / len(part) if part else None for part in found])
    return charts.heat_map("Scores", benchmarks, labels, values)


def rising(rows: list[dict]) -> str:
    """Which benchmarks never fall with size, as a sentence."""
    flags = {}
    for bench in sorted({row["benchmark"] for row in rows}):
        part = [r for r in rows if r["benchmark"] == bench and r["size"] is not None]
        if len({r["size"] for r in part}) > 1:
            flags[bench] = is_monotone([r["size"] for r in part], [r["value"] for r in part])
    if not flags:
        return ""
    names = ", ".join(bench for bench, flag in flags.items() if flag) or "none"
    return f'<p class="note">Monotone (never falls with size): {html.escape(names)}.</p>'


def curves(rows: list[dict], fits: dict, hold: str) -> list[charts.Plot | None]:
    """One chart per benchmark, means with standard errors and both laws; then all benchmarks together."""
    plots, together = [], []
    for number, bench in enumerate(sorted({row["benchmark"] for row in rows})):
        groups = defaultdict(list)
        for row in rows:
            if row["benchmark"] == bench and row["size"] is not None:
                groups[row["size"]].append(row)
        if not groups:
            continue
        sizes = sorted(groups)
        means = [sum(r["value"] for r in groups[s]) / len(groups[s]) for s in sizes]
        errors = [noise(groups[s]) for s in sizes]
        series = [charts.Series("mean ± SE", sizes, means, charts.PALETTE[0], errors)]
        grid = [sizes[0] * (sizes[-1] / sizes[0]) ** (k / 40) for k in range(41)]
        for index, law in enumerate(LAWS):
            if (bench, law) in fits:
                fit = fits[bench, law]
                color = charts.PALETTE[1 + index]
                values = [fit.predict(s) for s in grid]
                series.append(charts.Series(f"{law} (R² {fit.r2:.2f})", grid, values, color))
        title = f"{bench} ({hold})"
        plots.append(charts.line_chart(title, series, "size", "score in %", log_x=True))
        color = charts.PALETTE[number % len(charts.PALETTE)]
        together.append(charts.Series(bench, sizes, means, color))
    if len(together) > 1:
        title = f"All benchmarks ({hold})"
        plots.append(charts.line_chart(title, together, "size", "score in %", log_x=True))
    return plots


def noise(group: list[dict]) -> float:
    """Standard error of a size: between its seeds where there are several, else over its items."""
    values = [row["value"] for row in group]
    if len(values) > 1:
        return statistics.stdev(values) / len(values) ** 0.5
    return group[0]["se"] or 0.0


def write_page(path: Path, rows: list[dict], fits: dict, lines: list[dict], hold: str) -> None:
    """Static page with curves, heat map and parameters, its charts beside it; ``hold`` says what all points have in common."""
    from importlib.resources import files

    style = files("spatialvlm.evaluation").joinpath("report.css").read_text(encoding="utf-8")
    gallery = charts.Gallery()
    figures = "".join(map(gallery.show, curves(rows, fits, hold)))
    table = gallery.show(heat_map(rows))
    gallery.write(path.with_name(f"{path.stem}_plots"))
    params = "".join(
        f"<tr><td>{html.escape(r['benchmark'])} {r['model']}</td><td>{r['param']}</td><td>{r['value']:.4g}</td>"
        f"<td>{charts.number(r['lo'], 3)} … {charts.number(r['hi'], 3)}</td><td>{r['r2']:.3f}</td></tr>"
        for r in lines
    )
    path.write_text(
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width, initial-scale=1"><title>Sweep</title><style>{style}</style></head><body><main>'
        f"<h1>Sweep</h1><p class='sub'>{html.escape(hold)}</p>"
        f'<div class="grid2">{figures}</div><h2>Scores</h2>{table}{rising(rows)}'
        + (
            f'<h2>Fitted laws</h2><div class="scroll"><table><tr><th>law</th><th>parameter</th><th>value</th>'
            f"<th>95 % interval</th><th>R²</th></tr>{params}</table></div>"
            if lines
            else ""
        )
        + "</main></body></html>\n",
        encoding="utf-8",
    )


def analyse(args: argparse.Namespace, sweep: SweepConfig | None) -> None:
    """Table, fits, page; predictions on request."""
    rows, items = collect(sweep) if sweep else (read_table(args.table), {})
    out = Path(sweep.out) if sweep else args.out
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "table.csv", rows)
    lines, fits = fit_all(rows, items, args.draws)
    if args.command == "fit" and not fits:
        sizes = sorted({row["size"] for row in rows if row["size"] is not None})
        raise ConfigError(f"a fit needs at least three different sizes, got {sizes}")
    if lines:
        write_csv(out / "fits.csv", lines)
    write_page(
        out / "scaling.html",
        rows,
        fits,
        lines,
        f"same {sweep.hold} and hyper-parameters" if sweep else "numbers from elsewhere",
    )
    for (bench, law), fit in fits.items():
        text = ", ".join(f"{k} {v:.4g}" for k, v in fit.params.items())
        print(f"{bench} {law}: {text}, R² {fit.r2:.3f}, AICc {fit.aicc:.2f}")
        sizes = [
            row["size"] for row in rows if row["benchmark"] == bench and row["size"] is not None
        ]
        for size in args.predict:
            check_extrapolation(sizes, size, allowed=args.extrapolate)
            print(f"  at {size:g}: {fit.predict(size):.2f}")
    print(f"wrote {out / 'scaling.html'}")


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["plan", "run", "fit", "plot"])
    parser.add_argument("--config", type=Path, help="YAML file of the sweep")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="key=value", help="changes to the sweep"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands of `run`")
    parser.add_argument("--table", type=Path, help="numbers instead of a sweep")
    parser.add_argument(
        "--out", type=Path, default=Path("scaling"), help="output folder with --table"
    )
    parser.add_argument("--predict", type=float, nargs="*", default=[])
    parser.add_argument("--extrapolate", action="store_true")
    parser.add_argument("--draws", type=int, default=1000)
    args = parser.parse_args(argv)
    try:
        if args.config is None and (args.table is None or args.command in ("plan", "run")):
            raise ConfigError("--config is needed (or --table for fit and plot)")
        sweep = load_config(args.config, args.set, SweepConfig) if args.config else None
        if args.command in ("fit", "plot"):
            analyse(args, sweep)
            return 0
        assert sweep is not None
        check_sweep(sweep)
        if args.command == "plan":
            for point in load_state(sweep).values():
                print(f"{point['name']}: {point['state']}")
            return 0
        return 1 if run_sweep(sweep, dry_run=args.dry_run) else 0
    except SpatialVLMError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(run_command(main))
