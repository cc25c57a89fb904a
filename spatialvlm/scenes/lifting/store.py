"""Lifted scenes on disk: pictures, depth, instance maps and the scene record."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from spatialvlm.scenes.io import save_scene, write_atomic
from spatialvlm.scenes.lifting.lift import Lifted
from spatialvlm.scenes.schema import Scene

MAX_STORED = 65_535


def write_lifted(lifted: Lifted, folder: Path) -> Scene:
    """Write ``<folder>/<scene_id>/{scene.json, rgb, depth, instance}``; the record comes last.

    Depth is stored with 16 bits at the finest scale that holds the farthest pixel, at most 1/1000.
    """
    target = folder / lifted.scene.scene_id
    farthest = max(float(depth.max()) for depth in lifted.depths)
    scale = min(1000.0, MAX_STORED / max(farthest, 1e-6))
    frames = []
    for frame, image, depth, ids in zip(
        lifted.scene.frames, lifted.images, lifted.depths, lifted.instances, strict=True
    ):
        name = frame.frame_id
        stored = np.round(np.nan_to_num(depth) * scale).clip(0, MAX_STORED).astype(np.uint16)
        _write(target / "rgb" / f"{name}.jpg", Image.fromarray(image), quality=95)
        _write(target / "depth" / f"{name}.png", Image.fromarray(stored))
        _write(target / "instance" / f"{name}.png", Image.fromarray(ids))
        frames.append(
            replace(
                frame,
                rgb=f"rgb/{name}.jpg",
                depth=f"depth/{name}.png",
                depth_scale=scale,
                instance_map=f"instance/{name}.png",
            )
        )
    scene = replace(lifted.scene, frames=frames, root=target)
    save_scene(scene, target)
    return scene


def _write(path: Path, image: Image.Image, **options: int) -> None:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG" if path.suffix == ".jpg" else "PNG", **options)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, buffer.getvalue())
