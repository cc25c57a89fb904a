"""Counterfactual twins: the same room with one object moved, removed, or everything mirrored.

A twin shares the room id, the look and (mirrored, where the layout is) the camera walk of its room, so
two questions with equal words have different answers for one reason only.
"""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.random import Generator

from spatialvlm.errors import RoomGenerationError
from spatialvlm.scenes.cameras import Camera
from spatialvlm.scenes.rooms import paths
from spatialvlm.scenes.rooms.appearance import rng_for
from spatialvlm.scenes.rooms.archetypes import Piece
from spatialvlm.scenes.rooms.model import (
    RenderConfig,
    RoomModel,
    RoomSpec,
    draw_cameras,
    draw_room,
    finish_model,
)
from spatialvlm.scenes.rooms.placement import MAX_TRIES, Opening, Placed, Placer, Rect, Shell
from spatialvlm.scenes.rooms.sketch import Part, Surface

CHANGES = ("moved", "removed", "mirrored")
MIN_MOVE_M = 0.6
EYE_CLEAR_M = 0.25


def draw_twin(spec: RoomSpec, config: RenderConfig) -> RoomModel:
    """The ``spec.twin``-th twin of a room.

    Args:
        spec: With ``twin >= 1``.
        config: Decides the camera walk, which is that of the room.

    Raises:
        RoomGenerationError: Nothing in this room can be moved or removed.
    """
    base = draw_room(replace(spec, twin=0))
    cameras = draw_cameras(base, config)
    rng = rng_for("twin", spec.split, spec.preset, spec.seed, spec.twin)
    change = CHANGES[int(rng.integers(len(CHANGES)))]
    note: dict[str, Any] = {"of": f"rooms/{spec.room_name}", "change": change}
    shell, placed = base.shell, base.placed
    if change == "mirrored":
        shell, placed, cameras = _mirrored(shell, placed, cameras)
    else:
        index = _loose_object(placed, rng)
        if change == "removed":
            note["object"] = placed[index].name
            placed = _without(placed, index)
        else:
            note["object"] = placed[index].name
            placed = _with_moved(shell, placed, index, cameras, rng, spec)
    region = paths.walkable_component(shell, placed)
    region = base.region if region is None else region
    return finish_model(
        spec, base.grammar, shell, placed, region, cameras=cameras, extra={"twin": note}
    )


def _loose_object(placed: list[Placed], rng: Generator) -> int:
    """A piece on the floor that carries nothing."""
    parents = {item.parent for item in placed}
    loose = [
        i
        for i, item in enumerate(placed)
        if item.parent is None and i not in parents and item.z == 0 and item.label != "rug"
    ]
    if not loose:
        raise RoomGenerationError(
            "twin: every piece of this room carries another one. Use another seed."
        )
    return loose[int(rng.integers(len(loose)))]


def _without(placed: list[Placed], index: int) -> list[Placed]:
    """The list without one piece; parents are renumbered."""
    kept = [item for i, item in enumerate(placed) if i != index]
    return [
        replace(item, parent=item.parent - 1)
        if item.parent is not None and item.parent > index
        else item
        for item in kept
    ]


def _with_moved(
    shell: Shell,
    placed: list[Placed],
    index: int,
    cameras: list[Camera],
    rng: Generator,
    spec: RoomSpec,
) -> list[Placed]:
    """The list with one piece somewhere else, out of the way of the camera walk."""
    old = placed[index]
    for _ in range(MAX_TRIES):
        placer = Placer(shell, rng)
        placer.restore([item for i, item in enumerate(placed) if i != index])
        at = placer.free(old.piece) if rng.random() < 0.5 else placer.on_wall(old.piece)
        if at is None:
            continue
        new = replace(placer.placed[at], name=old.name)
        far = np.hypot(new.x - old.x, new.y - old.y) >= MIN_MOVE_M
        if far and all(new.box.distance_to_point(c.centre) >= EYE_CLEAR_M for c in cameras):
            return [*placed[:index], new, *placed[index + 1 :]]
    raise RoomGenerationError(
        f"twin of seed {spec.seed}: no other place for {old.name} within {MAX_TRIES} tries. Use another seed."
    )


def _mirrored(
    shell: Shell, placed: list[Placed], cameras: list[Camera]
) -> tuple[Shell, list[Placed], list[Camera]]:
    """Everything reflected in x; furniture is rebuilt left-right reversed, nothing has a mirrored pose."""
    width = max(r.x1 for r in shell.rects)
    polygon = tuple((width - x, y) for x, y in reversed(shell.polygon))
    rects = tuple(Rect(width - r.x1, r.y0, width - r.x0, r.y1) for r in shell.rects)
    mirrored = Shell(polygon, rects, shell.ceiling)
    count = len(shell.walls)
    openings = tuple(
        # Wall i of the old polygon runs backwards as wall (count - 2 - i) of the new one.
        Opening(
            o.kind,
            (count - 2 - o.wall) % count,
            shell.walls[o.wall].length - o.center_m,
            o.width_m,
            o.z0,
            o.z1,
        )
        for o in shell.openings
    )
    moved = [
        replace(
            item, piece=_mirrored_piece(item.piece), x=width - item.x, yaw=float(np.pi - item.yaw)
        )
        for item in placed
    ]
    seen = [
        Camera.look(
            (float(width - c.centre[0]), float(c.centre[1]), float(c.centre[2])),
            180.0 - c.heading_deg,
            c.pitch_deg,
            hfov_deg=c.hfov_deg,
            width=c.width,
            height=c.height,
        )
        for c in cameras
    ]
    return Shell(mirrored.polygon, mirrored.rects, shell.ceiling, openings), moved, seen


def _mirrored_piece(piece: Piece) -> Piece:
    """The piece with left and right exchanged."""

    def flipped(part: Part) -> Part:
        return replace(part, y=(-part.y[1], -part.y[0]))

    surface = piece.surface
    if surface is not None:
        surface = Surface(surface.x, (-surface.y[1], -surface.y[0]), surface.z)
    return replace(piece, parts=tuple(flipped(part) for part in piece.parts), surface=surface)
