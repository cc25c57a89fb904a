"""First rung of the curriculum (where an object is, what colour it has) and further tasks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.random import Generator

from spatialvlm.answers import round_half_up
from spatialvlm.synthesis.context import APPEARED_PX_FRAC, SceneContext, require
from spatialvlm.synthesis.formats import UNDRAWN, WORDS_ONLY
from spatialvlm.synthesis.rows import QA, Args, Derived, Margin, Reason, Reject
from spatialvlm.synthesis.scene_graph import FAR_RATIO, NEAR_RATIO, nearness
from spatialvlm.synthesis.tasks.base import Task, per_frame
from spatialvlm.synthesis.wording import Ref
from spatialvlm.synthesis.writer import Writer

GRID = 4
CELL_GUARD = 0.1
"""Least distance of the object's middle from a grid line, in cells."""
CELL_SHARE = 0.125
"""A cell with less of every colour or label shows nothing."""
CELL_TIE = 0.005
"""Least lead of a cell's word over the runner-up, as a share of the cell."""
NOTHING = "none"
CELL_LETTERS = "ABCDEFGHIJKLMNOP"
"""Names of the cells, row by row from the top left."""
COLOUR_NAMES = (
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "gray", "white",
)  # fmt: skip


class LocateCell(Task):
    """In which cell of a 4x4 grid over the image the middle of an object lies, by numbers or by letter."""

    id = "locate_cell"
    family = "SR"
    capability = "SR"
    group = "rel"
    dimension = "rel"
    forms = ("OE",)
    variants = ("number", "letter")

    def propose(self, ctx: SceneContext, rng: Generator) -> Iterator[Args]:
        """One clean object of one frame."""
        return per_frame(ctx, rng, 1, self.variants)

    def derive(self, ctx: SceneContext, args: Args) -> Derived:
        """``[column, row]`` from 1 at the top left, of the middle of the visible box, or the cell's letter."""
        view = ctx.view(args["frames"][0])
        obj = args["objects"][0]
        ctx.require_clean(view, (obj,))
        x0, y0, x1, y1 = view.vis[obj].bbox2d
        column = (x0 + x1) / 2 / view.camera.width * GRID
        row = (y0 + y1) / 2 / view.camera.height * GRID
        guard = min(abs(value - round(value)) for value in (column, row))
        margin = require("cells", guard, CELL_GUARD)
        cell = [min(int(column), GRID - 1) + 1, min(int(row), GRID - 1) + 1]
        values = {"grid_xy": [column, row]}
        if args["variant"] == "letter":
            return Derived(CELL_LETTERS[(cell[1] - 1) * GRID + cell[0] - 1], margin, values)
        return Derived(cell, margin, values)

    def phrase(self, ctx: SceneContext, args: Args, derived: Derived, write: Writer) -> QA:
        """Open question; the grid is stated in the text."""
        write.show([ctx.frame_of[args["frames"][0]]])
        slots = {"a": write.name(args["objects"][0]), "n": str(GRID), "last": CELL_LETTERS[-1]}
        letter = args["variant"] == "letter"
        turn = write.turn(
            "text" if letter else "coord", derived.answer, slots, variant=args["variant"]
        )
        return write.qa(turn, formats=WORDS_ONLY)


class CellMap(Task):
    """The main colour, or the main label, in every lettered cell of a 4x4 grid over the image, or the reverse.

    Sixteen answers about one image, each behind the letter of its cell, teach a model that starts from random
    weights to see long before single questions would; the other tasks build on it. Without the letters the
    model would have to count cells, and does not learn. The reverse variants list the cells of every colour or
    label: what relations need is to find the place of a thing, not only the thing at a place.
    """

    id = "cell_map"
    family = "SR"
    capability = "SR"
    group = "rel"
    dimension = "rel"
    forms = ("OE",)
    variants = ("colour", "label", "colour_cells", "label_cells")

    def propose(self, ctx: SceneContext, rng: Generator) -> Iterator[Args]:
        """Every frame with every variant, in random order."""
        for frame in rng.permutation(ctx.num_frames).tolist():
            for variant in self.variants:
                frame_id = ctx.scene.frames[frame].frame_id
                yield {"variant": variant, "frames": [frame_id], "objects": []}

    def derive(self, ctx: SceneContext, args: Args) -> Derived:
        """``A word B word ...``: the word with the most pixels, ``none`` below an eighth of the cell.

        Reversed, ``word A B, word C, ...`` with the words in alphabetical order.
        """
        ids = ctx.instances(ctx.frame_of[args["frames"][0]])
        words = [obj.color_name for obj in ctx.objects]
        if args["variant"].startswith("label"):
            words = list(ctx.labels)
        height, width = ids.shape
        cells, guard = [], 1.0
        for index in range(len(CELL_LETTERS)):
            row, column = divmod(index, GRID)
            cell = ids[
                row * height // GRID : (row + 1) * height // GRID,
                column * width // GRID : (column + 1) * width // GRID,
            ]
            share = {NOTHING: CELL_SHARE}
            for obj, pixels in enumerate(np.bincount(cell.ravel(), minlength=len(words) + 1)[1:]):
                if pixels and words[obj] is None:
                    raise Reject(Reason.NO_COLOUR, f"object {obj}")
                if pixels:
                    word = str(words[obj])
                    share[word] = share.get(word, 0.0) + int(pixels) / cell.size
            best, second = sorted([*share.values(), 0.0], reverse=True)[:2]
            cells.append(max(share, key=lambda word: share[word]))
            guard = min(guard, best - second)
        margin = require("share", guard, CELL_TIE)
        if args["variant"].endswith("_cells"):
            places = {
                word: " ".join(
                    x for x, held in zip(CELL_LETTERS, cells, strict=True) if held == word
                )
                for word in sorted(set(cells) - {NOTHING})
            }
            answer = ", ".join(f"{word} {letters}" for word, letters in places.items()) or NOTHING
        else:
            answer = " ".join(f"{x} {word}" for x, word in zip(CELL_LETTERS, cells, strict=True))
        return Derived(answer, margin, {"guard": guard})

    def phrase(self, ctx: SceneContext, args: Args, derived: Derived, write: Writer) -> QA:
        """One open question per variant."""
        write.show([ctx.frame_of[args["frames"][0]]])
        slots = {"n": str(GRID), "last": CELL_LETTERS[-1], "none": NOTHING}
        return write.qa(write.turn("text", derived.answer, slots, variant=args["variant"]))


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
        turn = write.turn("text", derived.answer, {"a": write.refs[obj]}, wrong=wrong)
        return write.qa(turn, formats=UNDRAWN)


class Proximity(Task):
    """Whether two objects are next to each other or far apart, relative to their size."""

    id = "proximity"
    family = "SR"
    capability = "SR"
    group = "rel"
    dimension = "rel"
    forms = ("YN", "MCQ")
    variants = ("next to", "far from")

    def propose(self, ctx: SceneContext, rng: Generator) -> Iterator[Args]:
        """Two clean objects of one frame."""
        return per_frame(ctx, rng, 2, self.variants)

    def derive(self, ctx: SceneContext, args: Args) -> Derived:
        """``next to`` below half of the mean longest extent, ``far from`` above twice."""
        a, b = args["objects"]
        ctx.require_clean(ctx.view(args["frames"][0]), (a, b))
        ratio = nearness(ctx, a, b)
        values = {"ratio": ratio}
        if ratio < NEAR_RATIO:
            share = NEAR_RATIO / max(ratio, 0.01)
            return Derived("next to", require("ratio", share, 1.0), values)
        return Derived("far from", require("ratio", ratio, FAR_RATIO), values)

    def phrase(self, ctx: SceneContext, args: Args, derived: Derived, write: Writer) -> QA:
        """Yes/no about the variant, or one of the two words."""
        write.show([ctx.frame_of[args["frames"][0]]])
        first, second = write.name_all(args["objects"])
        slots = {"a": first, "b": second, "word": args["variant"]}
        if write.base == "YN":
            return write.qa(write.turn("yesno", derived.answer == args["variant"], slots))
        wrong = [word for word in self.variants if word != derived.answer]
        return write.qa(write.turn("text", derived.answer, slots, wrong=wrong))


class Grounding2d(Task):
    """The visible 2D box of a referred object, in thousandths of the image."""

    id = "grounding_2d"
    family = "SM"
    capability = "SR"
    group = "meas"
    dimension = "rel"
    forms = ("OE",)
    balance = "number"

    def propose(self, ctx: SceneContext, rng: Generator) -> Iterator[Args]:
        """One clean object of one frame."""
        return per_frame(ctx, rng, 1)

    def derive(self, ctx: SceneContext, args: Args) -> Derived:
        """``[x0, y0, x1, y1]``, 0 to 1000; at least 0.2 % of the pixels show the object."""
        view = ctx.view(args["frames"][0])
        obj = args["objects"][0]
        ctx.require_clean(view, (obj,))
        vis = view.vis[obj]
        margin = require("px_frac", vis.px_frac, APPEARED_PX_FRAC, Reason.OUT_OF_RANGE)
        scale = (1000.0 / view.camera.width, 1000.0 / view.camera.height)
        box = [round_half_up(value * scale[i % 2], 0) for i, value in enumerate(vis.bbox2d)]
        return Derived(box, margin, {"bbox_px": list(vis.bbox2d)})

    def phrase(self, ctx: SceneContext, args: Args, derived: Derived, write: Writer) -> QA:
        """The object is named by words only: a mark would give the box away."""
        write.show([ctx.frame_of[args["frames"][0]]])
        ref = write.name(args["objects"][0])
        if ref.how == "mark":
            raise Reject(Reason.REFERRAL, "only a mark could name the object")
        return write.qa(write.turn("box", derived.answer, {"a": ref}), formats=WORDS_ONLY)
