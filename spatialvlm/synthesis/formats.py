"""The nineteen instruction formats of InternSpatial: five ways to name objects times four views.

Text: T1 natural language, T2 ``<ref>caption</ref>``, T3 ``<ref>region</ref><box>..</box>``,
T4 ``<ref>caption</ref><box>..</box>``, T5 by mark. View: V1 original image, V2 boxes, V3 masks,
V4 numbered ids. T5 needs a mark, so T5 with V1 does not exist. Format ``4 (T - 1) + (V - 1)`` for T1
to T4 (0..15); T5 with V2, V3, V4 is 16, 17, 18.

Rows store the slots a format needs; a loader expands them (:class:`FormatExpander` is its hook), so an
ablation of formats regenerates nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from spatialvlm.data.sample import Sample, Turn
from spatialvlm.errors import DataError
from spatialvlm.synthesis.marks import PALETTE, mark_from_dict
from spatialvlm.synthesis.rows import Draws
from spatialvlm.typing import MarkSpec

NUM_FORMATS = 19
Dialect = Literal["internvl", "qwen", "plain"]
DIALECTS: tuple[Dialect, ...] = ("internvl", "qwen", "plain")
"""How references and boxes are written; coordinates are always thousandths of the image, and the loader
rewrites them where a model wants pixels."""
DIALECT_OF: dict[str, Dialect] = {"internvl3": "internvl", "qwen2_5vl": "qwen", "qwen3vl": "qwen"}
"""Dialect of every backbone family."""
WORDS_ONLY = (0, 4)
"""Formats without boxes, neither in the text nor drawn: for questions about where something is."""
UNDRAWN = (0, 4, 8, 12)
"""Formats with the original image: for questions that a drawn mark would change."""
_MARKS = {2: "box", 3: "mask", 4: "id"}
Slots = Sequence[Mapping[str, Any]]


def text_and_view(format_id: int) -> tuple[int, int]:
    """``(T, V)`` of a format, both counted from 1.

    Raises:
        DataError: There is no such format.
    """
    if not 0 <= format_id < NUM_FORMATS:
        raise DataError(
            f"instruction format {format_id} does not exist; formats are 0 to {NUM_FORMATS - 1}.",
            reason="format",
        )
    if format_id < 16:
        return format_id // 4 + 1, format_id % 4 + 1
    return 5, format_id - 14


def allowed_formats(slots: Slots) -> list[int]:
    """Formats in which a question about images can be shown.

    T1 and T2 need a phrase that is unique by itself; T3 and T4 need a box of every object in the first image,
    because numbers alone do not name another one; drawn views need a box in any image; V3 needs masks.
    """
    return list(
        _allowed(
            all("0" in slot["boxes"] for slot in slots),
            all(slot["boxes"] for slot in slots),
            all(slot["masks"] for slot in slots),
            all(slot["unique"] for slot in slots),
        )
    )


@lru_cache(maxsize=8)
def _allowed(first: bool, boxed: bool, masked: bool, unique: bool) -> tuple[int, ...]:
    allowed = []
    for format_id in range(NUM_FORMATS):
        text, view = text_and_view(format_id)
        if text <= 2 and not unique:
            continue
        if (text in (3, 4) and not first) or (view in (2, 4) and not boxed):
            continue
        if view == 3 and not masked:
            continue
        allowed.append(format_id)
    return tuple(allowed)


@dataclass(frozen=True)
class Expansion:
    """Names and marks of one format."""

    names: dict[int, str]
    """Position in the slots -> text that replaces the default rendering (without an article)."""
    article: bool
    """Whether a leading ``the`` of the default rendering stays."""
    marks: tuple[MarkSpec, ...]


def expand_slots(slots: Slots, format_id: int, dialect: Dialect, draws: Draws) -> Expansion:
    """Names and marks of all slots in one format.

    Args:
        slots: Slots of the row.
        format_id: 0 to 18.
        dialect: How boxes and references are written.
        draws: Chooses mark colours.

    Raises:
        DataError: Unknown format or dialect, or a slot without the box or mask it needs.
    """
    if dialect not in DIALECTS:
        raise DataError(
            f"unknown dialect {dialect!r}; known: {', '.join(DIALECTS)}.", reason="format"
        )
    text, view = text_and_view(format_id)
    colours = draws.shuffled(list(PALETTE))
    names: dict[int, str] = {}
    marks: list[MarkSpec] = []
    for number, slot in enumerate(slots):
        colour = colours[number % len(colours)]
        kind = _MARKS.get(view)
        if kind is not None:
            marks += _slot_marks(slot, kind, colour, number + 1)
        if text == 1:
            continue
        if text == 5:
            names[number] = f"region {number + 1}" if kind == "id" else f"{colour} {kind}"
            continue
        caption = "region" if text == 3 else str(slot["phrase"])
        names[number] = reference(caption, _norm_box(slot) if text >= 3 else None, dialect)
    return Expansion(names, text == 5 and view != 4, tuple(marks))


def reference(caption: str, box: Sequence[int] | None, dialect: Dialect) -> str:
    """Write a reference with an optional box in thousandths."""
    if dialect == "internvl":
        tail = f"<box>[[{','.join(map(str, box))}]]</box>" if box is not None else ""
        return f"<ref>{caption}</ref>{tail}"
    if dialect == "qwen":
        opened = f"<|object_ref_start|>{caption}<|object_ref_end|>"
        if box is None:
            return opened
        x0, y0, x1, y1 = box
        return f"{opened}<|box_start|>({x0},{y0}),({x1},{y1})<|box_end|>"
    return caption if box is None else f"{caption} [{', '.join(map(str, box))}]"


def _first_image(slot: Mapping[str, Any], what: str) -> str:
    if not slot[what]:
        raise DataError(
            f"object {slot['obj']} ({slot['label']!r}) has no {what}; its format is not in formats_ok.",
            reason="format",
        )
    return str(min(slot[what], key=int))


def _norm_box(slot: Mapping[str, Any]) -> list[int]:
    image = _first_image(slot, "boxes")
    width, height = slot["size"]
    scale = (1000 / width, 1000 / height)
    return [round(value * scale[i % 2]) for i, value in enumerate(slot["boxes"][image])]


def _slot_marks(slot: Mapping[str, Any], kind: str, colour: str, number: int) -> list[MarkSpec]:
    images = slot["masks"] if kind == "mask" else slot["boxes"]
    _first_image(slot, "masks" if kind == "mask" else "boxes")
    records = []
    for image, shape in images.items():
        record: dict[str, Any] = {
            "image": int(image),
            "kind": kind,
            "color": colour,
            "name": f"the {colour} {kind}" if kind != "id" else str(number),
            "label": str(number) if kind == "id" else "",
            "obj": slot["obj"],
            "units": "px",
        }
        record["rle" if kind == "mask" else "bbox"] = shape
        records.append(mark_from_dict(record))
    return records


def replace_names(
    text: str, places: Sequence[tuple[int, int, int]], expansion: Expansion, shift: int = 0
) -> str:
    """Replace the default renderings inside one message.

    Args:
        text: The message.
        places: ``(slot, start, end)``, not overlapping.
        expansion: What to write.
        shift: Characters before the first counted one (the markers).
    """
    for number, start, end in sorted(places, key=lambda place: -place[1]):
        if number not in expansion.names:
            continue
        old = text[start + shift : end + shift]
        new = expansion.names[number]
        if expansion.article and old[:4].lower() == "the ":
            new = f"{old[:4]}{new}"
        elif old[:1].isupper() and not new.startswith("<"):
            new = new[:1].upper() + new[1:]
        text = text[: start + shift] + new + text[end + shift :]
    return text


@dataclass(frozen=True)
class FormatExpander:
    """Loader hook: shows each row in one of its formats, another one in every epoch.

    Args:
        dialect: How references and boxes are written.
        seed: Of the choice.
        formats: Only these formats where a row allows any of them (for ablations).
        marked: Share of rows shown with drawn marks, of those that may be shown with and without; None =
            every format is as likely as another. Questions without marks can share one copy of the image.
    """

    dialect: Dialect = "internvl"
    seed: int = 0
    formats: tuple[int, ...] | None = None
    marked: float | None = None

    def __call__(self, sample: Sample, epoch: int) -> Sample:
        """Return the sample in one of ``sample.formats_ok``.

        Raises:
            DataError: The row cannot be shown in a format it lists.
        """
        slots = sample.meta.get("slots") or []
        choices = sample.formats_ok
        if self.formats is not None:
            choices = tuple(f for f in choices if f in self.formats) or choices
        if not choices or not slots:
            return sample
        draws = Draws("format", self.seed, sample.uid, epoch)
        if self.marked is not None:
            drawn = tuple(f for f in choices if text_and_view(f)[1] in _MARKS)
            if 0 < len(drawn) < len(choices):
                plain = tuple(f for f in choices if f not in drawn)
                choices = drawn if draws.unit() < self.marked else plain
        format_id = draws.choice(choices)
        expansion = expand_slots(slots, format_id, self.dialect, draws)
        places: dict[int, list[tuple[int, int, int]]] = {}
        for number, slot in enumerate(slots):
            for message, start, end in slot["spans"]:
                places.setdefault(message, []).append((number, start, end))
        turns = tuple(
            _replace_turn(turn, places.get(index, ()), expansion)
            for index, turn in enumerate(sample.turns)
        )
        boxes_in_text = text_and_view(format_id)[0] in (3, 4)
        return sample._replace(
            turns=turns,
            marks=expansion.marks,
            coords="norm1000" if boxes_in_text else sample.coords,
        )


def _replace_turn(turn: Turn, places: Sequence[tuple[int, int, int]], expansion: Expansion) -> Turn:
    """Replace names in the last text part; markers stand before it."""
    if not places:
        return turn
    index = max(i for i, part in enumerate(turn.parts) if isinstance(part, str))
    text = str(turn.parts[index])
    shift = len(text) - len(text.lstrip("\n"))
    parts = list(turn.parts)
    parts[index] = replace_names(text, places, expansion, shift)
    return turn._replace(parts=tuple(parts))
