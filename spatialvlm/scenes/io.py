"""Read and write scenes (JSON: one scene, parquet: many) and the images that belong to them."""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from spatialvlm.errors import SceneSchemaError
from spatialvlm.scenes.schema import SCHEMA, Frame, Scene
from spatialvlm.scenes.transforms import Array

MAX_PIXELS = 100_000_000
"""Images with more pixels are refused before decoding."""
MAX_JSON_BYTES = 512 * 2**20


def save_scene(scene: Scene, path: str | Path) -> Path:
    """Write ``scene`` as JSON, atomically.

    Args:
        scene: The scene; validated first.
        path: A ``.json`` file, or a folder that gets ``scene.json``.

    Returns:
        The written file.
    """
    scene.validate()
    path = Path(path)
    if path.suffix != ".json":
        path = path / "scene.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(scene.to_dict(), separators=(",", ":"), allow_nan=False)
    write_atomic(path, text.encode())
    return path


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` under a temporary name and move it into place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


def load_scene(path: str | Path) -> Scene:
    """Read and validate one scene.

    Args:
        path: ``scene.json`` or the folder that holds it. Media paths are relative to that folder.

    Raises:
        SceneSchemaError: The file is missing, not JSON, of another schema version, or invalid.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "scene.json"
    if not path.is_file():
        raise SceneSchemaError(f"{path}: no such scene file.")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise SceneSchemaError(f"{path}: larger than {MAX_JSON_BYTES} bytes; use parquet.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SceneSchemaError(f"{path}: not a JSON file: {error}.") from error
    return scene_from_dict(values, root=path.parent, where=str(path))


def scene_from_dict(values: Any, *, root: Path | None, where: str) -> Scene:
    """Build and validate a scene from its dictionary form; errors begin with ``where``."""
    if not isinstance(values, dict):
        raise SceneSchemaError(f"{where}: expected an object, got {type(values).__name__}.")
    if values.get("schema") != SCHEMA:
        raise SceneSchemaError(
            f"{where}: schema is {values.get('schema')!r}, this version reads {SCHEMA!r}. "
            "Import or render the scene again."
        )
    scene = replace(Scene.from_dict(values, where), root=root)
    scene.validate()
    return scene


def iter_scenes(folder: str | Path) -> Iterator[Scene]:
    """Scenes below ``folder`` in the order of their paths: ``**/scene.json`` and ``*.parquet``."""
    for path in scene_files(folder):
        if path.suffix == ".parquet":
            yield from read_scenes_parquet(path)
        else:
            yield load_scene(path)


def scene_files(folder: str | Path) -> list[Path]:
    """Sorted scene files below ``folder``.

    Raises:
        SceneSchemaError: There is no scene.
    """
    folder = Path(folder)
    if folder.is_file():
        return [folder]
    files = sorted(folder.glob("**/scene.json")) + sorted(folder.glob("*.parquet"))
    if not files:
        raise SceneSchemaError(f"{folder}: no scene.json and no parquet file below this folder.")
    return files


def write_scenes_parquet(scenes: Iterable[Scene], path: str | Path) -> None:
    """Write many scenes to one parquet file: identifying columns and the record as JSON."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = []
    for scene in scenes:
        scene.validate()
        rows.append(
            {
                "scene_id": scene.scene_id,
                "room_id": scene.room_id,
                "source": scene.source,
                "split": scene.split,
                "root": str(scene.root or ""),
                "scene": json.dumps(scene.to_dict(), separators=(",", ":"), allow_nan=False),
            }
        )
    columns = ("scene_id", "room_id", "source", "split", "root", "scene")
    table = pa.table({name: pa.array([row[name] for row in rows], pa.string()) for name in columns})
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    pq.write_table(table, temporary, compression="zstd")
    temporary.replace(path)


def read_scenes_parquet(path: str | Path) -> Iterator[Scene]:
    """Scenes of a file written by :func:`write_scenes_parquet`.

    Raises:
        SceneSchemaError: The file is truncated or has other columns.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        for batch in file.iter_batches(batch_size=16, columns=["root", "scene"]):
            for row in batch.to_pylist():
                root = Path(row["root"]) if row["root"] else Path(path).parent
                yield scene_from_dict(json.loads(row["scene"]), root=root, where=str(path))
    except (pa.ArrowInvalid, pa.ArrowKeyError, OSError, KeyError) as error:
        raise SceneSchemaError(f"{path}: not a readable scene parquet file: {error}.") from error


def _open(path: Path) -> Image.Image:
    try:
        image = Image.open(path)
    except FileNotFoundError as error:
        raise SceneSchemaError(f"{path}: no such image.") from error
    except (UnidentifiedImageError, OSError) as error:
        raise SceneSchemaError(f"{path}: not a readable image: {error}.") from error
    if image.width * image.height > MAX_PIXELS:
        raise SceneSchemaError(
            f"{path}: {image.width}x{image.height} exceeds the limit of {MAX_PIXELS} pixels."
        )
    return image


def _pixels(path: Path, mode: str | None = None) -> Array:
    image = _open(path)
    try:
        return np.asarray(image if mode is None else image.convert(mode))
    except OSError as error:
        raise SceneSchemaError(f"{path}: the image is truncated: {error}.") from error


def load_rgb(scene: Scene, frame: Frame) -> npt.NDArray[np.uint8]:
    """Colour image ``[H, W, 3]``."""
    if frame.rgb is None:
        raise SceneSchemaError(f"{scene.scene_id}, frame {frame.frame_id}: has no colour image.")
    path = scene.path(frame.rgb)
    return _pixels(path, "RGB")


def load_depth(scene: Scene, frame: Frame) -> npt.NDArray[np.float32]:
    """Z-depth ``[H, W]`` in metres at the resolution of the colour image; 0 = unknown.

    Raises:
        SceneSchemaError: Another aspect ratio, all zero, or a median that hints at a wrong scale.
    """
    from spatialvlm.scenes.cameras import ray_to_z_depth

    if frame.depth is None:
        raise SceneSchemaError(f"{scene.scene_id}, frame {frame.frame_id}: has no depth.")
    path = scene.path(frame.depth)
    depth = _pixels(path).astype(np.float32) / frame.depth_scale
    where = f"{scene.scene_id}, frame {frame.frame_id}"
    aspect = (depth.shape[1] / depth.shape[0]) / (frame.width / frame.height)
    if abs(aspect - 1) > 0.01:
        raise SceneSchemaError(
            f"{where}: depth is {depth.shape[1]}x{depth.shape[0]} but the image is "
            f"{frame.width}x{frame.height}; the aspect ratios differ by more than 1 %."
        )
    check_depth_scale(depth, where)
    if depth.shape != (frame.height, frame.width):
        rows = ((np.arange(frame.height) + 0.5) * depth.shape[0] / frame.height).astype(int)
        columns = ((np.arange(frame.width) + 0.5) * depth.shape[1] / frame.width).astype(int)
        depth = depth[rows[:, None], columns[None]]
    if frame.depth_kind == "ray":
        depth = ray_to_z_depth(depth, frame.intrinsics).astype(np.float32)
    return depth


def check_depth_scale(depth: Array, where: str) -> None:
    """Refuse depth that is empty or in the wrong unit.

    Raises:
        SceneSchemaError: No valid pixel, or a median above 100 m or below 0.05 m.
    """
    valid = depth[np.isfinite(depth) & (depth > 0)]
    median = float(np.median(valid)) if valid.size else 0.0
    if not 0.05 <= median <= 100.0:
        raise SceneSchemaError(
            f"{where}: depth_scale? {valid.size} valid pixels with median {median:.4g} m. "
            "Stored value / depth_scale must be metres."
        )


def load_instances(scene: Scene, frame: Frame) -> npt.NDArray[np.uint16]:
    """Instance map ``[H, W]``: object index + 1, 0 = no object.

    Raises:
        SceneSchemaError: Wrong size, 8 bits with more than 255 objects, or an id without object.
    """
    if frame.instance_map is None:
        raise SceneSchemaError(f"{scene.scene_id}, frame {frame.frame_id}: has no instance map.")
    path = scene.path(frame.instance_map)
    ids = _pixels(path)
    if ids.ndim != 2 or ids.shape != (frame.height, frame.width):
        raise SceneSchemaError(
            f"{path}: instance map has shape {ids.shape}, the image is "
            f"{(frame.height, frame.width)} (height, width)."
        )
    if ids.dtype == np.uint8 and len(scene.objects) > 254:
        raise SceneSchemaError(
            f"{path}: 8-bit instance map cannot hold {len(scene.objects)} objects; store 16 bits."
        )
    if ids.size and int(ids.max()) > len(scene.objects):
        raise SceneSchemaError(
            f"{path}: instance id {int(ids.max())} exceeds the number of objects "
            f"({len(scene.objects)}); ids are object index + 1."
        )
    return ids.astype(np.uint16)
