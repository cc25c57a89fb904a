"""Twenty-eight kinds of furniture with real-world sizes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float
from numpy.random import Generator

from spatialvlm.scenes.boxes import Symmetry
from spatialvlm.scenes.rooms import furniture
from spatialvlm.scenes.rooms.appearance import COLORS, SATURATED
from spatialvlm.scenes.rooms.sketch import Interval, Part, Sketch, Surface


@dataclass(frozen=True)
class Archetype:
    """A kind of furniture."""

    label: str
    depth: Interval
    width: Interval | None
    """``None``: as deep as wide (round footprint)."""
    height: Interval
    draw: Callable[[Sketch], "Surface | None"]
    has_front: bool = False
    symmetry: Symmetry = "c2"
    place: Literal["wall", "floor", "hung", "on"] = "wall"
    parents: tuple[str, ...] = ()
    """Labels it may stand on (``place == "on"``)."""
    colors: tuple[str, ...] = SATURATED
    texture: str = "plain"
    """Texture of the ``main`` material."""


HELD_OUT_SHARE = 0.85
"""Training draws sizes below this share of each range, val and test above it."""

_WOODS = ("brown", "white", "black", "gray", "orange")
_ANY = tuple(COLORS)
_WHITE_GOODS = ("white", "gray", "black", "red", "cyan")

ARCHETYPES: dict[str, Archetype] = {
    a.label: a
    for a in (
        Archetype("chair", (0.42, 0.55), (0.42, 0.55), (0.80, 1.05), furniture.draw_chair, True, "none", "floor", texture="fabric"),
        Archetype("stool", (0.30, 0.42), None, (0.42, 0.65), furniture.draw_stool, False, "inf", "floor"),
        Archetype("armchair", (0.75, 0.95), (0.75, 1.0), (0.75, 1.0), furniture.draw_armchair, True, "none", texture="fabric"),
        Archetype("sofa", (0.80, 1.0), (1.5, 2.4), (0.70, 0.95), furniture.draw_sofa, True, "none", texture="fabric"),
        Archetype("dining table", (1.2, 2.0), (0.75, 1.0), (0.72, 0.78), furniture.draw_dining_table, place="floor", colors=_WOODS, texture="wood"),
        Archetype("coffee table", (0.80, 1.3), (0.50, 0.70), (0.35, 0.48), furniture.draw_coffee_table, place="floor", colors=_WOODS, texture="wood"),
        Archetype("desk", (0.60, 0.80), (1.0, 1.6), (0.72, 0.78), furniture.draw_desk, True, "none", colors=_WOODS, texture="wood"),
        Archetype("bed", (1.9, 2.1), (0.90, 1.8), (0.45, 1.1), furniture.draw_bed, True, "none", texture="fabric"),
        Archetype("nightstand", (0.35, 0.50), (0.40, 0.55), (0.45, 0.65), furniture.draw_nightstand, True, "none", colors=_WOODS, texture="wood"),
        Archetype("wardrobe", (0.50, 0.65), (0.80, 2.0), (1.8, 2.2), furniture.draw_wardrobe, True, "none", colors=(*_WOODS, "green", "blue"), texture="wood"),
        Archetype("bookshelf", (0.25, 0.40), (0.60, 1.2), (1.2, 2.1), furniture.draw_bookshelf, True, "none", colors=_WOODS, texture="wood"),
        Archetype("cabinet", (0.35, 0.50), (0.60, 1.4), (0.70, 1.1), furniture.draw_cabinet, True, "none", colors=(*_WOODS, "green", "cyan", "yellow"), texture="wood"),
        Archetype("fridge", (0.60, 0.75), (0.60, 0.90), (1.5, 1.9), furniture.draw_fridge, True, "none", colors=_WHITE_GOODS, texture="metal"),
        Archetype("stove", (0.55, 0.65), (0.55, 0.75), (0.85, 0.95), furniture.draw_stove, True, "none", colors=("white", "gray", "black", "red")),
        Archetype("sink", (0.45, 0.60), (0.60, 1.0), (0.82, 0.95), furniture.draw_sink, True, "none", colors=(*_WOODS, "blue", "green"), texture="wood"),
        Archetype("toilet", (0.60, 0.75), (0.36, 0.45), (0.70, 0.85), furniture.draw_toilet, True, "none", colors=("white", "pink", "cyan")),
        Archetype("bathtub", (0.70, 0.80), (1.5, 1.75), (0.50, 0.60), furniture.draw_bathtub, colors=("white", "pink", "cyan", "green")),
        Archetype("tv", (0.06, 0.12), (0.80, 1.4), (0.50, 0.85), furniture.draw_screen, True, "none", "on", ("cabinet",), ("black", "gray")),
        Archetype("monitor", (0.15, 0.22), (0.45, 0.70), (0.38, 0.55), furniture.draw_screen, True, "none", "on", ("desk",), ("black", "gray", "white")),
        Archetype("lamp", (0.20, 0.35), None, (0.35, 0.60), furniture.draw_lamp, False, "inf", "on", ("nightstand", "desk"), texture="fabric"),
        Archetype("floor lamp", (0.30, 0.45), None, (1.4, 1.75), furniture.draw_floor_lamp, False, "inf", texture="fabric"),
        Archetype("plant", (0.25, 0.60), None, (0.40, 1.5), furniture.draw_plant, False, "inf", colors=("green",), texture="leaves"),
        Archetype("bin", (0.22, 0.35), None, (0.30, 0.60), furniture.draw_bin, False, "inf"),
        Archetype("box", (0.25, 0.60), (0.25, 0.60), (0.20, 0.50), furniture.draw_carton, place="floor", colors=("brown", *SATURATED), texture="cardboard"),
        Archetype("suitcase", (0.22, 0.30), (0.40, 0.50), (0.55, 0.75), furniture.draw_suitcase),
        Archetype("pillow", (0.35, 0.50), (0.45, 0.65), (0.12, 0.20), furniture.draw_pillow, False, "c2", "on", ("bed", "sofa"), texture="fabric"),
        Archetype("rug", (1.2, 2.4), (0.80, 1.7), (0.01, 0.02), furniture.draw_rug, place="floor", texture="rug"),
        Archetype("picture", (0.02, 0.05), (0.40, 1.2), (0.30, 0.90), furniture.draw_picture, True, "none", "hung", colors=("black", "brown", "white", "yellow")),
    )
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Piece:
    """One drawn archetype, not yet placed."""

    archetype: Archetype
    size: Float[np.ndarray, " 3"]
    parts: tuple[Part, ...]
    surface: Surface | None
    color_name: str

    @property
    def label(self) -> str:
        """Label of the archetype."""
        return self.archetype.label


def draw_size(
    archetype: Archetype, rng: Generator, split: str, scale: float = 1.0
) -> tuple[float, float, float]:
    """Random size in metres: training uses the lower 85 % of each range, val and test the rest."""
    low, high = (0.0, HELD_OUT_SHARE) if split == "train" else (HELD_OUT_SHARE, 1.0)

    def pick(interval: Interval) -> float:
        share = rng.uniform(low, high)
        return round(scale * (interval[0] + share * (interval[1] - interval[0])), 3)

    depth = pick(archetype.depth)
    width = depth if archetype.width is None else pick(archetype.width)
    return depth, width, pick(archetype.height)


def draw_piece(
    label: str, rng: Generator, split: str, color_name: str | None = None, scale: float = 1.0
) -> Piece:
    """Draw one piece of furniture.

    Args:
        label: Key of :data:`ARCHETYPES`.
        rng: Source of all choices.
        split: Decides the part of the size range.
        color_name: Named main colour; drawn from the archetype's palette when ``None``.
        scale: Factor on all three extents.
    """
    archetype = ARCHETYPES[label]
    depth, width, height = draw_size(archetype, rng, split, scale)
    if color_name is None:
        color_name = archetype.colors[int(rng.integers(len(archetype.colors)))]
    sketch = Sketch(depth, width, height, rng)
    surface = archetype.draw(sketch)
    return Piece(
        archetype, np.array([depth, width, height]), tuple(sketch.parts), surface, color_name
    )
