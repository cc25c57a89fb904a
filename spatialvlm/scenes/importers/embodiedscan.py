"""EmbodiedScan annotation pickles, v1 and v2 (Wang et al., CVPR 2024).

Layout: ``{"metainfo": {"categories": {name: id}}, "data_list": [...]}``; every entry has
``sample_idx`` ("scannet/scene0000_00", "matterport3d/<building>/<region>", ...), ``images`` and
``instances``. Boxes are nine numbers (centre, size, intrinsic z-x-y angles) in the axis-aligned world;
poses are ``axis_align_matrix @ cam2global``. Depth may have a lens of its own (``depth_cam2img``: 3RScan
stores 224x172 depth beside 960x540 colour) and is then resampled into the colour view.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from spatialvlm.errors import ImporterError
from spatialvlm.scenes.blacklist import room_of
from spatialvlm.scenes.boxes import Box
from spatialvlm.scenes.codecs import box_codec
from spatialvlm.scenes.importers.common import (
    FrameList,
    ImportOptions,
    ImportReport,
    ObjectList,
    choose_frames,
    depth_in_view,
    measure_visibility,
    quarter_turns_to_upright,
    reference_scans,
    stored_size,
    turn_scene,
)
from spatialvlm.scenes.importers.unpickle import safe_load
from spatialvlm.scenes.schema import Object, Scene
from spatialvlm.scenes.transforms import Array

LICENSES = {"scannet": "ScanNet-TOU", "3rscan": "3RScan-TOU", "matterport3d": "Matterport-EULA",
            "arkitscenes": "ARKitScenes-CC-BY-NC-SA"}  # fmt: skip
DEPTH_SCALE = {"matterport3d": 4000.0}
SAME_LENS_PX = 2.0
"""Intrinsics of colour and depth that differ by less, at the size of the depth image, are the same."""


def list_scenes(root: Path) -> list[str]:
    """``<pickle name>::<sample_idx>`` of every scene of every annotation file below ``root``."""
    names = []
    for path in sorted(root.glob("*.pkl")):
        names += [f"{path.name}::{entry['sample_idx']}" for entry in _entries(path)[1]]
    return names


room_aliases = reference_scans
"""Rooms that the scene id does not tell."""


def read_scene(root: Path, name: str, options: ImportOptions, report: ImportReport) -> Scene:
    """One scene by the name that :func:`list_scenes` gave.

    Raises:
        ImporterError: Keys are missing.
        UnsafePickleError: The pickle contains other things than containers and arrays.
    """
    file, _, sample = name.partition("::")
    categories, entries = _entries(root / file)
    entry = next((e for e in entries if e["sample_idx"] == sample), None)
    if entry is None:
        raise ImporterError(f"{root / file}: no scene {sample!r}.")
    return _scene(root, file, entry, categories, options, report)


def iter_scenes(root: Path, options: ImportOptions, report: ImportReport) -> Iterator[Scene]:
    """All scenes below ``root``."""
    for name in list_scenes(root):
        yield read_scene(root, name, options, report)


_CACHE: dict[Path, tuple[dict[int, str], list[dict[str, Any]]]] = {}


def _entries(path: Path) -> tuple[dict[int, str], list[dict[str, Any]]]:
    """Category names by id and the scenes of one file; the last file stays in memory."""
    if path not in _CACHE:
        content = safe_load(path)
        try:
            categories = {int(v): str(k) for k, v in content["metainfo"]["categories"].items()}
            entries = list(content["data_list"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ImporterError(
                f"{path}: not an EmbodiedScan file, {error!r} is missing. Expected "
                "metainfo.categories and data_list."
            ) from error
        _CACHE.clear()
        _CACHE[path] = (categories, entries)
    return _CACHE[path]


def _scene(
    root: Path,
    file: str,
    entry: Mapping[str, Any],
    categories: Mapping[int, str],
    options: ImportOptions,
    report: ImportReport,
) -> Scene:
    source, _, native = str(entry["sample_idx"]).partition("/")
    if source not in LICENSES:
        raise ImporterError(f"{file}: sample_idx {entry['sample_idx']!r} names no known dataset.")
    if source == "arkitscenes":
        native = native.split("/")[-1]
    scene_id = f"{source}/{native}"
    align = np.asarray(entry.get("axis_align_matrix", np.eye(4)), dtype=np.float64)
    objects = _objects(entry, categories, report)
    index_of = {item.extra["instance"]: item.index for item in objects}
    frames = FrameList(report)
    images = list(entry.get("images", ()))
    for index in choose_frames(len(images), options.num_frames):
        image = images[index]
        size = stored_size(root / image["img_path"], report)
        if size is None:
            continue
        intrinsics = image.get("cam2img", entry.get("cam2img"))
        if intrinsics is None:
            raise ImporterError(
                f"{file}: {scene_id} has no cam2img, neither per scene nor per image."
            )
        with np.errstate(invalid="ignore"):  # lost frames have poses of -inf; the list drops them
            pose = align @ np.asarray(image["cam2global"], dtype=np.float64)
        visible = [index_of.get(int(i)) for i in image.get("visible_instance_ids", ())]
        media = (options.media or root / "extracted") / scene_id
        frames.add(
            Path(image["img_path"]).stem,
            intrinsics=intrinsics,
            world_from_cam=pose,
            width=size[0],
            height=size[1],
            rgb=image["img_path"],
            depth=_depth(root, image, np.asarray(intrinsics), entry, size, media),
            depth_scale=DEPTH_SCALE.get(source, 1000.0),
            extra={"annotated_visible": sorted(i for i in visible if i is not None)},
        )
    scene = Scene(
        scene_id=scene_id,
        room_id=room_of(scene_id, reference_scans(root)),
        source=source,
        objects=objects,
        frames=frames.finish(scene_id),
        split=next((s for s in ("train", "val", "test") if s in file), "train"),
        license=LICENSES[source],
        extra={"world_from_source": align.tolist()},
        root=root,
    )
    if options.upright:
        scene = turn_scene(scene, quarter_turns_to_upright, options)
    return measure_visibility(scene, report, occupancy=options.occupancy)


def _objects(
    entry: Mapping[str, Any], categories: Mapping[int, str], report: ImportReport
) -> list[Object]:
    """Boxes of the instances; ``extra.instance`` is the position in the annotation."""
    codec = box_codec("embodiedscan_zxy")
    objects = ObjectList(report)
    for position, instance in enumerate(entry.get("instances", ())):
        values = [float(v) for v in instance["bbox_3d"]]
        if not codec.angles_in_range(values):
            report.count("angle_range")
        rotation = codec.decode([0, 0, 0, 1, 1, 1, *np.nan_to_num(values[6:9])]).rotation
        objects.add(
            (values[:3], values[3:6], rotation),
            categories.get(int(instance["bbox_label_3d"]), "unknown"),
            native_id=str(instance.get("bbox_id", position)),
            label_source="embodiedscan",
            extra={"instance": position},
        )
    return objects.finish()


def _depth(
    root: Path,
    image: Mapping[str, Any],
    intrinsics: Array,
    entry: Mapping[str, Any],
    size: tuple[int, int],
    media: Path,
) -> str | None:
    """Path of the depth image; a copy as the colour camera sees it when the lenses differ (3RScan)."""
    stored = image.get("depth_path")
    if not stored or not (root / stored).is_file():
        return None
    lens = image.get("depth_cam2img", entry.get("depth_cam2img"))
    if lens is None:
        return str(stored)
    with Image.open(root / stored) as opened:
        scale = np.array([[opened.width / size[0]], [opened.height / size[1]], [1.0]])
        own = np.asarray(lens, dtype=np.float64)[:3, :3]
        if np.abs(intrinsics[:3, :3] * scale - own).max() < SAME_LENS_PX:
            return str(stored)
        raw = np.asarray(opened).astype(np.uint16)
    target = (media / "depth" / f"{Path(image['img_path']).stem}.png").resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(depth_in_view(raw, own, (intrinsics, *size))).save(target)
    return str(target)


def box_values(box: Box) -> list[float]:
    """Nine numbers of a box in EmbodiedScan's convention."""
    return box_codec("embodiedscan_zxy").encode(box)
