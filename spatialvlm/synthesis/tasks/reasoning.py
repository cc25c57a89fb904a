"""Scene-aware reasoning: route plans and scene captions (OpenSpatial 18-19, VSI-Bench route)."""

from __future__ import annotations

from collections.abc import Container, Iterator
from itertools import product
from typing import Any

from numpy.random import Generator

from spatialvlm.synthesis.captions import caption_facts, caption_text
from spatialvlm.synthesis.context import SceneContext
from spatialvlm.synthesis.routes import (
    TURN_WORDS,
    leg_length,
    plan_turns,
    simulate,
    stands_on_floor,
)
from spatialvlm.synthesis.rows import QA, Args, Derived, Margin, Reason, Reject
from spatialvlm.synthesis.scene_graph import OPPOSITE, rests_on, view_edges
from spatialvlm.synthesis.tasks.base import Task, require_count, shuffled
from spatialvlm.synthesis.tasks.vsi import VideoTask
from spatialvlm.synthesis.writer import Writer

MAX_STOPS = 5
MAX_ROUTES = 400
MAX_IMAGES = 4
MIN_FACTS = 5


def routes(ctx: SceneContext, rng: Generator, pool: list[int]) -> Iterator[list[int]]:
    """Random sequences of 3-5 stops with free legs and clear turns, longer ones first."""
    near: dict[int, list[int]] = {}
    for a in pool:
        near[a] = [b for b in pool if b != a and _free(ctx, a, b)]
    found: set[tuple[int, ...]] = set()
    for _ in range(MAX_ROUTES):
        starts = [a for a in pool if near[a]]
        if not starts:
            return
        stops = [starts[int(rng.integers(len(starts)))]]
        length = int(rng.integers(3, MAX_STOPS + 1))
        while len(stops) < length:
            onward = [b for b in near[stops[-1]] if b not in stops]
            onward = [b for b in onward if _turns(ctx, [*stops, b])]
            if not onward:
                break
            stops.append(onward[int(rng.integers(len(onward)))])
        if len(stops) >= 3 and tuple(stops) not in found:
            found.add(tuple(stops))
            yield stops


def _free(ctx: SceneContext, a: int, b: int) -> bool:
    try:
        leg_length(ctx, a, b)
    except Reject:
        return False
    return True


def _turns(ctx: SceneContext, stops: list[int]) -> bool:
    if len(stops) < 3:
        return True
    try:
        plan_turns(ctx, stops[-3:])
    except Reject:
        return False
    return True


class RouteTask(VideoTask):
    """Common part of the two route tasks: the answer is the list of missing turns."""

    family = "SAR"
    capability = "CR"
    group = "complex"
    dimension = "nav"
    needs = frozenset({"gravity"})
    forms = ("MCQ", "OE")
    variants = ("1", "2", "3")

    def check_stops(self, ctx: SceneContext, args: Args) -> None:
        """Reject stops that are not shown."""
        raise NotImplementedError

    def derive(self, ctx: SceneContext, args: Args) -> Derived:
        """Turns at the inner stops; following the plan reaches the goal, any other plan does not."""
        stops = args["objects"]
        self.require_unique(ctx, stops)
        self.check_stops(ctx, args)
        turns, margin, length = plan_turns(ctx, stops)
        if not simulate(ctx, stops, turns):
            raise Reject(Reason.BLOCKED, "the simulated robot did not arrive")
        return Derived(turns, margin, {"length_m": length})

    def route_turn(self, ctx: SceneContext, args: Args, derived: Derived, write: Writer) -> QA:
        """State the route with its turns left blank."""
        names = [f"the {ctx.labels[obj]}" for obj in args["objects"]]
        steps = [f"1. Go forward until {names[1]}."]
        for name in names[2:]:
            steps.append(f"{len(steps) + 1}. [turn]")
            steps.append(f"{len(steps) + 1}. Go forward until {name}.")
        slots = {"a": names[0], "b": names[1], "goal": names[-1], "steps": " ".join(steps)}
        right = [f"turn {word}" for word in derived.answer]
        if write.base == "OE":
            return write.qa(write.turn("list", right, slots))
        every = [
            ", ".join(f"turn {w}" for w in ws) for ws in product(TURN_WORDS, repeat=len(right))
        ]
        text = ", ".join(right)
        wrong = write.draws.shuffled([other for other in every if other != text])[:3]
        return write.qa(write.turn("text", text, slots, wrong=wrong))


class VsiRoute(RouteTask):
    """Missing turns of a route between objects of a video."""

    id = "vsi_route"

    def propose(self, ctx: SceneContext, rng: Generator) -> Iterator[Args]:
        """Stops are objects with labels of their own that stand on the floor."""
        pool = [obj for obj in ctx.seen_unique if stands_on_floor(ctx, obj)]
        require_count(pool, 3, Reason.TOO_FEW_OBJECTS)
        for stops in routes(ctx, rng, pool):
            yield {"variant": str(len(stops) - 2), "frames": self.clip(ctx), "objects": stops}

    def check_stops(self, ctx: SceneContext, args: Args) -> None:
        """All stops are seen in the clip."""
        self.require_seen(ctx, args["objects"], self.frames(ctx, args))

    def phrase(self, ctx: SceneContext, args: Args, derived: Derived, write: Writer) -> QA:
        """The clip and the route."""
        write.show(self.frames(ctx, args), "video")
        return self.route_turn(ctx, args, derived, write)


class RoutePlan(RouteTask):
    """Missing turns of a route between objects shown in a few images."""

    id = "route_plan"
    views = "1-32"
    tags = ()

    def propose(self, ctx: SceneContext, rng: Generator) -> Iterator[Args]:
        """Stops with labels of their own, and the fewest frames that show them all."""
        pool = [
            same[0]
            for same in ctx.by_label.values()
            if len(same) == 1 and stands_on_floor(ctx, same[0])
        ]
        clean = {
            obj: {f for f in range(ctx.num_frames) if ctx.view(f).is_clean(obj)} for obj in pool
        }
        pool = [obj for obj in pool if clean[obj]]
        require_count(pool, 3, Reason.TOO_FEW_OBJECTS)
        for stops in routes(ctx, rng, pool):
            frames = _cover([clean[obj] for obj in stops], ctx.num_frames)
            if len(frames) <= MAX_IMAGES:
                yield {
                    "variant": str(len(stops) - 2),
                    "frames": [ctx.view(f).frame_id for f in frames],
                    "objects": stops,
                }

    def check_stops(self, ctx: SceneContext, args: Args) -> None:
        """Every stop is clean in an image."""
        views = [ctx.view(frame) for frame in args["frames"]]
        for obj in args["objects"]:
            if not any(view.is_clean(obj) for view in views):
                raise Reject(Reason.NOT_CLEAN, f"object {obj}")

    def phrase(self, ctx: SceneContext, args: Args, derived: Derived, write: Writer) -> QA:
        """The images and the route."""
        write.show(self.frames(ctx, args))
        return self.route_turn(ctx, args, derived, write)


def _cover(sets: list[set[int]], count: int) -> list[int]:
    """Few indices that hit every set (greedy, lowest index first)."""
    left = list(sets)
    chosen: list[int] = []
    while left:
        best = max(range(count), key=lambda f: (sum(f in s for s in left), -f))
        chosen.append(best)
        left = [s for s in left if best not in s]
    return sorted(chosen)


class SceneCaption(Task):
    """A paragraph about a scene in which every sentence states checked facts."""

    id = "scene_caption"
    family = "SAR"
    capability = "CR"
    group = "rel"
    dimension = "rel"
    views = "1-8"
    needs = frozenset({"metric", "gravity"})
    forms = ("OE",)
    variants = ("image", "views")

    def propose(self, ctx: SceneContext, rng: Generator) -> Iterator[Args]:
        """Single frames, and up to eight frames of the scene together."""
        if ctx.num_frames > 1:
            frames = [ctx.view(f).frame_id for f in ctx.video_frames(8)]
            yield {"variant": "views", "frames": frames}
        for frame in shuffled(rng, ctx.scene.frames):
            yield {"variant": "image", "frames": [ctx.view(frame).frame_id]}

    def derive(self, ctx: SceneContext, args: Args) -> Derived:
        """Ordered list of facts."""
        frames = [ctx.frame_of[frame] for frame in args["frames"]]
        facts = caption_facts(ctx, frames)
        require_count(facts, MIN_FACTS, Reason.TOO_FEW_FACTS)
        weakest = min(fact.margin for fact in facts)
        return Derived(
            [fact.record() for fact in facts],
            Margin("facts", max(weakest, 1.0), 1.0),
            {"facts": [fact.record() for fact in facts]},
        )

    def phrase(self, ctx: SceneContext, args: Args, derived: Derived, write: Writer) -> QA:
        """One sentence per fact."""
        write.show([ctx.frame_of[frame] for frame in args["frames"]])
        write.in_sentence = False
        several = args["variant"] == "views"
        text = caption_text(ctx, derived.answer, write.draws, limit=270 if several else 180)
        return write.qa(write.turn("text", text, {}, variant=args["variant"], hint=False))


class LocationText(Task):
    """A sentence that says where an object is, with at most three facts that single it out."""

    id = "location_text"
    family = "SR"
    capability = "SR"
    group = "rel"
    dimension = "rel"
    forms = ("OE",)
    needs = frozenset({"gravity"})

    def propose(self, ctx: SceneContext, rng: Generator) -> Iterator[Args]:
        """One clean object of a frame and up to three relations to landmarks."""
        for frame in shuffled(rng, ctx.scene.frames):
            view = ctx.view(frame)
            edges = view_edges(ctx, view)
            for obj in (view.clean[i] for i in shuffled(rng, view.clean)):
                own = [e for e in edges if e.a == obj and e.relation in LOCATION_WORDS]
                own = [e for e in own if len(ctx.by_label[ctx.labels[e.b]]) == 1]
                kinds: dict[str, Any] = {}
                for i in shuffled(rng, own):
                    kinds.setdefault(own[i].relation, own[i])
                chosen = list(kinds.values())[:3]
                if len(chosen) >= 2:
                    yield {
                        "variant": "",
                        "frames": [view.frame_id],
                        "objects": [obj],
                        "relations": [[e.relation, e.b] for e in chosen],
                    }

    def derive(self, ctx: SceneContext, args: Args) -> Derived:
        """The relations, each re-checked; together no other instance of the label fulfils them."""
        view = ctx.view(args["frames"][0])
        obj = args["objects"][0]
        ctx.require_clean(view, (obj,))
        edges = {(e.relation, e.a, e.b): e.margin for e in view_edges(ctx, view)}
        margins = []
        for relation, landmark in args["relations"]:
            if (relation, obj, landmark) not in edges:
                raise Reject(Reason.MARGIN, f"{relation} {landmark}")
            margins.append(edges[relation, obj, landmark])
        for rival in ctx.not_hidden(view, ctx.labels[obj]):
            if rival == obj:
                continue
            if not view.is_clean(rival):
                raise Reject(Reason.AMBIGUOUS, f"object {rival}")
            if not any(
                surely_not(ctx, edges, relation, rival, mark)
                for relation, mark in args["relations"]
            ):
                raise Reject(Reason.REFERRAL, f"object {rival} fits as well, or nearly")
        return Derived(args["relations"], Margin("facts", min(margins), 1.0), {})

    def phrase(self, ctx: SceneContext, args: Args, derived: Derived, write: Writer) -> QA:
        """Named by a mark if the label is not enough."""
        write.show([ctx.frame_of[args["frames"][0]]])
        write.in_sentence = False
        obj = args["objects"][0]
        ref = write.name(obj)
        parts = [f"{LOCATION_WORDS[r]} the {ctx.labels[b]}" for r, b in derived.answer]
        text = f"The {ctx.labels[obj]} is {', '.join(parts[:-1])} and {parts[-1]}."
        return write.qa(write.turn("text", text, {"a": ref}, hint=False))


def surely_not(
    ctx: SceneContext, edges: Container[tuple[str, int, int]], relation: str, obj: int, mark: int
) -> bool:
    """Whether an object fails a relation by a margin of its own, not only misses the one that is asked for."""
    if relation == "on":
        return not rests_on(ctx, obj, mark)
    opposite = "far" if relation == "near" else OPPOSITE[relation]
    return obj != mark and (opposite, obj, mark) in edges


LOCATION_WORDS = {
    "left": "to the left of",
    "right": "to the right of",
    "front": "in front of",
    "behind": "behind",
    "above": "higher than",
    "below": "lower than",
    "near": "next to",
    "on": "on top of",
}
