"""Lines, boxes, dots and words, drawn as SVG for a page or as PNG for a slide; no plotting library."""

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Point = tuple[float, float]
Anchor = Literal["start", "middle", "end"]
INK, SOFT, GRID = "#1d2430", "#5b6472", "#e3e6ea"
_ASCII = str.maketrans({
    "–": "-", "−": "-", "½": "1/2", "²": "2", "α": "alpha", "×": "x", "→": "->", "θ": "theta", "Σ": "sum",
})  # fmt: skip
"""Characters that Pillow's built-in font lacks."""


@dataclass(frozen=True, slots=True)
class Polyline:
    """Connected straight lines."""

    points: Sequence[Point]
    color: str
    width: float = 1.8


@dataclass(frozen=True, slots=True)
class Box:
    """A filled or, with ``hollow``, an outlined rectangle."""

    x: float
    y: float
    width: float
    height: float
    color: str
    hollow: bool = False


@dataclass(frozen=True, slots=True)
class Dot:
    """A filled circle."""

    x: float
    y: float
    radius: float
    color: str
    opacity: float = 1.0


@dataclass(frozen=True, slots=True)
class Words:
    """One line of text; ``y`` is its baseline."""

    x: float
    y: float
    text: str
    anchor: Anchor = "middle"
    color: str = SOFT
    vertical: bool = False


@dataclass
class Drawing:
    """Shapes on a white page, in pixels; the first shape is the lowest."""

    width: int
    height: int
    shapes: list[Polyline | Box | Dot | Words] = field(default_factory=list)

    def svg(self) -> str:
        """One ``<svg>`` element that scales to its container."""
        body = "".join(map(_svg, self.shapes))
        return f'<svg viewBox="0 0 {self.width} {self.height}" role="img">{body}</svg>'

    def png(self, path: Path, *, scale: int = 2) -> None:
        """Write a PNG of ``scale`` times the size, drawn twice as large and reduced for smooth edges."""
        from PIL import Image, ImageDraw, ImageFont

        k = 2 * scale
        image = Image.new("RGB", (k * self.width, k * self.height), "white")
        pen = ImageDraw.Draw(image, "RGBA")
        font = ImageFont.load_default(size=11.5 * k)
        for shape in self.shapes:
            if isinstance(shape, Polyline):
                points = [(k * x, k * y) for x, y in shape.points]
                pen.line(points, fill=shape.color, width=round(k * shape.width), joint="curve")
            elif isinstance(shape, Box):
                corners = [k * shape.x, k * shape.y]
                corners += [k * (shape.x + shape.width), k * (shape.y + shape.height)]
                if shape.hollow:
                    pen.rectangle(corners, outline=shape.color, width=2 * k)
                else:
                    pen.rectangle(corners, fill=shape.color)
            elif isinstance(shape, Dot):
                r = shape.radius
                inside = [
                    k * (shape.x - r),
                    k * (shape.y - r),
                    k * (shape.x + r),
                    k * (shape.y + r),
                ]
                alpha = round(255 * shape.opacity)
                pen.ellipse(inside, fill=f"{shape.color}{alpha:02x}")
            else:
                text = shape.text.translate(_ASCII)
                anchor = {"start": "ls", "middle": "ms", "end": "rs"}[shape.anchor]
                if not shape.vertical:
                    pen.text((k * shape.x, k * shape.y), text, shape.color, font, anchor)
                    continue
                left, top, right, bottom = (round(v) for v in font.getbbox(text))
                label = Image.new("RGB", (right - left, bottom - top), "white")
                ImageDraw.Draw(label).text((-left, -top), text, shape.color, font)
                label = label.rotate(90, expand=True)
                at = round(k * shape.x - 0.7 * label.width), round(k * shape.y - label.height / 2)
                image.paste(label, at)
        image.resize((scale * self.width, scale * self.height), Image.Resampling.LANCZOS).save(path)


def _svg(shape: Polyline | Box | Dot | Words) -> str:
    if isinstance(shape, Polyline):
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in shape.points)
        return f'<polyline points="{points}" fill="none" stroke="{shape.color}" stroke-width="{shape.width:g}"/>'
    if isinstance(shape, Box):
        paint = (
            f'fill="none" stroke="{shape.color}" stroke-width="2"'
            if shape.hollow
            else f'fill="{shape.color}"'
        )
        return (
            f'<rect x="{shape.x:.1f}" y="{shape.y:.1f}" width="{shape.width:.1f}" '
            f'height="{shape.height:.1f}" {paint}/>'
        )
    if isinstance(shape, Dot):
        return (
            f'<circle cx="{shape.x:.1f}" cy="{shape.y:.1f}" r="{shape.radius:g}" fill="{shape.color}" '
            f'fill-opacity="{shape.opacity:g}"/>'
        )
    turned = f' transform="rotate(-90 {shape.x:g} {shape.y:g})"' if shape.vertical else ""
    return (
        f'<text x="{shape.x:.1f}" y="{shape.y:.1f}" text-anchor="{shape.anchor}"{turned}>'
        f"{html.escape(shape.text)}</text>"
    )
