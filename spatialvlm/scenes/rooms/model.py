"""A room from its seed: layout, mesh, lights, cameras, and pictures of it."""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from spatialvlm.errors import RoomGenerationError
from spatialvlm.scenes.cameras import Camera
from spatialvlm.scenes.render.mesh import Mesh
from spatialvlm.scenes.render.raster import Raster, rasterise
from spatialvlm.scenes.render.shade import Lighting, TextureBank, shade
from spatialvlm.scenes.rooms import paths
from spatialvlm.scenes.rooms.appearance import TEXTURE_SEEDS, Split, rng_for, texture_bank
from spatialvlm.scenes.rooms.dress import build_mesh, draw_lighting
from spatialvlm.scenes.rooms.grammar import (
    GRAMMARS,
    Preset,
    draw_shell,
    furnish,
    furnish_small,
    grammars_of,
)
from spatialvlm.scenes.rooms.placement import Placed, Shell
from spatialvlm.scenes.transforms import Array

MAX_DRAWS = 20


@dataclass(frozen=True)
class RoomSpec:
    """Everything that decides a room's geometry and appearance."""

    seed: int
    split: Split = "train"
    preset: Preset = "realistic"
    grammar: str | None = None
    """Name of a grammar of the split; drawn from the seed when ``None``."""
    twin: int = 0
    """0 is the room itself; ``k`` its k-th counterfactual twin (one change, same room id)."""

    @property
    def room_name(self) -> str:
        """Native room id, equal for twins."""
        kind = {"turntable": "turn-", "blocks": "blocks-"}.get(self.preset, "")
        return f"{self.split}-{kind}{self.seed:07d}"

    @property
    def name(self) -> str:
        """Native scene id, also the folder name."""
        return f"{self.room_name}-t{self.twin}" if self.twin else self.room_name


@dataclass(frozen=True)
class RenderConfig:
    """Size and quality of the pictures."""

    num_frames: int = 8
    width: int = 336
    height: int = 336
    ssaa: int = 1
    """Colour samples per pixel side; depth and ids are never supersampled."""
    depth: bool = True
    """Also store 16-bit depth in millimetres."""
    jpeg_quality: int = 92
    renderer: Literal["numpy", "cycles"] = "numpy"
    """Who draws the colours: the built-in rasteriser, or Blender's path tracer (needs ``bpy``, slow)."""


@dataclass(frozen=True, eq=False)
class RoomModel:
    """A furnished room before any camera looks at it."""

    spec: RoomSpec
    grammar: str
    shell: Shell
    placed: list[Placed]
    region: Array
    """Walkable cells."""
    mesh: Mesh
    lighting: Lighting
    textures: TextureBank
    skipped: dict[str, int]
    cameras: list[Camera] | None = None
    """Fixed views (turntables, blocks, twins); ``None`` = a walk is drawn."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Goes into the scene record."""


def draw_room(spec: RoomSpec) -> RoomModel:
    """Lay out, furnish and light a room (presets ``realistic`` and ``small``).

    Raises:
        RoomGenerationError: No valid room within 20 draws, or an unknown grammar.
    """
    names = grammars_of(spec.split)
    if spec.grammar is not None and spec.grammar not in names:
        raise RoomGenerationError(
            f"grammar {spec.grammar!r} is not one of split {spec.split!r}: {', '.join(names)}."
        )
    small = spec.preset == "small"
    for draw in range(MAX_DRAWS):
        rng = rng_for("room", spec.split, spec.preset, spec.seed, draw)
        grammar = GRAMMARS[spec.grammar or names[int(rng.integers(len(names)))]]
        shell = draw_shell(grammar, rng, spec.preset)
        placer = furnish_small(grammar, shell, rng) if small else furnish(grammar, shell, rng)
        region = paths.walkable_component(shell, placer.placed)
        if region is None or len(placer.placed) < (3 if small else 12):
            continue
        return finish_model(
            spec,
            grammar.name,
            shell,
            placer.placed,
            region,
            skipped=dict(sorted(placer.skipped.items())),
        )
    raise RoomGenerationError(
        f"no valid room for seed {spec.seed} ({spec.split}, {spec.preset}) within {MAX_DRAWS} draws. "
        "Use another seed."
    )


def finish_model(
    spec: RoomSpec,
    grammar: str,
    shell: Shell,
    placed: list[Placed],
    region: Array,
    *,
    skipped: dict[str, int] | None = None,
    cameras: list[Camera] | None = None,
    extra: dict[str, Any] | None = None,
) -> RoomModel:
    """Give a layout its surfaces and lights. Twins of a room look the same where nothing changed."""
    mesh = build_mesh(
        shell, placed, (spec.split, spec.preset, spec.seed), plain=spec.preset != "realistic"
    )
    look = rng_for("look", spec.split, spec.preset, spec.seed)
    seeds = TEXTURE_SEEDS[spec.split]
    textures = texture_bank(seeds[int(look.integers(len(seeds)))])
    lighting = draw_lighting(shell, placed, mesh, look)
    return RoomModel(
        spec,
        grammar,
        shell,
        placed,
        region,
        mesh,
        lighting,
        textures,
        skipped or {},
        cameras,
        extra or {},
    )


@dataclass(frozen=True, eq=False)
class Picture:
    """One rendered frame."""

    camera: Camera
    rgb: npt.NDArray[np.uint8]
    raster: Raster


def render_view(model: RoomModel, camera: Camera, *, ssaa: int = 1, noise_seed: int = 0) -> Picture:
    """Render one view; depth and ids are exact at the pixel centres whatever ``ssaa`` is."""
    raster = rasterise(model.mesh, camera)
    if ssaa == 1:
        rgb = shade(raster, model.mesh, camera, model.lighting, model.textures, noise_seed)
        return Picture(camera, rgb, raster)
    fine_camera = camera.resized(camera.width * ssaa, camera.height * ssaa)
    fine = shade(
        rasterise(model.mesh, fine_camera),
        model.mesh,
        fine_camera,
        model.lighting,
        model.textures,
        noise_seed,
    )
    blocks = fine.reshape(camera.height, ssaa, camera.width, ssaa, 3).astype(np.uint16)
    rgb = ((blocks.sum(axis=(1, 3)) + ssaa * ssaa // 2) // (ssaa * ssaa)).astype(np.uint8)
    return Picture(camera, rgb, raster)


def draw_cameras(model: RoomModel, config: RenderConfig) -> list[Camera]:
    """The camera walk of a room, or its fixed views."""
    spec = model.spec
    if model.cameras is not None:
        return [camera.resized(config.width, config.height) for camera in model.cameras]
    rng = rng_for("walk", spec.split, spec.preset, spec.seed, config.num_frames)
    return paths.draw_walk(
        model.shell,
        model.placed,
        model.region,
        rng,
        num_frames=config.num_frames,
        width=config.width,
        height=config.height,
        view=paths.SMALL if spec.preset == "small" else paths.REALISTIC,
    )
