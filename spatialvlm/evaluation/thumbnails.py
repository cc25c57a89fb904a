"""Small pictures of an item's media for the report, embedded as data URIs."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spatialvlm.errors import DataError
from spatialvlm.evaluation.prompts import frame_indices, safe_path
from spatialvlm.evaluation.schema import Media

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_SIDE_PX = 512
MAX_FRAMES = 8
VIDEO_SUFFIXES = (".mp4", ".mov", ".avi", ".mkv", ".webm")


def _outline(picture: "Image", marks: Sequence[Mapping[str, Any]]) -> None:
    """Outline the marks of one stored picture, for a reader's eye only."""
    from PIL import ImageDraw

    draw = ImageDraw.Draw(picture)
    width, height = picture.size
    line = max(2, min(width, height) // 120)
    for mark in marks:
        sx, sy = (width / 1000, height / 1000) if mark.get("units") == "norm1000" else (1, 1)
        if mark.get("bbox"):
            x0, y0, x1, y1 = mark["bbox"]
            draw.rectangle((x0 * sx, y0 * sy, x1 * sx, y1 * sy), outline=mark["color"], width=line)
        elif mark.get("xy"):
            x, y = mark["xy"][0] * sx, mark["xy"][1] * sy
            radius = max(3, height // 60)
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=mark["color"])


def _encode(image: "Image", side: int, marks: Sequence[Mapping[str, Any]] = ()) -> str:
    picture = image.convert("RGB")
    if marks:
        _outline(picture, marks)
    picture.thumbnail((side, side))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def video_pictures(path: Path, count: int) -> "list[Image]":
    """Up to ``count`` frames of a video, evenly spread; the others are decoded but not kept.

    Raises:
        DataError: The file is no readable video.
    """
    import av

    try:
        with av.open(str(path)) as container:
            total = container.streams.video[0].frames
            total = total or sum(1 for _ in container.decode(video=0))
        wanted = set(frame_indices(total, count))
        with av.open(str(path)) as container:
            decoded = enumerate(container.decode(video=0))
            return [frame.to_image() for number, frame in decoded if number in wanted]
    except (av.FFmpegError, IndexError) as error:
        raise DataError(f"{path} is no readable video: {error}") from None


def pictures(
    media: Sequence[Media],
    root: Path,
    *,
    side: int = MAX_SIDE_PX,
    marks: Sequence[Mapping[str, Any]] = (),
) -> list[tuple[str, str]]:
    """``(name, data URI)`` of up to eight frames per medium; an empty URI marks a missing file."""
    from PIL import Image

    found: list[tuple[str, str]] = []
    for index, medium in enumerate(media):
        own = [mark for mark in marks if mark["image"] == index]
        try:
            if medium.data is not None:
                found.append((medium.path, _encode(Image.open(io.BytesIO(medium.data)), side)))
                continue
            path = safe_path(root, medium.path, allow_absolute=True)
            if medium.frames:
                for i in frame_indices(len(medium.frames), MAX_FRAMES):
                    name = medium.frames[i]
                    on_frame = [mark for mark in marks if mark["image"] == i]
                    with Image.open(path / name) as image:
                        found.append((f"{medium.path}/{name}", _encode(image, side, on_frame)))
            elif path.suffix.lower() in VIDEO_SUFFIXES:
                frames = video_pictures(path, MAX_FRAMES)
                found += [(medium.path, _encode(frame, side)) for frame in frames]
            else:
                with Image.open(path) as image:
                    found.append((medium.path, _encode(image, side, own)))
        except (OSError, DataError, ValueError):
            found.append((medium.path, ""))
    return found


def tiles(
    media: Sequence[Media],
    root: Path,
    *,
    side: int = MAX_SIDE_PX,
    marks: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Pictures as HTML; a missing file is a grey tile with its path."""
    parts = []
    for name, uri in pictures(media, root, side=side, marks=marks):
        if uri:
            parts.append(f'<img src="{uri}" alt="{html.escape(name)}" loading="lazy">')
        else:
            parts.append(f'<span class="missing">missing<br>{html.escape(name)}</span>')
    return f'<div class="tiles">{"".join(parts)}</div>' if parts else ""
