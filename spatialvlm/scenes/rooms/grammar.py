"""Layout grammars: how a room is shaped and where its groups of furniture go.

Every grammar belongs to exactly one split, so layouts of held-out rooms are never seen in training.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.random import Generator

from spatialvlm.scenes.rooms.appearance import SATURATED, Split
from spatialvlm.scenes.rooms.archetypes import ARCHETYPES, draw_piece
from spatialvlm.scenes.rooms.placement import Opening, Placed, Placer, Rect, Shell

Preset = Literal["realistic", "small", "turntable", "blocks"]


@dataclass(frozen=True)
class Grammar:
    """A family of layouts.

    Args:
        name: Part of the room's record.
        split: The only split that uses it.
        l_shape: Floor plan with one corner cut out.
        area_m2: Range of floor areas.
        aspect: Range of length over width.
        arrange: ``perimeter`` walls only, ``zones`` one group per half, ``island`` one group in the
            middle, ``galley`` the two long walls only, ``open`` groups away from the walls.
    """

    name: str
    split: Split
    l_shape: bool
    area_m2: tuple[float, float]
    aspect: tuple[float, float]
    arrange: Literal["perimeter", "zones", "island", "galley", "open"]


GRAMMARS: dict[str, Grammar] = {
    g.name: g
    for g in (
        Grammar("perimeter", "train", False, (14, 32), (1.0, 1.5), "perimeter"),
        Grammar("two_zone", "train", False, (20, 44), (1.3, 1.9), "zones"),
        Grammar("island", "train", False, (20, 44), (1.0, 1.5), "island"),
        Grammar("l_perimeter", "train", True, (22, 46), (1.0, 1.4), "perimeter"),
        Grammar("galley", "val", False, (14, 26), (1.8, 2.4), "galley"),
        Grammar("l_two_zone", "test", True, (26, 50), (1.0, 1.4), "zones"),
        Grammar("open_studio", "test", False, (30, 60), (1.0, 1.6), "open"),
    )
}


def grammars_of(split: str) -> list[str]:
    """Names of the grammars of a split, in a fixed order."""
    return [g.name for g in GRAMMARS.values() if g.split == split]


def draw_shell(grammar: Grammar, rng: Generator, preset: Preset) -> Shell:
    """Random floor plan with doors and windows."""
    area = rng.uniform(*grammar.area_m2)
    if preset == "small":
        area = rng.uniform(13, 19) * (1.25 if grammar.l_shape else 1.0)
    aspect = rng.uniform(*grammar.aspect)
    if preset == "small":
        aspect = min(aspect, 1.5)
    length, width = np.sqrt(area * aspect), np.sqrt(area / aspect)
    if rng.random() < 0.5:
        length, width = width, length
    x, y = round(float(length), 2), round(float(width), 2)
    polygon: tuple[tuple[float, float], ...] = ((0, 0), (x, 0), (x, y), (0, y))
    rects: tuple[Rect, ...] = (Rect(0, 0, x, y),)
    if grammar.l_shape:
        cut_x = round(float(x * rng.uniform(0.3, 0.45)), 2)
        cut_y = round(float(y * rng.uniform(0.3, 0.45)), 2)
        polygon = ((0, 0), (x, 0), (x, y - cut_y), (x - cut_x, y - cut_y), (x - cut_x, y), (0, y))
        rects = (Rect(0, 0, x, y - cut_y), Rect(0, 0, x - cut_x, y))
        if rng.random() < 0.5:
            polygon = tuple((x - px, py) for px, py in reversed(polygon))
            rects = tuple(Rect(x - r.x1, r.y0, x - r.x0, r.y1) for r in rects)
        if rng.random() < 0.5:
            polygon = tuple((px, y - py) for px, py in reversed(polygon))
            rects = tuple(Rect(r.x0, y - r.y1, r.x1, y - r.y0) for r in rects)
    shell = Shell(polygon, rects, round(float(rng.uniform(2.4, 3.0)), 2))
    return Shell(polygon, rects, shell.ceiling, tuple(_draw_openings(shell, rng)))


def _draw_openings(shell: Shell, rng: Generator) -> list[Opening]:
    """One or two doors and up to three windows that do not overlap."""
    kinds = ["door"] * int(rng.integers(1, 3)) + ["window"] * int(rng.integers(0, 4))
    openings: list[Opening] = []
    for kind in kinds:
        for _ in range(12):
            index = int(rng.integers(len(shell.walls)))
            wide = 0.9 if kind == "door" else float(rng.uniform(0.9, 1.8))
            length = shell.walls[index].length
            if length < wide + 0.5:
                continue
            center = float(rng.uniform(wide / 2 + 0.2, length - wide / 2 - 0.2))
            z0, z1 = (0.0, 2.02) if kind == "door" else (0.95, min(2.1, shell.ceiling - 0.25))
            clear = all(
                o.wall != index or abs(o.center_m - center) > (o.width_m + wide) / 2 + 0.2
                for o in openings
            )
            if clear:
                openings.append(Opening(kind, index, center, wide, z0, z1))
                break
    return openings


@dataclass
class Decorator:
    """Furnishes a shell group by group; every method places what fits and skips the rest."""

    placer: Placer
    rng: Generator
    split: str

    def piece(
        self,
        label: str,
        put: Callable[..., int | None],
        *args: object,
        **options: object,
    ) -> int | None:
        """Draw a piece of ``label`` in an unused colour and let ``put`` place it."""
        if not self.placer.room_for(label):
            return None
        palette = ARCHETYPES[label].colors
        used = {p.piece.color_name for p in self.placer.placed if p.label == label}
        unused = [name for name in palette if name not in used] or list(palette)
        color = unused[int(self.rng.integers(len(unused)))]
        return put(draw_piece(label, self.rng, self.split, color), *args, **options)

    def item(self, index: int) -> Placed:
        """Placed piece by index."""
        return self.placer.placed[index]

    def anchor(self, label: str, region: Rect | None, walls: tuple[int, ...] | None) -> int | None:
        """A main piece: against a wall, or free-standing when ``walls`` is empty."""
        if walls == ():
            return self.piece(label, self.placer.free, region=region)
        return self.piece(label, self.placer.on_wall, region=region, walls=walls)

    def living(self, region: Rect | None, walls: tuple[int, ...] | None) -> None:
        """Sofa with coffee table and rug, armchair, tv on a cabinet, floor lamp, pillows."""
        p = self.placer
        sofa = self.anchor("sofa", region, walls)
        if sofa is not None:
            depth, width, _ = self.item(sofa).piece.size
            table = self.piece("coffee table", p.near, sofa, (depth / 2 + 0.75, 0.0), np.pi / 2)
            if table is not None and self.rng.random() < 0.7:
                self.piece("rug", p.near, table, (0.0, 0.0), flat=True)
            if table is not None and self.rng.random() < 0.5:
                self.piece("box", p.on_top, table)
            self.piece("floor lamp", p.near, sofa, (0.0, width / 2 + 0.32))
            self.piece("armchair", p.near, sofa, (depth / 2 + 0.85, -width / 2 - 0.35), np.pi / 2)
            for _ in range(3):
                self.piece("pillow", p.on_top, sofa)
        cabinet = self.piece("cabinet", p.on_wall, region=region, walls=walls or None)
        if cabinet is not None:
            self.piece("tv", p.on_top, cabinet)
            self.piece("plant", p.on_top, cabinet) if self.rng.random() < 0.3 else None

    def bedroom(self, region: Rect | None, walls: tuple[int, ...] | None) -> None:
        """Bed with nightstands, lamps and pillows, wardrobe."""
        p = self.placer
        bed = self.anchor("bed", region, walls)
        if bed is not None:
            depth, width, _ = self.item(bed).piece.size
            for side in (-1, 1):
                stand = self.piece(
                    "nightstand", p.near, bed, (-depth / 2 + 0.3, side * (width / 2 + 0.36))
                )
                if stand is not None:
                    self.piece("lamp", p.on_top, stand)
            for _ in range(3):
                self.piece("pillow", p.on_top, bed)
        self.piece("wardrobe", p.on_wall, region=region, walls=walls or None)

    def office(self, region: Rect | None, walls: tuple[int, ...] | None) -> None:
        """Desk with monitor and lamp, chair, bookshelf, bin."""
        p = self.placer
        desk = self.anchor("desk", region, walls)
        if desk is not None:
            depth, width, _ = self.item(desk).piece.size
            self.piece("monitor", p.on_top, desk)
            self.piece("lamp", p.on_top, desk)
            self.piece("chair", p.near, desk, (depth / 2 + 0.42, -0.1), np.pi)
            self.piece("bin", p.near, desk, (0.0, width / 2 + 0.28))
        self.piece("bookshelf", p.on_wall, region=region, walls=walls or None)

    def dining(self, region: Rect | None, walls: tuple[int, ...] | None) -> None:
        """Table with chairs around it; never against a wall, so ``walls`` is for the sideboard."""
        p = self.placer
        table = self.piece("dining table", p.free, region=region)
        if walls:
            self.piece("cabinet", p.on_wall, region=region, walls=walls)
        if table is not None:
            depth, width, _ = self.item(table).piece.size
            seats = [(0.25 * depth, 1), (-0.25 * depth, 1), (0.25 * depth, -1), (-0.25 * depth, -1)]
            for x, side in (seats[i] for i in self.rng.permutation(4)):
                self.piece(
                    "chair", p.near, table, (x, side * (width / 2 + 0.38)), -side * np.pi / 2
                )
            if self.rng.random() < 0.5:
                self.piece("box", p.on_top, table)

    def kitchen(self, region: Rect | None, walls: tuple[int, ...] | None) -> None:
        """Fridge, stove, sink, bin."""
        for label in ("fridge", "stove", "sink"):
            self.piece(label, self.placer.on_wall, region=region, walls=walls or None)
        for _ in range(3):
            self.piece("stool", self.placer.free, region=region)

    def bathroom(self, region: Rect | None, walls: tuple[int, ...] | None) -> None:
        """Bathtub, toilet, sink."""
        for label in ("bathtub", "toilet", "sink"):
            self.piece(label, self.placer.on_wall, region=region, walls=walls or None)

    def extras(self, target: int) -> None:
        """Single pieces until the room holds ``target`` objects."""
        p = self.placer
        walls_only = (
            "plant",
            "bookshelf",
            "cabinet",
            "floor lamp",
            "bin",
            "suitcase",
            "armchair",
            "wardrobe",
        )
        anywhere = ("box", "stool", "chair", "plant", "box", "stool", "chair")
        for _ in range(60):
            if len(p.placed) >= target:
                return
            if self.rng.random() < 0.25:
                self.piece("picture", p.on_wall, hung=(1.15, 1.5))
            elif self.rng.random() < 0.65:
                self.piece(walls_only[int(self.rng.integers(len(walls_only)))], p.on_wall)
            else:
                self.piece(anywhere[int(self.rng.integers(len(anywhere)))], p.free)


REPEATABLE = ("chair", "chair", "pillow", "box", "stool", "plant", "nightstand", "picture", "lamp")
"""Labels that may occur two to four times in one room; chairs twice as often as the others."""


def furnish(grammar: Grammar, shell: Shell, rng: Generator) -> Placer:
    """Furnish a realistic room: 12 to 25 pieces."""
    limits = {}
    if rng.random() < 0.6:
        limits[REPEATABLE[int(rng.integers(len(REPEATABLE)))]] = int(rng.integers(2, 5))
    placer = Placer(shell, rng, limits)
    decorator = Decorator(placer, rng, grammar.split)
    groups: list[Callable[[Rect | None, tuple[int, ...] | None], None]] = [
        decorator.living,
        decorator.bedroom,
        decorator.office,
        decorator.dining,
        decorator.kitchen,
        decorator.bathroom,
    ]
    weights = np.array([1.3, 1.0, 1.1, 1.0, 0.8, 0.35])
    count = 2 if shell.area < 18 else 3 if shell.area < 30 else 4
    chosen = [groups[i] for i in rng.choice(6, count, replace=False, p=weights / weights.sum())]
    regions, walls = _regions(grammar, shell, rng, count)
    for group, region, allowed in zip(chosen, regions, walls, strict=True):
        group(region, allowed)
    decorator.extras(int(np.clip(round(shell.area * 0.55 + rng.uniform(4, 9)), 13, 25)))
    return placer


def _regions(
    grammar: Grammar, shell: Shell, rng: Generator, count: int
) -> tuple[list[Rect | None], list[tuple[int, ...] | None]]:
    """Where each group may go and against which walls (empty = free-standing)."""
    x = max(r.x1 for r in shell.rects)
    y = max(r.y1 for r in shell.rects)
    if grammar.arrange == "zones":
        if grammar.l_shape:
            halves = list(shell.rects)
        elif x >= y:
            halves = [Rect(0, 0, x / 2, y), Rect(x / 2, 0, x, y)]
        else:
            halves = [Rect(0, 0, x, y / 2), Rect(0, y / 2, x, y)]
        return [halves[i % 2] for i in range(count)], [None] * count
    if grammar.arrange == "island":
        middle = Rect(0.25 * x, 0.25 * y, 0.75 * x, 0.75 * y)
        return [middle] + [None] * (count - 1), [()] + [None] * (count - 1)
    if grammar.arrange == "galley":
        long_walls = (0, 2) if x >= y else (1, 3)
        return [None] * count, [long_walls] * count
    if grammar.arrange == "open":
        quarters: list[Rect | None] = [
            Rect(
                0.08 * x + i * 0.46 * x,
                0.08 * y + j * 0.46 * y,
                (0.46 + i * 0.46) * x,
                (0.46 + j * 0.46) * y,
            )
            for i in (0, 1)
            for j in (0, 1)
        ]
        order = rng.permutation(4)
        return [quarters[i] for i in order[:count]], [()] * count
    return [None] * count, [None] * count


SMALL_LABELS = (
    "sofa", "armchair", "bed", "wardrobe", "fridge", "cabinet", "desk", "dining table", "bathtub",
    "chair", "stool", "bin", "box", "suitcase",
)  # fmt: skip
SMALL_REPEATABLE = ("chair", "box", "bin", "stool")


def furnish_small(grammar: Grammar, shell: Shell, rng: Generator) -> Placer:
    """Three to six large pieces with distinct saturated colours and much space between them."""
    labels = list(rng.permutation(SMALL_LABELS[:9])[: int(rng.integers(1, 4))])
    labels += list(rng.permutation(SMALL_LABELS[9:])[: int(rng.integers(3, 5))])
    limits: dict[str, int] = {}
    if rng.random() < 0.5:
        repeated = SMALL_REPEATABLE[int(rng.integers(len(SMALL_REPEATABLE)))]
        limits[repeated] = int(rng.integers(2, 5))
        labels = [label for label in labels if label != repeated][:3] + [repeated] * limits[
            repeated
        ]
    placer = Placer(shell, rng, limits, clearance=0.35)
    colors = [SATURATED[i] for i in rng.permutation(len(SATURATED))]
    for label, color in zip(labels[:6], colors, strict=False):
        scale = 1.35 if label in SMALL_LABELS[9:] else 1.0
        piece = draw_piece(str(label), rng, grammar.split, color, scale)
        if ARCHETYPES[str(label)].place == "wall" and grammar.arrange != "open":
            long_walls = (
                (0, 2)
                if max(r.x1 for r in shell.rects) >= max(r.y1 for r in shell.rects)
                else (1, 3)
            )
            placer.on_wall(piece, walls=long_walls if grammar.arrange == "galley" else None)
        else:
            placer.free(piece)
    return placer
