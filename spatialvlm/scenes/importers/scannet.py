"""ScanNet v2 scans (Dai et al., CVPR 2017): ``.sens`` or exported folders, boxes from segmentations.

Expected below the root: ``scans/<scene>/`` (or ``<scene>/``) with ``<scene>.txt`` (axisAlignment),
``<scene>_vh_clean_2.ply``, ``<scene>.aggregation.json``, ``<scene>_vh_clean_2.0.010000.segs.json`` and
either ``<scene>.sens`` or ``color/ depth/ pose/ intrinsic/``. ``scannetv2-labels.combined.tsv`` at the
root translates raw labels. Pixel centres are integers there, so 0.5 is added to the principal point.
"""

import csv
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from spatialvlm.errors import BoxError, ImporterError
from spatialvlm.scenes.areas import room_of_points
from spatialvlm.scenes.blacklist import room_of
from spatialvlm.scenes.importers.common import (
    FrameList,
    ImportOptions,
    ImportReport,
    ObjectList,
    choose_frames,
    measure_visibility,
    official_split,
    stored_size,
)
from spatialvlm.scenes.importers.mesh_depth import add_mesh_depth
from spatialvlm.scenes.importers.sens import SensReader
from spatialvlm.scenes.obb_fit import fit_upright_box
from spatialvlm.scenes.ply import read_vertices
from spatialvlm.scenes.schema import Frame, Object, Scene
from spatialvlm.scenes.transforms import Array, transform_points

LICENSE = "ScanNet-TOU"
LABEL_FILE = "scannetv2-labels.combined.tsv"


def list_scenes(root: Path) -> list[str]:
    """Scan folders, relative to ``root``."""
    found = [*root.glob("scans/scene*_*"), *root.glob("scene*_*")]
    return sorted(str(path.relative_to(root)) for path in found if path.is_dir())


def iter_scenes(root: Path, options: ImportOptions, report: ImportReport) -> Iterator[Scene]:
    """All scans below ``root``."""
    for name in list_scenes(root):
        yield read_scene(root, name, options, report)


def read_scene(root: Path, name: str, options: ImportOptions, report: ImportReport) -> Scene:
    """One scan by the name that :func:`list_scenes` gave.

    Raises:
        ImporterError: A file is missing, truncated or of another format.
    """
    folder = root / name
    native = folder.name
    scene_id = f"scannet/{native}"
    align = _axis_alignment(folder / f"{native}.txt")
    vertices = transform_points(align, read_vertices(folder / f"{native}_vh_clean_2.ply"))
    objects, object_ids = _objects(root, folder, native, vertices, report)
    media = ((options.media or folder.parent / "extracted") / "scannet" / native).resolve()
    frames = _frames(folder, media, align, object_ids, options, report)
    scene = Scene(
        scene_id=scene_id,
        room_id=room_of(scene_id),
        source="scannet",
        objects=objects,
        frames=frames,
        split=official_split(root, scene_id),
        license=LICENSE,
        room=room_of_points(vertices),
        mesh=f"{native}_vh_clean_2.ply",
        root=folder,
    )
    scene = add_mesh_depth(scene, options, report, world_from_mesh=align)
    return measure_visibility(scene, report, occupancy=options.occupancy)


def _axis_alignment(path: Path) -> Array:
    """``axisAlignment`` of the scan's text file; the identity when the file has none."""
    if not path.is_file():
        return np.eye(4)
    for line in path.read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition("=")
        if key.strip() == "axisAlignment":
            numbers = np.array(value.split(), dtype=np.float64)
            if numbers.size != 16:
                raise ImporterError(
                    f"{path}: axisAlignment has {numbers.size} numbers, expected 16."
                )
            return numbers.reshape(4, 4)
    return np.eye(4)


@lru_cache(maxsize=2)
def _label_names(path: Path) -> dict[str, str]:
    """Raw category to NYU40 class, only for the structural classes that hide behind raw names."""
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file, delimiter="\t")
        for column in ("raw_category", "nyu40class"):
            if column not in (reader.fieldnames or ()):
                raise ImporterError(f"{path}: column {column!r} is missing.")
        return {row["raw_category"]: row["nyu40class"] for row in reader}


def _objects(
    root: Path, folder: Path, native: str, vertices: Array, report: ImportReport
) -> tuple[list[Object], list[int]]:
    """Upright boxes of the annotated segment groups, and the dataset's object id of each."""
    groups = _json(folder / f"{native}.aggregation.json")["segGroups"]
    segments = np.asarray(_json(folder / f"{native}_vh_clean_2.0.010000.segs.json")["segIndices"])
    if len(segments) != len(vertices):
        raise ImporterError(
            f"{folder}: {len(segments)} segment indices for {len(vertices)} vertices."
        )
    names = _label_names(root / LABEL_FILE)
    collected = ObjectList(report)
    for group in groups:
        points = vertices[np.isin(segments, group["segments"])]
        try:
            box = fit_upright_box(points, clean=False)
        except BoxError:
            report.count("bad_box")
            continue
        raw = str(group["label"])
        structural = names.get(raw) in ("wall", "floor", "ceiling")
        collected.add(
            (box.center, box.size, box.rotation),
            names[raw] if structural else raw,
            native_id=str(group["objectId"]),
            label_source="scannet",
            extra={"raw_label": raw, "nyu40": names.get(raw)},
        )
    finished = collected.finish()
    return finished, [int(item.id.split("-")[0]) for item in finished]


def _json(path: Path) -> dict[str, list[dict[str, list[int]]]]:
    try:
        loaded: dict[str, list[dict[str, list[int]]]] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ImporterError(f"{path}: missing. Download the annotations of this scan.") from error
    except json.JSONDecodeError as error:
        raise ImporterError(f"{path}: not JSON at offset {error.pos}: {error.msg}.") from error
    return loaded


def _frames(
    folder: Path,
    media: Path,
    align: Array,
    object_ids: list[int],
    options: ImportOptions,
    report: ImportReport,
) -> list[Frame]:
    """Frames of whichever form the scan has; extracted pictures go to ``media``."""
    sens = folder / f"{folder.name}.sens"
    if sens.is_file():
        return _sens_frames(sens, media, align, options, report)
    if not (folder / "pose").is_dir():
        raise ImporterError(f"{folder}: neither {sens.name} nor exported color/, depth/, pose/.")
    return _exported_frames(folder, media, align, object_ids, options, report)


def _sens_frames(
    path: Path, media: Path, align: Array, options: ImportOptions, report: ImportReport
) -> list[Frame]:
    """Extract the chosen frames of a ``.sens`` file; frames without a pose are dropped."""
    frames = FrameList(report)
    with SensReader(path) as reader:
        chosen = set(choose_frames(reader.num_frames, options.num_frames))
        width, height = reader.color_size
        for frame in reader:
            if frame.index not in chosen:
                continue
            name = f"{frame.index:06d}"
            for folder in ("color", "depth"):
                (media / folder).mkdir(parents=True, exist_ok=True)
            (media / "color" / f"{name}.jpg").write_bytes(frame.jpeg)
            depth = Image.fromarray(reader.decode_depth(frame))
            depth.save(media / "depth" / f"{name}.png")
            with np.errstate(invalid="ignore"):
                pose = align @ frame.world_from_cam
            frames.add(
                name,
                intrinsics=_half_pixel(reader.color_intrinsics),
                world_from_cam=pose,
                width=width,
                height=height,
                rgb=str(media / "color" / f"{name}.jpg"),
                depth=str(media / "depth" / f"{name}.png"),
                depth_scale=float(reader.depth_shift),
                time_s=frame.color_time_us / 1e6 if frame.color_time_us else None,
            )
    return frames.finish(f"scannet/{path.stem}")


def _exported_frames(
    folder: Path,
    media: Path,
    align: Array,
    object_ids: list[int],
    options: ImportOptions,
    report: ImportReport,
) -> list[Frame]:
    """Frames that were exported to ``color/ depth/ pose/ intrinsic/``."""
    poses = sorted(folder.glob("pose/*.txt"), key=lambda path: int(path.stem))
    color = np.loadtxt(folder / "intrinsic" / "intrinsic_color.txt")
    frames = FrameList(report)
    for index in choose_frames(len(poses), options.num_frames):
        stem = poses[index].stem
        size = stored_size(folder / "color" / f"{stem}.jpg", report)
        if size is None:
            continue
        try:
            pose = np.loadtxt(poses[index])
        except ValueError as error:
            raise ImporterError(f"{poses[index]}: not a matrix: {error}.") from error
        instance = folder / "instance-filt" / f"{stem}.png"
        depth = folder / "depth" / f"{stem}.png"
        with np.errstate(invalid="ignore"):
            aligned = align @ pose
        frames.add(
            stem,
            intrinsics=_half_pixel(color),
            world_from_cam=aligned,
            width=size[0],
            height=size[1],
            rgb=f"color/{stem}.jpg",
            depth=f"depth/{stem}.png" if depth.is_file() else None,
            instance_map=_instance_map(instance, media, object_ids) if instance.is_file() else None,
        )
    return frames.finish(f"scannet/{folder.name}")


def _instance_map(path: Path, media: Path, object_ids: list[int]) -> str:
    """Translate a 2D instance image (value = objectId + 1) to object index + 1."""
    lookup = np.zeros(65_536, dtype=np.uint16)
    for index, object_id in enumerate(object_ids):
        lookup[object_id + 1] = index + 1
    target = media / "instance" / path.name
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with Image.open(path) as image:
            Image.fromarray(lookup[np.asarray(image)]).save(target)
    except OSError as error:
        raise ImporterError(f"{path}: not a readable instance image: {error}.") from error
    return str(target)


def _half_pixel(intrinsics: Array) -> Array:
    """Move the principal point from integer pixel centres to the half-pixel convention."""
    shifted: Array = np.array(intrinsics[:3, :3], dtype=np.float64)
    shifted[:2, 2] += 0.5
    return shifted
