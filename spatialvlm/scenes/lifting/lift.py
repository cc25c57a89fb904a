"""Video in, scene out: keyframes, overlapped neural stages, then geometry.

scene = lift_video(images, backends, scene_id="lifted/my_video", times_s=times)
"""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from jaxtyping import Float, UInt8

from spatialvlm.errors import SceneSchemaError
from spatialvlm.scenes.cameras import Camera
from spatialvlm.scenes.importers.common import normalise_label
from spatialvlm.scenes.lifting.pipeline import FeatureStore, PipelineStats, Stage, run_stages
from spatialvlm.scenes.lifting.protocols import Backends, Detection, Mask
from spatialvlm.scenes.lifting.stages import (
    Observation,
    fit_objects,
    keep_mask,
    level_rotation,
    merge,
    observe,
)
from spatialvlm.scenes.schema import Frame, Object, Room, Scene
from spatialvlm.scenes.transforms import Array, rigid
from spatialvlm.scenes.visibility import frame_visibility

BATCH = 4
MIN_BLUR_SHARE = 0.5
"""Keyframes are at least this sharp, relative to the median sharpness."""


@dataclass(frozen=True, eq=False)
class _Item:
    """One frame on its way through the stages."""

    image: Array
    depth: Array | None = None
    tags: tuple[str, ...] = ()
    boxes: tuple[Detection, ...] = ()
    masks: tuple[Mask, ...] = ()


def choose_keyframes(images: UInt8[np.ndarray, "S H W 3"], count: int) -> list[int]:
    """Evenly spaced frames, each the sharpest of its stretch of the video."""
    grey = images.astype(np.float32).mean(axis=3)
    sharpness = np.abs(np.diff(grey, axis=1)).mean(axis=(1, 2)) + np.abs(
        np.diff(grey, axis=2)
    ).mean(axis=(1, 2))
    stretches = np.array_split(np.arange(len(images)), min(count, len(images)))
    return [int(part[sharpness[part].argmax()]) for part in stretches]


def lift_video(
    images: UInt8[np.ndarray, "S H W 3"],
    backends: Backends,
    *,
    scene_id: str,
    times_s: Sequence[float] | None = None,
    num_keyframes: int = 32,
    store: FeatureStore | None = None,
    stats: PipelineStats | None = None,
) -> Scene:
    """Build a scene from the frames of a video.

    Args:
        images: All frames, or frames that were sampled already.
        backends: Depth, poses, tags, boxes, masks, gravity.
        scene_id: ``lifted/<name>``.
        times_s: Time of every frame; index when ``None``.
        num_keyframes: At most this many frames are used.
        store: Keeps depth maps between runs.
        stats: Filled with the number of backend calls.

    Returns:
        A scene without stored media (``rgb`` is ``None``), boxes marked ``lifted``, ``metric`` only when
        depth and poses are, ``gravity_aligned`` only when the floor was found.

    Raises:
        SceneError: A backend failed (names the stage and the frame).
        SceneSchemaError: No frame.
    """
    if len(images) == 0:
        raise SceneSchemaError(f"{scene_id}: no usable frame (the video is empty).")
    keys = choose_keyframes(images, num_keyframes)
    frames = images[keys]
    store = store or FeatureStore()
    with ThreadPoolExecutor(max_workers=1) as pool:
        posing = pool.submit(backends.pose.poses, frames)
        items = run_stages(
            _stages(backends, store), [_Item(image) for image in frames], stats=stats
        )
        poses = posing.result()
    cameras = [
        Camera(k, pose, frames.shape[2], frames.shape[1])
        for k, pose in zip(poses.intrinsics, poses.world_from_cam, strict=True)
    ]
    cameras, aligned = _level(cameras, items, backends)
    counters: Counter[str] = Counter()
    observations: list[Observation] = []
    for index, (item, camera) in enumerate(zip(items, cameras, strict=True)):
        for box, mask in zip(item.boxes, item.masks, strict=True):
            if not keep_mask(mask.pixels, mask.score):
                counters["bad_mask"] += 1
                continue
            lifted = observe(
                index, normalise_label(box.label), box.score, mask.pixels, item.depth, camera
            )
            if lifted is None:
                counters["few_points"] += 1
            else:
                observations.append(lifted)
    fitted = fit_objects(merge(observations), counters)
    metric = backends.depth.metric and poses.metric
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
    boxes = [item.box for item in objects]
    floor = min((box.z_min for box in boxes), default=0.0)
    records = []
    for position, (key, item, camera) in enumerate(zip(keys, items, cameras, strict=True)):
        records.append(
            Frame(
                frame_id=f"{key:06d}",
                rgb=None,
                width=camera.width,
                height=camera.height,
                intrinsics=camera.intrinsics,
                world_from_cam=camera.world_from_cam,
                time_s=float(times_s[key]) if times_s is not None else float(position),
                visible=frame_visibility(boxes, camera, item.depth, None),
            )
        )
    return Scene(
        scene_id=scene_id,
        room_id=scene_id,
        source="lifted",
        objects=objects,
        frames=records,
        metric=metric,
        gravity_aligned=aligned,
        room=Room(floor_z=floor),
        extra={"counters": dict(sorted(counters.items())), "backends": _names(backends)},
    )


def _names(backends: Backends) -> dict[str, str]:
    parts = ("depth", "pose", "tagger", "detector", "segmenter", "gravity")
    return {
        name: f"{getattr(backends, name).id}@{getattr(backends, name).version}" for name in parts
    }


def _stages(backends: Backends, store: FeatureStore) -> list[Stage]:
    """Depth, tags, boxes and masks as stages over frames."""

    def depth(items: list[_Item]) -> list[_Item]:
        values = []
        for item in items:
            key = store.key(backends.depth, item.image)
            values.append(store.get(key, partial(_first_depth, backends, item.image[None])))
        return [replace(item, depth=value) for item, value in zip(items, values, strict=True)]

    def tag(items: list[_Item]) -> list[_Item]:
        found = backends.tagger.tags(_stack(items))
        return [replace(item, tags=tuple(tags)) for item, tags in zip(items, found, strict=True)]

    def detect(items: list[_Item]) -> list[_Item]:
        found = backends.detector.detect(_stack(items), [item.tags for item in items])
        return [replace(item, boxes=tuple(boxes)) for item, boxes in zip(items, found, strict=True)]

    def segment(items: list[_Item]) -> list[_Item]:
        found = backends.segmenter.segment(_stack(items), [item.boxes for item in items])
        return [replace(item, masks=tuple(masks)) for item, masks in zip(items, found, strict=True)]

    return [
        Stage("depth", depth, BATCH),
        Stage("tags", tag, BATCH),
        Stage("detect", detect, BATCH),
        Stage("segment", segment, BATCH),
    ]


def _first_depth(backends: Backends, image: Array) -> Array:
    return np.asarray(backends.depth.depth(image)[0])


def _stack(items: Sequence[_Item]) -> Array:
    return np.stack([item.image for item in items])


def _level(
    cameras: list[Camera], items: Sequence[_Item], backends: Backends
) -> tuple[list[Camera], bool]:
    """Turn the world so that the floor is horizontal; the flag says whether that worked."""
    points = np.concatenate(
        [_sparse_points(item.depth, camera) for item, camera in zip(items, cameras, strict=True)]
    )
    up = backends.gravity.up(points, np.stack([-camera.rotation[:, 1] for camera in cameras]))
    if up is None:
        return cameras, False
    turn = rigid(level_rotation(up), np.zeros(3))
    return [Camera(c.intrinsics, turn @ c.world_from_cam, c.width, c.height) for c in cameras], True


def _sparse_points(depth: Array | None, camera: Camera, step: int = 8) -> Float[np.ndarray, "N 3"]:
    assert depth is not None
    rows, columns = np.mgrid[step // 2 : camera.height : step, step // 2 : camera.width : step]
    values = depth[rows, columns].ravel().astype(np.float64)
    pixels = np.stack([columns.ravel(), rows.ravel()], axis=1) + 0.5
    return camera.back_project(pixels[values > 0], values[values > 0])
