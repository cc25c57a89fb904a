"""How much of a benchmark can be answered without looking: priors, a random forest, iterative pruning.

Everything a diagnostic knows about a held-out item comes from its question and options and from the training folds;
the answers of held-out items must not change any feature (tested). Scores are P(gold) for choices and the mean
relative accuracy for numbers, in [0, 1]. After "Benchmark Designers Should Train on the Test Set" (arXiv 2511.04655).
"""

import hashlib
import itertools
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from spatialvlm.errors import ConfigError
from spatialvlm.evaluation.chance import best_constant_number
from spatialvlm.evaluation.metrics import estimate, mra
from spatialvlm.evaluation.schema import Item

HASHED = 64
"""Buckets of question n-grams."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What a diagnostic says about one item."""

    item: Item
    score: float
    """P(gold) or mean relative accuracy."""
    predicted: str
    right: float
    """1 if the arg-max is the gold; for numbers the same as ``score``."""
    fold: int
    base: float = 0.0
    """Score before training (tst-llm)."""


def usable(items: Sequence[Item]) -> list[Item]:
    """Choice and number items, the ones that diagnostics can predict."""
    return [item for item in items if item.options or item.kind in ("number", "count")]


def make_folds(
    items: Sequence[Item], num: int = 5, seed: int = 42, *, group: str = "scene"
) -> Int[np.ndarray, " n"]:
    """Folds of equal size in which no scene is split and the answers are balanced as far as that allows.

    Args:
        items: To split.
        num: Folds.
        seed: Of the order.
        group: ``scene`` keeps clusters together, ``item`` does not.

    Raises:
        ConfigError: Fewer groups than folds.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for i, item in enumerate(items):
        groups[item.cluster if group == "scene" else f"{i}"].append(i)
    if len(groups) < num:
        raise ConfigError(
            f"{len(groups)} {group}s cannot be split into {num} folds; lower --folds or use --group item"
        )
    order = sorted(groups)
    random.Random(seed).shuffle(order)
    order.sort(key=lambda name: -len(groups[name]))
    answers = [
        f"{item.question_type}|{item.gold}" if item.options else item.question_type
        for item in items
    ]
    counts: list[Counter[str]] = [Counter() for _ in range(num)]
    sizes = [0] * num
    fold = np.zeros(len(items), dtype=np.int64)
    for name in order:
        members = groups[name]
        least = min(sizes)
        # Among the folds that are not ahead, the one with the fewest of these answers.
        open_folds = [f for f in range(num) if sizes[f] <= least + len(members)]
        chosen = min(
            open_folds, key=lambda f: (sum(counts[f][answers[i]] for i in members), sizes[f], f)
        )
        for i in members:
            fold[i] = chosen
            counts[chosen][answers[i]] += 1
        sizes[chosen] += len(members)
    return fold


# ------------------------------------------------------------------------------------------------------ priors


def plain(text: str) -> str:
    """Words of a text in lower case."""
    return " ".join(re.findall(r"\w+", text.lower()))


class OptionPrior:
    """How often an option text was right where it was offered, per question type: ``(gold + 1) / (seen + 4)``."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.seen: Counter[tuple[str, str]] = Counter()
        self.gold: Counter[tuple[str, str]] = Counter()
        self.letters: Counter[tuple[str, str]] = Counter()
        for item in items:
            for letter, text in item.options.items():
                self.seen[item.question_type, plain(text)] += 1
                self.gold[item.question_type, plain(text)] += letter == item.gold
            self.letters[item.question_type, str(item.gold)] += 1

    def of(self, item: Item) -> dict[str, float]:
        """Prior of every offered letter (not normalised)."""
        keys = {letter: (item.question_type, plain(text)) for letter, text in item.options.items()}
        return {letter: (self.gold[key] + 1) / (self.seen[key] + 4) for letter, key in keys.items()}

    def letter(self, item: Item) -> str:
        """The most frequent gold letter of the type among the offered ones."""
        return max(
            item.options,
            key=lambda letter: (self.letters[item.question_type, letter], -ord(letter[0])),
        )


def _numbers(items: Sequence[Item]) -> dict[str, list[float]]:
    golds: dict[str, list[float]] = defaultdict(list)
    for item in items:
        if not item.options:
            golds[item.question_type].append(float(item.gold))
    return golds


def _number(item: Item, value: float, fold: int) -> Diagnosis:
    score = float(mra(value, item.gold)[0]) if item.gold > 0 else float(value == item.gold)
    return Diagnosis(item, score, f"{value:g}", score, fold)


def _choice(item: Item, weights: Mapping[str, float], fold: int) -> Diagnosis:
    total = sum(weights.values())
    best = max(weights, key=lambda letter: weights[letter])
    share = weights[item.gold] / total if total > 0 else 1 / len(weights)
    return Diagnosis(item, share, best, float(best == item.gold), fold)


PRIORS = ("option_text", "majority_letter")


def diagnose_priors(
    items: Sequence[Item], fold: Int[np.ndarray, " n"], *, prior: str = "option_text"
) -> list[Diagnosis]:
    """Predict every item from the statistics of the other folds.

    Args:
        items: From :func:`usable`.
        fold: From :func:`make_folds`.
        prior: ``option_text`` or ``majority_letter``; numbers take the constant with the best mean MRA.
    """
    found: list[Diagnosis | None] = [None] * len(items)
    for f in range(int(fold.max()) + 1):
        train = [item for item, own in zip(items, fold, strict=True) if own != f]
        table, golds = OptionPrior(train), _numbers(train)
        constants = {name: best_constant_number(values) for name, values in golds.items()}
        everything = best_constant_number([v for values in golds.values() for v in values])
        for i, item in enumerate(items):
            if fold[i] != f:
                continue
            if not item.options:
                found[i] = _number(item, constants.get(item.question_type, everything), f)
            elif prior == "option_text":
                found[i] = _choice(item, table.of(item), f)
            else:
                letter = table.letter(item)
                found[i] = _choice(item, {x: float(x == letter) for x in item.options}, f)
    return [d for d in found if d is not None]


# ---------------------------------------------------------------------------------------------- random forest


def _bucket(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") % HASHED


def question_grams(item: Item) -> Float[np.ndarray, " b"]:
    """Hashed word uni- and bigrams of the question."""
    words = plain(str(item.row.get("question", ""))).split()
    vector = np.zeros(HASHED)
    for gram in [*words, *(" ".join(pair) for pair in itertools.pairwise(words))]:
        vector[_bucket(gram)] += 1
    return vector


class Features:
    """Features of items from the statistics of a training fold; never from the item's own answer."""

    def __init__(self, train: Sequence[Item]) -> None:
        self.prior = OptionPrior(train)
        self.pairs: Counter[tuple[str, str, str]] = Counter()
        self.words: dict[str, list[float]] = defaultdict(list)
        for item in train:
            for pair in self._pairs(item):
                self.pairs[pair] += 1
            if not item.options:
                for word in set(plain(str(item.row.get("question", ""))).split()):
                    self.words[word].append(float(item.gold))

    @staticmethod
    def _pairs(item: Item) -> list[tuple[str, str, str]]:
        texts = sorted(plain(text) for text in item.options.values())
        return [(item.question_type, a, b) for i, a in enumerate(texts) for b in texts[i + 1 :]]

    def choice(self, item: Item) -> Float[np.ndarray, "k f"]:
        """One row per offered option: prior, rank of the prior, position, length, pair frequency, question."""
        priors = self.prior.of(item)
        order = sorted(priors, key=lambda letter: -priors[letter])
        grams = question_grams(item)
        pair = float(np.mean([self.pairs[p] for p in self._pairs(item)] or [0]))
        rows = []
        for position, (letter, text) in enumerate(item.options.items()):
            own = [
                priors[letter],
                order.index(letter),
                position,
                len(text),
                len(item.options),
                pair,
                _bucket(plain(text)),
            ]
            rows.append(np.concatenate([own, grams]))
        return np.array(rows)

    def number(self, item: Item) -> Float[np.ndarray, " f"]:
        """Statistics of training answers of questions that share a word: mean, spread, log mean, count."""
        words = [
            w for w in set(plain(str(item.row.get("question", ""))).split()) if w in self.words
        ]
        rare = sorted(words, key=lambda w: (len(self.words[w]), w))[:3]
        own: list[float] = []
        for rank in range(3):
            values = self.words[rare[rank]] if rank < len(rare) else []
            array = np.array(values or [0.0])
            own += [
                float(array.mean()),
                float(array.std()),
                float(np.log1p(np.abs(array)).mean()),
                len(values),
            ]
        return np.concatenate([own, question_grams(item)])


def diagnose_forest(
    items: Sequence[Item], fold: Int[np.ndarray, " n"], *, seed: int = 42
) -> list[Diagnosis]:
    """Random forests per question type: 100 trees over options, 200 over numbers.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    try:
        from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
    except ImportError:
        raise ConfigError(
            'the random forest needs scikit-learn: pip install -e ".[audit]"'
        ) from None

    found: list[Diagnosis | None] = [None] * len(items)
    names = sorted({(item.question_type, bool(item.options)) for item in items})
    for f in range(int(fold.max()) + 1):
        train_all = [item for item, own in zip(items, fold, strict=True) if own != f]
        features = Features(train_all)
        for name, is_choice in names:
            train = [
                i for i in train_all if (i.question_type, bool(i.options)) == (name, is_choice)
            ]
            held = [
                k for k, item in enumerate(items)
                if fold[k] == f and (item.question_type, bool(item.options)) == (name, is_choice)
            ]  # fmt: skip
            if not held:
                continue
            if not train:
                for k in held:
                    item = items[k]
                    found[k] = (
                        _choice(item, dict.fromkeys(item.options, 1.0), f)
                        if is_choice
                        else _number(item, 0.0, f)
                    )
                continue
            if is_choice:
                x = np.concatenate([features.choice(item) for item in train])
                y = np.array([letter == item.gold for item in train for letter in item.options])
                forest = RandomForestClassifier(
                    100, min_samples_leaf=2, random_state=seed, n_jobs=1
                ).fit(x, y)
                column = list(forest.classes_).index(True)
                rows = [features.choice(items[k]) for k in held]
                weights = forest.predict_proba(np.concatenate(rows))[:, column]
                start = 0
                for k, part in zip(held, rows, strict=True):
                    own = weights[start : start + len(part)] + 1e-6
                    start += len(part)
                    found[k] = _choice(
                        items[k], dict(zip(items[k].options, own.tolist(), strict=True)), f
                    )
            else:
                x = np.array([features.number(item) for item in train])
                y = np.log1p([max(float(item.gold), 0.0) for item in train])
                regressor = RandomForestRegressor(
                    200, min_samples_leaf=2, random_state=seed, n_jobs=1
                ).fit(x, y)
                values = np.expm1(
                    regressor.predict(np.array([features.number(items[k]) for k in held]))
                )
                for k, value in zip(held, values, strict=True):
                    found[k] = _number(items[k], float(value), f)
    return [d for d in found if d is not None]


def summary(found: Sequence[Diagnosis]) -> dict[str, Any]:
    """Accuracy and mean score, micro and macro over question types, beside chance, in percent."""
    by_type: dict[str, list[Diagnosis]] = defaultdict(list)
    for d in found:
        by_type[d.item.question_type].append(d)

    def block(part: Sequence[Diagnosis]) -> dict[str, Any]:
        clusters = [d.item.cluster for d in part]
        right = estimate([d.right for d in part], clusters)
        score = estimate([d.score for d in part], clusters)
        chance = [1 / len(d.item.options) for d in part if d.item.options]
        return {
            "accuracy": right.value,
            "accuracy_se": right.se,
            "score": score.value,
            "chance": 100 * sum(chance) / len(chance) if chance else None,
            "n": len(part),
        }

    types = {name: block(part) for name, part in sorted(by_type.items())}
    macro = sum(row["accuracy"] for row in types.values()) / len(types)
    return {"micro": block(found), "macro_accuracy": macro, "per_type": types}


# -------------------------------------------------------------------------------------------------- pruning

Diagnostic = Callable[[list[Item]], list[Diagnosis]]


@dataclass(frozen=True, slots=True)
class Pruned:
    """Result of iterative pruning."""

    removed: list[str]
    """Ids in the order of removal."""
    kept: list[str]
    rounds: int
    control: list[list[str]]
    """Kept ids of random removals with the same number per question type."""


def largest_remainder(shares: Mapping[str, int], total: int) -> dict[str, int]:
    """Split ``total`` in proportion to ``shares``, as whole numbers that add up."""
    whole = sum(shares.values())
    exact = {name: total * count / whole for name, count in shares.items()}
    quota = {name: int(value) for name, value in exact.items()}
    left = sorted(exact, key=lambda name: (quota[name] - exact[name], name))
    for name in left[: total - sum(quota.values())]:
        quota[name] += 1
    return quota


def prune(
    items: Sequence[Item],
    diagnose: Diagnostic,
    *,
    budget: int,
    batch: int = 50,
    threshold: float = 0.0,
    floor: int = 10,
    alloc: str = "per_type",
    control_seeds: int = 10,
    key: Callable[[Diagnosis], float] = lambda d: d.score,
) -> Pruned:
    """Iterative bias pruning with its matched random control.

    Diagnose what remains, remove the most predictable items, repeat until the budget is spent or nothing is above
    the threshold.

    Args:
        items: From :func:`usable`.
        diagnose: Runs on the items that remain.
        budget: Items to remove in all.
        batch: Items per round.
        threshold: Stop when no score is above it.
        floor: Items kept per question type.
        alloc: ``global`` ranks all together (choices and numbers mix), ``per_format``, ``per_type``.
        control_seeds: Random removals for the control.
        key: What ranks the items.

    Raises:
        ConfigError: Unknown ``alloc``.
    """
    if alloc not in ("global", "per_format", "per_type"):
        raise ConfigError(f"alloc {alloc!r} is not one of: global, per_format, per_type")

    def stratum(item: Item) -> str:
        if alloc == "global":
            return "all"
        return (
            ("choice" if item.options else "number")
            if alloc == "per_format"
            else item.question_type
        )

    remaining = {item.key: item for item in items}
    per_type = Counter(item.question_type for item in items)
    quotas = largest_remainder(Counter(stratum(item) for item in items), budget)
    removed: list[Item] = []
    rounds = 0
    while sum(quotas.values()) > 0:
        ranked = sorted(
            diagnose(list(remaining.values())), key=lambda d: (-round(key(d), 12), d.item.id)
        )
        taken: list[Item] = []
        for d in ranked:
            item = d.item
            if len(taken) == batch or key(d) <= threshold:
                break
            if quotas[stratum(item)] > 0 and per_type[item.question_type] > floor:
                taken.append(item)
                quotas[stratum(item)] -= 1
                per_type[item.question_type] -= 1
        if not taken:
            break
        rounds += 1
        removed += taken
        for item in taken:
            del remaining[item.key]
    lost = Counter(item.question_type for item in removed)
    controls = []
    for seed in range(control_seeds):
        rng = random.Random(seed)
        gone: set[str] = set()
        for name in sorted(lost):
            pool = sorted(item.id for item in items if item.question_type == name)
            gone |= set(rng.sample(pool, lost[name]))
        controls.append([item.id for item in items if item.id not in gone])
    kept = [item.id for item in items if item.key in remaining]
    return Pruned([item.id for item in removed], kept, rounds, controls)
