"""Metric measurements in one image (OpenSpatial 1-4)."""

from __future__ import annotations

from collections.abc import Iterator

from numpy.random import Generator

from spatialvlm.synthesis.context import SceneContext, require_range
from spatialvlm.synthesis.relations import COMPARISONS, compare_size, extent
from spatialvlm.synthesis.rows import QA, Args, Derived, Margin, Reason, Reject
from spatialvlm.synthesis.tasks.base import Task, per_frame, two_choice
from spatialvlm.synthesis.writer import Writer

VISIBLE = 0.30
"""Threshold of the visible share: the margin of plain numbers."""


def metric_unit(write: Writer) -> tuple[str, float, int]:
    """Unit, factor from metres, and decimals: metres with two decimals or whole centimetres."""
    if write.wording.paraphrases == 1 or write.draws.integer(2) == 0:
        return "m", 1.0, 2
    return "cm", 100.0, 0


class DistAbs(Task):
    """Distance between two objects: closest points or centres."""

    id = "dist_abs"
    family = "SM"
    capability = "MM"
    group = "meas"
    dimension = "size"
    needs = frozenset({"metric"})
    forms = ("NUM",)
    variants = ("closest", "centers")
    balance = "number"

    def propose(self, ctx: SceneContext, rng: Generator) -> Iterator[Args]:
        """Two clean objects of one frame."""
        return per_frame(ctx, rng, 2, self.variants, ordered=False)

    def derive(self, ctx: SceneContext, args: Args) -> Derived:
        """Metres, 0.2 to 8."""
        a, b = args["objects"]
        least = ctx.require_clean(ctx.view(args["frames"][0]), (a, b))
        closest = ctx.distances[a][b]
        value = closest if args["variant"] == "closest" else ctx.center_distance(a, b)
        require_range(closest, 0.2, 8.0, "closest distance")
        require_range(value, 0.2, 8.0, "distance")
        return Derived(value, Margin("vis", least, VISIBLE), {"distance_m": value})

    def phrase(self, ctx: SceneContext, args: Args, derived: Derived, write: Writer) -> QA:
        """A number in metres or centimetres."""
        write.show([ctx.frame_of[args["frames"][0]]])
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


class SizeAbs(Task):
    """How large 1-4 objects are, one turn of a dialogue each."""

    id = "size_abs"
    family = "SM"
    capability = "MM"
    group = "meas"
    dimension = "size"
    needs = frozenset({"metric"})
    forms = ("NUM",)
    variants = ("longest", "height", "long_side", "short_side")
    balance = "number"

    def propose(self, ctx: SceneContext, rng: Generator) -> Iterator[Args]:
        """1-4 clean objects of one frame."""
        return per_frame(ctx, rng, (1, 2, 3, 4), self.variants, ordered=False)

    def derive(self, ctx: SceneContext, args: Args) -> Derived | list[Derived]:
        """Metres, 0.05 to 6, of objects that are completely in the image."""
        view = ctx.view(args["frames"][0])
        ctx.require_clean(view, args["objects"])
        turns = []
        for obj in args["objects"]:
            if view.vis[obj].trunc:
                raise Reject(Reason.TRUNCATED, f"object {obj}")
            value = extent(ctx, obj, args["variant"])
            require_range(value, 0.05, 6.0, args["variant"])
            seen = Margin("vis", ctx.share(view, obj), VISIBLE)
            turns.append(Derived(value, seen, {"size_m": value}))
        return turns if len(turns) > 1 else turns[0]

    def phrase(
        self, ctx: SceneContext, args: Args, derived: Derived | list[Derived], write: Writer
    ) -> QA:
        """Numbers in one unit."""
        write.show([ctx.frame_of[args["frames"][0]]])
        unit, factor, places = metric_unit(write)
        parts = derived if isinstance(derived, list) else [derived]
        refs = write.name_all(args["objects"])
        write.in_sentence = False
        turns = [
            write.turn(
                "number",
                part.answer * factor,
                {"a": ref},
                variant=args["variant"],
                unit=unit,
                places=places,
            )
            for ref, part in zip(refs, parts, strict=True)
        ]
        return write.qa(*turns)


class SizeRel(Task):
    """Which of two objects is bigger (smaller, taller, wider, ...)."""

    id = "size_rel"
    family = "SM"
    capability = "SR"
    group = "meas"
    dimension = "size"
    variants = tuple(COMPARISONS)

    def propose(self, ctx: SceneContext, rng: Generator) -> Iterator[Args]:
        """Two clean objects of one frame."""
        return per_frame(ctx, rng, 2, self.variants)

    def derive(self, ctx: SceneContext, args: Args) -> Derived:
        """Index of the object the word fits."""
        a, b = args["objects"]
        ctx.require_clean(ctx.view(args["frames"][0]), (a, b))
        winner, margin = compare_size(ctx, a, b, args["variant"])
        return Derived(winner, margin, {"winner": winner})

    def phrase(self, ctx: SceneContext, args: Args, derived: Derived, write: Writer) -> QA:
        """Yes/no about the first object, or which of the two."""
        write.show([ctx.frame_of[args["frames"][0]]])
        return write.qa(two_choice(write, args["objects"], derived.answer, args["variant"]))
