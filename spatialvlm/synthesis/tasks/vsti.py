"""Camera questions of VSTI-Bench: about single frames of a video, called "frame k of N".

``k`` counts from 1 over the frames of the row itself. An object is named by its label, which must be
unique among what the frame does not hide.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.random import Generator

from spatialvlm.synthesis.context import SceneContext, View, require, require_range, tightest
from spatialvlm.synthesis.relations import GAP_M, above, left_of, separation
from spatialvlm.synthesis.rows import QA, Args, Derived, Margin, Reason, Reject
from spatialvlm.synthesis.tasks.base import pick, shuffled, take_turns, tuples
from spatialvlm.synthesis.tasks.camera import move_in_view
from spatialvlm.synthesis.tasks.vsi import VideoTask, number_turn
from spatialvlm.synthesis.writer import Writer, dominant

SMALL_CLIP = 8
"""Clips with at most this many frames allow any two frames; others need 5 to 30 frames between."""
FRAME_GAP = (5, 30)


class FrameTask(VideoTask):
    """Common part: a frame of the clip and objects that are clean in it."""

    tags = ("benchmark_like:vsti",)

    def per_clip_frame(self, ctx: SceneContext, rng: Generator, size: int) -> Iterator[Args]:
        """Clean objects with a label of their own in single frames of the clip."""
        clip = self.clip(ctx)

        def stream(position: int) -> Iterator[Args]:
            view = ctx.view(clip[position])
            pool = [o for o in view.clean if ctx.not_hidden(view, ctx.labels[o]) == [o]]
            for objects in tuples(rng, pool, size):
                variant = pick(rng, self.variants)
                yield {"variant": variant, "frames": clip, "at": [position], "objects": objects}

        yield from take_turns([stream(i) for i in shuffled(rng, clip)])

    def per_frame_pair(self, ctx: SceneContext, rng: Generator) -> Iterator[Args]:
        """Two frames of the clip, far enough apart in the source."""
        clip = self.clip(ctx)
        pairs = [
            (i, j) for j in range(len(clip)) for i in range(j) if frames_apart(ctx, clip, i, j)
        ]
        for index in shuffled(rng, pairs):
            yield {"variant": "", "frames": clip, "at": list(pairs[index])}

    def at(self, ctx: SceneContext, args: Args) -> list[View]:
        """The views the question is about."""
        return [ctx.view(args["frames"][position]) for position in args["at"]]

    def require_named(self, ctx: SceneContext, view: View, objects: list[int]) -> Margin:
        """Reject unless the objects are clean in the frame and named by their labels alone.

        Raises:
            Reject: ``not_clean`` or ``duplicate_label``.
        """
        least = ctx.require_clean(view, objects)
        for obj in objects:
            if ctx.not_hidden(view, ctx.labels[obj]) != [obj]:
                raise Reject(Reason.DUPLICATE_LABEL, ctx.labels[obj])
        return Margin("vis", least, 0.3)

    def frame_slots(self, args: Args) -> dict[str, str]:
        """``frame k of N`` for the one or two frames of the question."""
        words = [f"frame {position + 1} of {len(args['frames'])}" for position in args["at"]]
        return dict(zip(("frame", "other"), words, strict=False))


def frames_apart(ctx: SceneContext, clip: list[str], i: int, j: int) -> bool:
    """Whether two frames of a clip may be compared: 5 to 30 frames apart, or a clip of at most 8."""
    if len(clip) <= SMALL_CLIP:
        return True
    return FRAME_GAP[0] <= ctx.frame_of[clip[j]] - ctx.frame_of[clip[i]] <= FRAME_GAP[1]


def require_apart(ctx: SceneContext, args: Args) -> None:
    """Reject frame pairs that are too near or too far in the source.

    Raises:
        Reject: ``out_of_range``.
    """
    i, j = args["at"]
    if not frames_apart(ctx, args["frames"], i, j):
        raise Reject(Reason.OUT_OF_RANGE, f"frames {i} and {j}")


class CamObjAbs(FrameTask):
    """Distance from the camera to an object in one frame."""

    id = "vsti_cam_obj_abs"
    family = "CP"
    capability = "MM"
    group = "meas"
    dimension = "depth"
    needs = frozenset({"metric"})
    forms = ("NUM", "MCQ")
    balance = "number"

    def propose(self, ctx: SceneContext, rng: Generator) -> Iterator[Args]:
        """One object of a frame."""
        return self.per_clip_frame(ctx, rng, 1)

    def derive(self, ctx: SceneContext, args: Args) -> Derived:
        """Metres from the camera centre to the box, 0.2 to 10."""
        (view,) = self.at(ctx, args)
        margin = self.require_named(ctx, view, args["objects"])
        value = view.distance[args["objects"][0]]
        require_range(value, 0.2, 10.0, "distance")
        return Derived(value, margin, {"distance_m": value})

    def phrase(self, ctx: SceneContext, args: Args, derived: Derived, write: Writer) -> QA:
        """Metres with one decimal."""
        write.show(self.frames(ctx, args), "video")
        slots = {"a": ctx.labels[args["objects"][0]], **self.frame_slots(args)}
        return write.qa(number_turn(write, derived.answer, slots, unit="m", places=1))


class CamObjRel(FrameTask):
    """Which of 2-4 objects is closest to the camera in one frame."""

    id = "vsti_cam_obj_rel"
    family = "CP"
    capability = "SR"
    group = "meas"
    dimension = "depth"
    forms = ("MCQ",)
    variants = ("closest",)

    def propose(self, ctx: SceneContext, rng: Generator) -> Iterator[Args]:
        """Four objects of a frame, then three, then two."""
        yield from take_turns([self.per_clip_frame(ctx, rng, size) for size in (4, 3, 2)])

    def derive(self, ctx: SceneContext, args: Args) -> Derived:
        """Index of the nearest object; all distances at least 0.15 m apart, none below 0.5 m."""
        (view,) = self.at(ctx, args)
        self.require_named(ctx, view, args["objects"])
        values = {obj: view.distance[obj] for obj in args["objects"]}
        require("gap_m", min(values.values()), 0.5, Reason.TOO_CLOSE)
        ranked = sorted(values.values())
        gaps = [b - a for a, b in pairwise(ranked)]
        margin = require("gap_m", min(gaps), GAP_M)
        best = min(values, key=lambda obj: values[obj])
        return Derived(best, margin, {"distance_m": [values[o] for o in args["objects"]]})

    def phrase(self, ctx: SceneContext, args: Args, derived: Derived, write: Writer) -> QA:
        """One of the labels."""
        write.show(self.frames(ctx, args), "video")
        labels = [ctx.labels[obj] for obj in args["objects"]]
        right = ctx.labels[derived.answer]
        slots = {"labels": ", ".join(labels), **self.frame_slots(args)}
        wrong = [label for label in labels if label != right]
        return write.qa(write.turn("text", right, slots, wrong=wrong))


class ObjObj(FrameTask):
    """Two objects in one frame: which is nearer, further left, or higher."""

    family = "SR"
    capability = "SR"
    group = "rel"
    dimension = "rel"
    forms = ("MCQ",)
    needs = frozenset({"gravity"})

    def propose(self, ctx: SceneContext, rng: Generator) -> Iterator[Args]:
        """Two objects of a frame."""
        return self.per_clip_frame(ctx, rng, 2)

    def holds(self, ctx: SceneContext, view: View, a: int, b: int) -> tuple[bool, Margin]:
        """Whether the first object is nearer, further left, or higher."""
        raise NotImplementedError

    def derive(self, ctx: SceneContext, args: Args) -> Derived:
        """Word of the variant that describes the first object."""
        (view,) = self.at(ctx, args)
        a, b = args["objects"]
        self.require_named(ctx, view, [a, b])
        holds, margin = self.holds(ctx, view, a, b)
        return Derived(self.words[0] if holds else self.words[1], margin, {})

    words: tuple[str, str] = ("", "")

    def phrase(self, ctx: SceneContext, args: Args, derived: Derived, write: Writer) -> QA:
        """One of two words."""
        write.show(self.frames(ctx, args), "video")
        a, b = (ctx.labels[obj] for obj in args["objects"])
        wrong = [word for word in self.words if word != derived.answer]
        slots = {"a": a, "b": b, **self.frame_slots(args)}
        return write.qa(write.turn("text", derived.answer, slots, wrong=wrong))


class ObjObjNearFar(ObjObj):
    """Whether an object is nearer to the camera than another or farther."""

    id = "vsti_obj_obj_nf"
    words = ("near", "far")

    def holds(self, ctx: SceneContext, view: View, a: int, b: int) -> tuple[bool, Margin]:
        """Whole boxes separated in depth by 0.15 m, distances in the same order."""
        del ctx
        gap, first = separation(view.depth[a], view.depth[b])
        margin = require("gap_m", gap, GAP_M)
        if first != (view.distance[a] < view.distance[b]):
            raise Reject(Reason.MARGIN, "depth and distance disagree")
        return first, margin


class ObjObjLeftRight(ObjObj):
    """Whether an object is left or right of another."""

    id = "vsti_obj_obj_lr"
    words = ("left", "right")

    def holds(self, ctx: SceneContext, view: View, a: int, b: int) -> tuple[bool, Margin]:
        """Same rule as for single images."""
        ctx.require_level(view)
        return left_of(view, a, b)


class ObjObjUpDown(ObjObj):
    """Whether an object is above or below another."""

    id = "vsti_obj_obj_ud"
    words = ("up", "down")

    def holds(self, ctx: SceneContext, view: View, a: int, b: int) -> tuple[bool, Margin]:
        """Same rule as for single images."""
        del view
        return above(ctx, a, b)


class CamDisp(FrameTask):
    """How far the camera moved between two frames."""

    id = "vsti_cam_disp"
    family = "CP"
    capability = "MM"
    group = "persp"
    dimension = "persp"
    needs = frozenset({"metric"})
    forms = ("NUM", "MCQ")
    balance = "number"

    def propose(self, ctx: SceneContext, rng: Generator) -> Iterator[Args]:
        """Two frames."""
        return self.per_frame_pair(ctx, rng)

    def derive(self, ctx: SceneContext, args: Args) -> Derived:
        """Straight-line metres, 0.2 to 10."""
        require_apart(ctx, args)
        one, two = self.at(ctx, args)
        value = float(np.linalg.norm(one.camera.centre - two.camera.centre))
        require_range(value, 0.2, 10.0, "displacement")
        return Derived(value, require("move_m", value, 0.2), {"distance_m": value})

    def phrase(self, ctx: SceneContext, args: Args, derived: Derived, write: Writer) -> QA:
        """Metres with one decimal."""
        write.show(self.frames(ctx, args), "video")
        slots = self.frame_slots(args)
        return write.qa(number_turn(write, derived.answer, slots, unit="m", places=1))


MIN_DIRECTION_M = 0.5
DIRECTION_RATIO = 1.5
STEADY_SHARE = 0.7


class CamDir(FrameTask):
    """In which direction the camera mainly moved between two frames."""

    id = "vsti_cam_dir"
    family = "CP"
    capability = "PT"
    group = "persp"
    dimension = "persp"
    needs = frozenset({"gravity"})
    forms = ("MCQ",)

    def propose(self, ctx: SceneContext, rng: Generator) -> Iterator[Args]:
        """Two frames."""
        return self.per_frame_pair(ctx, rng)

    def derive(self, ctx: SceneContext, args: Args) -> Derived:
        """Dominant direction in the level frame of the start; most single steps agree with it."""
        require_apart(ctx, args)
        one, two = self.at(ctx, args)
        move = move_in_view(one, two)
        flat = {word: value for word, value in move.items() if word not in ("up", "down")}
        word, size, ratio = dominant(flat)
        margin = require("move_m", size, MIN_DIRECTION_M)
        margin = tightest(margin, require("ratio", min(ratio, 1e6), DIRECTION_RATIO))
        axis = _axis(one, word)
        i, j = args["at"]
        centres = [ctx.view(frame).camera.centre for frame in args["frames"][i : j + 1]]
        steps = [float((b - a) @ axis) for a, b in pairwise(centres)]
        steady = sum(step > 0 for step in steps) / len(steps)
        if steady < STEADY_SHARE:
            raise Reject(Reason.MARGIN, f"only {steady:.2f} of the steps go {word}")
        return Derived(word, margin, {"move_m": move, "steady": steady})

    def phrase(self, ctx: SceneContext, args: Args, derived: Derived, write: Writer) -> QA:
        """One of four directions."""
        write.show(self.frames(ctx, args), "video")
        words = ("forward", "backward", "left", "right")
        wrong = [word for word in words if word != derived.answer]
        return write.qa(write.turn("text", derived.answer, self.frame_slots(args), wrong=wrong))


def _axis(view: View, word: str) -> np.ndarray:
    """Unit direction of a word in the world."""
    right, forward = view.camera.level_frame("y")[:2, :3]
    return np.asarray(
        {"forward": forward, "backward": -forward, "left": -right, "right": right}[word]
    )


class DistChange(FrameTask):
    """Whether the camera is closer to an object in the later of two frames."""

    id = "vsti_dist_change"
    family = "CP"
    capability = "PT"
    group = "persp"
    dimension = "depth"
    forms = ("MCQ",)

    def propose(self, ctx: SceneContext, rng: Generator) -> Iterator[Args]:
        """An object that is clean in two frames."""
        for args in self.per_frame_pair(ctx, rng):
            one, two = self.at(ctx, args)
            both = [obj for obj in one.clean if two.is_clean(obj)]
            if both:
                yield {**args, "objects": [both[int(rng.integers(len(both)))]]}

    def derive(self, ctx: SceneContext, args: Args) -> Derived:
        """``closer`` or ``farther``: at least 0.25 m and 10 % of the first distance."""
        require_apart(ctx, args)
        one, two = self.at(ctx, args)
        obj = args["objects"][0]
        self.require_named(ctx, one, [obj])
        self.require_named(ctx, two, [obj])
        before, after = one.distance[obj], two.distance[obj]
        margin = require("gap_m", abs(after - before), max(0.25, 0.1 * before))
        word = "closer" if after < before else "farther"
        return Derived(word, margin, {"distance_m": [before, after]})

    def phrase(self, ctx: SceneContext, args: Args, derived: Derived, write: Writer) -> QA:
        """One of two."""
        write.show(self.frames(ctx, args), "video")
        slots = {"a": ctx.labels[args["objects"][0]], **self.frame_slots(args)}
        wrong = [word for word in ("closer", "farther") if word != derived.answer]
        return write.qa(write.turn("text", derived.answer, slots, wrong=wrong))
