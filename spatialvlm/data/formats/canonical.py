"""The JSON form of :class:`Sample`: what ``convert_data.py`` writes and reads back unchanged."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

from spatialvlm.data.formats.base import Format, Place, Row, SourceAttrs, media_path
from spatialvlm.data.formats.conversation import check_turns
from spatialvlm.data.formats.fields import number_or_none
from spatialvlm.data.formats.rows import parse_marks
from spatialvlm.data.sample import MediaRef, Sample, Turn
from spatialvlm.typing import MarkSpec

_ROLES = ("system", "user", "assistant")
_MEDIA_FIELDS = set(MediaRef._fields)
_MARK_DEFAULTS = {field.name: field.default for field in dataclasses.fields(MarkSpec)}
_CHOICES: dict[str, tuple[str, ...]] = {
    "geometry": ("auto", "on", "off"),
    "coords": ("abs_source", "abs_resized", "norm1000", "norm1", "none"),
}


def sample_to_json(sample: Sample) -> dict[str, Any]:
    """A JSON object; fields at their defaults are left out."""
    row = _changed(sample._asdict(), Sample._field_defaults)
    row["turns"] = [
        {"role": t.role, "parts": list(t.parts)} | ({} if t.train else {"train": False})
        for t in sample.turns
    ]
    if sample.media:
        row["media"] = [_changed(ref._asdict(), MediaRef._field_defaults) for ref in sample.media]
    if sample.marks:
        row["marks"] = [
            _changed({name: getattr(mark, name) for name in _MARK_DEFAULTS}, _MARK_DEFAULTS)
            for mark in sample.marks
        ]
    return row


def read_canonical(row: Row, attrs: SourceAttrs, place: Place, fmt: Format) -> list[Sample]:  # noqa: ARG001
    """One canonical row -> the sample it was written from, under this source's name and family."""
    media = tuple([_media(item, attrs, place) for item in _list(row, "media", place)])
    turns = tuple([_turn(item, len(media), place) for item in _list(row, "turns", place)])
    _check_turns(turns, len(media), place)
    formats_ok = _list(row, "formats_ok", place)
    if not all(isinstance(f, int) for f in formats_ok):
        raise place.error("schema", f"has formats_ok {formats_ok!r:.80}; expected numbers.")
    fields: dict[str, Any] = {}
    for key, known in _CHOICES.items():
        value = row.get(key)
        if value is not None and value not in known:
            raise place.error("schema", f"has {key} {value!r:.40}; known: {', '.join(known)}.")
        if value is not None:
            fields[key] = value
    if attrs.coords is not None:
        fields["coords"] = attrs.coords
    if attrs.geometry != "auto":
        fields["geometry"] = attrs.geometry
    for key in ("capability", "scene_id", "room_id"):
        value = row.get(key)
        if value is not None and not isinstance(value, str):
            raise place.error("schema", f"has {key} {value!r:.40}; expected text.")
        fields[key] = value
    if attrs.capability_map is not None and fields["capability"] is not None:
        fields["capability"] = attrs.capability_map.get(fields["capability"])
    weight = row.get("weight", 1.0)
    if number_or_none(weight) is None or weight < 0:
        raise place.error(
            "schema", f"has weight {weight!r:.40}; expected a number that is not negative."
        )
    meta = row.get("meta", {})
    if not isinstance(meta, Mapping):
        raise place.error("schema", f"has meta {meta!r:.40}; expected an object.")
    return [
        Sample(
            uid=place.uid(attrs.name),
            source=attrs.name,
            family=attrs.family,
            turns=turns,
            media=media,
            same_scene=bool(row.get("same_scene", False))
            if attrs.same_scene is None
            else attrs.same_scene,
            frames_pinned=bool(row.get("frames_pinned", False)) or attrs.pinned,
            marks=parse_marks(row.get("marks"), place),
            formats_ok=tuple(formats_ok),
            difficulty=number_or_none(row.get("difficulty")),
            margin=number_or_none(row.get("margin")),
            weight=float(weight),
            meta=meta,
            **fields,
        )
    ]


def _changed(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that are not at their defaults, tuples as lists."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
        if name not in defaults or value != defaults[name]
    }


def _list(row: Row, key: str, place: Place) -> list[Any]:
    value = row.get(key, [])
    if not isinstance(value, list):
        raise place.error("schema", f"has {key} {value!r:.40}; expected a list.")
    return value


def _media(item: Any, attrs: SourceAttrs, place: Place) -> MediaRef:
    if (
        not isinstance(item, Mapping)
        or not item.keys() <= _MEDIA_FIELDS
        or item.get("kind") not in ("image", "video")
        or item.get("store") not in ("file", "frames", "tar", "cell")
        or not isinstance(item.get("path"), str)
        or not isinstance(item.get("member", ""), str)
    ):
        raise place.error("schema", f"has the medium {item!r:.120}; expected kind, store, path.")
    frames, clip = item.get("frames"), item.get("clip_s")
    if frames is not None and not (
        isinstance(frames, list) and all(isinstance(f, int) and f >= 0 for f in frames)
    ):
        raise place.error("schema", f"has frames {frames!r:.80}; expected frame numbers.")
    if clip is not None and not (
        isinstance(clip, list)
        and len(clip) == 2
        and all(number_or_none(v) is not None for v in clip)
    ):
        raise place.error("schema", f"has clip_s {clip!r:.80}; expected [start, end] in seconds.")
    return MediaRef(
        item["kind"],
        item["store"],
        media_path(attrs.base, item["path"]),
        item.get("member", ""),
        None if frames is None else tuple(frames),
        None if clip is None else (float(clip[0]), float(clip[1])),
    )


def _turn(item: Any, num_media: int, place: Place) -> Turn:
    parts = item.get("parts") if isinstance(item, Mapping) else None
    if not isinstance(parts, list) or item.get("role") not in _ROLES:
        raise place.error("schema", f"has the turn {item!r:.120}; expected role and parts.")
    for part in parts:
        if not isinstance(part, str) and not (type(part) is int and 0 <= part < num_media):
            raise place.error(
                "schema", f"has the part {part!r:.40}; expected text or a medium below {num_media}."
            )
    return Turn(item["role"], tuple(parts), bool(item.get("train", True)))


def _check_turns(turns: tuple[Turn, ...], num_media: int, place: Place) -> None:
    pieces = [
        (turn.role, [p if isinstance(p, str) else -1 for p in turn.parts], turn.train)
        for turn in turns
    ]
    check_turns(cast("Any", pieces), place)
    used = [part for turn in turns for part in turn.parts if isinstance(part, int)]
    if used != list(range(num_media)):
        raise place.error(
            "marker_count", f"uses media {used} but lists {num_media}; each once, in order."
        )
