"""Stacks of cubes on a grid (deformation and assembly): counting, silhouettes, completion.

A stack and the piece that completes it are a two-piece assembly. The heights of the columns stand in ``scene.extra["blocks"]``; every frame says how much of each column's
top (or of an empty cell's floor) it shows. Where too little is seen the answer is not implied.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.random import Generator

from spatialvlm.scenes.transforms import wrap_deg
from spatialvlm.synthesis.context import SceneContext, View, require, tightest
from spatialvlm.synthesis.rows import QA, Args, Derived, Draws, Form, Reason, Reject
from spatialvlm.synthesis.tasks.base import Task, shuffled
from spatialvlm.synthesis.tasks.camera import permutations_of
from spatialvlm.synthesis.writer import Writer

MIN_CELL_VISIBLE = 0.2
MAX_OFF_AXIS_DEG = 35.0
"""Largest angle between the viewing direction and an axis of the grid for silhouettes."""


def num_cubes(heights: np.ndarray) -> int:
    """Cubes of a height map ``[X, Y]``."""
    return int(heights.sum())


def silhouette(heights: np.ndarray, axis: int) -> list[int]:
    """Heights seen along an axis: the maximum over it, in the order of the other axis."""
    return [int(value) for value in heights.max(axis=axis)]


def missing_piece(heights: np.ndarray) -> np.ndarray:
    """Height map of the piece that completes the smallest cuboid around the stack, upside down on top of it."""
    rows, columns = np.nonzero(heights)
    box = heights[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    piece: np.ndarray = box.max() - box
    return piece


def missing_cubes(heights: np.ndarray) -> int:
    """Cubes that complete the smallest cuboid around the stack."""
    return int(missing_piece(heights).sum())


def from_camera(grid: np.ndarray, heading_deg: float) -> np.ndarray:
    """A height map with rows from far to near and columns from left to right for a camera with this heading."""
    quarter = round(heading_deg / 90.0) % 4
    return (grid[::-1, ::-1], grid.T[::-1], grid, grid.T[:, ::-1])[quarter]


def grid_text(grid: np.ndarray) -> str:
    """``2 0 / 1 3``: rows from far to near, each from left to right."""
    return " / ".join(" ".join(map(str, row)) for row in grid.tolist())


def other_pieces(grid: np.ndarray, draws: Draws) -> list[str]:
    """Three pieces that do not fit: turned, mirrored, or with a cube more or less.

    Raises:
        Reject: ``distractors``: there are no three.
    """
    wrong = [grid[::-1], grid[:, ::-1], grid[::-1, ::-1]]
    if grid.shape[0] == grid.shape[1]:
        wrong += [grid.T, grid.T[::-1, ::-1]]
    for place in range(grid.size):
        moved = grid.copy()
        moved.flat[place] += 1 if grid.flat[place] == 0 else -1
        wrong.append(moved)
    right = grid_text(grid)
    texts = [text for text in dict.fromkeys(map(grid_text, wrong)) if text != right]
    if len(texts) < 3:
        raise Reject(Reason.DISTRACTORS, f"pieces {texts}")
    return draws.shuffled(texts)[:3]


def seen_from(heights: np.ndarray, heading_deg: float) -> tuple[list[int], float]:
    """Silhouette from left to right for a camera that looks along ``heading_deg`` on the ground.

    It begins and ends with a cube: nothing in the picture says how far the empty grid goes on.

    Returns:
        Heights from left to right, and the angle between the heading and the nearest axis.
    """
    quarter = round(heading_deg / 90.0) % 4
    off = abs(wrap_deg(heading_deg - 90.0 * quarter))
    along_x = quarter in (0, 2)
    profile = silhouette(heights, 0 if along_x else 1)
    # Looking along +x the left side is +y; along +y it is -x; the others are reversed.
    if quarter in (0, 3):
        profile = profile[::-1]
    filled = [place for place, height in enumerate(profile) if height]
    return profile[filled[0] : filled[-1] + 1], off


class DaBlocks(Task):
    """How many cubes a stack has, its outline from the camera, how many complete it to a cuboid, or which piece."""

    id = "da_blocks"
    family = "SAR"
    capability = "DA"
    group = "complex"
    dimension = "shape"
    views = "1-2"
    forms = ("NUM", "MCQ")
    variants = ("count", "silhouette", "complete", "assemble")

    def unmet_need(self, ctx: SceneContext) -> Reason | None:
        """Only scenes of stacked cubes."""
        if "blocks" not in ctx.scene.extra:
            return Reason.NO_BLOCKS
        return super().unmet_need(ctx)

    def propose(self, ctx: SceneContext, rng: Generator) -> Iterator[Args]:
        """Single views and pairs of views."""
        frames = [frame.frame_id for frame in ctx.scene.frames]
        for index in shuffled(rng, frames):
            others = [frames[(index + step) % len(frames)] for step in (1, 2, 3)]
            for shown in ([], *([other] for other in others if other != frames[index])):
                for variant in self.variants:
                    yield {"variant": variant, "frames": [frames[index], *shown]}

    def forms_for(self, args: Args) -> tuple[Form, ...]:
        """Outlines are lists, pieces are chosen."""
        if args["variant"] == "assemble":
            return ("MCQ",)
        return ("OE", "MCQ") if args["variant"] == "silhouette" else self.forms

    def derive(self, ctx: SceneContext, args: Args) -> Derived:
        """A number, the heights from left to right, or the rows of the missing piece from far to near."""
        heights = np.array(ctx.scene.extra["blocks"]["heights"])
        views = [ctx.view(frame) for frame in args["frames"]]
        shown = np.max([self._visible(ctx, view) for view in views], axis=0)
        seen = require("cell_visible", float(shown.min()), MIN_CELL_VISIBLE, Reason.OCCLUDED)
        values = {"heights": heights.tolist()}
        if args["variant"] == "count":
            return Derived(num_cubes(heights), seen, values)
        if args["variant"] == "complete":
            return Derived(missing_cubes(heights), seen, values)
        heading = views[0].camera.heading_deg
        profile, off = seen_from(heights, heading)
        axis = require("angle_deg", 45.0 - off, 45.0 - MAX_OFF_AXIS_DEG, Reason.SECTOR)
        if args["variant"] == "assemble":
            piece = from_camera(missing_piece(heights), heading)
            return Derived(piece.tolist(), tightest(seen, axis), values)
        return Derived(profile, tightest(seen, axis), values)

    def _visible(self, ctx: SceneContext, view: View) -> np.ndarray:
        shares = ctx.scene.frames[view.index].extra.get("cell_visible")
        if shares is None:
            raise Reject(Reason.NEEDS_VISIBILITY, view.frame_id)
        return np.array(shares)

    def phrase(self, ctx: SceneContext, args: Args, derived: Derived, write: Writer) -> QA:
        """Counts within three of the truth, permuted outlines, or pieces that do not fit."""
        write.show([ctx.frame_of[frame] for frame in args["frames"]])
        variant = args["variant"]
        # Left, right, near and far are those of one camera.
        slots = {"camera": "the camera of view 1" if len(args["frames"]) > 1 else "the camera"}
        if variant == "assemble":
            piece = np.array(derived.answer)
            wrong = other_pieces(piece, write.draws)
            return write.qa(
                write.turn("text", grid_text(piece), slots, variant=variant, wrong=wrong)
            )
        if variant != "silhouette":
            wrong = write.count_options(derived.answer)
            turn = write.turn(
                "number", derived.answer, {}, variant=variant, places=0, unit="count", wrong=wrong
            )
            return write.qa(turn)
        right = [str(height) for height in derived.answer]
        if write.base == "OE":
            return write.qa(write.turn("list", right, slots, variant=variant))
        if len(set(right)) < 2:
            raise Reject(Reason.DISTRACTORS, "all columns have one height")
        wrong = permutations_of(write.draws, right)
        return write.qa(write.turn("text", ", ".join(right), slots, variant=variant, wrong=wrong))
