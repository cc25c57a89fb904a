"""ScanNet ``.sens`` files, version 4: jpeg colour and zlib depth with a pose per frame.

All numbers are little-endian: u32 version; u64 length and the sensor name; four 4x4 f32 matrices (colour
intrinsic, colour extrinsic, depth intrinsic, depth extrinsic); 2 x i32 compression; 4 x u32 sizes (colour
width, height, depth width, height); f32 depth shift; u64 frame count; then per frame a 4x4 f32
camera-to-world matrix, 2 x u64 timestamps (microseconds), 2 x u64 byte counts and the two blobs.
"""

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np
import numpy.typing as npt

from spatialvlm.errors import ImporterError
from spatialvlm.scenes.transforms import Array

VERSION = 4
COLOR_JPEG, DEPTH_ZLIB_USHORT = 2, 1
MAX_BLOB_BYTES = 64 * 2**20


@dataclass(frozen=True, eq=False)
class SensFrame:
    """One frame; the blobs are still compressed."""

    index: int
    world_from_cam: Array
    """``[4, 4]``; -inf when tracking was lost."""
    color_time_us: int
    jpeg: bytes
    depth_zlib: bytes


class SensReader:
    """Reads a ``.sens`` file frame by frame.

    Raises:
        ImporterError: Another version or compression, or the file ends early (with the offset).
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: BinaryIO = self.path.open("rb")
        (version,) = self._unpack("<I")
        if version != VERSION:
            raise ImporterError(f"{self.path}: .sens version {version}, expected {VERSION}.")
        (length,) = self._unpack("<Q")
        self.sensor = self._read(min(length, 4096)).decode("utf-8", "replace")
        self.color_intrinsics, self.color_extrinsics = self._matrix(), self._matrix()
        self.depth_intrinsics, self.depth_extrinsics = self._matrix(), self._matrix()
        compression = self._unpack("<2i")
        if compression != (COLOR_JPEG, DEPTH_ZLIB_USHORT):
            raise ImporterError(
                f"{self.path}: compression {compression}, expected jpeg colour and zlib depth "
                f"{(COLOR_JPEG, DEPTH_ZLIB_USHORT)}."
            )
        sizes = self._unpack("<4I")
        self.color_size, self.depth_size = (sizes[0], sizes[1]), (sizes[2], sizes[3])
        """``(width, height)``."""
        (self.depth_shift,) = self._unpack("<f")
        (self.num_frames,) = self._unpack("<Q")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[SensFrame]:
        for index in range(self.num_frames):
            pose = self._matrix()
            color_time, _, color_bytes, depth_bytes = self._unpack("<4Q")
            if max(color_bytes, depth_bytes) > MAX_BLOB_BYTES:
                raise ImporterError(
                    f"{self.path}: frame {index} claims {max(color_bytes, depth_bytes)} bytes at offset "
                    f"{self._file.tell()}; the file is damaged."
                )
            yield SensFrame(
                index, pose, color_time, self._read(color_bytes), self._read(depth_bytes)
            )

    def decode_depth(self, frame: SensFrame) -> npt.NDArray[np.uint16]:
        """Raw depth ``[H, W]``; metres = value / ``depth_shift``."""
        width, height = self.depth_size
        try:
            data = zlib.decompress(frame.depth_zlib)
        except zlib.error as error:
            raise ImporterError(
                f"{self.path}: depth of frame {frame.index} is damaged: {error}."
            ) from error
        if len(data) != 2 * width * height:
            raise ImporterError(
                f"{self.path}: depth of frame {frame.index} has {len(data)} bytes, expected "
                f"{2 * width * height} for {width}x{height}."
            )
        return np.frombuffer(data, dtype="<u2").reshape(height, width)

    def _read(self, count: int) -> bytes:
        data = self._file.read(count)
        if len(data) != count:
            raise ImporterError(
                f"{self.path}: ends at offset {self._file.tell()}, {count - len(data)} bytes too early. "
                "Download it again."
            )
        return data

    def _unpack(self, layout: str) -> tuple[int, ...]:
        return struct.unpack(layout, self._read(struct.calcsize(layout)))

    def _matrix(self) -> Array:
        return np.frombuffer(self._read(64), dtype="<f4").reshape(4, 4).astype(np.float64)
