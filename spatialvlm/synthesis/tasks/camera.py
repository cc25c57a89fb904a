"""What the camera sees from where: depth order and camera motion (OpenSpatial 8-12)."""

from __future__ import annotations

from collections.abc import Iterator

from numpy.random import Generator

from spatialvlm.synthesis.context import SceneContext, View, require, tightest
from spatialvlm.synthesis.rows import QA, Args, Derived, Margin, Reason, Reject
from spatialvlm.synthesis.tasks.base import Task, per_frame
from spatialvlm.synthesis.writer import Writer

DEPTH_GAP_M = 0.15
DEPTH_GAP_RATIO = 0.08
RANKS = ("closest", "second closest", "third closest", "fourth closest", "fifth closest")


def depth_values(view: View, objects: list[int]) -> list[float]:
    """Depth of each object: 10th percentile of its visible depth, else the nearest corner.

    Raises:
        Reject: ``margin``: the two measures order the objects differently.
    """
    boxes = [view.depth[obj][0] for obj in objects]
    seen = [view.vis[obj].depth_near for obj in objects]
    measured = [near for near in seen if near is not None]
    if len(measured) < len(objects):
        return boxes
    order = sorted(range(len(objects)), key=lambda i: measured[i])
    if order != sorted(range(len(objects)), key=lambda i: boxes[i]):
        raise Reject(Reason.MARGIN, "seen depth and box depth disagree")
    return measured


def depth_gap(nearer: float, farther: float) -> Margin:
    """Margin of two neighbouring depths.

    Raises:
        Reject: ``margin``: closer than 0.15 m or 8 % of the nearer depth.
    """
    return require("gap_m", farther - nearer, max(DEPTH_GAP_M, DEPTH_GAP_RATIO * nearer))


class DepthChoice(Task):
    """Which of 3-5 objects is the closest, the farthest, or the n-th closest."""

    id = "depth_choice"
    family = "CP"
    capability = "SR"
    group = "meas"
    dimension = "depth"
    forms = ("OE", "MCQ")
    variants = ("closest", "farthest", "rank")

    def propose(self, ctx: SceneContext, rng: Generator) -> Iterator[Args]:
        """3-5 clean objects of one frame; 40 % closest, 40 % farthest, 20 % n-th closest."""
        for args in per_frame(ctx, rng, (3, 4, 5)):
            ticket, count = rng.random(), len(args["objects"])
            args["variant"] = self.variants[int(ticket >= 0.4) + int(ticket >= 0.8)]
            rank = {"closest": 0, "farthest": count - 1}
            args["rank"] = rank.get(args["variant"], int(rng.integers(1, count - 1)))
            yield args

    def derive(self, ctx: SceneContext, args: Args) -> Derived:
        """Index of the object with the asked rank."""
        view = ctx.view(args["frames"][0])
        objects = args["objects"]
        ctx.require_clean(view, objects)
        values = depth_values(view, objects)
        order = sorted(range(len(objects)), key=lambda i: values[i])
        rank = args["rank"]
        ranked = [values[i] for i in order]
        neighbours = range(max(rank - 1, 0), min(rank + 1, len(order) - 1))
        margin = tightest(*(depth_gap(ranked[i], ranked[i + 1]) for i in neighbours))
        return Derived(objects[order[rank]], margin, {"depth_m": values})

    def phrase(self, ctx: SceneContext, args: Args, derived: Derived, write: Writer) -> QA:
        """Objects named by words or by marks."""
        write.show([ctx.frame_of[args["frames"][0]]])
        marked = write.draws.unit() < write.wording.marks
        refs = write.name_all(args["objects"], marked=marked)
        right = refs[args["objects"].index(derived.answer)]
        wrong = [ref.short for ref in refs if ref is not right]
        slots = {"objects": refs, "rank": RANKS[args["rank"]]}
        turn = write.turn("text", right.short, slots, variant=args["variant"], wrong=wrong)
        return write.qa(turn)
