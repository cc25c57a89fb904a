"""Distances, sizes and directions over two or more views of one scene (OpenSpatial 13-15)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.random import Generator

from spatialvlm.scenes.transforms import wrap_deg
from spatialvlm.synthesis.context import SceneContext, View, require, require_range, tightest
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
    return [wrap_deg(bearing - heading) for bearing in ctx.corner_bearings[observer][obj]]


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
