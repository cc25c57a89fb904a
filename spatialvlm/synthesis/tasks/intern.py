"""Single-image tasks of InternSpatial; every row may use all instruction formats that apply to it."""

from __future__ import annotations

import math
from collections.abc import Iterator

from numpy.random import Generator

from spatialvlm.scenes.transforms import bearing_deg, wrap_deg
from spatialvlm.synthesis.context import SceneContext, View, require, require_range, tightest
from spatialvlm.synthesis.relations import RELATIONS, compare_size, related
from spatialvlm.synthesis.rows import QA, Args, Derived, Form, Margin, Reason, Reject
from spatialvlm.synthesis.tasks.base import (
    Task,
    per_frame,
    shuffled,
    take_turns,
    tuples,
    two_choice,
)
from spatialvlm.synthesis.tasks.camera import depth_values
from spatialvlm.synthesis.writer import Writer

EXTREMES = {
    "leftmost": "left",
    "rightmost": "right",
    "nearest": "front",
    "farthest": "behind",
    "highest": "above",
    "lowest": "below",
}
PHRASES = {
    "left": "to the left of",
    "right": "to the right of",
    "above": "above",
    "below": "below",
    "front": "in front of",
    "behind": "behind",
}


class IsCount(Task):
    """How many instances of a label are visible in one image."""

    id = "is_count"
    family = "SR"
    capability = "SR"
    group = "meas"
    dimension = "size"
    forms = ("NUM", "MCQ")
    tags = ("benchmark_like:internspatial",)

    def propose(self, ctx: SceneContext, rng: Generator) -> Iterator[Args]:
        """A label and a frame; labels of visible objects come first, rare zeros after them."""

        def stream(frame: int) -> Iterator[Args]:
            view = ctx.view(frame)
            seen = sorted({ctx.labels[o] for o in ctx.targets if view.state(o) == "visible"})
            often = sorted(seen, key=lambda label: len(ctx.not_hidden(view, label)) < 2)
            several = sum(len(ctx.not_hidden(view, label)) > 1 for label in often)
            # Repeated labels first, then a few single ones, so that "1" does not drown the others.
            singles = [often[several + i] for i in shuffled(rng, often[several:])]
            share = several if several else int(rng.random() < 0.2)
            for label in [*often[:several], *singles[:share]]:
                yield {"variant": "", "frames": [view.frame_id], "label": label}
            absent = sorted(set(ctx.by_label) - set(seen))
            if absent and rng.random() < 0.05:
                label = absent[int(rng.integers(len(absent)))]
                yield {"variant": "", "frames": [view.frame_id], "label": label}

        yield from take_turns([stream(i) for i in shuffled(rng, ctx.scene.frames)])

    def derive(self, ctx: SceneContext, args: Args) -> Derived:
        """Number of visible instances, 0 to 10; an ambiguous instance rejects."""
        if args["label"] in ctx.scene.count_conflicts:
            raise Reject(Reason.COUNT_CONFLICT, args["label"])
        view = ctx.view(args["frames"][0])
        visible = []
        for obj in ctx.by_label.get(args["label"], ()):
            state = view.state(obj)
            if state == "ambiguous":
                raise Reject(Reason.AMBIGUOUS, f"object {obj}")
            if state == "visible":
                visible.append(obj)
        require_range(len(visible), -0.5, 10.5, "count")
        least = min((view.vis[obj].vis_frac for obj in visible), default=1.0)
        return Derived(len(visible), Margin("vis", least, 0.3), {"objects": visible})

    def phrase(self, ctx: SceneContext, args: Args, derived: Derived, write: Writer) -> QA:
        """A number, or one of four."""
        write.show([ctx.frame_of[args["frames"][0]]])
        wrong = write.count_options(derived.answer)
        slots = {"label": args["label"]}
        return write.qa(
            write.turn("number", derived.answer, slots, places=0, unit="count", wrong=wrong)
        )


class IsPosition(Task):
    """Relation of two objects, or which of 3-5 is the leftmost, nearest, highest, ..."""

    id = "is_position"
    family = "SR"
    capability = "SR"
    group = "rel"
    dimension = "rel"
    forms = ("YN", "MCQ", "OE")
    variants = (*RELATIONS, *EXTREMES)
    needs = frozenset({"gravity"})
    tags = ("benchmark_like:internspatial",)

    def propose(self, ctx: SceneContext, rng: Generator) -> Iterator[Args]:
        """Two objects for a relation, three to five for an extreme."""
        pairs = per_frame(ctx, rng, 2, tuple(RELATIONS))
        groups = per_frame(ctx, rng, (3, 4, 5), tuple(EXTREMES))
        return take_turns([pairs, groups])

    def forms_for(self, args: Args) -> tuple[Form, ...]:
        """Yes/no only makes sense for two objects."""
        return ("YN", "MCQ") if args["variant"] in RELATIONS else ("MCQ", "OE")

    def derive(self, ctx: SceneContext, args: Args) -> Derived:
        """Index of the object the word fits."""
        view = ctx.view(args["frames"][0])
        ctx.require_clean(view, args["objects"])
        word, objects = args["variant"], args["objects"]
        if word in RELATIONS:
            a, b = objects
            holds, margin = related(ctx, view, a, b, word)
            winner = a if holds else b
            return Derived(winner, margin, {"winner": winner})
        relation = EXTREMES[word]
        if word in ("nearest", "farthest"):
            depth_values(view, objects)
        for obj in objects:
            margins = []
            for other in objects:
                if other == obj:
                    continue
                holds, margin = related(ctx, view, obj, other, relation)
                if not holds:
                    break
                margins.append(margin)
            else:
                return Derived(obj, tightest(*margins), {"winner": obj})
        raise Reject(Reason.MARGIN, f"no {word} object")

    def phrase(self, ctx: SceneContext, args: Args, derived: Derived, write: Writer) -> QA:
        """Yes/no, which of two, or which of several."""
        write.show([ctx.frame_of[args["frames"][0]]])
        word = args["variant"]
        if word in RELATIONS:
            return write.qa(
                two_choice(write, args["objects"], derived.answer, PHRASES[word], "pair")
            )
        refs = write.name_all(args["objects"])
        right = next(ref for ref in refs if ref.obj == derived.answer)
        wrong = [ref.short for ref in refs if ref is not right]
        slots = {"objects": refs, "word": word}
        return write.qa(write.turn("text", right.short, slots, variant="extreme", wrong=wrong))


class IsSize(Task):
    """Which of two objects is bigger, taller or wider."""

    id = "is_size"
    family = "SM"
    capability = "SR"
    group = "meas"
    dimension = "size"
    variants = ("bigger", "taller", "wider")
    tags = ("benchmark_like:internspatial",)

    def propose(self, ctx: SceneContext, rng: Generator) -> Iterator[Args]:
        """Two clean objects of one frame."""
        return per_frame(ctx, rng, 2, self.variants)

    def derive(self, ctx: SceneContext, args: Args) -> Derived:
        """Index of the object the word fits."""
        a, b = args["objects"]
        ctx.require_clean(ctx.view(args["frames"][0]), (a, b))
        winner, margin = compare_size(ctx, a, b, args["variant"])
        return Derived(winner, margin, {"winner": winner})

    def phrase(self, ctx: SceneContext, args: Args, derived: Derived, write: Writer) -> QA:
        """Yes/no about the first object, or which of the two."""
        write.show([ctx.frame_of[args["frames"][0]]])
        return write.qa(two_choice(write, args["objects"], derived.answer, args["variant"]))


class IsExist(Task):
    """Whether a label occurs in the image, or on some side of another object."""

    id = "is_exist"
    family = "SR"
    capability = "SR"
    group = "rel"
    dimension = "rel"
    forms = ("YN",)
    variants = ("plain", *RELATIONS)
    needs = frozenset({"gravity"})
    tags = ("benchmark_like:internspatial",)

    def propose(self, ctx: SceneContext, rng: Generator) -> Iterator[Args]:
        """Half of the questions have a relation; labels of the scene, seen or not."""
        labels = sorted(ctx.by_label)

        def stream(frame: int) -> Iterator[Args]:
            view = ctx.view(frame)
            for _ in range(40):
                plain = rng.random() < 0.5 or not view.clean
                here = sorted({ctx.labels[o] for o in view.clean})
                pool = here if here and rng.random() < 0.5 else labels
                label = pool[int(rng.integers(len(pool)))]
                args: Args = {"variant": "plain", "frames": [view.frame_id], "label": label}
                if not plain:
                    anchor = view.clean[int(rng.integers(len(view.clean)))]
                    if ctx.labels[anchor] == label:
                        continue
                    args["variant"] = list(RELATIONS)[int(rng.integers(len(RELATIONS)))]
                    args["objects"] = [anchor]
                yield args

        yield from take_turns([stream(i) for i in shuffled(rng, ctx.scene.frames)])

    def derive(self, ctx: SceneContext, args: Args) -> Derived:
        """``True`` if a visible instance fits by its margin, ``False`` if every instance surely does not."""
        view = ctx.view(args["frames"][0])
        label, variant = args["label"], args["variant"]
        same = ctx.by_label.get(label, [])
        shown = ctx.not_hidden(view, label)
        visible = [obj for obj in shown if view.state(obj) == "visible"]
        if variant == "plain":
            if visible:
                least = max(view.vis[obj].vis_frac for obj in visible)
                return Derived(True, Margin("vis", least, 0.3), {"objects": visible})
            self._require_absent(view, same)
            return Derived(False, Margin("vis", 1.0, 0.3), {"objects": []})
        anchor = args["objects"][0]
        least = ctx.require_clean(view, (anchor,))
        if not shown:
            self._require_absent(view, same)
            return Derived(False, Margin("vis", least, 0.3), {"objects": []})
        for obj in visible:
            try:
                holds, margin = related(ctx, view, obj, anchor, variant)
            except Reject:
                continue
            if holds:
                return Derived(True, margin, {"objects": [obj]})
        margins = []
        for obj in shown:
            holds, margin = related(ctx, view, obj, anchor, variant)
            if holds:
                raise Reject(Reason.AMBIGUOUS, f"object {obj}")
            margins.append(margin)
        return Derived(False, tightest(*margins), {"objects": []})

    def _require_absent(self, view: View, same: list[int]) -> None:
        for obj in same:
            if view.state(obj) != "hidden" or view.vis[obj].in_frustum_frac > 0:
                raise Reject(Reason.AMBIGUOUS, f"object {obj} is in the frustum")

    def phrase(self, ctx: SceneContext, args: Args, derived: Derived, write: Writer) -> QA:
        """Yes or no."""
        write.show([ctx.frame_of[args["frames"][0]]])
        if args["variant"] == "plain":
            return write.qa(
                write.turn("yesno", derived.answer, {"label": args["label"]}, variant="plain")
            )
        slots = {
            "label": args["label"],
            "word": PHRASES[args["variant"]],
            "a": write.name(args["objects"][0]),
        }
        return write.qa(write.turn("yesno", derived.answer, slots, variant="relation"))


MIN_ROTATION_DEG = 15.0
MAX_ROTATION_DEG = 165.0


class IsRotation(Task):
    """By how much an object is turned between two images, relative to the line of sight."""

    id = "is_rotation"
    family = "MC"
    capability = "PT"
    group = "persp"
    dimension = "shape"
    views = "2"
    forms = ("NUM", "MCQ")
    balance = "number"
    needs = frozenset({"front", "gravity"})
    tags = ("benchmark_like:internspatial",)

    def propose(self, ctx: SceneContext, rng: Generator) -> Iterator[Args]:
        """A fronted object without symmetry that is clean in two frames."""
        frames = ctx.video_frames(48)
        views = [ctx.view(i) for i in frames]
        found: dict[int, list[View]] = {}
        for view in views:
            for obj in view.clean:
                if ctx.objects[obj].has_front and ctx.objects[obj].symmetry == "none":
                    found.setdefault(obj, []).append(view)
        pool = [obj for obj in sorted(found) if len(found[obj]) > 1]
        if not pool:
            raise Reject(Reason.NEEDS_FRONT, "no fronted object is clean in two frames")

        def stream(obj: int) -> Iterator[Args]:
            for i, j in tuples(rng, range(len(found[obj])), 2):
                pair = [found[obj][i].frame_id, found[obj][j].frame_id]
                yield {"variant": "", "frames": pair, "objects": [obj]}

        yield from take_turns([stream(pool[i]) for i in shuffled(rng, pool)])

    def derive(self, ctx: SceneContext, args: Args) -> Derived:
        """Degrees in (-180, 180], counter-clockwise seen from above."""
        obj = args["objects"][0]
        item = ctx.objects[obj]
        if not item.has_front or item.symmetry != "none":
            raise Reject(Reason.SYMMETRY, f"object {obj}")
        yaw = math.degrees(item.box.yaw_rad)
        facing = []
        for frame in args["frames"]:
            view = ctx.view(frame)
            ctx.require_clean(view, (obj,))
            facing.append(wrap_deg(yaw - bearing_deg(view.camera.centre, item.center)))
        angle = wrap_deg(facing[1] - facing[0])
        low = require("angle_deg", abs(angle), MIN_ROTATION_DEG, Reason.NO_ROTATION)
        high = require(
            "angle_deg", 180.0 - abs(angle), 180.0 - MAX_ROTATION_DEG, Reason.NO_ROTATION
        )
        return Derived(angle, tightest(low, high), {"facing_deg": facing, "angle_deg": angle})

    def phrase(self, ctx: SceneContext, args: Args, derived: Derived, write: Writer) -> QA:
        """Signed degrees; options are at least 30 degrees apart on the circle."""
        write.show([ctx.frame_of[frame] for frame in args["frames"]])
        value = round(derived.answer)
        wrong: list[int] = []
        for step in write.draws.shuffled(range(30, 331, 15)):
            angle = round(wrap_deg(value + step))
            if all(abs(wrap_deg(angle - other)) >= 30 for other in (value, *wrong)):
                wrong.append(angle)
        slots = {"a": write.name(args["objects"][0])}
        return write.qa(
            write.turn(
                "number", value, slots, unit="deg", places=0, wrong=[str(a) for a in wrong[:3]]
            )
        )
