"""Everything tasks ask about one scene, computed once and cached.

Scalars live in Python lists, because a task looks at a few numbers at a time.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import shapely
from shapely.geometry import MultiPoint, Polygon
from shapely.geometry.base import BaseGeometry

from spatialvlm.scenes.areas import floor_area
from spatialvlm.scenes.boxes import UPRIGHT_TILT_DEG
from spatialvlm.scenes.cameras import MIN_GROUND_PROJECTION, Camera
from spatialvlm.scenes.io import load_depth, load_instances
from spatialvlm.scenes.schema import Object, Scene, Vis
from spatialvlm.scenes.transforms import Array, geodesic_deg, wrap_deg
from spatialvlm.scenes.visibility import encode_rle
from spatialvlm.synthesis.covisibility import covisibility
from spatialvlm.synthesis.rows import Margin, Reason, Reject

MAX_ROLL_DEG = 20.0
KNIFE_EDGE = 1e-6
"""Metres or ratio around a threshold inside which float noise could decide; such candidates go."""
KNIFE_EDGE_DEG = 1e-4
FIRST_SEEN_PX = 16
"""An object cannot have appeared before the first frame with this many pixels (at 640x480)."""
APPEARED_PX_FRAC = 0.002
APPEARED_VIS_FRAC = 0.1
REFERENCE_PIXELS = 640 * 480
PAIR_ROTATION_DEG = (15.0, 120.0)
PAIR_BASELINE_M = 0.2
PAIR_IOU = (0.06, 0.60)
PAIR_SHARED = 2
MAX_DEPTH_BYTES = 48 * 2**20
MAX_PAIR_FRAMES = 48
"""Frames (evenly spread) among which view pairs are searched."""


def require(
    kind: str, value: float, threshold: float, reason: Reason = Reason.MARGIN, detail: str = ""
) -> Margin:
    """Return the margin of a decision, or reject the candidate.

    Args:
        kind: What was measured; a kind that ends in ``_deg`` is compared in degrees.
        value: Measured value.
        threshold: Least value that is allowed.
        reason: Counted when the value is below the threshold.
        detail: More words for the person who looks at a single rejection.

    Raises:
        Reject: Below the threshold, or so close that rounding could decide.
    """
    if value - threshold >= KNIFE_EDGE_DEG:  # the wider of the two edges
        return Margin(kind, value, threshold)
    edge = KNIFE_EDGE_DEG if kind.endswith("_deg") else KNIFE_EDGE
    if abs(value - threshold) < edge:
        raise Reject(Reason.KNIFE_EDGE, f"{kind} {value:.6f} at {threshold}")
    if value < threshold:
        raise Reject(reason, detail or f"{kind} {value:.4f} < {threshold:.4f}")
    return Margin(kind, value, threshold)


def require_range(value: float, low: float, high: float, what: str) -> None:
    """Reject values outside ``[low, high]``."""
    if low + KNIFE_EDGE <= value <= high - KNIFE_EDGE:
        return
    if min(abs(value - low), abs(value - high)) < KNIFE_EDGE:
        raise Reject(Reason.KNIFE_EDGE, f"{what} {value:.6f}")
    if not low <= value <= high:
        raise Reject(Reason.OUT_OF_RANGE, f"{what} {value:.3f} not in [{low}, {high}]")


def tightest(*margins: Margin) -> Margin:
    """The margin closest to its threshold."""
    return min(margins, key=lambda margin: margin.normalised)


@dataclass(frozen=True)
class View:
    """One frame with the extents of every object in it; lists are indexed by object.

    The level frame has its origin at the camera centre, x to the right, y forward, z up.
    """

    index: int
    frame_id: str
    camera: Camera
    vis: list[Vis]
    clean: list[int]
    """Objects that questions may name here."""
    depth: list[tuple[float, float]]
    """``(min, max)`` camera z of the corners, metres."""
    lateral: list[tuple[float, float]]
    """``(min, max)`` to the right in the level frame, metres."""
    forward: list[tuple[float, float]]
    """``(min, max)`` forward in the level frame, metres."""
    distance: list[float]
    """Camera centre to the box, metres."""
    centroid: list[tuple[float, float]]
    """Centroid of the visible pixels, or of the projected box."""
    level_ok: bool
    roll_deg: float = 0.0

    def is_clean(self, obj: int) -> bool:
        """Whether questions may name ``obj`` in this frame."""
        return obj in self.clean

    def state(self, obj: int) -> str:
        """``visible``, ``ambiguous`` or ``hidden``."""
        return self.vis[obj].state


@dataclass(frozen=True)
class Pair:
    """How two views relate."""

    rotation_deg: float
    yaw_deg: float
    """Heading of the second minus heading of the first, counter-clockwise."""
    pitch_deg: float
    baseline_m: float
    iou: float | None
    """Overlap of the seen surface; ``None`` without depth."""
    shared: list[int]
    """Objects clean in both."""


class SceneContext:
    """Cached geometry of one scene.

    Args:
        scene: A validated scene.
        visibility_filter: ``False`` lets questions name every object whose projection lies mostly
            inside the image, seen or not (the ablation of the occupancy filter).
    """

    def __init__(self, scene: Scene, *, visibility_filter: bool = True) -> None:
        self.scene = scene
        self.visibility_filter = visibility_filter
        self.objects: list[Object] = scene.objects
        self.labels: list[str] = [item.label for item in scene.objects]
        doubtful = {item.label for item in scene.objects if item.extra.get("excluded")}
        self.targets: list[int] = [
            item.index for item in scene.objects if item.is_target and item.label not in doubtful
        ]
        """Objects that questions may be about. With one instance left out, its label neither counts nor names."""
        self.by_label: dict[str, list[int]] = defaultdict(list)
        for index in self.targets:
            self.by_label[self.labels[index]].append(index)
        self.frame_of: dict[str, int] = {f.frame_id: i for i, f in enumerate(scene.frames)}
        self.events: Counter[Reason] = Counter()
        """What happened while proposing that is no rejected candidate; the engine counts and clears it."""
        self._views: dict[int, View] = {}
        self._footprints: dict[int, BaseGeometry] = {}
        self.legs: dict[tuple[int, int], float | None] = {}
        """Lengths of free ways between objects, filled by ``routes``; ``None`` = blocked."""
        self.unfiltered = any(
            frame.instance_map is None
            and any(v.state == "visible" and v.occupancy is None for v in frame.visible)
            for frame in scene.frames
        )
        """Some visibility was guessed from boxes alone: neither depth nor instances were measured."""
        self.slot_parts: dict[tuple[Any, ...], tuple[dict[str, Any], str]] = {}
        """Fixed parts of the slots of rows and their JSON text, filled by ``writer``."""
        self.plain_names: dict[int, Any] = {}
        """Names of objects that their label alone singles out, filled by ``referral``."""
        self.edges: dict[tuple[int, ...], list[Any]] = {}
        """Relations of views and of pairs of objects, filled by ``scene_graph``."""
        self._seen_in: dict[tuple[int, ...], list[tuple[bool, float]]] = {}
        self._appearances: dict[tuple[int, ...], tuple[float, float] | None] = {}
        self._pairs: dict[tuple[int, int], Pair] = {}
        self._usable: list[tuple[int, int]] | None = None
        self._depths: dict[int, Array] = {}
        self._ids: dict[int, Array] = {}

    # Boxes ---------------------------------------------------------------------------------------
    @cached_property
    def centers(self) -> Array:
        """``[N, 3]`` metres."""
        return np.array([item.center for item in self.objects]).reshape(-1, 3)

    @cached_property
    def corners(self) -> Array:
        """``[N, 8, 3]`` metres."""
        return np.array([item.box.corners for item in self.objects]).reshape(-1, 8, 3)

    @cached_property
    def center_list(self) -> list[list[float]]:
        """:attr:`centers` as plain numbers."""
        rows: list[list[float]] = self.centers.tolist()
        return rows

    @cached_property
    def size_list(self) -> list[list[float]]:
        """Full extents per object, metres."""
        return [item.size.tolist() for item in self.objects]

    @cached_property
    def z_range(self) -> list[tuple[float, float]]:
        """Lowest and highest point per object."""
        z = self.corners[:, :, 2]
        return list(zip(z.min(axis=1).tolist(), z.max(axis=1).tolist(), strict=True))

    @cached_property
    def volume(self) -> list[float]:
        """Cubic metres per object."""
        return [size[0] * size[1] * size[2] for size in self.size_list]

    @cached_property
    def upright(self) -> list[bool]:
        """Whether the third extent of an object is a height."""
        return [item.box.tilt_deg <= UPRIGHT_TILT_DEG for item in self.objects]

    @cached_property
    def distances(self) -> list[list[float]]:
        """Closest-point distance of every pair of boxes, metres."""
        from spatialvlm.scenes.distances import box_distances

        rows: list[list[float]] = box_distances([item.box for item in self.objects]).tolist()
        return rows

    def footprint(self, obj: int) -> BaseGeometry:
        """Outline of an object on the ground."""
        if obj not in self._footprints:
            self._footprints[obj] = Polygon(self.objects[obj].box.footprint)
        return self._footprints[obj]

    @cached_property
    def floor(self) -> BaseGeometry:
        """Room polygon, or the hull of all objects when the scene has none; prepared for tests."""
        room = self.scene.room
        if room is not None and room.polygon_xy is not None:
            shape = Polygon(room.polygon_xy)
        else:
            shape = MultiPoint(self.corners[:, :, :2].reshape(-1, 2)).convex_hull.buffer(0.25)
        shapely.prepare(shape)
        return shape

    def center_distance(self, a: int, b: int) -> float:
        """Distance of two box centres, metres."""
        return float(np.linalg.norm(self.centers[a] - self.centers[b]))

    def bearing(self, a: int, b: int) -> float:
        """Direction from centre to centre on the ground, degrees counter-clockwise from +x."""
        return self._bearings[a][b]

    @cached_property
    def _bearings(self) -> list[list[float]]:
        ground = self.centers[:, :2]
        rows: list[list[float]] = _bearings(ground[None] - ground[:, None]).tolist()
        return rows

    @cached_property
    def corner_bearings(self) -> list[list[list[float]]]:
        """``[observer][obj]`` -> directions from the centre of one to the 8 corners of the other, degrees."""
        offset = self.corners[None, :, :, :2] - self.centers[:, None, None, :2]  # [N, N, 8, 2]
        rows: list[list[list[float]]] = _bearings(offset).tolist()
        return rows

    # Frames --------------------------------------------------------------------------------------
    @property
    def num_frames(self) -> int:
        """Frames of the scene."""
        return len(self.scene.frames)

    def view(self, frame: int | str) -> View:
        """A frame by index or id."""
        index = self.frame_of[frame] if isinstance(frame, str) else frame
        if index not in self._views:
            self._views[index] = self._build_view(index)
        return self._views[index]

    def _build_view(self, index: int) -> View:
        frame = self.scene.frames[index]
        camera = frame.camera
        vis = [frame.vis(obj) for obj in range(len(self.objects))]
        local = self.corners @ camera.rotation - camera.centre @ camera.rotation  # [N, 8, 3]
        level_ok = bool(np.hypot(*camera.rotation[:2, 2]) >= MIN_GROUND_PROJECTION)
        if level_ok:
            level_from_world = camera.level_frame("y")
            level = self.corners @ level_from_world[:3, :3].T + level_from_world[:3, 3]
        else:
            level = np.zeros_like(self.corners)
        if self.visibility_filter:
            clean = [obj for obj in self.targets if vis[obj].clean]
        else:
            clean = [obj for obj in self.targets if vis[obj].in_frustum_frac >= 0.7]
        middle = camera.project(self.centers)[0] if self.objects else np.zeros((0, 2))
        centroid = [
            v.centroid_px if v.centroid_px is not None else (float(uv[0]), float(uv[1]))
            for v, uv in zip(vis, middle, strict=True)
        ]
        return View(
            index=index,
            frame_id=frame.frame_id,
            camera=camera,
            vis=vis,
            clean=clean,
            depth=_extent(local[:, :, 2]),
            lateral=_extent(level[:, :, 0]),
            forward=_extent(level[:, :, 1]),
            distance=[item.box.distance_to_point(camera.centre) for item in self.objects],
            centroid=centroid,
            level_ok=level_ok,
            roll_deg=camera.roll_deg,
        )

    def require_clean(self, view: View, objects: Iterable[int]) -> float:
        """Reject unless all ``objects`` are clean; returns their smallest visible share.

        Raises:
            Reject: ``not_clean``, with the first object that is not.
        """
        least = 1.0
        for obj in objects:
            if not view.is_clean(obj):
                raise Reject(Reason.NOT_CLEAN, f"object {obj} in frame {view.frame_id}")
            least = min(least, self.share(view, obj))
        return least

    def share(self, view: View, obj: int) -> float:
        """Visible share of an object as far as it counts: all of it without the visibility filter."""
        return view.vis[obj].vis_frac if self.visibility_filter else 1.0

    def require_level(self, view: View) -> None:
        """Reject views that have no left and right.

        Raises:
            Reject: ``vertical_axis`` or ``camera_roll``.
        """
        if not view.level_ok:
            raise Reject(Reason.VERTICAL_AXIS, view.frame_id)
        if abs(view.roll_deg) > MAX_ROLL_DEG:
            raise Reject(Reason.CAMERA_ROLL, f"{view.roll_deg:.1f} degrees")

    def not_hidden(self, view: View, label: str) -> list[int]:
        """Visible and ambiguous instances of ``label``."""
        return [obj for obj in self.by_label.get(label, ()) if view.state(obj) != "hidden"]

    def visible_once(self, obj: int, frames: Sequence[int]) -> bool:
        """Whether the object is visible with enough pixels in at least one of the frames."""
        return self.seen(obj, frames)[0]

    def best_visibility(self, obj: int, frames: Sequence[int]) -> float:
        """Largest visible share over the frames."""
        return self.seen(obj, frames)[1]

    def seen(self, obj: int, frames: Sequence[int]) -> tuple[bool, float]:
        """:meth:`visible_once` and :meth:`best_visibility` in one look-up."""
        return self.seen_in(frames)[obj]

    def seen_in(self, frames: Sequence[int]) -> list[tuple[bool, float]]:
        """:meth:`seen` of every object."""
        key = tuple(frames)
        if key not in self._seen_in:
            self._seen_in[key] = [self._look_for(obj, key) for obj in range(len(self.objects))]
        return self._seen_in[key]

    def _look_for(self, obj: int, frames: Sequence[int]) -> tuple[bool, float]:
        if not self.visibility_filter:
            return any(self.view(frame).is_clean(obj) for frame in frames), 1.0
        records = [self.view(frame).vis[obj] for frame in frames]
        return (
            any(v.state == "visible" and v.px_frac >= APPEARED_PX_FRAC for v in records),
            max((v.vis_frac for v in records), default=0.0),
        )

    # Video ---------------------------------------------------------------------------------------
    def video_frames(self, count: int = 32) -> list[int]:
        """Evenly spread frame indices: ``linspace(0, F-1, count)`` rounded half up, no repeats."""
        last = self.num_frames - 1
        if last < 0:
            return []
        steps = max(count - 1, 1)
        return list(dict.fromkeys((2 * i * last + steps) // (2 * steps) for i in range(count)))

    @cached_property
    def clip(self) -> tuple[int, ...]:
        """The (at most 32) frames that stand for the scene as a video."""
        return tuple(self.video_frames())

    @cached_property
    def clip_ids(self) -> list[str]:
        """Ids of :attr:`clip`."""
        return [self.scene.frames[index].frame_id for index in self.clip]

    def indices(self, frame_ids: Sequence[str]) -> tuple[int, ...]:
        """Frame indices of ids."""
        if frame_ids == self.clip_ids:
            return self.clip
        return tuple(self.frame_of[frame_id] for frame_id in frame_ids)

    @cached_property
    def seen_unique(self) -> list[int]:
        """Objects with a label of their own that are seen in the clip."""
        return [
            same[0]
            for same in self.by_label.values()
            if len(same) == 1 and self.visible_once(same[0], self.clip)
        ]

    def appearance(self, obj: int, frames: Sequence[int]) -> tuple[float, float] | None:
        """First appearance on the shown frames as ``(earliest, latest)`` moment.

        ``earliest`` is the time of the first frame with a handful of its pixels, ``latest`` that of the
        first frame in which it cannot be overlooked. The unit is seconds; without timestamps two
        frames count as one second. ``None``: it never clearly appears.
        """
        key = (obj, *frames)
        if key not in self._appearances:
            self._appearances[key] = self._first_seen(obj, frames)
        return self._appearances[key]

    def _first_seen(self, obj: int, frames: Sequence[int]) -> tuple[float, float] | None:
        early = late = None
        for position, frame in enumerate(frames):
            view = self.view(frame)
            vis = view.vis[obj]
            scale = view.camera.width * view.camera.height / REFERENCE_PIXELS
            time = self.scene.frames[frame].time_s
            moment = position / 2.0 if time is None else time
            if early is None and vis.px >= max(1.0, FIRST_SEEN_PX * scale):
                early = moment
            if vis.px_frac >= APPEARED_PX_FRAC and vis.vis_frac >= APPEARED_VIS_FRAC:
                late = moment
                break
        return None if late is None else (late if early is None else early, late)

    # View pairs ----------------------------------------------------------------------------------
    def pair(self, i: int, j: int) -> Pair:
        """Relation of two frames."""
        key = (i, j)
        if key not in self._pairs:
            self._pairs[key] = self._build_pair(i, j)
        return self._pairs[key]

    def _build_pair(self, i: int, j: int) -> Pair:
        a, b = self.view(i), self.view(j)
        shared = [obj for obj in a.clean if b.is_clean(obj)]
        overlap = self.covisibility
        return Pair(
            rotation_deg=geodesic_deg(a.camera.rotation, b.camera.rotation),
            yaw_deg=wrap_deg(b.camera.heading_deg - a.camera.heading_deg),
            pitch_deg=b.camera.pitch_deg - a.camera.pitch_deg,
            baseline_m=float(np.linalg.norm(a.camera.centre - b.camera.centre)),
            iou=None if overlap is None else float(overlap[i, j]),
            shared=shared,
        )

    def is_usable(self, i: int, j: int) -> bool:
        """Whether two views are far enough apart and still share enough.

        Rotation 15 to 120 degrees, baseline at least 0.2 m, overlap 0.06 to 0.60 and two objects that
        are clean in both.
        """
        pair = self.pair(i, j)
        return (
            pair.iou is not None
            and PAIR_IOU[0] <= pair.iou <= PAIR_IOU[1]
            and PAIR_ROTATION_DEG[0] <= pair.rotation_deg <= PAIR_ROTATION_DEG[1]
            and pair.baseline_m >= PAIR_BASELINE_M
            and len(pair.shared) >= PAIR_SHARED
        )

    def usable_pairs(self) -> list[tuple[int, int]]:
        """All usable pairs ``i < j``."""
        if self._usable is None:
            frames = self.video_frames(MAX_PAIR_FRAMES)
            self._usable = [
                (i, j)
                for n, i in enumerate(frames)
                for j in frames[n + 1 :]
                if self.is_usable(i, j)
            ]
        return self._usable

    def usable_pair(self, frames: Sequence[str]) -> tuple[View, View]:
        """The two views of a question.

        Raises:
            Reject: ``no_view_pair``: the views are too similar or share too little.
        """
        i, j = (self.frame_of[frame] for frame in frames)
        if not self.is_usable(i, j):
            raise Reject(Reason.NO_VIEW_PAIR, f"{frames[0]}, {frames[1]}")
        return self.view(i), self.view(j)

    def depth(self, index: int) -> Array | None:
        """Z-depth ``[H, W]`` in metres of a frame, ``None`` without a depth map; some are kept."""
        if self.scene.frames[index].depth is None:
            return None
        if index not in self._depths:
            depth = load_depth(self.scene, self.scene.frames[index])
            while self._depths and (len(self._depths) + 1) * depth.nbytes > MAX_DEPTH_BYTES:
                del self._depths[next(iter(self._depths))]
            self._depths[index] = depth
        return self._depths[index]

    def mask(self, index: int, obj: int) -> dict[str, Any]:
        """Run lengths of the visible pixels of an object (COCO, uncompressed).

        Raises:
            Reject: ``needs:instances``: the frame has neither a stored mask nor an instance map.
        """
        stored = self.view(index).vis[obj].mask_rle
        if stored is not None:
            return stored
        return encode_rle(self.instances(index) == obj + 1)

    def instances(self, index: int) -> Array:
        """``[H, W]`` object index + 1 of every pixel of a frame, 0 for the shell of the room.

        Raises:
            Reject: ``needs:instances``: the frame has no instance map.
        """
        frame = self.scene.frames[index]
        if frame.instance_map is None:
            raise Reject(Reason.NEEDS_INSTANCES, frame.frame_id)
        if index not in self._ids:
            self._ids.clear()
            self._ids[index] = load_instances(self.scene, frame)
        return self._ids[index]

    @cached_property
    def covisibility(self) -> Array | None:
        """``[F, F]`` overlap of the seen surface, ``None`` for scenes without depth."""
        frames = self.scene.frames
        if not frames or any(frame.depth is None for frame in frames):
            return None
        return covisibility([frame.camera for frame in frames], self.depth)

    @cached_property
    def area_m2(self) -> float | None:
        """Floor area of the room: stated, of its polygon, or of the scene's points."""
        return floor_area(self.scene)

    @property
    def comparison_gap_m(self) -> float:
        """Least difference of two distances that is asked about: 0.30 m in rooms above 40 m²."""
        return 0.30 if (self.area_m2 or 0.0) > 40.0 else 0.15


def _bearings(offsets: Array) -> Array:
    """``[..., 2]`` ground offsets to degrees counter-clockwise from +x, (-180, 180]."""
    angles = np.degrees(np.arctan2(offsets[..., 1], offsets[..., 0]))
    return np.where(angles == -180.0, 180.0, angles)


def _extent(values: Array) -> list[tuple[float, float]]:
    """``[N, 8]`` to ``N`` pairs (min, max)."""
    return list(zip(values.min(axis=1).tolist(), values.max(axis=1).tolist(), strict=True))
