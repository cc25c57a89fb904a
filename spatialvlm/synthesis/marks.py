"""Marks that rows describe and loaders draw: coloured boxes, masks, points and numbered ids.

Rows hold specifications (:class:`~spatialvlm.typing.MarkSpec` as dictionaries), never pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from spatialvlm.errors import MarkError
from spatialvlm.scenes.visibility import decode_rle
from spatialvlm.synthesis.context import SceneContext
from spatialvlm.synthesis.rows import Draws, Reason, Reject
from spatialvlm.typing import MarkSpec

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (230, 25, 35),
    "blue": (20, 70, 235),
    "green": (20, 170, 50),
    "yellow": (255, 225, 25),
    "orange": (250, 130, 20),
    "purple": (150, 40, 190),
    "cyan": (40, 220, 230),
    "white": (255, 255, 255),
}
"""Colours a mark can have; pairwise at least 25 apart in CIE Lab."""
MAX_MARKS_PER_IMAGE = 6
SPAR_PX = 20
"""Point radius and box stroke (grown outwards) of SPAR's marks, in pixels of the stored image."""
_SIMILAR = {
    "red": {"brown", "pink", "maroon"},
    "orange": {"brown"},
    "white": {"grey", "gray", "beige"},
    "purple": {"pink"},
    "cyan": {"teal", "turquoise"},
    "blue": {"navy"},
    "yellow": {"beige"},
}
"""Names of object colours in which a mark of the key would be hard to see."""


def mark_colour(draws: Draws, taken: Iterable[str], object_colour: str | None) -> str:
    """Choose a mark colour that is free in the row and stands out from the object.

    Raises:
        Reject: ``mark``: six marks are drawn already or no colour is left.
    """
    used = set(taken)
    free = [
        name
        for name in PALETTE
        if name not in used
        and object_colour != name
        and object_colour not in _SIMILAR.get(name, ())
    ]
    if not free or len(used) >= MAX_MARKS_PER_IMAGE:
        raise Reject(Reason.MARK, "no mark colour left")
    colour: str = draws.choice(free)
    return colour


def mark_record(
    ctx: SceneContext, frame: int, image: int, obj: int, colour: str, kind: str
) -> dict[str, Any]:
    """Describe a mark on an object.

    Args:
        ctx: The scene.
        frame: Frame index.
        image: Position of the frame in the row.
        obj: Object index.
        colour: Key of :data:`PALETTE`.
        kind: ``box`` or ``point`` (at the centroid of the visible pixels).
    """
    vis = ctx.view(frame).vis[obj]
    record: dict[str, Any] = {
        "image": image,
        "kind": kind,
        "color": colour,
        "name": f"the {colour} {kind}",
        "obj": obj,
        "units": "px",
    }
    if kind == "box":
        record["bbox"] = [round(value, 1) for value in vis.bbox2d]
    else:
        record["xy"] = [round(value, 1) for value in ctx.view(frame).centroid[obj]]
    return record


def mark_from_dict(record: Mapping[str, Any]) -> MarkSpec:
    """Read a mark from a row.

    Raises:
        MarkError: Unknown colour, kind, or a missing position.
    """
    try:
        values = dict(record)
        for key in ("xy", "bbox"):
            if values.get(key) is not None:
                values[key] = tuple(float(value) for value in values[key])
        mark = MarkSpec(**values)
    except (TypeError, ValueError) as error:
        raise MarkError(f"mark {dict(record)}: {error}", reason="mark") from error
    position = {"box": mark.bbox, "point": mark.xy, "id": mark.bbox or mark.xy, "mask": mark.rle}
    if mark.color not in PALETTE:
        raise MarkError(
            f"mark colour {mark.color!r} is not one of {', '.join(PALETTE)}", reason="mark"
        )
    if position.get(mark.kind) is None:
        raise MarkError(f"mark {mark.name!r} of kind {mark.kind!r} has no position", reason="mark")
    return mark


def draw_marks(
    image: Image.Image, marks: Sequence[MarkSpec], *, stored_size: tuple[int, int] | None = None
) -> Image.Image:
    """Draw marks into a copy of ``image``.

    Args:
        image: RGB image at the size the model sees.
        marks: Marks of this image.
        stored_size: ``(width, height)`` of the stored image that pixel coordinates refer to;
            ``None`` means the size of ``image``.

    Raises:
        MarkError: A mark lies outside the image.
    """
    canvas = image.convert("RGB")
    width, height = canvas.size
    base_w, base_h = stored_size or canvas.size
    for mark in marks:
        scale = (width / base_w, height / base_h)
        if mark.units == "norm1000":
            scale = (width / 1000, height / 1000)
        line, radius = max(2, min(width, height) // 160), max(2.0, height / 80)
        grown = 0
        if mark.style == "spar":
            line = grown = max(1, round(SPAR_PX * width / base_w))
            radius = max(2.0, SPAR_PX * width / base_w)
        colour = PALETTE[mark.color]
        if mark.kind == "mask":
            canvas = _draw_mask(canvas, mark, colour)
            continue
        pen = ImageDraw.Draw(canvas)
        if mark.bbox is not None:
            x0, y0, x1, y1 = (v * scale[i % 2] for i, v in enumerate(mark.bbox))
        elif mark.xy is not None:
            x0 = x1 = mark.xy[0] * scale[0]
            y0 = y1 = mark.xy[1] * scale[1]
        else:
            raise MarkError(f"mark {mark.name!r} has no position", reason="mark")
        if (
            x1 < 0
            or y1 < 0
            or x0 >= width
            or y0 >= height
            or (mark.bbox and (x1 <= x0 or y1 <= y0))
        ):
            raise MarkError(
                f"mark {mark.name!r} at {[round(v, 1) for v in (x0, y0, x1, y1)]} lies outside the "
                f"{width}x{height} image",
                reason="mark",
            )
        if mark.kind == "box":
            outer = (x0 - grown, y0 - grown, x1 - 1 + grown, y1 - 1 + grown)
            pen.rectangle(outer, outline=colour, width=line)
        elif mark.kind == "point":
            ring = (x0 - radius, y0 - radius, x0 + radius, y0 + radius)
            pen.ellipse(ring, fill=colour, outline=_contrast(colour))
        text = mark.label or (mark.name if mark.kind == "id" else "")
        if text:
            _draw_label(pen, (x0, y0), text, colour, height)
    return canvas


def _contrast(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    """Black on light colours, white on dark ones."""
    luminance = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    return (0, 0, 0) if luminance > 140 else (255, 255, 255)


def _draw_label(
    pen: ImageDraw.ImageDraw,
    corner: tuple[float, float],
    text: str,
    colour: tuple[int, int, int],
    height: int,
) -> None:
    font = ImageFont.load_default(size=max(9, height // 28))
    left, top, right, bottom = pen.textbbox(corner, text, font=font)
    pen.rectangle((left - 2, top - 1, right + 2, bottom + 1), fill=colour)
    pen.text(corner, text, fill=_contrast(colour), font=font)


def _draw_mask(image: Image.Image, mark: MarkSpec, colour: tuple[int, int, int]) -> Image.Image:
    """Tint the mask and trace its outline."""
    mask = rle_to_mask(mark.rle)
    if not mask.any():
        raise MarkError(f"mask {mark.name!r} is empty", reason="mark")
    if mask.shape != (image.height, image.width):
        resized = Image.fromarray(mask).resize(image.size, Image.Resampling.NEAREST)
        mask = np.asarray(resized, dtype=bool)
    pixels = np.asarray(image).astype(np.float32)
    pixels[mask] = 0.7 * pixels[mask] + 0.3 * np.array(colour)
    inner = mask.copy()
    inner[1:] &= mask[:-1]
    inner[:-1] &= mask[1:]
    inner[:, 1:] &= mask[:, :-1]
    inner[:, :-1] &= mask[:, 1:]
    pixels[mask & ~inner] = colour
    return Image.fromarray(pixels.round().astype(np.uint8))


def rle_to_mask(rle: Mapping[str, Any]) -> np.ndarray:
    """Boolean mask ``[H, W]`` of COCO uncompressed run lengths (column-major, zeros first).

    Raises:
        MarkError: The runs do not fill the mask.
    """
    height, width = rle["size"]
    counts = np.asarray(rle["counts"], dtype=np.int64)
    if counts.sum() != height * width or (counts < 0).any():
        raise MarkError(
            f"mask runs sum to {counts.sum()}, expected {height} x {width} = {height * width}",
            reason="mark",
        )
    return decode_rle({"size": [height, width], "counts": counts.tolist()})
