"""One static page about a data configuration: what the model will really see. No external reference, all text escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from spatialvlm.data.collate import MediaPixels
from spatialvlm.data.prefix import segments
from spatialvlm.data.sample import EncodedSample, PackPlan, Sample
from spatialvlm.data.summary import histogram
from spatialvlm.data.template import ChatTemplate
from spatialvlm.typing import IGNORE_INDEX, KIND_TEXT

if TYPE_CHECKING:
    from spatialvlm.typing import UInt8Array

KINDS = ("text", "image", "video", "spatial", "camera")
LEGEND = (
    ("text, not supervised", "#e9ecf1"), ("supervised", "#b9e6c6"), ("image tokens", "#bcd7f7"),
    ("video tokens", "#cfc5f5"), ("spatial tokens", "#ffd9a8"), ("camera tokens", "#f7b9c4"),
    ("end of the shareable prefix", "#b3261e"),
)  # fmt: skip
MAX_FRAMES_SHOWN = 16
_COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2", "#eeca3b", "#9d755d")


class Page:
    """Collects sections; embeds images until the page is full.

    Args:
        title: Heading.
        subtitle: One line below it.
        max_bytes: Images beyond this are left out, and said to be.
    """

    def __init__(self, title: str, subtitle: str, max_bytes: int = 18 << 20) -> None:
        self.max_bytes = max_bytes
        self._bytes = 0
        self._parts = [f"<h1>{escape(title)}</h1><p class=note>{escape(subtitle)}</p>"]

    def add(self, markup: str) -> None:
        """Append markup that is already escaped."""
        self._bytes += len(markup)
        self._parts.append(markup)

    def image(self, pixels: UInt8Array) -> str:
        """An ``img`` of RGB uint8 ``[H, W, 3]``."""
        if self._bytes > self.max_bytes:
            return "<em>left out, the page is full</em>"
        buffer = io.BytesIO()
        picture = Image.fromarray(pixels)
        picture.thumbnail((448, 448))
        picture.save(buffer, "JPEG", quality=85)
        data = base64.b64encode(buffer.getvalue()).decode()
        self._bytes += len(data)
        height, width = pixels.shape[:2]
        return f'<img alt="{height} x {width}" src="data:image/jpeg;base64,{data}">'

    def html(self) -> str:
        """The whole page."""
        style = files("spatialvlm.data").joinpath("page.css").read_text(encoding="utf-8")
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>Data</title><style>{style}</style></head><body><main>{''.join(self._parts)}</main></body></html>\n"
        )


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table; columns of numbers are aligned to the right, long texts break."""
    number = [
        all(isinstance(row[at], int) or str(row[at]).endswith(" %") for row in rows)
        for at in range(len(head))
    ]
    longest = [max((len(str(row[at])) for row in rows), default=0) for at in range(len(head))]
    kinds = [
        " class=num" if n else " class=wide" if s > 40 else ""
        for n, s in zip(number, longest, strict=True)
    ]

    def line(tag: str, cells: Sequence[Any]) -> str:
        parts = [
            f"<{tag}{kind}>{escape(f'{cell:,}' if isinstance(cell, int) else str(cell))}</{tag}>"
            for kind, cell in zip(kinds, cells, strict=True)
        ]
        return f"<tr>{''.join(parts)}</tr>"

    body = "".join(line("td", row) for row in rows)
    return f"<div class=scroll><table>{line('th', head)}{body}</table></div>"


def legend() -> str:
    """Meaning of the token colours."""
    items = "".join(
        f'<span><i style="background:{colour}"></i>{escape(name)}</span>' for name, colour in LEGEND
    )
    return f"<div class=legend>{items}</div>"


def histogram_figure(title: str, values: Any) -> str:
    """Histogram of integer sizes."""
    bins = histogram(values)
    if not bins:
        return ""
    top = max(count for _, _, count in bins)
    width, height, step = 300, 110, 300 / len(bins)
    bars = "".join(
        f'<rect x="{i * step + 0.5:.1f}" y="{90 - 84 * count / top:.1f}" width="{max(step - 1, 0.5):.1f}" '
        f'height="{84 * count / top:.1f}" fill="#4c78a8"><title>{low} to {high - 1}: {count} rows</title></rect>'
        for i, (low, high, count) in enumerate(bins)
    )
    axis = (
        f'<text x="0" y="106">{bins[0][0]:,}</text>'
        f'<text x="{width}" y="106" text-anchor="end">{bins[-1][1] - 1:,}</text>'
        f'<text x="{width / 2}" y="106" text-anchor="middle">median {int(np.median(values)):,}</text>'
    )
    return (
        f"<figure><figcaption>{escape(title)} <span>highest bar {top:,}</span></figcaption>"
        f'<svg viewBox="0 0 {width} {height}" role="img">{bars}{axis}</svg></figure>'
    )


def shares_figure(shares: Mapping[str, Mapping[str, int]]) -> str:
    """Stacked bars of sources: by samples, LLM tokens, label tokens, patches."""
    names = sorted(
        {key for counts in shares.values() for key in counts if key.startswith("source/")}
    )
    colour = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
    rows = []
    for line, (unit, counts) in enumerate(shares.items()):
        total = sum(counts.get(name, 0) for name in names)
        if not total:
            continue
        x, y = 110.0, 8 + 30 * line
        rows.append(f'<text x="0" y="{y + 14}">{escape(unit.replace("_", " "))}</text>')
        for name in names:
            part = 480 * counts.get(name, 0) / total
            share = f"{100 * counts.get(name, 0) / total:.1f} %"
            rows.append(
                f'<rect x="{x:.1f}" y="{y}" width="{part:.1f}" height="20" fill="{colour[name]}">'
                f"<title>{escape(name)}: {share}</title></rect>"
            )
            if part > 46:
                rows.append(
                    f'<text x="{x + part / 2:.1f}" y="{y + 14}" text-anchor="middle" style="fill:#fff">{share}</text>'
                )
            x += part
    key = "".join(
        f'<span><i style="background:{colour[name]}"></i>{escape(name.removeprefix("source/"))}</span>'
        for name in names
    )
    height = 16 + 30 * len(shares)
    return f'<figure class=shares><svg viewBox="0 0 600 {height}" role="img">{"".join(rows)}</svg><div class=legend>{key}</div></figure>'


def shares_table(shares: Mapping[str, Mapping[str, int]]) -> str:
    """Shares of families and capabilities, in the units of :func:`shares_figure`."""
    keys = sorted(
        {key for counts in shares.values() for key in counts if not key.startswith("source/")}
    )
    rows = []
    for key in sorted(keys, key=lambda key: (not key.startswith("family/"), key)):
        parts = []
        for counts in shares.values():
            total = sum(count for name, count in counts.items() if name.startswith("family/"))
            parts.append(f"{100 * counts.get(key, 0) / max(total, 1):.1f} %")
        rows.append([key.replace("/", " "), *parts])
    return table(["share of", *[unit.replace("_", " ") for unit in shares]], rows)


def sample_card(
    page: Page,
    sample: Sample,
    encoded: EncodedSample,
    pixels: Sequence[MediaPixels],
    template: ChatTemplate,
    where: str,
) -> str:
    """Media, tokens, and supervised text of one sample."""
    facts = (
        f"{len(encoded.input_ids)} tokens, {encoded.num_label_tokens} supervised, {encoded.num_visual_tokens} visual, "
        f"{encoded.num_spatial_tokens} spatial, {encoded.num_patches} patches, shareable prefix {encoded.prefix_len}"
    )
    about = [sample.capability, f"{len(sample.marks)} marks" if sample.marks else None]
    facts = ", ".join([*filter(None, about), facts])
    answers = "".join(
        f"<div class=answer><b>trained on</b> {escape(repr(text))}</div>"
        for text in supervised_texts(encoded, template)
    )
    return (
        f"<div class='card sample'><div class=head><b>{escape(sample.uid)}</b><span>{escape(where)}</span></div>"
        f"<div class=note>{escape(facts)}</div>{_frames(page, encoded, pixels)}"
        f"<div class=tokens>{token_spans(encoded, template)}</div>{answers}</div>"
    )


def supervised_texts(encoded: EncodedSample, template: ChatTemplate) -> list[str]:
    """Decoded text of every supervised run."""
    mask = np.concatenate([[0], (encoded.labels != IGNORE_INDEX).astype(int), [0]])
    edges = np.flatnonzero(np.diff(mask))
    return [
        template.decode(encoded.input_ids[start:stop])
        for start, stop in zip(edges[::2], edges[1::2], strict=True)
    ]


def token_spans(encoded: EncodedSample, template: ChatTemplate) -> str:
    """Tokens as coloured spans; runs of media tokens become one span with their number."""
    out = []
    kind, labels, positions = encoded.token_kind, encoded.labels, encoded.position_ids
    at, total = 0, len(encoded.input_ids)
    while at < total:
        mark = " cut" if at == encoded.prefix_len > 0 else ""
        stop = at + 1
        if kind[at] != KIND_TEXT:
            while stop < total and kind[stop] == kind[at]:
                stop += 1
            text = f"⟨{KINDS[kind[at]]} × {stop - at}⟩"
            out.append(
                f'<span class="k{kind[at]}{mark}" title="{_where(at, positions)}">{text}</span>'
            )
        else:
            name = "y" if labels[at] != IGNORE_INDEX else "t"
            text = template.decode([int(encoded.input_ids[at])]).replace("\n", "↵\n")
            tip = f"{_where(at, positions)}, id {int(encoded.input_ids[at])}"
            out.append(f'<span class="{name}{mark}" title="{tip}">{escape(text)}</span>')
        at = stop
    return "".join(out)


def pack_bar(pack: PackPlan, encoded: Sequence[EncodedSample], names: Sequence[str]) -> str:
    """Segments of a pack: prefixes in full colour, their branches in lighter shades."""
    if not pack.draws:
        return "<div class=note>dummy pack of one token</div>"
    parts = segments(pack.groups, encoded)
    total = sum(part.length for part in parts)
    colour: dict[int, str] = {}
    bars = []
    for number, part in enumerate(parts):
        if part.parent < 0:
            colour[number] = _COLOURS[len(colour) % len(_COLOURS)]
        base = colour[part.parent if part.parent >= 0 else number]
        opacity = 0.45 if part.parent >= 0 else 1.0
        role = f"branch of segment {part.parent}" if part.parent >= 0 else "root"
        tip = f"segment {number}: {part.length} tokens, {role}, {names[part.sample]}"
        bars.append(
            f'<span title="{escape(tip)}" style="width:{100 * part.length / total:.3f}%;background:{base};'
            f'opacity:{opacity}"></span>'
        )
    groups = sum(len(group) > 1 for group in pack.groups)
    prefixes = "1 shared prefix" if groups == 1 else f"{groups} shared prefixes"
    facts = f"{len(pack.draws)} samples, {prefixes}, {total:,} tokens, {len(parts)} segments, {pack.cost:.3g} FLOPs"
    return (
        f"<div class=pack><div class=bar>{''.join(bars)}</div><div class=note>{facts}</div></div>"
    )


def _where(at: int, positions: np.ndarray) -> str:
    rows = positions[1:, at] if len(positions) == 4 else positions[:, at]
    return f"token {at}, position {' '.join(str(int(v)) for v in rows)}"


def _frames(page: Page, encoded: EncodedSample, pixels: Sequence[MediaPixels]) -> str:
    out = []
    for number, medium in enumerate(pixels):
        times, indices = encoded.frame_times_s[number], encoded.frames[number]
        count = len(medium.frames)
        shown = np.unique(np.linspace(0, count - 1, min(count, MAX_FRAMES_SHOWN), dtype=int))
        for i in shown.tolist():
            label = f"image {number + 1}" if count == 1 else f"part {i + 1} of {count}"
            if times:
                label = f"frame {indices[i]}, {times[i]:.2f} s"
            height, width = medium.frames.shape[1:3]
            label = f"{label}, {height}×{width}"
            if medium.geometry is not None and i == shown[0]:
                size = "×".join(str(n) for n in medium.geometry.shape[1:3])
                label += f"<br>geometry group {medium.group} at {size}"
            out.append(f"<div>{page.image(medium.frames[i])}{label}</div>")
        if len(shown) < count:
            out.append(f"<div>{count - len(shown)} further frames not shown</div>")
    return f"<div class=frames>{''.join(out)}</div>" if out else ""
