"""``report.html``: one file that explains a training run, without any external reference.

Curves are inline SVG drawn here; every text is escaped.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spatialvlm.training.state import write_json
from spatialvlm.training.trackers import read_metrics

COLOURS = (
    "#3366cc",
    "#dc3912",
    "#109618",
    "#ff9900",
    "#990099",
    "#0099c6",
    "#b82e2e",
    "#66aa00",
    "#6633cc",
    "#888888",
)
CHARTS: tuple[tuple[str, tuple[str, ...], bool], ...] = (
    ("Loss", ("loss", "eval/loss"), True),
    ("Held-out loss by source", ("eval/loss/",), True),
    ("Held-out samples with every token right", ("eval/answer_acc", "eval/answer_acc/"), False),
    ("Loss by source", ("loss/source/",), True),
    ("Loss by capability", ("loss/capability/",), True),
    ("Accuracy of supervised tokens", ("token_acc",), False),
    ("Learning rate by part", ("lr/",), False),
    ("Gradient norm by part", ("grad_norm/",), True),
    ("Tokens per second", ("tokens_per_s", "supervised_tokens_per_s"), False),
    ("Model FLOP utilisation", ("mfu", "mfu_gemm"), False),
    ("Waits and padding (share)", ("data_wait", "padding", "clipped"), False),
    ("Memory, GiB", ("memory/",), False),
    ("Realised mixture (share of samples)", ("share/samples/",), False),
)  # fmt: skip
"""Title, metrics (all that begin with a name that ends in a slash), logarithmic."""
MAX_POINTS = 400


def svg_lines(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    marks: Sequence[tuple[float, str]] = (),
    log_y: bool = False,
    width: int = 620,
    height: int = 240,
) -> str:
    """Line chart as SVG text.

    Args:
        series: Label -> (x, y) points; non-finite values are left out.
        marks: Vertical event lines (x, label).
        log_y: Logarithmic axis; values that are not above 0 are left out.
        width: Pixels.
        height: Pixels.
    """
    clean = {
        name: [
            (x, math.log10(y) if log_y else y)
            for x, y in points
            if math.isfinite(y) and (y > 0 or not log_y)
        ]
        for name, points in series.items()
        if points
    }
    points = [p for own in clean.values() for p in own]
    if not points:
        return ""
    left, bottom, top, right = 56, 24, 8, 8
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    y_low, y_high = min(y for _, y in points), max(y for _, y in points)
    y_high = y_high if y_high > y_low else y_low + 1.0
    x_high = x_high if x_high > x_low else x_low + 1.0

    def place(x: float, y: float) -> str:
        px = left + (x - x_low) / (x_high - x_low) * (width - left - right)
        py = height - bottom - (y - y_low) / (y_high - y_low) * (height - bottom - top)
        return f"{px:.1f},{py:.1f}"

    parts = [f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">']
    for y, label in log_ticks(y_low, y_high) if log_y else number_ticks(y_low, y_high):
        x0, py = place(x_low, y).split(",")
        parts.append(f'<line x1="{x0}" x2="{width - right}" y1="{py}" y2="{py}" stroke="#ddd"/>')
        parts.append(
            f'<text x="{left - 4}" y="{float(py) + 4:.1f}" text-anchor="end">{label}</text>'
        )
    for x, label in number_ticks(x_low, x_high):
        px = place(x, y_low).split(",")[0]
        parts.append(f'<text x="{px}" y="{height - 6}" text-anchor="middle">{label}</text>')
    for x, label in marks:
        if x_low <= x <= x_high:
            px = place(x, y_low).split(",")[0]
            parts.append(
                f'<line x1="{px}" x2="{px}" y1="{top}" y2="{height - bottom}" stroke="#c00" stroke-dasharray="3 3">'
                f"<title>{html.escape(label)}</title></line>"
            )
    for i, (_, own) in enumerate(clean.items()):
        if not own:
            continue
        colour = COLOURS[i % len(COLOURS)]
        path = " ".join(place(x, y) for x, y in _thin(own))
        if len(own) == 1:
            cx, cy = path.split(",")
            parts.append(f'<circle cx="{cx}" cy="{cy}" r="3" fill="{colour}"/>')
        parts.append(
            f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" points="{path}"/>'
        )
    parts.append("</svg>")
    legend = "".join(
        f'<span style="color:{COLOURS[i % len(COLOURS)]}">&#9632; {html.escape(name)}</span> '
        for i, name in enumerate(clean)
    )
    return "".join(parts) + f'<p class="legend">{legend}</p>'


def ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers (1, 2 or 5 times a power of ten apart) between ``low`` and ``high``."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def number_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """:func:`ticks` with their labels."""
    return [(value, _number(value)) for value in ticks(low, high)]


def log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Positions and labels between two decadic logarithms: 1, 2, 5 of every decade, or decades alone when there are many."""
    decades = range(math.floor(low), math.ceil(high) + 1)
    factors = (1, 2, 5) if high - low < 3 else (1,)
    values = [factor * 10.0**decade for decade in decades for factor in factors]
    inside = [(math.log10(v), _number(v)) for v in values if low <= math.log10(v) <= high]
    return (
        inside if len(inside) > 1 else [(at, _number(float(f"{10**at:.3g}"))) for at in (low, high)]
    )


def _number(value: float) -> str:
    """``12,000``, ``0.25``, ``5e-4``."""
    if value and abs(value) < 1e-3:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _thin(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    step = max(1, math.ceil(len(points) / MAX_POINTS))
    return [*points[:-1:step], points[-1]]


def _series(
    metrics: Sequence[Mapping[str, Any]], wanted: Sequence[str]
) -> dict[str, list[tuple[float, float]]]:
    names = sorted(
        {
            key
            for record in metrics
            for key in record
            if any(key == w or (w.endswith("/") and key.startswith(w)) for w in wanted)
        }
    )
    return {
        name: [(r["step"], r[name]) for r in metrics if isinstance(r.get(name), int | float)]
        for name in names
    }


def _events(run_dir: Path, metrics: Sequence[Mapping[str, Any]]) -> list[tuple[float, str]]:
    events: list[tuple[float, str]] = []
    attempt = metrics[0]["attempt"] if metrics else 0
    for record in metrics:
        if record["attempt"] != attempt:
            attempt = record["attempt"]
            events.append((record["step"], f"resumed (attempt {attempt})"))
    for name, label in (("nonfinite.jsonl", "step skipped"), ("spikes.jsonl", "spike")):
        path = run_dir / name
        if path.is_file():
            steps = sorted({json.loads(line)["step"] for line in path.read_text().splitlines()})
            events += [(step, f"{label} {step}") for step in steps[:200]]
    for path in sorted((run_dir / "checkpoints").glob("step-" + "[0-9]" * 8)):
        events.append((int(path.name[5:]), f"checkpoint {path.name}"))
    return events


def _table(values: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{html.escape(str(k))}</th><td>{html.escape(_short(v))}</td></tr>"
        for k, v in values.items()
    )
    return f"<table>{rows}</table>"


def _short(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_short(item)}" for name, item in value.items())
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list) else str(value)


def write_report(run_dir: Path, *, configured_shares: Mapping[str, float] | None = None) -> Path:
    """Build ``report.html`` from the files of a run folder.

    Args:
        run_dir: Run folder.
        configured_shares: Family -> share of samples that the recipe asks for.

    Returns:
        The written file.
    """
    metrics = read_metrics(run_dir / "metrics.jsonl", limit=MAX_POINTS)
    record = (
        json.loads((run_dir / "run.json").read_text()) if (run_dir / "run.json").is_file() else {}
    )
    shown = {
        k: v for k, v in record.items() if k not in ("owner", "summary", "fruitless", "started_at")
    }
    sections = [f"<h1>Training run {html.escape(run_dir.name)}</h1>", _table(shown)]
    if (run_dir / "summary.json").is_file():
        values = json.loads((run_dir / "summary.json").read_text())
        last = values.pop("final", {})
        sections += ["<h2>Summary</h2>", _table(values)]
        sections += ["<h2>Last log line</h2>", _table(last)] if last else []
    events = _events(run_dir, metrics)
    for title, wanted, log_y in CHARTS:
        chart = svg_lines(_series(metrics, wanted), marks=events, log_y=log_y)
        if chart:
            title = f"{title}, logarithmic" if log_y else title
            sections.append(f"<section><h2>{html.escape(title)}</h2>{chart}</section>")
    if configured_shares:
        sections += ["<h2>Configured mixture</h2>", _table(dict(configured_shares))]
    for title, name in (("Parameter groups", "groups.txt"), ("Plan", "plan.json"), ("Configuration", "config.resolved.yaml"), ("Environment", "environment.json")):  # fmt: skip
        path = run_dir / name
        if path.is_file():
            sections.append(
                f"<h2>{title}</h2><pre>{html.escape(path.read_text(encoding='utf-8'))}</pre>"
            )
    style = (
        "body{font:14px sans-serif;margin:2em auto;max-width:1320px;padding:0 1em;color:#222}section{display:inline-block;"
        "vertical-align:top;margin-right:16px}svg text{font:10px sans-serif;fill:#555}.legend{font-size:11px;max-width:620px}"
        "table{border-collapse:collapse}th{text-align:left;padding:1px 12px 1px 0;font-weight:600;vertical-align:top}"
        "pre{background:#f6f6f6;padding:8px;overflow-x:auto;font-size:12px}h2{font-size:16px}"
    )
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(run_dir.name)}</title><style>{style}</style></head><body>{''.join(sections)}</body></html>\n"
    )
    path = run_dir / "report.html"
    temporary = path.with_name("report.html.tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)
    return path


def write_summary(run_dir: Path, values: Mapping[str, Any]) -> None:
    """``summary.json``: what the run did, in one object."""
    write_json(run_dir / "summary.json", dict(values))
