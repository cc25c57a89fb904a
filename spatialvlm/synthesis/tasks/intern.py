"""Single-image tasks of InternSpatial; every row may use all instruction formats that apply to it."""

from __future__ import annotations

from collections.abc import Iterator

from numpy.random import Generator

from spatialvlm.synthesis.context import SceneContext, require_range
from spatialvlm.synthesis.rows import QA, Args, Derived, Margin, Reason, Reject
from spatialvlm.synthesis.tasks.base import Task, shuffled, take_turns
from spatialvlm.synthesis.writer import Writer


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
            for label in [*often[:several], *singles[: max(1, several)]]:
                yield {"variant": "", "frames": [view.frame_id], "label": label}
            absent = sorted(set(ctx.by_label) - set(seen))
            if absent and rng.random() < 0.05:
                label = absent[int(rng.integers(len(absent)))]
                yield {"variant": "", "frames": [view.frame_id], "label": label}

        yield from take_turns([stream(i) for i in shuffled(rng, ctx.scene.frames)])

    def derive(self, ctx: SceneContext, args: Args) -> Derived:
        """Number of visible instances, 0 to 10; an ambiguous instance rejects."""
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
