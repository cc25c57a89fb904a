"""Diagnostics and training curves of the report."""

import html
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spatialvlm.evaluation import charts
from spatialvlm.evaluation.charts import PALETTE, Gallery, Plot, Series, number
from spatialvlm.evaluation.report_tables import question_types
from spatialvlm.evaluation.runs import BenchRun, read_metrics
from spatialvlm.evaluation.schema import Benchmark
from spatialvlm.evaluation.structured import CELL_EDGES, CENTER_EDGES, YAW_EDGES

esc = html.escape


def diagnostics(runs: Sequence[BenchRun], benchmark: Benchmark | None, gallery: Gallery) -> str:
    """Unparsed answers per task, letter habits, numbers against gold, structured histograms."""
    parts = []
    unparsed = []
    for name in question_types(runs):
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
    name = runs[0].result["benchmark"]
    plots = [*_numbers(runs, benchmark), *_structured(runs)]
    figures = _letters(runs) + "".join(gallery.show(plot, name) for plot in plots)
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


def _numbers(runs: Sequence[BenchRun], benchmark: Benchmark | None) -> list[Plot | None]:
    if benchmark is None:
        return []
    kinds = {item.key: item.kind for item in benchmark.items}
    plots: list[Plot | None] = []
    for run in runs:
        pairs = [
            (float(i.gold), float(i.extracted))
            for i in run.items()
            if kinds.get((i.id, i.variant)) in ("number", "count")
            and not i.unparsed
            and i.extracted
        ]
        plots.append(
            charts.scatter_chart(f"Numbers: {run.label}", pairs, "gold", "predicted", run.color)
        )
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
        plots.append(
            charts.histogram_chart("Relative error of numbers", edges, counts, "|p − t| / t")
        )
    return plots


def _structured(runs: Sequence[BenchRun]) -> list[Plot]:
    """Cell errors, centre and yaw errors as histograms, like SSR's Figure 8."""
    wanted = (
        (
            "histogram",
            CELL_EDGES,
            "Cell error (SSR reports a mean of 0.71 for LocalCogMap)",
            "cells",
        ),
        ("center_histogram", CENTER_EDGES, "Centre error of 7-DoF boxes", "metres"),
        ("yaw_histogram", YAW_EDGES, "Yaw error of 7-DoF boxes", "degrees"),
    )
    plots = []
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
            if key == "histogram" and (rival := _global_maps(run)):
                counts.append((f"{run.label}, global maps", rival, charts.GREY))
        if counts:
            plots.append(charts.histogram_chart(title, edges, counts, unit))
    return plots


def _global_maps(run: BenchRun) -> list[int]:
    """Cell errors of the same run on ``globalmap``, to be drawn beside LocalCogMap's."""
    path = run.folder.parent / "globalmap" / "result.json"
    if run.result["benchmark"] != "localcogmap" or not path.is_file():
        return []
    return list(json.loads(path.read_text(encoding="utf-8"))["extra"]["histogram"])


OF_RUNS = (
    # key, title, vertical axis, logarithmic
    ("loss", "Training loss", "loss", True),
    ("eval/loss", "Held-out loss", "loss", True),
    ("grad_norm/total", "Gradient norm", "norm", True),
    ("tokens_per_s", "Speed", "tokens per second", False),
    ("mfu", "Model FLOP utilisation, of the data sheet", "share", False),
    ("mfu_gemm", "Model FLOP utilisation, of this machine's matrix products", "share", False),
    ("data_wait", "Time spent waiting for data", "share", False),
    ("memory/peak_gib", "Peak memory", "GiB", False),
)
"""Metrics that are compared between runs."""


def training_curves(folders: Sequence[str | Path], gallery: Gallery) -> str:
    """Loss, gradient norm, speed, utilisation, waits and memory of training runs; rates and evaluations of each."""
    runs = list(zip(run_names(folders), map(read_metrics, folders), strict=True))
    if not runs:
        return ""

    def one_key(key: str) -> list[Series]:
        """The same metric of every run."""
        colors = itertools.cycle(PALETTE)
        return [_series(steps, key, label, next(colors)) for label, steps in runs]

    def one_run(steps: list[dict[str, Any]], prefix: str) -> list[Series]:
        """All metrics of a run that start alike; the general ones if they are more than there are colours."""
        keys = sorted({k for s in steps for k in s if k.startswith(prefix)})
        if len(keys) > len(PALETTE):
            keys = [key for key in keys if key.count("/") == prefix.count("/")]
        colors = itertools.cycle(PALETTE)
        return [_series(steps, key, key.removeprefix(prefix), next(colors)) for key in keys]

    cards = [
        charts.line_chart(title, one_key(key), "step", unit, log_y=log)
        for key, title, unit, log in OF_RUNS
    ]
    for prefix, title, unit in (
        ("lr/", "Learning rate per group", "learning rate"),
        ("eval/", "Evaluation during training", "value"),
    ):
        cards += [
            charts.line_chart(f"{title}: {label}", one_run(steps, prefix), "step", unit)
            for label, steps in runs
        ]
    figures = "".join(gallery.show(plot, "training") for plot in cards)
    return f'<h2>Training</h2><div class="grid2">{figures}</div>'


def run_names(folders: Sequence[str | Path]) -> list[str]:
    """Names of folders, with as many parents as it takes to tell them apart."""
    parts = [Path(folder).resolve().parts for folder in folders]
    names: list[str] = []
    for own in parts:
        length = 1
        while length < len(own) and any(p != own and p[-length:] == own[-length:] for p in parts):
            length += 1
        names.append("/".join(own[-length:]))
    return names


def _series(steps: list[dict[str, Any]], key: str, label: str, color: str) -> Series:
    rows = [s for s in steps if isinstance(s.get(key), (int, float))]
    return Series(label, [s["step"] for s in rows], [s[key] for s in rows], color)


def plotted(key: str) -> bool:
    """Whether a metric is drawn by :func:`training_curves`."""
    return key in {name for name, *_ in OF_RUNS} or key.startswith(("lr/", "eval/"))
