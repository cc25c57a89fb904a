"""Routes over the floor: legs between objects, turns, and a simulator that follows a plan."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from shapely.geometry import LineString

from spatialvlm.scenes.transforms import wrap_deg
from spatialvlm.synthesis.context import SceneContext, require, tightest
from spatialvlm.synthesis.rows import Margin, Reason, Reject

CLEARANCE_M = 0.25
LEG_M = (0.8, 6.0)
FLAT_M = 0.1
OVERHEAD_M = 1.7
TURNS = {"left": (60.0, 120.0), "right": (-120.0, -60.0), "back": (150.0, 210.0)}
"""Turn -> range of the change of heading in degrees, counter-clockwise positive."""
TURN_WORDS = tuple(TURNS)


def floor_z(ctx: SceneContext) -> float:
    """Height of the floor in the world."""
    room = ctx.scene.room
    return room.floor_z if room is not None else 0.0


def blocks_floor(ctx: SceneContext, obj: int) -> bool:
    """Whether a robot cannot pass: flat things and things overhead do not count."""
    low, high = ctx.z_range[obj]
    floor = floor_z(ctx)
    return high - floor >= FLAT_M and low - floor <= OVERHEAD_M


def stands_on_floor(ctx: SceneContext, obj: int) -> bool:
    """Whether a robot can walk up to an object: it stands on the floor and is an obstacle."""
    low = ctx.z_range[obj][0] - floor_z(ctx)
    return blocks_floor(ctx, obj) and low <= 0.2 and ctx.objects[obj].support_parent is None


def leg_length(ctx: SceneContext, p: int, q: int) -> float:
    """Length of the straight way between two objects.

    That is the part of the line between their centres that lies outside both footprints.

    Raises:
        Reject: ``blocked``: shorter than 0.8 m or longer than 6 m, leaves the room, or touches an
            obstacle when widened by 0.25 m.
    """
    key = (min(p, q), max(p, q))
    if key not in ctx.legs:
        try:
            ctx.legs[key] = _free_way(ctx, *key)
        except Reject:
            ctx.legs[key] = None
    length = ctx.legs[key]
    if length is None:
        raise Reject(Reason.BLOCKED, f"no free way between objects {p} and {q}")
    return length


def _free_way(ctx: SceneContext, p: int, q: int) -> float:
    line = LineString([ctx.center_list[p][:2], ctx.center_list[q][:2]])
    free = line.difference(ctx.footprint(p)).difference(ctx.footprint(q))
    if not isinstance(free, LineString) or free.is_empty:
        raise Reject(Reason.BLOCKED, "footprints touch")
    if not LEG_M[0] <= free.length <= LEG_M[1]:
        raise Reject(Reason.BLOCKED, f"leg of {free.length:.2f} m")
    lane = free.buffer(CLEARANCE_M, cap_style="flat")
    if not ctx.floor.contains(lane):
        raise Reject(Reason.BLOCKED, "leaves the room")
    for obj in range(len(ctx.objects)):
        if obj in (p, q) or not blocks_floor(ctx, obj) or _carried(ctx, obj, (p, q)):
            continue
        if lane.intersects(ctx.footprint(obj)):
            raise Reject(Reason.BLOCKED, f"object {obj} is in the way")
    return float(free.length)


def _carried(ctx: SceneContext, obj: int, ends: Sequence[int]) -> bool:
    """Whether an object stands on (or carries) an end of the leg."""
    if ctx.objects[obj].support_parent in ends:
        return True
    return any(ctx.objects[end].support_parent == obj for end in ends)


def turn_word(angle: float) -> tuple[str, Margin]:
    """Word for a change of heading.

    Raises:
        Reject: ``turn``: neither left, right nor back.
    """
    for word, (low, high) in TURNS.items():
        for value in (angle, angle + 360.0):
            if low <= value <= high:
                guard = min(value - low, high - value)
                return word, require("turn", 1.0 + guard, 1.0, Reason.TURN)
    raise Reject(Reason.TURN, f"{angle:.1f} degrees")


def plan_turns(ctx: SceneContext, stops: Sequence[int]) -> tuple[list[str], Margin, float]:
    """Turns of the route ``stops[0] -> stops[1] -> ...`` that starts facing the second stop.

    Returns:
        One word per inner stop, the tightest margin, and the total length in metres.

    Raises:
        Reject: ``blocked`` or ``turn``.
    """
    length = sum(leg_length(ctx, p, q) for p, q in pairwise(stops))
    words, margins = [], []
    for before, here, after in zip(stops, stops[1:], stops[2:], strict=False):
        change = wrap_deg(ctx.bearing(here, after) - ctx.bearing(before, here))
        word, margin = turn_word(change)
        words.append(word)
        margins.append(margin)
    return words, tightest(*margins), length


def simulate(ctx: SceneContext, stops: Sequence[int], turns: Sequence[str]) -> bool:
    """Follow a plan: go to the second stop, then turn and go to the next stop, and so on.

    The robot turns by the word, looks for the next stop within that range of directions, and walks in a
    straight line. The plan fails when the stop is not there or the way is blocked.
    """
    facing = ctx.bearing(stops[0], stops[1])
    for index, (here, after) in enumerate(pairwise(stops)):
        if index:
            low, high = TURNS[turns[index - 1]]
            change = wrap_deg(ctx.bearing(here, after) - facing)
            if not any(low <= change + circle <= high for circle in (0.0, 360.0)):
                return False
            facing = ctx.bearing(here, after)
        try:
            leg_length(ctx, here, after)
        except Reject:
            return False
    return True
