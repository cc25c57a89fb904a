"""Permutations and floor splits: goldens, bijections, windows, and no visible pattern."""

import random
from fractions import Fraction

import numpy as np
import pytest

from spatialvlm.data.order import (
    SplitTree,
    integer_weights,
    permute,
    permute_array,
    round_keys,
    splitmix64,
)


def test_goldens():
    assert splitmix64(0) == 0xE220A8397B1DCDAF
    keys = round_keys(0, "spatial/vsi/8", 0)
    assert [permute(i, 10, keys) for i in range(10)] == [6, 3, 2, 4, 0, 9, 7, 1, 8, 5]
    assert [permute(i, 1000, keys) for i in range(10)] == [
        201, 906, 185, 258, 51, 616, 867, 518, 696, 619,
    ]  # fmt: skip
    keys = round_keys(7, "general/ov/1", 3)
    n = 12_000_000
    assert [permute(i, n, keys) for i in (0, 1, n - 1)] == [6513592, 6734363, 4376723]


def test_permutation_is_a_bijection_and_the_array_form_agrees():
    for n in range(1, 2001):
        keys = round_keys(1, "s", n)
        values = permute_array(np.arange(n), n, keys)
        assert np.array_equal(np.sort(values), np.arange(n)), n
        assert values[n // 2] == permute(n // 2, n, keys)


def test_permutation_of_huge_ranges_stays_inside_and_distinct():
    rng = random.Random(0)
    for bits in range(12, 34):
        n = rng.randrange(1 << (bits - 1), 1 << bits)
        where = np.unique([rng.randrange(n) for _ in range(500)])
        values = permute_array(where, n, round_keys(3, "huge", bits))
        assert values.min() >= 0
        assert values.max() < n
        assert len(np.unique(values)) == len(where)


def test_permutation_shows_no_correlation():
    n = 100_000
    values = permute_array(np.arange(n), n, round_keys(0, "x", 0)).astype(float)
    assert abs(np.corrcoef(np.arange(n), values)[0, 1]) < 0.01
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.01


@pytest.mark.parametrize(
    ("weights", "expected"),
    [([1, 1], "ABAB"), ([3, 1], "AABA"), ([2, 1, 1], "ABAC"), ([1], "AAAA")],
)
def test_small_splits(weights, expected):
    tree = SplitTree(weights)
    assert "".join("ABC"[tree.at(q)[0]] for q in range(4)) == expected


def test_leaves_get_their_share_of_every_window():
    rng = random.Random(1)
    worst = 0.0
    for _ in range(200):
        weights = [max(1, int(10 ** rng.uniform(0, 5))) for _ in range(rng.randint(1, 60))]
        tree = SplitTree(weights)
        start = rng.randrange(10**9)
        leaf, inner = tree.at_array(np.arange(start, start + 3000))
        total = sum(weights)
        for number, weight in enumerate(weights):
            hits = np.concatenate([[0], np.cumsum(leaf == number)])
            off = hits - np.arange(3001) * weight / total
            worst = max(worst, off.max() - off.min())
            mine = inner[leaf == number]
            assert np.array_equal(mine, np.arange(len(mine)) + (mine[0] if len(mine) else 0))
    assert worst <= 3


def test_scalar_array_and_count_agree():
    tree = SplitTree([5, 3, Fraction(1, 2), 7])
    q = np.arange(0, 4000, 7)
    leaf, inner = tree.at_array(q)
    assert [tree.at(int(i)) for i in q] == list(zip(leaf, inner, strict=True))
    full, _ = tree.at_array(np.arange(1000))
    assert tree.counts(1000) == np.bincount(full).tolist()


def test_two_leaf_windows_are_within_one():
    tree = SplitTree([7, 3])
    leaf, _ = tree.at_array(np.arange(20_000))
    hits = np.concatenate([[0], np.cumsum(leaf == 0)])
    off = hits - np.arange(20_001) * 0.7
    assert off.max() - off.min() < 1


def test_integer_weights_keep_exact_ratios():
    assert integer_weights([Fraction(1, 3), Fraction(1, 6)]) == [2, 1]
    assert integer_weights([12_000_000, 4_000_000]) == [3, 1]
    big = integer_weights([10**15, 1])
    assert sum(big) <= 1 << 30
    assert big[1] == 1


def test_positions_far_into_a_run_do_not_overflow():
    tree = SplitTree([2**28 + 1, 2**28 - 1])
    far = np.array([10**12, 10**12 + 1])
    leaf, inner = tree.at_array(far)
    assert [tree.at(int(q)) for q in far] == list(zip(leaf, inner, strict=True))
