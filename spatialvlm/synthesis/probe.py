"""A probe that answers questions from their text alone.

A ridge classifier on hashed words of the question and its options, trained on some rooms and tested on
others; numbers are regressed on a log scale.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from spatialvlm.scenes.transforms import Array
from spatialvlm.synthesis.rows import hashed

NUM_FEATURES = 512
FOLDS = 5
MIN_PROBE_ROWS = 60
MAX_CLASSES = 40
RIDGE = 10.0
MRA_THRESHOLDS = np.arange(0.5, 1.0, 0.05)

Row = Mapping[str, Any]
Kind = tuple[str, int, str | None]
"""Form, number of options, unit: what everybody sees of a question."""


def target_of(row: Row) -> str:
    """What a text-only model would have to guess: the letter of an option, or the short answer."""
    if row["answer_type"] == "mcq":
        return str(row["answer_text"])
    return str(row["answer_text"])[:60]


def question_of(row: Row) -> str:
    """Question of the first turn without markers."""
    first = next(m["content"] for m in row["messages"] if m["role"] == "user")
    return re.sub(r"^(?:<image>\n|<video>\n)+", "", first)


def number_of(row: Row) -> float:
    """Numeric answer (of the first turn) in base units."""
    answers = json.loads(row["answer_json"])
    value = answers[0] if isinstance(answers, list) else answers
    return float(value) / (100.0 if row["unit"] == "cm" else 1.0)


@dataclass(slots=True)
class Case:
    """What the probe needs of a row."""

    id: str
    room: str
    kind: Kind
    target: str
    number: float | None
    """Value in base units where the answer is a number."""
    chance: float
    features: list[int]


def case_of(row: Row) -> Case:
    """The part of a row that the probe looks at."""
    return Case(
        id=row["id"],
        room=row["room_id"],
        kind=(row["form"], len(row["options"]), row["unit"]),
        target=target_of(row),
        number=number_of(row) if row["answer_type"] == "number" else None,
        chance=chance(row),
        features=features(row),
    )


def features(row: Row) -> list[int]:
    """Hashed words and word pairs of the question and its options, as column numbers."""
    words = re.findall(r"[a-z0-9]+", question_of(row).lower())
    grams = [*words, *(f"{a} {b}" for a, b in pairwise(words))]
    grams += [f"option {i} {text.lower()}" for i, text in enumerate(row["options"])]
    return [_column(gram) for gram in grams]


@lru_cache(maxsize=1 << 18)
def _column(gram: str) -> int:
    return hashed("gram", gram, size=4) % NUM_FEATURES


def _matrix(cases: Sequence[Case]) -> Array:
    """``[rows, features + 1]``, ones where a feature occurs and in the last column."""
    matrix = np.zeros((len(cases), NUM_FEATURES + 1))
    matrix[:, -1] = 1.0
    for i, case in enumerate(cases):
        matrix[i, case.features] = 1.0
    return matrix


def probe(cases: Sequence[Case]) -> tuple[float | None, float | None]:
    """Cross-validated score of the text-only probe and of the best constant, rooms kept together.

    Returns:
        Accuracies (mean relative accuracies for numbers), or twice ``None`` with too few rows or rooms.
    """
    rooms = {case.room for case in cases}
    if len(cases) < MIN_PROBE_ROWS or len(rooms) < FOLDS:
        return None, None
    folds = np.array([hashed("fold", case.room) % FOLDS for case in cases])
    matrix = _matrix(cases)
    numbers = [case.number for case in cases]
    if None not in numbers:
        return _probe_numbers(matrix, np.array(numbers, dtype=float), folds)
    targets = [case.target for case in cases]
    classes = [word for word, _ in Counter(targets).most_common(MAX_CLASSES)]
    index = {word: i for i, word in enumerate(classes)}
    labels = np.array([index.get(word, -1) for word in targets])
    return _probe_classes(matrix, labels, folds, len(classes)), best_constant(cases)


def best_constant(cases: Sequence[Case]) -> float:
    """Accuracy of the best constant per kind of question, or of chance where that is higher.

    A question that names the objects to choose from can be answered by any of them.
    """
    groups: dict[Kind, list[Case]] = defaultdict(list)
    for case in cases:
        groups[case.kind].append(case)
    right = 0.0
    for group in groups.values():
        common = Counter(case.target for case in group).most_common(1)[0][1]
        right += max(float(common), sum(case.chance for case in group))
    return right / len(cases)


def chance(row: Row) -> float:
    """Probability of a right guess among what the question offers; 0 for open questions."""
    if row["options"]:
        return 1.0 / len(row["options"])
    if row["answer_type"] == "yesno":
        return 0.5
    slots = json.loads(row["slots"])
    named = [slot for slot in slots if any(span[0] % 2 == 0 for span in slot["spans"])]
    offered = any(any(span[0] % 2 for span in slot["spans"]) for slot in slots)
    return 1.0 / len(named) if offered and len(named) > 1 else 0.0


def _ridge(matrix: Array, targets: Array) -> Array:
    gram = matrix.T @ matrix + RIDGE * np.eye(matrix.shape[1])
    weights: Array = np.linalg.solve(gram, matrix.T @ targets)
    return weights


def _probe_classes(matrix: Array, labels: Array, folds: Array, count: int) -> float:
    """Accuracy of the probe on rooms it was not trained on."""
    right = total = 0
    for fold in np.unique(folds):
        test = folds == fold
        train = ~test & (labels >= 0)
        if not train.any():
            continue
        onehot = np.eye(count)[labels[train]]
        guess = (matrix[test] @ _ridge(matrix[train], onehot)).argmax(axis=1)
        right += int((guess == labels[test]).sum())
        total += int(test.sum())
    return right / total if total else 0.0


def _probe_numbers(matrix: Array, values: Array, folds: Array) -> tuple[float, float]:
    guesses, fixed = np.zeros_like(values), np.zeros_like(values)
    logs = np.log(np.maximum(np.abs(values), 1e-3))
    for fold in np.unique(folds):
        test = folds == fold
        mean = logs[~test].mean() if (~test).any() else 0.0
        weights = _ridge(matrix[~test], logs[~test] - mean)
        guesses[test] = np.exp(matrix[test] @ weights + mean)
        fixed[test] = np.median(np.abs(values[~test])) if (~test).any() else 1.0
    return _mra(guesses, np.abs(values)), _mra(fixed, np.abs(values))


def _mra(guess: Array, truth: Array) -> float:
    """Mean relative accuracy as in VSI-Bench."""
    error = np.abs(guess - truth) / np.maximum(truth, 1e-6)
    return float((error[:, None] <= 1 - MRA_THRESHOLDS[None] + 1e-9).mean())


def most_predictable(cases: Sequence[Case], share: float, sample: Sequence[Case]) -> list[str]:
    """Ids of the rows that a probe trained on ``sample`` gets most surely right; memory is that of the sample."""
    numeric = all(case.number is not None for case in cases)
    common = Counter(case.target for case in sample).most_common(MAX_CLASSES)
    index = {word: i for i, (word, _) in enumerate(common)}

    def truth(some: Sequence[Case]) -> Array:
        """Logarithms of the numbers, or class numbers."""
        if numeric:
            values = np.array([case.number for case in some], dtype=float)
            return np.asarray(np.log(np.maximum(np.abs(values), 1e-3)))
        return np.array([index.get(case.target, -1) for case in some])

    known = truth(sample)
    mean = known.mean() if numeric else 0.0
    targets = known - mean if numeric else (known[:, None] == np.arange(len(index))) * 1.0
    weights = _ridge(_matrix(sample), targets)

    def sureness(some: Sequence[Case]) -> Array:
        guess, own = _matrix(some) @ weights, truth(some)
        if numeric:
            return np.asarray(-np.abs(guess + mean - own))
        return np.where(own >= 0, guess[np.arange(len(some)), own], -np.inf)

    sure = np.concatenate(
        [sureness(cases[i : i + len(sample)]) for i in range(0, len(cases), len(sample))]
    )
    order = np.argsort(-sure, kind="stable")[: max(1, int(share * len(cases)))]
    return [cases[i].id for i in order.tolist()]
