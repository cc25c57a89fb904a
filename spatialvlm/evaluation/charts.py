"""Charts of the reports: each one goes onto a page as HTML and into a folder as PNG and CSV."""

import csv
import html
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spatialvlm.evaluation.drawing import GRID, INK, SOFT, Box, Dot, Drawing, Polyline, Words

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5B4B8A", "#7A5C00")
"""Okabe-Ito colours, distinguishable with colour vision deficiencies."""
GREY = "#8A8F98"

WIDTH, HEIGHT = 420, 240
LEFT, RIGHT, TOP, BOTTOM = 62, 16, 10, 34
LINE = 17
"""Height of a line of text or of a bar."""

Bounds = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Plot:
    """A finished chart.

    Attributes:
        title: Heading.
        html: For a page.
        drawing: For a picture; has its title and legend inside.
        columns: Of the CSV.
        rows: What is drawn, one line each.
    """

    title: str
    html: str
    drawing: Drawing
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]


class Gallery:
    """Charts of a page in order, to be written beside it."""

    def __init__(self) -> None:
        self.plots: list[tuple[str, Plot]] = []

    def show(self, plot: Plot | None, group: str = "") -> str:
        """HTML of a chart, which is kept; an empty string where there was nothing to draw."""
        if plot is None:
            return ""
        self.plots.append((group, plot))
        return plot.html

    def write(self, folder: Path) -> None:
        """``<number>_<group>_<title>.png`` and ``.csv`` of every chart; files of an earlier page are removed."""
        folder.mkdir(parents=True, exist_ok=True)
        for old in [*folder.glob("[0-9]*_*.png"), *folder.glob("[0-9]*_*.csv")]:
            old.unlink()
        for index, (group, plot) in enumerate(self.plots, start=1):
            words = re.sub(r"[^a-z0-9]+", "_", f"{group} {plot.title}".lower()).strip("_")
            stem = folder / f"{index:02d}_{words[:60]}"
            plot.drawing.png(stem.with_name(stem.name + ".png"))
            with stem.with_name(stem.name + ".csv").open("w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows([plot.columns, *plot.rows])


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
    """One curve, or, with ``error``, points with bars of one standard error."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: str
    error: Sequence[float] | None = None


def number(value: float | None, digits: int = 1) -> str:
    """A number for a table; missing and NaN are a dash."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.{digits}f}"


# ------------------------------------------------------------------------------------------------------- bars


def bar_rows(title: str, bars: Sequence[Bar], *, limit: float = 100.0) -> Plot:
    """One group of horizontal bars with 95 % intervals; scales to any width."""
    drawn = [bar for bar in bars if bar.value is not None and math.isfinite(bar.value)]
    body = "".join(_bar_html(bar, limit) for bar in drawn)
    return Plot(
        title,
        f'<section class="bars"><h4>{html.escape(title)}</h4>{body}</section>',
        _bar_drawing(title, drawn, limit),
        ("label", "value", "se"),
        [(bar.label, bar.value, bar.se) for bar in drawn],
    )


def _bar_span(bar: Bar, limit: float) -> tuple[float, float, float]:
    """Length and ends of the interval as shares of the track."""
    assert bar.value is not None
    half = 1.96 * (bar.se or 0.0)
    ends = [min(max(v / limit, 0.0), 1.0) for v in (bar.value, bar.value - half, bar.value + half)]
    return ends[0], ends[1], ends[2]


def _bar_value(bar: Bar) -> str:
    error = f" ± {number(bar.se)}" if bar.se is not None else ""
    return f"{number(bar.value)}{error}{bar.note}"


def _bar_html(bar: Bar, limit: float) -> str:
    length, low, high = _bar_span(bar, limit)
    interval = f"left:{100 * low:.2f}%;width:{100 * (high - low):.2f}%"
    whisker = f'<i class="ci" style="{interval}"></i>' if bar.se else ""
    paint = (
        f"box-sizing:border-box;border:2px solid {bar.color}"
        if bar.hollow
        else f"background:{bar.color}"
    )
    return (
        f'<div class="bar"><span class="name" title="{html.escape(bar.label)}">{html.escape(bar.label)}</span>'
        f'<span class="track"><b style="width:{100 * length:.2f}%;{paint}"></b>{whisker}</span>'
        f'<span class="val">{html.escape(_bar_value(bar))}</span></div>'
    )


def _bar_drawing(title: str, bars: Sequence[Bar], limit: float) -> Drawing:
    left, right = 150, 110
    drawing = Drawing(560, 36 + 22 * len(bars))
    drawing.shapes.append(Words(10, 20, title, "start", INK))
    room = drawing.width - left - right
    for index, bar in enumerate(bars):
        top = 32 + 22 * index
        length, low, high = _bar_span(bar, limit)
        drawing.shapes += [
            Words(left - 8, top + 12, bar.label[:24], "end"),
            Box(left, top, room, 15, "#eef0f3"),
            Box(left, top, length * room, 15, bar.color, bar.hollow),
            Words(left + room + 8, top + 12, _bar_value(bar), "start", INK),
        ]
        if bar.se:
            ends = [(left + low * room, top + 7.5), (left + high * room, top + 7.5)]
            drawing.shapes.append(Polyline(ends, INK, 1.5))
    return drawing


# ------------------------------------------------------------------------------------------------------- axes


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


def log_ticks(low: float, high: float) -> list[float]:
    """Decadic logarithms of round numbers in ``[low, high]``: 1, 2, 5 of every decade while these are few."""
    decades = range(math.floor(low), math.ceil(high) + 1)
    steps = (1, 2, 5) if len(decades) < 4 else (1,)
    marks = [math.log10(m * 10.0**decade) for decade in decades for m in steps]
    return [mark for mark in marks if low <= mark <= high]


def short(value: float) -> str:
    """A tick label."""
    if value == 0:
        return "0"
    if abs(value) >= 10_000 or abs(value) < 0.001:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.4g}"


class Axes:
    """A frame with ticks and labels; positions are in data units, decadic logarithms on a log axis."""

    def __init__(
        self,
        x: Bounds,
        y: Bounds,
        labels: tuple[str, str],
        *,
        log_x: bool = False,
        log_y: bool = False,
    ) -> None:
        self.x, self.y = x, y
        self.drawing = Drawing(WIDTH, HEIGHT)
        shapes = self.drawing.shapes
        for value in log_ticks(*x) if log_x else ticks(*x):
            at = self.at(value, y[0])[0]
            shapes += [
                Polyline([(at, TOP), (at, HEIGHT - BOTTOM)], GRID, 1),
                Words(at, HEIGHT - BOTTOM + 14, short(10**value if log_x else value)),
            ]
        marks = log_ticks(*y) if log_y else ticks(*y, 4)
        if log_y and len(marks) < 2:
            marks = ticks(*y, 4)
        for value in marks:
            at = self.at(x[0], value)[1]
            shapes += [
                Polyline([(LEFT, at), (WIDTH - RIGHT, at)], GRID, 1),
                Words(LEFT - 5, at + 4, short(10**value if log_y else value), "end"),
            ]
        shapes += [
            Words((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 5, labels[0]),
            Words(12, HEIGHT / 2, labels[1], vertical=True),
        ]

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Pixel of a point."""
        return (
            _scale(x, self.x, LEFT, WIDTH - RIGHT),
            _scale(y, self.y, HEIGHT - BOTTOM, TOP),
        )


def _scale(value: float, bounds: Bounds, low: float, high: float) -> float:
    span = bounds[1] - bounds[0]
    return low + (high - low) * ((value - bounds[0]) / span if span else 0.5)


def _plot(
    title: str,
    axes: Axes,
    legend: Sequence[tuple[str, str]],
    columns: tuple[str, ...],
    rows: list[tuple[Any, ...]],
) -> Plot:
    keys = "".join(
        f'<span><i style="background:{color}"></i>{html.escape(label)}</span>'
        for label, color in legend
    )
    page = (
        f"<figure><figcaption>{html.escape(title)}</figcaption>{axes.drawing.svg()}"
        f'<div class="legend">{keys}</div></figure>'
    )
    return Plot(title, page, _framed(title, axes.drawing, legend), columns, rows)


def _framed(title: str, inner: Drawing, legend: Sequence[tuple[str, str]]) -> Drawing:
    """The drawing with its title above and its legend below."""
    head = 26
    framed = Drawing(inner.width, inner.height + head + LINE * len(legend) + (6 if legend else 0))
    framed.shapes.append(Words(10, 18, title, "start", INK))
    framed.shapes += [_lowered(shape, head) for shape in inner.shapes]
    for index, (label, color) in enumerate(legend):
        y = inner.height + head + LINE * index
        framed.shapes += [Box(LEFT, y, 10, 10, color), Words(LEFT + 16, y + 9, label, "start")]
    return framed


def _lowered(shape: Polyline | Box | Dot | Words, by: float) -> Polyline | Box | Dot | Words:
    if isinstance(shape, Polyline):
        return replace(shape, points=[(x, y + by) for x, y in shape.points])
    return replace(shape, y=shape.y + by)


# ----------------------------------------------------------------------------------------------------- charts


def line_chart(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    log_x: bool = False,
    log_y: bool = False,
) -> Plot | None:
    """Curves over a common axis; non-finite points (and values not above 0 on a log axis) are left out."""

    def position(value: float, *, log: bool) -> float:
        return math.log10(value) if log else value

    curves = []
    for one in series:
        points = [
            (position(x, log=log_x), position(y, log=log_y), e)
            for x, y, e in zip(one.x, one.y, one.error or [0.0] * len(one.x), strict=True)
            if math.isfinite(x)
            and math.isfinite(y)
            and (x > 0 or not log_x)
            and (y > 0 or not log_y)
        ]
        if points:
            curves.append((one, points))
    if not curves:
        return None
    xs = [x for _, points in curves for x, _, _ in points]
    ys = [y + sign * e for _, points in curves for _, y, e in points for sign in (-1, 1)]
    pad = 0.05 * (max(ys) - min(ys)) or (0.1 if log_y else 0.05 * abs(max(ys)) or 1.0)
    side = 0.03 * (max(xs) - min(xs)) if any(one.error for one, _ in curves) else 0.0
    axes = Axes(
        (min(xs) - side, max(xs) + side),
        (min(ys) - pad, max(ys) + pad),
        (x_label, y_label),
        log_x=log_x,
        log_y=log_y,
    )
    shapes = axes.drawing.shapes
    for one, points in curves:
        if one.error is None and len(points) > 1:
            shapes.append(Polyline([axes.at(x, y) for x, y, _ in points], one.color))
        if one.error is not None or len(points) <= 12:
            shapes += [Dot(*axes.at(x, y), 3, one.color) for x, y, _ in points]
        shapes += [
            Polyline([axes.at(x, y - e), axes.at(x, y + e)], one.color, 1.5)
            for x, y, e in points
            if e
        ]
    rows = [
        (one.label, x, y, one.error[i] if one.error else "")
        for one, _ in curves
        for i, (x, y) in enumerate(zip(one.x, one.y, strict=True))
    ]
    legend = [(one.label, one.color) for one, _ in curves]
    return _plot(title, axes, legend, ("series", x_label, y_label, "se"), rows)


def histogram_chart(
    title: str,
    edges: Sequence[float],
    counts: Sequence[tuple[str, Sequence[int], str]],
    x_label: str,
) -> Plot:
    """Histograms of several runs over the same bins, side by side, as shares in percent.

    Args:
        title: Heading.
        edges: Bin edges; an infinite last edge is drawn as one more bin of equal width.
        counts: ``(label, counts, colour)`` per run.
        x_label: Axis label with unit.
    """
    shares = [
        (label, [100 * c / max(sum(values), 1) for c in values], color)
        for label, values, color in counts
    ]
    top = max((share for _, values, _ in shares for share in values), default=0.0) or 1.0
    last = edges[-1] if math.isfinite(edges[-1]) else 2 * edges[-2] - edges[-3]
    finite = [*edges[:-1], last]
    axes = Axes((edges[0], last), (0.0, 1.05 * top), (x_label, "share of answers in %"))
    for run, (_, values, color) in enumerate(shares):
        for i, share in enumerate(values):
            (low, y), (high, bottom) = axes.at(finite[i], share), axes.at(finite[i + 1], 0.0)
            width = (high - low) / len(shares)
            axes.drawing.shapes.append(
                Box(low + run * width, y, max(width - 0.6, 0.4), bottom - y, color)
            )
    rows = [
        (label, edges[i], edges[i + 1], count)
        for label, values, _ in counts
        for i, count in enumerate(values)
    ]
    legend = [(label, color) for label, _, color in counts]
    return _plot(title, axes, legend, ("run", "from", "to", "count"), rows)


def scatter_chart(
    title: str, points: Sequence[tuple[float, float]], x_label: str, y_label: str, color: str
) -> Plot | None:
    """Positive pairs on logarithmic axes with the diagonal."""
    logs = [(math.log10(x), math.log10(y)) for x, y in points if x > 0 and y > 0]
    if not logs:
        return None
    values = [value for pair in logs for value in pair]
    bounds = (min(values) - 0.05, max(values) + 0.05)
    axes = Axes(bounds, bounds, (x_label, y_label), log_x=True, log_y=True)
    diagonal = [axes.at(bounds[0], bounds[0]), axes.at(bounds[1], bounds[1])]
    axes.drawing.shapes.append(Polyline(diagonal, SOFT, 1))
    axes.drawing.shapes += [Dot(*axes.at(x, y), 2.5, color, 0.5) for x, y in logs[:2000]]
    return _plot(title, axes, [], (x_label, y_label), list(points))


def heat_map(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
) -> Plot:
    """Cells coloured from the worst to the best of their row.

    Args:
        title: Heading.
        rows: Labels, e.g. benchmarks.
        columns: Labels, e.g. runs.
        values: One row per label; ``None`` stays empty.
    """
    left, cell, high = 130, 62, 26
    drawing = Drawing(left + cell * len(columns) + 10, 30 + high * len(rows))
    head = "".join(f"<th>{html.escape(label)}</th>" for label in columns)
    body = ""
    for j, label in enumerate(columns):
        drawing.shapes.append(Words(left + cell * (j + 0.5), 20, label[:10]))
    for i, (label, line) in enumerate(zip(rows, values, strict=True)):
        known = [value for value in line if value is not None]
        body += f"<tr><td>{html.escape(label)}</td>"
        drawing.shapes.append(Words(left - 8, 30 + high * (i + 0.65), label[:20], "end"))
        for j, value in enumerate(line):
            if value is None:
                body += "<td>–</td>"
                continue
            share = (value - min(known)) / (max(known) - min(known)) if len(set(known)) > 1 else 0.5
            color = _blue(0.08 + 0.5 * share)
            body += f'<td style="background:{color}">{number(value)}</td>'
            drawing.shapes += [
                Box(left + cell * j, 30 + high * i, cell - 1, high - 1, color),
                Words(left + cell * (j + 0.5), 30 + high * (i + 0.65), number(value), color=INK),
            ]
        body += "</tr>"
    page = f'<div class="scroll"><table><tr><th></th>{head}</tr>{body}</table></div>'
    table = [(label, *line) for label, line in zip(rows, values, strict=True)]
    return Plot(title, page, drawing, ("", *columns), table)


def _blue(share: float) -> str:
    """White to the palette's blue."""
    blue = (0x00, 0x72, 0xB2)
    return "#" + "".join(f"{round(255 + share * (c - 255)):02x}" for c in blue)
