"""Small pictures of an item's media for the report, embedded as data URIs."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

from spatialvlm.errors import DataError
from spatialvlm.evaluation.prompts import frame_indices, safe_path
from spatialvlm.evaluation.schema import Media

MAX_SIDE_PX = 512
MAX_FRAMES = 8
VIDEO_SUFFIXES = (".mp4", ".mov", ".avi", ".mkv", ".webm")


def _encode(image: "object", side: int) -> str:
    from PIL import Image

    assert isinstance(image, Image.Image)
    picture = image.convert("RGB")
    picture.thumbnail((side, side))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _video_frames(path: Path, side: int) -> list[str]:
    import av

    with av.open(str(path)) as container:
        frames = [frame.to_image() for frame in container.decode(video=0)]
    return [_encode(frames[i], side) for i in frame_indices(len(frames), MAX_FRAMES)]


def pictures(
    media: Sequence[Media], root: Path, *, side: int = MAX_SIDE_PX
) -> list[tuple[str, str]]:
    """``(name, data URI)`` of up to eight frames per medium; an empty URI marks a missing file."""
    from PIL import Image

    found: list[tuple[str, str]] = []
    for medium in media:
        try:
            if medium.data is not None:
                found.append((medium.path, _encode(Image.open(io.BytesIO(medium.data)), side)))
                continue
            path = safe_path(root, medium.path, allow_absolute=True)
            if medium.frames:
                for i in frame_indices(len(medium.frames), MAX_FRAMES):
                    name = medium.frames[i]
                    with Image.open(path / name) as image:
                        found.append((f"{medium.path}/{name}", _encode(image, side)))
            elif path.suffix.lower() in VIDEO_SUFFIXES:
                found += [(medium.path, uri) for uri in _video_frames(path, side)]
            else:
                with Image.open(path) as image:
                    found.append((medium.path, _encode(image, side)))
        except (OSError, DataError, ValueError):
            found.append((medium.path, ""))
    return found


def tiles(media: Sequence[Media], root: Path, *, side: int = MAX_SIDE_PX) -> str:
    """Pictures as HTML; a missing file is a grey tile with its path."""
    parts = []
    for name, uri in pictures(media, root, side=side):
        if uri:
            parts.append(f'<img src="{uri}" alt="{html.escape(name)}" loading="lazy">')
        else:
            parts.append(f'<span class="missing">missing<br>{html.escape(name)}</span>')
    return f'<div class="tiles">{"".join(parts)}</div>' if parts else ""
