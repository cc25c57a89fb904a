"""Hypersim (Roberts et al., ICCV 2021): HDF5 images, ray distances, oriented boxes in asset units.

Expected: ``<ai_VVV_NNN>/_detail/metadata_scene.csv``, ``_detail/<cam>/camera_keyframe_*.hdf5``,
``_detail/mesh/metadata_semantic_instance_bounding_box_object_aligned_2d_*.hdf5``,
``images/scene_<cam>_final_hdf5/frame.NNNN.color.hdf5`` and
``images/scene_<cam>_geometry_hdf5/frame.NNNN.{depth_meters,semantic_instance,semantic}.hdf5``.
``depth_meters`` is the distance along the ray. Camera axes are OpenGL. The projection matrices of
``metadata_camera_parameters.csv`` at the root give the focal length; without it the field of view is 60 degrees.
"""

import csv
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from spatialvlm.errors import BackendUnavailableError, ImporterError
from spatialvlm.scenes.blacklist import room_of
from spatialvlm.scenes.cameras import ray_to_z_depth
from spatialvlm.scenes.importers.common import (
    FrameList,
    ImportOptions,
    ImportReport,
    ObjectList,
    choose_frames,
    measure_visibility,
)
from spatialvlm.scenes.schema import Frame, Object, Scene
from spatialvlm.scenes.transforms import Array, rigid

LICENSE = "Hypersim-CC-BY-SA-3.0"
DEFAULT_HFOV_RAD = np.pi / 3
TONE_PERCENTILE, TONE_TARGET, GAMMA = 90.0, 0.8, 1 / 2.2
BOX_FILE = "metadata_semantic_instance_bounding_box_object_aligned_2d_{}.hdf5"
# NYU40 classes by id; Hypersim stores ids only.
NYU40 = (
    "", "wall", "floor", "cabinet", "bed", "chair", "sofa", "table", "door", "window", "bookshelf", "picture",
    "counter", "blinds", "desk", "shelves", "curtain", "dresser", "pillow", "mirror", "floor mat", "clothes",
    "ceiling", "books", "refrigerator", "television", "paper", "towel", "shower curtain", "box", "whiteboard",
    "person", "night stand", "toilet", "sink", "lamp", "bathtub", "bag", "otherstructure", "otherfurniture",
    "otherprop",
)  # fmt: skip


def list_scenes(root: Path) -> list[str]:
    """``<scene>/<camera>`` of every camera trajectory; each is a scene of the same room."""
    found = sorted(root.glob("ai_*/_detail/cam_*/camera_keyframe_positions.hdf5"))
    return [f"{path.parents[2].name}/{path.parent.name}" for path in found]


def iter_scenes(root: Path, options: ImportOptions, report: ImportReport) -> Iterator[Scene]:
    """All trajectories below ``root``."""
    for name in list_scenes(root):
        yield read_scene(root, name, options, report)


def read_scene(root: Path, name: str, options: ImportOptions, report: ImportReport) -> Scene:
    """One trajectory by the name that :func:`list_scenes` gave.

    Raises:
        ImporterError: A file is missing or of another format.
        BackendUnavailableError: h5py is not installed.
    """
    native, _, camera = name.partition("/")
    folder = root / native
    scale = _metres_per_unit(folder / "_detail" / "metadata_scene.csv")
    objects, native_ids = _objects(folder, camera, scale, report)
    media = ((options.media or root / "extracted") / "hypersim" / native / camera).resolve()
    frames = _frames(root, folder, camera, scale, media, native_ids, options, report)
    scene = Scene(
        scene_id=f"hypersim/{name}",
        room_id=room_of(f"hypersim/{native}"),
        source="hypersim",
        objects=objects,
        frames=frames,
        split=_splits(root).get(native, "train"),
        license=LICENSE,
        root=media,
    )
    return measure_visibility(scene, report, occupancy=options.occupancy)


def read_hdf5(path: Path) -> Array:
    """The one dataset of a Hypersim file.

    Raises:
        ImporterError: Missing or damaged.
        BackendUnavailableError: h5py is not installed.
    """
    try:
        import h5py
    except ImportError as error:
        raise BackendUnavailableError("Hypersim needs h5py: pip install -e '.[scenes]'") from error
    try:
        with h5py.File(path, "r") as file:
            values: Array = np.asarray(file["dataset"])
    except (OSError, KeyError) as error:
        raise ImporterError(f"{path}: not a readable Hypersim file: {error}.") from error
    return values


@lru_cache(maxsize=2)
def _splits(root: Path) -> dict[str, str]:
    """Official split of every scene, where its table is there."""
    path = root / "metadata_images_split_scene_v1.csv"
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        for column in ("scene_name", "split_partition_name"):
            if column not in (reader.fieldnames or ()):
                raise ImporterError(f"{path}: column {column!r} is missing.")
        # Pictures that are not released have no split.
        return {
            row["scene_name"]: row["split_partition_name"]
            for row in reader
            if row["split_partition_name"]
        }


def _metres_per_unit(path: Path) -> float:
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row.get("parameter_name") == "meters_per_asset_unit":
                return float(row["parameter_value"])
    raise ImporterError(f"{path}: has no row 'meters_per_asset_unit'.")


def _objects(
    folder: Path, camera: str, scale: float, report: ImportReport
) -> tuple[list[Object], list[int]]:
    """Boxes in metres, and Hypersim's instance id of each object."""
    mesh = folder / "_detail" / "mesh"
    extents, rotations, positions = (
        read_hdf5(mesh / BOX_FILE.format(part)) for part in ("extents", "orientations", "positions")
    )
    labels = _instance_labels(folder, camera)
    objects = ObjectList(report)
    for instance, nyu in sorted(labels.items()):
        if instance >= len(extents):
            report.count("missing_value")
            continue
        objects.add(
            (positions[instance] * scale, extents[instance] * scale, rotations[instance]),
            NYU40[nyu] if 0 < nyu < len(NYU40) else "unknown",
            native_id=str(instance),
            label_source="hypersim",
        )
    finished = objects.finish()
    return finished, [int(item.id.split("-")[0]) for item in finished]


def _instance_labels(folder: Path, camera: str) -> dict[int, int]:
    """NYU40 class of every instance: the most frequent class of its pixels."""
    votes: dict[int, dict[int, int]] = {}
    for path in sorted(
        folder.glob(f"images/scene_{camera}_geometry_hdf5/*.semantic_instance.hdf5")
    ):
        instances = read_hdf5(path).ravel()
        classes = read_hdf5(
            path.with_name(path.name.replace("semantic_instance", "semantic"))
        ).ravel()
        valid = instances >= 0
        pairs, counts = np.unique(
            np.stack([instances[valid], classes[valid]], axis=1), axis=0, return_counts=True
        )
        for (instance, nyu), count in zip(pairs.tolist(), counts.tolist(), strict=True):
            votes.setdefault(instance, {})
            votes[instance][nyu] = votes[instance].get(nyu, 0) + count
    return {
        instance: max(sorted(found), key=lambda n: found[n]) for instance, found in votes.items()
    }


def _projection_focal(root: Path, native: str) -> tuple[float, float] | None:
    """``M_proj_00`` and ``M_proj_11`` of a scene from the table of camera parameters."""
    path = root / "metadata_camera_parameters.csv"
    if not path.is_file():
        return None
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["scene_name"] == native:
                return float(row["M_proj_00"]), float(row["M_proj_11"])
    return None


def tone_map(color: Array, shown: Array) -> Array:
    """8-bit image of linear radiance ``[H, W, 3]``: the 90th percentile of ``shown`` pixels becomes 0.8."""
    brightness = color @ np.array([0.3, 0.59, 0.11])
    level = float(np.percentile(brightness[shown], TONE_PERCENTILE)) if shown.any() else 0.0
    scale = TONE_TARGET ** (1 / GAMMA) / level if level > 1e-4 else 0.0
    image: Array = np.round(255 * np.clip(np.maximum(color, 0) * scale, 0, 1) ** GAMMA).astype(
        np.uint8
    )
    return image


def _frames(
    root: Path,
    folder: Path,
    camera: str,
    scale: float,
    media: Path,
    native_ids: list[int],
    options: ImportOptions,
    report: ImportReport,
) -> list[Frame]:
    detail = folder / "_detail" / camera
    positions, rotations = (
        read_hdf5(detail / f"camera_keyframe_{part}.hdf5") for part in ("positions", "orientations")
    )
    focal = _projection_focal(root, folder.name)
    paths = sorted(folder.glob(f"images/scene_{camera}_final_hdf5/frame.*.color.hdf5"))
    frames = FrameList(report)
    for index in choose_frames(len(paths), options.num_frames):
        number = int(paths[index].name.split(".")[1])
        geometry = folder / "images" / f"scene_{camera}_geometry_hdf5"
        color = np.nan_to_num(read_hdf5(paths[index]).astype(np.float64))
        distance = read_hdf5(geometry / f"frame.{number:04d}.depth_meters.hdf5").astype(np.float64)
        instances = read_hdf5(geometry / f"frame.{number:04d}.semantic_instance.hdf5").astype(int)
        height, width = distance.shape
        if focal is not None:
            fx, fy = focal[0] * (width - 1) / 2, focal[1] * (height - 1) / 2
        else:
            fx = fy = width / 2 / np.tan(DEFAULT_HFOV_RAD / 2)
        k = np.array([[fx, 0, width / 2], [0, fy, height / 2], [0, 0, 1]])
        depth = ray_to_z_depth(np.nan_to_num(distance), k)
        name = f"{number:04d}"
        lookup = np.zeros(max([int(instances.max()), *native_ids, 0]) + 2, dtype=np.uint16)
        for position, native_id in enumerate(native_ids):
            lookup[native_id + 1] = position + 1
        pictures = {
            f"rgb/{name}.jpg": tone_map(color, np.isfinite(distance)),
            f"depth/{name}.png": np.round(np.clip(depth * 1000, 0, 65_535)).astype(np.uint16),
            f"instance/{name}.png": lookup[instances + 1],
        }
        for relative, pixels in pictures.items():
            (media / relative).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(media / relative)
        # Camera looks along -z with y up; world_from_cam in OpenCV axes flips columns 1 and 2.
        rotation = rotations[number] @ np.diag([1.0, -1.0, -1.0])
        frames.add(
            name,
            intrinsics=k,
            world_from_cam=rigid(rotation, positions[number] * scale),
            width=width,
            height=height,
            rgb=f"rgb/{name}.jpg",
            depth=f"depth/{name}.png",
            instance_map=f"instance/{name}.png",
        )
    return frames.finish(f"hypersim/{folder.name}/{camera}")
