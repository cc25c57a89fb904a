"""The eight question types of VSI-Bench, asked about a short video (frames listed in the row).

An object counts as seen if it is visible in at least one of the row's own frames: what the model is
not shown is never asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, islice, pairwise
from typing import ClassVar

from numpy.random import Generator

from spatialvlm.scenes.transforms import wrap_deg
from spatialvlm.synthesis.context import SceneContext, require, require_range, tightest
from spatialvlm.synthesis.cot import direction_steps, distance_steps
from spatialvlm.synthesis.relations import DIRECTIONS, SECTORS, direction_word
from spatialvlm.synthesis.rows import QA, Args, Derived, Margin, Reason, Reject, Turn
from spatialvlm.synthesis.tasks.base import Task, require_count, shuffled, tuples
from spatialvlm.synthesis.tasks.camera import order_turn
from spatialvlm.synthesis.writer import Writer

APPEARANCE_GAP_S = 1.0
MAX_CHAINS = 3000
"""Label combinations looked at per scene."""


class VideoTask(Task):
    """Common part: the frames of the clip and the objects seen in it."""

    views = "v"
    tags: ClassVar[tuple[str, ...]] = ("benchmark_like:vsi",)

    def clip(self, ctx: SceneContext) -> list[str]:
        """Ids of the frames shown to the model.

        Raises:
            Reject: ``too_few_frames``.
        """
        if ctx.num_frames < 2:
            raise Reject(Reason.TOO_FEW_FRAMES, f"{ctx.num_frames}")
        return ctx.clip_ids

    def frames(self, ctx: SceneContext, args: Args) -> tuple[int, ...]:
        """Frame indices of a row."""
        return ctx.indices(args["frames"])

    def require_seen(
        self, ctx: SceneContext, objects: Sequence[int], frames: Sequence[int]
    ) -> Margin:
        """Margin of the least visible object.

        Raises:
            Reject: ``not_visible``.
        """
        table = ctx.seen_in(frames)
        for obj in objects:
            if not table[obj][0]:
                raise Reject(Reason.NOT_VISIBLE, f"object {obj}")
        return Margin("vis", min([table[obj][1] for obj in objects], default=1.0), 0.3)

    def require_unique(self, ctx: SceneContext, objects: list[int]) -> None:
        """Reject objects that share their label.

        Raises:
            Reject: ``duplicate_label``.
        """
        for obj in objects:
            if len(ctx.by_label[ctx.labels[obj]]) != 1:
                raise Reject(Reason.DUPLICATE_LABEL, ctx.labels[obj])


class VsiCount(VideoTask):
    """How many instances of a label the room holds."""

    id = "vsi_count"
    family = "SR"
    capability = "SR"
    group = "meas"
    dimension = "size"
    forms = ("NUM", "MCQ")

    def propose(self, ctx: SceneContext, rng: Generator) -> Iterator[Args]:
        """Labels with at least two instances."""
        labels = sorted(label for label, same in ctx.by_label.items() if len(same) > 1)
        for i in shuffled(rng, labels):
            yield {"variant": "", "frames": self.clip(ctx), "label": labels[i]}

    def derive(self, ctx: SceneContext, args: Args) -> Derived:
        """Count of the scene (2 to 40), every instance seen in the clip."""
        label = args["label"]
        if label in ctx.scene.count_conflicts:
            raise Reject(Reason.COUNT_CONFLICT, label)
        same = ctx.by_label.get(label, [])
        require_range(len(same), 1.5, 40.5, "count")
        margin = self.require_seen(ctx, same, self.frames(ctx, args))
        return Derived(len(same), margin, {"objects": same})

    def phrase(self, ctx: SceneContext, args: Args, derived: Derived, write: Writer) -> QA:
        """A number, or one of four."""
        write.show(self.frames(ctx, args), "video")
        return write.qa(
            write.turn(
                "number",
                derived.answer,
                {"label": args["label"]},
                places=0,
                unit="count",
                wrong=write.count_options(derived.answer),
            )
        )


def first_seen(ctx: SceneContext, label: str, frames: Sequence[int]) -> tuple[float, float] | None:
    """First appearance of the earliest instance of a label, ``None`` if an instance never appears."""
    known = []
    for obj in ctx.by_label[label]:
        moment = ctx.appearance(obj, frames)
        if moment is None:
            return None
        known.append(moment)
    return min(moment[0] for moment in known), min(moment[1] for moment in known)


class VsiOrder(VideoTask):
    """In which order four labels first appear in the video."""

    id = "vsi_order"
    family = "SAR"
    capability = "CR"
    group = "complex"
    dimension = "rel"
    forms = ("MCQ", "OE")
    variants = ("4", "3", "2")

    def propose(self, ctx: SceneContext, rng: Generator) -> Iterator[Args]:
        """Labels that appear one clearly after the other, four where possible; mentioned in any order."""
        frames = ctx.clip
        moments = {label: first_seen(ctx, label, frames) for label in sorted(ctx.by_label)}
        known = {label: moment for label, moment in moments.items() if moment is not None}
        ranked = sorted(known, key=lambda label: known[label])
        found = False
        for size in (4, 3, 2):
            chains = [
                chain
                for chain in islice(combinations(ranked, size), MAX_CHAINS)
                if all(
                    known[b][0] - known[a][1] > APPEARANCE_GAP_S - 1e-3 for a, b in pairwise(chain)
                )
            ]
            found = found or bool(chains)
            for index in rng.permutation(len(chains)).tolist():
                labels = [chains[index][i] for i in rng.permutation(size).tolist()]
                yield {"variant": str(size), "frames": self.clip(ctx), "labels": labels}
        if not found:
            raise Reject(Reason.MARGIN, "no two labels appear one clearly after the other")

    def derive(self, ctx: SceneContext, args: Args) -> Derived:
        """Labels in order of the first appearance of their earliest instance."""
        frames = self.frames(ctx, args)
        moments: dict[str, tuple[float, float]] = {}
        for label in args["labels"]:
            moment = first_seen(ctx, label, frames)
            if moment is None:
                raise Reject(Reason.NOT_VISIBLE, label)
            moments[label] = moment
        order = sorted(moments, key=lambda label: moments[label])
        margins = [
            require("time_s", moments[after][0] - moments[before][1], APPEARANCE_GAP_S - 1e-3)
            for before, after in pairwise(order)
        ]
        return Derived(order, tightest(*margins), {"first_seen_s": moments})

    def phrase(self, ctx: SceneContext, args: Args, derived: Derived, write: Writer) -> QA:
        """One of several permutations (all of them for two labels), or the list itself."""
        write.show(self.frames(ctx, args), "video")
        slots = {"labels": _listed(args["labels"])}
        return write.qa(order_turn(write, derived.answer, slots))


def _listed(words: list[str]) -> str:
    """``a, b and c``."""
    return f"{', '.join(words[:-1])} and {words[-1]}"


class VsiObjSize(VideoTask):
    """Longest extent of an object, in centimetres."""

    id = "vsi_obj_size"
    family = "SM"
    capability = "MM"
    group = "meas"
    dimension = "size"
    needs = frozenset({"metric"})
    forms = ("NUM", "MCQ")
    balance = "number"

    def propose(self, ctx: SceneContext, rng: Generator) -> Iterator[Args]:
        """Objects with a label of their own."""
        pool = ctx.seen_unique
        for i in shuffled(rng, pool):
            yield {"variant": "", "frames": self.clip(ctx), "objects": [pool[i]]}

    def derive(self, ctx: SceneContext, args: Args) -> Derived:
        """Centimetres, 5 to 600; the object is clean in some frame."""
        obj = args["objects"][0]
        frames = self.frames(ctx, args)
        self.require_unique(ctx, [obj])
        margin = self.require_seen(ctx, [obj], frames)
        if not any(ctx.view(frame).is_clean(obj) for frame in frames):
            raise Reject(Reason.NOT_CLEAN, f"object {obj} in no frame")
        value = 100.0 * max(ctx.size_list[obj])
        require_range(value, 5.0, 600.0, "size")
        return Derived(value, margin, {"size_cm": value})

    def phrase(self, ctx: SceneContext, args: Args, derived: Derived, write: Writer) -> QA:
        """A number of centimetres."""
        write.show(self.frames(ctx, args), "video")
        slots = {"label": ctx.labels[args["objects"][0]]}
        return write.qa(number_turn(write, derived.answer, slots, unit="cm", places=0))


def number_turn(
    write: Writer,
    value: float,
    slots: Mapping[str, object],
    *,
    unit: str,
    places: int,
    variant: str = "",
) -> Turn:
    """A number, or one of four numbers at least 20 % apart."""
    wrong = write.number_options(value, places) if write.base == "MCQ" else None
    return write.turn(
        "number", value, slots, variant=variant, unit=unit, places=places, wrong=wrong
    )


class VsiRoomSize(VideoTask):
    """Floor area of the room."""

    id = "vsi_room_size"
    family = "SM"
    capability = "MM"
    group = "meas"
    dimension = "size"
    needs = frozenset({"metric", "room"})
    forms = ("NUM",)
    balance = "number"

    def propose(self, ctx: SceneContext, rng: Generator) -> Iterator[Args]:
        """One question per scene."""
        del rng
        yield {"variant": "", "frames": self.clip(ctx)}

    def derive(self, ctx: SceneContext, args: Args) -> Derived:
        """Square metres."""
        self.frames(ctx, args)
        if ctx.area_m2 is None:
            raise Reject(Reason.NEEDS_ROOM)
        return Derived(ctx.area_m2, Margin("vis", 0.3, 0.3), {"area_m2": ctx.area_m2})

    def phrase(self, ctx: SceneContext, args: Args, derived: Derived, write: Writer) -> QA:
        """A number of square metres with one decimal."""
        write.show(self.frames(ctx, args), "video")
        return write.qa(number_turn(write, derived.answer, {}, unit="m2", places=1))


class VsiAbsDist(VideoTask):
    """Closest-point distance of two objects."""

    id = "vsi_abs_dist"
    family = "SM"
    capability = "MM"
    group = "meas"
    dimension = "size"
    needs = frozenset({"metric"})
    forms = ("NUM", "MCQ")
    balance = "number"

    def propose(self, ctx: SceneContext, rng: Generator) -> Iterator[Args]:
        """Pairs of objects with labels of their own."""
        for objects in tuples(rng, ctx.seen_unique, 2):
            yield {"variant": "", "frames": self.clip(ctx), "objects": objects}

    def derive(self, ctx: SceneContext, args: Args) -> Derived:
        """Metres, 0.2 to 10."""
        a, b = args["objects"]
        self.require_unique(ctx, [a, b])
        margin = self.require_seen(ctx, [a, b], self.frames(ctx, args))
        value = ctx.distances[a][b]
        require_range(value, 0.2, 10.0, "distance")
        return Derived(value, margin, {"distance_m": value})

    def phrase(self, ctx: SceneContext, args: Args, derived: Derived, write: Writer) -> QA:
        """Metres with one decimal."""
        write.show(self.frames(ctx, args), "video")
        a, b = (ctx.labels[obj] for obj in args["objects"])
        slots = {"a": a, "b": b}
        return write.qa(number_turn(write, derived.answer, slots, unit="m", places=1))


class VsiRelDist(VideoTask):
    """Which of four (three, two) labels is closest to a reference."""

    id = "vsi_rel_dist"
    family = "SR"
    capability = "SR"
    group = "meas"
    dimension = "rel"
    forms = ("MCQ",)
    variants = ("4", "3", "2")

    def propose(self, ctx: SceneContext, rng: Generator) -> Iterator[Args]:
        """A unique reference and candidate labels, four where the scene has them."""
        frames = ctx.clip
        seen = [
            label
            for label, same in sorted(ctx.by_label.items())
            if all(ctx.visible_once(obj, frames) for obj in same)
        ]
        unique = [label for label in seen if len(ctx.by_label[label]) == 1]
        require_count(seen, 3, Reason.TOO_FEW_OBJECTS)
        require_count(unique, 1, Reason.TOO_FEW_OBJECTS)
        for _ in range(MAX_CHAINS // 4):
            reference = unique[int(rng.integers(len(unique)))]
            pool = [label for label in seen if label != reference]
            count = min((4, 4, 3, 2)[int(rng.integers(4))], len(pool))
            labels = [pool[i] for i in rng.permutation(len(pool))[:count].tolist()]
            yield {
                "variant": str(count),
                "frames": self.clip(ctx),
                "objects": [ctx.by_label[reference][0]],
                "labels": labels,
            }

    def derive(self, ctx: SceneContext, args: Args) -> Derived:
        """Label whose nearest instance is closest; every pair of candidates is apart."""
        reference = args["objects"][0]
        self.require_unique(ctx, [reference])
        gap = ctx.comparison_gap_m
        values: list[float] = []
        involved = [reference]
        for label in args["labels"]:
            same = ctx.by_label[label]
            if not same or reference in same:
                raise Reject(Reason.DUPLICATE_LABEL, label)
            involved += same
            values.append(min(ctx.distances[reference][obj] for obj in same))
        self.require_seen(ctx, involved, self.frames(ctx, args))
        require("gap_m", min(values), 0.15, Reason.TOO_CLOSE)
        ranked = sorted(values)
        margin = tightest(*(require("gap_m", b - a, gap) for a, b in pairwise(ranked)))
        best = min(range(len(values)), key=lambda i: values[i])
        return Derived(args["labels"][best], margin, {"distance_m": values})

    def phrase(self, ctx: SceneContext, args: Args, derived: Derived, write: Writer) -> QA:
        """One of the labels."""
        write.show(self.frames(ctx, args), "video")
        wrong = [label for label in args["labels"] if label != derived.answer]
        reference = args["objects"][0]
        slots = {"label": ctx.labels[reference], "labels": _listed(args["labels"])}
        turn = write.turn("text", derived.answer, slots, wrong=wrong, hint=not write.wants_steps)
        same = [ctx.by_label[label] for label in args["labels"]]
        if write.wants_steps and [len(objects) for objects in same] == [1, 1]:
            steps = distance_steps(ctx, reference, same[0][0], same[1][0], derived.answer)
            return write.qa(write.explained(turn, steps), tags=write.step_tags)
        return write.qa(turn)


class VsiRelDir(VideoTask):
    """Standing at A and facing B: where is C?"""

    id = "vsi_rel_dir"
    family = "MC"
    capability = "PT"
    group = "rel"
    dimension = "persp"
    forms = ("MCQ",)
    variants = ("easy", "medium", "hard")
    needs = frozenset({"gravity"})

    def propose(self, ctx: SceneContext, rng: Generator) -> Iterator[Args]:
        """Triples of objects with labels of their own."""
        pool = ctx.seen_unique
        require_count(pool, 3, Reason.TOO_FEW_OBJECTS)
        clip = self.clip(ctx)
        for objects in tuples(rng, pool, 3):
            variant = self.variants[int(rng.integers(3))]
            yield {"variant": variant, "frames": clip, "objects": objects}

    def derive(self, ctx: SceneContext, args: Args) -> Derived:
        """A direction word of the variant."""
        a, b, c = args["objects"]
        self.require_unique(ctx, [a, b, c])
        self.require_seen(ctx, [a, b, c], self.frames(ctx, args))
        return relative_direction(ctx, a, b, c, args["variant"])

    def phrase(self, ctx: SceneContext, args: Args, derived: Derived, write: Writer) -> QA:
        """One of two, three or four directions."""
        write.show(self.frames(ctx, args), "video")
        a, b, c = (ctx.labels[obj] for obj in args["objects"])
        words = [word for word, _, _ in DIRECTIONS[args["variant"]]]
        wrong = [word for word in words if word != derived.answer]
        slots = {"a": a, "b": b, "c": c}
        turn = write.turn(
            "text",
            derived.answer,
            slots,
            variant=args["variant"],
            wrong=wrong,
            hint=not write.wants_steps,
        )
        if write.wants_steps:
            one, two, target = args["objects"]
            steps = direction_steps(ctx, one, two, target, args["variant"], derived.answer)
            return write.qa(write.explained(turn, steps), tags=write.step_tags)
        return write.qa(turn)


def relative_direction(ctx: SceneContext, a: int, b: int, c: int, variant: str) -> Derived:
    """Direction of ``c`` for someone who stands at ``a`` and faces ``b``.

    Raises:
        Reject: ``out_of_range`` (a pair nearer than 0.3 m or farther than 5 m) or ``sector``.
    """
    from_a = ctx.distances[a]
    for distance in (from_a[b], from_a[c], ctx.distances[b][c]):
        require_range(distance, 0.3, 5.0, "distance")
    heading = ctx.bearing(a, b)
    angle = wrap_deg(ctx.bearing(a, c) - heading)
    word, margin = direction_word(angle, variant)
    low, high = SECTORS[variant, word]
    outside = sum(
        [(bearing - heading - low) % 360.0 > high - low for bearing in ctx.corner_bearings[a][c]]
    )
    if outside > 2:
        raise Reject(Reason.SECTOR, f"{outside} corners of object {c} lie in another sector")
    return Derived(word, margin, {"angle_deg": angle})
