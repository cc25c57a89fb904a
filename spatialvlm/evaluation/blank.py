"""Grey stand-ins of media for ``media=blank``: the same sizes and frame counts without content."""

import hashlib
import io
import os
import threading
from collections.abc import Sequence
from pathlib import Path

from spatialvlm.errors import MediaError

GREY = (128, 128, 128)
VIDEO_SUFFIXES = (".mp4", ".mov", ".avi", ".mkv", ".webm")


def _grey(size: tuple[int, int], path: Path) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    # Other threads and processes may read or write the same picture.
    partial = path.with_name(f"{os.getpid()}-{threading.get_ident()}-{path.name}")
    Image.new("RGB", size, GREY).save(partial)
    partial.replace(path)


def blank_copy(source: str | bytes, names: Sequence[str], scratch: Path) -> Path:
    """A grey picture, a folder of grey frames, or a folder with one grey frame per frame of a video file.

    Args:
        source: Path of a picture, video or frame folder, or the bytes of a picture.
        names: Frame file names if ``source`` is a folder.
        scratch: Where the copies go.

    Raises:
        MediaError: The source cannot be read.
    """
    from PIL import Image

    key = source if isinstance(source, bytes) else f"{source}|{'|'.join(names)}".encode()
    target = scratch / hashlib.sha256(key).hexdigest()[:24]
    try:
        if isinstance(source, bytes):
            with Image.open(io.BytesIO(source)) as image:
                _grey(image.size, target.with_suffix(".png"))
            return target.with_suffix(".png")
        if names:
            for name in names:
                with Image.open(Path(source) / name) as image:
                    _grey(image.size, target / name)
            return target
        if source.lower().endswith(VIDEO_SUFFIXES):
            size, count = _video_shape(source)
            for number in range(count):
                _grey(size, target / f"{number:06d}.png")
            return target
        with Image.open(source) as image:
            _grey(image.size, target.with_suffix(".png"))
        return target.with_suffix(".png")
    except OSError as error:
        raise MediaError(f"{source!r} cannot be read: {error}") from None


def _video_shape(source: str) -> tuple[tuple[int, int], int]:
    """Width and height, and the number of frames."""
    import av

    try:
        with av.open(source) as container:
            if not container.streams.video:
                raise MediaError(f"{source!r} has no video stream")
            stream = container.streams.video[0]
            size = stream.width, stream.height
            return size, stream.frames or sum(1 for _ in container.decode(video=0))
    except av.FFmpegError as error:  # broken data is no OSError
        raise MediaError(f"{source!r} cannot be read: {error}") from None
