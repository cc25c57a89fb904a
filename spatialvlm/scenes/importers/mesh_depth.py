"""Depth for frames that have none, cast from the mesh of the scan (extra ``scenes``: embreex)."""

from dataclasses import replace

import numpy as np
from PIL import Image

from spatialvlm.errors import ImporterError
from spatialvlm.scenes.importers.common import ImportOptions, ImportReport
from spatialvlm.scenes.ply import read_mesh
from spatialvlm.scenes.render.embree import EmbreeCaster
from spatialvlm.scenes.schema import Scene
from spatialvlm.scenes.transforms import Array, transform_points


def add_mesh_depth(
    scene: Scene,
    options: ImportOptions,
    report: ImportReport,
    *,
    world_from_mesh: Array | None = None,
) -> Scene:
    """Store what the mesh shows as the depth of every frame without one; asked for by ``options``.

    Args:
        scene: With ``root`` and ``mesh`` set.
        options: ``mesh_depth`` switches this on; ``media`` is where the images go.
        report: Counts the frames.
        world_from_mesh: ``[4, 4]`` alignment of the scan; the identity when ``None``.

    Raises:
        ImporterError: No mesh, or no folder for the images.
        BackendUnavailableError: embreex is not installed.
    """
    missing = [frame for frame in scene.frames if frame.depth is None]
    if not options.mesh_depth or not missing:
        return scene
    if scene.mesh is None or not scene.path(scene.mesh).is_file() or options.media is None:
        raise ImporterError(
            f"{scene.scene_id}: depth from the mesh needs the mesh of the scan and a folder for images."
        )
    vertices, triangles = read_mesh(scene.path(scene.mesh))
    if world_from_mesh is not None:
        vertices = transform_points(world_from_mesh, vertices)
    caster = EmbreeCaster(
        vertices[triangles], np.arange(len(triangles)), np.zeros(len(triangles), np.uint16)
    )
    folder = (options.media / scene.scene_id / "mesh_depth").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    frames = []
    for frame in scene.frames:
        if frame.depth is not None:
            frames.append(frame)
            continue
        depth = caster.cast(frame.camera).depth
        path = folder / f"{frame.frame_id}.png"
        millimetres = np.round(depth * 1000).clip(0, 65_535).astype(np.uint16)
        Image.fromarray(millimetres).save(path)
        frames.append(replace(frame, depth=str(path), depth_scale=1000.0, depth_kind="z"))
    report.count("mesh_depth", len(missing))
    return replace(scene, frames=frames)
