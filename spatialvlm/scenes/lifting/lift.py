"""Video or image in, scene out: keyframes, overlapped neural stages, then geometry.

lifted = lift_video(images, backends, scene_id="lifted/my_video", times_s=times)
write_lifted(lifted, Path("data/scenes/lifted"))
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from jaxtyping import Float, UInt8

from spatialvlm.errors import SceneSchemaError
from spatialvlm.scenes.boxes import Box
from spatialvlm.scenes.cameras import Camera
from spatialvlm.scenes.importers.common import normalise_label
from spatialvlm.scenes.lifting.features import FeatureStore, remembered
from spatialvlm.scenes.lifting.perceive import Percept, perceive
from spatialvlm.scenes.lifting.pipeline import PipelineStats
from spatialvlm.scenes.lifting.protocols import (
    Backends,
    CameraEstimator,
    Poses,
)
from spatialvlm.scenes.lifting.refine import instance_map
from spatialvlm.scenes.lifting.stages import (
    MIN_FRAMES,
    LiftedObject,
    Observation,
    fit_objects,
)
from spatialvlm.scenes.lifting.world import level_rotation, scale_factors
from spatialvlm.scenes.schema import Frame, Object, Room, Scene
from spatialvlm.scenes.transforms import Array, rigid, rx, transform_points
from spatialvlm.scenes.visibility import frame_visibility

VIEW_FROM_CAM = rx(-np.pi / 2)
"""Rotation from OpenCV axes (y down, z forward) to a level world seen along +y (z up)."""


@dataclass(frozen=True, eq=False)
class Lifted:
    """A scene and the pictures it was made from."""

    scene: Scene
    """Without media paths; :func:`spatialvlm.scenes.lifting.store.write_lifted` stores them."""
    images: tuple[npt.NDArray[np.uint8], ...]
    depths: tuple[npt.NDArray[np.float32], ...]
    """Z-depth in the unit of the scene."""
    instances: tuple[npt.NDArray[np.uint16], ...]
    """Refined masks as maps of object index + 1."""


def lift_video(
    images: UInt8[np.ndarray, "S H W 3"],
    backends: Backends,
    *,
    scene_id: str,
    times_s: Sequence[float] | None = None,
    num_keyframes: int = 32,
    store: FeatureStore | None = None,
    stats: PipelineStats | None = None,
    workers: int = 0,
) -> Lifted:
    """Build a scene from the frames of a video.

    Args:
        images: All frames, or frames that were sampled already.
        backends: Depth, poses, tags, boxes, masks, gravity.
        scene_id: ``lifted/<name>``.
        times_s: Time of every frame; index when ``None``.
        num_keyframes: At most this many frames are used.
        store: Keeps what the backends computed, between stages and between runs.
        stats: Filled with the number of backend calls.
        workers: Processes that turn masks into points; 0 does it in the thread of the stage.

    Returns:
        Boxes marked ``lifted``, ``metric`` when depth or poses are (the other one is scaled to it),
        ``gravity_aligned`` only when the floor was found.

    Raises:
        StageError: A backend failed (names the stage and the frame).
        SceneError: Depth and poses fit at no scale.
        SceneSchemaError: No frame.
    """
    if len(images) == 0:
        raise SceneSchemaError(f"{scene_id}: no usable frame (the video is empty).")
    keys = backends.keyframes(images, num_keyframes)
    times = [float(times_s[key]) if times_s is not None else float(i) for i, key in enumerate(keys)]
    names = [f"{key:06d}" for key in keys]
    return _lift(
        images[keys],
        backends if store is None else remembered(backends, store),
        _Names(scene_id, names, times),
        stats=stats,
        workers=workers,
        min_frames=min(MIN_FRAMES, len(keys)),
    )


def lift_image(
    image: UInt8[np.ndarray, "H W 3"],
    backends: Backends,
    camera: CameraEstimator,
    *,
    scene_id: str,
    store: FeatureStore | None = None,
) -> Lifted:
    """Build a scene of one frame from a single image.

    The camera stands at the origin. With a floor in view the world is level, else it is taken from the
    image (the optical axis is horizontal) and the scene says that gravity is not known. Boxes enclose what is
    seen; tasks that need several views or the room find nothing to ask.

    Args:
        image: The picture.
        backends: ``pose`` is not used.
        camera: Estimates the intrinsics.
        scene_id: ``lifted/<name>``.
        store: Keeps what the backends computed.

    Raises:
        StageError: A backend failed.
    """
    single = replace(backends, pose=_OneView(camera))
    return _lift(
        image[None],
        single if store is None else remembered(single, store),
        _Names(scene_id, ["000000"], [0.0]),
        min_frames=1,
    )


class _OneView:
    """Pose estimator of single images: the camera at the origin, its axes turned to a level world."""

    def __init__(self, camera: CameraEstimator) -> None:
        self._camera = camera
        self.id, self.version = camera.id, camera.version

    def poses(self, images: Array) -> Poses:
        """One pose; it has no translation, so its unit does not matter."""
        return Poses(rigid(VIEW_FROM_CAM, np.zeros(3))[None], self._camera.intrinsics(images), True)


@dataclass(frozen=True)
class _Names:
    scene_id: str
    frames: list[str]
    times_s: list[float]


def _lift(
    images: Array,
    backends: Backends,
    names: _Names,
    *,
    min_frames: int,
    stats: PipelineStats | None = None,
    workers: int = 0,
) -> Lifted:
    """All steps in order."""
    counters: Counter[str] = Counter()
    items, poses = perceive(images, backends, stats, workers)
    items, cameras, metric = _scaled(items, poses, backends)
    cameras, aligned = _levelled(cameras, items, backends)
    things = backends.merger(_observations(items, cameras, counters))
    fitted = fit_objects(things, counters, fitter=backends.fitter, min_frames=min_frames)
    boxes = [box for _, box in fitted]
    instances = [
        instance_map(item.image, item.known_depth, camera, fitted, backends.segmenter, counters)
        for item, camera in zip(items, cameras, strict=True)
    ]
    frames = [
        Frame(
            frame_id=name,
            rgb=None,
            width=camera.width,
            height=camera.height,
            intrinsics=camera.intrinsics,
            world_from_cam=camera.world_from_cam,
            time_s=time,
            visible=frame_visibility(boxes, camera, item.known_depth, ids),
        )
        for name, time, item, camera, ids in zip(
            names.frames, names.times_s, items, cameras, instances, strict=True
        )
    ]
    scene = Scene(
        scene_id=names.scene_id,
        room_id=names.scene_id,
        source="lifted",
        objects=_objects(fitted, items, instances, backends, metric=metric),
        frames=frames,
        metric=metric,
        gravity_aligned=aligned,
        room=Room(floor_z=min((box.z_min for box in boxes), default=0.0)),
        extra={"counters": dict(sorted((+counters).items())), "backends": _used(backends)},
    )
    return Lifted(
        scene,
        tuple(item.image for item in items),
        tuple(item.known_depth.astype(np.float32) for item in items),
        tuple(instances),
    )


def _scaled(
    items: Sequence[Percept], poses: Poses, backends: Backends
) -> tuple[list[Percept], list[Camera], bool]:
    """Depth, points and cameras at one scale, and whether it is metric."""
    depth_factor, pose_factor, metric = scale_factors(
        [item.known_depth for item in items],
        poses.world_from_cam,
        poses.intrinsics,
        metric_depth=backends.depth.metric,
        metric_poses=poses.metric,
    )
    height, width = items[0].image.shape[:2]
    cameras = []
    for pose, k in zip(poses.world_from_cam, poses.intrinsics, strict=True):
        cameras.append(Camera(k, rigid(pose[:3, :3], pose[:3, 3] * pose_factor), width, height))
    if depth_factor == 1.0:
        return list(items), cameras, metric
    moved = [
        replace(
            item,
            depth=item.known_depth * depth_factor,
            parts=tuple(p and (p[0], p[1], p[2] * depth_factor) for p in item.parts),
        )
        for item in items
    ]
    return moved, cameras, metric


def _levelled(
    cameras: list[Camera], items: Sequence[Percept], backends: Backends
) -> tuple[list[Camera], bool]:
    """Turn the world so that the floor is horizontal; the flag says whether that worked."""
    points = np.concatenate(
        [_sparse_points(item.known_depth, c) for item, c in zip(items, cameras, strict=True)]
    )
    up = backends.gravity.up(points, np.stack([-camera.rotation[:, 1] for camera in cameras]))
    if up is None:
        return cameras, False
    turn = rigid(level_rotation(up), np.zeros(3))
    return [Camera(c.intrinsics, turn @ c.world_from_cam, c.width, c.height) for c in cameras], True


def _sparse_points(
    depth: Float[np.ndarray, "H W"], camera: Camera, step: int = 8
) -> Float[np.ndarray, "N 3"]:
    rows, columns = np.mgrid[step // 2 : camera.height : step, step // 2 : camera.width : step]
    values = depth[rows, columns].ravel().astype(np.float64)
    pixels = np.stack([columns.ravel(), rows.ravel()], axis=1) + 0.5
    return camera.back_project(pixels[values > 0], values[values > 0])


def _observations(
    items: Sequence[Percept], cameras: Sequence[Camera], counters: Counter[str]
) -> list[Observation]:
    """Points of all masks in the world; masks without are counted."""
    found = []
    for index, (item, camera) in enumerate(zip(items, cameras, strict=True)):
        counters["bad_mask"] += len(item.masks) - len(item.parts)
        for part in item.parts:
            if part is None:
                counters["few_points"] += 1
                continue
            label, score, points = part
            world = transform_points(camera.world_from_cam, points)
            found.append(Observation(index, normalise_label(label), score, world))
    return found


def _objects(
    fitted: Sequence[tuple[LiftedObject, Box]],
    items: Sequence[Percept],
    instances: Sequence[Array],
    backends: Backends,
    *,
    metric: bool,
) -> list[Object]:
    """Records of the boxes, with captions when somebody writes them."""
    objects = [
        Object(
            index=index,
            id=f"{item.label.replace(' ', '_')}_{index}",
            label=item.label,
            raw_label=item.label,
            label_source=f"{backends.tagger.id}+{backends.detector.id}",
            center=box.center,
            size=box.size,
            R=box.rotation,
            metric=metric,
            box_quality="lifted",
            confidence=item.score,
            extra={"num_frames": len(item.frames)},
        )
        for index, (item, box) in enumerate(fitted)
    ]
    crops = [_largest_crop(index, items, instances) for index in range(len(objects))]
    shown = [(item, crop) for item, crop in zip(objects, crops, strict=True) if crop is not None]
    if backends.captioner is None or not shown:
        return objects
    texts = backends.captioner.captions([c for _, c in shown], [item.label for item, _ in shown])
    for (item, _), text in zip(shown, texts, strict=True):
        objects[item.index] = replace(item, caption=text)
    return objects


def _largest_crop(
    index: int, items: Sequence[Percept], instances: Sequence[Array]
) -> npt.NDArray[np.uint8] | None:
    """The picture of an object from the frame that shows most of it."""
    pixels = [int((ids == index + 1).sum()) for ids in instances]
    best = int(np.argmax(pixels))
    if pixels[best] == 0:
        return None
    rows, columns = np.nonzero(instances[best] == index + 1)
    crop: npt.NDArray[np.uint8] = items[best].image[
        rows.min() : rows.max() + 1, columns.min() : columns.max() + 1
    ]
    return crop


def _used(backends: Backends) -> dict[str, str]:
    parts = ("depth", "pose", "tagger", "detector", "segmenter", "gravity")
    return {
        name: f"{getattr(backends, name).id}@{getattr(backends, name).version}" for name in parts
    }
