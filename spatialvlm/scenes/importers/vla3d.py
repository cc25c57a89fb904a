"""VLA-3D scenes (Zhang et al. 2024): CSV boxes with headings, and referential statements.

``<scene>_object_result.csv`` holds centre, lengths and ``object_bbox_heading`` (counter-clockwise about z,
radians); ``_`` means missing. ``<scene>_referential_statements.json`` maps each statement to a **list** of
targets. There are no images: import the source dataset first and name that folder (``--rgb-root``), then the
scenes get its frames. Boxes of ScanNet are in the axis-aligned world, those of the other datasets in the
world of the source.
"""

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from spatialvlm.errors import ImporterError
from spatialvlm.scenes.blacklist import room_of
from spatialvlm.scenes.importers.common import (
    ImportOptions,
    ImportReport,
    ObjectList,
    choose_frames,
    measure_visibility,
    official_split,
    rebase,
    reference_scans,
)
from spatialvlm.scenes.io import load_scene
from spatialvlm.scenes.schema import Frame, Room, Scene
from spatialvlm.scenes.transforms import Array, invert_rigid, rz, transform_points

SOURCES = {"scannet": "scannet", "3rscan": "3rscan", "matterport": "matterport3d", "arkitscenes": "arkitscenes",
           "hm3d": None, "unity": None}  # fmt: skip
MISSING = "_"
SAME_OBJECT_M = 0.5
"""Boxes of one scan in two annotations differ by less than this (median over objects)."""
NUMBERS = (
    "object_bbox_cx", "object_bbox_cy", "object_bbox_cz",
    "object_bbox_xlength", "object_bbox_ylength", "object_bbox_zlength", "object_bbox_heading",
)  # fmt: skip
COLUMNS = ("object_id", "region_id", "raw_label", "nyu_label", "object_front_heading", *NUMBERS)


def list_scenes(root: Path) -> list[str]:
    """``<dataset>/<scene>`` of every folder with an object file."""
    files = sorted(root.glob("*/*/*_object_result.csv"))
    return [f"{path.parent.parent.name}/{path.parent.name}" for path in files]


room_aliases = reference_scans
"""Rooms that the scene id does not tell."""


def read_scene(root: Path, name: str, options: ImportOptions, report: ImportReport) -> Scene:
    """One scene by the name that :func:`list_scenes` gave.

    Raises:
        ImporterError: A column is missing, the dataset is not one of the known ones, or the frames below
            ``options.rgb_root`` belong to another world.
    """
    dataset, _, native = name.partition("/")
    source = SOURCES.get(dataset.lower())
    if source is None:
        raise ImporterError(f"{root / name}: scenes of {dataset!r} are not imported.")
    scene_id = f"{source}/{native}"
    folder = root / name
    objects = ObjectList(report)
    for row in _rows(folder / f"{native}_object_result.csv", COLUMNS):
        label = row["raw_label"] if row["raw_label"] != MISSING else row["nyu_label"]
        if any(row[column] in (MISSING, "") for column in NUMBERS):
            report.count("missing_value")
            continue
        cx, cy, cz, dx, dy, dz, heading = (float(row[column]) for column in NUMBERS)
        front = row["object_front_heading"]
        size = (dx, dy, dz)
        if front != MISSING:
            quarter = round((float(front) - heading) / (np.pi / 2))
            heading += quarter * np.pi / 2
            size = (dy, dx, dz) if quarter % 2 else size
        color = row.get("object_color_scheme1", MISSING)
        objects.add(
            ((cx, cy, cz), size, rz(heading)),
            label,
            native_id=row["object_id"],
            label_source="vla3d",
            color_name=None if color == MISSING else color,
            has_front=front != MISSING,
            extra={"region_id": row["region_id"]},
        )
    scene = Scene(
        scene_id=scene_id,
        room_id=room_of(scene_id, reference_scans(root)),
        source=source,
        objects=objects.finish(),
        frames=[],
        split=official_split(root, scene_id),
        license=f"VLA-3D-MIT+{source}",
        room=_room(folder / f"{native}_region_result.csv"),
        extra={"statements": _statements(folder / f"{native}_referential_statements.json", report)},
        root=folder,
    )
    lenders = [] if options.rgb_root is None else _lenders(scene, options.rgb_root)
    if any(lender.split != "train" for lender in lenders):
        scene = replace(scene, split=next(s.split for s in lenders if s.split != "train"))
    frames = _borrowed(scene, lenders, options, report)
    if not frames:
        report.count("no_frames")
        return scene
    return measure_visibility(replace(scene, frames=frames), report, occupancy=options.occupancy)


def _lenders(scene: Scene, rgb_root: Path) -> list[Scene]:
    """Imported scenes of the same scan (one per camera walk)."""
    files = sorted((rgb_root / scene.scene_id).glob("**/scene.json"))
    return [rebase(load_scene(path), scene.path(".")) for path in files]


def _borrowed(
    scene: Scene, lenders: Sequence[Scene], options: ImportOptions, report: ImportReport
) -> list[Frame]:
    """Frames of the imported scenes of the same scan, in the world of VLA-3D's boxes.

    Without a label in common nothing tells whether the worlds agree; the report counts ``world_unchecked``.

    Raises:
        ImporterError: Objects of equal labels lie far apart: not the same world.
    """
    frames: list[Frame] = []
    gaps: list[float] = []
    for lender in lenders:
        # ScanNet's boxes are axis-aligned like the imported scene; the others keep the source's world.
        aligned = lender.source == "scannet"
        stored = (
            np.eye(4) if aligned else np.array(lender.extra.get("world_from_source", np.eye(4)))
        )
        back = invert_rigid(stored)
        gaps += _label_gaps(scene, lender, back)
        prefix = f"{lender.scene_id.rpartition('/')[2]}-" if len(lenders) > 1 else ""
        frames += [
            replace(
                frame,
                frame_id=prefix + frame.frame_id,
                world_from_cam=back @ frame.world_from_cam,
                time_s=None if len(lenders) > 1 else frame.time_s,
                visible=[],
            )
            for frame in lender.frames
        ]
    if frames and not gaps:
        report.count("world_unchecked")
    if gaps and float(np.median(gaps)) > SAME_OBJECT_M:
        raise ImporterError(
            f"{scene.scene_id}: its objects lie {np.median(gaps):.2f} m (median) from those with the same "
            f"label in the scene that lends its frames (--rgb-root); the frames there belong to another world."
        )
    return [frames[index] for index in choose_frames(len(frames), options.num_frames)]


def _label_gaps(scene: Scene, lender: Scene, back: Array) -> list[float]:
    """Distance of every object to the nearest one of the same label in the lending scene."""
    gaps = []
    for item in scene.objects:
        same = [o.center for o in lender.objects if o.label == item.label]
        if same:
            moved = transform_points(back, np.array(same))
            gaps.append(float(np.linalg.norm(moved - item.center, axis=1).min()))
    return gaps


def iter_scenes(root: Path, options: ImportOptions, report: ImportReport) -> Iterator[Scene]:
    """All scenes below ``root``."""
    for name in list_scenes(root):
        yield read_scene(root, name, options, report)


def _rows(path: Path, required: tuple[str, ...]) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [column for column in required if column not in (reader.fieldnames or ())]
        if missing:
            raise ImporterError(f"{path}: column {missing[0]!r} is missing.")
        return list(reader)


def _room(path: Path) -> Room | None:
    """Box of the only region; scenes with several rooms have none."""
    if not path.is_file():
        return None
    columns = tuple(
        f"region_bbox_{name}"
        for name in ("cx", "cy", "cz", "xlength", "ylength", "zlength", "heading")
    )
    rows = _rows(path, columns)
    if len(rows) != 1:
        return None
    cx, cy, cz, dx, dy, dz, heading = (float(rows[0][column]) for column in columns)
    turn = rz(heading)[:2, :2]
    corners = np.array([(-dx, -dy), (dx, -dy), (dx, dy), (-dx, dy)]) / 2 @ turn.T + (cx, cy)
    # The outline of a bounding box overstates the floor area, so no area is stated.
    return Room(
        floor_z=cz - dz / 2,
        ceil_z=cz + dz / 2,
        extra={"outline_xy": np.round(corners, 6).tolist()},
    )


def _statements(path: Path, report: ImportReport) -> list[dict[str, str]]:
    """Statements with exactly one target; the others are counted."""
    if not path.is_file():
        return []
    try:
        regions = json.loads(path.read_text(encoding="utf-8"))["regions"]
    except (json.JSONDecodeError, KeyError) as error:
        raise ImporterError(f"{path}: not a statements file: {error}.") from error
    single = []
    for statements in regions.values():
        for text, targets in statements.items():
            if len(targets) != 1:
                report.count("multi_target_statement")
                continue
            single.append(
                {
                    "text": text,
                    "target": str(targets[0]["target_index"]),
                    "relation": str(targets[0].get("relation", "")),
                }
            )
    return single
