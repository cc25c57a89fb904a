"""Meta files of VSI-Bench and VLM-3R: boxes, counts and room sizes of ScanNet, ScanNet++, ARKitScenes.

One JSON per dataset: ``{scene: {object_bbox | object_bboxes: {label: [box]}, object_counts, room_size,
room_center, dataset}}``. A box has ``centroid``, ``axesLengths``, ``normalizedAxes`` (nine numbers, the
**rows** of the 3x3 matrix are the axes) and the axis-aligned ``min``/``max`` of the oriented box.
These are evaluation scenes: training refuses them.
"""

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from spatialvlm.errors import ImporterError
from spatialvlm.scenes.blacklist import room_of
from spatialvlm.scenes.importers.common import (
    FrameList,
    ImportOptions,
    ImportReport,
    ObjectList,
    choose_frames,
    measure_visibility,
    normalise_label,
)
from spatialvlm.scenes.io import MAX_JSON_BYTES
from spatialvlm.scenes.schema import Room, Scene

AABB_TOLERANCE_M = 1e-3
LICENSES = {
    "scannet": "ScanNet-TOU",
    "scannetpp": "ScanNet++-TOU",
    "arkitscenes": "ARKitScenes-CC-BY-NC-SA",
}


def list_scenes(root: Path) -> list[str]:
    """``<file>::<scene>`` of every scene of every meta file below ``root``."""
    return [
        f"{path.name}::{name}"
        for path in sorted(root.glob("*meta_info*.json"))
        for name in _load(path)
    ]


def read_scene(root: Path, name: str, options: ImportOptions, report: ImportReport) -> Scene:
    """One scene by the name that :func:`list_scenes` gave.

    Raises:
        ImporterError: A key is missing, or a box does not reproduce its ``min``/``max``.
    """
    file, _, native = name.partition("::")
    entry = _load(root / file).get(native)
    if entry is None:
        raise ImporterError(f"{root / file}: no scene {native!r}.")
    source = str(entry.get("dataset", "")).lower().replace("++", "pp")
    if source not in LICENSES:
        raise ImporterError(f"{root / file}: {native} has dataset {entry.get('dataset')!r}.")
    scene_id = f"{source}/{native}"
    boxes = entry.get("object_bboxes", entry.get("object_bbox"))
    if boxes is None:
        raise ImporterError(f"{root / file}: {native} has neither object_bbox nor object_bboxes.")
    objects = ObjectList(report)
    for label, items in boxes.items():
        for number, item in enumerate(items):
            _add(objects, label, number, item, f"{root / file}: {native}")
    frames = FrameList(report)
    listed = entry.get("frames", [])
    for index in choose_frames(len(listed), options.num_frames):
        frame = listed[index]
        frames.add(
            str(frame.get("file_name_base", index)),
            intrinsics=[[frame["fx"], 0, frame["cx"]], [0, frame["fy"], frame["cy"]], [0, 0, 1]],
            world_from_cam=frame["camera_pose_camera_to_world"],
            width=int(frame["width"]),
            height=int(frame["height"]),
            rgb=frame.get("file_path"),
            extra={"bboxes_2d": frame.get("bboxes_2d", [])},
        )
    counts: dict[str, int] = {}
    for label, count in entry.get("object_counts", {}).items():
        counts[normalise_label(label)] = counts.get(normalise_label(label), 0) + int(count)
    size = entry.get("room_size")
    scene = Scene(
        scene_id=scene_id,
        room_id=room_of(scene_id),
        source=source,
        objects=objects.finish(),
        frames=frames.finish(scene_id) if listed else [],
        split="val",
        license=LICENSES[source],
        label_counts=counts or None,
        room=Room(area_m2=float(size), area_method="given") if size else None,
        extra={"room_center": entry.get("room_center")},
        root=root,
    )
    if not listed:
        report.count("no_frames")
        return scene
    return measure_visibility(scene, report, occupancy=options.occupancy)


def iter_scenes(root: Path, options: ImportOptions, report: ImportReport) -> Iterator[Scene]:
    """All scenes below ``root``."""
    for name in list_scenes(root):
        yield read_scene(root, name, options, report)


@lru_cache(maxsize=2)
def _load(path: Path) -> dict[str, Any]:
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ImporterError(f"{path}: larger than {MAX_JSON_BYTES} bytes.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ImporterError(f"{path}: not JSON at offset {error.pos}: {error.msg}.") from error
    if not isinstance(content, dict):
        raise ImporterError(f"{path}: expected an object of scenes.")
    return content


def _add(objects: ObjectList, label: str, number: int, item: Mapping[str, Any], where: str) -> None:
    try:
        center, lengths = np.array(item["centroid"], float), np.array(item["axesLengths"], float)
        rotation = np.array(item["normalizedAxes"], float).reshape(3, 3).T
    except (KeyError, ValueError) as error:
        raise ImporterError(f"{where}, {label} {number}: bad or missing key {error}.") from error
    if np.linalg.det(rotation) < 0:
        # A box is symmetric: turning one axis round describes the same solid.
        rotation[:, 2] *= -1
        objects.report.count("mirrored_axes")
    if "min" in item and np.isfinite(lengths).all() and lengths.min() > 0:
        reach = np.abs(rotation) @ lengths / 2
        worst = max(
            np.abs(center - reach - np.array(item["min"])).max(),
            np.abs(center + reach - np.array(item["max"])).max(),
        )
        if worst > AABB_TOLERANCE_M:
            raise ImporterError(
                f"{where}, {label} {number}: the oriented box misses the stored min/max by {worst:.4f} m. "
                "Are the axes stored as columns?"
            )
    objects.add(
        (center, lengths, rotation),
        label,
        native_id=f"{label}-{number}",
        label_source="vsi_meta",
        refit_tilted=True,
    )
