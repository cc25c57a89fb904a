"""The eight question types of VSI-Bench, asked about a short video (frames listed in the row).

An object counts as seen if it is visible in at least one of the row's own frames: what the model is
not shown is never asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from numpy.random import Generator

from spatialvlm.synthesis.context import SceneContext, require, require_range, tightest
from spatialvlm.synthesis.rows import QA, Args, Derived, Margin, Reason, Reject
from spatialvlm.synthesis.tasks.base import Task, shuffled, tuples
from spatialvlm.synthesis.writer import Writer

NUM_FRAMES = 32
APPEARANCE_GAP_S = 1.0


class VideoTask(Task):
    """Common part: the frames of the clip and the objects seen in it."""

    views = "v"
    tags = ("benchmark_like:vsi",)

    def clip(self, ctx: SceneContext) -> list[str]:
        """Ids of the frames shown to the model.

        Raises:
            Reject: ``too_few_frames``.
        """
        frames = ctx.video_frames(NUM_FRAMES)
        if len(frames) < 2:
            raise Reject(Reason.TOO_FEW_FRAMES, f"{len(frames)}")
        return [ctx.scene.frames[i].frame_id for i in frames]

    def frames(self, ctx: SceneContext, args: Args) -> list[int]:
        """Frame indices of a row."""
        return [ctx.frame_of[frame_id] for frame_id in args["frames"]]

    def require_seen(self, ctx: SceneContext, objects: list[int], frames: list[int]) -> Margin:
        """Margin of the least visible object.

        Raises:
            Reject: ``not_visible``.
        """
        least = 1.0
        for obj in objects:
            if not ctx.visible_once(obj, frames):
                raise Reject(Reason.NOT_VISIBLE, f"object {obj}")
            least = min(least, ctx.best_visibility(obj, frames))
        return Margin("vis", least, 0.3)

    def seen_unique(self, ctx: SceneContext) -> list[int]:
        """Objects with a label of their own that are seen in the clip."""
        frames = ctx.video_frames(NUM_FRAMES)
        return [
            same[0]
            for same in ctx.by_label.values()
            if len(same) == 1 and ctx.visible_once(same[0], frames)
        ]

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


class VsiOrder(VideoTask):
    """In which order four labels first appear in the video."""

    id = "vsi_order"
    family = "SAR"
    capability = "CR"
    group = "complex"
    dimension = "rel"
    forms = ("MCQ",)
    variants = ("4",)

    def propose(self, ctx: SceneContext, rng: Generator) -> Iterator[Args]:
        """Objects whose first appearance is clear, in random order of mention."""
        frames = ctx.video_frames(NUM_FRAMES)
        first = {}
        for label, same in ctx.by_label.items():
            if all(ctx.appearance(obj, frames) is not None for obj in same):
                first[label] = same[0]
        pool = sorted(first.values())
        size = min(4, len(pool))
        if size < 2:
            raise Reject(Reason.TOO_FEW_OBJECTS, f"{size} labels appear")
        for chosen in tuples(rng, pool, size):
            labels = [ctx.labels[obj] for obj in chosen]
            yield {"variant": str(size), "frames": self.clip(ctx), "labels": labels}

    def derive(self, ctx: SceneContext, args: Args) -> Derived:
        """Labels in order of the first appearance of their earliest instance."""
        frames = self.frames(ctx, args)
        moments: dict[str, tuple[float, float]] = {}
        for label in args["labels"]:
            seen = [ctx.appearance(obj, frames) for obj in ctx.by_label[label]]
            known = [moment for moment in seen if moment is not None]
            if len(known) < len(seen) or not known:
                raise Reject(Reason.NOT_VISIBLE, label)
            moments[label] = (min(m[0] for m in known), min(m[1] for m in known))
        order = sorted(moments, key=lambda label: moments[label])
        margins = [
            require("time_s", moments[after][0] - moments[before][1], APPEARANCE_GAP_S - 1e-3)
            for before, after in pairwise(order)
        ]
        return Derived(order, tightest(*margins), {"first_seen_s": moments})

    def phrase(self, ctx: SceneContext, args: Args, derived: Derived, write: Writer) -> QA:
        """One of several permutations (all of them for two labels)."""
        write.show(self.frames(ctx, args), "video")
        right = ", ".join(derived.answer)
        orders = {right}
        for _ in range(24):
            if len(orders) == min(4, 2 * len(derived.answer) - 2):
                break
            orders.add(", ".join(write.draws.shuffled(derived.answer)))
        wrong = sorted(orders - {right})
        slots = {"labels": _listed(args["labels"])}
        if write.base == "OE":
            return write.qa(write.turn("list", derived.answer, slots))
        return write.qa(write.turn("text", right, slots, wrong=wrong))


def _listed(words: list[str]) -> str:
    """``a, b and c``."""
    return f"{', '.join(words[:-1])} and {words[-1]}"
