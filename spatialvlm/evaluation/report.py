"""One static HTML page for a run or a comparison of runs, and a table for the terminal.

Everything is inlined: style, charts, pictures. All text that comes from files or models is escaped.
"""

import html
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from spatialvlm.evaluation.charts import Gallery, number
from spatialvlm.evaluation.report_plots import diagnostics, plotted, run_names, training_curves
from spatialvlm.evaluation.report_samples import pick_samples, reload_benchmark, sample_cards
from spatialvlm.evaluation.report_tables import (
    COMPOSITE,
    Baseline,
    composite_table,
    difference_table,
    headline_cards,
    overall_bars,
    read_baselines,
    run_cards,
    task_bars,
    task_table,
    text_table,
    write_task_csv,
)
from spatialvlm.evaluation.runs import BenchRun, read_runs

MAX_BYTES = 25_000_000
SIDES = (384, 192, 96)
esc = html.escape

__all__ = [
    "COMPOSITE",
    "build_page",
    "composite_table",
    "curves_page",
    "pick_samples",
    "plotted",
    "read_baselines",
    "run_names",
    "text_table",
    "write_report",
]


def build_page(
    benchmarks: dict[str, list[BenchRun]],
    *,
    training: Sequence[str | Path] = (),
    baselines: Sequence[Baseline] = (),
    samples: int = 3,
    title: str = "",
    side: int = 384,
) -> tuple[str, Gallery]:
    """The whole page as a string, and its charts."""
    gallery = Gallery()
    body = [composite_table(benchmarks)]
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
                f"<h2>Beside published numbers</h2>{overall_bars(runs, known, gallery, partial=partial)}"
            )
        body.append(f"<h2>Tasks</h2>{task_bars(runs, [] if partial else known, gallery)}")
        if name == next(iter(benchmarks)):
            body.append(training_curves(training, gallery))
        if benchmark and samples:
            body.append("<h2>Sample answers, failures first</h2>")
            body.append(sample_cards(runs, benchmark, samples, side))
        elif samples:
            body.append(
                '<p class="note">No samples: the benchmark file named in the manifest is not here.</p>'
            )
        body.append(f"<h2>Diagnostics</h2>{diagnostics(runs, benchmark, gallery)}")
    first = next(iter(benchmarks))
    heading = title or (f"Evaluation: {', '.join(benchmarks)}")
    labels = ", ".join(run.label for run in benchmarks[first])
    return _page(heading, labels, "".join(body)), gallery


def _page(heading: str, subtitle: str, body: str) -> str:
    """HTML document with the style inlined."""
    style = files("spatialvlm.evaluation").joinpath("report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{esc(heading)}</title><style>{style}</style></head><body><main>"
        f'<h1>{esc(heading)}</h1><p class="sub">{esc(subtitle)}</p>{body}</main></body></html>\n'
    )


def curves_page(folders: Sequence[str | Path]) -> tuple[str, Gallery]:
    """A page with the training curves of runs and nothing else, and its charts."""
    gallery = Gallery()
    return _page(
        "Training runs", ", ".join(run_names(folders)), training_curves(folders, gallery)
    ), gallery


def write_report(
    folders: Sequence[str | Path],
    out: str | Path,
    *,
    training: Sequence[str | Path] = (),
    extra_baselines: Sequence[str | Path] = (),
    samples: int = 3,
    title: str = "",
) -> dict[str, list[BenchRun]]:
    """Write the page, and beside it a CSV of its task table and ``<name>_plots`` with every chart as PNG and CSV.

    Pictures are made smaller, and said so, until the page is at most 25 MB.

    Raises:
        DataError: A folder has no result.
    """
    benchmarks = read_runs(folders)
    baselines = read_baselines(extra_baselines)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    page, gallery, side = "", Gallery(), SIDES[0]
    for side in SIDES:
        page, gallery = build_page(
            benchmarks,
            training=training,
            baselines=baselines,
            samples=samples,
            title=title,
            side=side,
        )
        if len(page.encode()) <= MAX_BYTES:
            break
    if side != SIDES[0]:
        note = f"Pictures were reduced to {side} pixels to keep the page small."
        page = page.replace("<main>", f'<main><p class="note">{note}</p>', 1)
    out.write_text(page, encoding="utf-8")
    write_task_csv(benchmarks, out.with_suffix(".csv"))
    gallery.write(out.with_name(f"{out.stem}_plots"))
    return benchmarks
