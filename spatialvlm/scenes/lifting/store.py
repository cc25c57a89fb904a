"""Lifted scenes on disk: pictures, depth, instance maps and the scene record."""

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from spatialvlm.scenes.io import save_scene, write_atomic
from spatialvlm.scenes.lifting.lift import Lifted
from spatialvlm.scenes.schema import Scene

MAX_STORED = 65_535
MAX_DEPTH_M = 65.535
"""Farther pixels (sky, infinity) are stored as unknown, so that near ones keep steps of 1 mm."""
FAR = 10.0
"""The same limit for scenes without a unit, as a multiple of the median depth."""


def write_lifted(lifted: Lifted, folder: Path) -> Scene:
    """Write ``<folder>/<scene_id>/{scene.json, rgb, depth, instance}``; the record comes last.

    Depth is stored with 16 bits: steps of 1 mm up to :data:`MAX_DEPTH_M`, in scenes without a unit equal steps
    up to :data:`FAR` times the median. What is farther, infinite or not a number becomes 0 (unknown).
    """
    target = folder / lifted.scene.scene_id
    scale = MAX_STORED / (MAX_DEPTH_M if lifted.scene.metric else FAR * _median(lifted.depths))
    frames = []
    for frame, image, depth, ids in zip(
        lifted.scene.frames, lifted.images, lifted.depths, lifted.instances, strict=True
    ):
        name = frame.frame_id
        steps = np.round(np.nan_to_num(depth, nan=0.0, posinf=0.0, neginf=0.0) * scale)
        stored = np.where((steps > 0) & (steps <= MAX_STORED), steps, 0).astype(np.uint16)
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


def _median(depths: Sequence[npt.NDArray[np.float32]]) -> float:
    """Median of all known depths; 1 when there is none."""
    known = np.concatenate([depth[np.isfinite(depth) & (depth > 0)] for depth in depths])
    return float(np.median(known)) if known.size else 1.0


def _write(path: Path, image: Image.Image, **options: int) -> None:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG" if path.suffix == ".jpg" else "PNG", **options)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, buffer.getvalue())
