"""Turntables: one piece with a front, seen from all around, for questions about rotation."""

import numpy as np

from spatialvlm.scenes.cameras import Camera
from spatialvlm.scenes.rooms.appearance import rng_for
from spatialvlm.scenes.rooms.archetypes import ARCHETYPES, draw_piece
from spatialvlm.scenes.rooms.model import RoomModel, RoomSpec, finish_model
from spatialvlm.scenes.rooms.placement import Placer, Rect, Shell, walkable

AZIMUTH_STEP_DEG = 15
ELEVATIONS_DEG = (12.0, 30.0)
SIDE_M = 12.0
HFOV_DEG = 50.0


def turntable_labels() -> list[str]:
    """Pieces that stand on the floor and look different from every side."""
    return [
        a.label
        for a in ARCHETYPES.values()
        if a.has_front and a.symmetry == "none" and a.place in ("wall", "floor")
    ]


def draw_turntable(spec: RoomSpec) -> RoomModel:
    """A piece in the middle of an empty hall and 48 cameras: 24 azimuths at two elevations.

    Frame ``24 * e + a`` has elevation ``e`` and azimuth ``15 * a`` degrees, counter-clockwise; the radius
    is 1.5 to 2.5 times the largest extent of the piece.
    """
    rng = rng_for("turntable", spec.split, spec.seed)
    labels = turntable_labels()
    piece = draw_piece(labels[int(rng.integers(len(labels)))], rng, spec.split)
    half = SIDE_M / 2
    polygon = ((-half, -half), (half, -half), (half, half), (-half, half))
    shell = Shell(polygon, (Rect(-half, -half, half, half),), 6.0)
    placer = Placer(shell, rng)
    index = placer.add(piece, 0.0, 0.0, float(rng.uniform(-np.pi, np.pi)))
    assert index == 0
    extent = float(piece.size.max())
    radius = float(np.clip(rng.uniform(1.5, 2.5) * extent, 1.2, 0.9 * half))
    middle = piece.size[2] / 2
    cameras = []
    for elevation in ELEVATIONS_DEG:
        rise, away = np.sin(np.radians(elevation)) * radius, np.cos(np.radians(elevation)) * radius
        for step in range(360 // AZIMUTH_STEP_DEG):
            azimuth = step * AZIMUTH_STEP_DEG
            eye = (
                float(away * np.cos(np.radians(azimuth))),
                float(away * np.sin(np.radians(azimuth))),
                float(middle + rise),
            )
            cameras.append(
                Camera.look(
                    eye, azimuth + 180.0, -elevation, hfov_deg=HFOV_DEG, width=256, height=256
                )
            )
    region = walkable(shell, placer.placed)
    return finish_model(
        spec, "turntable", shell, placer.placed, region, cameras=cameras,
        extra={"turntable": {"step_deg": AZIMUTH_STEP_DEG, "elevations_deg": list(ELEVATIONS_DEG), "radius_m": radius}},
    )  # fmt: skip
