"""Answers computed a second time, slowly and without the code of the tasks, to check the fast ones.

Everything here starts from the stored scene (centres, extents, rotation matrices, poses, visibility
records): distances by bounded least squares, directions by dot and cross products or complex numbers,
maps by solving for a similarity. ``tools/verify_qa.py`` compares a share of all rows with it.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
from scipy.optimize import lsq_linear

from spatialvlm.scenes.schema import Frame, Object, Scene
from spatialvlm.scenes.transforms import Array
from spatialvlm.synthesis.rows import Args

TOLERANCE = 1e-4
"""Metres or degrees by which the two implementations may differ."""


def corners(item: Object) -> Array:
    """``[8, 3]`` metres."""
    signs = np.array(list(product((-0.5, 0.5), repeat=3)))
    return np.array([item.center + item.R @ (sign * item.size) for sign in signs])


def closest(a: Object, b: Object) -> float:
    """Distance of two boxes: least squares over the box coordinates of one point in each."""
    half = np.concatenate([a.size, b.size]) / 2
    fit = lsq_linear(
        np.hstack([a.R, -b.R]), b.center - a.center, (-half, half), method="bvls", tol=1e-14
    )
    return math.sqrt(2 * fit.cost)


def to_camera(item: Object, frame: Frame) -> float:
    """Distance from a camera centre to a box."""
    half = item.size / 2
    offset = frame.world_from_cam[:3, 3] - item.center
    fit = lsq_linear(item.R, offset, (-half, half), method="bvls", tol=1e-14)
    return math.sqrt(2 * fit.cost)


def ground(point: Array) -> complex:
    """A point on the ground plane, as a complex number."""
    return complex(point[0], point[1])


def heading(frame: Frame) -> complex:
    """Unit direction of the optical axis on the ground."""
    axis = ground(frame.world_from_cam[:3, 2])
    return axis / abs(axis)


def degrees(turn: complex) -> float:
    """Angle of a turn, (-180, 180], counter-clockwise."""
    return math.degrees(cmath.phase(turn))


def frame_of(scene: Scene, args: Args, position: int = 0) -> Frame:
    """A frame of the arguments."""
    return next(f for f in scene.frames if f.frame_id == args["frames"][position])


def objects_of(scene: Scene, args: Args) -> list[Object]:
    """The objects of the arguments."""
    return [scene.objects[index] for index in args["objects"]]


def _distance(scene: Scene, args: Args) -> float:
    a, b = objects_of(scene, args)
    return math.dist(a.center, b.center) if args["variant"] == "centers" else closest(a, b)


def _left_right(scene: Scene, args: Args) -> int:
    frame = frame_of(scene, args)
    ahead = heading(frame)
    # Turned by the conjugate heading, the imaginary part points to the left of the camera.
    left = [
        np.mean([((ground(c) - ground(frame.world_from_cam[:3, 3])) / ahead).imag for c in corners(o)])
        for o in objects_of(scene, args)
    ]  # fmt: skip
    return int(args["objects"][int((left[0] < left[1]) == (args["variant"] == "left"))])


def _front_behind(scene: Scene, args: Args) -> int:
    to_cam = np.linalg.inv(frame_of(scene, args).world_from_cam)
    depth = [float((to_cam @ [*o.center, 1.0])[2]) for o in objects_of(scene, args)]
    return int(args["objects"][int((depth[0] > depth[1]) == (args["variant"] == "front"))])


def _high_low(scene: Scene, args: Args) -> int:
    height = [float(corners(o)[:, 2].max()) for o in objects_of(scene, args)]
    higher = args["variant"] in ("high", "higher", "above")
    return int(args["objects"][int((height[0] < height[1]) == higher)])


def _upright_extents(item: Object) -> tuple[float, float, float]:
    """``(height, longer side, shorter side)`` by the axis nearest the vertical."""
    up = int(np.argmax(np.abs(item.R[2])))
    sides = sorted(np.delete(item.size, up), reverse=True)
    return float(item.size[up]), float(sides[0]), float(sides[1])


def _extent(item: Object, what: str) -> float:
    if what == "volume":
        return float(np.linalg.det(item.R * item.size))
    if what == "longest":
        return float(item.size.max())
    return _upright_extents(item)[("height", "long_side", "short_side").index(what)]


_SIZES = {"bigger": "volume", "smaller": "volume", "taller": "height", "shorter": "height", "wider": "long_side", "narrower": "long_side"}  # fmt: skip


def _size_rel(scene: Scene, args: Args) -> int:
    values = [_extent(o, _SIZES[args["variant"]]) for o in objects_of(scene, args)]
    larger = args["variant"] in ("bigger", "taller", "wider")
    return int(args["objects"][int((values[0] < values[1]) == larger)])


def _size_abs(scene: Scene, args: Args) -> float | list[float]:
    values = [_extent(o, args["variant"]) for o in objects_of(scene, args)]
    return values if len(values) > 1 else values[0]


def _same_label(scene: Scene, label: str) -> list[Object]:
    return [o for o in scene.objects if o.label == label and o.is_target]


def _room_size(scene: Scene, args: Args) -> float | None:
    del args
    if scene.room is None or scene.room.polygon_xy is None:
        return None
    x, y = np.array(scene.room.polygon_xy).T
    return float(abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2)


def _rel_dist(scene: Scene, args: Args) -> str:
    (reference,) = objects_of(scene, args)
    nearest = {
        label: min(closest(reference, o) for o in _same_label(scene, label))
        for label in args["labels"]
    }
    return str(min(nearest, key=lambda label: nearest[label]))


def _rel_dir(scene: Scene, args: Args) -> str:
    a, b, c = (ground(o.center) for o in objects_of(scene, args))
    turn = (c - a) / (b - a)
    side = "left" if turn.imag > 0 else "right"
    if args["variant"] == "easy":
        return side
    if args["variant"] == "medium":
        return "back" if turn.real < 0 and abs(turn.imag) < -turn.real else side
    return f"{'front' if turn.real > 0 else 'back'}-{side}"


def _lcm(scene: Scene, args: Args) -> Any:
    if args["variant"] == "fit":
        return None

    def cell(triplet: Sequence[int]) -> list[int]:
        a, b, t = (scene.objects[index].center[:2] for index in triplet)
        # Similarity (p, q, x, y): u = p x - q y + x0, v = q x + p y + y0, fixed by the two anchors.
        rows: list[list[float]] = []
        right: list[float] = []
        for point, target in ((a, (5.0, 5.0)), (b, (5.0, 3.0))):
            rows += [[point[0], -point[1], 1.0, 0.0], [point[1], point[0], 0.0, 1.0]]
            right += target
        p, q, x, y = np.linalg.solve(np.array(rows), np.array(right))
        spot = (p * t[0] - q * t[1] + x, q * t[0] + p * t[1] + y)
        return [math.floor(value + 0.5) for value in spot]

    if args["variant"] == "chain":
        return [cell(triplet) for triplet in args["triplets"]]
    return cell(args["objects"])


def _count_shown(scene: Scene, args: Args) -> int:
    frame = frame_of(scene, args)
    wanted = {o.index for o in _same_label(scene, args["label"])}
    return sum(vis.obj in wanted and vis.state == "visible" for vis in frame.visible)


def _nearer_view(scene: Scene, args: Args) -> str:
    (item,) = objects_of(scene, args)
    one, two = (to_camera(item, frame_of(scene, args, i)) for i in (0, 1))
    return "equal" if abs(one - two) < 0.1 else ("view 1" if one < two else "view 2")


def _cam_motion(scene: Scene, args: Args) -> float | None:
    first, second = frame_of(scene, args), frame_of(scene, args, 1)
    if args["variant"] == "yaw":
        return abs(degrees(heading(second) / heading(first)))
    if args["variant"] == "distance":
        return math.dist(first.world_from_cam[:3, 3], second.world_from_cam[:3, 3])
    return None


def _rotation(scene: Scene, args: Args) -> float:
    (item,) = objects_of(scene, args)
    seen = []
    for position in (0, 1):
        camera = frame_of(scene, args, position).world_from_cam[:3, 3]
        seen.append(ground(item.R[:, 0]) / ground(item.center - camera))
    return degrees(seen[1] / seen[0])


def _camera_distance(scene: Scene, args: Args) -> float:
    (item,) = objects_of(scene, args)
    return to_camera(item, frame_of(scene, args, args["at"][0]))


def _displacement(scene: Scene, args: Args) -> float:
    one, two = (frame_of(scene, args, at).world_from_cam[:3, 3] for at in args["at"])
    return math.dist(one, two)


def _distance_change(scene: Scene, args: Args) -> str:
    (item,) = objects_of(scene, args)
    one, two = (to_camera(item, frame_of(scene, args, at)) for at in args["at"])
    return "closer" if two < one else "farther"


REFERENCES: dict[str, Callable[[Scene, Args], Any]] = {
    "dist_abs": _distance,
    "mv_dist_abs": _distance,
    "vsi_abs_dist": _distance,
    "left_right": _left_right,
    "front_behind": _front_behind,
    "high_low": _high_low,
    "size_rel": _size_rel,
    "is_size": _size_rel,
    "size_abs": _size_abs,
    "vsi_obj_size": lambda scene, args: 100 * _extent(objects_of(scene, args)[0], "longest"),
    "vsi_count": lambda scene, args: len(_same_label(scene, args["label"])),
    "vsi_room_size": _room_size,
    "vsi_rel_dist": _rel_dist,
    "vsi_rel_dir": _rel_dir,
    "ssr_lcm": _lcm,
    "is_count": _count_shown,
    "is_rotation": _rotation,
    "dist_obj_cam": _nearer_view,
    "cam_motion": _cam_motion,
    "vsti_cam_obj_abs": _camera_distance,
    "vsti_cam_disp": _displacement,
    "vsti_dist_change": _distance_change,
}
"""Task -> its answer in the units of ``derive``, or ``None`` for variants without a second implementation."""


def disagreement(scene: Scene, task: str, args: Args, answer: Any) -> str | None:
    """What the second implementation says where it differs; ``None`` = the same, or not covered.

    Args:
        scene: The scene (with the boxes that the answer is about).
        task: Task id.
        args: Arguments of the question.
        answer: Answer of the task (a list with one entry per turn for dialogues).
    """
    if task not in REFERENCES:
        return None
    other = REFERENCES[task](scene, args)
    if other is None or _same(answer, other):
        return None
    return f"{answer!r}, the second implementation finds {other!r}"


def _same(answer: Any, other: Any) -> bool:
    if isinstance(other, list):
        return len(answer) == len(other) and all(map(_same, answer, other))
    if isinstance(other, float):
        return abs(float(answer) - other) <= TOLERANCE
    return bool(answer == other)
