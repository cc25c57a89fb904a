"""Scene records, schema ``scene/1``: what every importer and generator writes and every task reads.

World: right-handed, z up, metres. Cameras: OpenCV. Paths are relative to :attr:`Scene.root`.
The attribute names are the keys on disk; keys this version does not know survive in ``extra``.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from spatialvlm.errors import BoxError, SceneError, SceneSchemaError
from spatialvlm.scenes.boxes import Box, Symmetry
from spatialvlm.scenes.cameras import Camera
from spatialvlm.scenes.transforms import Array

SCHEMA = "scene/1"
SOURCES = (
    "scannet",
    "scannetpp",
    "arkitscenes",
    "3rscan",
    "matterport3d",
    "hypersim",
    "rooms",
    "lifted",
)

VisibilityState = Literal["visible", "ambiguous", "hidden"]
BoxQuality = Literal["exact", "annotated", "refit", "lifted"]
AreaMethod = Literal["polygon", "alpha", "given", "none"]

CLEAN_IN_FRUSTUM = 0.70
"""Least share of an object's projection inside the image for questions about it."""

STRUCTURAL_LABELS = frozenset(
    {"", "wall", "floor", "ceiling", "object", "unknown", "remove", "window frame"}
)
"""Labels that are obstacles and occluders but never the subject of a question."""


def _plain(value: Any) -> Any:
    """Arrays to nested lists; floats to nine significant digits (float32 and a little more)."""
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, float):
        return float(f"{value:.9g}")
    if isinstance(value, Record):
        return value.to_dict()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


class Record:
    """Dictionary form shared by all records of the schema."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; fields that equal ``None`` are kept, runtime-only fields are not."""
        return {
            item.name: _plain(getattr(self, item.name))
            for item in fields(self)  # type: ignore[arg-type]
            if not item.metadata.get("runtime")
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "") -> Self:
        """Build the record; keys that the schema does not know go to ``extra``.

        Raises:
            SceneSchemaError: A required key is missing.
        """
        known = {item.name for item in fields(cls) if not item.metadata.get("runtime")}  # type: ignore[arg-type]
        arguments = {key: value for key, value in values.items() if key in known}
        unknown = {key: value for key, value in values.items() if key not in known}
        if unknown and "extra" in known:
            arguments["extra"] = {**arguments.get("extra", {}), **unknown}
        try:
            return cls(**arguments)
        except TypeError as error:
            raise SceneSchemaError(f"{where or cls.__name__}: {error}.") from error


@dataclass(frozen=True, eq=False)
class Vis(Record):
    """How one object appears in one frame. Objects outside the frustum have no record."""

    obj: int
    bbox2d: tuple[float, float, float, float]
    """Tight around the visible pixels, half-open ``[x0, y0, x1, y1)``; around the clipped projection
    when no pixel is visible or pixels are unknown."""
    px: int
    """Visible pixels (exact with an instance map, estimated without)."""
    px_frac: float
    """``px`` over the pixels of the image."""
    in_frustum_frac: float
    """Share of the projected hull that lies inside the image."""
    vis_frac: float
    """Share of the object that is inside the image and not occluded."""
    state: VisibilityState
    occupancy: bool | None = None
    """Whether enough measured points lie inside the box; ``None`` = not measured."""
    trunc: bool = False
    """The projection leaves the image."""
    centroid_px: tuple[float, float] | None = None
    depth_near: float | None = None
    """10th percentile of the visible depth, metres."""
    depth_med: float | None = None
    mask_rle: dict[str, Any] | None = None
    """COCO uncompressed run lengths."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "bbox2d", tuple(self.bbox2d))
        if self.centroid_px is not None:
            object.__setattr__(self, "centroid_px", tuple(self.centroid_px))

    @property
    def clean(self) -> bool:
        """Whether questions may name this object in this frame."""
        return (
            self.state == "visible"
            and self.in_frustum_frac >= CLEAN_IN_FRUSTUM
            and self.occupancy is not False
        )


@dataclass(frozen=True, eq=False)
class Object(Record):
    """An annotated object. Its box axes are the columns of ``R``; ``size`` are full extents."""

    index: int
    id: str
    label: str
    center: Array
    size: Array
    R: Array
    raw_label: str = ""
    label_source: str = ""
    metric: bool = True
    has_front: bool = False
    """Box +x is the front."""
    symmetry: Symmetry = "c2"
    color_name: str | None = None
    caption: str | None = None
    support_parent: int | None = None
    """Index of the object this one stands on."""
    box_quality: BoxQuality = "annotated"
    confidence: float = 1.0
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("center", "size", "R"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.float64))

    @cached_property
    def box(self) -> Box:
        """The solid; a :class:`BoxError` names the object."""
        try:
            return Box(self.center, self.size, self.R)
        except BoxError as error:
            raise BoxError(f"object {self.index} ({self.id!r}, {self.label!r}): {error}") from error

    @property
    def is_target(self) -> bool:
        """Whether questions may be about this object (its label and box can be trusted)."""
        return self.label not in STRUCTURAL_LABELS and not self.extra.get("excluded")


@dataclass(frozen=True, eq=False)
class Frame(Record):
    """One posed image."""

    frame_id: str
    rgb: str | None
    width: int
    height: int
    intrinsics: Array
    world_from_cam: Array
    time_s: float | None = None
    depth: str | None = None
    depth_scale: float = 1000.0
    """Stored value / scale = metres."""
    depth_kind: Literal["z", "ray"] = "z"
    instance_map: str | None = None
    """16-bit PNG; value = object index + 1, 0 = no object."""
    visible: list[Vis] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("intrinsics", "world_from_cam"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.float64))
        visible = [v if isinstance(v, Vis) else Vis.from_dict(v, "Vis") for v in self.visible]
        object.__setattr__(self, "visible", visible)

    @cached_property
    def camera(self) -> Camera:
        """Calibrated view of the stored image."""
        return Camera(self.intrinsics, self.world_from_cam, self.width, self.height)

    @cached_property
    def _by_object(self) -> dict[int, Vis]:
        return {vis.obj: vis for vis in self.visible}

    def vis(self, obj: int) -> Vis:
        """Record of object ``obj``; outside the frustum a hidden one with all shares zero."""
        return self._by_object.get(obj) or Vis(obj, (0, 0, 0, 0), 0, 0.0, 0.0, 0.0, "hidden")


@dataclass(frozen=True, eq=False)
class Room(Record):
    """Extent of the room. The polygon is counter-clockwise, without a repeated last point."""

    polygon_xy: list[tuple[float, float]] | None = None
    floor_z: float = 0.0
    ceil_z: float | None = None
    area_m2: float | None = None
    area_method: AreaMethod = "none"
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.polygon_xy is not None:
            object.__setattr__(self, "polygon_xy", counter_clockwise(self.polygon_xy))


@dataclass(frozen=True, eq=False)
class Scene(Record):
    """A room (or scan) with posed frames and annotated objects."""

    scene_id: str
    """``<source>/<native id>``."""
    room_id: str
    """``<source>/<native room id>``: equal for re-scans and twins of one room."""
    source: str
    objects: list[Object] = field(default_factory=list)
    frames: list[Frame] = field(default_factory=list)
    split: str = "train"
    license: str = "unknown"
    metric: bool = True
    gravity_aligned: bool = True
    room: Room | None = None
    label_counts: dict[str, int] | None = None
    """Authoritative instance counts when the source states them."""
    mesh: str | None = None
    points: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    schema: str = SCHEMA
    root: Path | None = field(default=None, metadata={"runtime": True})
    """Folder that relative paths start from; set by the reader."""

    def __post_init__(self) -> None:
        objects = [
            o if isinstance(o, Object) else Object.from_dict(o, "Object") for o in self.objects
        ]
        frames = [f if isinstance(f, Frame) else Frame.from_dict(f, "Frame") for f in self.frames]
        object.__setattr__(self, "objects", objects)
        object.__setattr__(self, "frames", frames)
        room: Any = self.room
        if isinstance(room, dict):
            object.__setattr__(self, "room", Room.from_dict(room, "Room"))

    def path(self, relative: str) -> Path:
        """Absolute path of a medium of this scene."""
        if self.root is None:
            raise SceneSchemaError(f"{self.scene_id}: has no root folder; load it from a file.")
        return self.root / relative

    @cached_property
    def count_conflicts(self) -> frozenset[str]:
        """Labels whose stated count differs from the number of boxes: not usable for counting."""
        if self.label_counts is None:
            return frozenset()
        boxes = Counter(o.label for o in self.objects)
        return frozenset(k for k, n in self.label_counts.items() if n != boxes.get(k, 0))

    def validate(self, *, strict: bool = True) -> list[str]:
        """Check everything that can be checked without opening media.

        Args:
            strict: Raise at the first problem; otherwise return all messages.

        Raises:
            SceneSchemaError, BoxError, CameraError: What is wrong, where, and the value.
        """
        problems: list[SceneError] = []
        for check in (self._check_header, self._check_objects, self._check_frames):
            try:
                check()
            except SceneError as error:
                if strict:
                    raise
                problems.append(error)
        return [str(problem) for problem in problems]

    def _check_header(self) -> None:
        if self.schema != SCHEMA:
            raise SceneSchemaError(
                f"{self.scene_id}: schema is {self.schema!r}, this version reads {SCHEMA!r}. "
                "Import the scene again."
            )
        if self.source not in SOURCES or not self.scene_id.startswith(f"{self.source}/"):
            raise SceneSchemaError(
                f"scene_id {self.scene_id!r} must be '<source>/<native id>' with the source of the "
                f"scene ({self.source!r}), one of {', '.join(SOURCES)}."
            )
        if self.room is not None and self.room.polygon_xy is not None:
            check_polygon(self.room.polygon_xy, self.scene_id)

    def _check_objects(self) -> None:
        _unique([o.id for o in self.objects], f"{self.scene_id}: object id")
        for position, item in enumerate(self.objects):
            if item.index != position:
                raise SceneSchemaError(
                    f"{self.scene_id}: object at position {position} has index {item.index}; "
                    "index must equal the position in the list."
                )
            _ = item.box
            if item.support_parent is not None and not (
                0 <= item.support_parent < len(self.objects) and item.support_parent != position
            ):
                raise SceneSchemaError(
                    f"{self.scene_id}: object {position} stands on object {item.support_parent}, "
                    f"which does not exist (the scene has {len(self.objects)})."
                )

    def _check_frames(self) -> None:
        _unique([f.frame_id for f in self.frames], f"{self.scene_id}: frame id")
        times = [f.time_s for f in self.frames if f.time_s is not None]
        for before, after in pairwise(times):
            if after <= before:
                raise SceneSchemaError(
                    f"{self.scene_id}: time_s must increase strictly, got {after} after {before}. "
                    "Sort the frames by time."
                )
        for item in self.frames:
            try:
                _ = item.camera
            except SceneError as error:
                raise type(error)(f"{self.scene_id}, frame {item.frame_id}: {error}") from error
            for vis in item.visible:
                if not 0 <= vis.obj < len(self.objects):
                    raise SceneSchemaError(
                        f"{self.scene_id}, frame {item.frame_id}: a visibility record names object "
                        f"{vis.obj}, the scene has {len(self.objects)}."
                    )


def _unique(ids: Sequence[str], what: str) -> None:
    for name, count in Counter(ids).items():
        if count > 1:
            raise SceneSchemaError(f"{what} {name!r} occurs {count} times; ids must be unique.")


def check_polygon(polygon_xy: Sequence[Sequence[float]], where: str) -> None:
    """Refuse polygons that are degenerate or cross themselves.

    Raises:
        SceneSchemaError: Fewer than three points, zero area, or a self-intersection.
    """
    from shapely.geometry import Polygon

    polygon = Polygon(polygon_xy) if len(polygon_xy) >= 3 else None
    if polygon is None or not polygon.is_valid or polygon.area <= 0:
        raise SceneSchemaError(
            f"{where}: room polygon with {len(polygon_xy)} points crosses itself or has no area. "
            "List the corners in order around the room."
        )


def counter_clockwise(polygon_xy: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    """The polygon in counter-clockwise order."""
    points = [(float(p[0]), float(p[1])) for p in polygon_xy]
    shifted = points[1:] + points[:1]
    twice_area = sum(a[0] * b[1] - b[0] * a[1] for a, b in zip(points, shifted, strict=True))
    return points if twice_area > 0 else points[::-1]
