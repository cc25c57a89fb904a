"""Embree and the numpy rasteriser see the same room."""

import builtins

import numpy as np
import pytest

from spatialvlm.errors import BackendUnavailableError
from spatialvlm.scenes.render.embree import EmbreeCaster
from spatialvlm.scenes.render.raster import rasterise
from spatialvlm.scenes.rooms.build import RenderConfig, RoomSpec, draw_cameras, draw_room


def test_equals_the_rasteriser():
    pytest.importorskip("embreex", reason="needs the extra 'scenes'")
    model = draw_room(RoomSpec(1))
    caster = EmbreeCaster.of_mesh(model.mesh)
    for camera in draw_cameras(model, RenderConfig(num_frames=3, width=160, height=120)):
        expected, got = rasterise(model.mesh, camera), caster.cast(camera)
        same = expected.ids == got.ids
        assert same.mean() >= 0.999
        assert (
            np.abs(expected.depth - got.depth)[same & (expected.faces == got.faces)].max() <= 1e-4
        )


def test_missing_package_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name.startswith("embreex"):
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(BackendUnavailableError, match=r"\.\[scenes\]"):
        EmbreeCaster(np.zeros((1, 3, 3)), np.zeros(1, int), np.zeros(1, np.uint16))
