"""LocalCogMap: the worked examples, the growth, recovery, handedness."""

import cmath
import math

import numpy as np
import pytest

from spatialvlm.synthesis.localcogmap import (
    Chain,
    build_chain,
    cell_of,
    fit,
    place,
    recover,
    rounding_margin,
    thresholds,
    unplace,
)

NAMES = ["sofa", "table", "chair1", "chair2", "bookshelf", "lamp", "plant", "toy box"]


def chain_of(points, radius=2.5) -> Chain:
    return build_chain([complex(*p) for p in points], radius=radius, min_anchor=0.3)


@pytest.mark.parametrize(
    ("a", "b", "t", "cell"),
    [
        ((0, 0), (0, -2), (2, -2), (7, 3)),
        ((1, 1), (3, 1), (3, 3), (7, 3)),  # the same, turned
        ((1, 1), (3, 1), (3, -1), (3, 3)),  # mirrored: y is up, so it must change
    ],
)
def test_examples_of_one_map(a, b, t, cell):
    assert cell_of(place(complex(*a), complex(*b), complex(*t))) == cell


def test_hand_room_chain(room):
    points = [room.center_list[i][:2] for i in range(8)]
    chain = chain_of(points, radius=2.6)
    found = [(NAMES[t.anchor1], NAMES[t.anchor2], NAMES[t.target], t.cell) for t in chain.triplets]
    assert found == [
        ("sofa", "table", "chair1", [5, 2]),
        ("table", "chair1", "toy box", [4, 5]),
        ("chair1", "toy box", "chair2", [8, 5]),
        ("chair2", "toy box", "bookshelf", [7, 5]),
        ("bookshelf", "sofa", "lamp", [6, 4]),
        ("chair1", "table", "plant", [0, 6]),
    ]
    assert chain.dropped == []
    assert not chain.fallback
    assert chain.triplets[2].position == pytest.approx(complex(8.211, 5.037), abs=1e-3)


def test_fitted_anchors():
    first, second, position = fit(3 + 2j, 3 + 3j, 0.4 + 3.6j)
    assert (first, second) == ((1, 7), (1, 4))
    assert position == pytest.approx(8.8 + 2.2j)
    assert cell_of(position) == (9, 2)


def test_every_target_has_anchors_that_were_placed_before_and_the_layout_is_recovered():
    rng = np.random.default_rng(0)
    for _ in range(60):
        points = [complex(*p) for p in rng.uniform(0, 6, size=(int(rng.integers(3, 25)), 2))]
        chain = build_chain(points, radius=2.5, min_anchor=0.3)
        assert len(chain.triplets) + len(chain.dropped) == len(points) - 2
        placed = {chain.triplets[0].anchor1, chain.triplets[0].anchor2}
        for triplet in chain.triplets:
            assert {triplet.anchor1, triplet.anchor2} <= placed
            assert triplet.target not in placed
            assert abs(points[triplet.anchor1] - points[triplet.anchor2]) >= 0.3
            assert all(0 <= v <= 9 for v in triplet.cell)
            placed.add(triplet.target)
        layout = recover(chain.triplets)
        a, b = chain.triplets[0].anchor1, chain.triplets[0].anchor2
        for obj, position in layout.items():
            expected = (points[obj] - points[a]) / (points[b] - points[a])
            assert position == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_rigid_motion_and_scale_change_nothing_and_a_mirror_flips_x():
    rng = np.random.default_rng(1)
    points = [complex(*p) for p in rng.uniform(0, 5, size=(12, 2))]
    before = build_chain(points, radius=2.5, min_anchor=0.3).triplets
    moved = [p * cmath.exp(0.7j) + complex(3, -8) for p in points]
    after = build_chain(moved, radius=2.5, min_anchor=0.3).triplets
    assert [(t.anchor1, t.anchor2, t.target, t.cell) for t in before] == [
        (t.anchor1, t.anchor2, t.target, t.cell) for t in after
    ]
    larger = build_chain([3 * p for p in points], radius=7.5, min_anchor=0.9).triplets
    assert [t.cell for t in larger] == [t.cell for t in before]
    for triplet in before:
        a, b, t = (
            points[i].conjugate() for i in (triplet.anchor1, triplet.anchor2, triplet.target)
        )
        mirrored = place(a, b, t)
        assert mirrored == pytest.approx(complex(10 - triplet.position.real, triplet.position.imag))


def test_without_a_close_triple_the_tightest_one_is_the_seed():
    chain = chain_of([(0, 0), (10, 0), (4, 9), (30, 2)])
    assert chain.fallback
    assert {chain.triplets[0].anchor1, chain.triplets[0].anchor2, chain.triplets[0].target} == {
        0,
        1,
        2,
    }


def test_objects_off_the_grid_are_dropped_not_placed():
    chain = chain_of([(0, 0), (0.4, 0), (0.2, 0.4), (500, 3)])
    assert chain.dropped == [3]
    assert all(t.target != 3 for t in chain.triplets)


def test_coincident_objects_are_never_both_anchors():
    chain = chain_of([(0, 0), (0.05, 0), (2, 0), (1, 2)])
    assert all({t.anchor1, t.anchor2} != {0, 1} for t in chain.triplets)
    assert chain_of([(0, 0), (0.01, 0), (0, 0.01)]).triplets == []


def test_thresholds_without_metric_scale_follow_the_size_of_the_layout():
    points = [0j, 3 + 4j]
    assert thresholds(points, metric=True) == (2.5, 0.3)
    assert thresholds(points, metric=False) == pytest.approx((1.75, 0.2))


def test_rounding_margin_and_inverse():
    assert rounding_margin(complex(5.4, 2.0)) == pytest.approx(0.1)
    position = place(1 + 1j, 3 + 2j, 4 - 2j)
    assert unplace(1 + 1j, 3 + 2j, position) == pytest.approx(4 - 2j)
    assert math.isclose(rounding_margin(complex(1, 1)), 0.5)
