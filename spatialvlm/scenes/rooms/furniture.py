"""How every kind of furniture is drawn from boxes and prisms (see ``sketch`` for the frame)."""

from typing import Literal

from spatialvlm.scenes.rooms.sketch import Interval, Sketch, Surface


def draw_chair(s: Sketch) -> None:
    """Seat on four legs, open back."""
    seat = 0.46 * min(s.h, 0.98) / 0.9
    s.legs(seat - 0.05, 0.04, "wood")
    s.box(s.x, s.y, (seat - 0.05, seat))
    back = (-s.d / 2, -s.d / 2 + 0.045)
    s.box(back, (-s.w / 2, -s.w / 2 + 0.04), (seat, s.h), "wood")
    s.box(back, (s.w / 2 - 0.04, s.w / 2), (seat, s.h), "wood")
    s.box(back, (-s.w / 2 + 0.04, s.w / 2 - 0.04), (seat + 0.12, s.h))


def draw_stool(s: Sketch) -> None:
    """Round seat on a pole."""
    r = s.d / 2
    s.prism((0, 0), 0.8 * r, (0, 0.03), "metal")
    s.prism((0, 0), 0.03, (0.03, s.h - 0.06), "metal", sides=8)
    s.prism((0, 0), r, (s.h - 0.06, s.h))


def _seating(s: Sketch, cushions: int) -> Surface:
    arm, back, foot = min(0.18, 0.1 * s.w + 0.07), 0.22 * s.d, 0.07
    seat = 0.5 * s.h
    s.legs(foot, 0.06, "wood", inset=0.03)
    s.box(
        (-s.d / 2 + back, s.d / 2 - 0.01),
        (-s.w / 2 + arm, s.w / 2 - arm),
        (foot, seat - 0.12),
        "shade",
    )
    s.box((-s.d / 2, -s.d / 2 + back), s.y, (foot, s.h), taper=0.02)
    for side in (-1, 1):
        y = sorted((side * s.w / 2, side * (s.w / 2 - arm)))
        s.box((-s.d / 2 + back, s.d / 2), (y[0], y[1]), (foot, 0.72 * s.h))
    inner = s.w - 2 * arm
    for i in range(cushions):
        y0 = -inner / 2 + i * inner / cushions
        y1 = y0 + inner / cushions
        s.box(
            (-s.d / 2 + back, s.d / 2 - 0.005),
            (y0 + 0.008, y1 - 0.008),
            (seat - 0.12, seat),
            taper=0.012,
        )
        s.box(
            (-s.d / 2 + back, -s.d / 2 + back + 0.12),
            (y0 + 0.01, y1 - 0.01),
            (seat, s.h - 0.06),
            taper=0.02,
        )
    return Surface((-s.d / 2 + back + 0.12, s.d / 2), (-inner / 2, inner / 2), seat)


def draw_sofa(s: Sketch) -> Surface:
    """Two or three seats between arms."""
    return _seating(s, 3 if s.w > 1.9 else 2)


def draw_armchair(s: Sketch) -> Surface:
    """One seat between arms."""
    return _seating(s, 1)


def draw_dining_table(s: Sketch) -> Surface:
    """Top, apron, four legs."""
    s.box(s.x, s.y, (s.h - 0.04, s.h))
    s.box(
        (-s.d / 2 + 0.08, s.d / 2 - 0.08),
        (-s.w / 2 + 0.08, s.w / 2 - 0.08),
        (s.h - 0.11, s.h - 0.04),
        "shade",
    )
    s.legs(s.h - 0.04, 0.07, "shade", inset=0.05)
    return Surface(s.x, s.y, s.h)


def draw_coffee_table(s: Sketch) -> Surface:
    """Low top with a shelf below."""
    s.box(s.x, s.y, (s.h - 0.045, s.h))
    s.legs(s.h - 0.045, 0.05, "shade", inset=0.02)
    s.box((-s.d / 2 + 0.06, s.d / 2 - 0.06), (-s.w / 2 + 0.06, s.w / 2 - 0.06), (0.10, 0.125))
    return Surface(s.x, s.y, s.h)


def draw_desk(s: Sketch) -> Surface:
    """Top on a side panel and a chest of drawers."""
    top = s.h - 0.035
    s.box(s.x, s.y, (top, s.h))
    s.box((-s.d / 2 + 0.02, s.d / 2 - 0.03), (-s.w / 2 + 0.01, -s.w / 2 + 0.05), (0, top), "shade")
    drawers = (s.w / 2 - 0.41, s.w / 2 - 0.01)
    s.box((-s.d / 2 + 0.02, s.d / 2 - 0.05), drawers, (0, top), "shade")
    for i in range(3):
        z0 = 0.06 + i * (top - 0.06) / 3
        z1 = 0.06 + (i + 1) * (top - 0.06) / 3 - 0.02
        s.box((s.d / 2 - 0.05, s.d / 2 - 0.03), (drawers[0] + 0.015, drawers[1] - 0.015), (z0, z1))
        middle = (z0 + z1) / 2
        s.box(
            (s.d / 2 - 0.03, s.d / 2 - 0.015),
            (drawers[0] + 0.13, drawers[1] - 0.13),
            (middle - 0.01, middle + 0.01),
            "metal",
        )
    s.box((-s.d / 2 + 0.02, -s.d / 2 + 0.04), (-s.w / 2 + 0.05, drawers[0]), (0.3, top), "shade")
    return Surface(s.x, s.y, s.h)


def draw_bed(s: Sketch) -> Surface:
    """Frame with headboard, mattress, blanket."""
    mattress = min(0.55, 0.62 * s.h)
    s.box((-s.d / 2, -s.d / 2 + 0.06), s.y, (0, s.h), "wood")
    s.box((-s.d / 2 + 0.06, s.d / 2), s.y, (0.06, 0.30 * mattress / 0.5), "wood")
    s.legs(0.06, 0.07, "wood")
    s.box(
        (-s.d / 2 + 0.06, s.d / 2 - 0.02),
        (-s.w / 2 + 0.02, s.w / 2 - 0.02),
        (0.30 * mattress / 0.5, mattress - 0.04),
        "white",
    )
    s.box(
        (-s.d / 2 + 0.62, s.d / 2 - 0.005),
        (-s.w / 2 + 0.005, s.w / 2 - 0.005),
        (0.32 * mattress / 0.5, mattress),
        taper=0.015,
    )
    s.box(
        (-s.d / 2 + 0.50, -s.d / 2 + 0.62),
        (-s.w / 2 + 0.01, s.w / 2 - 0.01),
        (0.34 * mattress / 0.5, mattress),
        "white",
        taper=0.005,
    )
    return Surface(
        (-s.d / 2 + 0.08, s.d / 2 - 0.9), (-s.w / 2 + 0.05, s.w / 2 - 0.05), mattress - 0.04
    )


def _fronts(
    s: Sketch,
    columns: int,
    rows: int,
    z: Interval,
    *,
    handle: Literal["bar", "knob", "none"] = "bar",
) -> None:
    """Doors or drawers on the front, 2 cm thick, with handles; the body ends 3.5 cm behind."""
    front = s.d / 2 - 0.015
    for i in range(columns):
        y0, y1 = (-s.w / 2 + (i + k) * s.w / columns for k in (0, 1))
        for j in range(rows):
            z0, z1 = (z[0] + (j + k) * (z[1] - z[0]) / rows for k in (0, 1))
            s.box((front - 0.02, front), (y0 + 0.007, y1 - 0.007), (z0 + 0.007, z1 - 0.007))
            middle = (z0 + z1) / 2
            if handle == "knob" or (handle == "bar" and columns == 1):
                half = 0.02 if handle == "knob" else min(0.10, s.w / 5)
                center = (y0 + y1) / 2
                s.box(
                    (front, s.d / 2),
                    (center - half, center + half),
                    (middle - 0.012, middle + 0.012),
                    "metal",
                )
            elif handle == "bar":
                edge = y1 - 0.05 if i % 2 == 0 else y0 + 0.05
                half = min(0.12, 0.3 * (z1 - z0))
                s.box(
                    (front, s.d / 2),
                    (edge - 0.01, edge + 0.01),
                    (middle - half, middle + half),
                    "metal",
                )


def draw_nightstand(s: Sketch) -> Surface:
    """Two drawers on short legs."""
    s.box((-s.d / 2, s.d / 2 - 0.035), s.y, (0.10, s.h - 0.03), "shade")
    s.legs(0.10, 0.04, "shade")
    s.box((-s.d / 2, s.d / 2 - 0.005), s.y, (s.h - 0.03, s.h))
    _fronts(s, 1, 2, (0.11, s.h - 0.04), handle="knob")
    return Surface((-s.d / 2, s.d / 2 - 0.01), s.y, s.h)


def draw_wardrobe(s: Sketch) -> None:
    """Tall body with two or three doors."""
    s.box((-s.d / 2, s.d / 2 - 0.035), s.y, (0.07, s.h), "shade")
    s.box((-s.d / 2 + 0.03, s.d / 2 - 0.06), (-s.w / 2 + 0.02, s.w / 2 - 0.02), (0, 0.07), "dark")
    _fronts(s, 3 if s.w > 1.4 else 2, 1, (0.08, s.h))


def draw_bookshelf(s: Sketch) -> None:
    """Shelves with rows of books."""
    board, shelves = 0.025, max(3, round(s.h / 0.38))
    s.box((-s.d / 2, -s.d / 2 + 0.015), s.y, (0, s.h), "shade")
    for y in ((-s.w / 2, -s.w / 2 + board), (s.w / 2 - board, s.w / 2)):
        s.box((-s.d / 2 + 0.015, s.d / 2), y, (0, s.h))
    inner = (-s.w / 2 + board, s.w / 2 - board)
    gap = (s.h - board) / shelves
    for i in range(shelves + 1):
        z = i * gap
        s.box((-s.d / 2 + 0.015, s.d / 2), inner, (z, z + board))
        if i < shelves:
            filled = s.rng.uniform(0.55, 0.98)
            s.box(
                (-s.d / 2 + 0.02, s.d / 2 - 0.05),
                (inner[0] + 0.01, inner[0] + 0.01 + filled * (inner[1] - inner[0] - 0.02)),
                (z + board, z + board + s.rng.uniform(0.68, 0.82) * (gap - board)),
                "books",
            )


def draw_cabinet(s: Sketch) -> Surface:
    """Low body with doors on short legs."""
    s.box((-s.d / 2, s.d / 2 - 0.035), s.y, (0.09, s.h - 0.03), "shade")
    s.legs(0.09, 0.05, "shade")
    s.box((-s.d / 2, s.d / 2 - 0.005), s.y, (s.h - 0.03, s.h))
    _fronts(s, 3 if s.w > 1.05 else 2, 1, (0.10, s.h - 0.04))
    return Surface((-s.d / 2, s.d / 2 - 0.01), s.y, s.h)


def draw_fridge(s: Sketch) -> None:
    """Two doors with long handles."""
    split = 0.36 * s.h
    s.box((-s.d / 2, s.d / 2 - 0.06), s.y, (0.03, s.h), "shade")
    s.box((-s.d / 2 + 0.05, s.d / 2 - 0.08), (-s.w / 2 + 0.03, s.w / 2 - 0.03), (0, 0.03), "dark")
    for z0, z1 in ((0.04, split - 0.006), (split + 0.006, s.h)):
        s.box((s.d / 2 - 0.055, s.d / 2 - 0.025), (-s.w / 2, s.w / 2), (z0, z1))
        handle = (z1 - 0.30, z1 - 0.04) if z0 < split - 0.1 else (z0 + 0.04, z0 + 0.45)
        s.box((s.d / 2 - 0.025, s.d / 2), (s.w / 2 - 0.09, s.w / 2 - 0.06), handle, "metal")


def draw_stove(s: Sketch) -> None:
    """Oven door, knobs, four plates."""
    top = s.h - 0.10
    s.box((-s.d / 2, s.d / 2 - 0.05), s.y, (0.04, top - 0.03))
    s.box((-s.d / 2 + 0.04, s.d / 2 - 0.08), (-s.w / 2 + 0.02, s.w / 2 - 0.02), (0, 0.04), "dark")
    s.box((-s.d / 2, s.d / 2 - 0.02), s.y, (top - 0.03, top), "dark")
    s.box((-s.d / 2, -s.d / 2 + 0.05), s.y, (top, s.h))
    s.box((s.d / 2 - 0.05, s.d / 2 - 0.025), (-s.w / 2 + 0.01, s.w / 2 - 0.01), (0.16, top - 0.14))
    s.box(
        (s.d / 2 - 0.025, s.d / 2 - 0.02),
        (-s.w / 2 + 0.09, s.w / 2 - 0.09),
        (0.26, top - 0.24),
        "screen",
    )
    s.box(
        (s.d / 2 - 0.025, s.d / 2),
        (-s.w / 2 + 0.06, s.w / 2 - 0.06),
        (top - 0.20, top - 0.175),
        "metal",
    )
    for i in range(4):
        y = (-0.3 + 0.2 * i) * s.w
        s.box(
            (s.d / 2 - 0.05, s.d / 2 - 0.015),
            (y - 0.02, y + 0.02),
            (top - 0.11, top - 0.07),
            "dark",
        )
    for sx in (-1, 1):
        for sy in (-1, 1):
            s.prism(
                (0.02 + sx * 0.22 * s.d, sy * 0.24 * s.w),
                0.085,
                (top, top + 0.012),
                "metal",
                sides=8,
            )


def draw_sink(s: Sketch) -> None:
    """Basin in a cabinet, with a tap."""
    top = s.h - 0.17
    s.box(
        (-s.d / 2, s.d / 2 - 0.035), (-s.w / 2 + 0.01, s.w / 2 - 0.01), (0.08, top - 0.04), "shade"
    )
    s.box((-s.d / 2 + 0.03, s.d / 2 - 0.08), (-s.w / 2 + 0.02, s.w / 2 - 0.02), (0, 0.08), "dark")
    _fronts(s, 2, 1, (0.10, top - 0.05))
    basin_x, basin_y = (-0.22 * s.d, 0.36 * s.d), (-0.3 * s.w, 0.3 * s.w)
    s.box((-s.d / 2, basin_x[0]), s.y, (top - 0.04, top), "white")
    s.box((basin_x[1], s.d / 2), s.y, (top - 0.04, top), "white")
    s.box(basin_x, (-s.w / 2, basin_y[0]), (top - 0.04, top), "white")
    s.box(basin_x, (basin_y[1], s.w / 2), (top - 0.04, top), "white")
    s.box(basin_x, basin_y, (top - 0.045, top - 0.035), "metal")
    tap = -0.22 * s.d - 0.05
    s.box((tap - 0.015, tap + 0.015), (-0.015, 0.015), (top, s.h), "metal")
    s.box((tap, tap + 0.17), (-0.012, 0.012), (s.h - 0.035, s.h - 0.005), "metal")


def draw_toilet(s: Sketch) -> None:
    """Tank, bowl and lid."""
    tank, seat = 0.20, 0.41
    s.box((-s.d / 2, -s.d / 2 + tank), s.y, (0.36, s.h - 0.03))
    s.box((-s.d / 2, -s.d / 2 + tank), s.y, (s.h - 0.03, s.h), "white")
    s.box((-s.d / 2 + 0.05, s.d / 2 - 0.16), (-0.10, 0.10), (0, 0.25))
    middle = -s.d / 2 + tank + (s.d - tank) / 2
    length, half = s.d - tank, 0.42 * s.w
    s.box(
        (middle - length / 2, middle + 0.2 * length), (-half, half), (0.22, seat - 0.03), taper=-0.0
    )
    s.prism((s.d / 2 - half, 0.0), half, (0.22, seat - 0.03), sides=16)
    s.box((middle - length / 2, middle + 0.2 * length), (-half, half), (seat - 0.03, seat), "white")
    s.prism((s.d / 2 - half, 0.0), half, (seat - 0.03, seat), "white", sides=16)
    s.prism((s.d / 2 - half - 0.01, 0.0), 0.68 * half, (seat, seat + 0.003), "shade", sides=16)


def draw_bathtub(s: Sketch) -> None:
    """Tub with a rim."""
    wall = 0.09
    for y in ((-s.w / 2, -s.w / 2 + wall), (s.w / 2 - wall, s.w / 2)):
        s.box(s.x, y, (0, s.h))
    for x in ((-s.d / 2, -s.d / 2 + wall), (s.d / 2 - wall, s.d / 2)):
        s.box(x, (-s.w / 2 + wall, s.w / 2 - wall), (0, s.h))
    s.box(
        (-s.d / 2 + wall, s.d / 2 - wall), (-s.w / 2 + wall, s.w / 2 - wall), (0.05, 0.12), "glass"
    )


def draw_screen(s: Sketch) -> None:
    """A panel on a stand."""
    foot, panel = 0.14 * s.h, min(0.05, 0.45 * s.d)
    back = -panel / 2
    s.box(s.x, (-0.22 * s.w, 0.22 * s.w), (0, 0.02), "dark")
    s.box((-0.015, 0.015), (-0.05, 0.05), (0.02, foot + 0.05), "dark")
    s.box((back, back + 0.8 * panel), s.y, (foot, s.h))
    s.box(
        (back + 0.8 * panel, back + panel),
        (-s.w / 2 + 0.02, s.w / 2 - 0.02),
        (foot + 0.02, s.h - 0.02),
        "screen",
    )


def draw_lamp(s: Sketch) -> None:
    """Table lamp with a shade."""
    r, shade = s.d / 2, 0.45 * s.h
    s.prism((0, 0), 0.55 * r, (0, 0.03), "metal")
    s.prism((0, 0), 0.3 * r, (0.03, s.h - shade - 0.04), "metal", top_radius=0.16 * r)
    s.prism((0, 0), 0.02, (s.h - shade - 0.04, s.h - shade), "metal", sides=8)
    s.prism((0, 0), r, (s.h - shade, s.h), "main", top_radius=0.62 * r, top="glow")


def draw_floor_lamp(s: Sketch) -> None:
    """Shade on a tall pole."""
    r, shade = s.d / 2, 0.34
    s.prism((0, 0), 0.8 * r, (0, 0.03), "dark")
    s.prism((0, 0), 0.02, (0.03, s.h - shade), "dark", sides=8)
    s.prism((0, 0), r, (s.h - shade, s.h), "main", top_radius=0.6 * r, top="glow")


def draw_plant(s: Sketch) -> None:
    """Pot and a crown of leaves."""
    r, pot = s.d / 2, min(0.36, 0.34 * s.h)
    s.prism((0, 0), 0.42 * r + 0.02, (0, pot), "shade", top_radius=0.58 * r + 0.02, top="soil")
    s.prism((0, 0), 0.025, (pot, 0.62 * s.h), "wood", sides=8)
    low, top = pot + 0.04, s.h
    span = top - low
    s.prism((0, 0), 0.30 * r, (low, low + 0.32 * span), "leaf", top_radius=r)
    s.prism((0, 0), r, (low + 0.32 * span, low + 0.48 * span), "leaf", top_radius=0.72 * r)
    s.prism((0, 0), 0.86 * r, (low + 0.48 * span, low + 0.72 * span), "leaf", top_radius=0.5 * r)
    s.prism((0, 0), 0.62 * r, (low + 0.72 * span, top), "leaf", top_radius=0.0)


def draw_bin(s: Sketch) -> None:
    """Open round bin."""
    r = s.d / 2
    s.prism((0, 0), 0.78 * r, (0, s.h - 0.04), "main", top_radius=0.96 * r)
    s.prism((0, 0), r, (s.h - 0.04, s.h - 0.004), "main", top="shade")
    s.prism((0, 0), 0.86 * r, (s.h - 0.006, s.h), "dark")


def draw_carton(s: Sketch) -> None:
    """Closed box with tape."""
    s.box(s.x, s.y, (0, s.h - 0.003))
    # Tape around the middle, flush with the outline.
    s.box((-s.d / 2, s.d / 2), (-0.03, 0.03), (s.h - 0.004, s.h), "white")


def draw_suitcase(s: Sketch) -> None:
    """Case on wheels with a handle."""
    body = s.h - 0.10
    for sx in (-1, 1):
        for sy in (-1, 1):
            s.box(
                (sx * 0.32 * s.d - 0.02, sx * 0.32 * s.d + 0.02),
                (sy * 0.38 * s.w - 0.02, sy * 0.38 * s.w + 0.02),
                (0, 0.05),
                "dark",
            )
    s.box((-s.d / 2 + 0.01, s.d / 2 - 0.01), (-s.w / 2 + 0.01, s.w / 2 - 0.01), (0.05, body))
    for y in (-0.28, 0.0, 0.28):
        s.box(s.x, (y * s.w - 0.025, y * s.w + 0.025), (0.08, body - 0.04), "shade")
    s.box((-0.012, 0.012), (-s.w / 2, s.w / 2), (0.30 * body, 0.42 * body), "dark")
    for sy in (-1, 1):
        s.box((-0.012, 0.012), (sy * 0.09 - 0.012, sy * 0.09 + 0.012), (body, s.h - 0.025), "metal")
    s.box((-0.016, 0.016), (-0.12, 0.12), (s.h - 0.025, s.h), "dark")


def draw_pillow(s: Sketch) -> None:
    """Soft-edged cushion."""
    inset = 0.25 * s.h
    s.box(
        (-s.d / 2 + inset, s.d / 2 - inset),
        (-s.w / 2 + inset, s.w / 2 - inset),
        (0, 0.3 * s.h),
        "shade",
    )
    s.box(s.x, s.y, (0.3 * s.h, 0.6 * s.h))
    s.box(s.x, s.y, (0.6 * s.h, s.h), taper=1.2 * inset)


def draw_rug(s: Sketch) -> None:
    """Flat carpet with a border."""
    s.box(s.x, s.y, (0, 0.6 * s.h), "shade")
    border = 0.07
    s.box(
        (-s.d / 2 + border, s.d / 2 - border),
        (-s.w / 2 + border, s.w / 2 - border),
        (0.6 * s.h, s.h),
    )


def draw_picture(s: Sketch) -> None:
    """Framed canvas."""
    frame = min(0.045, 0.12 * min(s.w, s.h))
    s.box((-s.d / 2, s.d / 2 - 0.4 * s.d), s.y, (0, s.h))
    for y in ((-s.w / 2, -s.w / 2 + frame), (s.w / 2 - frame, s.w / 2)):
        s.box((s.d / 2 - 0.4 * s.d, s.d / 2), y, (0, s.h))
    for z in ((0, frame), (s.h - frame, s.h)):
        s.box((s.d / 2 - 0.4 * s.d, s.d / 2), (-s.w / 2 + frame, s.w / 2 - frame), z)
    s.box(
        (s.d / 2 - 0.4 * s.d, s.d / 2 - 0.3 * s.d),
        (-s.w / 2 + frame, s.w / 2 - frame),
        (frame, s.h - frame),
        "canvas",
    )
