"""One static HTML page for a run or a comparison of runs, and a table for the terminal.

Everything is inlined: style, charts, pictures. All text that comes from files or models is escaped.
"""

import csv
import html
import itertools
import json
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from spatialvlm.errors import DataError, SpatialVLMError
from spatialvlm.evaluation import charts
from spatialvlm.evaluation.charts import GREY, PALETTE, Bar, Series, number
from spatialvlm.evaluation.prompts import item_media, prompt_text
from spatialvlm.evaluation.registry import load_benchmark
from spatialvlm.evaluation.runs import BenchRun, ItemRow, paired_macro, read_metrics, read_runs
from spatialvlm.evaluation.schema import Benchmark, Item
from spatialvlm.evaluation.structured import CELL_EDGES, CENTER_EDGES, YAW_EDGES
from spatialvlm.evaluation.thumbnails import tiles

MAX_BYTES = 25_000_000
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


# ---------------------------------------------------------------------------------------------------- tables


def _score(value: float | None, se: float | None) -> str:
    if value is None:
        return "–"
    return f"{number(value)}" + (f" <small>± {number(se)}</small>" if se is not None else "")


def _types(runs: Sequence[BenchRun]) -> list[str]:
    return sorted({name for run in runs for name in run.result["per_type"]})


def task_table(runs: Sequence[BenchRun]) -> str:
    """Score and standard error of every question type, one column per run, chance last."""
    head = "".join(
        f'<th><span class="swatch" style="background:{run.color}"></span>{esc(run.label)}</th>'
        for run in runs
    )
    chance = runs[0].result.get("chance", {})
    lines = [f"<tr><th>task</th><th>n</th>{head}<th>chance</th></tr>"]
    for name in _types(runs):
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


def text_table(benchmarks: dict[str, list[BenchRun]]) -> str:
    """The same table for a terminal."""
    out: list[str] = []
    for bench, runs in benchmarks.items():
        names = [*_types(runs), runs[0].result["headline"]["name"]]
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


def difference_table(runs: Sequence[BenchRun]) -> str:
    """Paired differences between all pairs of runs on common items."""
    lines = []
    for i, a in enumerate(runs):
        for b in runs[i + 1 :]:
            pair = paired_macro(a, b)
            if pair is None:
                continue
            ci = f"[{number(pair.ci95[0])}, {number(pair.ci95[1])}]" if pair.ci95 else "–"
            lines.append(
                f"<tr><td>{esc(a.label)} − {esc(b.label)}</td><td>{pair.difference:+.1f}</td><td>{ci}</td>"
                f"<td>{'–' if pair.p is None else f'{pair.p:.2g}'}</td><td>{pair.n}</td></tr>"
            )
    if not lines:
        return ""
    head = (
        "<tr><th>macro over tasks</th><th>difference</th><th>95 % CI</th><th>p</th><th>n</th></tr>"
    )
    return f'<h2>Paired differences</h2><div class="scroll"><table>{head}{"".join(lines)}</table></div>'


def task_bars(runs: Sequence[BenchRun], baselines: Sequence[Baseline]) -> str:
    """One small bar chart per question type."""
    chance = runs[0].result.get("chance", {}).get("per_type", {})
    cards = []
    for name in _types(runs):
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
        cards.append(charts.bar_rows(name, bars))
    return f'<div class="grid2">{"".join(cards)}</div>'


def overall_bars(runs: Sequence[BenchRun], baselines: Sequence[Baseline], *, partial: bool) -> str:
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
            bars.append(Bar(b.model, b.value, None, GREY, hollow, " *" if hollow else ""))
            notes.append(f"{b.model}: {b.source}{'; ' + b.note if b.note else ''}")
        if any(not (b.protocol and b.frames) for b in baselines):
            notes.insert(0, "* hollow: protocol or number of frames not stated by the source")
    listed = "".join(f'<p class="note">{esc(note)}</p>' for note in notes)
    folded = f"<details><summary>Sources</summary>{listed}</details>" if len(notes) > 2 else listed
    return charts.bar_rows(runs[0].result["headline"]["name"], bars) + folded


# ---------------------------------------------------------------------------------------------------- header


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


# ------------------------------------------------------------------------------------------------ diagnostics


def diagnostics(runs: Sequence[BenchRun], benchmark: Benchmark | None) -> str:
    """Unparsed answers per task, letter habits, numbers against gold, structured histograms."""
    parts = []
    unparsed = []
    for name in _types(runs):
        cells = "".join(
            f"<td>{100 * row['unparsed_rate']:.1f} %</td><td>{row['n_truncated']}</td>"
            if (row := run.result["per_type"].get(name))
            else "<td>–</td><td>–</td>"
            for run in runs
        )
        unparsed.append(f"<tr><td>{esc(name)}</td>{cells}</tr>")
    head = "".join(f"<th>{esc(r.label)}<br>unparsed</th><th>cut off</th>" for r in runs)
    parts.append(
        "<details><summary>Unparsed and truncated answers per task</summary>"
        f'<div class="scroll"><table><tr><th>task</th>{head}</tr>{"".join(unparsed)}</table></div></details>'
    )
    figures = _letters(runs) + _numbers(runs, benchmark) + _structured(runs)
    if figures:
        parts.append(f'<div class="grid2">{figures}</div>')
    return "".join(parts)


def _letters(runs: Sequence[BenchRun]) -> str:
    """Share of each letter among gold and predicted answers."""
    cards = []
    gold: Counter[str] = Counter()
    for run in runs:
        rows = [i for i in run.items() if len(i.gold) == 1 and i.gold.isalpha()]
        gold = gold or Counter(i.gold for i in rows)
        said = Counter(i.extracted for i in rows if len(i.extracted) == 1)
        total = max(sum(said.values()), 1)
        cards.append((run, said, total))
    if not gold:
        return ""
    head = "".join(f"<th>{esc(run.label)}</th>" for run, _, _ in cards)
    lines = [f"<tr><th>letter</th><th>gold</th>{head}</tr>"]
    for letter in sorted(set(gold) | {x for _, said, _ in cards for x in said}):
        cells = "".join(
            f"<td>{number(100 * said[letter] / total)}</td>" for _, said, total in cards
        )
        share = number(100 * gold[letter] / sum(gold.values()))
        lines.append(f"<tr><td>{esc(letter)}</td><td>{share}</td>{cells}</tr>")
    table = f'<div class="scroll"><table>{"".join(lines)}</table></div>'
    return f"<figure><figcaption>Letters: share of gold and predicted answers in %</figcaption>{table}</figure>"


def _numbers(runs: Sequence[BenchRun], benchmark: Benchmark | None) -> str:
    if benchmark is None:
        return ""
    kinds = {item.key: item.kind for item in benchmark.items}
    body = ""
    for run in runs:
        pairs = [
            (float(i.gold), float(i.extracted))
            for i in run.items()
            if kinds.get((i.id, i.variant)) in ("number", "count")
            and not i.unparsed
            and i.extracted
        ]
        if not pairs:
            continue
        body += charts.scatter_chart(f"Numbers: {run.label}", pairs, "gold", "predicted", run.color)
    counts = []
    edges = [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, float("inf")]
    for run in runs:
        errors = [
            abs(float(i.extracted) - float(i.gold)) / float(i.gold)
            for i in run.items()
            if kinds.get((i.id, i.variant)) == "number" and i.extracted and float(i.gold) > 0
        ]
        if errors:
            bins = [sum(lo <= e < hi for e in errors) for lo, hi in itertools.pairwise(edges)]
            counts.append((run.label, bins, run.color))
    if counts:
        body += charts.histogram_chart("Relative error of numbers", edges, counts, "|p − t| / t")
    return body


def _structured(runs: Sequence[BenchRun]) -> str:
    """Cell errors, centre and yaw errors as histograms, like SSR's Figure 8."""
    wanted = (
        (
            "histogram",
            CELL_EDGES,
            "Cell error of LocalCogMap (SSR reports a mean of 0.71)",
            "cells",
        ),
        ("center_histogram", CENTER_EDGES, "Centre error of 7-DoF boxes", "metres"),
        ("yaw_histogram", YAW_EDGES, "Yaw error of 7-DoF boxes", "degrees"),
    )
    body = ""
    for key, edges, title, unit in wanted:
        counts = []
        for run in runs:
            extra = run.result["extra"]
            source = next(
                (
                    part
                    for part in (extra, extra.get("localcogmap"), extra.get("grounding7"))
                    if part and key in part
                ),
                None,
            )
            if source:
                counts.append((run.label, source[key], run.color))
        if counts:
            body += charts.histogram_chart(title, edges, counts, unit)
    return body


# ---------------------------------------------------------------------------------------------- training curves


def training_curves(folders: Sequence[str | Path]) -> str:
    """Loss, learning rate per group, gradient norms and speed of training runs."""
    runs = [(Path(folder).name, read_metrics(folder)) for folder in folders]
    if not runs:
        return ""

    def collect(prefix: str, *, exact: bool = False) -> list[Series]:
        series: list[Series] = []
        for run, (label, steps) in enumerate(runs):
            keys = sorted(
                {k for s in steps for k in s if (k == prefix if exact else k.startswith(prefix))}
            )
            for key in keys:
                rows = [s for s in steps if isinstance(s.get(key), (int, float))]
                name = label if exact else f"{label} {key.removeprefix(prefix)}"
                color = PALETTE[(run if exact else len(series)) % len(PALETTE)]
                series.append(
                    Series(name, [s["step"] for s in rows], [s[key] for s in rows], color)
                )
        return series

    cards = [
        charts.line_chart("Training loss", collect("loss", exact=True), "step", "loss"),
        charts.line_chart("Learning rate per group", collect("lr/"), "step", "learning rate"),
        charts.line_chart(
            "Gradient norm", collect("grad_norm/total", exact=True), "step", "norm", log_y=True
        ),
        charts.line_chart(
            "Speed", collect("tokens_per_s", exact=True), "step", "tokens per second"
        ),
        charts.line_chart("Evaluation during training", collect("eval/"), "step", "value"),
    ]
    return f'<h2>Training</h2><div class="grid2">{"".join(cards)}</div>'


# ---------------------------------------------------------------------------------------------------- samples


def pick_samples(items: Sequence[ItemRow], count: int, seed: int = 0) -> list[ItemRow]:
    """A seeded choice over tasks: unparsed and wrong answers first, then right ones.

    Two thirds are failures where there are that many.
    """
    rng = random.Random(seed)
    pools: dict[str, dict[str, list[ItemRow]]] = {
        "fail": defaultdict(list),
        "right": defaultdict(list),
    }
    for item in items:
        pools["right" if item.score >= 0.5 and not item.unparsed else "fail"][
            item.question_type
        ].append(item)

    def draw(pool: dict[str, list[ItemRow]], wanted: int) -> list[ItemRow]:
        queues = [rng.sample(part, len(part)) for _, part in sorted(pool.items())]
        for queue in queues:
            queue.sort(key=lambda item: not item.unparsed)
        chosen: list[ItemRow] = []
        while len(chosen) < wanted and any(queues):
            for queue in queues:
                if queue and len(chosen) < wanted:
                    chosen.append(queue.pop(0))
        return chosen

    total_right = sum(map(len, pools["right"].values()))
    failures = draw(pools["fail"], max(count - min(total_right, count // 3), 0))
    right = draw(pools["right"], count - len(failures))
    return sorted(failures, key=lambda item: not item.unparsed) + right


def _verdict(row: ItemRow) -> str:
    if row.unparsed:
        return '<span class="un">unparsed</span>'
    if row.score >= 0.5:
        return f'<span class="ok">{"right" if row.score == 1 else number(row.score, 1)}</span>'
    return f'<span class="no">{"wrong" if row.score == 0 else number(row.score, 1)}</span>'


def _gold_text(gold: str) -> str:
    """The part of a structured gold value that a reader wants to see."""
    if gold.startswith("{"):
        value = json.loads(gold)
        return json.dumps(value.get("cell") or value.get("box") or value)
    return {"true": "yes", "false": "no"}.get(gold, gold)


def sample_cards(runs: Sequence[BenchRun], benchmark: Benchmark, count: int, side: int) -> str:
    """Questions with pictures and every run's answer; failures of the last sighted run first."""
    main = next((run for run in reversed(runs) if not run.blind), runs[-1])
    by_key: dict[tuple[str, str], Item] = {item.key: item for item in benchmark.items}
    tables = {run.label: {(i.id, i.variant): i for i in run.items()} for run in runs}
    texts = {run.label: run.texts() for run in runs}
    cards = []
    for picked in pick_samples(main.items(), count):
        key = picked.id, picked.variant
        item = by_key.get(key)
        if item is None:
            continue
        state = "unparsed" if picked.unparsed else ("right" if picked.score >= 0.5 else "wrong")
        answers = ""
        for run in runs:
            row = tables[run.label].get(key)
            if row is not None:
                said = texts[run.label].get(key, row.extracted)
                answers += (
                    f'<tr><td><span class="swatch" style="background:{run.color}"></span>{esc(run.label)}</td>'
                    f"<td>{esc(said[:400]) or '<i>empty</i>'}</td><td class='verdict'>{_verdict(row)}</td></tr>"
                )
        try:
            prompt = prompt_text(item, benchmark.spec, main.result["protocol"])
            media = item_media(item.row, benchmark.spec)
        except DataError as error:
            prompt, media = f"[{error}]", ()
        marks = benchmark.spec.marks(item.row) if benchmark.spec.marks else []
        prompt = prompt.replace("<image>", "").replace("<video>", "").strip()
        cards.append(
            f'<article class="sample {state}"><div class="head"><span>{esc(picked.question_type)}</span>'
            f"<span>{esc(picked.cluster)}</span></div>"
            f"{tiles(media, benchmark.media_root, side=side, marks=marks)}"
            f"<pre>{esc(prompt[:1500])}</pre>"
            f'<table class="answers"><tr><td>gold</td><td>{esc(_gold_text(picked.gold))}</td><td class="verdict"></td></tr>{answers}</table>'
            "</article>"
        )
    return f'<div class="samples">{"".join(cards)}</div>'


def reload_benchmark(run: BenchRun) -> Benchmark | None:
    """The benchmark's items again, from the file named in the manifest; ``None`` if it is gone."""
    path = run.manifest.get("data_file")
    if not path or not Path(path).exists():
        return None
    try:
        return load_benchmark(
            run.result["benchmark"], path, media_root=run.manifest.get("media_root")
        )
    except SpatialVLMError:
        return None


# ------------------------------------------------------------------------------------------------------- page


def build_page(
    benchmarks: dict[str, list[BenchRun]],
    *,
    training: Sequence[str | Path] = (),
    baselines: Sequence[Baseline] = (),
    samples: int = 12,
    title: str = "",
    side: int = 384,
) -> str:
    """The whole page as a string."""
    body = []
    for name, runs in benchmarks.items():
        known = [b for b in baselines if b.benchmark == name]
        benchmark = next((b for run in runs if (b := reload_benchmark(run))), None)
        heading = benchmark.spec.title if benchmark else name
        partial = any(run.result["partial"] for run in runs)
        mismatch = [r.label for r in runs if r.result["settings"].get("protocol_mismatch")]
        body.append(f"<h1>{esc(heading)}</h1>" if len(benchmarks) > 1 else "")
        body.append(headline_cards(runs))
        if mismatch:
            body.append(
                f'<p class="note">Prompt and score protocols differ: {esc(", ".join(mismatch))}</p>'
            )
        body.append(run_cards(runs))
        body.append(f"<h2>Scores by task</h2>{task_table(runs)}")
        body.append(
            '<p class="note">Percent ± standard error, clustered by scene where scenes are known. '
            f"At n = {runs[0].result['n']} independent items and 50 %, a 95 % interval is ± "
            f"{number(runs[0].result['headline']['half_width_iid'])} points: smaller gains need a paired test.</p>"
        )
        body.append(difference_table(runs))
        if known:
            body.append(
                f"<h2>Beside published numbers</h2>{overall_bars(runs, known, partial=partial)}"
            )
        body.append(f"<h2>Tasks</h2>{task_bars(runs, [] if partial else known)}")
        if name == next(iter(benchmarks)):
            body.append(training_curves(training))
        if benchmark and samples:
            body.append("<h2>Sample answers, failures first</h2>")
            body.append(sample_cards(runs, benchmark, samples, side))
        elif samples:
            body.append(
                '<p class="note">No samples: the benchmark file named in the manifest is not here.</p>'
            )
        body.append(f"<h2>Diagnostics</h2>{diagnostics(runs, benchmark)}")
    first = next(iter(benchmarks))
    heading = title or (f"Evaluation: {', '.join(benchmarks)}")
    labels = ", ".join(run.label for run in benchmarks[first])
    return _page(heading, labels, "".join(body))


def _page(heading: str, subtitle: str, body: str) -> str:
    """HTML document with the style inlined."""
    style = files("spatialvlm.evaluation").joinpath("report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{esc(heading)}</title><style>{style}</style></head><body><main>"
        f'<h1>{esc(heading)}</h1><p class="sub">{esc(subtitle)}</p>{body}</main></body></html>\n'
    )


def plotted(key: str) -> bool:
    """Whether a metric is drawn by :func:`training_curves`."""
    return key in ("loss", "grad_norm/total", "tokens_per_s") or key.startswith(("lr/", "eval/"))


def curves_page(folders: Sequence[str | Path]) -> str:
    """A page with the training curves of runs and nothing else."""
    names = ", ".join(Path(folder).name for folder in folders)
    return _page("Training runs", names, training_curves(folders))


def write_report(
    folders: Sequence[str | Path],
    out: str | Path,
    *,
    training: Sequence[str | Path] = (),
    extra_baselines: Sequence[str | Path] = (),
    samples: int = 12,
    title: str = "",
) -> dict[str, list[BenchRun]]:
    """Write the page and a CSV of its task table beside it.

    Pictures are made smaller, and said so, until the page is at most 25 MB.

    Raises:
        DataError: A folder has no result.
    """
    benchmarks = read_runs(folders)
    baselines = read_baselines(extra_baselines)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    page = ""
    for side in (384, 192, 96):
        page = build_page(
            benchmarks,
            training=training,
            baselines=baselines,
            samples=samples,
            title=title,
            side=side,
        )
        if len(page.encode()) <= MAX_BYTES:
            break
    else:
        page = page.replace(
            "<main>", '<main><p class="note">Pictures were thinned to keep the page small.</p>', 1
        )
    out.write_text(page, encoding="utf-8")
    write_task_csv(benchmarks, out.with_suffix(".csv"))
    return benchmarks


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
