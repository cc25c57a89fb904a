"""Tiny checkpoints, written once per session, and a loader for them."""

import pytest

from spatialvlm.testing import make_checkpoint, make_vggt
from spatialvlm.testing.rig import FAMILIES, Rig


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    return {family: make_checkpoint(family, root / family) for family in FAMILIES}


@pytest.fixture(scope="session")
def vggt_file(tmp_path_factory):
    return make_vggt(tmp_path_factory.mktemp("vggt") / "tiny.safetensors")


@pytest.fixture
def rig(checkpoints, vggt_file):
    def build(family, geometry=None, **kwargs):
        return Rig.load(family, checkpoints[family], vggt=vggt_file, geometry=geometry, **kwargs)

    return build
