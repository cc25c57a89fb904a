"""Box distances against hand-computed values and an independent solver."""

import numpy as np
import pytest
from scipy.optimize import minimize

from spatialvlm.scenes.boxes import Box
from spatialvlm.scenes.distances import box_distance, box_distances, footprint_gaps
from spatialvlm.scenes.io import load_scene
from spatialvlm.scenes.transforms import rx, ry, rz

HAND = {
    ("sofa", "table"): 0.70,
    ("sofa", "chair1"): 1.85,
    ("sofa", "lamp"): 1.35,
    ("sofa", "bookshelf"): 1.676,
    ("table", "chair1"): 0.35,
    ("table", "chair2"): 1.134,
    ("table", "bookshelf"): 2.00,
    ("chair1", "chair2"): 1.10,
    ("lamp", "bin"): 4.00,
    ("plant", "bookshelf"): 5.064,
    ("table", "toy_box"): 0.0,
}


def test_hand_room(data_dir):
    room = load_scene(data_dir / "scenes" / "hand_room.json")
    index = {o.id: o.index for o in room.objects}
    matrix = box_distances([o.box for o in room.objects])
    np.testing.assert_allclose(matrix, matrix.T)
    for (a, b), expected in HAND.items():
        assert round(matrix[index[a], index[b]], 3) == expected


def test_unit_cubes():
    cube = Box.upright((0, 0, 0), (1, 1, 1))
    assert box_distance(cube, Box.upright((3, 0, 0), (1, 1, 1))) == 2.0
    turned = Box.upright((3, 0, 0), (1, 1, 1), np.pi / 4)
    assert box_distance(cube, turned) == pytest.approx(3 - 0.5 - np.sqrt(0.5))


def test_crossing_bars_overlap_although_no_corner_is_inside():
    bar = Box.upright((0, 0, 0), (4, 0.2, 1))
    assert box_distance(bar, Box.upright((0, 0, 0), (4, 0.2, 1), np.pi / 2)) == 0.0


def _reference(a: Box, b: Box) -> float:
    """Bounded minimisation over the six box coordinates."""
    matrix = np.concatenate([a.rotation * a.size / 2, -b.rotation * b.size / 2], axis=1)
    target = b.center - a.center

    def cost(x):
        difference = matrix @ x - target
        return difference @ difference, 2 * matrix.T @ difference

    bounds = [(-1, 1)] * 6
    best = min(
        minimize(
            cost,
            start,
            jac=True,
            bounds=bounds,
            method="L-BFGS-B",
            options={"ftol": 1e-16, "gtol": 1e-12},
        ).fun
        for start in (np.zeros(6), np.full(6, 0.5))
    )
    return float(np.sqrt(best))


@pytest.mark.parametrize("tilted", [False, True])
def test_random_pairs_against_an_independent_solver(tilted):
    rng = np.random.default_rng(3)
    for _ in range(60):
        boxes = []
        for _ in range(2):
            rotation = rz(rng.uniform(-3, 3))
            if tilted:
                rotation = rotation @ rx(rng.uniform(-1.5, 1.5)) @ ry(rng.uniform(-1.5, 1.5))
            boxes.append(Box(rng.uniform(-1.5, 1.5, 3), rng.uniform(0.05, 1.5, 3), rotation))
        assert box_distance(*boxes) == pytest.approx(_reference(*boxes), abs=2e-6)


def test_touching_and_nested_boxes_have_distance_zero():
    outer = Box((0, 0, 0), (2, 2, 2), rx(0.3) @ ry(0.2))
    assert box_distance(outer, Box((0.1, 0, 0), (0.2, 0.2, 0.2), rx(1.0))) == 0.0
    assert box_distance(Box.upright((0, 0, 0), (1, 1, 1)), Box.upright((1, 0, 0), (1, 1, 1))) == 0.0


def test_footprint_gap_ignores_height():
    gaps = footprint_gaps([Box.upright((0, 0, 0), (1, 1, 1)), Box.upright((2, 0, 9), (1, 1, 1))])
    assert gaps[0, 1] == pytest.approx(1.0)
