"""What rooms look like: faces and materials of shell and furniture, lights, contact shadows."""

import numpy as np
from numpy.random import Generator

from spatialvlm.scenes.render.mesh import Mesh, MeshBuilder, Surface
from spatialvlm.scenes.render.shade import Light, Lighting
from spatialvlm.scenes.rooms.appearance import (
    TEXTURE_INDEX,
    contact_map,
    jittered,
    linear,
    rng_for,
)
from spatialvlm.scenes.rooms.placement import (
    CELL_M,
    Opening,
    Placed,
    Shell,
    Wall,
    floor_grid,
    walkable,
)
from spatialvlm.scenes.transforms import rz

WALL_M = 0.1


def build_mesh(shell: Shell, placed: list[Placed], key: tuple[object, ...], *, plain: bool) -> Mesh:
    """Faces of the shell (id 0) and of every piece (id = position + 1).

    Args:
        shell: The room.
        placed: Furniture in object order.
        key: Identifies the room; with the name of a piece it decides the materials, whatever else
            stands there.
        plain: Quiet walls and floor without patterns.
    """
    builder = MeshBuilder()
    _add_shell(builder, shell, rng_for("shell", *key), plain=plain)
    for index, item in enumerate(placed):
        materials = _materials(item, rng_for("materials", *key, item.name))
        rotation = rz(item.yaw)
        origin = np.array([item.x, item.y, item.z])
        for part in item.piece.parts:
            surface = materials[part.material]
            top = materials[part.top] if part.top is not None else None
            if part.radius is None:
                builder.add_box(
                    (part.x[0], part.y[0], part.z[0]),
                    (part.x[1], part.y[1], part.z[1]),
                    surface,
                    index + 1,
                    rotation=rotation,
                    origin=origin,
                    taper=part.taper,
                    top=top,
                )
            else:
                builder.add_prism(
                    (sum(part.x) / 2, sum(part.y) / 2),
                    part.radius,
                    part.z,
                    surface,
                    index + 1,
                    sides=part.sides,
                    top_radius=part.top_radius,
                    rotation=rotation,
                    origin=origin,
                    top=top,
                )
    return builder.build()


def _materials(item: Placed, rng: Generator) -> dict[str, Surface]:
    """Surfaces of the materials of one piece."""
    main = jittered(item.piece.color_name, rng)
    texture = TEXTURE_INDEX[item.piece.archetype.texture]
    glows = item.label in ("lamp", "floor lamp")
    shade_color = tuple(0.68 * c for c in main)
    if item.label == "plant":
        pot = ("white", "orange", "gray", "brown", "blue")[int(rng.integers(5))]
        shade_color, texture = jittered(pot, rng), 0
    wood = jittered(("brown", "brown", "white", "black")[int(rng.integers(4))], rng, 0.15)
    r, g, b = shade_color
    return {
        "main": Surface(main, texture, emission=0.45 if glows else 0.0),
        "shade": Surface((r, g, b), texture),
        "wood": Surface(wood, TEXTURE_INDEX["wood"]),
        "dark": Surface((0.02, 0.02, 0.022)),
        "white": Surface((0.82, 0.82, 0.80), TEXTURE_INDEX["fabric"] if item.label == "bed" else 0),
        "metal": Surface((0.45, 0.46, 0.48), TEXTURE_INDEX["metal"]),
        "screen": Surface((0.010, 0.012, 0.018)),
        "leaf": Surface(jittered("green", rng, 0.2), TEXTURE_INDEX["leaves"]),
        "soil": Surface((0.05, 0.03, 0.02), TEXTURE_INDEX["carpet"]),
        "books": Surface((0.9, 0.9, 0.9), TEXTURE_INDEX["books"]),
        "canvas": Surface((0.8, 0.8, 0.8), TEXTURE_INDEX["painting"]),
        "glow": Surface((1.0, 0.93, 0.75), emission=1.2),
        "glass": Surface((0.55, 0.70, 0.78)),
    }


_FLOORS = (
    ("planks", (150, 105, 70)),
    ("planks", (190, 155, 115)),
    ("planks", (105, 75, 55)),
    ("tiles", (205, 200, 190)),
    ("tiles", (150, 155, 160)),
    ("carpet", (165, 150, 135)),
    ("carpet", (120, 125, 140)),
    ("marble", (215, 212, 205)),
)
_WALLS = (
    ("plaster", (214, 208, 194)),
    ("plaster", (188, 202, 210)),
    ("plaster", (206, 196, 170)),
    ("stripes", (208, 200, 180)),
    ("plaster", (180, 196, 176)),
    ("plaster", (208, 186, 176)),
    ("plaster", (196, 190, 206)),
    ("bricks", (184, 152, 136)),
)


def _add_shell(builder: MeshBuilder, shell: Shell, rng: Generator, *, plain: bool) -> None:
    """Floor, ceiling, walls, baseboards, and the painted doors and windows; all id 0."""
    floor_kind, floor_color = _FLOORS[int(rng.integers(3 if plain else len(_FLOORS)))]
    wall_kind, wall_color = _WALLS[int(rng.integers(3 if plain else len(_WALLS)))]
    if plain:
        floor_kind = "carpet"
    floor = Surface(linear(floor_color), TEXTURE_INDEX[floor_kind])
    wall = Surface(linear(wall_color), TEXTURE_INDEX[wall_kind])
    ceiling = Surface((0.80, 0.80, 0.78), TEXTURE_INDEX["plaster"])
    top, out = shell.ceiling, WALL_M / 2
    for r in shell.rects:
        x0, y0, x1, y1 = r.x0 - out, r.y0 - out, r.x1 + out, r.y1 + out
        loop = np.array([[x0, y0, 0], [x1, y0, 0], [x1, y1, 0], [x0, y1, 0]])
        builder.add_polygon(loop, floor, u_axis=(1, 0, 0))
        builder.add_polygon(loop[::-1] + np.array([0, 0, top]), ceiling, u_axis=(1, 0, 0))
    for index, side in enumerate(shell.walls):
        start, end = np.array([*side.start, 0.0]), np.array([*side.end, 0.0])
        along = np.array([*side.along, 0.0])
        # Walls reach a little past convex corners and below the floor, so that no ray slips through.
        before = shell.walls[index - 1]
        after = shell.walls[(index + 1) % len(shell.walls)]
        if np.cross(before.along, side.along) > 0:
            start = start - out * along
        if np.cross(side.along, after.along) > 0:
            end = end + out * along
        low, high = np.array([0, 0, -out]), np.array([0, 0, top + out])
        loop = np.array([end + low, start + low, start + high, end + high])
        builder.add_polygon(loop, wall, u_axis=along, origin=start)
        _add_strip(builder, side, 0.0, side.length, (0.0, 0.08), 0.012, Surface((0.78, 0.77, 0.74)))
        for opening in shell.openings:
            if opening.wall == index:
                _add_opening(builder, side, opening)


def _add_strip(
    builder: MeshBuilder,
    wall: Wall,
    a: float,
    b: float,
    z: tuple[float, float],
    thick: float,
    surface: Surface,
) -> None:
    """Thin box on a wall from ``a`` to ``b`` metres along it."""
    along, inward = np.array([*wall.along, 0.0]), np.array([*wall.inward, 0.0])
    rotation = np.stack([along, inward, [0, 0, 1.0]], axis=1)
    builder.add_box(
        (a, -0.01, z[0]),
        (b, thick, z[1]),
        surface,
        rotation=rotation,
        origin=np.array([*wall.start, 0.0]),
    )


def _add_opening(builder: MeshBuilder, wall: Wall, opening: Opening) -> None:
    """Paint a door or a window onto the wall."""
    a, b = opening.center_m - opening.width_m / 2, opening.center_m + opening.width_m / 2
    frame = Surface((0.85, 0.84, 0.80))
    _add_strip(builder, wall, a - 0.06, b + 0.06, (opening.z0, opening.z1 + 0.06), 0.018, frame)
    if opening.kind == "door":
        leaf = Surface(linear((176, 148, 112)), TEXTURE_INDEX["wood"])
        panel = Surface(linear((150, 122, 90)), TEXTURE_INDEX["wood"])
        _add_strip(builder, wall, a, b, (0.0, opening.z1), 0.026, leaf)
        for low, high in ((0.2, 0.9), (1.05, 1.85)):
            _add_strip(builder, wall, a + 0.15, b - 0.15, (low, high), 0.03, panel)
        _add_strip(builder, wall, a + 0.06, a + 0.16, (0.98, 1.02), 0.07, Surface((0.5, 0.5, 0.5)))
        return
    sky = Surface((0.42, 0.66, 0.95), emission=0.35)
    middle, half = (opening.z0 + opening.z1) / 2, (a + b) / 2
    for x0, x1 in ((a, half - 0.025), (half + 0.025, b)):
        for z0, z1 in ((opening.z0 + 0.06, middle - 0.02), (middle + 0.02, opening.z1)):
            _add_strip(builder, wall, x0, x1, (z0, z1), 0.022, sky)
    _add_strip(builder, wall, a - 0.1, b + 0.1, (opening.z0 - 0.02, opening.z0 + 0.03), 0.09, frame)


def draw_lighting(shell: Shell, placed: list[Placed], mesh: Mesh, rng: Generator) -> Lighting:
    """One or two point lights below the ceiling (one per leg of an L), ambient, contact shadows."""
    rects = shell.rects if len(shell.rects) > 1 else shell.rects * int(rng.integers(1, 3))
    total = 1.7 + 0.045 * shell.area
    lights = []
    for index, r in enumerate(rects):
        spread = 0.08 if len(shell.rects) > 1 or len(rects) == 1 else 0.2
        cx, cy = (r.x0 + r.x1) / 2, (r.y0 + r.y1) / 2
        sign = 1 if index == 0 else -1
        x = cx + sign * spread * (r.x1 - r.x0) + rng.normal(0, 0.15)
        y = cy + sign * spread * (r.y1 - r.y0) + rng.normal(0, 0.15)
        warm = rng.uniform(0.0, 0.22)
        power = total / len(rects) * rng.uniform(0.85, 1.15)
        color = (power, power * (1 - 0.35 * warm), power * (1 - warm))
        lights.append(Light((float(x), float(y), shell.ceiling - 0.12), color).with_shadow(mesh))
    grid, origin = floor_grid(shell)
    fine = np.repeat(
        np.repeat(~walkable(shell, placed, margin=0.02, below=0.35), 2, axis=0), 2, axis=1
    )
    ambient = rng.uniform(0.36, 0.46)
    assert grid.shape[0] * 2 == fine.shape[0]
    return Lighting(
        tuple(lights),
        (ambient, ambient * 0.985, ambient * 0.96),
        contact_map(fine, CELL_M / 2),
        origin,
        CELL_M / 2,
        exposure=float(2 ** rng.uniform(-0.3, 0.3)),
        noise=float(rng.uniform(0.3, 1.2)),
    )
