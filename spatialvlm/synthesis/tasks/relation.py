"""Spatial relations of two objects in one image: left/right, high/low, front/behind (OpenSpatial 5-7)."""

from __future__ import annotations

from collections.abc import Iterator

from numpy.random import Generator

from spatialvlm.synthesis.context import SceneContext, View
from spatialvlm.synthesis.relations import above, in_front, left_of
from spatialvlm.synthesis.rows import QA, Args, Derived, Margin, Reason, Reject
from spatialvlm.synthesis.tasks.base import Task, per_frame, two_choice
from spatialvlm.synthesis.writer import Writer


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
