"""Still images: size from the header, pixels as RGB uint8."""

from __future__ import annotations

import io
import struct
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from spatialvlm.errors import MediaError

if TYPE_CHECKING:
    from spatialvlm.typing import UInt8Array

MAX_IMAGE_PIXELS = 89_478_485
"""Default limit, Pillow's own warning level."""
MAX_ASPECT = 200.0
"""Longer over shorter side; the limit of the Qwen processors."""
_HEADER_BYTES = 65_536
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error)
"""What Pillow raises on damaged files."""
_EXIF_ORIENTATION = 0x0112
_TURNED = frozenset({5, 6, 7, 8})  # EXIF orientations that swap height and width


class ImageHeader(NamedTuple):
    """What is known of an image before its pixels are decoded."""

    size: tuple[int, int]
    """(height, width) after EXIF orientation."""
    animated: bool = False
    """It holds several frames; only the first is used."""


def read_image_header(
    data: bytes | Path, *, max_pixels: int = MAX_IMAGE_PIXELS, name: str = ""
) -> ImageHeader:
    """Size of an image, from at most 64 KiB where possible.

    Args:
        data: Encoded bytes or a file.
        max_pixels: Larger images are refused before anything is decoded.
        name: How errors call the image; default: the path.

    Raises:
        MediaError: ``missing``, ``not_an_image``, ``too_many_pixels``, ``aspect``.
    """
    name = name or (str(data) if isinstance(data, Path) else "image")
    head = data[:_HEADER_BYTES] if isinstance(data, bytes) else _read_head(data)
    size, animated = _jpeg_size(head) or _png_size(head), False
    if size is None:
        with _open(data, name) as image:
            turned = image.getexif().get(_EXIF_ORIENTATION, 1) in _TURNED
            size = (image.width, image.height) if turned else (image.height, image.width)
            _check_size(size, max_pixels, name)
            animated = _is_animated(image)
    _check_size(size, max_pixels, name)
    return ImageHeader(size, animated)


def decode_image(
    data: bytes | Path, *, max_pixels: int = MAX_IMAGE_PIXELS, name: str = ""
) -> UInt8Array:
    """Decode to RGB uint8 ``[H, W, 3]``.

    EXIF orientation is applied, transparency is put on white, palettes, CMYK and 1-bit images are
    converted, 16-bit greys are scaled by 1/257; of an animation the first frame is taken.

    Raises:
        MediaError: ``missing``, ``not_an_image``, ``truncated``, ``too_many_pixels``, ``aspect``.
    """
    name = name or (str(data) if isinstance(data, Path) else "image")
    with _open(data, name) as image:
        _check_size((image.height, image.width), max_pixels, name)
        try:
            image.load()
        except _DAMAGED as error:
            raise MediaError(
                f"{name} is cut off or damaged: {error}", reason="truncated"
            ) from error
        return np.array(_to_rgb(ImageOps.exif_transpose(image), name), dtype=np.uint8)


def _open(data: bytes | Path, name: str) -> Image.Image:
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    try:
        with warnings.catch_warnings():
            # Our own limit is checked on the header right after opening.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(data) if isinstance(data, bytes) else data)
    except FileNotFoundError as error:
        raise MediaError(f"no such file: {name}", reason="missing") from error
    except Image.DecompressionBombError as error:
        raise MediaError(f"{name}: {error}", reason="too_many_pixels") from error
    except UnidentifiedImageError as error:
        raise MediaError(
            f"{name} is not an image (or of a format Pillow cannot read)", reason="not_an_image"
        ) from error
    except _DAMAGED as error:
        raise MediaError(f"{name} has a damaged header: {error}", reason="truncated") from error


def _is_animated(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except _DAMAGED:  # behind the first frame, which is the only one used
        return False


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    mode = image.mode
    if mode == "RGB":
        return image
    if mode == "F":
        raise MediaError(
            f"{name} holds 32-bit floats, which have no fixed range; convert it to 8 or 16 bit",
            reason="not_an_image",
        )
    if mode.startswith("I"):
        grey = np.clip(np.round(np.asarray(image).astype(np.float64) / 257), 0, 255)
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _check_size(size: tuple[int, int], max_pixels: int, name: str) -> None:
    height, width = size
    if height < 1 or width < 1:
        raise MediaError(f"{name} is {height} x {width} pixels", reason="not_an_image")
    if height * width > max_pixels:
        raise MediaError(
            f"{name} is {height} x {width} = {height * width} pixels, more than data.media.max_image_pixels={max_pixels}",
            reason="too_many_pixels",
        )
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise MediaError(
            f"{name} is {height} x {width}: one side is over 200 times the other", reason="aspect"
        )


def _read_head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_HEADER_BYTES)
    except FileNotFoundError as error:
        raise MediaError(f"no such file: {path}", reason="missing") from error
    except OSError as error:
        raise MediaError(f"cannot read {path}: {error}", reason="missing") from error


def _png_size(head: bytes) -> tuple[int, int] | None:
    """Size of a PNG, or None when it is none, carries an orientation before its pixels, or is animated."""
    if not head.startswith(b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR") or len(head) < 33:
        return None
    width, height = struct.unpack(">II", head[16:24])
    at = 33
    while at + 8 <= len(head):
        (length,) = struct.unpack(">I", head[at : at + 4])
        kind = head[at + 4 : at + 8]
        if kind == b"IDAT":
            return height, width
        if kind in (b"eXIf", b"acTL"):
            return None
        at += 12 + length
    return None


def _jpeg_size(head: bytes) -> tuple[int, int] | None:
    """Size of a JPEG after EXIF orientation, or None when the header is unusual or not complete."""
    if not head.startswith(b"\xff\xd8"):
        return None
    at, turned = 2, False
    while at + 9 <= len(head):
        if head[at] != 0xFF:
            return None
        marker = head[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker in (0x01, *range(0xD0, 0xD8)):  # markers without a body
            at += 2
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack(">HH", head[at + 5 : at + 9])
            if height == 0 or width == 0:
                return None
            return (width, height) if turned else (height, width)
        if marker in (0xD9, 0xDA):
            return None
        (length,) = struct.unpack(">H", head[at + 2 : at + 4])
        body = head[at + 4 : at + 2 + length]
        if marker == 0xE1 and body.startswith(b"Exif\0\0"):
            if len(body) < length - 2:
                return None
            exif = Image.Exif()
            try:
                exif.load(body)
                turned = exif.get(_EXIF_ORIENTATION, 1) in _TURNED
            except (SyntaxError, struct.error, ValueError, KeyError, TypeError):
                return None
        at += 2 + length
    return None
