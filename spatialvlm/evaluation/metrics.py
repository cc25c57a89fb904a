"""Scores from items: mean relative accuracy, chance-adjusted accuracy, macro means, clustered errors.

Item scores are in [0, 1]; functions named ``*_percent`` and every :class:`Estimate` are in percent. Only numpy.
"""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

MRA_THRESHOLDS: Float[np.ndarray, " 10"] = np.linspace(0.5, 0.95, 10)
"""VSI-Bench's confidence thresholds as numpy computes them: the ninth is 0.8999999999999999, and scores
on a threshold depend on that."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A percentage with its standard error (``None``: fewer than two clusters)."""

    value: float
    se: float | None
    n: int
    clusters: int

    @property
    def ci95(self) -> tuple[float, float] | None:
        """Value plus and minus 1.96 standard errors."""
        if self.se is None:
            return None
        return self.value - 1.96 * self.se, self.value + 1.96 * self.se


def mra(
    prediction: Float[np.ndarray, " n"] | float,
    target: Float[np.ndarray, " n"] | float,
    *,
    strict: bool = False,
    signed: bool = True,
) -> Float[np.ndarray, " n"]:
    """Mean relative accuracy (Thinking in Space, arXiv 2412.14171, section 3.2).

    The share of the ten thresholds θ with ``|p − t| / t <= 1 − θ``.

    Args:
        prediction: Predicted numbers.
        target: Gold numbers, positive.
        strict: Use ``<`` (the convention of Benchmark Designers Should Train on the Test Set).
        signed: ``False`` divides by ``|t|`` and takes ``|p − t|`` where t is 0 (EASI).

    Returns:
        Scores in {0, 0.1, ..., 1}, one per pair.
    """
    p = np.atleast_1d(np.asarray(prediction, dtype=float))
    t = np.atleast_1d(np.asarray(target, dtype=float))
    scale = t if signed else np.where(t == 0, 1.0, np.abs(t))
    error = np.abs(p - t) / scale  # [n]
    allowed = 1 - MRA_THRESHOLDS  # [10]
    hit = error[:, None] < allowed if strict else error[:, None] <= allowed
    scores: Float[np.ndarray, " n"] = hit.mean(axis=1)
    return scores


def path_weights(paths: Sequence[tuple[str, ...] | None]) -> Float[np.ndarray, " n"]:
    """Item weights of a nested unweighted mean.

    Each item states the path of its cell, ``("object_rel_direction", "easy")``; siblings at every level get
    equal weight, items of a cell too. All paths empty gives the plain mean. ``None`` leaves an item out.

    Returns:
        Weights that sum to 1 over the items that count.
    """
    children: dict[tuple[str, ...], set[str]] = {}
    size: Counter[tuple[str, ...]] = Counter(path for path in paths if path is not None)
    for path in size:
        for depth, name in enumerate(path):
            children.setdefault(path[:depth], set()).add(name)
    weight = {
        path: 1.0 / (count * math.prod(len(children[path[:depth]]) for depth in range(len(path))))
        for path, count in size.items()
    }
    return np.array([0.0 if path is None else weight[path] for path in paths])


def clustered_se(
    influence: Float[np.ndarray, " n"], clusters: Sequence[Hashable]
) -> tuple[float | None, int]:
    """Standard error of a sum of influences whose clusters are independent.

    ``SE² = G / (G − 1) · Σ_g (Σ_{i in g} e_i)²``, in the unit of ``influence``.

    Returns:
        The standard error (``None`` for a single cluster) and the number of clusters G.
    """
    sums: dict[Hashable, float] = {}
    for value, cluster in zip(influence, clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + float(value)
    num = len(sums)
    if num < 2:
        return None, num
    return math.sqrt(num / (num - 1) * math.fsum(v * v for v in sums.values())), num


def estimate(
    scores: Sequence[float] | Float[np.ndarray, " n"],
    clusters: Sequence[Hashable],
    paths: Sequence[tuple[str, ...] | None] | None = None,
) -> Estimate:
    """Nested mean of item scores in percent with its clustered standard error.

    The influence of item i is ``w_i (s_i − mean of its cell)``.

    Args:
        scores: Item scores in [0, 1].
        clusters: Independent unit of each item (its scene).
        paths: Cell of each item, see :func:`path_weights`; ``None`` is the plain mean.
    """
    keep = [i for i in range(len(scores)) if paths is None or paths[i] is not None]
    if not keep:
        return Estimate(math.nan, None, 0, 0)
    s = np.array([scores[i] for i in keep], dtype=float)
    cells = [() if paths is None else paths[i] for i in keep]
    weights = path_weights(cells)
    sums: dict[tuple[str, ...] | None, list[float]] = {}
    for cell, score in zip(cells, s, strict=True):
        sums.setdefault(cell, []).append(float(score))
    means = {cell: math.fsum(values) / len(values) for cell, values in sums.items()}
    influence = weights * (s - np.array([means[cell] for cell in cells]))
    se, num = clustered_se(influence, [clusters[i] for i in keep])
    value = 100 * math.fsum(weights * s)
    return Estimate(value, None if se is None else 100 * se, len(keep), num)


def caa(
    scores: Sequence[float], num_options: Sequence[int], clusters: Sequence[Hashable]
) -> Estimate:
    """Chance-adjusted accuracy (SITE-Bench, arXiv 2505.05456): ``Σ(X − 1/k) / Σ(1 − 1/k)``, in percent.

    Args:
        scores: Item scores X in [0, 1].
        num_options: Offered options k, at least 2.
        clusters: Independent unit of each item.
    """
    x = np.asarray(scores, dtype=float)
    chance = 1 / np.asarray(num_options, dtype=float)
    room = float((1 - chance).sum())
    value = float((x - chance).sum()) / room
    influence = (x - chance - value * (1 - chance)) / room
    se, num = clustered_se(influence, clusters)
    return Estimate(100 * value, None if se is None else 100 * se, len(x), num)


def group_scores(
    hits: Sequence[float], groups: Sequence[str]
) -> tuple[list[str], Float[np.ndarray, " g"]]:
    """A group is right only if all of its rows are: the minimum of each group, in order of appearance."""
    worst: dict[str, float] = {}
    for hit, group in zip(hits, groups, strict=True):
        worst[group] = min(worst.get(group, 1.0), float(hit))
    return list(worst), np.array(list(worst.values()))


def grouped_estimate(
    hits: Sequence[float], groups: Sequence[str], clusters: Sequence[Hashable]
) -> Estimate:
    """Share of groups that are right; the group is the unit, its cluster that of its first row."""
    names, scores = group_scores(hits, groups)
    first: dict[str, Hashable] = {}
    for group, cluster in zip(groups, clusters, strict=True):
        first.setdefault(group, cluster)
    return estimate(scores, [first[name] for name in names])


def p_value(value: float, se: float | None) -> float | None:
    """Two-sided p of ``value`` under a normal with standard error ``se``."""
    if se is None:
        return None
    if se == 0:
        return 1.0 if value == 0 else 0.0
    return math.erfc(abs(value) / se / math.sqrt(2))


def half_width_percent(num_items: int) -> float:
    """95 % half-width in points of an accuracy of 50 % over independent items."""
    return 100 * 1.96 * 0.5 / math.sqrt(num_items)


def composite(members: Sequence[float | None]) -> float | None:
    """Unweighted mean of benchmark scores; ``None`` as soon as one member is missing."""
    values = [value for value in members if value is not None]
    return sum(values) / len(values) if values and len(values) == len(members) else None


def gaps_to_best(row: Sequence[float], best: Sequence[float]) -> tuple[float, float]:
    """Mean signed gap to the best of each column, and the population standard deviation of the gaps."""
    gaps = np.asarray(row, dtype=float) - np.asarray(best, dtype=float)
    return float(gaps.mean()), float(gaps.std())


def correct_rate(hits: Bool[np.ndarray, " n"] | Sequence[float]) -> float:
    """Percent of hits, 0 for no rows."""
    return 100 * float(np.mean(hits)) if len(hits) else 0.0
