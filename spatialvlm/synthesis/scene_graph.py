"""Relations of the objects of a view or a scene, each with its margin."""

from __future__ import annotations

from dataclasses import dataclass

from spatialvlm.scenes.transforms import Array
from spatialvlm.synthesis.context import SceneContext, View
from spatialvlm.synthesis.relations import compare_size, related
from spatialvlm.synthesis.rows import Margin, Reject

SUPPORT_OVERLAP = 0.3
SUPPORT_GAP_M = 0.05
NEAR_RATIO = 0.5
FAR_RATIO = 2.0
OPPOSITE = {
    "left": "right", "right": "left", "above": "below", "below": "above", "front": "behind", "behind": "front",
}  # fmt: skip


@dataclass(frozen=True)
class Edge:
    """``a relation b``."""

    relation: str
    """``left right above below front behind bigger near far on inside``."""
    a: int
    b: int
    margin: float
    """Normalised margin, at least 1."""


def view_edges(ctx: SceneContext, view: View) -> list[Edge]:
    """All relations between clean objects of a view that hold by their margins."""
    key = (view.index,)
    if key not in ctx.edges:
        ctx.edges[key] = _view_edges(ctx, view)
    return ctx.edges[key]


def _view_edges(ctx: SceneContext, view: View) -> list[Edge]:
    edges = []
    for i, a in enumerate(view.clean):
        for b in view.clean[i + 1 :]:
            for relation in ("left", "above", "front"):
                try:
                    holds, margin = related(ctx, view, a, b, relation)
                except Reject:
                    continue
                edges += _both(relation, a, b, holds, margin)
            edges += scene_edges_of(ctx, a, b)
    return edges


def _both(relation: str, a: int, b: int, holds: bool, margin: Margin) -> list[Edge]:
    opposite = OPPOSITE[relation]
    first, second = (a, b) if holds else (b, a)
    value = margin.normalised
    return [Edge(relation, first, second, value), Edge(opposite, second, first, value)]


def scene_edges_of(ctx: SceneContext, a: int, b: int) -> list[Edge]:
    """Relations of two objects that do not depend on a view: size, nearness, support."""
    if (a, b) not in ctx.edges:
        ctx.edges[a, b] = _scene_edges_of(ctx, a, b)
    return ctx.edges[a, b]


def _scene_edges_of(ctx: SceneContext, a: int, b: int) -> list[Edge]:
    edges: list[Edge] = []
    try:
        winner, margin = compare_size(ctx, a, b, "bigger")
        edges.append(Edge("bigger", winner, b if winner == a else a, margin.normalised))
    except Reject:
        pass
    ratio = nearness(ctx, a, b)
    if ratio < NEAR_RATIO:
        edges += [Edge("near", *pair, NEAR_RATIO / max(ratio, 0.05)) for pair in ((a, b), (b, a))]
    elif ratio > FAR_RATIO:
        edges += [Edge("far", *pair, ratio / FAR_RATIO) for pair in ((a, b), (b, a))]
    for top, bottom in ((a, b), (b, a)):
        if rests_on(ctx, top, bottom):
            edges.append(Edge("on", top, bottom, 1.0))
        elif is_inside(ctx, top, bottom):
            edges.append(Edge("inside", top, bottom, 1.0))
    return edges


def nearness(ctx: SceneContext, a: int, b: int) -> float:
    """Closest-point distance over the mean longest extent of the two objects."""
    mean = (max(ctx.size_list[a]) + max(ctx.size_list[b])) / 2
    return ctx.distances[a][b] / mean


def rests_on(ctx: SceneContext, top: int, bottom: int) -> bool:
    """Whether the lower side of ``top`` lies on the upper side of ``bottom``.

    At least 30 % of the smaller footprint overlaps and the vertical gap is at most 5 cm; an annotated
    support wins.
    """
    parent = ctx.objects[top].support_parent
    if parent is not None:
        return parent == bottom
    if abs(ctx.z_range[top][0] - ctx.z_range[bottom][1]) > SUPPORT_GAP_M:
        return False
    one, two = ctx.footprint(top), ctx.footprint(bottom)
    return bool(one.intersection(two).area >= SUPPORT_OVERLAP * min(one.area, two.area))


def is_inside(ctx: SceneContext, inner: int, outer: int) -> bool:
    """Whether all corners of one box lie in another."""
    if ctx.distances[inner][outer] > 0 or ctx.volume[inner] > ctx.volume[outer]:
        return False
    corners: Array = ctx.corners[inner]
    return bool(ctx.objects[outer].box.contains(corners, margin=0.01).all())
