"""From a seed to files: scene record, pictures, depth, instance maps.

spec = RoomSpec(seed=0, split="train", preset="small")
scene = write_room(spec, Path("data/rooms"), RenderConfig(num_frames=8, width=128, height=128))
"""

import hashlib
import io
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from spatialvlm.scenes.io import save_scene, write_atomic
from spatialvlm.scenes.render.blender import CyclesRenderer
from spatialvlm.scenes.render.raster import rasterise
from spatialvlm.scenes.rooms import paths
from spatialvlm.scenes.rooms.appearance import COLORS
from spatialvlm.scenes.rooms.blocks import cell_visibility, draw_blocks
from spatialvlm.scenes.rooms.model import (
    Picture,
    RenderConfig,
    RoomModel,
    RoomSpec,
    draw_cameras,
    draw_room,
    render_view,
)
from spatialvlm.scenes.rooms.placement import Placed
from spatialvlm.scenes.rooms.turntable import draw_turntable
from spatialvlm.scenes.rooms.twins import draw_twin
from spatialvlm.scenes.schema import Frame, Object, Room, Scene
from spatialvlm.scenes.visibility import frame_visibility

__all__ = [
    "RenderConfig",
    "RoomSpec",
    "build_room",
    "draw_cameras",
    "draw_model",
    "draw_room",
    "is_written",
    "make_scene",
    "render_view",
    "write_room",
]

CODE_VERSION = "rooms/2"
"""Changes whenever the same spec would give another room or another picture."""
LICENSE = "Apache-2.0"


def make_objects(placed: list[Placed]) -> list[Object]:
    """Schema records of the furniture."""
    return [
        Object(
            index=index,
            id=item.name,
            label=item.label,
            raw_label=item.label,
            label_source="rooms",
            center=item.box.center,
            size=item.box.size,
            R=item.box.rotation,
            has_front=item.piece.archetype.has_front,
            symmetry=item.piece.archetype.symmetry,
            color_name=item.piece.color_name,
            support_parent=item.parent,
            box_quality="exact",
        )
        for index, item in enumerate(placed)
    ]


def make_scene(
    model: RoomModel, pictures: list[Picture], config: RenderConfig, *, stored: bool
) -> Scene:
    """Scene record with the visibility of every frame; media paths only when they are ``stored``."""
    spec = model.spec
    objects = make_objects(model.placed)
    boxes = [item.box for item in objects]
    frames = []
    for index, picture in enumerate(pictures):
        name = f"{index:05d}"
        frames.append(
            Frame(
                frame_id=name,
                rgb=f"rgb/{name}.jpg" if stored else None,
                width=config.width,
                height=config.height,
                intrinsics=picture.camera.intrinsics,
                world_from_cam=picture.camera.world_from_cam,
                time_s=index * paths.FRAME_S,
                depth=f"depth/{name}.png" if stored and config.depth else None,
                instance_map=f"instance/{name}.png" if stored else None,
                visible=frame_visibility(
                    boxes, picture.camera, picture.raster.depth, picture.raster.ids
                ),
                extra=cell_visibility(model, picture) if spec.preset == "blocks" else {},
            )
        )
    return Scene(
        scene_id=f"rooms/{spec.name}",
        room_id=f"rooms/{spec.room_name}",
        source="rooms",
        split=spec.split,
        objects=objects,
        frames=frames,
        license=LICENSE,
        room=Room(
            polygon_xy=list(model.shell.polygon),
            floor_z=0.0,
            ceil_z=model.shell.ceiling,
            area_m2=model.shell.area,
            area_method="polygon",
        ),
        extra={
            "grammar": model.grammar,
            "preset": spec.preset,
            "seed": spec.seed,
            "skipped": model.skipped,
            "key": cache_key(spec, config),
            **model.extra,
        },
    )


def draw_model(spec: RoomSpec, config: RenderConfig) -> RoomModel:
    """Room, turntable, block stack or twin, by preset and ``spec.twin``."""
    if spec.preset == "turntable":
        return draw_turntable(spec)
    if spec.preset == "blocks":
        return draw_blocks(spec)
    return draw_twin(spec, config) if spec.twin else draw_room(spec)


def build_room(spec: RoomSpec, config: RenderConfig | None = None) -> Scene:
    """Build and look at a room without writing anything: exact boxes, cameras and visibility."""
    config = config or RenderConfig()
    model = draw_model(spec, config)
    black = np.zeros((config.height, config.width, 3), dtype=np.uint8)
    pictures = [
        Picture(camera, black, rasterise(model.mesh, camera))
        for camera in draw_cameras(model, config)
    ]
    return make_scene(model, pictures, config, stored=False)


def cache_key(spec: RoomSpec, config: RenderConfig) -> str:
    """Hash of everything that decides the files of a room."""
    settings = asdict(config)
    if config.renderer == "numpy":
        del settings["renderer"]  # keys from before there was a choice stay valid
    text = json.dumps([CODE_VERSION, asdict(spec), settings, COLORS], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def is_written(spec: RoomSpec, folder: Path, config: RenderConfig) -> bool:
    """Whether ``folder`` already holds this room, complete and with these settings."""
    path = folder / spec.name / "scene.json"
    if not path.is_file():
        return False
    try:
        stored: bool = json.loads(path.read_text())["extra"]["key"] == cache_key(spec, config)
    except (json.JSONDecodeError, KeyError, TypeError):
        return False
    return stored


def write_room(spec: RoomSpec, folder: Path, config: RenderConfig) -> Scene:
    """Render a room to ``<folder>/<split>-<seed>/{scene.json, rgb/, instance/, depth/}``.

    ``scene.json`` is written last and atomically: a folder with it is complete.
    """
    model = draw_model(spec, config)
    target = folder / spec.name
    pictures = []
    cycles = None
    if config.renderer == "cycles":
        cycles = CyclesRenderer(model.mesh, model.lighting, model.textures)
    for index, camera in enumerate(draw_cameras(model, config)):
        if cycles is not None:
            picture = Picture(camera, cycles.rgb(camera), rasterise(model.mesh, camera))
        else:
            noise_seed = spec.seed * 1000 + index
            picture = render_view(model, camera, ssaa=config.ssaa, noise_seed=noise_seed)
        pictures.append(picture)
        _write_picture(target, f"{index:05d}", picture, config)
    scene = make_scene(model, pictures, config, stored=True)
    save_scene(scene, target)
    return replace(scene, root=target)


def _write_picture(target: Path, name: str, picture: Picture, config: RenderConfig) -> None:
    images: list[tuple[str, npt.NDArray[Any], dict[str, Any]]] = [
        (f"rgb/{name}.jpg", picture.rgb, {"format": "JPEG", "quality": config.jpeg_quality}),
        (f"instance/{name}.png", picture.raster.ids, {"format": "PNG", "compress_level": 3}),
    ]
    if config.depth:
        millimetres = np.round(picture.raster.depth * 1000).astype(np.uint16)
        images.append((f"depth/{name}.png", millimetres, {"format": "PNG", "compress_level": 1}))
    for relative, pixels, options in images:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, **options)
        path = target / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, buffer.getvalue())
