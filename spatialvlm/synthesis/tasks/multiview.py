"""Questions that need two or more views of one scene (OpenSpatial 13-17)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.random import Generator

from spatialvlm.scenes.transforms import Array, wrap_deg
from spatialvlm.synthesis.context import SceneContext, View, require, require_range, tightest
from spatialvlm.synthesis.marks import PALETTE
from spatialvlm.synthesis.rows import QA, Args, Derived, Margin, Reason, Reject
from spatialvlm.synthesis.tasks.base import Task, mixed_pairs, take_turns, view_chains
from spatialvlm.synthesis.tasks.measure import VISIBLE, metric_unit
from spatialvlm.synthesis.writer import Writer


def only_in(first: View, second: View) -> list[int]:
    """Objects clean in the first view and hidden in the second."""
    return [obj for obj in first.clean if second.state(obj) == "hidden"]


def require_only_in(ctx: SceneContext, obj: int, first: View, second: View) -> float:
    """Reject unless ``obj`` is clean in one view and hidden in the other; returns its visible share.

    Raises:
        Reject: ``not_clean`` or ``ambiguous``.
    """
    least = ctx.require_clean(first, (obj,))
    if second.state(obj) != "hidden":
        raise Reject(Reason.AMBIGUOUS, f"object {obj} is not hidden in {second.frame_id}")
    return least


class MvDistAbs(Task):
    """Distance between an object of one view and an object of the other."""

    id = "mv_dist_abs"
    family = "MC"
    capability = "MM"
    group = "meas"
    dimension = "size"
    views = "2"
    needs = frozenset({"metric", "depth"})
    forms = ("NUM",)
    variants = ("closest", "centers")
    balance = "number"

    def propose(self, ctx: SceneContext, rng: Generator) -> Iterator[Args]:
        """One object that only the first view shows, one that only the second shows."""
        for i, j in mixed_pairs(ctx, rng):
            one, two = ctx.view(i), ctx.view(j)
            firsts, seconds = only_in(one, two), only_in(two, one)
            for a in rng.permutation(firsts)[:4].tolist():
                for b in rng.permutation(seconds)[:4].tolist():
                    yield {
                        "variant": self.variants[int(rng.integers(2))],
                        "frames": [one.frame_id, two.frame_id],
                        "objects": [int(a), int(b)],
                    }

    def derive(self, ctx: SceneContext, args: Args) -> Derived:
        """Metres, 0.2 to 8."""
        one, two = ctx.usable_pair(args["frames"])
        a, b = args["objects"]
        least = min(require_only_in(ctx, a, one, two), require_only_in(ctx, b, two, one))
        closest = ctx.distances[a][b]
        value = closest if args["variant"] == "closest" else ctx.center_distance(a, b)
        require_range(closest, 0.2, 8.0, "closest distance")
        require_range(value, 0.2, 8.0, "distance")
        return Derived(value, Margin("vis", least, VISIBLE), {"distance_m": value})

    def phrase(self, ctx: SceneContext, args: Args, derived: Derived, write: Writer) -> QA:
        """A number in metres or centimetres."""
        write.show([ctx.frame_of[frame] for frame in args["frames"]])
        first, second = write.name_all(args["objects"])
        unit, factor, places = metric_unit(write)
        return write.qa(
            write.turn(
                "number",
                derived.answer * factor,
                {"a": first, "b": second},
                variant=args["variant"],
                unit=unit,
                places=places,
            )
        )


class MvDistRel(Task):
    """Which object is closest to (farthest from) a reference; one view each, chained."""

    id = "mv_dist_rel"
    family = "MC"
    capability = "SR"
    group = "meas"
    dimension = "size"
    views = "3-6"
    forms = ("MCQ", "OE")
    variants = ("closest", "farthest")
    needs = frozenset({"depth"})

    def propose(self, ctx: SceneContext, rng: Generator) -> Iterator[Args]:
        """A clean object of each view of a chain; the first is the reference."""
        for args in one_per_view(ctx, rng, (3, 4, 5, 6)):
            yield {**args, "variant": self.variants[int(rng.integers(2))]}

    def derive(self, ctx: SceneContext, args: Args) -> Derived:
        """Index of the object with the smallest (largest) closest-point distance."""
        require_chain(ctx, args)
        reference, *others = args["objects"]
        values = {obj: ctx.distances[reference][obj] for obj in others}
        return nearest(values, args["variant"], ctx.comparison_gap_m)

    def phrase(self, ctx: SceneContext, args: Args, derived: Derived, write: Writer) -> QA:
        """Which of the objects."""
        write.show([ctx.frame_of[frame] for frame in args["frames"]])
        reference, *others = write.name_all(args["objects"])
        right = next(ref for ref in others if ref.obj == derived.answer)
        wrong = [ref.short for ref in others if ref is not right]
        slots = {"a": reference, "objects": others, "word": args["variant"]}
        return write.qa(
            write.turn("text", right.short, slots, variant=args["variant"], wrong=wrong)
        )


def nearest(values: dict[int, float], word: str, gap: float) -> Derived:
    """Object with the smallest (``closest``) or largest (``farthest``) value, if it is clear.

    Raises:
        Reject: ``margin``: the runner-up is nearer than ``gap`` metres.
    """
    sign = 1.0 if word == "closest" else -1.0
    ranked = sorted(values, key=lambda obj: (sign * round(values[obj], 6), obj))
    margin = require("gap_m", abs(values[ranked[1]] - values[ranked[0]]), gap)
    return Derived(ranked[0], margin, {"distance_m": {str(o): values[o] for o in values}})


def one_per_view(ctx: SceneContext, rng: Generator, sizes: Sequence[int]) -> Iterator[Args]:
    """A chain of views with one clean object of each, all different; unique labels come first."""
    for chain in view_chains(ctx, rng, sizes):
        for _ in range(4):
            objects: list[int] = []
            for frame in chain:
                left = [o for o in ctx.view(frame).clean if o not in objects]
                if left:
                    objects.append(left[int(rng.integers(len(left)))])
            if len(objects) == len(chain):
                frames = [ctx.view(i).frame_id for i in chain]
                yield {"variant": "", "frames": frames, "objects": objects}


def require_chain(ctx: SceneContext, args: Args) -> float:
    """Reject unless consecutive views are usable pairs and each view shows its object.

    Raises:
        Reject: ``no_view_pair`` or ``not_clean``.
    """
    for one, two in pairwise(args["frames"]):
        ctx.usable_pair([one, two])
    return min(
        ctx.require_clean(ctx.view(frame), (obj,))
        for frame, obj in zip(args["frames"], args["objects"], strict=True)
    )


class MvSizeRel(Task):
    """Which of 2-6 objects is the largest (smallest); one view each, chained."""

    id = "mv_size_rel"
    family = "MC"
    capability = "SR"
    group = "meas"
    dimension = "size"
    views = "2-6"
    forms = ("MCQ", "OE")
    variants = ("largest", "smallest")
    needs = frozenset({"depth"})

    def propose(self, ctx: SceneContext, rng: Generator) -> Iterator[Args]:
        """A clean object of each view of a chain."""
        for args in one_per_view(ctx, rng, (2, 3, 4, 5, 6)):
            yield {**args, "variant": self.variants[int(rng.integers(2))]}

    def derive(self, ctx: SceneContext, args: Args) -> Derived:
        """Index of the object with the largest (smallest) volume."""
        require_chain(ctx, args)
        return largest(ctx, args["objects"], args["variant"])

    def phrase(self, ctx: SceneContext, args: Args, derived: Derived, write: Writer) -> QA:
        """Which of the objects."""
        write.show([ctx.frame_of[frame] for frame in args["frames"]])
        refs = write.name_all(args["objects"])
        right = next(ref for ref in refs if ref.obj == derived.answer)
        wrong = [ref.short for ref in refs if ref is not right]
        slots = {"objects": refs, "word": args["variant"]}
        return write.qa(write.turn("text", right.short, slots, wrong=wrong))


def largest(ctx: SceneContext, objects: list[int], word: str) -> Derived:
    """Object with the largest or smallest volume: ratio 1.3 to the next, longest extents agree.

    Raises:
        Reject: ``margin`` or ``extent_tie``.
    """
    sign = -1.0 if word == "largest" else 1.0
    ranked = sorted(objects, key=lambda obj: (sign * round(ctx.volume[obj], 9), obj))
    big, small = (ranked[0], ranked[1]) if word == "largest" else (ranked[1], ranked[0])
    margin = require("ratio", ctx.volume[big] / ctx.volume[small], 1.3)
    longest = max(ctx.size_list[big]) / max(ctx.size_list[small])
    extent = require("extent_ratio", longest, 1.05, Reason.EXTENT_TIE)
    volumes = {str(obj): ctx.volume[obj] for obj in objects}
    return Derived(ranked[0], tightest(margin, extent), {"volume_m3": volumes})


SECTORS = (
    "front", "front-left", "left", "back-left", "back", "back-right", "right", "front-right",
)  # fmt: skip
"""Eight directions around an observer, counter-clockwise in steps of 45 degrees."""
CARDINALS = {
    "north": 0.0, "northwest": 45.0, "west": 90.0, "southwest": 135.0,
    "south": 180.0, "southeast": -135.0, "east": -90.0, "northeast": -45.0,
}  # fmt: skip
SECTOR_HALF_DEG = 15.5
SECTOR_WIDE_DEG = 22.5
STATED = {"front": 0.0, "left": 90.0, "back": 180.0, "right": -90.0}


def bearing_around(ctx: SceneContext, observer: int, obj: int, heading: float) -> float:
    """Where an object is for an observer: degrees, counter-clockwise from ahead."""
    return wrap_deg(ctx.bearing(observer, obj) - heading)


def half_extent_deg(ctx: SceneContext, observer: int, obj: int) -> float:
    """Half of the angle under which an observer sees the footprint of an object."""
    angles = corner_angles(ctx, observer, obj, ctx.bearing(observer, obj))
    return max(abs(angle) for angle in angles)


def corner_angles(ctx: SceneContext, observer: int, obj: int, heading: float) -> list[float]:
    """Bearings of the eight corners against a heading, degrees."""
    offset = ctx.corners[obj][:, :2] - ctx.centers[observer][:2]
    bearings = np.degrees(np.arctan2(offset[:, 1], offset[:, 0]))
    return [wrap_deg(bearing - heading) for bearing in bearings.tolist()]


class MvPos(Task):
    """Where an object of view 2 is for an observer whose heading is fixed by an object of view 1."""

    id = "mv_pos"
    family = "MC"
    capability = "PT"
    group = "rel"
    dimension = "persp"
    views = "2"
    forms = ("MCQ", "OE")
    variants = ("egocentric", "cardinal")
    needs = frozenset({"depth", "gravity"})

    def propose(self, ctx: SceneContext, rng: Generator) -> Iterator[Args]:
        """X clean in both views, A only in the first, B only in the second."""

        def stream(i: int, j: int) -> Iterator[Args]:
            one, two = ctx.view(i), ctx.view(j)
            triples = [
                (x, a, b)
                for x in ctx.pair(i, j).shared
                for a in only_in(one, two)
                for b in only_in(two, one)
            ]
            for index in rng.permutation(len(triples))[:30].tolist():
                variant = self.variants[int(rng.integers(2))]
                sides = list(STATED) if variant == "egocentric" else list(CARDINALS)[::2]
                yield {
                    "variant": variant,
                    "frames": [one.frame_id, two.frame_id],
                    "objects": list(triples[index]),
                    "side": sides[int(rng.integers(4))],
                }

        yield from take_turns([stream(i, j) for i, j in mixed_pairs(ctx, rng)])

    def derive(self, ctx: SceneContext, args: Args) -> Derived:
        """One of eight directions."""
        one, two = ctx.usable_pair(args["frames"])
        x, a, b = args["objects"]
        ctx.require_clean(one, (x,))
        ctx.require_clean(two, (x,))
        require_only_in(ctx, a, one, two)
        require_only_in(ctx, b, two, one)
        return direction_at(ctx, x, a, b, args["side"], cardinal=args["variant"] == "cardinal")

    def phrase(self, ctx: SceneContext, args: Args, derived: Derived, write: Writer) -> QA:
        """Distractors at least two sectors away come first."""
        write.show([ctx.frame_of[frame] for frame in args["frames"]])
        x, a, b = write.name_all(args["objects"])
        ring = list(CARDINALS) if args["variant"] == "cardinal" else list(SECTORS)
        place = ring.index(derived.answer)
        away = [ring[(place + step) % 8] for step in (2, 3, 4, 5, 6)]
        wrong = write.draws.shuffled(away)[:3]
        side = args["side"]
        if args["variant"] == "egocentric":
            side = {"front": "in front of you", "back": "behind you"}.get(side, f"on your {side}")
        slots = {"x": x, "a": a, "b": b, "side": side}
        return write.qa(
            write.turn("text", derived.answer, slots, variant=args["variant"], wrong=wrong)
        )


def direction_at(
    ctx: SceneContext, x: int, a: int, b: int, side: str, *, cardinal: bool = False
) -> Derived:
    """Direction of ``b`` for an observer at ``x`` who has ``a`` on the stated side.

    Raises:
        Reject: ``too_close``, ``sector`` (near a boundary or too wide).
    """
    require("gap_m", min(ctx.distances[x][a], ctx.distances[x][b]), 0.3, Reason.TOO_CLOSE)
    centres = [np.hypot(*(ctx.centers[x] - ctx.centers[o])[:2]) for o in (a, b)]
    require("centre_m", float(min(centres)), 0.5, Reason.TOO_CLOSE)
    for obj in (a, b):
        if half_extent_deg(ctx, x, obj) > SECTOR_WIDE_DEG:
            raise Reject(Reason.SECTOR, f"object {obj} is too wide from there")
    offset = CARDINALS[side] if cardinal else STATED[side]
    heading = ctx.bearing(x, a) - offset
    angle = bearing_around(ctx, x, b, heading)
    ring = list(CARDINALS) if cardinal else list(SECTORS)
    sector = round(angle / 45.0) % 8
    off = abs(wrap_deg(angle - 45.0 * sector))
    margin = require(
        "guard_deg", SECTOR_WIDE_DEG - off, SECTOR_WIDE_DEG - SECTOR_HALF_DEG, Reason.SECTOR
    )
    outside = sum(
        abs(wrap_deg(corner - 45.0 * sector)) > SECTOR_WIDE_DEG
        for corner in corner_angles(ctx, x, b, heading)
    )
    if outside > 2:
        raise Reject(Reason.SECTOR, f"{outside} corners of object {b} lie in another sector")
    return Derived(ring[sector], margin, {"angle_deg": angle, "heading_deg": wrap_deg(heading)})


POINT_TOLERANCE_M = 0.03
POINT_TOLERANCE_RATIO = 0.01
CYCLE_PX = 2.0
BORDER = 0.02
CANDIDATE_GAP = 0.05
CANDIDATE_GAP_M = 0.10


def correspond(
    ctx: SceneContext, one: View, two: View, pixel: Sequence[float]
) -> tuple[Array, Array]:
    """Pixel of view 2 that shows the surface point behind a pixel of view 1.

    Each view uses its own intrinsics.

    Returns:
        Pixel in view 2 ``[2]`` and the world point ``[3]``.

    Raises:
        Reject: ``occluded`` (no depth, or another surface is in front), ``no_overlap`` (outside).
    """
    depth_one, depth_two = ctx.depth(one.index), ctx.depth(two.index)
    if depth_one is None or depth_two is None:
        raise Reject(Reason.NEEDS_DEPTH)
    value = float(depth_one[int(pixel[1]), int(pixel[0])])
    if value <= 0:
        raise Reject(Reason.OCCLUDED, "no depth")
    centre = np.array([[int(pixel[0]) + 0.5, int(pixel[1]) + 0.5]])
    point = one.camera.back_project(centre, np.array([value]))
    return see_point(depth_two, two, point), point[0]


def see_point(depth: Array, view: View, point: Array) -> Array:
    """Pixel at which a view shows a world point.

    Raises:
        Reject: ``no_overlap`` or ``occluded``.
    """
    pixels, z = view.camera.project(point)
    pixel = pixels[0]
    if z[0] <= 0 or not inside_border(view, pixel):
        raise Reject(Reason.NO_OVERLAP)
    measured = float(depth[int(pixel[1]), int(pixel[0])])
    if abs(measured - z[0]) > max(POINT_TOLERANCE_M, POINT_TOLERANCE_RATIO * z[0]):
        raise Reject(Reason.OCCLUDED)
    back = view.camera.back_project(pixels, np.array([measured]))
    cycle = view.camera.project(back)[0][0]
    if np.hypot(*(cycle - pixel)) > CYCLE_PX:
        raise Reject(Reason.OCCLUDED, "cycle")
    return np.asarray(pixel)


def inside_border(view: View, pixel: Sequence[float]) -> bool:
    """Whether a pixel keeps 2 % of the shorter image side from the border."""
    width, height = view.camera.width, view.camera.height
    border = BORDER * min(width, height)
    return border <= pixel[0] < width - border and border <= pixel[1] < height - border


class CorrPoint(Task):
    """Which of four points of view 2 is the marked point of view 1."""

    id = "corr_point"
    family = "MC"
    capability = "PT"
    group = "persp"
    dimension = "persp"
    views = "2"
    forms = ("MCQ",)
    needs = frozenset({"depth"})

    def propose(self, ctx: SceneContext, rng: Generator) -> Iterator[Args]:
        """A pixel on a shared object, three more for the wrong candidates (two on the same object)."""

        def stream(i: int, j: int) -> Iterator[Args]:
            one, two = ctx.view(i), ctx.view(j)
            shared = ctx.pair(i, j).shared
            for _ in range(12):
                obj = shared[int(rng.integers(len(shared)))]
                other = two.clean[int(rng.integers(len(two.clean)))]
                yield {
                    "variant": "",
                    "frames": [one.frame_id, two.frame_id],
                    "objects": [obj],
                    "point": inside_box(rng, one, obj),
                    "wrong": [inside_box(rng, two, o) for o in (obj, obj, other)],
                }

        yield from take_turns([stream(i, j) for i, j in mixed_pairs(ctx, rng)])

    def derive(self, ctx: SceneContext, args: Args) -> Derived:
        """Pixel in view 2; the wrong candidates are apart from it in the image and in space."""
        one, two = ctx.usable_pair(args["frames"])
        obj = args["objects"][0]
        ctx.require_clean(one, (obj,))
        ctx.require_clean(two, (obj,))
        if not inside_border(one, args["point"]):
            raise Reject(Reason.NO_OVERLAP, "the point lies at the border of view 1")
        pixel, world = correspond(ctx, one, two, args["point"])
        if ctx.objects[obj].box.distance_to_point(world) > 0.05:
            raise Reject(Reason.OCCLUDED, "the point is not on the object")
        depth = ctx.depth(two.index)
        assert depth is not None
        pixels, points, on_same = [pixel], [world], 0
        for x, y in args["wrong"]:
            value = float(depth[int(y), int(x)])
            if value <= 0:
                raise Reject(Reason.DISTRACTORS, "no depth")
            centre = np.array([[x, y]])
            pixels.append(centre[0])
            points.append(two.camera.back_project(centre, np.array([value]))[0])
            on_same += ctx.objects[obj].box.distance_to_point(points[-1]) < 0.05
        if on_same < 2:
            raise Reject(Reason.DISTRACTORS, "two wrong candidates must lie on the same object")
        diagonal = float(np.hypot(two.camera.width, two.camera.height))
        gaps = [
            (np.hypot(*(pixels[i] - pixels[j])) / diagonal, np.linalg.norm(points[i] - points[j]))
            for i in range(4)
            for j in range(i)
        ]
        apart = require(
            "diagonal", float(min(g[0] for g in gaps)), CANDIDATE_GAP, Reason.DISTRACTORS
        )
        space = require(
            "gap_m", float(min(g[1] for g in gaps)), CANDIDATE_GAP_M, Reason.DISTRACTORS
        )
        values = {"pixel": pixel.tolist(), "world": world.tolist()}
        return Derived([round(float(v), 1) for v in pixel], tightest(apart, space), values)

    def phrase(self, ctx: SceneContext, args: Args, derived: Derived, write: Writer) -> QA:
        """Candidates are four points of different colours in view 2; options are their names."""
        write.show([ctx.frame_of[frame] for frame in args["frames"]])
        own = ctx.objects[args["objects"][0]].color_name
        source, *names = write.draws.shuffled([name for name in PALETTE if name != own])[:5]
        write.marks.append(_point(0, source, args["point"]))
        spots = [derived.answer, *args["wrong"]]
        write.marks += [_point(1, names[i], spot) for i, spot in enumerate(spots)]
        words = [f"{name} point" for name in names]
        slots = {"a": f"the {source} point"}
        return write.qa(write.turn("text", words[0], slots, wrong=words[1:]))


def inside_box(rng: Generator, view: View, obj: int) -> list[float]:
    """A random pixel centre in the visible box of an object."""
    x0, y0, x1, y1 = view.vis[obj].bbox2d
    x = min(int(rng.uniform(x0, x1)), view.camera.width - 1)
    y = min(int(rng.uniform(y0, y1)), view.camera.height - 1)
    return [x + 0.5, y + 0.5]


def _point(image: int, colour: str, xy: Sequence[float]) -> dict[str, object]:
    return {
        "image": image,
        "kind": "point",
        "color": colour,
        "name": f"the {colour} point",
        "units": "px",
        "xy": [round(float(value), 1) for value in xy],
    }


class CorrObj(Task):
    """Whether two marked objects are the same one, or whether one is visible in the other view."""

    id = "corr_obj"
    family = "MC"
    capability = "PT"
    group = "persp"
    dimension = "persp"
    views = "2"
    forms = ("YN",)
    variants = ("same", "visible")
    needs = frozenset({"depth"})

    def propose(self, ctx: SceneContext, rng: Generator) -> Iterator[Args]:
        """Half of the answers are yes; most negatives of ``same`` share the label."""

        def stream(i: int, j: int) -> Iterator[Args]:
            one, two = ctx.view(i), ctx.view(j)
            frames = [one.frame_id, two.frame_id]
            for _ in range(12):
                obj = one.clean[int(rng.integers(len(one.clean)))]
                twins = [o for o in two.clean if o != obj and ctx.labels[o] == ctx.labels[obj]]
                others = [o for o in two.clean if o != obj]
                ticket = rng.random()
                if ticket < 0.5:
                    yield {"variant": "visible", "frames": frames, "objects": [obj]}
                elif ticket < 0.75:
                    if two.is_clean(obj):
                        yield {"variant": "same", "frames": frames, "objects": [obj, obj]}
                else:
                    pool = twins or (others if rng.random() < 0.2 else [])
                    if pool:
                        other = pool[int(rng.integers(len(pool)))]
                        yield {"variant": "same", "frames": frames, "objects": [obj, other]}

        yield from take_turns([stream(i, j) for i, j in mixed_pairs(ctx, rng)])

    def derive(self, ctx: SceneContext, args: Args) -> Derived:
        """``True`` or ``False``."""
        one, two = ctx.usable_pair(args["frames"])
        obj = args["objects"][0]
        least = ctx.require_clean(one, (obj,))
        if args["variant"] == "same":
            other = args["objects"][1]
            least = min(least, ctx.require_clean(two, (other,)))
            return Derived(obj == other, Margin("vis", least, VISIBLE), {})
        vis = two.vis[obj]
        if two.is_clean(obj):
            return Derived(True, Margin("vis", min(least, vis.vis_frac), VISIBLE), {})
        if vis.state == "hidden" and (vis.in_frustum_frac == 0 or vis.vis_frac < 0.01):
            return Derived(False, Margin("vis", least, VISIBLE), {})
        raise Reject(Reason.AMBIGUOUS, f"object {obj} in {two.frame_id}")

    def phrase(self, ctx: SceneContext, args: Args, derived: Derived, write: Writer) -> QA:
        """Objects are marked in their views."""
        write.show([ctx.frame_of[frame] for frame in args["frames"]])
        obj, *rest = args["objects"]
        slots = {"a": write.mark(obj, 0)}
        if rest:
            write.refs.pop(rest[0], None)
            slots["b"] = write.mark(rest[0], 1)
        return write.qa(write.turn("yesno", derived.answer, slots, variant=args["variant"]))
