"""Spatial chain of thought: the local map a question needs is written down before the conclusion.

The steps have the wording of the LocalCogMap questions, so a model that learned those can use them. A
step is only written when the conclusion follows from the **rounded** cells.
"""

from __future__ import annotations

import math

from spatialvlm.synthesis.context import SceneContext
from spatialvlm.synthesis.localcogmap import ANCHORS, MIN_ANCHOR_M, cell_of, on_grid, place
from spatialvlm.synthesis.relations import direction_word
from spatialvlm.synthesis.rows import Reject

ORIGIN = [int(ANCHORS[0].real), int(ANCHORS[0].imag)]
AHEAD = [int(ANCHORS[1].real), int(ANCHORS[1].imag)]


def local_cell(ctx: SceneContext, a: int, b: int, target: int) -> list[int] | None:
    """Cell of a target on the map of two anchors, ``None`` if it is off the grid."""
    points = [complex(*ctx.center_list[obj][:2]) for obj in (a, b, target)]
    if abs(points[0] - points[1]) < MIN_ANCHOR_M:
        return None
    position = place(*points)
    return list(cell_of(position)) if on_grid(position) else None


def _map_step(ctx: SceneContext, a: int, b: int, target: int, cell: list[int]) -> str:
    la, lb, lt = (ctx.labels[obj] for obj in (a, b, target))
    return f"With the {la} at {ORIGIN} and the {lb} at {AHEAD}, the {lt} is at {cell}."


def direction_steps(
    ctx: SceneContext, a: int, b: int, c: int, variant: str, answer: str
) -> str | None:
    """Steps from the map of (a, b) to where ``c`` is for someone at ``a`` who faces ``b``."""
    cell = local_cell(ctx, a, b, c)
    if cell is None or cell == ORIGIN:
        return None
    # Facing from (5, 5) to (5, 3) is looking down the map: left is towards larger x.
    left, ahead = cell[0] - ORIGIN[0], ORIGIN[1] - cell[1]
    try:
        word, _ = direction_word(math.degrees(math.atan2(left, ahead)), variant)
    except Reject:
        return None
    if word != answer:
        return None
    side = "larger" if left > 0 else "smaller"
    sideways = (
        f"its x is {side} than {ORIGIN[0]}, which is the {'left' if left > 0 else 'right'} side"
    )
    depth = ""
    if variant != "easy":
        where = "ahead of" if ahead > 0 else "behind"
        depth = (
            f" and it is {abs(ahead)} cell{'s' if abs(ahead) > 1 else ''} {where} me"
            if ahead
            else " and it is level with me"
        )
    return (
        f"{_map_step(ctx, a, b, c, cell)} Standing at {ORIGIN} and facing {AHEAD}, I look down the map: "
        f"{sideways}{depth}."
    )


def distance_steps(
    ctx: SceneContext, reference: int, first: int, second: int, answer: str
) -> str | None:
    """Steps from the map of (reference, first) to which of two objects is closer to the reference."""
    cell = local_cell(ctx, reference, first, second)
    if cell is None:
        return None
    near = abs(ANCHORS[1] - ANCHORS[0])
    far = math.hypot(cell[0] - ORIGIN[0], cell[1] - ORIGIN[1])
    if abs(near - far) < 0.5:
        return None
    closer = first if near < far else second
    if ctx.labels[closer] != answer:
        return None
    one, two = ctx.labels[first], ctx.labels[second]
    return (
        f"{_map_step(ctx, reference, first, second, cell)} From {ORIGIN} the {one} is {near:.1f} cells "
        f"away and the {two} {far:.1f} cells."
    )
