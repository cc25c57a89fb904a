"""Collision-checked placement of furniture in a rectangular or L-shaped shell."""

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float
from numpy.random import Generator

from spatialvlm.scenes.boxes import CORNER_SIGNS, Box
from spatialvlm.scenes.rooms.archetypes import Piece
from spatialvlm.scenes.rooms.sketch import Part
from spatialvlm.scenes.transforms import Array, rz

CLEARANCE_M = 0.05
"""Least distance between two footprints."""
DOOR_CLEAR_M = 0.8
MAX_TRIES = 40
WALL_GAP_M = 0.02


@dataclass(frozen=True)
class Rect:
    """Axis-aligned rectangle on the floor."""

    x0: float
    y0: float
    x1: float
    y1: float

    def contains(
        self, points: Float[np.ndarray, "N 2"], margin: float = 0.0
    ) -> Bool[np.ndarray, " N"]:
        """Points at least ``margin`` inside."""
        x, y = points[:, 0], points[:, 1]
        inside: Array = (x >= self.x0 + margin) & (x <= self.x1 - margin)
        return inside & (y >= self.y0 + margin) & (y <= self.y1 - margin)


@dataclass(frozen=True)
class Wall:
    """One side of the room, seen from inside with the room on its left."""

    start: tuple[float, float]
    end: tuple[float, float]

    @property
    def length(self) -> float:
        """Metres."""
        return float(np.hypot(self.end[0] - self.start[0], self.end[1] - self.start[1]))

    @property
    def along(self) -> Float[np.ndarray, " 2"]:
        """Unit vector from start to end."""
        direction: Array = (np.array(self.end) - self.start) / self.length
        return direction

    @property
    def inward(self) -> Float[np.ndarray, " 2"]:
        """Unit normal into the room."""
        return np.array([-self.along[1], self.along[0]])


@dataclass(frozen=True)
class Opening:
    """A door or window: painted on a wall, never the subject of a question."""

    kind: str
    wall: int
    center_m: float
    """Distance of the centre from the start of the wall."""
    width_m: float
    z0: float
    z1: float


@dataclass(frozen=True)
class Shell:
    """Floor plan, ceiling, doors and windows. The plan is the union of ``rects``."""

    polygon: tuple[tuple[float, float], ...]
    """Counter-clockwise corners."""
    rects: tuple[Rect, ...]
    ceiling: float
    openings: tuple[Opening, ...] = ()

    @cached_property
    def walls(self) -> tuple[Wall, ...]:
        """Sides in the order of the polygon."""
        following = self.polygon[1:] + self.polygon[:1]
        return tuple(Wall(a, b) for a, b in zip(self.polygon, following, strict=True))

    @property
    def area(self) -> float:
        """Square metres."""
        corners = np.array(self.polygon)
        after = np.roll(corners, -1, axis=0)
        return float((corners[:, 0] * after[:, 1] - after[:, 0] * corners[:, 1]).sum() / 2)

    def contains(
        self, points: Float[np.ndarray, "N 2"], margin: float = 0.0
    ) -> Bool[np.ndarray, " N"]:
        """Points at least ``margin`` from the outside (inner corners of an L are exact too)."""
        inside = np.zeros(len(points), dtype=bool)
        for rect in self.rects:
            inside |= rect.contains(points, margin)
        return inside


@dataclass(frozen=True, eq=False)
class Placed:
    """A piece of furniture in the room."""

    piece: Piece
    x: float
    y: float
    z: float
    """Height of its underside."""
    yaw: float
    parent: int | None = None
    name: str = ""
    """Unique id in the room, the same in its twins."""

    @property
    def label(self) -> str:
        """Label of the archetype."""
        return self.piece.label

    @cached_property
    def box(self) -> Box:
        """Exact union of the parts."""
        depth, width, height = self.piece.size
        return Box.upright((self.x, self.y, self.z + height / 2), (depth, width, height), self.yaw)

    def to_world(self, local: Float[np.ndarray, "N 3"]) -> Float[np.ndarray, "N 3"]:
        """Points of the object frame (origin under the centre) in the world."""
        world: Array = local @ rz(self.yaw).T + (self.x, self.y, self.z)
        return world

    def part_box(self, part: Part) -> Box:
        """Bounding box of one part."""
        low, high = part.vertices().min(axis=0), part.vertices().max(axis=0)
        return Box.upright(
            self.to_world((low + high)[None] / 2)[0], np.maximum(high - low, 1e-3), self.yaw
        )


@dataclass(frozen=True, eq=False)
class _Footprint:
    center: Array
    axes: Array
    """``[2, 2]`` rows are the unit axes."""
    half: Array
    z0: float
    z1: float


def overlaps(
    center: Array, axes: Array, half: Array, others: Float[np.ndarray, "N 6"]
) -> Bool[np.ndarray, " N"]:
    """Separating-axis test of one rectangle against many.

    Args:
        center: ``[2]``.
        axes: ``[2, 2]`` rows are unit axes.
        half: ``[2]`` half extents.
        others: Rows ``cx, cy, cos, sin, half_x, half_y``.
    """
    offset = others[:, :2] - center
    first = others[:, 2:4]
    second = np.stack([-others[:, 3], others[:, 2]], axis=1)
    apart = np.zeros(len(others), dtype=bool)
    for axis, extent in zip(axes, half, strict=True):
        reach = extent + others[:, 4] * np.abs(first @ axis) + others[:, 5] * np.abs(second @ axis)
        apart |= np.abs(offset @ axis) > reach
    for axis_many, extent_many in ((first, others[:, 4]), (second, others[:, 5])):
        reach = extent_many + np.abs(axis_many @ axes.T) @ half
        apart |= np.abs((offset * axis_many).sum(axis=1)) > reach
    return ~apart


@dataclass
class Placer:
    """Adds furniture to a shell and refuses what collides.

    Args:
        shell: The empty room.
        rng: Source of all choices.
        limits: How many pieces of each label may stand in the room (1 where absent).
        clearance: Least distance between footprints in metres.
    """

    shell: Shell
    rng: Generator
    limits: dict[str, int] = field(default_factory=dict)
    clearance: float = CLEARANCE_M
    placed: list[Placed] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    _rows: list[tuple[float, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for opening in self.shell.openings:
            wall = self.shell.walls[opening.wall]
            depth = DOOR_CLEAR_M if opening.kind == "door" else 0.06
            center = np.array(wall.start) + wall.along * opening.center_m + wall.inward * depth / 2
            self._rows.append(
                (*center, *wall.along, opening.width_m / 2, depth / 2, opening.z0, opening.z1)
            )

    def room_for(self, label: str) -> bool:
        """Whether one more piece with this label is allowed."""
        return sum(p.label == label for p in self.placed) < self.limits.get(label, 1)

    def add(
        self,
        piece: Piece,
        x: float,
        y: float,
        yaw: float,
        *,
        z: float = 0.0,
        parent: int | None = None,
        flat: bool = False,
    ) -> int | None:
        """Place ``piece`` exactly here; returns its index, or ``None`` when it does not fit.

        Args:
            piece: What to place.
            x: Centre in metres.
            y: Centre in metres.
            yaw: Radians, counter-clockwise.
            z: Height of the underside.
            parent: Index of the piece it stands on; only siblings are then checked.
            flat: Lies on the floor and is in nobody's way (rugs).
        """
        c, s = np.cos(yaw), np.sin(yaw)
        axes = np.array([[c, s], [-s, c]])
        half = piece.size[:2] / 2
        center = np.array([x, y])
        corners = center + (CORNER_SIGNS[::2, :2] * half) @ axes
        if not self.shell.contains(corners, margin=0.01).all() or self._cuts_inner_corner(
            center, axes, half
        ):
            return None
        if z + piece.size[2] > self.shell.ceiling - 0.02:
            return None
        if not flat:
            rows = np.array(self._rows) if parent is None else self._siblings(parent)
            if len(rows):
                same_height = (rows[:, 6] < z + piece.size[2] - 1e-6) & (rows[:, 7] > z + 1e-6)
                rows = rows[same_height]
            grow = self.clearance if parent is None else 0.02
            if len(rows) and overlaps(center, axes, half + grow, rows[:, :6]).any():
                return None
        number = 1 + sum(p.label == piece.label for p in self.placed)
        name = f"{piece.label.replace(' ', '_')}_{number}"
        self.placed.append(Placed(piece, float(x), float(y), float(z), float(yaw), parent, name))
        if not flat and parent is None:
            self._rows.append((x, y, c, s, *half, z, z + piece.size[2]))
        return len(self.placed) - 1

    def restore(self, placed: list[Placed]) -> None:
        """Take over furniture that is known to fit."""
        for item in placed:
            self.placed.append(item)
            if item.parent is None and item.label != "rug":
                c, s = np.cos(item.yaw), np.sin(item.yaw)
                half, top = item.piece.size[:2] / 2, item.z + item.piece.size[2]
                self._rows.append((item.x, item.y, c, s, *half, item.z, top))

    def _cuts_inner_corner(self, center: Array, axes: Array, half: Array) -> bool:
        """Whether the rectangle reaches outside across a corner of the plan or a thin leg of it."""
        steps = np.linspace(-1, 1, 7)
        grid = np.stack(np.meshgrid(steps, steps), axis=-1).reshape(-1, 2)
        return not self.shell.contains(center + (grid * half) @ axes).all()

    def _siblings(self, parent: int) -> Array:
        rows = [
            (
                p.x,
                p.y,
                np.cos(p.yaw),
                np.sin(p.yaw),
                *p.piece.size[:2] / 2,
                p.z,
                p.z + p.piece.size[2],
            )
            for p in self.placed
            if p.parent == parent
        ]
        return np.array(rows)

    def jitter(self) -> float:
        """Small yaw error in radians: N(0, 3 degrees) for half of the pieces."""
        return float(np.radians(self.rng.normal(0, 3))) if self.rng.random() < 0.5 else 0.0

    def on_wall(
        self,
        piece: Piece,
        *,
        region: Rect | None = None,
        walls: tuple[int, ...] | None = None,
        hung: tuple[float, float] | None = None,
    ) -> int | None:
        """Back to a wall, front into the room.

        Args:
            piece: What to place.
            region: Only inside this rectangle.
            walls: Only these sides of the room.
            hung: Range of heights of the underside for pieces that hang on the wall.
        """
        choices = walls if walls is not None else tuple(range(len(self.shell.walls)))
        lengths = np.array([self.shell.walls[i].length for i in choices])
        for _ in range(MAX_TRIES):
            wall = self.shell.walls[
                choices[int(self.rng.choice(len(choices), p=lengths / lengths.sum()))]
            ]
            yaw = float(np.arctan2(wall.inward[1], wall.inward[0]))
            noise = 0.0 if hung is not None else self.jitter()
            depth, width = piece.size[:2]
            if not piece.archetype.has_front and depth > width:
                yaw, depth, width = yaw + np.pi / 2, width, depth
            reach = depth / 2 * np.cos(noise) + width / 2 * abs(np.sin(noise)) + WALL_GAP_M
            half = width / 2 * np.cos(noise) + depth / 2 * abs(np.sin(noise)) + WALL_GAP_M
            if wall.length < 2 * half:
                continue
            at = self.rng.uniform(half, wall.length - half)
            if hung is None and self.rng.random() < 0.35:
                at = half if self.rng.random() < 0.5 else wall.length - half
            x, y = np.array(wall.start) + wall.along * at + wall.inward * reach
            if region is not None and not region.contains(np.array([[x, y]]))[0]:
                continue
            z = self.rng.uniform(*hung) if hung is not None else 0.0
            index = self.add(piece, x, y, yaw + noise, z=z)
            if index is not None:
                return index
        self.skipped[piece.label] += 1
        return None

    def free(self, piece: Piece, *, region: Rect | None = None, flat: bool = False) -> int | None:
        """Anywhere on the floor of ``region``; mostly aligned with the walls."""
        rect = region or self.shell.rects[int(self.rng.integers(len(self.shell.rects)))]
        for _ in range(MAX_TRIES):
            x, y = self.rng.uniform(rect.x0, rect.x1), self.rng.uniform(rect.y0, rect.y1)
            yaw = np.pi / 2 * int(self.rng.integers(4)) + self.jitter()
            if self.rng.random() < 0.15 and not flat:
                yaw = self.rng.uniform(-np.pi, np.pi)
            index = self.add(piece, x, y, yaw, flat=flat)
            if index is not None:
                return index
        self.skipped[piece.label] += 1
        return None

    def near(
        self,
        piece: Piece,
        anchor: int,
        offset: tuple[float, float],
        turn: float = 0.0,
        *,
        flat: bool = False,
    ) -> int | None:
        """At ``offset`` metres in the anchor's frame, turned by ``turn`` radians against it."""
        base = self.placed[anchor]
        for attempt in range(6):
            spread = self.rng.normal(0, 0.02 + 0.03 * attempt, 2)
            x, y, _ = base.to_world(
                np.array([[offset[0] + spread[0], offset[1] + spread[1], 0.0]])
            )[0]
            noise = 0.0 if flat else self.jitter()
            index = self.add(piece, x, y, base.yaw + turn + noise, flat=flat)
            if index is not None:
                return index
        self.skipped[piece.label] += 1
        return None

    def on_top(self, piece: Piece, anchor: int) -> int | None:
        """On the surface of the anchor, inside its outline, front like the anchor's."""
        base = self.placed[anchor]
        surface = base.piece.surface
        half = piece.size[:2] / 2 + 0.01
        if surface is None:
            self.skipped[piece.label] += 1
            return None
        low = np.array([surface.x[0], surface.y[0]]) + half
        high = np.array([surface.x[1], surface.y[1]]) - half
        for _ in range(MAX_TRIES if (low <= high).all() else 0):
            local = np.array([[*self.rng.uniform(low, high), surface.z]])
            x, y, z = base.to_world(local)[0]
            index = self.add(piece, x, y, base.yaw, z=z, parent=anchor)
            if index is not None:
                return index
        self.skipped[piece.label] += 1
        return None


CELL_M = 0.1


def floor_grid(shell: Shell) -> tuple[Float[np.ndarray, "X Y 2"], tuple[float, float]]:
    """Centres of the 10 cm cells around the plan, and the corner of the first cell."""
    corners = np.array(shell.polygon)
    low = corners.min(axis=0) - 2 * CELL_M
    count = np.ceil((corners.max(axis=0) + 2 * CELL_M - low) / CELL_M).astype(int)
    x = low[0] + (np.arange(count[0]) + 0.5) * CELL_M
    y = low[1] + (np.arange(count[1]) + 0.5) * CELL_M
    return np.stack(np.meshgrid(x, y, indexing="ij"), axis=-1), (float(low[0]), float(low[1]))


def walkable(
    shell: Shell, placed: list[Placed], *, margin: float = 0.25, below: float = 1.7
) -> Bool[np.ndarray, "X Y"]:
    """Cells a person can stand in: ``margin`` from walls and from everything lower than ``below``."""
    grid, _ = floor_grid(shell)
    points = grid.reshape(-1, 2)
    free = _inside_with_margin(shell, points, margin)
    for item in placed:
        if item.z >= below or item.label == "rug":
            continue
        c, s = np.cos(item.yaw), np.sin(item.yaw)
        offset = points - (item.x, item.y)
        local = np.abs(offset @ np.array([[c, -s], [s, c]]))
        gap = np.maximum(local - item.piece.size[:2] / 2, 0)
        free &= (gap**2).sum(axis=1) > margin**2
    return free.reshape(grid.shape[:2])


def _inside_with_margin(shell: Shell, points: Array, margin: float) -> Array:
    """Inside the plan and at least ``margin`` from each of its walls."""
    inside = shell.contains(points)
    for wall in shell.walls:
        offset = points - wall.start
        along = np.clip(offset @ wall.along, 0, wall.length)
        nearest = np.array(wall.start) + along[:, None] * wall.along
        inside &= ((points - nearest) ** 2).sum(axis=1) >= margin**2
    return inside
