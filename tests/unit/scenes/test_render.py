"""Rasteriser: exact depth and ids, watertight rooms, agreement with ray casting."""

import numpy as np
import pytest

from spatialvlm.scenes.cameras import Camera
from spatialvlm.scenes.io import load_scene
from spatialvlm.scenes.render.mesh import MeshBuilder, Surface
from spatialvlm.scenes.render.raster import rasterise
from spatialvlm.scenes.render.raycast import cast_boxes
from spatialvlm.scenes.rooms.build import (
    RenderConfig,
    RoomSpec,
    draw_cameras,
    draw_room,
    render_view,
)

GREY = Surface((0.5, 0.5, 0.5))


def boxes_mesh(boxes):
    builder = MeshBuilder()
    for index, box in enumerate(boxes):
        builder.add_box(
            -box.size / 2, box.size / 2, GREY, index + 1, rotation=box.rotation, origin=box.center
        )
    return builder.build()


def test_equals_ray_casting_on_the_hand_room(data_dir):
    room = load_scene(data_dir / "scenes" / "hand_room.json")
    boxes = [o.box for o in room.objects]
    mesh = boxes_mesh(boxes)
    for frame in room.frames:
        raster = rasterise(mesh, frame.camera)
        depth, ids = cast_boxes(boxes, frame.camera)
        assert (raster.ids != ids).mean() < 1e-4  # single pixels whose centre lies on an edge
        same = raster.ids == ids
        np.testing.assert_allclose(raster.depth[same], depth[same], atol=1e-5)


def test_fronto_parallel_face_has_one_depth():
    builder = MeshBuilder()
    builder.add_polygon([[3, 2, 0], [3, -2, 0], [3, -2, 3], [3, 2, 3]], GREY, u_axis=(0, 1, 0))
    camera = Camera.look((0.0, 0.0, 1.5), 0.0, hfov_deg=60, width=64, height=48)
    depth = rasterise(builder.build(), camera).depth
    assert np.abs(depth - 3.0).max() < 1e-5


def test_face_through_the_camera_plane_is_clipped():
    builder = MeshBuilder()
    builder.add_polygon([[-5, 5, 0], [-5, -5, 0], [5, -5, 0], [5, 5, 0]], GREY, u_axis=(1, 0, 0))
    camera = Camera.look((0.0, 0.0, 1.0), 0.0, -45.0, hfov_deg=60, width=40, height=40)
    raster = rasterise(builder.build(), camera)
    assert (raster.faces == 0).all()
    centre = raster.depth[20, 20]
    assert centre == pytest.approx(np.sqrt(2), rel=0.05)


def test_nearer_face_wins_and_ties_keep_the_first():
    builder = MeshBuilder()
    for x in (4.0, 3.0, 3.0):
        builder.add_polygon(
            [[x, 2, -2], [x, -2, -2], [x, -2, 2], [x, 2, 2]], GREY, int(x), u_axis=(0, 1, 0)
        )
    camera = Camera.look((0.0, 0.0, 0.0), 0.0, hfov_deg=50, width=16, height=16)
    assert (rasterise(builder.build(), camera).faces == 1).all()


def test_prism_normals_point_outwards():
    builder = MeshBuilder()
    builder.add_prism((0, 0), 1.0, (0, 1), GREY, top_radius=0.5)
    builder.add_prism((0, 0), 1.0, (0, 1), GREY, top_radius=0.0)
    mesh = builder.build()
    middle = np.array([0, 0, 0.4])
    outward = np.einsum("fi,fi->f", mesh.normals, mesh.corners.mean(axis=1) - middle)
    assert (outward > 0).all()


@pytest.fixture(scope="module")
def model():
    return draw_room(RoomSpec(3))


def test_closed_room_has_no_background(model):
    rng = np.random.default_rng(0)
    for camera in draw_cameras(model, RenderConfig(num_frames=4, width=96, height=96)):
        turned = Camera.look(
            tuple(camera.centre),
            rng.uniform(-180, 180),
            rng.uniform(-60, 60),
            hfov_deg=90,
            width=96,
            height=96,
        )
        assert (rasterise(model.mesh, turned).faces >= 0).all()


def test_supersampling_changes_colour_only(model):
    camera = draw_cameras(model, RenderConfig(num_frames=1, width=64, height=64))[0]
    plain, smooth = render_view(model, camera), render_view(model, camera, ssaa=2)
    np.testing.assert_array_equal(plain.raster.depth, smooth.raster.depth)
    np.testing.assert_array_equal(plain.raster.ids, smooth.raster.ids)
    assert (plain.rgb != smooth.rgb).any()
    assert plain.rgb.shape == smooth.rgb.shape == (64, 64, 3)


def test_shadow_darkens_the_floor_under_a_table():
    """A point under a plate gets less light than the floor beside it."""
    from spatialvlm.scenes.render.shade import Light

    builder = MeshBuilder()
    builder.add_polygon([[-3, -3, 0], [3, -3, 0], [3, 3, 0], [-3, 3, 0]], GREY, u_axis=(1, 0, 0))
    builder.add_box((-0.5, -0.5, 0.7), (0.5, 0.5, 0.75), GREY, 1)
    light = Light((0.0, 0.0, 2.4), (1, 1, 1)).with_shadow(builder.build())
    x, y = np.array([0.0, 0.2, 2.0], np.float32), np.zeros(3, np.float32)
    lit = light.lit(x, y, np.full(3, 2.4, np.float32))
    assert lit[0] < 0.05
    assert lit[1] < 0.05
    assert lit[2] > 0.9
