"""Rows of our own generator (parquet, one schema for all tasks)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from spatialvlm.data.formats.base import Format, Place, Row, SourceAttrs, media_path, video_ref
from spatialvlm.data.formats.conversation import build_sample, parse_turns
from spatialvlm.data.formats.fields import number_or_none, text_or_none
from spatialvlm.data.sample import MediaRef, Sample
from spatialvlm.typing import MarkSpec

_CONSUMED = frozenset(
    ["marks", "formats_ok", "frames_pinned", "capability", "margin", "media_kind"]
)
_MARK_CHOICES = {
    "kind": ("box", "mask", "point", "id"),
    "units": ("px", "norm1000"),
    "style": ("default", "openspatial", "spar"),
}


def read_rows(row: Row, attrs: SourceAttrs, place: Place, fmt: Format) -> list[Sample]:
    """One generated row -> one sample.

    ``images`` are k views of one scene, or the frames of one clip, as ``media_kind`` says. Typed
    answers, slots, and evidence stay in ``meta``; JSON columns are parsed there.
    """
    kind, paths = row.get("media_kind"), row.get("images") or []
    if not isinstance(paths, list) or not all(isinstance(p, str) for p in paths):
        raise place.error("schema", f"has images {paths!r:.80}; expected a list of paths.")
    images: list[MediaRef] = []
    videos: list[MediaRef] = []
    if kind == "images":
        images = [MediaRef("image", "file", media_path(attrs.base, path)) for path in paths]
    elif kind == "video" and paths:
        videos = [video_ref(attrs.base, paths, place)]
    elif kind not in ("none", "video"):
        raise place.error("schema", f"has media_kind {kind!r}; known: none, images, video.")
    meta = {
        key: value
        for key, value in row.items()
        if value is not None and key not in _CONSUMED and key not in ("messages", "images")
    }
    for key in ("answer_json", "slots", "evidence"):
        if isinstance(meta.get(key), str):
            meta[key] = _json(meta[key], key, place)
    formats_ok = row.get("formats_ok") or []
    if not isinstance(formats_ok, list) or not all(isinstance(f, int) for f in formats_ok):
        raise place.error(
            "schema", f"has formats_ok {formats_ok!r:.80}; expected a list of numbers."
        )
    text_row = {key: row.get(key) for key in ("messages",)}
    fields: dict[str, Any] = {
        "same_scene": kind == "images",
        "frames_pinned": bool(row.get("frames_pinned", True)) or attrs.pinned,
        "formats_ok": tuple(formats_ok),
        "margin": _margin_norm(row.get("margin")),
        "difficulty": number_or_none(row.get("difficulty")),
        "scene_id": text_or_none(row.get("scene_id")),
        "room_id": text_or_none(row.get("room_id")),
        "capability": _capability(row, attrs),
        "coords": attrs.coords or ("norm1000" if row.get("answer_type") == "box" else "none"),
        "meta": meta,
    }
    return [
        build_sample(
            text_row,
            parse_turns(text_row, attrs, place),
            images,
            videos,
            attrs,
            place,
            fmt,
            marks=parse_marks(row.get("marks"), place),
            **fields,
        )
    ]


def parse_marks(value: Any, place: Place) -> tuple[MarkSpec, ...]:
    """Marks from a JSON column or a list of objects."""
    if value is None or value == "":
        return ()
    if isinstance(value, str):
        value = _json(value, "marks", place)
    if not isinstance(value, list):
        raise place.error("schema", f"has marks {value!r:.80}; expected a list of objects.")
    return tuple([_mark(item, place) for item in value])


def _mark(item: Any, place: Place) -> MarkSpec:
    known = MarkSpec.__dataclass_fields__
    if (
        not isinstance(item, Mapping)
        or not {"image", "kind", "color"} <= item.keys() <= known.keys()
    ):
        raise place.error(
            "schema",
            f"has the mark {item!r:.120}; expected an object with image, kind, color and of {sorted(known)}.",
        )
    values = {key: value for key, value in item.items() if value is not None}
    if not {"image", "kind", "color"} <= values.keys():
        raise place.error("schema", f"has the mark {item!r:.120} without image, kind, or color.")
    types = {"image": int, "obj": int, "color": str, "name": str, "label": str}
    for key, kind in types.items():
        if key in values and not isinstance(values[key], kind):
            raise place.error("schema", f"has a mark with {key} {values[key]!r:.60}.")
    for key, choices in _MARK_CHOICES.items():
        if key in values and values[key] not in choices:
            raise place.error(
                "schema", f"has a mark of {key} {values[key]!r:.60}; known: {', '.join(choices)}."
            )
    for key, length in (("xy", 2), ("bbox", 4)):
        if key in values:
            numbers = values[key]
            if (
                not isinstance(numbers, list | tuple)
                or len(numbers) != length
                or any(number_or_none(v) is None for v in numbers)
            ):
                raise place.error(
                    "schema", f"has a mark with {key} {numbers!r:.80}; expected {length} numbers."
                )
            values[key] = tuple(float(v) for v in numbers)
    return MarkSpec(**values)


def _margin_norm(value: Any) -> float | None:
    if isinstance(value, Mapping):
        size, threshold = number_or_none(value.get("value")), number_or_none(value.get("threshold"))
        return None if size is None or not threshold else size / threshold
    return number_or_none(value)


def _capability(row: Row, attrs: SourceAttrs) -> str | None:
    raw = text_or_none(row.get("capability")) or text_or_none(row.get("task"))
    return raw if raw is None or attrs.capability_map is None else attrs.capability_map.get(raw)


def _json(text: str, key: str, place: Place) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise place.error("schema", f"has invalid JSON in column {key!r}: {error}.") from error
