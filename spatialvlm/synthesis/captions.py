"""Scene captions made of facts: every sentence can be checked again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from spatialvlm.answers import number_text
from spatialvlm.synthesis.context import SceneContext
from spatialvlm.synthesis.rows import Draws
from spatialvlm.synthesis.scene_graph import nearness, rests_on, view_edges
from spatialvlm.synthesis.wording import plural

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
MAX_OF_KIND = {"relation": 10, "distance": 4, "size": 4, "support": 4, "count": 4}


@dataclass(frozen=True)
class Fact:
    """One statement: kind, object indices, and what is said about them."""

    kind: str
    """``room``, ``camera``, ``count``, ``support``, ``distance``, ``size`` or ``relation``."""
    objects: tuple[int, ...]
    value: Any
    margin: float = 1.0

    def record(self) -> dict[str, Any]:
        """JSON form."""
        value = round(self.value, 6) if isinstance(self.value, float) else self.value
        return {"kind": self.kind, "objects": list(self.objects), "value": value}


def caption_facts(ctx: SceneContext, frames: Sequence[int]) -> list[Fact]:
    """Facts about what the frames show, general ones first.

    Objects with a label of their own that are clean in one of the frames are talked about; counts need
    every instance of the label to be clearly visible or clearly hidden.
    """
    views = [ctx.view(frame) for frame in frames]
    clean = sorted({obj for view in views for obj in view.clean})
    unique = [obj for obj in clean if len(ctx.by_label[ctx.labels[obj]]) == 1]
    facts: list[Fact] = []
    if len(frames) > 1:
        if ctx.area_m2 is not None:
            facts.append(Fact("room", (), float(ctx.area_m2)))
        path = [view.camera.centre for view in views]
        length = sum(float(abs(((b - a) ** 2).sum()) ** 0.5) for a, b in pairwise(path))
        facts.append(Fact("camera", (), length))
    for label, same in sorted(ctx.by_label.items()):
        seen = [o for o in same if any(view.state(o) == "visible" for view in views)]
        unclear = [
            o for o in same if o not in seen and any(v.state(o) == "ambiguous" for v in views)
        ]
        if len(seen) > 1 and not unclear and label not in ctx.scene.count_conflicts:
            facts.append(Fact("count", tuple(seen), len(seen)))
    for top in unique:
        facts += [
            Fact("support", (top, b), "on") for b in unique if b != top and rests_on(ctx, top, b)
        ]
    pairs = sorted(
        (round(ctx.distances[a][b], 6), a, b)
        for i, a in enumerate(unique)
        for b in unique[i + 1 :]
        if 0.2 <= ctx.distances[a][b] <= 8.0
    )
    facts += [Fact("distance", (a, b), gap) for gap, a, b in pairs[: MAX_OF_KIND["distance"]]]
    tall = sorted(unique, key=lambda obj: (-ctx.size_list[obj][2], obj))
    facts += [
        Fact("size", (obj,), ctx.size_list[obj][2])
        for obj in tall[: MAX_OF_KIND["size"]]
        if ctx.upright[obj]
    ]
    facts += _relations(ctx, frames, unique)
    return _capped(facts)


def _relations(ctx: SceneContext, frames: Sequence[int], unique: Sequence[int]) -> list[Fact]:
    """Left/right and front/behind of unique objects, with the view they hold in."""
    facts: list[Fact] = []
    said: set[frozenset[int]] = set()
    for position, frame in enumerate(frames):
        edges = [
            edge
            for edge in view_edges(ctx, ctx.view(frame))
            if edge.relation in ("left", "front") and edge.a in unique and edge.b in unique
        ]
        for edge in sorted(edges, key=lambda e: (nearness(ctx, e.a, e.b), e.a, e.b, e.relation)):
            key = frozenset((edge.a, edge.b))
            if key not in said:
                said.add(key)
                facts.append(
                    Fact("relation", (edge.a, edge.b), [edge.relation, position], edge.margin)
                )
    return facts


def _capped(facts: Sequence[Fact]) -> list[Fact]:
    kept: list[Fact] = []
    for fact in facts:
        same = sum(other.kind == fact.kind for other in kept)
        if same < MAX_OF_KIND.get(fact.kind, 1):
            kept.append(fact)
    return kept


def caption_text(
    ctx: SceneContext, facts: Sequence[dict[str, Any]], draws: Draws, *, limit: int
) -> str:
    """Write the facts as sentences until about ``limit`` words are reached."""
    several = any(fact["kind"] == "camera" for fact in facts)
    sentences: list[str] = []
    words = 0
    for fact in facts:
        sentence = _sentence(ctx, fact, draws, several=several)
        words += len(sentence.split())
        if words > limit:
            break
        sentences.append(sentence)
    return " ".join(sentences)


def _sentence(ctx: SceneContext, fact: dict[str, Any], draws: Draws, *, several: bool) -> str:
    names = [f"the {ctx.labels[obj]}" for obj in fact["objects"]]
    value = fact["value"]
    kind = fact["kind"]
    if kind == "room":
        area = number_text(value, 1)
        return draws.choice(
            [
                f"The room has a floor area of about {area} square meters.",
                f"This room covers roughly {area} square meters.",
                f"The floor of the room measures about {area} square meters.",
            ]
        )
    if kind == "camera":
        return f"Over these views the camera moves about {number_text(value, 1)} meters."
    if kind == "count":
        label = ctx.labels[fact["objects"][0]]
        number = NUMBERS[value] if value < len(NUMBERS) else str(value)
        return draws.choice(
            [
                f"{number.capitalize()} {plural(label)} can be seen.",
                f"There are {number} {plural(label)}.",
            ]
        )
    if kind == "support":
        return f"{names[0].capitalize()} stands on {names[1]}."
    if kind == "distance":
        gap = number_text(value, 2)
        return draws.choice(
            [
                f"{names[0].capitalize()} and {names[1]} are {gap} meters apart at their closest points.",
                f"The closest points of {names[0]} and {names[1]} are {gap} meters apart.",
                f"Between {names[0]} and {names[1]} there is a gap of {gap} meters.",
            ]
        )
    if kind == "size":
        height = number_text(value, 2)
        return draws.choice(
            [
                f"{names[0].capitalize()} is {height} meters tall.",
                f"{names[0].capitalize()} reaches a height of {height} meters from bottom to top.",
            ]
        )
    relation, position = value
    where = f"In view {position + 1}, " if several else "Seen from the camera, "
    phrase = {"left": "to the left of", "front": "in front of"}[relation]
    return f"{where}{names[0]} is {phrase} {names[1]}."
