"""What all importers share: labels, lenient boxes and poses, frame choice, counters, finishing."""

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml
from jaxtyping import Float
from PIL import Image

from spatialvlm.errors import BoxError, CameraError, ImporterError, SceneSchemaError
from spatialvlm.scenes.boxes import Box, Symmetry, canonicalise_axes, refit_upright
from spatialvlm.scenes.cameras import Camera
from spatialvlm.scenes.distances import box_iou
from spatialvlm.scenes.io import load_depth, load_instances, load_rgb
from spatialvlm.scenes.schema import BoxQuality, Frame, Object, Scene
from spatialvlm.scenes.transforms import Array
from spatialvlm.scenes.visibility import OccupancyRule, frame_visibility

LABEL_MAP_VERSION = "v1"
DUPLICATE_IOU = 0.95
MAX_FRAMES = 400
IRREGULAR_PLURALS = {"shelves": "shelf", "knives": "knife", "leaves": "leaf"}


@dataclass
class ImportReport:
    """What was left out, by reason, and which scenes failed."""

    counters: Counter[str] = field(default_factory=Counter)
    failed: dict[str, str] = field(default_factory=dict)

    def count(self, reason: str, number: int = 1) -> None:
        """Add to a reason."""
        if number:
            self.counters[reason] += number

    def merge(self, other: "ImportReport") -> None:
        """Add another report."""
        self.counters.update(other.counters)
        self.failed.update(other.failed)


@dataclass(frozen=True)
class ImportOptions:
    """Choices common to all importers."""

    num_frames: int | None = 32
    """Evenly spaced frames per scene; ``None`` takes all, at most 400."""
    upright: bool = False
    """Turn sideways images (3RScan, ARKitScenes), intrinsics and poses together."""
    occupancy: OccupancyRule = "robust"
    media: Path | None = None
    """Folder for pictures that have to be extracted or turned; beside the scene when ``None``."""
    mesh_depth: bool = False
    """Cast depth from the mesh of the scan for frames that have none (needs embreex)."""
    rgb_root: Path | None = None
    """Imported scenes of the source datasets, whose frames boxes without images borrow (VLA-3D)."""


@lru_cache(maxsize=1)
def _label_map() -> dict[str, str]:
    path = Path(__file__).with_name(f"labels_{LABEL_MAP_VERSION}.yaml")
    loaded: dict[str, str] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return loaded


def normalise_label(raw: str) -> str:
    """Lower case, single blanks, synonyms merged, plurals of known words made singular."""
    label = " ".join(str(raw).lower().replace("_", " ").split())
    last = label.rsplit(" ", 1)[-1]
    if last in IRREGULAR_PLURALS:
        label = label[: -len(last)] + IRREGULAR_PLURALS[last]
    return _label_map().get(label, label)


def choose_frames(count: int, wanted: int | None) -> list[int]:
    """Indices of evenly spaced frames, ends included, without repeats."""
    limit = min(count, MAX_FRAMES if wanted is None else wanted)
    if limit <= 0:
        return []
    return sorted(set(np.round(np.linspace(0, count - 1, limit)).astype(int).tolist()))


OFFICIAL_LISTS = (
    ("scannet", "val", "scannetv2_val.txt"),
    ("scannet", "test", "scannetv2_test.txt"),
    ("scannetpp", "val", "splits/nvs_sem_val.txt"),
    ("scannetpp", "test", "splits/nvs_test.txt"),
    ("scannetpp", "test", "splits/sem_test.txt"),
)
"""Source, split, and the file below the root that names its scans, as the datasets publish them."""


def official_split(root: Path, scene_id: str) -> str:
    """Split of a scan by the lists in ``root``; ``train`` where no list names it."""
    source, _, native = scene_id.partition("/")
    for owner, split, name in OFFICIAL_LISTS:
        path = root / name
        listed = owner == source and path.is_file()
        if listed and native in path.read_text(encoding="utf-8").split():
            return split
    return "train"


@lru_cache(maxsize=2)
def reference_scans(root: Path) -> dict[str, str]:
    """3RScan: scene id of every re-scan to the room id of its reference scan (``3RScan.json`` in ``root``).

    Raises:
        ImporterError: The file is there but not the list of scans that 3RScan publishes.
    """
    path = root / "3RScan.json"
    if not path.is_file():
        return {}
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return {
            f"3rscan/{scan['reference']}": f"3rscan/{entry['reference']}"
            for entry in entries
            for scan in [entry, *entry.get("scans", ())]
        }
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ImporterError(f"{path}: not the scan list of 3RScan: {error!r}.") from error


def axes_from_rows(
    normalized_axes: npt.ArrayLike, report: ImportReport
) -> Float[np.ndarray, "3 3"]:
    """Rotation of a box whose axes are stored as the rows of nine numbers.

    A box is a symmetric solid: left-handed axes describe the same one with the third axis turned round,
    which is counted.
    """
    rotation: Array = np.array(normalized_axes, dtype=np.float64).reshape(3, 3).T
    if np.linalg.det(rotation) < 0:
        rotation[:, 2] *= -1
        report.count("mirrored_axes")
    return rotation


@dataclass
class ObjectList:
    """Collects objects leniently: what is broken is dropped and counted."""

    report: ImportReport
    objects: list[Object] = field(default_factory=list)

    def add(
        self,
        box_values: tuple[npt.ArrayLike, npt.ArrayLike, npt.ArrayLike],
        raw_label: str,
        *,
        native_id: str,
        label_source: str,
        quality: BoxQuality = "annotated",
        has_front: bool = False,
        symmetry: Symmetry = "c2",
        metric: bool = True,
        color_name: str | None = None,
        refit_tilted: bool = False,
        extra: dict[str, Any] | None = None,
    ) -> None:
        """Add an object from ``(center, size, rotation with the axes as columns)``.

        The axes are relabelled so that z is up; ``extra.source_axes`` keeps the original rotation.
        ``refit_tilted`` replaces boxes that tilt more than 10 degrees by upright ones around them.
        """
        try:
            box = Box(*(np.asarray(value, dtype=np.float64) for value in box_values))
        except BoxError:
            self.report.count("bad_box")
            return
        upright = canonicalise_axes(box, has_front=has_front)
        if refit_tilted and not upright.is_upright:
            upright, quality = refit_upright(upright), "refit"
            self.report.count("refit_box")
        label = normalise_label(raw_label)
        self.objects.append(
            Object(
                index=len(self.objects),
                id=native_id,
                label=label,
                raw_label=str(raw_label),
                label_source=label_source,
                center=upright.center,
                size=upright.size,
                R=upright.rotation,
                metric=metric,
                has_front=has_front,
                symmetry="none" if has_front else symmetry,
                color_name=color_name,
                box_quality=quality,
                extra={"source_axes": np.round(box.rotation, 9).tolist(), **(extra or {})},
            )
        )

    def finish(self) -> list[Object]:
        """Merge duplicates, make ids unique and renumber."""
        kept = merge_duplicates(self.objects, self.report)
        names: Counter[str] = Counter()
        finished = []
        for index, item in enumerate(kept):
            names[item.id] += 1
            name = item.id if names[item.id] == 1 else f"{item.id}-{names[item.id]}"
            finished.append(replace(item, index=index, id=name))
        return finished


def merge_duplicates(objects: Sequence[Object], report: ImportReport) -> list[Object]:
    """Identical boxes (IoU > 0.95): one of equal labels stays; of different labels none is a target."""
    kept: list[Object] = []
    for item in objects:
        twin = next(
            (
                i
                for i, other in enumerate(kept)
                if np.abs(other.center - item.center).max() < 0.1
                and box_iou(other.box, item.box) > DUPLICATE_IOU
            ),
            None,
        )
        if twin is None:
            kept.append(item)
        elif kept[twin].label == item.label:
            report.count("duplicate_box")
        else:
            report.count("conflicting_box", 2)
            kept[twin] = replace(
                kept[twin], extra={**kept[twin].extra, "excluded": "conflicting_box"}
            )
            kept.append(replace(item, extra={**item.extra, "excluded": "conflicting_box"}))
    return kept


def stored_size(path: Path, report: ImportReport) -> tuple[int, int] | None:
    """``(width, height)`` of an image file; ``None`` and a count when the file is missing.

    Raises:
        ImporterError: The file is there but no image.
    """
    try:
        with Image.open(path) as image:
            return image.size
    except FileNotFoundError:
        report.count("missing_image")
        return None
    except OSError as error:
        raise ImporterError(f"{path}: cannot be opened as an image: {error}.") from error


@dataclass
class FrameList:
    """Collects frames leniently: what has no valid pose or intrinsics is dropped and counted."""

    report: ImportReport
    frames: list[Frame] = field(default_factory=list)

    def add(
        self,
        frame_id: str,
        *,
        intrinsics: npt.ArrayLike,
        world_from_cam: npt.ArrayLike,
        width: int,
        height: int,
        **fields: Any,
    ) -> None:
        """Add a frame; ``intrinsics`` may be 4x4 (the upper left block counts)."""
        k = np.asarray(intrinsics, dtype=np.float64)[:3, :3]
        pose = np.asarray(world_from_cam, dtype=np.float64)
        if not np.isfinite(pose).all():
            self.report.count("bad_pose")
            return
        try:
            Camera(k, np.eye(4), width, height)
        except CameraError:
            self.report.count("bad_intrinsics")
            return
        try:
            camera = Camera(k, pose, width, height)
        except CameraError:
            self.report.count("bad_pose")
            return
        self.frames.append(
            Frame(
                frame_id=frame_id,
                rgb=fields.pop("rgb", None),
                width=width,
                height=height,
                intrinsics=camera.intrinsics,
                world_from_cam=camera.world_from_cam,
                **fields,
            )
        )

    def finish(self, scene_id: str) -> list[Frame]:
        """The frames in the order of their times.

        Raises:
            SceneSchemaError: No frame is left.
        """
        if not self.frames:
            reasons = ("bad_pose", "bad_intrinsics", "missing_image")
            counts = [f"{name} {self.report.counters[name]}" for name in reasons]
            raise SceneSchemaError(f"{scene_id}: no usable frame ({', '.join(counts)}).")
        if all(frame.time_s is not None for frame in self.frames):
            self.frames.sort(key=lambda frame: frame.time_s or 0.0)
        return self.frames


def turn_upright(rgb: Array, frame: Frame, quarter_turns: int) -> tuple[Array, Frame]:
    """Rotate an image counter-clockwise by quarter turns, its intrinsics and pose with it.

    Args:
        rgb: ``[H, W]`` or ``[H, W, 3]``.
        frame: Record of the unturned image.
        quarter_turns: Number of counter-clockwise quarter turns.

    Returns:
        Turned image and the record with exchanged size; the same world points project to the same
        image content.
    """
    turned: Array = np.rot90(rgb, quarter_turns)
    k, pose = frame.intrinsics.copy(), frame.world_from_cam.copy()
    width, height = frame.width, frame.height
    for _ in range(quarter_turns % 4):
        # Pixel (u, v) moves to (v, width - u): new x = old y, new y = -old x.
        k = np.array([[k[1, 1], 0, k[1, 2]], [0, k[0, 0], width - k[0, 2]], [0, 0, 1]])
        pose[:3, :3] = np.stack([pose[:3, 1], -pose[:3, 0], pose[:3, 2]], axis=1)
        width, height = height, width
    return turned, replace(frame, width=width, height=height, intrinsics=k, world_from_cam=pose)


def quarter_turns_to_upright(camera: Camera) -> int:
    """Counter-clockwise quarter turns after which image-up is closest to world-up."""
    up_in_image = camera.rotation[2, :2]  # image-right and image-down components of world up
    angle = np.degrees(np.arctan2(-up_in_image[1], up_in_image[0]))  # 90 = already upright
    return int(np.round((90 - angle) / 90)) % 4


def turn_scene(scene: Scene, turns_of: Callable[[Camera], int], options: ImportOptions) -> Scene:
    """Turn sideways images with their depth, intrinsics and poses; copies go below ``options.media``.

    Args:
        scene: With ``root`` set.
        turns_of: Counter-clockwise quarter turns of a camera's image.
        options: Must name the folder for the turned copies.

    Raises:
        ImporterError: No folder for the copies.
    """
    if options.media is None:
        raise ImporterError(
            f"{scene.scene_id}: turning images needs a folder for the turned copies."
        )
    folder = (options.media / scene.scene_id).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    frames = []
    for frame in scene.frames:
        turns = turns_of(frame.camera)
        if turns == 0:
            frames.append(frame)
            continue
        rgb, moved = turn_upright(load_rgb(scene, frame), frame, turns)
        rgb_path, depth_path = folder / f"{frame.frame_id}.jpg", None
        Image.fromarray(np.ascontiguousarray(rgb)).save(rgb_path, quality=95)
        if frame.depth is not None:
            depth = np.rot90(load_depth(scene, frame), turns)
            depth_path = str(folder / f"{frame.frame_id}_depth.png")
            Image.fromarray(np.round(depth * 1000).astype(np.uint16)).save(depth_path)
        turned = replace(
            moved, rgb=str(rgb_path), depth=depth_path, depth_scale=1000.0, depth_kind="z"
        )
        frames.append(turned)
    return replace(scene, frames=frames)


def depth_in_view(
    depth: npt.NDArray[np.uint16],
    depth_intrinsics: Float[np.ndarray, "3 3"],
    view: tuple[Array, int, int],
) -> npt.NDArray[np.uint16]:
    """Depth of a sensor with its own lens, as the colour camera at the same place sees it.

    Args:
        depth: ``[h, w]`` raw values.
        depth_intrinsics: Pinhole matrix of the depth image, pixels.
        view: Intrinsics, width and height of the colour image.

    Returns:
        ``[H, W]`` raw values by nearest pixel; 0 where the depth sensor does not look.
    """
    intrinsics, width, height = view
    u = (np.arange(width) + 0.5 - intrinsics[0, 2]) / intrinsics[0, 0]
    v = (np.arange(height) + 0.5 - intrinsics[1, 2]) / intrinsics[1, 1]
    column = np.floor(u * depth_intrinsics[0, 0] + depth_intrinsics[0, 2]).astype(int)
    row = np.floor(v * depth_intrinsics[1, 1] + depth_intrinsics[1, 2]).astype(int)
    inside = ((row >= 0) & (row < depth.shape[0]))[:, None] & (
        (column >= 0) & (column < depth.shape[1])
    )
    seen = depth[row.clip(0, depth.shape[0] - 1)[:, None], column.clip(0, depth.shape[1] - 1)]
    return np.where(inside, seen, 0).astype(np.uint16)


def measure_visibility(
    scene: Scene, report: ImportReport, *, occupancy: OccupancyRule = "robust"
) -> Scene:
    """Fill the visibility records from depth and instance maps where they are stored.

    Without either, boxes hide each other and the frame is marked ``extra.unfiltered``.
    """
    boxes = [item.box for item in scene.objects]
    frames = []
    for frame in scene.frames:
        depth = load_depth(scene, frame) if frame.depth else None
        ids = load_instances(scene, frame) if frame.instance_map else None
        if depth is None:
            report.count("unfiltered_frame")
        elif frame.depth_kind == "z" and depth_kind_suspect(depth, frame.camera, scene):
            report.count("depth_kind_suspect")
        extra = frame.extra if depth is not None else {**frame.extra, "unfiltered": True}
        visible = frame_visibility(boxes, frame.camera, depth, ids, occupancy=occupancy)
        frames.append(replace(frame, visible=visible, extra=extra))
    return replace(scene, frames=frames)


def depth_kind_suspect(depth: Array, camera: Camera, scene: Scene) -> bool:
    """Whether floor pixels fit the floor much better when the depth is read as ray distance."""
    if scene.room is None or not scene.gravity_aligned:
        return False
    rows = np.arange(0, camera.height, max(1, camera.height // 40))
    columns = np.arange(0, camera.width, max(1, camera.width // 40))
    pixels = np.stack(np.meshgrid(columns, rows), axis=-1).reshape(-1, 2)
    values = depth[pixels[:, 1], pixels[:, 0]].astype(np.float64)
    rays = camera.rays(pixels + 0.5)
    world = rays @ camera.rotation.T
    valid = (values > 0) & (world[:, 2] < -0.2)
    expected = (scene.room.floor_z - camera.centre[2]) / np.where(valid, world[:, 2], -1.0)
    length = np.linalg.norm(rays, axis=1)

    def share(measured: Array) -> float:
        close = np.abs(measured - expected) < 0.02 * expected
        return float((close & valid).sum() / max(1, valid.sum()))

    return share(values / length) > max(0.2, 2 * share(values))


def rebase(scene: Scene, folder: Path) -> Scene:
    """Rewrite media paths so that they are relative to ``folder``, where the scene file will be."""
    if scene.root is None:
        return replace(scene, root=folder)
    root = scene.root.resolve()

    def moved(path: str | None) -> str | None:
        return None if path is None else os.path.relpath(root / path, folder.resolve())

    frames = [
        replace(f, rgb=moved(f.rgb), depth=moved(f.depth), instance_map=moved(f.instance_map))
        for f in scene.frames
    ]
    return replace(
        scene, frames=frames, mesh=moved(scene.mesh), points=moved(scene.points), root=folder
    )
