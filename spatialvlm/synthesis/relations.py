"""Comparisons of two objects that several tasks and the scene graph share, each with its margin."""

from __future__ import annotations

from spatialvlm.synthesis.context import SceneContext, View, require, tightest
from spatialvlm.synthesis.rows import Margin, Reason, Reject

GAP_M = 0.15
"""Least free space between the extents of two objects along the compared direction."""
IMAGE_GAP = 0.03
"""Least difference of the image centroids, as a share of the image width."""
HEIGHT_GAP_M = 0.10
MAX_Z_OVERLAP = 0.5


def separation(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, bool]:
    """Free space between two intervals (negative: they overlap) and whether ``a`` is the lower one."""
    a_first, b_first = b[0] - a[1], a[0] - b[1]
    return (a_first, True) if a_first >= b_first else (b_first, False)


def left_of(view: View, a: int, b: int) -> tuple[bool, Margin]:
    """Whether ``a`` is left of ``b`` from the camera.

    The extents must be separated in the level frame **and** the image must show the same order: a near
    object can be left of a far one in metres and right of it in the picture.

    Raises:
        Reject: ``margin`` or ``image_disagrees``.
    """
    gap, a_left = separation(view.lateral[a], view.lateral[b])
    margin = require("gap_m", gap, GAP_M)
    shift = (view.centroid[b][0] - view.centroid[a][0]) / view.camera.width
    shift = shift if a_left else -shift
    return a_left, tightest(
        margin, require("image_shift", shift, IMAGE_GAP, Reason.IMAGE_DISAGREES)
    )


def in_front(view: View, a: int, b: int) -> tuple[bool, Margin]:
    """Whether ``a`` is in front of ``b``: separated in camera depth and in level forward distance.

    Raises:
        Reject: ``margin``.
    """
    gap, a_first = separation(view.depth[a], view.depth[b])
    level_gap, level_first = separation(view.forward[a], view.forward[b])
    if a_first != level_first:
        raise Reject(Reason.MARGIN, "camera depth and ground distance disagree")
    return a_first, require("gap_m", min(gap, level_gap), GAP_M)


def above(ctx: SceneContext, a: int, b: int) -> tuple[bool, Margin]:
    """Whether ``a`` is higher than ``b``: larger centre and top, less than half overlap in height.

    Raises:
        Reject: ``margin``, ``tops_disagree`` or ``overlap``.
    """
    (a0, a1), (b0, b1) = ctx.z_range[a], ctx.z_range[b]
    rise = (a0 + a1 - b0 - b1) / 2
    margin = require("gap_m", abs(rise), HEIGHT_GAP_M)
    if (a1 - b1) * rise <= 0:
        raise Reject(Reason.TOPS_DISAGREE)
    shorter = min(a1 - a0, b1 - b0)
    overlap = max(0.0, min(a1, b1) - max(a0, b0)) / shorter
    free = require("free_height", 1.0 - overlap, 1.0 - MAX_Z_OVERLAP, Reason.OVERLAP)
    return rise > 0, tightest(margin, free)


def extent(ctx: SceneContext, obj: int, attribute: str) -> float:
    """One extent of an object in metres.

    Args:
        ctx: The scene.
        obj: Object index.
        attribute: ``longest`` of the three extents, ``height``, ``long_side`` or ``short_side`` (the
            larger and the smaller horizontal extent).

    Raises:
        Reject: ``tilted`` or ``needs:gravity``: only ``longest`` means something for a tilted box, or where nobody
            knows which way is up.
    """
    size = ctx.size_list[obj]
    if attribute == "longest":
        return max(size)
    if not ctx.scene.gravity_aligned:
        raise Reject(Reason.NEEDS_GRAVITY)
    if not ctx.upright[obj]:
        raise Reject(Reason.TILTED, f"object {obj}")
    if attribute == "height":
        return size[2]
    return max(size[:2]) if attribute == "long_side" else min(size[:2])


VOLUME_RATIO = 1.30
EXTENT_RATIO = 1.05
SINGLE_RATIO = 1.20
COMPARISONS = {
    "bigger": ("volume", True),
    "smaller": ("volume", False),
    "taller": ("height", True),
    "shorter": ("height", False),
    "wider": ("long_side", True),
    "narrower": ("long_side", False),
}
"""Comparison -> (what is compared, whether the larger one is meant)."""


def compare_size(ctx: SceneContext, a: int, b: int, word: str) -> tuple[int, Margin]:
    """Which of two objects is bigger, taller, ...

    A volume decides only if its ratio is at least 1.30 and the longest extents agree (ratio 1.05); a
    single extent needs a ratio of 1.20.

    Returns:
        Index of the object the word fits, and the margin.

    Raises:
        Reject: ``margin``, ``extent_tie`` or ``tilted``.
    """
    what, larger = COMPARISONS[word]
    if what == "volume":
        values = ctx.volume[a], ctx.volume[b]
    else:
        values = extent(ctx, a, what), extent(ctx, b, what)
    big, small = (a, b) if values[0] >= values[1] else (b, a)
    ratio = max(values) / min(values)
    margin = require("ratio", ratio, VOLUME_RATIO if what == "volume" else SINGLE_RATIO)
    if what == "volume":
        longest = max(ctx.size_list[big]) / max(ctx.size_list[small])
        margin = tightest(margin, require("extent_ratio", longest, EXTENT_RATIO, Reason.EXTENT_TIE))
    return (big if larger else small), margin


RELATIONS: dict[str, tuple[str, bool]] = {
    "left": ("side", True),
    "right": ("side", False),
    "above": ("height", True),
    "below": ("height", False),
    "front": ("depth", True),
    "behind": ("depth", False),
}
"""Relation -> (what is compared, whether the first object must be the lesser in left/front or higher)."""


def related(ctx: SceneContext, view: View, a: int, b: int, relation: str) -> tuple[bool, Margin]:
    """Whether ``a`` has the relation to ``b`` in the view; ``False`` means the opposite holds.

    Raises:
        Reject: Neither holds by its margin.
    """
    what, first = RELATIONS[relation]
    if what == "side":
        ctx.require_level(view)
        holds, margin = left_of(view, a, b)
    elif what == "height":
        holds, margin = above(ctx, a, b)
    else:
        if not view.level_ok:
            raise Reject(Reason.VERTICAL_AXIS, view.frame_id)
        holds, margin = in_front(view, a, b)
    return holds == first, margin


DIRECTION_GUARD_DEG = 10.0
DIRECTIONS: dict[str, tuple[tuple[str, float, float], ...]] = {
    "easy": (("left", 0.0, 180.0), ("right", -180.0, 0.0)),
    "medium": (("left", 0.0, 135.0), ("right", -135.0, 0.0), ("back", 135.0, 225.0)),
    "hard": (
        ("front-left", 0.0, 90.0),
        ("back-left", 90.0, 180.0),
        ("front-right", -90.0, 0.0),
        ("back-right", -180.0, -90.0),
    ),
}
"""Variant -> (word, from, to) in degrees counter-clockwise from the facing direction."""


SECTORS = {
    (variant, word): (low, high)
    for variant, sectors in DIRECTIONS.items()
    for word, low, high in sectors
}
"""(variant, word) -> (from, to)."""


def direction_word(angle: float, variant: str) -> tuple[str, Margin]:
    """Word for a bearing, at least 10 degrees inside its sector on either side.

    Args:
        angle: Degrees, counter-clockwise from the facing direction, (-180, 180].
        variant: Key of :data:`DIRECTIONS`.

    Raises:
        Reject: ``sector``: near a boundary.
    """
    for word, low, high in DIRECTIONS[variant]:
        for value in (angle, angle + 360.0):
            if low <= value <= high:
                guard = min(value - low, high - value)
                return word, require("guard_deg", guard, DIRECTION_GUARD_DEG, Reason.SECTOR)
    raise Reject(Reason.SECTOR, f"{angle:.1f} degrees is straight ahead or behind")
