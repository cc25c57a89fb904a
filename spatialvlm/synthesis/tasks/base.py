"""What a task is, and the ways of proposing arguments that tasks share.

A task proposes arguments, ``derive`` computes the answer from the scene and the arguments alone, and
``phrase`` writes the text. Generation and verification call the same ``derive``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import combinations, permutations
from typing import Any, ClassVar

from numpy.random import Generator

from spatialvlm.synthesis.context import PAIR_IOU, SceneContext
from spatialvlm.synthesis.rows import QA, Args, Derived, Form, Reason, Reject, Turn
from spatialvlm.synthesis.writer import Writer

MAX_COMBINATIONS = 400
"""Object tuples tried per frame."""
MAX_ENUMERATED = 4000
"""Up to so many tuples are listed and shuffled; more are drawn."""
NUM_IOU_BINS = 9
NEEDS = {r.value.removeprefix("needs:"): r for r in Reason if r.value.startswith("needs:")}
"""What a task can need -> the reason that counts scenes without it."""


OPENSPATIAL = {
    "size_abs": "Size-obj-abs",
    "size_rel": "Size-obj-rel",
    "dist_abs": "Dis-obj-abs",
    "grounding_cam9": "3d-grounding",
    "left_right": "Pos-left-right",
    "high_low": "Pos-high-low",
    "front_behind": "Pos-front-behind",
    "depth_choice": "Depth-choice",
    "depth_order": "Depth-order",
    "dist_obj_cam": "Dis-obj-cam",
    "cam_motion": "Cam-motion",
    "cam_pose": "Cam-pose",
    "mv_dist_abs": "Mi-dis-obj-abs",
    "mv_dist_rel": "Mi-dis-obj-rel",
    "mv_pos": "Mi-pos-obj",
    "corr_point": "Corr-point",
    "corr_obj": "Corr-obj",
    "scene_caption": "Scene-caption",
    "route_plan": "Route-plan",
}
"""Our task id -> name of the sub-task in OpenSpatial (arXiv 2604.07296), in its order."""


class Task:
    """One kind of question; subclasses fill in the class attributes and the three methods."""

    id: ClassVar[str]
    family: ClassVar[str]
    """SM measurement, SR relations, CP camera perception, MC multi-view consistency, SAR reasoning."""
    capability: ClassVar[str]
    """EASI capability: MM, MR, SR, PT, DA or CR."""
    group: ClassVar[str]
    """Group of SSR: rel, persp, meas or complex."""
    dimension: ClassVar[str]
    """Dimension of SenseNova-SI: depth, size, rel, persp, shape or nav."""
    views: ClassVar[str] = "1"
    """``1``, ``2``, ``3-6``, ... images, or ``v`` for a video."""
    needs: ClassVar[frozenset[str]] = frozenset()
    """What a scene must have: metric, gravity, depth, instances, front, time, room."""
    forms: ClassVar[tuple[Form, ...]] = ("YN", "MCQ")
    variants: ClassVar[tuple[str, ...]] = ("",)
    balance: ClassVar[str] = "class"
    """How the second pass balances rows: ``class`` (answers or options) or ``number`` (8 log bins)."""
    tags: ClassVar[tuple[str, ...]] = ()
    """Further tags, e.g. ``benchmark_like:vsi``."""

    def propose(self, ctx: SceneContext, rng: Generator) -> Iterator[Args]:
        """Yield candidate arguments, best first, until there are no more."""
        raise NotImplementedError

    def derive(self, ctx: SceneContext, args: Args) -> Derived | list[Derived]:
        """Compute the answer from geometry; a list for a dialogue with one entry per turn.

        Raises:
            Reject: The question is not asked.
        """
        raise NotImplementedError

    def phrase(self, ctx: SceneContext, args: Args, derived: Any, write: Writer) -> QA:
        """Write the question.

        Raises:
            Reject: It cannot be worded without ambiguity.
        """
        raise NotImplementedError

    def forms_for(self, args: Args) -> tuple[Form, ...]:
        """Forms this question can take."""
        del args
        return self.forms

    def all_tags(self) -> list[str]:
        """Tags of a row: capability, groups, and the free ones."""
        named = [f"openspatial:{OPENSPATIAL[self.id]}"] if self.id in OPENSPATIAL else []
        return [
            *named,
            f"easi:{self.capability}",
            f"ssr:{self.group}",
            f"sensenova:{self.dimension}",
            *self.tags,
        ]

    def unmet_need(self, ctx: SceneContext) -> Reason | None:
        """First requirement the scene does not meet."""
        scene = ctx.scene
        has = {
            "metric": scene.metric,
            "gravity": scene.gravity_aligned,
            "frames": bool(scene.frames),
            "depth": bool(scene.frames) and all(f.depth is not None for f in scene.frames),
            "instances": bool(scene.frames)
            and all(f.instance_map is not None for f in scene.frames),
            "front": any(o.has_front for o in scene.objects),
            "time": all(f.time_s is not None for f in scene.frames),
            "room": ctx.area_m2 is not None,
        }
        for need in ("frames", *sorted(self.needs)):
            if not has[need]:
                return NEEDS[need]
        return None


def shuffled(rng: Generator, items: Sequence[object]) -> list[int]:
    """Random order of indices into ``items``."""
    order: list[int] = rng.permutation(len(items)).tolist()
    return order


def pick(rng: Generator, words: Sequence[str]) -> str:
    """One of the words; a single one takes no draw."""
    return words[0] if len(words) == 1 else words[int(rng.integers(len(words)))]


def tuples(
    rng: Generator, pool: Sequence[int], size: int, *, ordered: bool = True
) -> Iterator[list[int]]:
    """Distinct random ``size``-tuples of ``pool``, without repeats; ends when they run out."""
    count = len(pool)
    total = math.perm(count, size) if ordered else math.comb(count, size)
    if total <= MAX_ENUMERATED:
        every = list((permutations if ordered else combinations)(pool, size))
        for index in rng.permutation(total)[:MAX_COMBINATIONS].tolist():
            yield list(every[index])
        return
    seen: set[tuple[int, ...]] = set()
    for _ in range(MAX_COMBINATIONS):
        chosen = [pool[i] for i in rng.permutation(count)[:size].tolist()]
        key = tuple(chosen if ordered else sorted(chosen))
        if key not in seen:
            seen.add(key)
            yield chosen


def take_turns(streams: Sequence[Iterator[Args]]) -> Iterator[Args]:
    """One item of each stream after the other until all are empty."""
    alive = list(streams)
    while alive:
        left = []
        for stream in alive:
            item = next(stream, None)
            if item is not None:
                yield item
                left.append(stream)
        alive = left


def per_frame(
    ctx: SceneContext,
    rng: Generator,
    size: int | Sequence[int],
    variants: Sequence[str] = ("",),
    *,
    ordered: bool = True,
    frames: Sequence[int] | None = None,
) -> Iterator[Args]:
    """Random clean objects of single frames, the frames taking turns.

    Args:
        ctx: The scene.
        rng: Source of randomness.
        size: Number of objects, or several numbers to choose from.
        variants: One is drawn per candidate.
        ordered: Whether (a, b) and (b, a) are different questions.
        frames: Frames to use; all by default.
    """
    sizes = [size] if isinstance(size, int) else list(size)
    pool = list(range(ctx.num_frames)) if frames is None else list(frames)

    def stream(frame: int) -> Iterator[Args]:
        view = ctx.view(frame)
        usable = [k for k in sizes if k <= len(view.clean)]
        if not usable:
            return
        for objects in take_sizes(rng, view.clean, usable, ordered):
            variant = pick(rng, variants)
            yield {"variant": variant, "frames": [view.frame_id], "objects": objects}

    yield from take_turns([stream(pool[i]) for i in shuffled(rng, pool)])


def take_sizes(
    rng: Generator, pool: Sequence[int], sizes: Sequence[int], ordered: bool
) -> Iterator[list[int]]:
    """Tuples of several sizes, a size drawn for each."""
    if len(sizes) == 1:
        yield from tuples(rng, pool, sizes[0], ordered=ordered)
        return
    streams = {k: tuples(rng, pool, k, ordered=ordered) for k in sizes}
    while streams:
        size = list(streams)[int(rng.integers(len(streams)))]
        item = next(streams[size], None)
        if item is None:
            del streams[size]
        else:
            yield item


def per_pair(
    ctx: SceneContext, rng: Generator, size: int, variants: Sequence[str] = ("",)
) -> Iterator[Args]:
    """Objects that are clean in both views of usable pairs, the pairs taking turns.

    Args:
        ctx: The scene.
        rng: Source of randomness.
        size: Objects per question; 0 yields each pair once.
        variants: One is drawn per candidate.
    """

    def stream(i: int, j: int) -> Iterator[Args]:
        frames = [ctx.view(i).frame_id, ctx.view(j).frame_id]
        objects = tuples(rng, ctx.pair(i, j).shared, size) if size else iter([[]])
        for chosen in objects:
            variant = pick(rng, variants)
            yield {"variant": variant, "frames": frames, "objects": chosen}

    yield from take_turns([stream(i, j) for i, j in mixed_pairs(ctx, rng)])


def mixed_pairs(ctx: SceneContext, rng: Generator) -> list[tuple[int, int]]:
    """Usable view pairs in random order, evenly over nine bins of overlap."""
    pairs = ctx.usable_pairs()
    require_count(pairs, 1, Reason.NO_VIEW_PAIR)
    bins: dict[int, list[tuple[int, int]]] = {}
    for index in shuffled(rng, pairs):
        i, j = pairs[index] if rng.random() < 0.5 else pairs[index][::-1]
        overlap = ctx.pair(i, j).iou or 0.0
        low, high = PAIR_IOU
        slot = min(int((overlap - low) / (high - low) * NUM_IOU_BINS), NUM_IOU_BINS - 1)
        bins.setdefault(slot, []).append((i, j))
    mixed = []
    queues = [bins[slot] for slot in sorted(bins)]
    while any(queues):
        mixed += [queue.pop() for queue in queues if queue]
    return mixed


def view_chains(
    ctx: SceneContext, rng: Generator, sizes: Sequence[int], limit: int = 60
) -> Iterator[list[int]]:
    """Random sequences of different views in which consecutive views form a usable pair."""
    pairs = ctx.usable_pairs()
    require_count(pairs, 1, Reason.NO_VIEW_PAIR)
    near: dict[int, list[int]] = {}
    for i, j in pairs:
        near.setdefault(i, []).append(j)
        near.setdefault(j, []).append(i)
    starts = sorted(near)
    seen: set[tuple[int, ...]] = set()
    for _ in range(limit):
        size = sizes[int(rng.integers(len(sizes)))]
        chain = [starts[int(rng.integers(len(starts)))]]
        while len(chain) < size:
            onward = [j for j in near[chain[-1]] if j not in chain]
            if not onward:
                break
            chain.append(onward[int(rng.integers(len(onward)))])
        if len(chain) == size and tuple(chain) not in seen:
            seen.add(tuple(chain))
            yield chain


def require_count(items: Sequence[object], least: int, reason: Reason) -> None:
    """Reject when there are fewer than ``least`` items.

    Raises:
        Reject: With ``reason``.
    """
    if len(items) < least:
        raise Reject(reason, f"{len(items)} of {least}")


def two_choice(
    write: Writer, objects: Sequence[int], winner: int, word: str, variant: str = ""
) -> Turn:
    """Ask whether the first of two objects has a property, or which one has it.

    Args:
        write: Writer of the row, whose frames are set.
        objects: The two objects in the order of mention.
        winner: The one that has it.
        word: Value of the template's slot ``{word}``.
        variant: Template variant; the word itself by default.
    """
    first, second = write.name_all(objects)
    slots = {"a": first, "b": second, "word": word}
    if write.base == "YN":
        return write.turn("yesno", winner == objects[0], slots, variant=variant or word)
    right, wrong = (first, second) if winner == objects[0] else (second, first)
    return write.turn("text", right.short, slots, variant=variant or word, wrong=[wrong.short])
