"""What the camera sees from where: depth order and camera motion (OpenSpatial 8-12)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import pairwise

import numpy as np
from numpy.random import Generator

from spatialvlm.synthesis.context import SceneContext, View, require, tightest
from spatialvlm.synthesis.rows import QA, Args, Derived, Draws, Form, Margin, Reason, Reject, Turn
from spatialvlm.synthesis.tasks.base import Task, per_frame, per_pair, view_chains
from spatialvlm.synthesis.writer import Writer, dominant

DEPTH_GAP_M = 0.15
DEPTH_GAP_RATIO = 0.08
RANKS = (
    "closest",
    "second closest",
    "third closest",
    "fourth closest",
    "fifth closest",
    "sixth closest",
    "seventh closest",
)


def depth_values(view: View, objects: list[int]) -> list[float]:
    """Depth of each object: 10th percentile of its visible depth, else the nearest corner.

    Raises:
        Reject: ``margin``: the two measures order the objects differently.
    """
    boxes = [view.depth[obj][0] for obj in objects]
    seen = [view.vis[obj].depth_near for obj in objects]
    measured = [near for near in seen if near is not None]
    if len(measured) < len(objects):
        return boxes
    order = sorted(range(len(objects)), key=lambda i: measured[i])
    if order != sorted(range(len(objects)), key=lambda i: boxes[i]):
        raise Reject(Reason.MARGIN, "seen depth and box depth disagree")
    return measured


def depth_gap(
    nearer: float, farther: float, least: float = DEPTH_GAP_M, ratio: float = DEPTH_GAP_RATIO
) -> Margin:
    """Margin of two neighbouring depths.

    Raises:
        Reject: ``margin``: closer than ``least`` metres or ``ratio`` of the nearer depth.
    """
    return require("gap_m", farther - nearer, max(least, ratio * nearer))


PIXEL_GAP_M = 0.10
PIXEL_GAP_RATIO = 0.05
PIXEL_SPREAD = 0.03
"""Largest relative spread of the depth in the 3x3 neighbourhood of an asked pixel."""


def pixel_depths(ctx: SceneContext, view: View, points: list[list[int]]) -> list[float]:
    """Depth at points given in thousandths of the image.

    Raises:
        Reject: ``needs:depth`` or ``margin`` (no depth there, or a depth edge).
    """
    depth = ctx.depth(view.index)
    if depth is None:
        raise Reject(Reason.NEEDS_DEPTH)
    values = []
    for x, y in points:
        column = min(int(x / 1000 * view.camera.width), view.camera.width - 2)
        row = min(int(y / 1000 * view.camera.height), view.camera.height - 2)
        patch = depth[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
        low, high = float(patch.min()), float(patch.max())
        if low <= 0 or (high - low) / low > PIXEL_SPREAD:
            raise Reject(Reason.MARGIN, f"depth edge or hole at ({x}, {y})")
        values.append(float(depth[row, column]))
    return values


class DepthChoice(Task):
    """Which of 3-5 objects (or 4-7 pixels) is the closest, the farthest, or the n-th closest."""

    id = "depth_choice"
    family = "CP"
    capability = "SR"
    group = "meas"
    dimension = "depth"
    forms = ("OE", "MCQ")
    variants = ("closest", "farthest", "rank")

    def propose(self, ctx: SceneContext, rng: Generator) -> Iterator[Args]:
        """Clean objects of one frame; 40 % closest, 40 % farthest, 20 % n-th closest; 10 % pixels."""
        for args in per_frame(ctx, rng, (3, 4, 5)):
            if rng.random() < 0.1 and ctx.scene.frames[0].depth is not None:
                spots = rng.integers(40, 960, size=(int(rng.integers(4, 8)), 2)).tolist()
                args = {"variant": "", "frames": args["frames"], "objects": [], "points": spots}
            ticket, count = rng.random(), len(args["objects"] or args["points"])
            args["variant"] = self.variants[int(ticket >= 0.4) + int(ticket >= 0.8)]
            rank = {"closest": 0, "farthest": count - 1}
            args["rank"] = rank.get(args["variant"], int(rng.integers(1, count - 1)))
            yield args

    def derive(self, ctx: SceneContext, args: Args) -> Derived:
        """Position of the right one in the arguments."""
        view = ctx.view(args["frames"][0])
        if args.get("points"):
            values = pixel_depths(ctx, view, args["points"])
            least, ratio = PIXEL_GAP_M, PIXEL_GAP_RATIO
        else:
            ctx.require_clean(view, args["objects"])
            values = depth_values(view, args["objects"])
            least, ratio = DEPTH_GAP_M, DEPTH_GAP_RATIO
        order = sorted(range(len(values)), key=lambda i: values[i])
        rank = args["rank"]
        ranked = [values[i] for i in order]
        neighbours = range(max(rank - 1, 0), min(rank + 1, len(order) - 1))
        margin = tightest(*(depth_gap(ranked[i], ranked[i + 1], least, ratio) for i in neighbours))
        return Derived(order[rank], margin, {"depth_m": values})

    def phrase(self, ctx: SceneContext, args: Args, derived: Derived, write: Writer) -> QA:
        """Objects named by words or by marks, pixels by coordinates."""
        write.show([ctx.frame_of[args["frames"][0]]])
        if args.get("points"):
            texts = [f"({x}, {y})" for x, y in args["points"]]
            named = f"the points {', '.join(texts)} in thousandths of the image width and height"
            asked = {"objects": named, "rank": RANKS[args["rank"]]}
            right_text = texts[derived.answer]
            wrong = write.draws.shuffled([text for text in texts if text != right_text])
            return write.qa(
                write.turn("text", right_text, asked, variant=args["variant"], wrong=wrong)
            )
        marked = write.draws.unit() < write.wording.marks
        refs = write.name_all(args["objects"], marked=marked)
        right = refs[derived.answer]
        wrong = [ref.short for ref in refs if ref is not right]
        slots = {"objects": refs, "rank": RANKS[args["rank"]]}
        turn = write.turn("text", right.short, slots, variant=args["variant"], wrong=wrong)
        return write.qa(turn)


class DepthOrder(Task):
    """3-5 objects from near to far."""

    id = "depth_order"
    family = "CP"
    capability = "SR"
    group = "meas"
    dimension = "depth"
    forms = ("OE", "MCQ")

    def propose(self, ctx: SceneContext, rng: Generator) -> Iterator[Args]:
        """3-5 clean objects of one frame in random order of mention."""
        return per_frame(ctx, rng, (3, 4, 5))

    def derive(self, ctx: SceneContext, args: Args) -> Derived:
        """Object indices from near to far; every neighbouring gap has its margin."""
        view = ctx.view(args["frames"][0])
        objects = args["objects"]
        ctx.require_clean(view, objects)
        values = depth_values(view, objects)
        order = sorted(range(len(objects)), key=lambda i: values[i])
        margins = [depth_gap(values[i], values[j]) for i, j in pairwise(order)]
        return Derived([objects[i] for i in order], tightest(*margins), {"depth_m": values})

    def phrase(self, ctx: SceneContext, args: Args, derived: Derived, write: Writer) -> QA:
        """A list, or one of four permutations."""
        write.show([ctx.frame_of[args["frames"][0]]])
        marked = write.draws.unit() < write.wording.marks
        refs = write.name_all(args["objects"], marked=marked)
        by_object = {ref.obj: ref.short for ref in refs}
        return write.qa(
            order_turn(write, [by_object[obj] for obj in derived.answer], {"objects": refs})
        )


def permutations_of(draws: Draws, right: list[str], count: int = 3) -> list[str]:
    """Wrong orders of the same words, written out; fewer if there are fewer."""
    repeats = math.prod(math.factorial(right.count(word)) for word in set(right))
    wanted = min(count, math.factorial(len(right)) // repeats - 1)
    wrong: list[str] = []
    while len(wrong) < wanted:
        text = ", ".join(draws.shuffled(right))
        if text != ", ".join(right) and text not in wrong:
            wrong.append(text)
    return wrong


def order_turn(
    write: Writer, right: list[str], slots: Mapping[str, object], variant: str = ""
) -> Turn:
    """Ask for an order, openly or as one of four permutations."""
    if write.base == "OE":
        return write.turn("list", right, slots, variant=variant)
    wrong = permutations_of(write.draws, right)
    return write.turn("text", ", ".join(right), slots, variant=variant, wrong=wrong)


EQUAL_M = 0.08
DIFFERENT_M = 0.25


class DistObjCam(Task):
    """In which of two views the camera is nearer to an object."""

    id = "dist_obj_cam"
    family = "CP"
    capability = "PT"
    group = "persp"
    dimension = "depth"
    views = "2"
    forms = ("MCQ", "OE")
    needs = frozenset({"depth"})

    def propose(self, ctx: SceneContext, rng: Generator) -> Iterator[Args]:
        """An object that is clean in both views of a usable pair."""
        return per_pair(ctx, rng, 1)

    def derive(self, ctx: SceneContext, args: Args) -> Derived:
        """``view 1``, ``view 2`` or ``equal``: under 0.08 m is equal, over 0.25 m different."""
        first, second = ctx.usable_pair(args["frames"])
        obj = args["objects"][0]
        ctx.require_clean(first, (obj,))
        ctx.require_clean(second, (obj,))
        one, two = first.distance[obj], second.distance[obj]
        values = {"distance_m": [one, two]}
        difference = abs(one - two)
        if difference < EQUAL_M:
            margin = require("ratio", EQUAL_M / max(difference, 1e-3), 1.0)
            return Derived("equal", margin, values)
        margin = require("gap_m", difference, DIFFERENT_M)
        return Derived("view 1" if one < two else "view 2", margin, values)

    def phrase(self, ctx: SceneContext, args: Args, derived: Derived, write: Writer) -> QA:
        """One of three."""
        write.show([ctx.frame_of[frame] for frame in args["frames"]])
        wrong = [text for text in ("view 1", "view 2", "equal") if text != derived.answer]
        slots = {"a": write.name(args["objects"][0])}
        return write.qa(write.turn("text", derived.answer, slots, wrong=wrong))


MIN_TURN_DEG = 15.0
DOMINANT_TURN = 2.0
MIN_MOVE_M = 0.3
DOMINANT_MOVE = 1.5
MOVES = ("forward", "backward", "left", "right", "up", "down")
TURNS = ("left", "right", "up", "down")


def move_in_view(first: View, second: View) -> dict[str, float]:
    """How far the camera moved in the level frame of the first view, per direction (one of two is 0).

    Raises:
        Reject: ``vertical_axis``.
    """
    if not first.level_ok:
        raise Reject(Reason.VERTICAL_AXIS, first.frame_id)
    level = first.camera.level_frame("y")
    right, forward, up = (level[:3, :3] @ (second.camera.centre - first.camera.centre)).tolist()
    axes = {"forward": forward, "right": right, "up": up}
    opposite = {"forward": "backward", "right": "left", "up": "down"}
    moves = {}
    for name, value in axes.items():
        moves[name if value >= 0 else opposite[name]] = abs(value)
    return moves


class CamMotion(Task):
    """How the camera turned or moved between two views."""

    id = "cam_motion"
    family = "CP"
    capability = "PT"
    group = "persp"
    dimension = "persp"
    views = "2"
    forms = ("MCQ", "OE", "NUM")
    variants = ("rotation", "translation", "yaw", "distance")
    needs = frozenset({"depth", "gravity"})

    def propose(self, ctx: SceneContext, rng: Generator) -> Iterator[Args]:
        """Usable pairs, four questions about each."""
        for args in per_pair(ctx, rng, 0):
            for variant in self.variants:
                yield {**args, "variant": variant}

    def forms_for(self, args: Args) -> tuple[Form, ...]:
        """Numbers for the yaw and the distance."""
        return ("NUM",) if args["variant"] in ("yaw", "distance") else ("MCQ", "OE")

    def derive(self, ctx: SceneContext, args: Args) -> Derived:
        """A direction, degrees, or metres.

        Rotation is read from heading and pitch, so that a rolled camera changes nothing; yaw counts
        counter-clockwise, so a positive one is a turn to the left.
        """
        if args["variant"] == "distance" and not ctx.scene.metric:
            raise Reject(Reason.NEEDS_METRIC)
        first, second = ctx.usable_pair(args["frames"])
        pair = ctx.pair(first.index, second.index)
        move = move_in_view(first, second)
        yaw, pitch = pair.yaw_deg, pair.pitch_deg
        distance = pair.baseline_m
        values = {"yaw_deg": yaw, "pitch_deg": pitch, "move_m": move, "distance_m": distance}
        variant = args["variant"]
        if variant == "yaw":
            margin = require("angle_deg", abs(yaw), MIN_TURN_DEG)
            return Derived(abs(yaw), margin, values)
        if variant == "distance":
            return Derived(distance, require("move_m", distance, MIN_MOVE_M), values)
        if variant == "rotation":
            word, turn, ratio = dominant(
                {
                    "left" if yaw > 0 else "right": abs(yaw),
                    "up" if pitch > 0 else "down": abs(pitch),
                }
            )
            margin = require("angle_deg", turn, MIN_TURN_DEG)
            return Derived(word, tightest(margin, _ratio(ratio, DOMINANT_TURN)), values)
        word, _, ratio = dominant(move)
        margin = require("move_m", distance, MIN_MOVE_M)
        return Derived(word, tightest(margin, _ratio(ratio, DOMINANT_MOVE)), values)

    def phrase(self, ctx: SceneContext, args: Args, derived: Derived, write: Writer) -> QA:
        """A direction among four, a number of degrees, or metres."""
        write.show([ctx.frame_of[frame] for frame in args["frames"]])
        variant = args["variant"]
        if variant == "yaw":
            return write.qa(
                write.turn("number", derived.answer, {}, variant=variant, unit="deg", places=0)
            )
        if variant == "distance":
            return write.qa(
                write.turn("number", derived.answer, {}, variant=variant, unit="m", places=1)
            )
        words = TURNS if variant == "rotation" else MOVES
        wrong = write.draws.shuffled([word for word in words if word != derived.answer])[:3]
        return write.qa(write.turn("text", derived.answer, {}, variant=variant, wrong=wrong))


def _ratio(value: float, least: float) -> Margin:
    return require("ratio", min(value, 1e6), least)


MIN_BEARING_DEG = 25.0
MIN_RADIUS_M = 0.5
MIN_INWARD = 0.3


def ring_order(
    centre: np.ndarray, cameras: list[np.ndarray], forwards: list[np.ndarray]
) -> tuple[list[int], Margin]:
    """Counter-clockwise order of cameras around a centre, from the first camera on.

    Args:
        centre: ``[2]`` on the ground.
        cameras: ``[2]`` positions.
        forwards: ``[2]`` unit viewing directions.

    Raises:
        Reject: ``too_close`` (within 0.5 m of the centre), ``sector`` (does not look inwards), or
            ``margin`` (two bearings less than 25 degrees apart).
    """
    bearings = []
    for position, forward in zip(cameras, forwards, strict=True):
        offset = position - centre
        radius = float(np.hypot(*offset))
        require("radius_m", radius, MIN_RADIUS_M, Reason.TOO_CLOSE)
        require("inward", float(-(offset @ forward) / radius), MIN_INWARD, Reason.SECTOR)
        bearings.append(math.degrees(math.atan2(offset[1], offset[0])))
    turns = [(bearing - bearings[0]) % 360.0 for bearing in bearings]
    order = sorted(range(len(cameras)), key=lambda i: turns[i])
    gaps = [
        (turns[b] - turns[a]) % 360.0 for a, b in zip(order, [*order[1:], order[0]], strict=True)
    ]
    return order, require("angle_deg", min(gaps), MIN_BEARING_DEG)


class CamPose(Task):
    """In which order 3-4 cameras stand around what they look at."""

    id = "cam_pose"
    family = "CP"
    capability = "MR"
    group = "persp"
    dimension = "persp"
    views = "3-4"
    forms = ("MCQ", "OE")
    needs = frozenset({"depth", "gravity"})

    def propose(self, ctx: SceneContext, rng: Generator) -> Iterator[Args]:
        """Chains of 3-4 views, consecutive ones usable."""
        for chain in view_chains(ctx, rng, (3, 4)):
            yield {"variant": str(len(chain)), "frames": [ctx.view(i).frame_id for i in chain]}

    def derive(self, ctx: SceneContext, args: Args) -> Derived:
        """View numbers (from 1) counter-clockwise from View 1, seen from above."""
        views = [ctx.view(frame) for frame in args["frames"]]
        for one, two in pairwise(args["frames"]):
            ctx.usable_pair([one, two])
        seen = [
            obj for obj in ctx.targets if sum(view.state(obj) == "visible" for view in views) >= 2
        ]
        if len(seen) < 2:
            raise Reject(Reason.TOO_FEW_OBJECTS, f"{len(seen)} shared objects")
        centre = ctx.centers[seen, :2].mean(axis=0)
        for view in views:
            if not view.level_ok:
                raise Reject(Reason.VERTICAL_AXIS, view.frame_id)
        heading = [math.radians(view.camera.heading_deg) for view in views]
        order, margin = ring_order(
            centre,
            [view.camera.centre[:2] for view in views],
            [np.array([math.cos(h), math.sin(h)]) for h in heading],
        )
        return Derived([i + 1 for i in order], margin, {"centre_xy": centre.tolist()})

    def phrase(self, ctx: SceneContext, args: Args, derived: Derived, write: Writer) -> QA:
        """A cyclic order that starts at View 1, so all options are distinct up to rotation."""
        write.show([ctx.frame_of[frame] for frame in args["frames"]])
        right = [f"View {i}" for i in derived.answer]
        slots = {"n": str(len(right))}
        if write.base == "OE":
            return write.qa(write.turn("list", right, slots))
        wrong = [
            ", ".join(["View 1", *rest.split(", ")])
            for rest in permutations_of(write.draws, right[1:])
        ]
        return write.qa(write.turn("text", ", ".join(right), slots, wrong=wrong))
