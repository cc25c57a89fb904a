"""Tables, bars and run descriptions of the report, and the table for a terminal."""

import csv
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from spatialvlm.errors import DataError
from spatialvlm.evaluation import charts
from spatialvlm.evaluation.charts import GREY, Bar, Gallery, number
from spatialvlm.evaluation.metrics import composite
from spatialvlm.evaluation.runs import BenchRun, paired_runs

esc = html.escape


@dataclass(frozen=True, slots=True)
class Baseline:
    """One published number."""

    model: str
    benchmark: str
    metric: str
    value: float
    source: str
    per_task: dict[str, float]
    frames: int | None = None
    protocol: str | None = None
    note: str = ""


def read_baselines(extra: Sequence[str | Path] = ()) -> list[Baseline]:
    """Published numbers that ship with the package, and those of further files in the same form."""
    texts = [files("spatialvlm.evaluation").joinpath("baselines.json").read_text(encoding="utf-8")]
    texts += [Path(path).read_text(encoding="utf-8") for path in extra]
    rows = [row for text in texts for row in json.loads(text)]
    return [Baseline(**{"per_task": {}, **row}) for row in rows]


def _score(value: float | None, se: float | None) -> str:
    if value is None:
        return "–"
    return f"{number(value)}" + (f" <small>± {number(se)}</small>" if se is not None else "")


def question_types(runs: Sequence[BenchRun]) -> list[str]:
    """All question types of some runs."""
    return sorted({name for run in runs for name in run.result["per_type"]})


def task_table(runs: Sequence[BenchRun]) -> str:
    """Score and standard error of every question type, one column per run, chance last."""
    head = "".join(
        f'<th><span class="swatch" style="background:{run.color}"></span>{esc(run.label)}</th>'
        for run in runs
    )
    chance = runs[0].result.get("chance", {})
    lines = [f"<tr><th>task</th><th>n</th>{head}<th>chance</th></tr>"]
    for name in question_types(runs):
        cells = []
        for run in runs:
            row = run.result["per_type"].get(name)
            cells.append(f"<td>{_score(row['value'], row['se']) if row else '–'}</td>")
        n = max(run.result["per_type"].get(name, {"n": 0})["n"] for run in runs)
        guess = number(chance.get("per_type", {}).get(name))
        lines.append(f"<tr><td>{esc(name)}</td><td>{n}</td>{''.join(cells)}<td>{guess}</td></tr>")
    total = "".join(
        f"<td>{_score(r.result['headline']['value'], r.result['headline']['se'])}</td>"
        for r in runs
    )
    lines.append(
        f'<tr class="total"><td>{esc(runs[0].result["headline"]["name"])}</td><td>{runs[0].result["n"]}</td>'
        f"{total}<td>{number(chance.get('macro'))}</td></tr>"
    )
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


COMPOSITE = ("blink", "all_angles", "erqa", "vsi_bench", "dsr3", "mmsi", "cv_bench", "realworldqa")
"""Members of 3D-Avg (OpenSpatial, Table 1); CV-Bench enters with its 3D half."""


def composite_table(benchmarks: dict[str, list[BenchRun]]) -> str:
    """Headlines of all benchmarks side by side, with 3D-Avg when all eight members are there and none is partial."""
    if len(benchmarks) < 2:
        return ""
    labels = list(dict.fromkeys(run.label for runs in benchmarks.values() for run in runs))
    values: dict[str, dict[str, float]] = {label: {} for label in labels}
    partial = {
        (run.label, name)
        for name, runs in benchmarks.items()
        for run in runs
        # A file of CV-Bench's 3D half is whole as far as 3D-Avg goes.
        if run.result["partial"] and not (name == "cv_bench" and run.result["missing_types"])
    }
    for name, runs in benchmarks.items():
        for run in runs:
            values[run.label][name] = run.result["headline"]["value"]
            if name == "cv_bench" and run.result["extra"].get("acc_3d") is not None:
                values[run.label]["acc_3d"] = run.result["extra"]["acc_3d"]
    head = "".join(f"<th>{esc(name)}</th>" for name in benchmarks)
    lines = [f"<tr><th>run</th>{head}<th>3D-Avg</th></tr>"]
    for label in labels:
        own = values[label]
        members = [
            None if (label, name) in partial else own.get("acc_3d" if name == "cv_bench" else name)
            for name in COMPOSITE
        ]
        cells = "".join(f"<td>{number(own.get(name))}</td>" for name in benchmarks)
        lines.append(f"<tr><td>{esc(label)}</td>{cells}<td>{number(composite(members))}</td></tr>")
    return f'<h2>All benchmarks</h2><div class="scroll"><table>{"".join(lines)}</table></div>'


def text_table(benchmarks: dict[str, list[BenchRun]]) -> str:
    """The same table for a terminal."""
    out: list[str] = []
    for bench, runs in benchmarks.items():
        names = [*question_types(runs), runs[0].result["headline"]["name"]]
        width = max(map(len, [*names, "task"]))
        columns = [max(13, len(run.label) + 1) for run in runs]
        head = "".join(f"{run.label:>{w}}" for run, w in zip(runs, columns, strict=True))
        out += [
            f"{bench}  (protocol {runs[0].result['protocol']}, score ± SE in %, clusters: {runs[0].result['clusters']})",
            f"{'task':<{width}}{'n':>7}{head}{'chance':>9}",
        ]
        chance = runs[0].result.get("chance", {})
        for name in names:
            last = name == names[-1]
            line, n = "", 0
            for run, w in zip(runs, columns, strict=True):
                row = run.result["headline"] if last else run.result["per_type"].get(name)
                cell = "–"
                if row:
                    cell = number(row["value"])
                    cell += f" ± {number(row['se'])}" if row["se"] is not None else ""
                    n = max(n, run.result["n"] if last else row["n"])
                line += f"{cell:>{w}}"
            guess = chance.get("macro") if last else chance.get("per_type", {}).get(name)
            out.append(f"{name:<{width}}{n:>7}{line}{number(guess):>9}")
        rates = ", ".join(f"{run.label} {100 * run.result['unparsed_rate']:.1f} %" for run in runs)
        out += [f"unparsed: {rates}", ""]
    return "\n".join(out)


def _p(p: float | None) -> str:
    if p is None:
        return "–"
    return "&lt; 1e-6" if p < 1e-6 else f"{p:.2g}"


def difference_table(runs: Sequence[BenchRun]) -> str:
    """Paired differences between all pairs of runs on common items."""
    lines, name = [], ""
    for i, a in enumerate(runs):
        for b in runs[i + 1 :]:
            try:
                pair = paired_runs(b, a, allow_partial=True)
            except DataError as error:
                told = esc(f"{b.label} − {a.label}: {error}")
                lines.append(f"<tr><td class='wide' colspan='5'>{told}</td></tr>")
                continue
            name = pair.name
            ci = f"[{number(pair.ci95[0])}, {number(pair.ci95[1])}]" if pair.ci95 else "–"
            lines.append(
                f"<tr><td>{esc(b.label)} − {esc(a.label)}</td><td>{pair.difference:+.1f}</td><td>{ci}</td>"
                f"<td>{_p(pair.p)}</td><td>{pair.n}</td></tr>"
            )
    if not lines:
        return ""
    head = f"<tr><th>{esc(name)}</th><th>difference</th><th>95 % CI</th><th>p</th><th>n</th></tr>"
    return f'<h2>Paired differences</h2><div class="scroll"><table>{head}{"".join(lines)}</table></div>'


def task_bars(runs: Sequence[BenchRun], baselines: Sequence[Baseline], gallery: Gallery) -> str:
    """One small bar chart per question type."""
    chance = runs[0].result.get("chance", {}).get("per_type", {})
    cards = []
    for name in question_types(runs):
        bars = []
        for run in runs:
            row = run.result["per_type"].get(name)
            if row:
                bars.append(Bar(run.label, row["value"], row["se"], run.color))
        bars += [
            Bar(b.model, b.per_task[name], None, GREY, hollow=not (b.protocol and b.frames))
            for b in baselines
            if name in b.per_task
        ]
        bars.append(Bar("chance", chance.get(name)))
        cards.append(gallery.show(charts.bar_rows(name, bars), runs[0].result["benchmark"]))
    return f'<div class="grid2">{"".join(cards)}</div>'


def overall_bars(
    runs: Sequence[BenchRun], baselines: Sequence[Baseline], gallery: Gallery, *, partial: bool
) -> str:
    """The headline of every run, chance, and published numbers."""
    bars = [
        Bar(r.label, r.result["headline"]["value"], r.result["headline"]["se"], r.color)
        for r in runs
    ]
    bars.append(Bar("chance", runs[0].result.get("chance", {}).get("macro")))
    notes = []
    if partial:
        notes.append("Published numbers are not shown beside a partial result.")
    else:
        for b in sorted(baselines, key=lambda b: -b.value):
            hollow = not (b.protocol and b.frames)
            # Two papers may report one model differently.
            repeated = sum(other.model == b.model for other in baselines) > 1
            label = f"{b.model} ({b.source.split()[0]})" if repeated else b.model
            bars.append(Bar(label, b.value, None, GREY, hollow, " *" if hollow else ""))
            notes.append(f"{label}: {b.source}{'; ' + b.note if b.note else ''}")
        if any(not (b.protocol and b.frames) for b in baselines):
            notes.insert(0, "* hollow: protocol or number of frames not stated by the source")
    listed = "".join(f'<p class="note">{esc(note)}</p>' for note in notes)
    folded = f"<details><summary>Sources</summary>{listed}</details>" if len(notes) > 2 else listed
    plot = charts.bar_rows(runs[0].result["headline"]["name"], bars)
    return gallery.show(plot, runs[0].result["benchmark"]) + folded


def run_cards(runs: Sequence[BenchRun]) -> str:
    """What each run is: checkpoint, settings, coverage, departures."""
    rows = []
    for run in runs:
        r, m = run.result, run.manifest
        media = m.get("media", "real")
        decoding = m.get("decoding") or {}
        facts = {
            "checkpoint": m.get("checkpoint"),
            "protocol": r["protocol"]
            + (
                " (prompt: " + str(m["protocol"]) + ")"
                if m.get("protocol") not in (None, r["protocol"])
                else ""
            ),
            "media": media if media == "real" else f"{media} (blind)",
            "frames": f"{m['frames']} {m.get('frame_policy', '')}" if "frames" in m else None,
            "decoding": f"greedy, {decoding['max_new_tokens']} new tokens"
            if "max_new_tokens" in decoding
            else None,
            "items": f"{r['n']} of {r['n_expected']}" + (" (partial)" if r["partial"] else ""),
            "errors clustered by": r["clusters"],
            "unparsed": f"{100 * r['unparsed_rate']:.1f} % counted as {r['settings'].get('unparsed', 'wrong')}",
            "truncated": str(r["n_truncated"]),
            "unreadable media": str(r["n_failed"]),
            "data": r["data_sha256"][:16],
            "departures": "; ".join(r["deviations"]) or None,
            "warnings": "; ".join(r["warnings"]) or None,
        }
        body = "".join(
            f"<tr><td>{esc(k)}</td><td class='wide'>{esc(str(v))}</td></tr>"
            for k, v in facts.items()
            if v
        )
        rows.append(
            f'<div class="card"><h4><span class="swatch" style="background:{run.color}"></span>'
            f"{esc(run.label)}</h4><table>{body}</table></div>"
        )
    return f'<details><summary>Runs and settings</summary><div class="grid2">{"".join(rows)}</div></details>'


def headline_cards(runs: Sequence[BenchRun]) -> str:
    """The headline numbers, large."""
    cards = []
    for run in runs:
        h = run.result["headline"]
        se = f"± {number(h['se'])}" if h["se"] is not None else ""
        blind = " · without media" if run.blind else ""
        cards.append(
            f'<div class="card big"><span class="note"><span class="swatch" style="background:{run.color}"></span>'
            f"{esc(run.label)}{blind}</span><b>{number(h['value'])} <small class='note'>{se}</small></b>"
            f'<span class="note">{esc(h["name"])} · n {run.result["n"]} · unparsed '
            f"{100 * run.result['unparsed_rate']:.1f} %</span></div>"
        )
    chance = runs[0].result.get("chance", {}).get("macro")
    if chance is not None:
        cards.append(
            f'<div class="card big"><span class="note"><span class="swatch" style="background:{GREY}"></span>chance'
            f'</span><b>{number(chance)}</b><span class="note">1/k, or the best constant answer</span></div>'
        )
    return f'<div class="tiles-big">{"".join(cards)}</div>'


def write_task_csv(benchmarks: dict[str, list[BenchRun]], path: Path) -> None:
    """The task table: one line per benchmark, run and question type."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["benchmark", "run", "task", "value", "se", "n", "unparsed_rate", "chance"])
        for name, runs in benchmarks.items():
            for run in runs:
                chance: dict[str, Any] = run.result.get("chance", {}).get("per_type", {})
                for task, row in run.result["per_type"].items():
                    writer.writerow(
                        [
                            name,
                            run.label,
                            task,
                            row["value"],
                            row["se"],
                            row["n"],
                            row["unparsed_rate"],
                            chance.get(task),
                        ]
                    )
