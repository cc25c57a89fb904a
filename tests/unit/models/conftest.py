"""Tiny checkpoints, written once per session, and a loader for them."""

import pytest

from spatialvlm.testing.rig import FAMILIES, Rig


@pytest.fixture(scope="session")
def checkpoints(tiny_checkpoint):
    return {family: tiny_checkpoint(family) for family in FAMILIES}


@pytest.fixture
def rig(checkpoints, tiny_vggt):
    def build(family, geometry=None, **kwargs):
        return Rig.load(family, checkpoints[family], vggt=tiny_vggt, geometry=geometry, **kwargs)

    return build
