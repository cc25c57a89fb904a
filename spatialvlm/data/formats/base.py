"""What a reader gets and gives: source attributes, the place of a row, and the format record."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from spatialvlm.data.sample import CoordConvention, MediaRef, Sample
from spatialvlm.errors import DataError

Row = Mapping[str, Any]

VIDEO_SUFFIXES = frozenset(
    [
        ".mp4",
        ".avi",
        ".mov",
        ".mkv",
        ".webm",
        ".m4v",
        ".mpg",
        ".mpeg",
        ".gif",
        ".wmv",
        ".flv",
        ".ts",
        ".3gp",
        ".ogv",
    ]
)
IMAGE_SUFFIXES = frozenset(
    [".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"]
)


@dataclass(frozen=True, slots=True)
class SourceAttrs:
    """Settings of one source that decide how its rows are read. None = the format's preset."""

    name: str
    family: str
    base: str = "."
    """Folder of relative media paths, below the source root."""
    coords: CoordConvention | None = None
    geometry: Literal["auto", "on", "off"] = "auto"
    pinned: bool = False
    same_scene: bool | None = None
    answers: Literal["first", "cycle", "all"] = "first"
    fixes: tuple[str, ...] = ()
    normalize_marker: Literal["keep", "front"] = "keep"
    media_template: str | None = None
    """Media of formats that name only a scene, as in ``"scannet/{scene_id}"``."""
    capability_map: Mapping[str, str] | None = None
    exclude_prefixes: tuple[str, ...] = ()
    """Rows whose media file, folder, or scene name starts with one of these are left out, counted."""


class Place(NamedTuple):
    """Where a row stands, for uids and messages."""

    file: str = ""
    """Path relative to the source root."""
    stem: str = "row"
    row: int = 0
    epoch: int = 0
    """Pass over the source, for ``answers: cycle``."""
    sub: int = -1
    """Number inside a list row; -1 = the row is no list."""

    def __str__(self) -> str:
        sub = f".{self.sub}" if self.sub >= 0 else ""
        if self.file.endswith(".jsonl"):  # one row per line, which editors count from 1
            return f"{self.file}:{self.row + 1}" + (f" item {self.sub}" if sub else "")
        return f"row {self.row}{sub} of {self.file or self.stem}"

    def error(self, reason: str, text: str) -> DataError:
        """A :class:`DataError` that opens with this place."""
        return DataError(f"{self} {text}", reason=reason)

    def uid(self, source: str, k: int = -1) -> str:
        """``<source>/<stem>#<row>[.<sub>][.<k>]``."""
        uid = f"{source}/{self.stem}#{self.row}"
        if self.sub >= 0:
            uid += f".{self.sub}"
        return uid if k < 0 else f"{uid}.{k}"


@dataclass(frozen=True, slots=True)
class Format:
    """One entry of the registry."""

    name: str
    shape: str
    """Formats of one shape are read by the same normaliser; they differ in presets only."""
    match: Callable[[Row], int]
    """2 = surely a row of this format, 1 = compatible with it, 0 = not one."""
    read: Callable[[Row, SourceAttrs, Place, Format], list[Sample]]
    coords: CoordConvention = "none"
    same_scene: bool = False
    capability_keys: tuple[str, ...] = ("question_type", "task", "type")
    version: int = 1
    """Raised when the same row would give other samples; part of every index key."""
    exact: bool = False
    """Rows were verified when written: no fault is tolerated."""
    extra: Mapping[str, Any] = field(default_factory=dict)


def media_path(base: str, path: str) -> str:
    """Path relative to the source root, without ``.`` and ``x/..``.

    Whether it may be opened is decided where it is opened.
    """
    if "://" in path or path.startswith(("/", "data:")):
        return path
    if base != ".":
        path = f"{base}/{path}"
    if "./" in path or "//" in path or path.endswith(("/.", "/..")):
        return posixpath.normpath(path)
    return path.rstrip("/")


def suffix(path: str) -> str:
    """Lower-case extension of the last path part, with its dot; empty without one."""
    dot = path.rfind(".")
    return path[dot:].lower() if dot > path.rfind("/") else ""


def video_ref(
    base: str,
    path: str | Sequence[str],
    place: Place,
    clip: tuple[float, float] | None = None,
) -> MediaRef:
    """A video given as a file, a folder of frames, or a list of frame files."""
    if isinstance(path, str):
        path = media_path(base, path)
        store: Literal["file", "frames"] = "file" if suffix(path) in VIDEO_SUFFIXES else "frames"
        return MediaRef("video", store, path, clip_s=clip)
    files = [media_path(base, p) for p in path]
    if len({f.startswith("/") for f in files}) > 1:
        raise place.error("schema", f"mixes absolute and relative paths of frames: {files[:2]}.")
    folder = posixpath.commonpath([posixpath.dirname(f) for f in files]) or "."
    start = 0 if folder == "." else len(folder.rstrip("/")) + 1
    return MediaRef("video", "frames", folder, "\n".join(f[start:] for f in files), clip_s=clip)
