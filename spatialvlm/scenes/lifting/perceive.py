"""Everything a lifting run asks its backends: overlapped stages over frames, poses beside them."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context

import numpy as np

from spatialvlm.scenes.lifting.pipeline import PipelineStats, Stage, StageError, run_stages
from spatialvlm.scenes.lifting.protocols import Backends, Detection, Mask, Poses
from spatialvlm.scenes.lifting.stages import keep_mask, mask_points
from spatialvlm.scenes.transforms import Array

BATCH = 4
Part = tuple[str, float, Array]
"""Label, score and camera-frame points of one mask."""


@dataclass(frozen=True, eq=False)
class Percept:
    """One frame and what the backends say about it; filled stage by stage."""

    index: int
    image: Array
    depth: Array | None = None
    tags: tuple[str, ...] = ()
    boxes: tuple[Detection, ...] = ()
    masks: tuple[Mask, ...] = ()
    parts: tuple[Part | None, ...] = ()

    @property
    def known_depth(self) -> Array:
        """Depth after the first stage."""
        assert self.depth is not None
        return self.depth


def perceive(
    images: Array, backends: Backends, stats: PipelineStats | None, workers: int
) -> tuple[list[Percept], Poses]:
    """Everything neural: poses of all frames beside the stages that work frame by frame."""
    with ThreadPoolExecutor(max_workers=1) as thread, _points_pool(workers) as pool:
        posing = thread.submit(_poses, backends, images)
        stages = _stages(backends, posing, pool)
        items: list[Percept] = run_stages(
            stages, [Percept(i, image) for i, image in enumerate(images)], stats=stats
        )
        return items, posing.result()


@contextmanager
def _points_pool(workers: int) -> Iterator[ProcessPoolExecutor | None]:
    if workers == 0:
        yield None
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield pool


def _poses(backends: Backends, images: Array) -> Poses:
    try:
        return backends.pose.poses(images)
    except Exception as error:
        raise StageError(
            f"lifting stage 'poses' failed: {type(error).__name__}: {error}"
        ) from error


def _stages(
    backends: Backends, posing: Future[Poses], pool: ProcessPoolExecutor | None
) -> list[Stage]:
    """Depth, tags, boxes, masks and points as stages over frames."""

    def depth(items: list[Percept]) -> list[Percept]:
        found = backends.depth.depth(_stack(items))
        return [replace(item, depth=np.asarray(d)) for item, d in zip(items, found, strict=True)]

    def tag(items: list[Percept]) -> list[Percept]:
        found = backends.tagger.tags(_stack(items))
        return [replace(item, tags=tuple(tags)) for item, tags in zip(items, found, strict=True)]

    def detect(items: list[Percept]) -> list[Percept]:
        found = backends.detector.detect(_stack(items), [item.tags for item in items])
        return [replace(item, boxes=tuple(boxes)) for item, boxes in zip(items, found, strict=True)]

    def segment(items: list[Percept]) -> list[Percept]:
        found = backends.segmenter.segment(_stack(items), [item.boxes for item in items])
        return [replace(item, masks=tuple(masks)) for item, masks in zip(items, found, strict=True)]

    def points(items: list[Percept]) -> list[Percept]:
        intrinsics = posing.result().intrinsics
        run = map if pool is None else pool.map
        found = run(_parts, items, [intrinsics[item.index] for item in items])
        return [replace(item, parts=tuple(parts)) for item, parts in zip(items, found, strict=True)]

    calls = {"depth": depth, "tags": tag, "detect": detect, "segment": segment, "points": points}
    return [Stage(name, call, BATCH) for name, call in calls.items()]


def _parts(item: Percept, intrinsics: Array) -> list[Part | None]:
    """Points of the good masks of one frame; ``None`` for masks that give too few."""
    found: list[Part | None] = []
    for box, mask in zip(item.boxes, item.masks, strict=True):
        if keep_mask(mask.pixels, mask.score):
            points = mask_points(mask.pixels, item.known_depth, intrinsics)
            found.append(None if points is None else (box.label, box.score, points))
    return found


def _stack(items: Sequence[Percept]) -> Array:
    return np.stack([item.image for item in items])
