"""How scores grow with data: nested subsets, two fitted laws, uncertainty over scenes.

Laws: ``y = a + b log2 N`` and ``y = c - A N^-α``; scores in percent, N in samples (or any positive size).
"""

import hashlib
import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from spatialvlm.errors import ConfigError


def nested_subset(
    ids: Mapping[str, str], fraction: float, *, seed: int = 0, floor: int = 1
) -> list[str]:
    """A seeded subset that contains every smaller one and keeps the shares of the categories.

    Args:
        ids: Id -> category.
        fraction: Share of each category, in (0, 1].
        seed: Changes which ids come first.
        floor: Least number per category.

    Returns:
        Ids in the order of ``ids``.
    """
    members: dict[str, list[str]] = defaultdict(list)
    for name, category in ids.items():
        members[category].append(name)
    chosen: set[str] = set()
    for category, names in members.items():
        names.sort(
            key=lambda name: hashlib.sha256(f"{seed}|{category}|{name}".encode()).hexdigest()
        )
        count = max(floor, math.floor(fraction * len(names) + 0.5))
        chosen |= set(names[:count])
    return [name for name in ids if name in chosen]


@dataclass(frozen=True, slots=True)
class Fit:
    """A fitted law."""

    law: str
    """``log`` or ``power``."""
    params: dict[str, float]
    r2: float
    aicc: float
    n: int

    def predict(self, size: float) -> float:
        """Score at a size."""
        p = self.params
        if self.law == "log":
            return p["a"] + p["b"] * math.log2(size)
        return float(p["c"] - p["A"] * size ** -p["alpha"])


def _quality(
    y: Float[np.ndarray, " n"], fitted: Float[np.ndarray, " n"], num_params: int
) -> tuple[float, float]:
    """R² and the corrected Akaike criterion; infinite where the sample is too small for the correction."""
    rss = float(((y - fitted) ** 2).sum())
    total = float(((y - y.mean()) ** 2).sum())
    n, k = len(y), num_params + 1  # the noise variance is a parameter too
    r2 = 1 - rss / total if total > 0 else 1.0
    if n - k - 1 <= 0:
        return r2, math.inf
    return r2, n * math.log(max(rss, 1e-12) / n) + 2 * k + 2 * k * (k + 1) / (n - k - 1)


def _check(
    x: Sequence[float], y: Sequence[float]
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    sizes = np.asarray(x, dtype=float)
    if len(set(sizes.tolist())) < 3 or (sizes <= 0).any():
        raise ConfigError(
            f"a fit needs at least three different positive sizes, got {sorted(set(sizes.tolist()))}"
        )
    return sizes, np.asarray(y, dtype=float)


def fit_log(x: Sequence[float], y: Sequence[float]) -> Fit:
    """Least squares of ``y = a + b log2 N``; ``b`` is the gain per doubling.

    Raises:
        ConfigError: Fewer than three sizes.
    """
    sizes, values = _check(x, y)
    design = np.stack([np.ones_like(sizes), np.log2(sizes)], axis=1)
    (a, b), *_ = np.linalg.lstsq(design, values, rcond=None)
    r2, aicc = _quality(values, design @ np.array([a, b]), 2)
    return Fit("log", {"a": float(a), "b": float(b)}, r2, aicc, len(values))


def fit_power(x: Sequence[float], y: Sequence[float]) -> Fit:
    """Least squares of ``y = c - A N^-α`` with A >= 0 and 0.01 <= α <= 3.

    For a given α the law is linear in c and A; α is searched on a grid and refined.

    Raises:
        ConfigError: Fewer than three sizes.
    """
    from scipy.optimize import minimize_scalar

    sizes, values = _check(x, y)

    def solve(log_alpha: float) -> tuple[float, float, float]:
        basis = sizes ** -math.exp(log_alpha)
        centred = basis - basis.mean()
        slope = -float(centred @ (values - values.mean())) / max(float(centred @ centred), 1e-300)
        amount = max(slope, 0.0)
        c = float(values.mean() + amount * basis.mean())
        return float(((values - c + amount * basis) ** 2).sum()), c, amount

    grid = np.linspace(math.log(0.01), math.log(3.0), 200)
    best = int(np.argmin([solve(g)[0] for g in grid]))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    refined = minimize_scalar(
        lambda g: solve(g)[0], bounds=(low, high), method="bounded", options={"xatol": 1e-10}
    )
    _, c, amount = solve(float(refined.x))
    alpha = math.exp(float(refined.x))
    r2, aicc = _quality(values, c - amount * sizes**-alpha, 3)
    return Fit("power", {"c": c, "A": amount, "alpha": alpha}, r2, aicc, len(values))


LAWS = {"log": fit_log, "power": fit_power}


def is_monotone(x: Sequence[float], y: Sequence[float]) -> bool:
    """Whether the mean score never falls with size."""
    means: dict[float, list[float]] = defaultdict(list)
    for size, value in zip(x, y, strict=True):
        means[size].append(value)
    ordered = [sum(means[size]) / len(means[size]) for size in sorted(means)]
    return all(b >= a for a, b in itertools.pairwise(ordered))


Intervals = dict[str, tuple[float, float]]


def intervals_by_items(
    x: Sequence[float],
    scores: Sequence[Mapping[str, float]],
    clusters: Mapping[str, str],
    law: str,
    *,
    weights: Mapping[str, float] | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> Intervals:
    """95 % intervals of the parameters from a bootstrap over clusters, the same draw for every size.

    Args:
        x: Size of each run.
        scores: Per run, item id -> score in [0, 1].
        clusters: Item id -> cluster.
        law: ``log`` or ``power``.
        weights: Item id -> weight in the headline; ``None`` = all alike.
        draws: Bootstrap draws.
        seed: Of the draws.
    """
    common = sorted(set.intersection(*(set(part) for part in scores)))
    names = sorted({clusters[item] for item in common})
    index = {name: i for i, name in enumerate(names)}
    member = np.array([index[clusters[item]] for item in common])
    table = np.array([[part[item] for item in common] for part in scores])  # [runs, items]
    weight_of = np.array([1.0 if weights is None else weights[item] for item in common])
    sums = np.stack([np.bincount(member, row * weight_of, len(names)) for row in table])
    counts = np.bincount(member, weight_of, len(names))  # [clusters]; sums [runs, clusters]
    rng = np.random.default_rng(seed)
    found: dict[str, list[float]] = defaultdict(list)
    for _ in range(draws):
        drawn = np.bincount(rng.integers(0, len(names), len(names)), minlength=len(names))
        means = 100 * (sums @ drawn) / float(counts @ drawn)
        for key, value in LAWS[law](x, means.tolist()).params.items():
            found[key].append(value)
    return _percentiles(found)


def intervals_by_errors(
    x: Sequence[float],
    y: Sequence[float],
    se: Sequence[float],
    law: str,
    *,
    draws: int = 1000,
    seed: int = 0,
) -> Intervals:
    """The same from published standard errors: independent normal noise per size."""
    rng = np.random.default_rng(seed)
    found: dict[str, list[float]] = defaultdict(list)
    for _ in range(draws):
        noisy = np.asarray(y) + np.asarray(se) * rng.standard_normal(len(y))
        for key, value in LAWS[law](x, noisy.tolist()).params.items():
            found[key].append(value)
    return _percentiles(found)


def _percentiles(found: Mapping[str, Sequence[float]]) -> Intervals:
    return {
        key: (float(np.percentile(values, 2.5)), float(np.percentile(values, 97.5)))
        for key, values in found.items()
    }


def check_extrapolation(x: Sequence[float], size: float, *, allowed: bool) -> None:
    """Refuse predictions beyond twice the largest size.

    Raises:
        ConfigError: Beyond it without permission.
    """
    if size > 2 * max(x) and not allowed:
        raise ConfigError(
            f"size {size:g} is more than twice the largest measured one ({max(x):g}); pass --extrapolate to see it anyway"
        )
