"""The order of training samples as a function of the position, in integers.

Two pieces make up every order. :class:`SplitTree` deals positions to weighted leaves so that each leaf
gets its share in every window; :func:`permute` shuffles a range without storing it. Both answer any
position alone, so a run resumes anywhere by one integer, on any number of ranks and workers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from spatialvlm.typing import IntArray

    UInt64Array = npt.NDArray[np.uint64]

_ROUNDS = 8
_MASK64 = (1 << 64) - 1
_MAX_TOTAL_WEIGHT = 1 << 30
"""Keeps ``2 * q * w`` of a remainder ``q`` below the total weight inside int64."""


def splitmix64(value: int) -> int:
    """One step of the SplitMix64 mixer (Steele, Lea, Flood: doi 10.1145/2660193.2660195).

    Args:
        value: Any 64-bit unsigned integer.

    Returns:
        A 64-bit unsigned integer; ``splitmix64(0) == 0xe220a8397b1dcdaf``.
    """
    z = (value + 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


def _splitmix64_array(value: UInt64Array) -> UInt64Array:
    z = value + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def round_keys(seed: int, stream: str, epoch: int) -> tuple[int, ...]:
    """The eight 64-bit keys of one shuffle.

    Args:
        seed: Seed of the order.
        stream: Name of what is shuffled; different names give unrelated shuffles.
        epoch: Number of the pass.
    """
    digest = hashlib.blake2b(f"{seed}|{stream}|{epoch}".encode()).digest()
    return tuple(int.from_bytes(digest[8 * r : 8 * r + 8], "little") for r in range(_ROUNDS))


def _half_bits(n: int) -> int:
    return max(1, ((n - 1).bit_length() + 1) // 2)


def permute(index: int, n: int, keys: Sequence[int]) -> int:
    """Image of ``index`` under a pseudo-random bijection of ``range(n)``.

    A balanced Feistel network on the smallest square domain that holds ``n``; values outside the range
    are sent through again until they fall inside (cycle walking), less than four times on average.

    Args:
        index: In ``range(n)``.
        n: Size of the range, at least 1.
        keys: From :func:`round_keys`.
    """
    assert 0 <= index < n, f"index {index} outside range({n})"
    half = _half_bits(n)
    mask = (1 << half) - 1
    value = index
    while True:
        left, right = value >> half, value & mask
        for key in keys:
            left, right = right, left ^ (splitmix64(right ^ key) & mask)
        value = left << half | right
        if value < n:
            return value


def permute_array(index: IntArray, n: int, keys: Sequence[int]) -> IntArray:
    """:func:`permute` of many indices at once.

    Args:
        index: int64 ``[m]``, each in ``range(n)``.
        n: Size of the range.
        keys: From :func:`round_keys`.

    Returns:
        int64 ``[m]``.
    """
    half = np.uint64(_half_bits(n))
    mask = np.uint64((1 << int(half)) - 1)
    result = index.astype(np.uint64)
    todo = np.arange(len(result))
    value = result
    while len(todo):
        left, right = value >> half, value & mask
        for key in keys:
            left, right = right, left ^ (_splitmix64_array(right ^ np.uint64(key)) & mask)
        value = left << half | right
        inside = value < n
        result[todo[inside]] = value[inside]
        todo, value = todo[~inside], value[~inside]
    return result.astype(np.int64)


def integer_weights(weights: Sequence[Fraction | int]) -> list[int]:
    """Weights as integers of small total, in the same ratio.

    The ratio is exact as long as the reduced total is below 2^30, and rounded above.

    Args:
        weights: Positive.
    """
    exact = [Fraction(w) for w in weights]
    scale = math.lcm(*(w.denominator for w in exact))
    whole = [int(w * scale) for w in exact]
    shared = math.gcd(*whole)
    whole = [w // shared for w in whole]
    total = sum(whole)
    if total >= _MAX_TOTAL_WEIGHT:
        room = _MAX_TOTAL_WEIGHT // 2
        whole = [max(1, (w * room + total // 2) // total) for w in whole]
    return whole


def _count_left(q: int, w: int, total: int) -> int:
    """How many of the first ``q`` draws of a node go to its left child."""
    return (2 * q * w + total) // (2 * total)


def _count_left_array(q: IntArray, w: int, total: int) -> IntArray:
    cycles, rest = np.divmod(q, total)
    counts: IntArray = cycles * w + (2 * rest * w + total) // (2 * total)
    return counts


@dataclass(frozen=True, slots=True)
class _Node:
    left: _Node | int
    right: _Node | int
    left_weight: int
    total: int


class SplitTree:
    """Deals draws to weighted leaves: each leaf gets its share of every window.

    A Huffman tree over the leaves; draw ``q`` of a node of weight ``W`` goes to the left child of
    weight ``w`` iff ``c(q + 1) > c(q)`` with ``c(q) = (2 q w + W) // (2 W)``, and the child sees it as
    its own draw ``c(q)`` (right: ``q - c(q)``). A window of ``n`` draws holds ``n w / W`` of a leaf up to
    one at the root and up to three at any leaf. 1:1 gives ``S G S G``, 3:1 ``A A B A``, 2:1:1 ``A B A C``.

    Args:
        weights: Positive weights, one per leaf.
    """

    def __init__(self, weights: Sequence[Fraction | int]) -> None:
        self.weights = integer_weights(weights)
        # (weight, first leaf, node); the lightest two are merged, ties keep the order of the config
        parts: list[tuple[int, int, _Node | int]] = [
            (w, leaf, leaf) for leaf, w in enumerate(self.weights)
        ]
        while len(parts) > 1:
            parts.sort(key=lambda part: (-part[0], part[1]))
            (w1, first1, node1), (w2, first2, node2) = parts[-2:]
            merged = _Node(node1, node2, left_weight=w1, total=w1 + w2)
            parts[-2:] = [(w1 + w2, min(first1, first2), merged)]
        self._root = parts[0][2]

    def at(self, q: int) -> tuple[int, int]:
        """Leaf of draw ``q`` and the draw's number inside that leaf."""
        node = self._root
        while isinstance(node, _Node):
            count = _count_left(q, node.left_weight, node.total)
            if _count_left(q + 1, node.left_weight, node.total) > count:
                node, q = node.left, count
            else:
                node, q = node.right, q - count
        return node, q

    def at_array(self, q: IntArray) -> tuple[IntArray, IntArray]:
        """:meth:`at` of many draws: leaves ``[m]`` and numbers inside the leaves ``[m]``, int64."""
        leaf = np.empty(len(q), np.int64)
        inner = np.empty(len(q), np.int64)

        def walk(node: _Node | int, where: IntArray, numbers: IntArray) -> None:
            if not len(where):
                return
            if not isinstance(node, _Node):
                leaf[where], inner[where] = node, numbers
                return
            count = _count_left_array(numbers, node.left_weight, node.total)
            left = _count_left_array(numbers + 1, node.left_weight, node.total) > count
            walk(node.left, where[left], count[left])
            walk(node.right, where[~left], (numbers - count)[~left])

        walk(self._root, np.arange(len(q)), np.asarray(q, np.int64))
        return leaf, inner

    def counts(self, q: int) -> list[int]:
        """How many of the first ``q`` draws go to every leaf."""
        found = [0] * len(self.weights)

        def walk(node: _Node | int, q: int) -> None:
            if isinstance(node, _Node):
                left = _count_left(q, node.left_weight, node.total)
                walk(node.left, left)
                walk(node.right, q - left)
            else:
                found[node] = q

        walk(self._root, q)
        return found
