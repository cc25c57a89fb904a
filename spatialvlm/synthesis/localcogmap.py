"""LocalCogMap: a room as a chain of small local maps (SSR, arXiv 2603.00409).

Every triplet (anchor 1, anchor 2, target) has a map of its own: a similarity of the ground plane takes
the first anchor to cell (5, 5) and the second to (5, 3) of a 10 x 10 grid, x to the right and y **up**,
seen from above. The target's cell is the answer. Triplets grow from a seed so that each new target
has two anchors that were placed before; from unrounded cells the whole layout can be recovered up to
one similarity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations, permutations

GRID = 10
ANCHORS = (complex(5, 5), complex(5, 3))
SEED_RADIUS_M = 2.5
MIN_ANCHOR_M = 0.3
SEED_RADIUS_RELATIVE = 0.35
"""Seed radius without metric scale, as a share of the diagonal of the object set."""
MIN_ANCHOR_RELATIVE = 0.04
MAX_PAIRS = 16
FIT_CELLS = 7.0
FIT_CENTRE = complex(4.5, 4.5)
FIT_STEPS = 12


@dataclass(frozen=True)
class Triplet:
    """One local map."""

    anchor1: int
    anchor2: int
    target: int
    position: complex
    """Unrounded cell of the target."""

    @property
    def cell(self) -> list[int]:
        """Rounded cell ``[x, y]``."""
        return list(cell_of(self.position))


@dataclass
class Chain:
    """Result of the growth."""

    triplets: list[Triplet] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    """Objects for which no anchor pair puts them on the grid."""
    fallback: bool = False
    """No three objects lie within the seed radius; the tightest valid triple was used."""


def cell_of(position: complex) -> tuple[int, int]:
    """Cell of a map position: ``floor(w + 0.5)``."""
    return math.floor(position.real + 0.5), math.floor(position.imag + 0.5)


def on_grid(position: complex) -> bool:
    """Whether the rounded cell exists."""
    return all(0 <= value < GRID for value in cell_of(position))


def place(anchor1: complex, anchor2: complex, target: complex) -> complex:
    """Map position of a target: the similarity with positive orientation fixed by the anchors."""
    return (target - anchor1) / (anchor2 - anchor1) * (ANCHORS[1] - ANCHORS[0]) + ANCHORS[0]


def unplace(anchor1: complex, anchor2: complex, position: complex) -> complex:
    """World position of a map position; the inverse of :func:`place`."""
    return (position - ANCHORS[0]) / (ANCHORS[1] - ANCHORS[0]) * (anchor2 - anchor1) + anchor1


def rounding_margin(position: complex) -> float:
    """Distance of a position from the nearest cell border, in cells (0 to 0.5)."""
    return 0.5 - max(abs(v - math.floor(v + 0.5)) for v in (position.real, position.imag))


def thresholds(points: Sequence[complex], *, metric: bool) -> tuple[float, float]:
    """Seed radius and least anchor distance for a set of points."""
    if metric:
        return SEED_RADIUS_M, MIN_ANCHOR_M
    spans = [max(axis) - min(axis) for axis in ([p.real for p in points], [p.imag for p in points])]
    diagonal = math.hypot(*spans)
    return SEED_RADIUS_RELATIVE * diagonal, MIN_ANCHOR_RELATIVE * diagonal


def build_chain(points: Sequence[complex], *, radius: float, min_anchor: float) -> Chain:
    """Grow triplets over all points.

    Args:
        points: Ground positions, one per object.
        radius: Largest distance inside the seed triple.
        min_anchor: Least distance of two anchors.

    Returns:
        Triplets in order of growth; empty if no triple is valid.
    """
    count = len(points)
    distance = [[round(abs(a - b), 6) for b in points] for a in points]

    def valid(a: int, b: int, t: int) -> Triplet | None:
        if distance[a][b] < min_anchor:
            return None
        position = place(points[a], points[b], points[t])
        return Triplet(a, b, t, position) if on_grid(position) else None

    def first_valid(triple: tuple[int, ...]) -> Triplet | None:
        return next((t for a, b, c in permutations(triple) if (t := valid(a, b, c))), None)

    chain = Chain()
    seed = None
    for triple in combinations(range(count), 3):
        if max(distance[i][j] for i, j in combinations(triple, 2)) <= radius:
            seed = first_valid(triple)
            if seed is not None:
                break
    if seed is None:
        chain.fallback = True
        by_diameter = sorted(
            combinations(range(count), 3),
            key=lambda t: (max(distance[i][j] for i, j in combinations(t, 2)), t),
        )
        seed = next((t for triple in by_diameter if (t := first_valid(triple))), None)
    if seed is None:
        return chain
    chain.triplets.append(seed)
    inside = [seed.anchor1, seed.anchor2, seed.target]
    # Object outside -> its distances to the two nearest objects inside.
    outside = {
        i: sorted(distance[i][j] for j in inside)[:2] for i in range(count) if i not in inside
    }
    while outside:
        chosen = min(outside, key=lambda i: (round(sum(outside[i]), 6), i))
        del outside[chosen]
        grown = _attach(chosen, inside, distance, valid)
        if grown is None:
            chain.dropped.append(chosen)
            continue
        chain.triplets.append(grown)
        inside.append(chosen)
        for i, two in outside.items():
            if distance[i][chosen] < two[1]:
                outside[i] = sorted((two[0], distance[i][chosen]))
    return chain


def _attach(
    new: int,
    inside: Sequence[int],
    distance: Sequence[Sequence[float]],
    valid: Callable[[int, int, int], Triplet | None],
) -> Triplet | None:
    """Best anchor pair for a new object: nearer anchor first, then swapped, then the next pair."""
    # The 16 best pairs lie among the 17 nearest objects.
    near = sorted(inside, key=lambda i: (distance[new][i], i))[: MAX_PAIRS + 1]

    def pairs() -> Iterator[tuple[int, int]]:
        yield near[0], near[1]  # mostly valid already
        rest = list(combinations(near, 2))[1:]
        rest.sort(key=lambda p: (round(distance[new][p[0]] + distance[new][p[1]], 6), p))
        yield from rest[: MAX_PAIRS - 1]

    for a, b in pairs():
        first, second = sorted((a, b), key=lambda i: (distance[new][i], i))
        for one, two in ((first, second), (second, first)):
            triplet = valid(one, two, new)
            if triplet is not None:
                return triplet
    return None


def fit(
    anchor1: complex, anchor2: complex, target: complex
) -> tuple[tuple[int, int], tuple[int, int], complex] | None:
    """Map with anchors of its own instead of the two fixed cells.

    The triple is turned until anchor 1 -> anchor 2 points down, its bounding box is scaled to seven
    cells around (4.5, 4.5), the anchors are rounded, and the target follows from the similarity through
    the **rounded** anchors. The scale shrinks in steps of 10 % until everything is on the grid.

    Returns:
        Cells of both anchors and the unrounded target, or ``None`` if no scale works.
    """
    turn = complex(0, -1) * abs(anchor2 - anchor1) / (anchor2 - anchor1)
    turned = [point * turn for point in (anchor1, anchor2, target)]
    low = complex(min(p.real for p in turned), min(p.imag for p in turned))
    high = complex(max(p.real for p in turned), max(p.imag for p in turned))
    span = max(high.real - low.real, high.imag - low.imag)
    middle = (low + high) / 2
    for step in range(FIT_STEPS):
        scale = FIT_CELLS / span * 0.9**step
        cells = [cell_of((p - middle) * scale + FIT_CENTRE) for p in turned[:2]]
        first, second = (complex(*cell) for cell in cells)
        if abs(second - first) < 1:
            return None
        position = (target - anchor1) / (anchor2 - anchor1) * (second - first) + first
        if on_grid(position) and on_grid(first) and on_grid(second):
            return cells[0], cells[1], position
    return None


def recover(triplets: Sequence[Triplet]) -> dict[int, complex]:
    """Layout of all objects from unrounded cells, up to one similarity."""
    placed: dict[int, complex] = {}
    for triplet in triplets:
        if not placed:
            placed[triplet.anchor1], placed[triplet.anchor2] = complex(0, 0), complex(1, 0)
        placed[triplet.target] = unplace(
            placed[triplet.anchor1], placed[triplet.anchor2], triplet.position
        )
    return placed
