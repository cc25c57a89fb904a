"""What rendered splits share: nothing, if held-out rooms are to say something about generalisation."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import combinations
from typing import get_args

from spatialvlm.errors import SceneError
from spatialvlm.scenes.rooms.appearance import Split
from spatialvlm.scenes.rooms.archetypes import ARCHETYPES, HELD_OUT_SHARE
from spatialvlm.scenes.schema import Scene


@dataclass
class SplitFacts:
    """What was seen of one split."""

    scenes: int = 0
    rooms: set[str] = field(default_factory=set)
    grammars: set[str] = field(default_factory=set)
    lowest_size: float = 1.0
    """Smallest height of a piece as a share of its kind's range; ``realistic`` rooms only."""
    highest_size: float = 0.0


def split_report(scenes: Iterable[Scene]) -> tuple[dict[str, SplitFacts], list[str]]:
    """Facts per split, and everything two splits have in common (empty = disjoint).

    Args:
        scenes: Procedural rooms of all splits; scenes of other sources are left out.

    Raises:
        SceneError: A room of an unknown split.
    """
    facts: dict[str, SplitFacts] = {}
    for scene in scenes:
        if scene.source != "rooms":
            continue
        if scene.split not in get_args(Split):
            raise SceneError(
                f"{scene.scene_id}: split {scene.split!r} is not one of {', '.join(get_args(Split))}."
            )
        own = facts.setdefault(scene.split, SplitFacts())
        own.scenes += 1
        own.rooms.add(scene.room_id)
        if scene.extra["preset"] in ("turntable", "blocks"):
            continue
        own.grammars.add(scene.extra["grammar"])
        if scene.extra["preset"] == "realistic":
            for item in scene.objects:
                low, high = ARCHETYPES[item.label].height
                share = (float(item.size[2]) - low) / (high - low)
                own.lowest_size = min(own.lowest_size, share)
                own.highest_size = max(own.highest_size, share)
    shared = []
    for a, b in combinations(sorted(facts), 2):
        for what, common in (
            ("room", facts[a].rooms & facts[b].rooms),
            ("grammar", facts[a].grammars & facts[b].grammars),
        ):
            shared += [f"{a} and {b} share {what} {name}" for name in sorted(map(str, common))]
    for split, own in facts.items():
        if split == "train" and own.highest_size > HELD_OUT_SHARE + 0.01:
            shared.append(f"train has sizes of the held-out range ({own.highest_size:.2f})")
        if split != "train" and own.lowest_size < HELD_OUT_SHARE - 0.01:
            shared.append(f"{split} has sizes of the training range ({own.lowest_size:.2f})")
    return facts, shared
