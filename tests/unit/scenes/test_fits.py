"""Room areas, upright box fits, minimum-area rectangles, axis canonicalisation."""

import numpy as np
import pytest

from spatialvlm.errors import BoxError
from spatialvlm.scenes.areas import alpha_area, polygon_area
from spatialvlm.scenes.boxes import (
    Box,
    canonical_yaw_rad,
    canonicalise_axes,
    minimum_area_rectangle,
    refit_upright,
)
from spatialvlm.scenes.obb_fit import fit_upright_box, inlier_mask, largest_component
from spatialvlm.scenes.transforms import checked_rotation, geodesic_deg, rx, ry, rz, wrap_deg


def test_polygon_area_of_the_hand_room():
    assert polygon_area(np.array([(0, 0), (6, 0), (6, 4), (0, 4)])) == 24.0


@pytest.mark.parametrize("spacing", [0.05, 0.15])
def test_alpha_area_of_an_l_shape(spacing):
    axis = np.arange(0, 6 + 1e-9, spacing)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    room = grid[(grid[:, 0] <= 3) | (grid[:, 1] <= 3)]
    if len(room) > 10_000:
        room = room[np.random.default_rng(0).permutation(len(room))]
    assert alpha_area(room) == pytest.approx(27.0, rel=0.02)


def test_alpha_area_of_degenerate_points():
    assert alpha_area(np.zeros((3, 2))) is None
    assert alpha_area(np.c_[np.linspace(0, 5, 100), np.zeros(100)]) is None


def surface_points(box, count, rng):
    points = rng.uniform(-0.5, 0.5, (count, 3))
    axis, side = rng.integers(0, 3, count), rng.choice([-0.5, 0.5], count)
    points[np.arange(count), axis] = side
    return (points * box.size) @ box.rotation.T + box.center


def test_fit_recovers_a_box_through_outliers():
    rng = np.random.default_rng(0)
    box = Box.upright((1, 2, 0.5), (1.6, 0.7, 1.0), 0.4)
    points = surface_points(box, 4000, rng)
    stray = rng.uniform(-3, 6, (30, 3))
    far_part = rng.normal((4, 4, 0.5), 0.05, (200, 3))
    fitted = fit_upright_box(np.concatenate([points, stray, far_part]))
    np.testing.assert_allclose(fitted.center, box.center, atol=0.02)
    np.testing.assert_allclose(fitted.size, box.size, atol=0.05)
    assert abs(np.degrees(fitted.yaw_rad - 0.4)) < 2
    assert inlier_mask(np.concatenate([points, [[50, 50, 50]]]))[-1] == np.False_
    assert largest_component(np.concatenate([points, far_part]))[-1] == np.False_


def test_fit_refuses_too_little():
    with pytest.raises(BoxError, match="at least 16 points"):
        fit_upright_box(np.zeros((5, 3)))
    flat = np.c_[np.random.default_rng(0).uniform(size=(100, 2)) * 1e-3, np.zeros(100)]
    with pytest.raises(BoxError, match="volume"):
        fit_upright_box(flat)


def test_minimum_area_rectangle_of_a_turned_rectangle():
    corners = Box.upright((1, -1, 0), (3, 1, 1), 0.7).corners[:, :2]
    center, size, yaw = minimum_area_rectangle(corners)
    np.testing.assert_allclose(center, [1, -1], atol=1e-9)
    np.testing.assert_allclose(size, [3, 1], atol=1e-9)
    assert yaw == pytest.approx(0.7)


def test_refit_of_a_tilted_box_contains_it():
    """open3d_tilted_minimal_obb: a tilted box has no height until it is refitted."""
    tilted = Box((0, 0, 1), (1, 0.5, 2), rz(0.3) @ rx(0.5))
    assert not tilted.is_upright
    upright = refit_upright(tilted)
    assert upright.is_upright
    assert upright.contains(tilted.corners, 1e-9).all()
    assert upright.size[2] == pytest.approx(tilted.z_max - tilted.z_min)


def test_height_uses_zl_without_axis_canon():
    """A box whose second axis is vertical has its second extent as height."""
    box = Box((0, 0, 3), (1.331, 0.317, 0.344), np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]]))
    canonical = canonicalise_axes(box)
    np.testing.assert_allclose(canonical.size, [1.331, 0.344, 0.317])
    assert canonical.rotation[2, 2] == pytest.approx(1.0)
    same = [b.corners[np.lexsort(b.corners.round(6).T)] for b in (box, canonical)]
    np.testing.assert_allclose(*same, atol=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_canonical_axes_keep_the_solid(seed):
    rng = np.random.default_rng(seed)
    box = Box(
        rng.normal(size=3),
        rng.uniform(0.1, 2, 3),
        rz(rng.uniform(-3, 3)) @ rx(rng.uniform(-3, 3)) @ ry(1.0),
    )
    canonical = canonicalise_axes(box)
    assert np.abs(canonical.rotation[2]).argmax() == 2
    assert canonical.rotation[2, 2] > 0
    assert canonical.size[0] >= canonical.size[1]
    assert np.linalg.det(canonical.rotation) == pytest.approx(1.0)
    np.testing.assert_allclose(
        box.corners[np.lexsort(box.corners.round(6).T)],
        canonical.corners[np.lexsort(canonical.corners.round(6).T)],
        atol=1e-9,
    )


@pytest.mark.parametrize(
    ("yaw", "symmetry", "size", "front", "expected"),
    [
        (200, "none", (1, 2), True, -160),
        (180, "none", (1, 2), True, 180),
        (100, "c2", (2, 1), False, -80),
        (90, "c2", (2, 1), False, 90),
        (-90, "c2", (2, 1), False, 90),
        (100, "c4", (1, 1), False, 10),
        (50, "c2", (1.0, 1.04), False, -40),
        (50, "c2", (1.0, 1.04), True, 50),
        (77, "inf", (1, 1), False, 0),
    ],
)
def test_canonical_yaw(yaw, symmetry, size, front, expected):
    got = canonical_yaw_rad(np.radians(yaw), symmetry, size, has_front=front)
    assert np.degrees(got) == pytest.approx(expected)


def test_small_rotation_helpers():
    assert wrap_deg(-180) == 180
    assert wrap_deg(540) == 180
    assert wrap_deg(-190) == 170
    assert geodesic_deg(np.eye(3), rz(1e-9)) == pytest.approx(np.degrees(1e-9))
    assert geodesic_deg(rx(0.2), rx(0.2 + np.pi)) == pytest.approx(180)
    noisy = rz(0.5) + 1e-4
    np.testing.assert_allclose(
        checked_rotation(noisy, what="test", error=BoxError) @ rz(-0.5), np.eye(3), atol=1e-3
    )
