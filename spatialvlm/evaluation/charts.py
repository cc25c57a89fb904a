"""Charts for the report: bars in HTML, curves and histograms in SVG. No script, no external reference."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5B4B8A", "#7A5C00")
"""Okabe-Ito colours, distinguishable with colour vision deficiencies."""
GREY = "#8A8F98"

WIDTH, HEIGHT = 420, 240
LEFT, RIGHT, TOP, BOTTOM = 62, 10, 10, 34


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar, in percent."""

    label: str
    value: float | None
    se: float | None = None
    color: str = GREY
    hollow: bool = False
    note: str = ""


@dataclass(frozen=True, slots=True)
class Series:
    """One curve."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: str


def number(value: float | None, digits: int = 1) -> str:
    """A number for a table; missing and NaN are a dash."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.{digits}f}"


def bar_rows(title: str, bars: Sequence[Bar], *, limit: float = 100.0) -> str:
    """One group of horizontal bars with 95 % intervals; scales to any width."""
    rows = []
    for bar in bars:
        if bar.value is None or not math.isfinite(bar.value):
            continue
        width = max(0.0, min(100.0, 100 * bar.value / limit))
        whisker = ""
        if bar.se:
            low = max(0.0, 100 * (bar.value - 1.96 * bar.se) / limit)
            high = min(100.0, 100 * (bar.value + 1.96 * bar.se) / limit)
            whisker = (
                f'<i class="ci" style="left:{low:.2f}%;width:{max(0.0, high - low):.2f}%"></i>'
            )
        style = (
            f"width:{width:.2f}%;box-sizing:border-box;border:2px solid {bar.color}"
            if bar.hollow
            else f"width:{width:.2f}%;background:{bar.color}"
        )
        error = f" ± {number(bar.se)}" if bar.se is not None else ""
        rows.append(
            f'<div class="bar"><span class="name">{html.escape(bar.label)}</span>'
            f'<span class="track"><b style="{style}"></b>{whisker}</span>'
            f'<span class="val">{number(bar.value)}{error}{html.escape(bar.note)}</span></div>'
        )
    return f'<section class="bars"><h4>{html.escape(title)}</h4>{"".join(rows)}</section>'


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round tick positions covering ``[low, high]``."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def short(value: float) -> str:
    """A tick label."""
    if value == 0:
        return "0"
    if abs(value) >= 10_000 or abs(value) < 0.001:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.4g}"


def _frame(
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    x_label: str,
    y_label: str,
    *,
    log_y: bool,
) -> list[str]:
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">']
    for value in ticks(*x_range):
        x = _scale(value, x_range, LEFT, WIDTH - RIGHT)
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" class="grid"/>'
            f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{short(value)}</text>'
        )
    for value in ticks(*y_range, 4):
        y = _scale(value, y_range, HEIGHT - BOTTOM, TOP)
        label = short(10**value) if log_y else short(value)
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>'
            f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{HEIGHT - 5}" text-anchor="middle">{html.escape(x_label)}</text>'
        f'<text x="12" y="{HEIGHT / 2}" text-anchor="middle" '
        f'transform="rotate(-90 12 {HEIGHT / 2})">{html.escape(y_label)}</text>'
    )
    return parts


def _scale(value: float, bounds: tuple[float, float], low: float, high: float) -> float:
    span = bounds[1] - bounds[0]
    return low + (high - low) * ((value - bounds[0]) / span if span else 0.5)


def _card(title: str, body: str, series: Sequence[tuple[str, str]]) -> str:
    legend = "".join(
        f'<span><i style="background:{color}"></i>{html.escape(label)}</span>'
        for label, color in series
    )
    return f'<figure><figcaption>{html.escape(title)}</figcaption>{body}<div class="legend">{legend}</div></figure>'


def line_chart(
    title: str, series: Sequence[Series], x_label: str, y_label: str, *, log_y: bool = False
) -> str:
    """Curves over a common axis; non-finite points (and values not above 0 on a log axis) are left out."""
    curves = []
    for one in series:
        points = [
            (x, math.log10(y) if log_y else y)
            for x, y in zip(one.x, one.y, strict=True)
            if math.isfinite(x) and math.isfinite(y) and (y > 0 or not log_y)
        ]
        if points:
            curves.append((one, points))
    if not curves:
        return ""
    xs = [x for _, points in curves for x, _ in points]
    ys = [y for _, points in curves for _, y in points]
    pad = 0.05 * (max(ys) - min(ys)) or (0.1 if log_y else 0.05 * abs(max(ys)) or 1.0)
    x_range, y_range = (min(xs), max(xs)), (min(ys) - pad, max(ys) + pad)
    parts = _frame(x_range, y_range, x_label, y_label, log_y=log_y)
    for one, points in curves:
        path = " ".join(
            f"{_scale(x, x_range, LEFT, WIDTH - RIGHT):.1f},{_scale(y, y_range, HEIGHT - BOTTOM, TOP):.1f}"
            for x, y in points
        )
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{one.color}" stroke-width="1.8"/>'
        )
        if len(points) <= 12:
            parts += [
                f'<circle cx="{_scale(x, x_range, LEFT, WIDTH - RIGHT):.1f}" '
                f'cy="{_scale(y, y_range, HEIGHT - BOTTOM, TOP):.1f}" r="3" fill="{one.color}"/>'
                for x, y in points
            ]
    parts.append("</svg>")
    return _card(title, "".join(parts), [(one.label, one.color) for one, _ in curves])


def histogram_chart(
    title: str,
    edges: Sequence[float],
    counts: Sequence[tuple[str, Sequence[int], str]],
    x_label: str,
) -> str:
    """Histograms of several runs over the same bins, side by side, as shares in percent.

    Args:
        title: Heading.
        edges: Bin edges; an infinite last edge is drawn as one more bin of equal width.
        counts: ``(label, counts, colour)`` per run.
        x_label: Axis label with unit.
    """
    num = len(edges) - 1
    shares = [
        (label, [100 * c / max(sum(values), 1) for c in values], color)
        for label, values, color in counts
    ]
    top = max((share for _, values, _ in shares for share in values), default=0.0) or 1.0
    last = edges[-1] if math.isfinite(edges[-1]) else 2 * edges[-2] - edges[-3]
    x_range = (edges[0], last)
    parts = _frame(x_range, (0.0, 1.05 * top), x_label, "share of answers in %", log_y=False)
    finite = [*edges[:-1], last]
    for run, (_, values, color) in enumerate(shares):
        for i in range(num):
            low = _scale(finite[i], x_range, LEFT, WIDTH - RIGHT)
            high = _scale(finite[i + 1], x_range, LEFT, WIDTH - RIGHT)
            width = (high - low) / len(shares)
            y = _scale(values[i], (0.0, 1.05 * top), HEIGHT - BOTTOM, TOP)
            parts.append(
                f'<rect x="{low + run * width:.1f}" y="{y:.1f}" width="{max(width - 0.6, 0.4):.1f}" '
                f'height="{HEIGHT - BOTTOM - y:.1f}" fill="{color}"/>'
            )
    parts.append("</svg>")
    return _card(title, "".join(parts), [(label, color) for label, _, color in counts])


def scatter_chart(
    title: str, points: Sequence[tuple[float, float]], x_label: str, y_label: str, color: str
) -> str:
    """Positive pairs on logarithmic axes with the diagonal."""
    logs = [(math.log10(x), math.log10(y)) for x, y in points if x > 0 and y > 0]
    if not logs:
        return ""
    values = [value for pair in logs for value in pair]
    bounds = (min(values) - 0.05, max(values) + 0.05)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">']
    decades = range(math.floor(bounds[0]), math.ceil(bounds[1]) + 1)
    marks = [
        m * 10.0**decade for decade in decades for m in ((1, 2, 5) if len(decades) < 4 else (1,))
    ]
    for mark in marks:
        if not bounds[0] <= math.log10(mark) <= bounds[1]:
            continue
        x = _scale(math.log10(mark), bounds, LEFT, WIDTH - RIGHT)
        y = _scale(math.log10(mark), bounds, HEIGHT - BOTTOM, TOP)
        label = short(mark)
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" class="grid"/>'
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>'
            f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{label}</text>'
            f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
        )
    parts.append(
        f'<line x1="{LEFT}" y1="{HEIGHT - BOTTOM}" x2="{WIDTH - RIGHT}" y2="{TOP}" class="axis"/>'
    )
    parts += [
        f'<circle cx="{_scale(x, bounds, LEFT, WIDTH - RIGHT):.1f}" '
        f'cy="{_scale(y, bounds, HEIGHT - BOTTOM, TOP):.1f}" r="2.5" fill="{color}" fill-opacity=".5"/>'
        for x, y in logs[:2000]
    ]
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{HEIGHT - 5}" text-anchor="middle">{html.escape(x_label)}</text>'
        f'<text x="12" y="{HEIGHT / 2}" text-anchor="middle" '
        f'transform="rotate(-90 12 {HEIGHT / 2})">{html.escape(y_label)}</text></svg>'
    )
    return _card(title, "".join(parts), [])
