"""Hand-checked numbers: MRA, clustered errors, CAA, circular groups, boxes, cells."""

import json
import math

import numpy as np
import pytest

from spatialvlm.evaluation import structured as st
from spatialvlm.evaluation.benchmarks.circular import circular_variants, dsr_summary
from spatialvlm.evaluation.chance import best_constant_number, chance_scores
from spatialvlm.evaluation.metrics import (
    caa,
    clustered_se,
    composite,
    estimate,
    gaps_to_best,
    half_width_percent,
    mra,
    p_value,
    path_weights,
)
from spatialvlm.evaluation.schema import Item


@pytest.mark.parametrize(
    ("pair", "score"),
    [
        ((2.1, 2), 1.0),
        ((1.8, 2), 0.9),
        ((2.2, 2), 0.9),
        ((1.1, 1), 0.9),
        ((3, 4), 0.6),
        ((2, 4), 0.1),
        ((1, 4), 0.0),
        ((0, 3), 0.0),
    ],
)
def test_mra_uses_the_exact_thresholds(pair, score):
    assert mra(*pair).tolist() == [score]


def test_mra_variants():
    assert mra(3, 4, strict=True).tolist() == [0.5]
    assert mra(0.0, 0.0, signed=False).tolist() == [1.0]
    values = mra(np.linspace(0, 9, 500), 3.7)
    assert set(np.round(values * 10).astype(int)) <= set(range(11))


TYPES = [1, 1, 1, 1, 2, 2, 2, 2]
SCENES = ["s1", "s1", "s2", "s3", "s1", "s2", "s2", "s3"]
SCORES = [1, 1, 0, 1, 0.8, 0.2, 0.4, 0.6]


def test_clustered_error_example():
    found = estimate(SCORES, SCENES, [(str(t),) for t in TYPES])
    assert (found.value, found.clusters) == (pytest.approx(62.5), 3)
    assert found.se == pytest.approx(22.1059, abs=1e-4)
    assert estimate(SCORES, SCENES).se == pytest.approx(24.7033, abs=1e-4)
    assert estimate(SCORES, range(8)).se == pytest.approx(13.8551, abs=1e-4)
    cells = [str(t) for t in TYPES]
    weights = path_weights([(c,) for c in cells])
    influence = weights * (np.array(SCORES) - np.array([0.75] * 4 + [0.5] * 4))
    sums = [
        influence[[i for i, s in enumerate(SCENES) if s == name]].sum()
        for name in ("s1", "s2", "s3")
    ]
    assert sums == pytest.approx([0.1, -0.14375, 0.04375])


def test_one_item_per_cluster_is_the_classical_error():
    s = np.array(SCORES)
    found = estimate(s, range(len(s)))
    assert found.se == pytest.approx(100 * s.std(ddof=1) / math.sqrt(len(s)))


def test_copies_inside_their_cluster_change_nothing():
    single = estimate(SCORES, SCENES, [(str(t),) for t in TYPES])
    double = estimate(SCORES * 2, SCENES * 2, [(str(t),) for t in TYPES] * 2)
    assert (double.value, double.se) == (pytest.approx(single.value), pytest.approx(single.se))


def test_one_cluster_has_no_error():
    assert clustered_se(np.array([0.1, -0.1]), ["a", "a"]) == (None, 1)


def test_nested_weights():
    paths = [("dir", "easy"), ("dir", "hard"), ("dir", "hard"), ("count",), None]
    assert path_weights(paths).tolist() == pytest.approx([0.25, 0.125, 0.125, 0.5, 0.0])


def test_chance_adjusted_accuracy():
    assert caa([1, 0, 1, 1], [4, 4, 2, 3], range(4)).value == pytest.approx(62.5)
    assert caa([0.25] * 3, [4] * 3, range(3)).value == pytest.approx(0)
    assert caa([1, 1], [2, 5], range(2)).value == pytest.approx(100)


def test_3dsrbench_example():
    qids = ["AAAAAAAA", "AAAAAAAA-1", "AAAAAAAA-flip", "AAAAAAAA-flip-1", "BBBBBBBB"]
    found, main = dsr_summary(qids, [1, 0, 1, 1, 1], ["height_x"] * 4 + ["location_y"])
    assert {k: round(v.value, 2) for k, v in found.items()} == {
        "vanilla": 80.0,
        "flip": 66.67,
        "circular": 66.67,
        "flip_circular": 50.0,
    }
    assert main == {"height": 75.0, "location": 100.0}


def test_small_helpers():
    half = [round(half_width_percent(n), 1) for n in (400, 765, 1000, 1050, 1901, 2362, 5130, 5712)]
    assert half == [4.9, 3.5, 3.1, 3.0, 2.2, 2.0, 1.4, 1.3]
    assert p_value(1.96, 1.0) == pytest.approx(0.05, abs=1e-3)
    assert (p_value(0, 0), p_value(1, 0), p_value(1, None)) == (1.0, 0.0, None)
    assert composite([1.0, None, 3.0]) is None
    assert composite([1.0, 3.0]) == 2.0
    assert gaps_to_best([1, 2], [3, 2]) == (-1.0, 1.0)


# ------------------------------------------------------------------------------------------------ structured


def test_iou_hand_values():
    cube = [0, 0, 0, 1, 1, 1, 0]
    assert st.iou3d(cube, [*cube[:6], math.pi / 4]) == pytest.approx(math.sqrt(2) / 2)
    flat = [0, 0, 0, 2, 1, 1, 0]
    assert st.iou3d(flat, [0.5, *flat[1:]]) == pytest.approx(0.6)
    turned = [0, 0, 0.5, 1, 2, 1, math.pi / 2]
    assert st.iou3d(flat, turned) == pytest.approx(1 / 3)
    assert st.yaw_error(flat, turned, front_known=False) == pytest.approx(0, abs=1e-9)
    assert st.iou3d(flat, [5, *flat[1:]]) == 0
    assert st.iou3d(flat, [0, 0, 3, *flat[3:]]) == 0


def test_iou_properties():
    rng = np.random.default_rng(0)
    for _ in range(200):
        a, b = (
            np.concatenate([rng.normal(0, 0.6, 3), rng.uniform(0.3, 2, 3), rng.uniform(-4, 4, 1)])
            for _ in range(2)
        )
        value = st.iou3d(a, b)
        assert 0 <= value <= 1
        assert st.iou3d(b, a) == pytest.approx(value, abs=1e-12)
        assert st.iou3d(a, a) == pytest.approx(1, abs=1e-9)
        swapped = [b[0], b[1], b[2], b[4], b[3], b[5], b[6] + math.pi / 2]
        assert st.iou3d(a, swapped) == pytest.approx(value, abs=1e-9)
        angle, shift = rng.uniform(-3, 3), rng.normal(0, 5, 3)
        c, s = math.cos(angle), math.sin(angle)
        moved = [
            [
                c * x[0] - s * x[1] + shift[0],
                s * x[0] + c * x[1] + shift[1],
                x[2] + shift[2],
                *x[3:6],
                x[6] + angle,
            ]
            for x in (a, b)
        ]
        assert st.iou3d(*moved) == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize(
    ("gold", "predicted", "front_known", "error"),
    [
        ([2, 1, 0], [2, 1, 170], True, 170),
        ([2, 1, 0], [2, 1, 170], False, 10),
        ([1, 1.02, 0], [1, 1, 80], False, 10),
        ([2, 1, 10], [1, 2, 100], False, 0),
        ([2, 1, 0], [2, 1, 370], True, 10),
    ],
)
def test_yaw_error(gold, predicted, front_known, error):
    boxes = [[0, 0, 0, x[0], x[1], 1, math.radians(x[2])] for x in (predicted, gold)]
    assert st.yaw_error(*boxes, front_known=front_known) == pytest.approx(error, abs=1e-6)


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("[3, 4]", [3, 4]),
        ("x=4, y=2", None),
        ("from [1, 2] to (7, 3)", [7, 3]),
        ("<think>[1, 1]</think>[2, 2, 2] [9, 9]", [9, 9]),
    ],
)
def test_parse_cell(text, cell):
    assert st.parse_cell(text) == cell


@pytest.mark.parametrize(
    ("text", "degrees"),
    [
        ("turned 90 degrees clockwise", -90),
        ("30 anticlockwise", 30),
        ("1.5708 rad", 90),
        ("about -45°", -45),
        ("slightly", None),
    ],
)
def test_parse_rotation(text, degrees):
    found = st.parse_rotation(text)
    assert found == (None if degrees is None else pytest.approx(degrees, abs=1e-3))


def test_rotation_and_count_errors():
    assert st.rotation_error(375, 15) == 0
    assert st.rotation_error(-170, 170) == 20
    assert st.rotation_error(-90, 90, unsigned=True) == 0
    assert [
        st.count_error(*pair) for pair in [(3, 3), (5, 4), (10, 4), (None, 4), (0, 0), (2, 0)]
    ] == [
        0,
        0.25,
        1.5,
        1,
        0,
        1,
    ]


def test_histogram_borders():
    assert st.histogram([0.5, 0.4999999999, 0.5 - 1e-6, 9], st.CELL_EDGES) == [1, 2, 0, 0, 0, 1]


def test_global_map_matching():
    matched, missing, extra = st.assign_cells([[0, 0], [5, 5], [9, 9]], [[5, 6], [0, 1]])
    assert (sorted(matched), missing, extra) == ([1.0, 1.0], 0, 1)
    assert st.assign_cells([], [[1, 1]]) == ([], 1, 0)


# ---------------------------------------------------------------------------------------- chance, variants


def test_chance():
    items = [
        Item("a", "choice", "A", "t", "s", {"A": "", "B": "", "C": "", "D": ""}),
        Item("b", "yesno", True, "t", "s"),
        Item("c", "text", "red", "colour", "s"),
        Item("d", "text", "red", "colour", "s"),
        Item("e", "text", "blue", "colour", "s"),
        Item("f", "number", 3.0, "count", "s"),
        Item("g", "number", 3.0, "count", "s"),
        Item("h", "coord", {"cell": [1, 2], "xy": None}, "cell", "s"),
        Item("i", "json", {"box": []}, "box", "s"),
    ]
    assert chance_scores(items) == [0.25, 0.5, 1, 1, 0, 1, 1, 1, 0]
    train = [Item("x", "text", "blue", "colour", "s")]
    assert chance_scores(items[2:5], train) == [0, 0, 1]
    assert best_constant_number([1.0, 2.0, 2.0, 9.0]) == 2.0


def test_circular_variants():
    options = {"A": "chair", "B": "bed", "C": "sofa"}
    items = [
        Item("q", "choice", "B", "t", "s", options),
        Item("all", "choice", "A", "t", "s", {"A": "x", "B": "all of the above"}),
        Item("same", "choice", "A", "t", "s", {"A": "x", "B": "x"}),
        Item("steps", "choice", "A", "t", "s", {"A": "1 m", "B": "2 m", "C": "3 m"}),
    ]
    found = circular_variants(items)
    mine = [item for item in found.items if item.id == "q"]
    assert [item.variant for item in mine] == ["rot0", "rot1", "rot2"]
    assert all(item.options[item.gold] == "bed" for item in mine)
    assert mine[1].options == {"A": "bed", "B": "sofa", "C": "chair"}
    assert set(found.skipped) == {"all", "same"}
    assert found.ordered == ["steps"]
    assert json.dumps(found.skipped)
