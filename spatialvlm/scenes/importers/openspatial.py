"""Scene rows in OpenSpatial's column names (arXiv 2604.07296), both ways.

Columns: ``image`` (list of paths), ``depth_map``, ``pose`` (camera to world, 4x4 each), ``intrinsic``,
``obj_tags``, ``bboxes_3d_world_coords`` (nine numbers each), ``depth_scale``, ``is_metric_depth``,
``scene_id`` and optionally ``axis_align_matrix``. A scalar ``depth_scale`` or a single ``intrinsic`` holds
for all views. The nine numbers follow EmbodiedScan's convention unless ``convention="openspatial"``.
Paths are relative to the folder of the parquet file.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from spatialvlm.errors import ImporterError
from spatialvlm.scenes.blacklist import room_of
from spatialvlm.scenes.codecs import box_codec
from spatialvlm.scenes.importers.common import (
    FrameList,
    ImportOptions,
    ImportReport,
    ObjectList,
    choose_frames,
    measure_visibility,
    stored_size,
)
from spatialvlm.scenes.schema import SOURCES, Scene

Convention = Literal["embodiedscan_zxy", "openspatial"]
REQUIRED = ("image", "pose", "intrinsic", "obj_tags", "bboxes_3d_world_coords", "scene_id")


def list_scenes(root: Path) -> list[str]:
    """``<file>::<row>`` of every row of the parquet files in ``root``.

    Raises:
        ImporterError: A file is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = []
    for path in sorted(root.glob("*.parquet")):
        try:
            count = pq.read_metadata(path).num_rows
        except (pa.ArrowInvalid, OSError) as error:
            raise ImporterError(f"{path}: not a readable parquet file: {error}.") from error
        names += [f"{path.name}::{row}" for row in range(count)]
    return names


def read_scene(root: Path, name: str, options: ImportOptions, report: ImportReport) -> Scene:
    """One row by the name that :func:`list_scenes` gave, read in EmbodiedScan's convention.

    Raises:
        ImporterError: The file is damaged, or a column is missing or of another length.
    """
    file, _, row = name.partition("::")
    return from_columns(_rows(root / file)[int(row)], root, options, report)


def iter_scenes(root: Path, options: ImportOptions, report: ImportReport) -> Iterator[Scene]:
    """All rows of the parquet files in ``root``."""
    for name in list_scenes(root):
        yield read_scene(root, name, options, report)


@lru_cache(maxsize=1)
def _rows(path: Path) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise ImporterError(f"{path}: not a readable parquet file: {error}.") from error
    return rows


def write_rows(scenes: Iterable[Scene], path: Path) -> None:
    """Write scenes with stored images as rows of OpenSpatial's columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([to_columns(scene) for scene in scenes]), path)


def from_columns(
    row: Mapping[str, Any],
    root: Path,
    options: ImportOptions,
    report: ImportReport,
    *,
    convention: Convention = "embodiedscan_zxy",
) -> Scene:
    """Scene of one row; a row with one image may hold plain values instead of lists.

    Raises:
        ImporterError: A column is missing or its length does not fit the number of images.
    """
    missing = [name for name in REQUIRED if name not in row]
    if missing:
        raise ImporterError(f"{root}: column {missing[0]!r} is missing.")
    single = isinstance(row["image"], str)
    images = [row["image"]] if single else list(row["image"])
    count = len(images)

    def per_view(name: str, default: Any, dimensions: int) -> list[Any]:
        """One value per view; a value of fewer dimensions than a list of them holds for all."""
        value = row.get(name)
        if value is None:
            return [default] * count
        if np.ndim(value) <= dimensions:
            return [value] * count
        if len(value) != count:
            raise ImporterError(
                f"{row['scene_id']}: {name} has {len(value)} entries for {count} images."
            )
        return list(value)

    native = str(row["scene_id"])
    source = native.split("/")[0] if native.split("/")[0] in SOURCES else "lifted"
    scene_id = native if native.startswith(f"{source}/") else f"{source}/{native}"
    align = np.asarray(
        row.get("axis_align_matrix") if row.get("axis_align_matrix") is not None else np.eye(4)
    )
    codec = box_codec(convention)
    objects = ObjectList(report)
    for index, (label, values) in enumerate(
        zip(row["obj_tags"], row["bboxes_3d_world_coords"], strict=True)
    ):
        numbers = [float(v) for v in values]
        if not codec.angles_in_range(numbers):
            report.count("angle_range")
        rotation = codec.decode([0, 0, 0, 1, 1, 1, *np.nan_to_num(numbers[6:9])]).rotation
        objects.add(
            (numbers[:3], numbers[3:6], rotation),
            label,
            native_id=str(index),
            label_source="openspatial",
        )
    poses, intrinsics = per_view("pose", None, 2), per_view("intrinsic", None, 2)
    depths, scales = per_view("depth_map", None, 0), per_view("depth_scale", 1000.0, 0)
    frames = FrameList(report)
    for index in choose_frames(count, options.num_frames):
        size = stored_size(root / images[index], report)
        if size is None:
            continue
        frames.add(
            f"{index:05d}",
            intrinsics=intrinsics[index],
            world_from_cam=align @ np.asarray(poses[index], dtype=np.float64),
            width=size[0],
            height=size[1],
            rgb=images[index],
            depth=depths[index],
            depth_scale=float(scales[index]),
        )
    scene = Scene(
        scene_id=scene_id,
        room_id=room_of(scene_id),
        source=source,
        objects=objects.finish(),
        frames=frames.finish(scene_id),
        metric=bool(row.get("is_metric_depth", True)),
        root=root,
    )
    return measure_visibility(scene, report, occupancy=options.occupancy)


def to_columns(scene: Scene, *, convention: Convention = "embodiedscan_zxy") -> dict[str, Any]:
    """Row of a scene with stored images, in the same columns."""
    codec = box_codec(convention)
    return {
        "scene_id": scene.scene_id,
        "image": [frame.rgb for frame in scene.frames],
        "depth_map": [frame.depth for frame in scene.frames],
        "depth_scale": [frame.depth_scale for frame in scene.frames],
        "is_metric_depth": scene.metric,
        "pose": [frame.world_from_cam.tolist() for frame in scene.frames],
        "intrinsic": [frame.intrinsics.tolist() for frame in scene.frames],
        "obj_tags": [item.label for item in scene.objects],
        "bboxes_3d_world_coords": [codec.encode(item.box) for item in scene.objects],
        "axis_align_matrix": np.eye(4).tolist(),
    }
