"""Decoding with torchcodec instead of PyAV: the same frames by presentation time, from the same header."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spatialvlm.data.media.video import VideoHeader
from spatialvlm.errors import ConfigError, MediaError

if TYPE_CHECKING:
    from spatialvlm.typing import UInt8Array


def load_torchcodec() -> Any:
    """The module ``torchcodec.decoders``.

    Raises:
        ConfigError: The package, or the FFmpeg libraries it loads, are missing.
    """
    try:
        return importlib.import_module("torchcodec.decoders")
    except (ImportError, RuntimeError, OSError) as error:
        raise ConfigError(
            "data.media.video_backend: torchcodec cannot be loaded "
            f"({str(error).strip().splitlines()[0][:160]}). Install torchcodec and the shared libraries of FFmpeg, or "
            "set pyav."
        ) from error


def decode_with_torchcodec(
    data: bytes | Path, header: VideoHeader, frames: Sequence[int], *, name: str = ""
) -> UInt8Array:
    """What :func:`~spatialvlm.data.media.video.decode_video` returns.

    A frame is asked for by its time and must come back with that time, so what counts as frame ``i`` is
    decided by the header alone.

    Raises:
        MediaError: ``frame_decode`` when any wanted frame cannot be decoded.
        ConfigError: torchcodec is not installed.
    """
    name = name or (str(data) if isinstance(data, Path) else "video")
    decoders = load_torchcodec()
    tick = header.seconds_per_tick
    wanted = np.array([header.pts[i] * tick for i in frames])
    try:
        decoder = decoders.VideoDecoder(
            data if isinstance(data, bytes) else str(data),
            dimension_order="NHWC",
            seek_mode="exact",
            num_ffmpeg_threads=1,
        )
        found = decoder.get_frames_played_at((wanted + tick / 2).tolist())
    except (RuntimeError, ValueError, IndexError) as error:
        raise MediaError(
            f"{name} is cut off or damaged: {str(error).splitlines()[0][:160]}",
            reason="frame_decode",
        ) from error
    apart = np.flatnonzero(np.abs(found.pts_seconds.numpy() - wanted) > tick / 2)
    pixels: UInt8Array = found.data.numpy()
    if len(apart) or pixels.shape[1:3] != header.size:
        at = int(apart[0]) if len(apart) else 0
        raise MediaError(
            f"{name}: torchcodec gives frame {frames[at]} as {pixels.shape[1]}x{pixels.shape[2]} at "
            f"{float(found.pts_seconds[at]):.4f} s, expected {header.size[0]}x{header.size[1]} at {wanted[at]:.4f} s; "
            "set data.media.video_backend: pyav",
            reason="frame_decode",
        )
    return pixels
