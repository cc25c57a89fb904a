"""Metric measurements in one image (OpenSpatial 1-4)."""

from __future__ import annotations

from collections.abc import Iterator

from numpy.random import Generator

from spatialvlm.synthesis.context import SceneContext, require_range
from spatialvlm.synthesis.rows import QA, Args, Derived, Margin
from spatialvlm.synthesis.tasks.base import Task, per_frame
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
