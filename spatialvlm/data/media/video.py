"""Videos: frame index, frame choice, and exact decoding with PyAV.

Frame ``i`` is the i-th frame in presentation order, as found by a demux pass over the packets; the
frame count a container claims is never used. All requested frames are delivered or none.
"""

from __future__ import annotations

import bisect
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spatialvlm.errors import MediaError

if TYPE_CHECKING:
    from spatialvlm.typing import UInt8Array

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm"})


@dataclass(frozen=True, slots=True)
class VideoHeader:
    """Everything about a video that can be known without decoding it."""

    size: tuple[int, int]
    """(height, width) in pixels, display rotation applied."""
    fps: float
    """Average rate of the stream."""
    pts: tuple[int, ...]
    """Presentation time of every frame, ascending, in stream ticks."""
    keyframes: tuple[int, ...]
    """Presentation times at which decoding can start."""
    seconds_per_tick: float

    @property
    def num_frames(self) -> int:
        """Number of frames."""
        return len(self.pts)

    def seconds(self) -> np.ndarray[Any, Any]:
        """Time of every frame after the first, in seconds."""
        ticks = np.asarray(self.pts, dtype=np.float64)
        result: np.ndarray[Any, Any] = (ticks - ticks[0]) * self.seconds_per_tick
        return result


def read_video_header(data: bytes | Path, *, name: str = "") -> VideoHeader:
    """Index the frames of a video by one demux pass; the first frame is decoded for its rotation.

    Raises:
        MediaError: ``missing``, ``not_an_image`` (no container), ``no_frames`` (no video stream, or an
            empty one).
    """
    name = name or (str(data) if isinstance(data, Path) else "video")
    with _open(data, name) as container, _explained(name, "no_frames"):
        stream = container.streams.video[0]
        times: list[tuple[int, bool]] = []
        for packet in container.demux(stream):
            pts = packet.pts if packet.pts is not None else packet.dts
            if packet.size and pts is not None and not packet.is_discard:
                times.append((pts, packet.is_keyframe))
        if not times:
            raise MediaError(f"{name} has a video stream without frames", reason="no_frames")
        height, width = stream.codec_context.height, stream.codec_context.width
        if _first_rotation(container, stream, name) % 180 == 90:
            height, width = width, height
        rate = stream.average_rate or stream.guessed_rate or stream.base_rate
        tick = float(stream.time_base)
    times.sort()
    pts_all = tuple(dict.fromkeys(pts for pts, _ in times))
    if rate:
        fps = float(rate)
    else:
        span = (pts_all[-1] - pts_all[0]) * tick
        fps = (len(pts_all) - 1) / span if span > 0 else 1.0
    return VideoHeader((height, width), fps, pts_all, tuple(pts for pts, key in times if key), tick)


def decode_video(
    data: bytes | Path, header: VideoHeader, frames: Sequence[int], *, name: str = ""
) -> UInt8Array:
    """Decode exactly the given frames to RGB uint8 ``[S, H, W, 3]``, in the given order.

    Decoding runs forward; it seeks when a keyframe lies between the current frame and the next wanted
    one, which gives the same frames as decoding from the start.

    Raises:
        MediaError: ``frame_decode`` when any wanted frame cannot be decoded.
    """
    name = name or (str(data) if isinstance(data, Path) else "video")
    wanted = sorted({header.pts[i] for i in frames})
    found: dict[int, UInt8Array] = {}
    with _open(data, name) as container, _explained(name, "frame_decode"):
        stream = container.streams.video[0]
        current: int | None = None
        decoder: Iterator[tuple[int, Any]] = iter(())
        for target in wanted:
            at = bisect.bisect_right(header.keyframes, target) - 1
            keyframe = header.keyframes[at] if at >= 0 else None
            if (
                keyframe is not None
                and (current is None or keyframe > current)
                and keyframe > header.pts[0]
            ):
                container.seek(keyframe, stream=stream, backward=True)
                decoder = _frames(container, stream)
            elif current is None:
                decoder = _frames(container, stream)
            for pts, frame in decoder:
                current = pts
                if pts == target:
                    found[target] = _upright(frame)
                if pts >= target:
                    break
            if target not in found:
                raise MediaError(
                    f"{name}: frame {bisect.bisect_left(header.pts, target)} of {header.num_frames} cannot be decoded; "
                    "the file is cut off or damaged",
                    reason="frame_decode",
                )
    shapes = {frame.shape for frame in found.values()}
    if len(shapes) > 1:
        raise MediaError(f"{name} changes its frame size: {sorted(shapes)}", reason="frame_size")
    return np.stack([found[header.pts[i]] for i in frames])


def choose_uniform(num_candidates: int, num_frames: int) -> tuple[int, ...]:
    """``num_frames`` evenly spaced indices, both ends included; all of them when there are fewer."""
    count = min(num_frames, num_candidates)
    return tuple(int(i) for i in np.linspace(0, num_candidates - 1, count, dtype=int))


def choose_by_rate(seconds: Sequence[float], fps: float, max_frames: int) -> tuple[int, ...]:
    """The last frame at or before each multiple of ``1/fps``, at most ``max_frames`` of them.

    Args:
        seconds: Ascending frame times.
        fps: Wanted frames per second.
        max_frames: Longer choices are thinned evenly, both ends kept.
    """
    times = np.asarray(seconds, dtype=np.float64) - seconds[0]
    targets = np.arange(int(times[-1] * fps + 1e-9) + 1) / fps
    picked = np.unique(np.searchsorted(times, targets + 1e-9, side="right") - 1)
    if len(picked) > max_frames:
        picked = picked[np.linspace(0, len(picked) - 1, max_frames, dtype=int)]
    return tuple(int(i) for i in picked)


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort key that puts ``frame_10`` after ``frame_9``."""
    return [
        (0, int(part), "") if part.isdecimal() else (1, 0, part)
        for part in re.split(r"(\d+)", name)
        if part
    ]


def list_frames(folder: Path) -> list[str]:
    """Names of the images of a frame folder in natural order.

    Raises:
        MediaError: ``missing`` or ``no_frames``.
    """
    if not folder.is_dir():
        raise MediaError(f"no such frame folder: {folder}", reason="missing")
    names = [entry.name for entry in folder.iterdir() if entry.suffix.lower() in IMAGE_SUFFIXES]
    if not names:
        raise MediaError(f"frame folder {folder} holds no image", reason="no_frames")
    return sorted(names, key=natural_key)


def times_from_names(names: Sequence[str]) -> tuple[float, ...] | None:
    """Seconds from names that end in a decimal number (``scan_74735.839.jpg``), relative to the first.

    None unless every name has one and they ascend; whole numbers are frame counters, not times.
    """
    matches = [re.search(r"(\d+\.\d+)$", Path(name).stem) for name in names]
    if not matches or any(match is None for match in matches):
        return None
    times = [float(match[1]) for match in matches if match is not None]
    if any(b <= a for a, b in pairwise(times)):
        return None
    return tuple(round(t - times[0], 6) for t in times)


def _open(data: bytes | Path, name: str) -> Any:
    import av

    try:
        container = av.open(io.BytesIO(data) if isinstance(data, bytes) else str(data))
    except FileNotFoundError as error:
        raise MediaError(f"no such file: {name}", reason="missing") from error
    except (av.FFmpegError, OSError, ValueError) as error:
        raise MediaError(
            f"{name} is not a video FFmpeg can open: {error}", reason="not_an_image"
        ) from error
    if not container.streams.video:
        container.close()
        raise MediaError(f"{name} has no video stream", reason="no_frames")
    if container.streams.video[0].codec_context is None:
        container.close()
        raise MediaError(
            f"{name} uses a codec that FFmpeg does not know; re-encode it", reason="frame_decode"
        )
    container.streams.video[0].thread_type = "NONE"
    return container


def _first_rotation(container: Any, stream: Any, name: str) -> int:
    container.seek(0, stream=stream, backward=True)
    for _, frame in _frames(container, stream):
        return int(frame.rotation)
    raise MediaError(f"{name}: not a single frame can be decoded", reason="no_frames")


def _frames(container: Any, stream: Any) -> Iterator[tuple[int, Any]]:
    for frame in container.decode(stream):
        pts = frame.pts if frame.pts is not None else frame.dts
        if pts is not None and not frame.is_corrupt:
            yield pts, frame


@contextmanager
def _explained(name: str, reason: str) -> Iterator[None]:
    """FFmpeg's errors as a :class:`MediaError`."""
    import av

    try:
        yield
    except (av.FFmpegError, OverflowError, ValueError) as error:
        raise MediaError(f"{name} is cut off or damaged: {error}", reason=reason) from error


def _upright(frame: Any) -> UInt8Array:
    """RGB array of a frame, turned by its display rotation (degrees counter-clockwise)."""
    array: UInt8Array = frame.to_ndarray(format="rgb24")
    turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(array, turns)) if turns else array
