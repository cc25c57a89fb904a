"""Which point or object of one view is which in the other (OpenSpatial 16-17)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.random import Generator

from spatialvlm.scenes.transforms import Array
from spatialvlm.synthesis.context import SceneContext, View, require, tightest
from spatialvlm.synthesis.marks import PALETTE
from spatialvlm.synthesis.rows import QA, Args, Derived, Margin, Reason, Reject
from spatialvlm.synthesis.tasks.base import Task, mixed_pairs, take_turns
from spatialvlm.synthesis.tasks.measure import VISIBLE
from spatialvlm.synthesis.writer import Writer

POINT_TOLERANCE_M = 0.03
POINT_TOLERANCE_RATIO = 0.01
CYCLE_PX = 2.0
BORDER = 0.02
CANDIDATE_GAP = 0.05
CANDIDATE_GAP_M = 0.10
SIMILAR_DEPTH = 0.4
"""Largest relative difference of the depths of the truth and of the wrong candidate elsewhere in the view."""


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
        """A pixel on a shared object, three more for the wrong candidates (two on the same object, one as deep)."""

        def stream(i: int, j: int) -> Iterator[Args]:
            one, two = ctx.view(i), ctx.view(j)
            shared = ctx.pair(i, j).shared
            for _ in range(12):
                obj = shared[int(rng.integers(len(shared)))]
                near = [o for o in two.clean if o != obj and similar_depth(two, obj, o)]
                pool = near or two.clean
                other = pool[int(rng.integers(len(pool)))]
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
        own_depth = float(two.camera.to_cam(world[None])[0, 2])
        for x, y in args["wrong"]:
            value = float(depth[int(y), int(x)])
            if abs(value - own_depth) > SIMILAR_DEPTH * own_depth:
                raise Reject(Reason.DISTRACTORS, f"depth {value:.2f} m beside {own_depth:.2f} m")
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


def similar_depth(view: View, a: int, b: int) -> bool:
    """Whether two boxes stand about equally deep in a view."""
    one, two = sum(view.depth[a]) / 2, sum(view.depth[b]) / 2
    return abs(two - one) <= SIMILAR_DEPTH * one


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
            return Derived(True, Margin("vis", min(least, ctx.share(two, obj)), VISIBLE), {})
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
        turn = write.turn("yesno", derived.answer, slots, variant=args["variant"])
        # A format would mark the object in every view that shows it, which is the answer.
        return write.qa(turn, formats=())
