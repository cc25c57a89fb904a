"""Meta files of VSI-Bench and VLM-3R: boxes, counts and room sizes of ScanNet, ScanNet++, ARKitScenes.

One JSON per dataset: ``{scene: {object_bbox | object_bboxes: {label: [box]}, object_counts, room_size,
room_center, dataset}}``. A box has ``centroid``, ``axesLengths``, ``normalizedAxes`` (nine numbers, the
**rows** of the 3x3 matrix are the axes) and the axis-aligned ``min``/``max`` of the oriented box.
VLM-3R keeps the frames in a second file beside it: ``{scene: {camera_intrinsics: {fx, fy, cx, cy}, img_width,
img_height, frames: [{frame_id, file_path_color, file_path_depth, camera_pose_camera_to_world, bboxes_2d}]}}``,
with paths relative to the folder of the file and poses in the world of its boxes.
The scenes of VSI-Bench are evaluation scenes: training refuses them.
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
    axes_from_rows,
    choose_frames,
    measure_visibility,
    normalise_label,
    stored_size,
)
from spatialvlm.scenes.io import MAX_JSON_BYTES
from spatialvlm.scenes.schema import Frame, Room, Scene
from spatialvlm.scenes.visibility import project_box

AABB_TOLERANCE_M = 1e-3
LICENSES = {
    "scannet": "ScanNet-TOU",
    "scannetpp": "ScanNet++-TOU",
    "arkitscenes": "ARKitScenes-CC-BY-NC-SA",
}


def list_scenes(root: Path) -> list[str]:
    """``<file>::<scene>`` of every scene of every meta file in ``root``."""
    return [
        f"{path.name}::{name}"
        for path in _meta_files(root)
        for name, entry in _load(path).items()
        if _boxes(entry) is not None
    ]


def _meta_files(root: Path) -> list[Path]:
    return sorted({*root.glob("*meta_info*.json"), *root.glob("*metadata*.json")})


def _boxes(entry: Mapping[str, Any]) -> Mapping[str, Any] | None:
    boxes: Mapping[str, Any] | None = entry.get("object_bboxes", entry.get("object_bbox"))
    return boxes


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
    boxes = _boxes(entry)
    if boxes is None:
        raise ImporterError(f"{root / file}: {native} has neither object_bbox nor object_bboxes.")
    objects = ObjectList(report)
    for label, items in boxes.items():
        for number, item in enumerate(items):
            _add(objects, label, number, item, f"{root / file}: {native}")
    counts: dict[str, int] = {}
    for label, count in entry.get("object_counts", {}).items():
        counts[normalise_label(label)] = counts.get(normalise_label(label), 0) + int(count)
    size = entry.get("room_size")
    scene = Scene(
        scene_id=scene_id,
        room_id=room_of(scene_id),
        source=source,
        objects=objects.finish(),
        frames=_frames(root, native, scene_id, options, report),
        split="val",
        license=LICENSES[source],
        label_counts=counts or None,
        room=Room(area_m2=float(size), area_method="given") if size else None,
        extra={"room_center": entry.get("room_center")},
        root=root,
    )
    if not scene.frames:
        report.count("no_frames")
        return scene
    _check_views(scene, report)
    return measure_visibility(scene, report, occupancy=options.occupancy)


def iter_scenes(root: Path, options: ImportOptions, report: ImportReport) -> Iterator[Scene]:
    """All scenes below ``root``."""
    for name in list_scenes(root):
        yield read_scene(root, name, options, report)


def _frames(
    root: Path, native: str, scene_id: str, options: ImportOptions, report: ImportReport
) -> list[Frame]:
    """Frames of the scene from whichever file in ``root`` lists them; none is not an error."""
    entry = next(
        (e for p in _meta_files(root) if (e := _load(p).get(native)) and "frames" in e), None
    )
    if entry is None or not entry["frames"]:
        return []
    frames = FrameList(report)
    listed = sorted(entry["frames"], key=lambda frame: int(frame["frame_id"]))
    for index in choose_frames(len(listed), options.num_frames):
        frame = listed[index]
        pose = frame.get("camera_pose_camera_to_world")
        if not pose:
            report.count("bad_pose")
            continue
        if stored_size(root / frame["file_path_color"], report) is None:
            continue
        k = frame.get("camera_intrinsics") or entry["camera_intrinsics"]
        depth = frame.get("file_path_depth")
        frames.add(
            f"{int(frame['frame_id']):06d}",
            # The matrices come from ScanNet, where pixel centres are integers.
            intrinsics=[[k["fx"], 0, k["cx"] + 0.5], [0, k["fy"], k["cy"] + 0.5], [0, 0, 1]],
            world_from_cam=pose,
            width=int(entry["img_width"]),
            height=int(entry["img_height"]),
            rgb=frame["file_path_color"],
            depth=depth if depth and (root / depth).is_file() else None,
            extra={"bboxes_2d": frame.get("bboxes_2d", [])},
        )
    return frames.finish(scene_id)


def _check_views(scene: Scene, report: ImportReport) -> None:
    """Compare projected boxes with the 2D boxes of the meta file.

    Raises:
        ImporterError: Most of them do not even touch: boxes and poses are not in one world.
    """
    by_id = {item.id: item.box for item in scene.objects}
    touching = compared = 0
    for frame in scene.frames:
        for item in frame.extra["bboxes_2d"]:
            box = by_id.get(str(item["instance_id"]))
            if box is None:
                continue
            compared += 1
            seen = project_box(box, frame.camera)
            if seen is not None:
                (x0, y0, x1, y1), (a0, b0, a1, b1) = item["bbox_2d"], seen.bbox
                touching += x0 <= a1 and a0 <= x1 and y0 <= b1 and b0 <= y1
    report.count("bbox_2d_mismatch", compared - touching)
    if compared and touching < 0.5 * compared:
        raise ImporterError(
            f"{scene.scene_id}: {compared - touching} of {compared} projected boxes miss their 2D box. "
            "Are boxes and poses in the same (aligned or raw) world?"
        )


@lru_cache(maxsize=4)
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
        rotation = axes_from_rows(item["normalizedAxes"], objects.report)
    except (KeyError, ValueError) as error:
        raise ImporterError(f"{where}, {label} {number}: bad or missing key {error}.") from error
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
        native_id=str(item.get("instance_id", f"{label}-{number}")),
        label_source="vsi_meta",
        refit_tilted=True,
    )
