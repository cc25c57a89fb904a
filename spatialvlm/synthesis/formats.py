"""The nineteen instruction formats of InternSpatial: five ways to name objects times four views.

Text: T1 natural language, T2 ``<ref>caption</ref>``, T3 ``<ref>region</ref><box>..</box>``,
T4 ``<ref>caption</ref><box>..</box>``, T5 by mark. View: V1 original image, V2 boxes, V3 masks,
V4 numbered ids. T5 needs a mark, so T5 with V1 does not exist. Format ``4 (T - 1) + (V - 1)`` for T1
to T4 (0..15); T5 with V2, V3, V4 is 16, 17, 18.

Rows store the slots a format needs; a loader expands them, so an ablation regenerates nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

NUM_FORMATS = 19


def text_and_view(format_id: int) -> tuple[int, int]:
    """``(T, V)`` of a format, both counted from 1."""
    if format_id < 16:
        return format_id // 4 + 1, format_id % 4 + 1
    return 5, format_id - 14


def allowed_formats(
    slots: Sequence[Mapping[str, Any]], marks: Sequence[Mapping[str, Any]]
) -> list[int]:
    """Formats in which a question about images can be shown.

    T1 and T2 need a phrase that is unique by itself; T3 and T4 need a box of every object in an image;
    V3 needs masks. A question that already shows marks keeps its own rendering only.
    """
    if marks:
        return [0]
    boxed = all(slot["boxes"] for slot in slots)
    masked = all(slot["masks"] for slot in slots)
    unique = all(slot.get("unique", True) for slot in slots)
    allowed = []
    for format_id in range(NUM_FORMATS):
        text, view = text_and_view(format_id)
        if text <= 2 and not unique:
            continue
        if (text >= 3 or view in (2, 4)) and not boxed:
            continue
        if view == 3 and not masked:
            continue
        allowed.append(format_id)
    return allowed
