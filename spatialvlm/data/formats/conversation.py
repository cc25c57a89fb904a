"""The normaliser of every conversation format: turns, media fields, markers, checks.

The rules are those listed in docs/data.md, "Rows": (a) media fields, (b) markers, (c) counts,
(d) turns. A row either becomes samples or raises :class:`DataError` with one of the documented reasons.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any, cast

from spatialvlm.data.formats.base import Format, Place, Row, SourceAttrs
from spatialvlm.data.formats.fields import (
    cell_names,
    id_or_none,
    media_fields,
    number_or_none,
    read_clip,
    read_medium,
    short,
)
from spatialvlm.data.sample import MediaRef, Role, Sample, Turn
from spatialvlm.errors import DataError
from spatialvlm.typing import MarkSpec

_ONE_MARKER = r"<(?:image|video|\|image_pad\||\|video_pad\|)>"
_MARKER = re.compile(rf"({_ONE_MARKER}|<\|vision_start\|>{_ONE_MARKER}<\|vision_end\|>)")
_ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_IMAGE, _VIDEO = -1, -2
_CONSUMED = frozenset(
    [
        "conversations",
        "messages",
        "image",
        "images",
        "video",
        "videos",
        "system",
        "system_prompt",
        "video_start",
        "video_end",
        "scene_id",
        "room_id",
        "difficulty",
    ]
)

# What stands between the pieces of a turn: text, a marker (_IMAGE, _VIDEO), or a medium given in place.
Piece = str | int | MediaRef


def read_conversation(row: Row, attrs: SourceAttrs, place: Place, fmt: Format) -> list[Sample]:
    """Normalise one row with ``conversations`` or ``messages``.

    Args:
        row: The row; embedded media bytes are replaced by a true value.
        attrs: Settings of the source.
        place: Where the row stands.
        fmt: The format, for its presets.

    Raises:
        DataError: With the reason ``schema``, ``turn_order``, ``no_answer``, ``empty_answer``,
            ``marker_count``, ``marker_in_answer``, or ``excluded``.
    """
    images, videos = media_fields(row, attrs, place)
    return [build_sample(row, parse_turns(row, attrs, place), images, videos, attrs, place, fmt)]


def build_sample(
    row: Row,
    turns: list[tuple[Role, list[Piece], bool]],
    images: list[MediaRef],
    videos: list[MediaRef],
    attrs: SourceAttrs,
    place: Place,
    fmt: Format,
    *,
    marks: tuple[MarkSpec, ...] = (),
    consumed: frozenset[str] = frozenset(),
    k: int = -1,
    **fields: Any,
) -> Sample:
    """Check turns and markers against each other and put the sample together.

    Args:
        row: The row; keys that became no field of the sample go to ``meta``.
        turns: From :func:`parse_turns`.
        images: Media of ``<image>`` markers, in order.
        videos: Media of ``<video>`` markers, in order.
        attrs: Settings of the source.
        place: Where the row stands.
        fmt: The format, for its presets.
        marks: Marks to draw at load.
        consumed: More keys to leave out of ``meta``.
        k: Number among several samples of the row; -1 = the only one.
        fields: Further fields of the sample, in place of the derived ones.
    """
    check_turns(turns, place)
    media = _assign(turns, images, videos, place)
    if attrs.normalize_marker == "front":
        _markers_to_front(turns)
    if attrs.fixes:
        _fix_answers(turns, attrs.fixes)
    get = row.get
    used = _CONSUMED | consumed if consumed else _CONSUMED
    difficulty, margin = get("difficulty"), get("margin")
    meta = {key: v for key, v in row.items() if v is not None and key not in used}
    if media and media[0].store == "cell" and (names := cell_names(row)):
        known = meta.get("media_names")  # of an earlier conversion
        meta["media_names"] = [*(known if isinstance(known, list) else []), *names]
    sample = Sample(
        uid=place.uid(attrs.name, k),
        source=attrs.name,
        family=attrs.family,
        turns=tuple(
            [Turn(role, tuple(parts), train) for role, parts, train in turns]  # type: ignore[arg-type]
        ),
        media=tuple(media),
        capability=_capability(row, attrs, fmt),
        same_scene=fmt.same_scene if attrs.same_scene is None else attrs.same_scene,
        geometry=attrs.geometry,
        frames_pinned=attrs.pinned,
        coords=attrs.coords or fmt.coords,
        marks=marks,
        scene_id=id_or_none(get("scene_id") or get("scene_name")),
        room_id=id_or_none(get("room_id")),
        difficulty=None if difficulty is None else number_or_none(difficulty),
        margin=None if margin is None else number_or_none(margin),
        meta=meta,
    )
    return sample._replace(**fields) if fields else sample


def parse_turns(row: Row, attrs: SourceAttrs, place: Place) -> list[tuple[Role, list[Piece], bool]]:
    """Roles and pieces of the row's turns; a ``system`` key becomes the first turn."""
    raw = row.get("conversations")
    if raw is None:
        raw = row.get("messages")
    if not isinstance(raw, list):
        kind = "has no" if raw is None else f"has {type(raw).__name__} as"
        raise place.error(
            "schema",
            f'{kind} list "conversations" or "messages"; found keys {sorted(map(str, row))[:12]}.',
        )
    turns: list[tuple[Role, list[Piece], bool]] = []
    system = row.get("system") or row.get("system_prompt")
    if isinstance(system, str):
        turns.append(("system", [system], False))
    for number, message in enumerate(raw):
        if not isinstance(message, dict):
            raise place.error(
                "schema", f"has {type(message).__name__} as turn {number}, not an object."
            )
        name = message.get("from")
        if name is None:
            name = message.get("role")
        role = _ROLES.get(name) if isinstance(name, str) else None
        if role is None:
            raise place.error(
                "schema", f"has role {name!r} in turn {number}; known: {', '.join(_ROLES)}."
            )
        content = message.get("value")
        if content is None:
            content = message.get("content")
        if isinstance(content, str):
            pieces = _split(content)
        else:
            pieces = _pieces(content, number, attrs, place)
        train = role == "assistant"
        if train and len(message) > 2:  # OpenAI's weight 0 keeps an answer as context
            train = message.get("train") is not False and message.get("weight") != 0
        turns.append((role, pieces, train))
    return turns


def check_turns(turns: list[tuple[Role, list[Piece], bool]], place: Place) -> None:
    """Order of roles, presence of answers, and no media outside user turns."""
    expected: Role = "user"
    for number, (role, pieces, _) in enumerate(turns):
        if role != expected and (role != "system" or number):
            before = turns[number - 1][0] if number else "nothing"
            raise place.error(
                "turn_order",
                f"has a {role} turn after {before} (turn {number}); turns must alternate user, assistant.",
            )
        if role == "user":
            expected = "assistant"
            continue
        expected = "user"
        blank = True
        for piece in pieces:
            if not isinstance(piece, str):
                raise place.error(
                    "marker_in_answer",
                    f"has a media marker in {role} turn {number}; only user turns may hold media.",
                )
            blank = blank and not piece.strip()
        if blank and role == "assistant":
            raise place.error("empty_answer", f"has an empty answer in turn {number}.")
    if not turns or turns[-1][0] != "assistant":
        raise place.error(
            "no_answer", "does not end with an assistant turn, so nothing can be learnt."
        )


def _capability(row: Row, attrs: SourceAttrs, fmt: Format) -> str | None:
    for key in fmt.capability_keys:
        raw = row.get(key)
        if isinstance(raw, str) and raw:
            return raw if attrs.capability_map is None else attrs.capability_map.get(raw)
    return None


def _pieces(content: Any, number: int, attrs: SourceAttrs, place: Place) -> list[Piece]:
    """Pieces of content that is no plain text."""
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, list):
        raise place.error(
            "schema",
            f"has {short(content)} as content of turn {number}; expected text or a list of parts.",
        )
    pieces: list[Piece] = []
    for part in content:
        if isinstance(part, str):
            pieces += _split(part)
            continue
        if not isinstance(part, Mapping):
            raise place.error("schema", f"has {short(part)} as a part of turn {number}.")
        kind = part.get("type") or next(
            (k for k in ("text", "image_url", "image", "video_url", "video") if part.get(k)), None
        )
        if kind == "text" and isinstance(part.get("text"), str):
            pieces += _split(part["text"])
        elif kind in ("image", "image_url", "video", "video_url"):
            name = "image" if kind.startswith("image") else "video"
            payload = (
                part.get(kind)
                or part.get(name)
                or part.get(f"{name}_url")
                or part.get("path")
                or part.get("url")
            )
            if payload is None:
                pieces.append(_IMAGE if name == "image" else _VIDEO)
            elif isinstance(payload, Mapping) and payload.get("bytes"):
                raise place.error(
                    "schema", f'embeds bytes in turn {number}; move them to a column "{name}s".'
                )
            else:
                clip = read_clip(part, place) if name == "video" else None
                pieces.append(read_medium(payload, name, kind, -1, attrs, place, clip))
        else:
            raise place.error(
                "schema",
                f"has {short(part)} as a part of turn {number}; known types: text, image, image_url, video.",
            )
    return pieces


def has_marker(text: str) -> bool:
    """Whether text would be read as holding a media marker."""
    return _MARKER.search(text) is not None


def _split(text: str) -> list[Piece]:
    """Text cut at its markers; white space stays as written."""
    if "<" not in text:
        return [text]
    cut = _MARKER.split(text)
    if len(cut) == 1:
        return [text]
    pieces: list[Piece] = []
    for number, piece in enumerate(cut):
        if number % 2:
            pieces.append(_VIDEO if "video" in piece else _IMAGE)
        elif piece:
            pieces.append(piece)
    return pieces


def _assign(
    turns: list[tuple[Role, list[Piece], bool]],
    images: list[MediaRef],
    videos: list[MediaRef],
    place: Place,
) -> list[MediaRef]:
    """Replace markers by indices into the media list, in marker order; returns that list."""
    found: list[Piece] = []
    for _, pieces, _ in turns:
        for number, piece in enumerate(pieces):
            if not isinstance(piece, str):
                pieces[number] = len(found)
                found.append(piece)
    if not found:
        media = [*images, *videos]
        if media:
            first_user = next(pieces for role, pieces, _ in turns if role == "user")
            first_user[:0] = range(len(media))
        return media
    num_image, num_video = found.count(_IMAGE), found.count(_VIDEO)
    if videos and not images and not num_video:
        images, videos = videos, []  # <image> marks a video (VSI-590K, VLM-3R, ViCA)
    if num_image != len(images) or num_video != len(videos):
        raise _count_error(num_image, num_video, images, videos, place)
    left = {_IMAGE: iter(images), _VIDEO: iter(videos)}
    return [next(left[piece]) if isinstance(piece, int) else piece for piece in found]  # type: ignore[misc]


def _count_error(
    num_image: int, num_video: int, images: list[MediaRef], videos: list[MediaRef], place: Place
) -> DataError:
    kind, markers, media = ("image", num_image, images)
    if markers == len(media):
        kind, markers, media = ("video", num_video, videos)
    noun = media[0].kind if media else kind
    fix = f'Add the missing path to "{noun}" or remove a marker.'
    if markers < len(media):
        fix = "Add a marker or remove a path."
    return place.error(
        "marker_count",
        f"has {markers} <{kind}> marker{'s' * (markers != 1)} and "
        f"{len(media)} {noun}{'s' * (len(media) != 1)}. {fix}",
    )


def _markers_to_front(turns: list[tuple[Role, list[Piece], bool]]) -> None:
    """Move the media of the first user turn before its text, which makes such rows groupable."""
    pieces = next(pieces for role, pieces, _ in turns if role == "user")
    media = [p for p in pieces if not isinstance(p, str)]
    text = "".join(p for p in pieces if isinstance(p, str)).strip()
    if media:
        pieces[:] = [*media, "\n" + text]


def _fix_answers(turns: list[tuple[Role, list[Piece], bool]], fixes: tuple[str, ...]) -> None:
    assert fixes == ("python_literal_json",), f"unknown fixes {fixes}"
    for role, pieces, _ in turns:
        if role == "assistant":
            pieces[:] = [python_literal_to_json("".join(cast("list[str]", pieces)))]


def python_literal_to_json(text: str) -> str:
    """An answer that is a Python list or dict literal, rewritten as JSON; any other text unchanged."""
    stripped = text.strip()
    if not stripped or stripped[0] not in "[{":
        return text
    try:
        return json.dumps(ast.literal_eval(stripped), ensure_ascii=False)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text
