"""Cycles pictures: same silhouettes as the rasteriser, right colours, files like those of any room."""

import sys

import numpy as np
import pytest

from spatialvlm.errors import BackendUnavailableError
from spatialvlm.scenes.io import load_instances, load_rgb, load_scene
from spatialvlm.scenes.render.blender import CyclesRenderer
from spatialvlm.scenes.render.raster import rasterise
from spatialvlm.scenes.rooms.build import (
    RenderConfig,
    RoomSpec,
    cache_key,
    draw_cameras,
    draw_room,
    render_view,
    write_room,
)


@pytest.fixture
def blender():
    """Blender as a Python module; its own numpy extension may complain, which does not matter here."""
    return pytest.importorskip("bpy", reason="Blender is not installed: pip install bpy")


@pytest.mark.slow
def test_silhouettes_of_twenty_rooms(blender):
    for seed in range(20):
        model = draw_room(RoomSpec(seed))
        renderer = CyclesRenderer(model.mesh, model.lighting, model.textures)
        camera = draw_cameras(model, RenderConfig(num_frames=2, width=160, height=120))[1]
        assert (renderer.ids(camera) == rasterise(model.mesh, camera).ids).mean() >= 0.99


@pytest.mark.slow
def test_colours_agree_roughly(blender):
    """An L-shaped room, whose two floors overlap: nothing is black, and hues are those of the rasteriser."""
    model = draw_room(RoomSpec(0))
    camera = draw_cameras(model, RenderConfig(num_frames=4, width=96, height=96))[1]
    traced = CyclesRenderer(model.mesh, model.lighting, model.textures, samples=16).rgb(camera)
    drawn = render_view(model, camera).rgb
    assert (traced.max(axis=2) < 4).mean() < 0.05
    assert 0.5 < traced.mean() / drawn.mean() < 1.5
    assert np.corrcoef(traced.ravel(), drawn.ravel())[0, 1] > 0.75


@pytest.mark.slow
def test_room_files(blender, tmp_path):
    config = RenderConfig(num_frames=1, width=48, height=48, renderer="cycles")
    write_room(RoomSpec(1, "train", "small"), tmp_path, config)
    scene = load_scene(tmp_path / "train-0000001")
    assert load_rgb(scene, scene.frames[0]).std() > 10
    plain = write_room(RoomSpec(1, "train", "small"), tmp_path / "b", RenderConfig(1, 48, 48))
    np.testing.assert_array_equal(
        load_instances(scene, scene.frames[0]), load_instances(plain, plain.frames[0])
    )
    assert scene.extra["key"] != plain.extra["key"]


def test_keys_of_rooms_drawn_before_stay_valid():
    """A room that was drawn before there was a choice of renderer is not drawn again."""
    assert cache_key(RoomSpec(0), RenderConfig()) == "7e3ca849cff0c87b9e51a199"


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bpy", None)
    model = draw_room(RoomSpec(1, "train", "small"))
    with pytest.raises(BackendUnavailableError, match="pip install bpy"):
        CyclesRenderer(model.mesh, model.lighting, model.textures)
