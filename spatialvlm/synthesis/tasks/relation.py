"""Spatial relations of two objects in one image: left/right, high/low, front/behind (OpenSpatial 5-7)."""

from __future__ import annotations

from collections.abc import Iterator

from numpy.random import Generator

from spatialvlm.synthesis.context import SceneContext, View, require, tightest
from spatialvlm.synthesis.rows import QA, Args, Derived, Margin, Reason, Reject
from spatialvlm.synthesis.tasks.base import Task, per_frame, two_choice
from spatialvlm.synthesis.writer import Writer

GAP_M = 0.15
"""Least free space between the extents of two objects along the compared direction."""
IMAGE_GAP = 0.03
"""Least difference of the image centroids, as a share of the image width."""
HEIGHT_GAP_M = 0.10
MAX_Z_OVERLAP = 0.5


def separation(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, bool]:
    """Free space between two intervals (negative: they overlap) and whether ``a`` is the lower one."""
    a_first, b_first = b[0] - a[1], a[0] - b[1]
    return (a_first, True) if a_first >= b_first else (b_first, False)


def left_of(view: View, a: int, b: int) -> tuple[bool, Margin]:
    """Whether ``a`` is left of ``b`` from the camera.

    The extents must be separated in the level frame **and** the image must show the same order: a near
    object can be left of a far one in metres and right of it in the picture.

    Raises:
        Reject: ``margin`` or ``image_disagrees``.
    """
    gap, a_left = separation(view.lateral[a], view.lateral[b])
    margin = require("gap_m", gap, GAP_M)
    shift = (view.centroid[b][0] - view.centroid[a][0]) / view.camera.width
    shift = shift if a_left else -shift
    return a_left, tightest(
        margin, require("image_shift", shift, IMAGE_GAP, Reason.IMAGE_DISAGREES)
    )


def in_front(view: View, a: int, b: int) -> tuple[bool, Margin]:
    """Whether ``a`` is in front of ``b``: separated in camera depth and in level forward distance.

    Raises:
        Reject: ``margin``.
    """
    gap, a_first = separation(view.depth[a], view.depth[b])
    level_gap, level_first = separation(view.forward[a], view.forward[b])
    if a_first != level_first:
        raise Reject(Reason.MARGIN, "camera depth and ground distance disagree")
    return a_first, require("gap_m", min(gap, level_gap), GAP_M)


def above(ctx: SceneContext, a: int, b: int) -> tuple[bool, Margin]:
    """Whether ``a`` is higher than ``b``: larger centre and top, less than half overlap in height.

    Raises:
        Reject: ``margin``, ``tops_disagree`` or ``overlap``.
    """
    (a0, a1), (b0, b1) = ctx.z_range[a], ctx.z_range[b]
    rise = (a0 + a1 - b0 - b1) / 2
    margin = require("gap_m", abs(rise), HEIGHT_GAP_M)
    if (a1 - b1) * rise <= 0:
        raise Reject(Reason.TOPS_DISAGREE)
    shorter = min(a1 - a0, b1 - b0)
    overlap = max(0.0, min(a1, b1) - max(a0, b0)) / shorter
    free = require("free_height", 1.0 - overlap, 1.0 - MAX_Z_OVERLAP, Reason.OVERLAP)
    return rise > 0, tightest(margin, free)


class PairRelation(Task):
    """Common part: the answer is the object for which the asked relation holds."""

    family = "SR"
    capability = "SR"
    group = "rel"
    dimension = "rel"
    needs = frozenset({"gravity"})

    def propose(self, ctx: SceneContext, rng: Generator) -> Iterator[Args]:
        """Two clean objects of one frame."""
        return per_frame(ctx, rng, 2, self.variants)

    def holds(self, ctx: SceneContext, view: View, args: Args) -> tuple[bool, Margin]:
        """Whether the first object has the relation of the variant to the second."""
        raise NotImplementedError

    def derive(self, ctx: SceneContext, args: Args) -> Derived:
        """Index of the object that is on the asked side."""
        view = ctx.view(args["frames"][0])
        a, b = args["objects"]
        ctx.require_clean(view, (a, b))
        holds, margin = self.holds(ctx, view, args)
        return Derived(a if holds else b, margin, {"winner": a if holds else b})

    def phrase(self, ctx: SceneContext, args: Args, derived: Derived, write: Writer) -> QA:
        """Yes/no about the first object, or which of the two."""
        write.show([ctx.frame_of[args["frames"][0]]])
        return write.qa(two_choice(write, args["objects"], derived.answer, args["variant"]))


class LeftRight(PairRelation):
    """Which of two objects is further left (right) seen from the camera."""

    id = "left_right"
    variants = ("left", "right")

    def holds(self, ctx: SceneContext, view: View, args: Args) -> tuple[bool, Margin]:
        """Level-frame intervals separated by 0.15 m, same order in the image."""
        ctx.require_level(view)
        a_left, margin = left_of(view, *args["objects"])
        return a_left == (args["variant"] == "left"), margin


class FrontBehind(PairRelation):
    """Which of two objects is in front of (behind) the other in depth."""

    id = "front_behind"
    dimension = "depth"
    variants = ("front", "behind")

    def holds(self, ctx: SceneContext, view: View, args: Args) -> tuple[bool, Margin]:
        """Depth intervals separated by 0.15 m."""
        del ctx
        if not view.level_ok:
            raise Reject(Reason.VERTICAL_AXIS, view.frame_id)
        a_front, margin = in_front(view, *args["objects"])
        return a_front == (args["variant"] == "front"), margin


class HighLow(PairRelation):
    """Which of two objects is higher (lower) above the floor."""

    id = "high_low"
    variants = ("higher", "lower")

    def holds(self, ctx: SceneContext, view: View, args: Args) -> tuple[bool, Margin]:
        """Centres 0.10 m apart in height, tops in the same order, at most half overlap."""
        del view
        a_higher, margin = above(ctx, *args["objects"])
        return a_higher == (args["variant"] == "higher"), margin
