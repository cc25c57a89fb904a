"""Parts of furniture: boxes and prisms in the object frame.

Object frame: x is the front, y left, z up; the origin is on the floor under the centre. ``d``, ``w``
and ``h`` are the extents along x, y and z in metres, and the parts fill exactly that box.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Float
from numpy.random import Generator

Material = Literal[
    "main", "shade", "wood", "dark", "white", "metal", "screen", "leaf", "soil", "books", "canvas",
    "glow", "glass",
]  # fmt: skip
"""``main`` is the named colour of the object, ``shade`` a darker tone of it."""

Interval = tuple[float, float]


@dataclass(frozen=True)
class Part:
    """A box (``radius`` is ``None``) or an upright prism in the object frame."""

    x: Interval
    y: Interval
    z: Interval
    material: Material
    top: Material | None = None
    taper: float = 0.0
    """Metres taken off each side of a box at its top."""
    radius: float | None = None
    top_radius: float | None = None
    sides: int = 12

    def vertices(self) -> Float[np.ndarray, "N 3"]:
        """Corners in the object frame."""
        if self.radius is None:
            return np.array(
                [
                    (self.x[i] + inset * (1 - 2 * i), self.y[j] + inset * (1 - 2 * j), self.z[k])
                    for i in (0, 1)
                    for j in (0, 1)
                    for k, inset in ((0, 0.0), (1, self.taper))
                ]
            )
        angles = 2 * np.pi * np.arange(self.sides) / self.sides
        center = np.array([sum(self.x) / 2, sum(self.y) / 2])
        rings = [
            np.c_[center + r * np.c_[np.cos(angles), np.sin(angles)], np.full(self.sides, z)]
            for r, z in ((self.radius, self.z[0]), (self.top_radius, self.z[1]))
            if r is not None
        ]
        return np.concatenate(rings)


@dataclass
class Sketch:
    """Collects the parts of one piece of furniture of size ``d`` x ``w`` x ``h``."""

    d: float
    w: float
    h: float
    rng: Generator
    parts: list[Part] = field(default_factory=list)

    def box(
        self,
        x: Interval,
        y: Interval,
        z: Interval,
        material: Material = "main",
        *,
        top: Material | None = None,
        taper: float = 0.0,
    ) -> None:
        """Add a box."""
        self.parts.append(Part(x, y, z, material, top, taper))

    def prism(
        self,
        center: tuple[float, float],
        radius: float,
        z: Interval,
        material: Material = "main",
        *,
        top_radius: float | None = None,
        sides: int = 12,
        top: Material | None = None,
    ) -> None:
        """Add a prism, frustum or cone."""
        cx, cy = center
        self.parts.append(
            Part(
                (cx - radius, cx + radius), (cy - radius, cy + radius), z, material, top,
                radius=radius, top_radius=radius if top_radius is None else top_radius, sides=sides,
            )
        )  # fmt: skip

    def legs(self, height: float, thickness: float, material: Material, inset: float = 0.0) -> None:
        """Four legs at the corners of the footprint."""
        for sx in (-1, 1):
            for sy in (-1, 1):
                x = sx * (self.d / 2 - inset - thickness / 2)
                y = sy * (self.w / 2 - inset - thickness / 2)
                half = thickness / 2
                self.box((x - half, x + half), (y - half, y + half), (0, height), material)

    @property
    def x(self) -> Interval:
        """Full depth."""
        return (-self.d / 2, self.d / 2)

    @property
    def y(self) -> Interval:
        """Full width."""
        return (-self.w / 2, self.w / 2)


@dataclass(frozen=True)
class Surface:
    """Where other things can stand: a rectangle of the object frame at height ``z``."""

    x: Interval
    y: Interval
    z: float
