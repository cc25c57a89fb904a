"""Scores that need no model: guessing, and the best constant answer."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from spatialvlm.evaluation.metrics import mra
from spatialvlm.evaluation.schema import Item
from spatialvlm.evaluation.structured import SLACK, rotation_error


def best_constant_number(golds: Sequence[float]) -> float:
    """The gold value that, answered always, has the highest mean relative accuracy."""
    values = np.array([gold for gold in golds if gold > 0], dtype=float)
    if not len(values):
        return 0.0
    candidates = np.unique(values)
    means = [float(mra(np.full_like(values, c), values).mean()) for c in candidates]
    return float(candidates[int(np.argmax(means))])


def _angle_hits(degrees: float, items: Sequence[Item]) -> list[bool]:
    """Which golds of rotations an angle meets within 15 degrees."""
    return [
        rotation_error(degrees, item.gold["deg"], unsigned=item.gold["unsigned"]) <= 15 + SLACK
        for item in items
    ]


def _key(gold: Any) -> str:
    return repr(gold["cell"]) if isinstance(gold, dict) and "cell" in gold else repr(gold)


def chance_scores(items: Sequence[Item], reference: Sequence[Item] | None = None) -> list[float]:
    """Expected score of each item without a model.

    Choices: 1/k. Yes or no: 1/2. Numbers: the constant with the best mean relative accuracy of the question
    type. Rotations: the angle that is within 15 degrees of most golds. Cells, texts and lists: the most frequent answer of the type. Boxes: 0.

    Args:
        items: Items to score.
        reference: Where the constants come from, ideally training rows; default the items themselves, which
            makes the baseline stronger than an honest constant could be.
    """
    pool: dict[tuple[str, str], list[Item]] = defaultdict(list)
    for item in items if reference is None else reference:
        pool[item.question_type, item.kind].append(item)
    constants: dict[tuple[str, str], Any] = {}
    for key, members in pool.items():
        if key[1] in ("number", "count"):
            constants[key] = best_constant_number([item.gold for item in members])
        elif key[1] == "angle":
            golds = sorted({item.gold["deg"] for item in members})
            constants[key] = max(golds, key=lambda g: sum(_angle_hits(g, members)))
        else:
            constants[key] = Counter(_key(item.gold) for item in members).most_common(1)[0][0]
    scores = []
    for item in items:
        constant = constants.get((item.question_type, item.kind))
        if item.options:
            scores.append(1 / len(item.options))
        elif item.kind == "yesno":
            scores.append(0.5)
        elif item.kind in ("json", "box7", "box") or constant is None:
            scores.append(0.0)
        elif item.kind == "angle":
            scores.append(float(_angle_hits(constant, [item])[0]))
        elif item.kind in ("number", "count"):
            positive = item.gold > 0
            scores.append(
                float(mra(constant, item.gold)[0]) if positive else float(constant == item.gold)
            )
        else:
            scores.append(float(_key(item.gold) == constant))
    return scores
