"""Access to the media of one source: headers and decoded frames, both kept for a while."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from spatialvlm.data.media import paths
from spatialvlm.data.media.image import MAX_IMAGE_PIXELS, decode_image, read_image_header
from spatialvlm.data.media.plan import MediaHeader
from spatialvlm.data.media.torchcodec import decode_with_torchcodec
from spatialvlm.data.media.video import (
    VideoHeader,
    decode_video,
    list_frames,
    read_video_header,
    times_from_names,
)
from spatialvlm.data.sample import MediaRef
from spatialvlm.errors import MediaError

if TYPE_CHECKING:
    from spatialvlm.typing import UInt8Array

ReadBytes = Callable[[MediaRef], list[bytes]]


@dataclass
class FrameCache:
    """Decoded source frames, least recently used dropped first.

    Attributes:
        max_bytes: Capacity; one item larger than it is never kept.
        decoded: How many media were decoded, for tests and logs.
    """

    max_bytes: int = 256 << 20
    decoded: int = 0
    _items: OrderedDict[tuple[str, MediaRef], UInt8Array] = field(default_factory=OrderedDict)
    _bytes: int = 0

    def get(self, key: tuple[str, MediaRef], decode: Callable[[], UInt8Array]) -> UInt8Array:
        """Frames of a medium, decoded on a miss."""
        if key in self._items:
            self._items.move_to_end(key)
            return self._items[key]
        frames = decode()
        self.decoded += 1
        self._items[key] = frames
        self._bytes += frames.nbytes
        while self._bytes > self.max_bytes:
            self._bytes -= self._items.popitem(last=False)[1].nbytes
        return frames


class MediaStore:
    """Reads the media of one source.

    Args:
        root: Folder no path may leave.
        read_bytes: Bytes of media inside a tar shard or an Arrow cell, one entry per file or frame.
        cache: Decoded frames, shared by the stores of a process.
        allow_absolute: See :func:`~spatialvlm.data.media.paths.resolve`.
        allow_outside_root: The same.
        max_image_pixels: Larger images are refused on their header.
        frame_dir_fps: Rate of frame folders whose names carry no times.
        video_backend: What decodes video files; headers always come from PyAV.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        read_bytes: ReadBytes | None = None,
        cache: FrameCache | None = None,
        allow_absolute: bool = False,
        allow_outside_root: bool = False,
        max_image_pixels: int = MAX_IMAGE_PIXELS,
        frame_dir_fps: float = 1.0,
        video_backend: Literal["pyav", "torchcodec"] = "pyav",
    ) -> None:
        self.root = Path(root)
        self.read_bytes = read_bytes
        self.cache = cache if cache is not None else FrameCache()
        self.allow_absolute = allow_absolute
        self.allow_outside_root = allow_outside_root
        self.max_image_pixels = max_image_pixels
        self.frame_dir_fps = frame_dir_fps
        self._decode_video = decode_video if video_backend == "pyav" else decode_with_torchcodec
        self._headers: OrderedDict[MediaRef, MediaHeader] = OrderedDict()
        self._video_headers: OrderedDict[MediaRef, VideoHeader] = OrderedDict()

    def header(self, ref: MediaRef, stamps_s: tuple[float, ...] | None = None) -> MediaHeader:
        """Size, frame count and times of a medium, without decoding its pixels.

        Args:
            ref: The medium; its ``frames`` and ``clip_s`` do not matter here.
            stamps_s: Known times of the frames of a folder; default: from the names, else assumed.

        Raises:
            MediaError: See :func:`~spatialvlm.data.media.image.read_image_header` and
                :func:`~spatialvlm.data.media.video.read_video_header`.
        """
        if stamps_s is not None:
            return self._read_header(ref, stamps_s)
        key = MediaRef(ref.kind, ref.store, ref.path, ref.member)
        if key not in self._headers:
            self._headers[key] = self._read_header(key, None)
            if len(self._headers) > 65_536:
                self._headers.popitem(last=False)
        return self._headers[key]

    def load(self, ref: MediaRef) -> UInt8Array:
        """Source frames of a medium, RGB uint8 ``[S, H, W, 3]``, upright, not resized.

        Args:
            ref: With exact ``frames`` when it is a video.

        Raises:
            MediaError: A frame is missing or broken; nothing is replaced.
        """
        return self.cache.get((str(self.root), ref), lambda: self._decode(ref))

    def _resolve(self, path: str) -> Path:
        return paths.resolve(
            self.root,
            "",
            path,
            allow_absolute=self.allow_absolute,
            allow_outside_root=self.allow_outside_root,
        )

    def _data(self, ref: MediaRef) -> bytes | Path:
        """What to decode: a file, or the bytes of one file."""
        if ref.store in ("tar", "cell"):
            return self._embedded(ref)[0]
        path = self._resolve(ref.path)
        try:
            empty = path.is_file() and path.stat().st_size == 0
        except OSError as error:  # a folder without permission
            raise MediaError(
                f"{str(path)[:200]} cannot be read: {error.strerror}", reason="missing"
            ) from error
        if not path.is_file():
            raise paths.missing(path)
        if empty:
            raise MediaError(f"{path} is empty", reason="not_an_image")
        return path

    def _embedded(self, ref: MediaRef) -> list[bytes]:
        assert self.read_bytes is not None, f"the source at {self.root} holds no embedded media"
        return self.read_bytes(ref)

    def _frames(self, ref: MediaRef) -> list[bytes | str] | None:
        """Bytes or paths of a video that is stored as images; None for a video file."""
        if ref.store == "frames":
            return [f"{ref.path}/{name}" for name in self._frame_names(ref)]
        if ref.store in ("tar", "cell") and "\n" in ref.member:
            return list(self._embedded(ref))
        return None

    def _frame(self, frame: bytes | str) -> bytes | Path:
        """What to decode; the path of a single frame may be a link and must not leave the root either."""
        return self._resolve(frame) if isinstance(frame, str) else frame

    def _frame_names(self, ref: MediaRef) -> list[str]:
        if ref.member:
            names = ref.member.split("\n")
            for name in names:
                paths.check_name(name)
                if "/" in name and ".." in Path(name).parts:
                    raise MediaError(
                        f"frame name {name!r} leaves its folder", reason="refused_path"
                    )
            return names
        return list_frames(self._resolve(ref.path))

    def _read_header(self, ref: MediaRef, stamps_s: tuple[float, ...] | None) -> MediaHeader:
        name = _name(ref)
        if ref.kind == "image":
            image = read_image_header(self._data(ref), max_pixels=self.max_image_pixels, name=name)
            return MediaHeader(image.size, animated=image.animated)
        frames = self._frames(ref)
        if frames is None:
            video = self._video_header(ref)
            stamps = tuple(i / video.fps for i in range(video.num_frames))
            return MediaHeader(
                video.size, video.num_frames, video.fps, tuple(video.seconds().tolist()), stamps
            )
        size = read_image_header(self._frame(frames[0]), max_pixels=self.max_image_pixels).size
        stamps = stamps_s or times_from_names(self._frame_names(ref)) or ()
        assumed = not stamps
        if assumed:
            stamps = tuple(i / self.frame_dir_fps for i in range(len(frames)))
        if len(stamps) != len(frames):
            raise MediaError(
                f"{name} holds {len(frames)} frames but the row gives {len(stamps)} times",
                reason="no_frames",
            )
        span = stamps[-1] - stamps[0]
        fps = (len(stamps) - 1) / span if span > 0 else self.frame_dir_fps
        return MediaHeader(
            size, len(frames), fps, tuple(t - stamps[0] for t in stamps), stamps, assumed
        )

    def _video_header(self, ref: MediaRef) -> VideoHeader:
        key = MediaRef(ref.kind, ref.store, ref.path, ref.member)
        if key not in self._video_headers:
            self._video_headers[key] = read_video_header(self._data(ref), name=_name(ref))
            if len(self._video_headers) > 256:
                self._video_headers.popitem(last=False)
        return self._video_headers[key]

    def _decode(self, ref: MediaRef) -> UInt8Array:
        if ref.kind == "image":
            return decode_image(self._data(ref), max_pixels=self.max_image_pixels, name=_name(ref))[
                None
            ]
        assert ref.frames, "frames are chosen before decoding"
        frames = self._frames(ref)
        if frames is None:
            return self._decode_video(
                self._data(ref), self._video_header(ref), ref.frames, name=_name(ref)
            )
        images = [
            decode_image(self._frame(frames[i]), max_pixels=self.max_image_pixels)
            for i in ref.frames
        ]
        shapes = sorted({image.shape[:2] for image in images})
        if len(shapes) > 1:
            raise MediaError(
                f"frames of {_name(ref)} have different sizes: {shapes[0]} and {shapes[-1]}; list them as images",
                reason="frame_size",
            )
        return np.stack(images)


def _name(ref: MediaRef) -> str:
    return f"{ref.path}:{ref.member}" if ref.member and ref.store != "frames" else ref.path
