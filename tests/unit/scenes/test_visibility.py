"""Projection, ray counts, the three states, the occupancy rules, masks."""

import numpy as np
import pytest

from spatialvlm.scenes.boxes import Box
from spatialvlm.scenes.cameras import Camera, ray_to_z_depth
from spatialvlm.scenes.render.raster import rasterise
from spatialvlm.scenes.render.raycast import cast_boxes
from spatialvlm.scenes.rooms.build import RenderConfig, RoomSpec, draw_cameras, draw_room
from spatialvlm.scenes.visibility import (
    RayCounts,
    count_rays,
    decode_rle,
    encode_rle,
    frame_visibility,
    passes_occupancy,
    project_box,
    state_of,
)

CAMERA = Camera.look((0, 0, 1.0), 0.0, hfov_deg=90, width=160, height=120)
FAR = Box.upright((9.5, 0, 1), (1, 30, 30))


def cast(*boxes, camera=CAMERA):
    depth, ids = cast_boxes([*boxes, FAR], camera)
    ids[ids == len(boxes) + 1] = 0
    return depth, ids


def test_fraction_counts_hits_and_occluded_rays_only():
    assert RayCounts(60, 90, 50, np.zeros((0, 3)), np.zeros(0), 1.0).fraction == pytest.approx(0.40)
    assert RayCounts(0, 0, 50, np.zeros((0, 3)), np.zeros(0), 1.0).fraction == 0.0


def test_projection_against_pixel_counts():
    """Share inside the image by polygons equals the share of pixels of a larger image."""
    wide = Camera(
        CAMERA.intrinsics + np.array([[0, 0, 160], [0, 0, 120], [0, 0, 0]]),
        CAMERA.world_from_cam,
        480,
        360,
    )
    rng = np.random.default_rng(0)
    compared = 0
    for _ in range(40):
        box = Box.upright(
            rng.uniform((2, -3, -1), (5, 3, 3)), rng.uniform(0.3, 1.5, 3), rng.uniform(-3, 3)
        )
        projection = project_box(box, CAMERA)
        _, ids = cast_boxes([box], wide)
        inside = (ids[120:240, 160:320] > 0).sum()
        if projection is None:
            assert inside <= 2
            continue
        if (ids[[0, -1]] > 0).any() or (ids[:, [0, -1]] > 0).any():
            continue  # not all of it is in the larger image either
        compared += 1
        assert projection.in_frustum_frac == pytest.approx(inside / (ids > 0).sum(), abs=0.03)
        assert projection.area_px == pytest.approx(inside, rel=0.05, abs=60)
    assert compared >= 10


def test_projection_behind_and_across_the_camera_plane():
    assert project_box(Box.upright((-2, 0, 1), (1, 1, 1)), CAMERA) is None
    across = project_box(Box.upright((0, 1.2, 1), (3, 1, 1)), CAMERA)
    assert 0 < across.in_frustum_frac < 0.5
    larger = Camera(
        CAMERA.intrinsics + np.array([[0, 0, 20], [0, 0, 20], [0, 0, 0]]),
        CAMERA.world_from_cam,
        200,
        160,
    )
    box = Box.upright((3, 2.8, 1), (1, 1, 1))
    assert project_box(box, larger).in_frustum_frac >= project_box(box, CAMERA).in_frustum_frac


def test_adding_an_occluder_never_raises_visibility():
    rng = np.random.default_rng(1)
    target = Box.upright((4, 0, 1), (1, 1.5, 1.2), 0.3)
    before = frame_visibility([target], CAMERA, *cast(target))[0].vis_frac
    for _ in range(15):
        occluder = Box.upright(rng.uniform((1.5, -1, 0.3), (3, 1, 1.8)), rng.uniform(0.1, 0.8, 3))
        depth, ids = cast(target, occluder)
        after = frame_visibility([target], CAMERA, depth, np.where(ids == 1, ids, 0))[0].vis_frac
        assert after <= before + 1e-9


def test_visibility_no_tolerance():
    """Depth noise of a centimetre does not hide an object behind its own surface."""
    box = Box.upright((3, 0, 1), (1, 1, 1))
    depth, _ = cast(box)
    noisy = depth + np.random.default_rng(0).normal(0, 0.01, depth.shape).astype(np.float32)
    rays = count_rays(box, project_box(box, CAMERA), CAMERA, noisy)
    assert rays.fraction > 0.97
    assert rays.occluded == 0


@pytest.mark.parametrize(
    ("vis_frac", "px", "state"),
    [(0.9, 100, "visible"), (0.3, 64, "visible"), (0.3, 63, "ambiguous"), (0.29, 900, "ambiguous"), (0.049, 900, "hidden")],
)  # fmt: skip
def test_states(vis_frac, px, state):
    assert state_of(vis_frac, px, 640 * 480) == state
    assert state_of(vis_frac, px / 4, 320 * 240) == state


def facing_points(box, count=300, plane=True):
    rng = np.random.default_rng(0)
    points = rng.uniform(-0.5, 0.5, (count, 3))
    if plane:
        points[:, 0] = -0.5  # the face towards the camera
    return (points * box.size) @ box.rotation.T + box.center


def test_frontal_box_hull_zero():
    """A cabinet seen frontally gives coplanar points: no volume, yet fully visible."""
    cabinet = Box.upright((3, 0, 1), (0.5, 1.2, 0.9))
    flat = facing_points(cabinet)
    assert passes_occupancy(cabinet, flat, CAMERA, rule="robust")
    assert not passes_occupancy(cabinet, flat, CAMERA, rule="openspatial")
    corner = flat[(flat[:, 1] > 0.4) & (flat[:, 2] > 1.3)]
    assert not passes_occupancy(cabinet, corner, CAMERA, rule="robust")


def test_occupancy_rules_on_full_and_thin_boxes():
    box = Box.upright((3, 0, 1), (1, 1, 1))
    inside = facing_points(box, 400, plane=False) * [1, 1, 1]
    assert passes_occupancy(box, inside, CAMERA, rule="openspatial", image_share=0.1)
    assert not passes_occupancy(box, inside, CAMERA, rule="openspatial", image_share=0.01)
    assert not passes_occupancy(box, inside[:40], CAMERA, rule="openspatial", image_share=0.1)
    assert not passes_occupancy(
        box, inside, CAMERA, rule="openspatial", image_share=0.1, in_frustum_frac=0.05
    )
    assert passes_occupancy(box, inside[:0], CAMERA, rule="none")
    picture = Box.upright((3, 0, 1), (0.02, 1, 0.6))
    assert passes_occupancy(picture, facing_points(picture), CAMERA, rule="robust")
    assert not passes_occupancy(picture, facing_points(picture)[:3], CAMERA, rule="robust")


def test_failing_occupancy_makes_an_object_ambiguous():
    box = Box.upright((3, 0, 1), (1, 1, 1))
    depth, ids = cast(box)
    (full,) = frame_visibility([box], CAMERA, depth, ids)
    assert (full.state, full.occupancy, full.clean) == ("visible", True, True)
    sliver = np.zeros_like(ids)
    sliver[55:65, 70:76] = 1  # a few pixels claim to be the object, the rest is see-through
    depth = np.where(sliver == 1, depth, 9.0).astype(np.float32)
    (part,) = frame_visibility([box], CAMERA, depth, sliver)
    assert (part.state, part.occupancy) == ("ambiguous", False)
    (unfiltered,) = frame_visibility([box], CAMERA, depth, sliver, occupancy="none")
    assert (unfiltered.state, unfiltered.occupancy) == ("visible", None)


def test_without_depth_boxes_hide_each_other():
    front, back = Box.upright((2, 0, 1), (0.5, 3, 3)), Box.upright((4, 0, 1), (1, 1, 1))
    states = [vis.state for vis in frame_visibility([front, back], CAMERA, None, None)]
    assert states == ["visible", "hidden"]
    assert all(vis.occupancy is None for vis in frame_visibility([front, back], CAMERA, None, None))


def test_pixels_are_estimated_without_an_instance_map():
    box = Box.upright((3, 0.4, 1), (1, 1, 1))
    depth, ids = cast(box)
    (exact,), (guessed,) = (frame_visibility([box], CAMERA, depth, m) for m in (ids, None))
    assert guessed.px == pytest.approx(exact.px, rel=0.1)
    assert guessed.depth_near == pytest.approx(exact.depth_near, abs=0.05)
    np.testing.assert_allclose(guessed.centroid_px, exact.centroid_px, atol=2)


def test_states_agree_with_rendering_each_object_alone():
    """Oracle: visible pixels over the pixels the object has when nothing else is there."""
    agree = compared = 0
    for seed in range(3):
        model = draw_room(RoomSpec(seed))
        for camera in draw_cameras(model, RenderConfig(num_frames=3, width=240, height=180)):
            raster = rasterise(model.mesh, camera)
            boxes = [item.box for item in model.placed]
            for vis in frame_visibility(boxes, camera, raster.depth, raster.ids, occupancy="none"):
                alone = int((rasterise(model.mesh.only(vis.obj + 1), camera).ids > 0).sum())
                if alone < 60:
                    continue
                truth = state_of(vis.in_frustum_frac * vis.px / alone, vis.px, 240 * 180)
                compared += 1
                agree += truth == vis.state
                assert (truth, vis.state) not in {("hidden", "visible"), ("visible", "hidden")}
    assert compared >= 60
    assert agree / compared >= 0.95


def test_run_lengths():
    mask = np.zeros((3, 4), bool)
    mask[1:, 1] = True
    mask[0, 2] = True
    assert encode_rle(mask) == {"size": [3, 4], "counts": [4, 3, 5]}
    rng = np.random.default_rng(0)
    for _ in range(20):
        mask = rng.random((7, 5)) < 0.5
        np.testing.assert_array_equal(decode_rle(encode_rle(mask)), mask)


def test_ray_depth_of_a_wall():
    """hypersim_ray_depth: after conversion the corner of a fronto-parallel wall is as deep as its centre."""
    k = CAMERA.intrinsics
    v, u = np.mgrid[0:120, 0:160] + 0.5
    ray = 2.5 * np.sqrt(((u - k[0, 2]) / k[0, 0]) ** 2 + ((v - k[1, 2]) / k[1, 1]) ** 2 + 1)
    np.testing.assert_allclose(ray_to_z_depth(ray, k), 2.5)


def test_camera_frames():
    camera = Camera.look((1, 2, 1.5), 30.0, -20.0, hfov_deg=70, width=100, height=80)
    assert camera.heading_deg == pytest.approx(30)
    assert camera.pitch_deg == pytest.approx(-20)
    assert camera.roll_deg == pytest.approx(0, abs=1e-9)
    assert camera.hfov_deg == pytest.approx(70)
    points = np.array([[3.0, 3.0, 1.0], [4.0, 2.5, 2.0]])
    pixels, depth = camera.project(points)
    np.testing.assert_allclose(camera.back_project(pixels, depth), points)
    half = camera.resized(50, 40)
    np.testing.assert_allclose(half.project(points)[0], pixels / 2)
    # (forward, left, up) and (right, forward, up) of one level frame: (xv, yv) = (-ys, xs).
    forward_x = points @ camera.level_frame("x")[:3, :3].T + camera.level_frame("x")[:3, 3]
    forward_y = points @ camera.level_frame("y")[:3, :3].T + camera.level_frame("y")[:3, 3]
    np.testing.assert_allclose(forward_y, np.c_[-forward_x[:, 1], forward_x[:, 0], forward_x[:, 2]])
    np.testing.assert_allclose(forward_x[:, 2], points[:, 2] - 1.5)
