"""ARKitScenes 3DOD (Baruch et al. 2021): trajectories, pincams, oriented boxes.

Expected: ``<split>/<video>/<video>_3dod_annotation.json`` and ``<video>_frames/`` with ``lowres_wide.traj``,
``lowres_wide/*.png``, ``lowres_depth/*.png`` (mm) and ``lowres_wide_intrinsics/*.pincam``. A trajectory line
is ``timestamp, axis-angle, translation`` of **camera from world**; it is inverted here. ``metadata.csv`` or
``3dod_train_val_splits.csv`` at the root gives the visit (room), the former also the sky direction; without
one the poses tell. ``<video>_3dod_mesh.ply`` gives the floor area.
"""

import csv
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from spatialvlm.errors import ImporterError
from spatialvlm.scenes.areas import scanned_room
from spatialvlm.scenes.blacklist import room_of
from spatialvlm.scenes.importers.common import (
    FrameList,
    ImportOptions,
    ImportReport,
    ObjectList,
    axes_from_rows,
    choose_frames,
    measure_visibility,
    quarter_turns_to_upright,
    turn_scene,
)
from spatialvlm.scenes.importers.mesh_depth import add_mesh_depth
from spatialvlm.scenes.schema import Frame, Scene
from spatialvlm.scenes.transforms import Array, invert_rigid, rigid

LICENSE = "ARKitScenes-CC-BY-NC-SA"
MAX_TIME_GAP_S = 0.1
METADATA = ("metadata.csv", "3dod_train_val_splits.csv")
# Counter-clockwise quarter turns that bring the sky to the top.
SKY_TURNS = {"Up": 0, "Left": 3, "Right": 1, "Down": 2}


def list_scenes(root: Path) -> list[str]:
    """``<split>/<video>`` of every annotated video."""
    found = sorted(root.glob("*/*/*_3dod_annotation.json"))
    return [str(path.parent.relative_to(root)) for path in found]


def iter_scenes(root: Path, options: ImportOptions, report: ImportReport) -> Iterator[Scene]:
    """All videos below ``root``."""
    for name in list_scenes(root):
        yield read_scene(root, name, options, report)


def read_scene(root: Path, name: str, options: ImportOptions, report: ImportReport) -> Scene:
    """One video by the name that :func:`list_scenes` gave.

    Raises:
        ImporterError: A file is missing or of another format.
    """
    folder = root / name
    video = folder.name
    meta = _metadata(root).get(video, {})
    mesh = folder / f"{video}_3dod_mesh.ply"
    scene = Scene(
        scene_id=f"arkitscenes/{video}",
        room_id=room_of(f"arkitscenes/{video}", room_aliases(root)),
        source="arkitscenes",
        objects=_objects(folder / f"{video}_3dod_annotation.json", report).finish(),
        frames=_frames(folder / f"{video}_frames", options, report),
        split={"Training": "train", "Validation": "val"}.get(name.split("/")[0], "test"),
        license=LICENSE,
        room=scanned_room(mesh),
        mesh=f"../{mesh.name}" if mesh.is_file() else None,
        root=folder / f"{video}_frames",
    )
    scene = add_mesh_depth(scene, options, report)
    if options.upright:
        turns = SKY_TURNS.get(meta.get("sky_direction", ""))
        scene = turn_scene(
            scene, quarter_turns_to_upright if turns is None else lambda _: turns, options
        )
    return measure_visibility(scene, report, occupancy=options.occupancy)


@lru_cache(maxsize=2)
def _metadata(root: Path) -> dict[str, dict[str, str]]:
    path = next((root / name for name in METADATA if (root / name).is_file()), None)
    if path is None:
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if "video_id" not in (reader.fieldnames or ()):
            raise ImporterError(f"{path}: column 'video_id' is missing.")
        return {row["video_id"]: row for row in reader}


def room_aliases(root: Path) -> dict[str, str]:
    """Scene id to room id of all videos whose visit is known (the tables say NA where it is not)."""
    return {
        f"arkitscenes/{video}": f"arkitscenes/{row['visit_id']}"
        for video, row in _metadata(root).items()
        if row.get("visit_id", "").isdigit()
    }


def _objects(path: Path, report: ImportReport) -> ObjectList:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["data"]
    except (json.JSONDecodeError, KeyError) as error:
        raise ImporterError(f"{path}: not a 3DOD annotation: {error}.") from error
    objects = ObjectList(report)
    for entry in entries:
        box = entry["segments"]["obbAligned"]
        rotation = axes_from_rows(box["normalizedAxes"], report)
        objects.add(
            (box["centroid"], box["axesLengths"], rotation),
            entry["label"],
            native_id=str(entry["uid"]),
            label_source="arkitscenes",
        )
    return objects


def read_trajectory(path: Path) -> tuple[Array, Array]:
    """Timestamps ``[N]`` in seconds and ``world_from_cam [N, 4, 4]`` of a ``.traj`` file."""
    try:
        table = np.loadtxt(path, ndmin=2)
    except (OSError, ValueError) as error:
        raise ImporterError(f"{path}: not a trajectory: {error}.") from error
    if table.shape[1] != 7:
        raise ImporterError(f"{path}: {table.shape[1]} numbers a line, expected 7.")
    poses = [invert_rigid(rigid(axis_angle(row[1:4]), row[4:7])) for row in table]
    return table[:, 0], np.array(poses)


def axis_angle(vector: Array) -> Array:
    """Rotation matrix of an axis-angle vector (Rodrigues)."""
    angle = float(np.linalg.norm(vector))
    if angle < 1e-12:
        return np.eye(3)
    x, y, z = vector / angle
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    rotation: Array = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    return rotation


def _frames(folder: Path, options: ImportOptions, report: ImportReport) -> list[Frame]:
    times, poses = read_trajectory(folder / "lowres_wide.traj")
    images = sorted(folder.glob("lowres_wide/*.png"))
    frames = FrameList(report)
    for index in choose_frames(len(images), options.num_frames):
        stem = images[index].stem
        stamp = float(stem.split("_")[-1])
        nearest = int(np.abs(times - stamp).argmin())
        if abs(times[nearest] - stamp) > MAX_TIME_GAP_S:
            report.count("no_pose_near_frame")
            continue
        width, height, fx, fy, cx, cy = _pincam(folder / "lowres_wide_intrinsics", stem, stamp)
        depth = folder / "lowres_depth" / f"{stem}.png"
        frames.add(
            stem,
            intrinsics=[[fx, 0, cx + 0.5], [0, fy, cy + 0.5], [0, 0, 1]],
            world_from_cam=poses[nearest],
            width=int(width),
            height=int(height),
            rgb=f"lowres_wide/{images[index].name}",
            depth=f"lowres_depth/{depth.name}" if depth.is_file() else None,
            time_s=stamp,
        )
    return frames.finish(f"arkitscenes/{folder.name}")


def _pincam(folder: Path, stem: str, stamp: float) -> Array:
    """``width height fx fy cx cy``; the time stamps of the two folders may differ by a millisecond."""
    video = stem.rsplit("_", 1)[0]
    for offset in (0.0, -0.001, 0.001):
        path = folder / f"{video}_{stamp + offset:.3f}.pincam"
        if path.is_file():
            return np.loadtxt(path)
    raise ImporterError(f"{folder}: no .pincam for frame {stem}.")
