"""Stacks of unit cubes on a small grid, for questions about counting, silhouettes and completion."""

from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.random import Generator

from spatialvlm.scenes.cameras import Camera
from spatialvlm.scenes.rooms.appearance import SATURATED, rng_for
from spatialvlm.scenes.rooms.archetypes import Archetype, Piece
from spatialvlm.scenes.rooms.model import Picture, RoomModel, RoomSpec, finish_model
from spatialvlm.scenes.rooms.placement import Placed, Rect, Shell, walkable
from spatialvlm.scenes.rooms.sketch import Part, Sketch

CUBE_M = 0.25
MAX_HEIGHT = 3
SIDE_M = 6.0
NUM_VIEWS = 4


def _cube(sketch: Sketch) -> None:
    sketch.box(sketch.x, sketch.y, (0, sketch.h))


CUBE = Archetype(
    "cube",
    (CUBE_M, CUBE_M),
    (CUBE_M, CUBE_M),
    (CUBE_M, CUBE_M),
    _cube,
    symmetry="c4",
    place="floor",
)


def draw_blocks(spec: RoomSpec) -> RoomModel:
    """Columns of cubes by a height map, and four cameras around them from above.

    ``scene.extra["blocks"]`` holds ``heights`` (rows along x, columns along y), ``cube_m`` and ``origin``
    (outer corner of cell 0, 0); each frame's ``extra["cell_visible"]`` says how much of each top is seen.
    """
    rng = rng_for("blocks", spec.split, spec.seed)
    size = int(rng.integers(3, 5))
    heights = _height_map(size, rng)
    origin = -size * CUBE_M / 2
    placed: list[Placed] = []
    colors: dict[tuple[int, int, int], str] = {}
    for x in range(size):
        for y in range(size):
            for level in range(heights[x, y]):
                # Cubes that touch differ in colour, so that each one can be told apart.
                near = {
                    colors.get(n) for n in ((x - 1, y, level), (x, y - 1, level), (x, y, level - 1))
                }
                free = [name for name in SATURATED if name not in near]
                color = colors[x, y, level] = free[int(rng.integers(len(free)))]
                part = Part(
                    (-CUBE_M / 2, CUBE_M / 2), (-CUBE_M / 2, CUBE_M / 2), (0, CUBE_M), "main"
                )
                piece = Piece(CUBE, np.full(3, CUBE_M), (part,), None, color)
                center = [origin + (i + 0.5) * CUBE_M for i in (x, y)]
                parent = len(placed) - 1 if level else None
                name = f"cube_{x}_{y}_{level}"
                placed.append(
                    Placed(piece, center[0], center[1], level * CUBE_M, 0.0, parent, name)
                )
    half = SIDE_M / 2
    polygon = ((-half, -half), (half, -half), (half, half), (-half, half))
    shell = Shell(polygon, (Rect(-half, -half, half, half),), 4.0)
    start = float(rng.uniform(0, 360))
    cameras = []
    for view in range(NUM_VIEWS):
        azimuth, pitch = (
            start + 90.0 * view + float(rng.uniform(-15, 15)),
            float(rng.uniform(-50, -35)),
        )
        distance = 2.6 * size * CUBE_M
        eye = (
            distance * np.cos(np.radians(pitch)) * np.cos(np.radians(azimuth)),
            distance * np.cos(np.radians(pitch)) * np.sin(np.radians(azimuth)),
            0.3 + distance * np.sin(np.radians(-pitch)),
        )
        cameras.append(
            Camera.look(eye, azimuth + 180.0, pitch, hfov_deg=50.0, width=256, height=256)
        )
    extra: dict[str, Any] = {
        "blocks": {
            "heights": heights.tolist(),
            "cube_m": CUBE_M,
            "origin": [origin, origin],
        }
    }
    region = walkable(shell, placed)
    return finish_model(spec, "blocks", shell, placed, region, cameras=cameras, extra=extra)


def _height_map(size: int, rng: Generator) -> npt.NDArray[np.int64]:
    """Random heights with at least three columns and different heights."""
    while True:
        heights = rng.integers(0, MAX_HEIGHT + 1, (size, size))
        heights[rng.random((size, size)) < 0.1] = 0
        if (heights > 0).sum() >= 3 and len(np.unique(heights[heights > 0])) >= 2:
            return heights


def cell_visibility(model: RoomModel, picture: Picture) -> dict[str, Any]:
    """How much of each column's top face, or of an empty cell's floor, is visible: 0..1.

    The visible share of a 6 x 6 grid of points on each face, by depth.
    """
    blocks = model.extra["blocks"]
    heights = np.array(blocks["heights"])
    size = len(heights)
    steps = (np.arange(6) + 0.5) / 6
    camera, depth = picture.camera, picture.raster.depth
    shares = np.zeros((size, size))
    for x in range(size):
        for y in range(size):
            grid = np.stack(np.meshgrid(x + steps, y + steps), axis=-1).reshape(-1, 2)
            points = np.c_[
                blocks["origin"][0] + grid * CUBE_M, np.full(len(grid), heights[x, y] * CUBE_M)
            ]
            pixels, z = camera.project(points)
            inside = (z > 0) & (pixels >= 0).all(axis=1)
            inside &= (pixels < [camera.width, camera.height]).all(axis=1)
            column, row = pixels[inside].astype(int).T
            # A pixel next to an edge may belong to the neighbour face: allow one cube in twenty.
            shares[x, y] = (depth[row, column] > z[inside] - CUBE_M / 20).sum() / len(grid)
    return {"cell_visible": np.round(shares, 3).tolist()}
