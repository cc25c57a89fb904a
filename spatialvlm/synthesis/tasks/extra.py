"""First rung of the curriculum (where an object is, what colour it has) and further tasks."""

from __future__ import annotations

from collections.abc import Iterator

from numpy.random import Generator

from spatialvlm.synthesis.context import SceneContext, require
from spatialvlm.synthesis.rows import QA, Args, Derived, Margin, Reason, Reject
from spatialvlm.synthesis.tasks.base import Task, per_frame
from spatialvlm.synthesis.wording import Ref
from spatialvlm.synthesis.writer import Writer

GRID = 4
CELL_GUARD = 0.1
"""Least distance of the object's middle from a grid line, in cells."""
COLOUR_NAMES = (
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "gray", "white",
)  # fmt: skip


class LocateCell(Task):
    """In which cell of a 4x4 grid over the image the middle of an object lies."""

    id = "locate_cell"
    family = "SR"
    capability = "SR"
    group = "rel"
    dimension = "rel"
    forms = ("OE",)

    def propose(self, ctx: SceneContext, rng: Generator) -> Iterator[Args]:
        """One clean object of one frame."""
        return per_frame(ctx, rng, 1)

    def derive(self, ctx: SceneContext, args: Args) -> Derived:
        """``[column, row]`` from 1 at the top left, of the middle of the visible box."""
        view = ctx.view(args["frames"][0])
        obj = args["objects"][0]
        ctx.require_clean(view, (obj,))
        x0, y0, x1, y1 = view.vis[obj].bbox2d
        column = (x0 + x1) / 2 / view.camera.width * GRID
        row = (y0 + y1) / 2 / view.camera.height * GRID
        guard = min(abs(value - round(value)) for value in (column, row))
        margin = require("cells", guard, CELL_GUARD)
        cell = [min(int(column), GRID - 1) + 1, min(int(row), GRID - 1) + 1]
        return Derived(cell, margin, {"grid_xy": [column, row]})

    def phrase(self, ctx: SceneContext, args: Args, derived: Derived, write: Writer) -> QA:
        """Open question; the grid is stated in the text."""
        write.show([ctx.frame_of[args["frames"][0]]])
        slots = {"a": write.name(args["objects"][0]), "n": str(GRID)}
        return write.qa(write.turn("coord", derived.answer, slots))


class ObjectColour(Task):
    """The main colour of an object."""

    id = "object_colour"
    family = "SR"
    capability = "SR"
    group = "rel"
    dimension = "rel"
    forms = ("OE", "MCQ")

    def propose(self, ctx: SceneContext, rng: Generator) -> Iterator[Args]:
        """One clean object of one frame."""
        return per_frame(ctx, rng, 1)

    def derive(self, ctx: SceneContext, args: Args) -> Derived:
        """Colour name of the annotation; the label alone must single the object out."""
        view = ctx.view(args["frames"][0])
        obj = args["objects"][0]
        least = ctx.require_clean(view, (obj,))
        colour = ctx.objects[obj].color_name
        if colour is None:
            raise Reject(Reason.NO_COLOUR, f"object {obj}")
        if ctx.not_hidden(view, ctx.labels[obj]) != [obj]:
            raise Reject(Reason.DUPLICATE_LABEL, ctx.labels[obj])
        return Derived(colour, Margin("vis", least, 0.3), {"colour": colour})

    def phrase(self, ctx: SceneContext, args: Args, derived: Derived, write: Writer) -> QA:
        """The object is named by its label only."""
        write.show([ctx.frame_of[args["frames"][0]]])
        obj = args["objects"][0]
        label = ctx.labels[obj]
        write.refs[obj] = Ref(obj, f"the {label}", label, "label")
        others = sorted({o.color_name for o in ctx.objects if o.color_name} | set(COLOUR_NAMES))
        wrong = write.draws.shuffled([name for name in others if name != derived.answer])[:3]
        return write.qa(write.turn("text", derived.answer, {"a": write.refs[obj]}, wrong=wrong))
