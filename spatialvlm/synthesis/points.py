"""Boxes around the visible points only: the point-cloud-centric side of OpenSpatial's ablation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from spatialvlm.errors import SynthesisError
from spatialvlm.scenes.boxes import MIN_SIZE_M
from spatialvlm.scenes.io import load_depth, load_instances
from spatialvlm.scenes.schema import Object, Scene
from spatialvlm.scenes.transforms import Array

MIN_POINTS = 32
MAX_POINTS_PER_FRAME = 2000


def boxes_of_visible_points(scene: Scene) -> Scene:
    """Replace every box by the extent of the object's visible points along the same axes.

    Points come from depth and instance maps of all frames. Objects with fewer than 32 points keep their
    box but are no longer asked about.

    Raises:
        SynthesisError: A frame has no depth or no instance map.
    """
    clouds: dict[int, list[Array]] = {item.index: [] for item in scene.objects}
    for frame in scene.frames:
        if frame.depth is None or frame.instance_map is None:
            raise SynthesisError(
                f"{scene.scene_id}, frame {frame.frame_id}: geometry 'points' needs depth and an "
                "instance map for every frame. Use geometry 'box'."
            )
        depth, ids = load_depth(scene, frame), load_instances(scene, frame)
        for index in np.unique(ids[ids > 0]).tolist():
            rows, columns = np.nonzero((ids == index) & (depth > 0))
            step = max(1, len(rows) // MAX_POINTS_PER_FRAME)
            rows, columns = rows[::step], columns[::step]
            pixels = np.stack([columns + 0.5, rows + 0.5], axis=1)
            points = frame.camera.back_project(pixels, depth[rows, columns].astype(np.float64))
            clouds[index - 1].append(points)
    return replace(scene, objects=[_refit(item, clouds[item.index]) for item in scene.objects])


def _refit(item: Object, clouds: list[Array]) -> Object:
    points = np.concatenate(clouds) if clouds else np.zeros((0, 3))
    if len(points) < MIN_POINTS:
        return replace(item, extra={**item.extra, "excluded": "too few points"})
    local = (points - item.center) @ item.R
    low, high = local.min(axis=0), local.max(axis=0)
    return replace(
        item,
        center=item.center + item.R @ ((low + high) / 2),
        size=np.maximum(high - low, MIN_SIZE_M),
        box_quality="refit",
    )
