"""Names for objects: a phrase is used only after checking that exactly one instance satisfies it.

Order: a label that is unique among what is shown; colour or relative size; the nearest to or farthest
from a landmark, a side of an observer at one landmark who faces another, or the order of appearance
in a video (the three strategies take turns by hash, 40/30/30); a drawn mark as the last resort.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from spatialvlm.scenes.transforms import wrap_deg
from spatialvlm.synthesis.context import SceneContext
from spatialvlm.synthesis.rows import Draws, Reason, Reject
from spatialvlm.synthesis.wording import Ref

PROXIMITY_GAP_M = 0.3
SIZE_RATIO = 1.3
SECTOR_INSIDE_DEG = 25.0
SECTOR_OUTSIDE_DEG = 65.0
MIN_OBSERVER_M = 0.3
STRATEGIES = ("nearest", "direction", "order")
"""The three referral strategies of SSR for objects that share their label."""
SIDES = {"front": 0.0, "left": 90.0, "back": 180.0, "right": -90.0}
ORDINALS = ("first", "second", "third", "fourth")


def instances(ctx: SceneContext, obj: int, frames: Sequence[int], *, video: bool) -> list[int]:
    """Objects the bare label of ``obj`` could mean.

    For images these are the instances that are not hidden in every shown frame; for a video all
    instances of the scene.
    """
    same = ctx.by_label[ctx.labels[obj]]
    if video:
        return list(same)
    return [o for o in same if any(ctx.view(f).state(o) != "hidden" for f in frames)]


def landmarks(ctx: SceneContext, frames: Sequence[int], *, video: bool) -> list[int]:
    """Objects whose label alone names them among what is shown, and in the whole scene."""
    return [
        same[0]
        for same in ctx.by_label.values()
        if len(same) == 1
        and (
            ctx.visible_once(same[0], frames)
            if video
            else any(ctx.view(f).is_clean(same[0]) for f in frames)
        )
    ]


def refer(
    ctx: SceneContext,
    obj: int,
    frames: Sequence[int],
    draws: Draws,
    *,
    video: bool = False,
    colours: bool = False,
) -> Ref:
    """Name ``obj`` by words.

    Args:
        ctx: The scene.
        obj: Object index.
        frames: Shown frames.
        draws: Choice of the strategy.
        video: Frames are one clip.
        colours: Prefer ``the red chair`` to ``the chair``.

    Raises:
        Reject: ``referral``: no phrase singles the object out.
    """
    label = ctx.labels[obj]
    rivals: list[int] = []
    if len(ctx.by_label[label]) > 1:
        rivals = [o for o in instances(ctx, obj, frames, video=video) if o != obj]
    if colours and ctx.objects[obj].color_name:
        named = by_colour(ctx, obj, rivals)
        if named is not None:
            return named
    if not rivals:
        if obj not in ctx.plain_names:
            ctx.plain_names[obj] = Ref(obj, f"the {label}", label, "label")
        found: Ref = ctx.plain_names[obj]
        return found
    # A relation must single the object out in the whole scene, not only among what is shown.
    others = [o for o in ctx.by_label[label] if o != obj]
    for strategy in (by_colour, by_size):
        named = strategy(ctx, obj, others)
        if named is not None:
            return named
    marks = landmarks(ctx, frames, video=video)
    relations: list[Callable[[], Ref | None]] = [
        lambda: by_proximity(ctx, obj, others, marks),
        lambda: by_direction(ctx, obj, others, marks),
        lambda: by_order(ctx, obj, others, frames) if video else None,
    ]
    ticket = draws.unit()
    first = 0 if ticket < 0.4 else 1 if ticket < 0.7 else 2
    for step in range(3):
        named = relations[(first + step) % 3]()
        if named is not None:
            return named
    raise Reject(Reason.REFERRAL, f"no phrase for object {obj} ({label})")


def refer_by(ctx: SceneContext, obj: int, frames: Sequence[int], strategy: str) -> Ref | None:
    """Name an object of a video by one strategy, ``None`` if that does not single it out.

    Args:
        ctx: The scene.
        obj: Object index.
        frames: Frames of the clip.
        strategy: ``label``, ``attribute`` (colour or size), or one of :data:`STRATEGIES`.
    """
    label = ctx.labels[obj]
    rivals = [o for o in ctx.by_label[label] if o != obj]
    if strategy == "label":
        return None if rivals else Ref(obj, f"the {label}", label, "label")
    if strategy == "attribute":
        return by_colour(ctx, obj, rivals) or by_size(ctx, obj, rivals)
    marks = landmarks(ctx, frames, video=True)
    if strategy == "nearest":
        return by_proximity(ctx, obj, rivals, marks)
    if strategy == "direction":
        return by_direction(ctx, obj, rivals, marks)
    return by_order(ctx, obj, rivals, frames)


def by_colour(ctx: SceneContext, obj: int, rivals: Sequence[int]) -> Ref | None:
    """``the red chair`` if every rival has another known colour."""
    colour = ctx.objects[obj].color_name
    colours = [ctx.objects[o].color_name for o in rivals]
    if colour is None or None in colours or colour in colours:
        return None
    label = ctx.labels[obj]
    return Ref(obj, f"the {colour} {label}", label, "colour")


def by_size(ctx: SceneContext, obj: int, rivals: Sequence[int]) -> Ref | None:
    """``the largest``, ``smallest`` or ``tallest`` with a ratio of at least 1.3 to the next."""
    if not rivals:
        return None
    label, volume = ctx.labels[obj], ctx.volume
    ratios = [
        ("largest", volume[obj] / max(volume[o] for o in rivals)),
        ("smallest", min(volume[o] for o in rivals) / volume[obj]),
    ]
    if ctx.scene.gravity_aligned and all(ctx.upright[o] for o in [obj, *rivals]):
        tallest = ctx.size_list[obj][2] / max(ctx.size_list[o][2] for o in rivals)
        ratios.append(("tallest", tallest))
    for word, ratio in ratios:
        if ratio >= SIZE_RATIO + 1e-6:
            return Ref(obj, f"the {word} {label}", label, "size", ratio / SIZE_RATIO)
    return None


def by_proximity(
    ctx: SceneContext, obj: int, rivals: Sequence[int], marks: Sequence[int]
) -> Ref | None:
    """``the chair nearest the table``: the gap to the runner-up is at least 0.3 m."""
    label, best = ctx.labels[obj], None
    for mark in marks:
        if mark == obj or not rivals:
            continue
        own = ctx.distances[mark][obj]
        others = [ctx.distances[mark][o] for o in rivals]
        for word, gap in (("nearest to", min(others) - own), ("farthest from", own - max(others))):
            if gap > PROXIMITY_GAP_M + 1e-6 and (best is None or gap > best[0]):
                best = (gap, f"the {label} {word} the {ctx.labels[mark]}")
    return None if best is None else Ref(obj, best[1], label, "nearest", best[0] / PROXIMITY_GAP_M)


def side_of(ctx: SceneContext, observer: int, facing: int, obj: int) -> float:
    """Where ``obj`` is for someone at ``observer`` who faces ``facing``: degrees, left positive."""
    return wrap_deg(ctx.bearing(observer, obj) - ctx.bearing(observer, facing))


def by_direction(
    ctx: SceneContext, obj: int, rivals: Sequence[int], marks: Sequence[int]
) -> Ref | None:
    """``the chair on the left when standing at the table facing the bookshelf``."""
    if not ctx.scene.gravity_aligned:
        return None
    label = ctx.labels[obj]
    for observer in marks:
        for facing in marks:
            if len({observer, facing, obj}) < 3:
                continue
            if min(ctx.distances[observer][o] for o in (obj, facing, *rivals)) < MIN_OBSERVER_M:
                continue
            angle = side_of(ctx, observer, facing, obj)
            for side, middle in SIDES.items():
                off = abs(wrap_deg(angle - middle))
                if off > SECTOR_INSIDE_DEG - 1e-4:
                    continue
                clearance = [
                    abs(wrap_deg(side_of(ctx, observer, facing, o) - middle)) for o in rivals
                ]
                if clearance and min(clearance) < SECTOR_OUTSIDE_DEG + 1e-4:
                    continue
                where = {"front": "in front", "back": "behind"}.get(side, f"on the {side}")
                phrase = (
                    f"the {label} {where} when standing at the {ctx.labels[observer]} "
                    f"and facing the {ctx.labels[facing]}"
                )
                margin = min([SECTOR_INSIDE_DEG / max(off, 1.0)] + [c / 65.0 for c in clearance])
                return Ref(obj, phrase, label, "direction", margin)
    return None


def require_direction(ctx: SceneContext, observer: int, facing: int, obj: int, side: str) -> None:
    """Reject unless ``obj`` is the only one of its label on that side of the observer.

    Raises:
        Reject: ``direction_not_unique`` or ``sector``.
    """
    middle = SIDES[side]
    if abs(wrap_deg(side_of(ctx, observer, facing, obj) - middle)) > SECTOR_INSIDE_DEG:
        raise Reject(Reason.SECTOR, f"object {obj} is not near the centre of {side}")
    for rival in ctx.by_label[ctx.labels[obj]]:
        off = abs(wrap_deg(side_of(ctx, observer, facing, rival) - middle))
        if rival != obj and off < SECTOR_OUTSIDE_DEG:
            raise Reject(Reason.DIRECTION_NOT_UNIQUE, f"object {rival} is {off:.1f} degrees off")


def by_order(
    ctx: SceneContext, obj: int, rivals: Sequence[int], frames: Sequence[int]
) -> Ref | None:
    """``the second chair to appear in the video`` (k up to 4, or the last)."""
    moments = {o: ctx.appearance(o, frames) for o in (obj, *rivals)}
    rank = appearance_rank(obj, moments)
    if rank is None or not rivals:
        return None
    label = ctx.labels[obj]
    if rank < len(ORDINALS):
        word = ORDINALS[rank]
    elif rank == len(rivals):
        word = "last"
    else:
        return None
    return Ref(obj, f"the {word} {label} to appear in the video", label, "order", 1.0)


def appearance_rank(
    obj: int, moments: dict[int, tuple[float, float] | None], gap_s: float = 1.0
) -> int | None:
    """Position of ``obj`` in the order of first appearance, ``None`` if any order is unclear.

    Args:
        obj: Object to rank.
        moments: Object -> (earliest, latest) first appearance in seconds.
        gap_s: Least time between the latest of one and the earliest of the next.
    """
    known = {key: value for key, value in moments.items() if value is not None}
    if len(known) < len(moments):
        return None
    ranked = sorted(known, key=lambda key: known[key])
    for one, two in pairwise(ranked):
        if known[one][1] + gap_s > known[two][0] + 1e-9:
            return None
    return ranked.index(obj)
