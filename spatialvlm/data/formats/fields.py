"""Media fields of a row, and the small checks that every reader shares."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, cast

from spatialvlm.data.formats.base import (
    IMAGE_SUFFIXES,
    Place,
    Row,
    SourceAttrs,
    media_path,
    suffix,
    video_ref,
)
from spatialvlm.data.sample import MediaRef

_MEDIA_KEYS = ("image", "images", "video", "videos")


def media_fields(
    row: Row, attrs: SourceAttrs, place: Place
) -> tuple[list[MediaRef], list[MediaRef]]:
    """Images and videos of the row's media fields, each in order."""
    clip = read_clip(row, place)
    images: list[MediaRef] = []
    videos: list[MediaRef] = []
    for key in _MEDIA_KEYS:
        value = row.get(key)
        if value is not None and value != "" and value != []:
            if key[0] == "i":
                images += _field_media(value, key, "image", attrs, place, None)
            else:
                videos += _field_media(value, key, "video", attrs, place, clip)
    if images and not videos and row.get("type") == "video":
        images, videos = [], _images_as_videos(row, images, clip)
    return images, videos


def _images_as_videos(
    row: Row, images: list[MediaRef], clip: tuple[float, float] | None
) -> list[MediaRef]:
    """VST keeps a video in ``images``: as one mp4, or as its frames."""
    cells = row.get("images")
    frames = [
        cell
        for cell in (cells if isinstance(cells, list) else [])
        if isinstance(cell, Mapping)
        and isinstance(cell.get("path"), str)
        and suffix(cell["path"]) in IMAGE_SUFFIXES
    ]
    if len(images) > 1 and len(frames) == len(images) and images[0].store == "cell":
        members = "\n".join([ref.member for ref in images])
        return [MediaRef("video", "cell", images[0].path, members, clip_s=clip)]
    return [MediaRef("video", ref.store, ref.path, ref.member, clip_s=clip) for ref in images]


def number_or_none(value: Any) -> float | None:
    """A finite number as float; anything else is None."""
    if value is None or isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:  # JSON integers have no bound
        return None
    return number if math.isfinite(number) else None


def cell_names(row: Row) -> list[str]:
    """Names that embedded media had as files, from the ``path`` of their cells."""
    cells: list[Any] = []
    for key in _MEDIA_KEYS:
        value = row.get(key)
        cells += value if isinstance(value, list) else [value]
    paths = [cell.get("path") for cell in cells if isinstance(cell, Mapping)]
    return [path for path in paths if isinstance(path, str) and path]


def id_or_none(value: Any) -> str | None:
    """An id as text; some sets write theirs as numbers."""
    return str(value) if type(value) is int else text_or_none(value)


def text_or_none(value: Any) -> str | None:
    """Text that is not empty; anything else is None."""
    return value if isinstance(value, str) and value else None


def read_clip(row: Row, place: Place) -> tuple[float, float] | None:
    """``video_start`` and ``video_end`` in seconds; None when neither is given."""
    start, end = row.get("video_start"), row.get("video_end")
    if start is end is None:
        return None
    first = 0.0 if start is None else number_or_none(start)
    last = number_or_none(end)
    if first is None or last is None or not 0 <= first < last:
        raise place.error(
            "schema",
            f"has video_start {start!r} and video_end {end!r}; expected seconds, start < end.",
        )
    return first, last


def _field_media(
    value: Any,
    key: str,
    kind: str,
    attrs: SourceAttrs,
    place: Place,
    clip: tuple[float, float] | None,
) -> list[MediaRef]:
    if not isinstance(value, list):
        return [read_medium(value, kind, key, -1, attrs, place, clip)]
    paths = [v for v in value if isinstance(v, str)]
    if (
        kind == "video"
        and len(paths) == len(value)
        and all(suffix(p) in IMAGE_SUFFIXES for p in paths)
    ):
        return [video_ref(attrs.base, paths, place, clip)]  # the frames of one video
    return [
        read_medium(item, kind, key, number, attrs, place, clip)
        for number, item in enumerate(value)
        if item is not None and item != ""
    ]


def read_medium(
    value: Any,
    kind: str,
    key: str,
    item: int,
    attrs: SourceAttrs,
    place: Place,
    clip: tuple[float, float] | None,
) -> MediaRef:
    """One entry of a media field: a path, ``{bytes, path}``, or a nested typed part."""
    if isinstance(value, str):
        return _file_medium(kind, attrs.base, value, clip)
    if (
        isinstance(value, list)
        and kind == "video"
        and value
        and all(isinstance(v, str) for v in value)
    ):
        return video_ref(attrs.base, value, place, clip)
    if isinstance(value, Mapping):
        if value.get("bytes"):
            member = f"{place.row}/{key}/{item}"
            return MediaRef(cast("Any", kind), "cell", place.file, member, clip_s=clip)
        if isinstance(value.get("tar"), str):
            return MediaRef(cast("Any", kind), "tar", place.file, value["tar"], clip_s=clip)
        for name in ("path", "image", "url", "image_url", "video", "video_url"):
            nested = value.get(name)
            if nested is not None and nested != "":
                return read_medium(nested, kind, key, item, attrs, place, clip)
    raise place.error(
        "schema",
        f'has {short(value)} in "{key}"; expected a path, a list of paths, or {{bytes, path}}.',
    )


@functools.lru_cache(maxsize=1024)  # neighbouring rows often share their media
def _file_medium(kind: str, base: str, path: str, clip: tuple[float, float] | None) -> MediaRef:
    if kind == "image":
        return MediaRef("image", "file", media_path(base, path))
    return video_ref(base, path, Place(), clip)


def short(value: Any) -> str:
    """A value as it stands in a message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
