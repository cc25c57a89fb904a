"""OpenSpatial's columns: scene -> columns -> scene, scalar values for all views, bad rows."""

import numpy as np
import pytest

from spatialvlm.errors import ImporterError, SceneSchemaError
from spatialvlm.scenes.importers.common import ImportOptions, ImportReport
from spatialvlm.scenes.importers.openspatial import from_columns, to_columns
from spatialvlm.scenes.rooms.build import RenderConfig, RoomSpec, write_room


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    folder = tmp_path_factory.mktemp("room")
    return write_room(
        RoomSpec(1, preset="small"), folder, RenderConfig(num_frames=3, width=96, height=72)
    )


def read(row, room, **options):
    return from_columns(row, room.root, ImportOptions(), ImportReport(), **options)


@pytest.mark.parametrize("convention", ["embodiedscan_zxy", "openspatial"])
def test_round_trip(room, convention):
    again = read(to_columns(room, convention=convention), room, convention=convention)
    assert again.scene_id == room.scene_id
    for a, b in zip(again.objects, room.objects, strict=True):
        assert a.label == b.label
        distance = np.abs(a.box.corners[:, None] - b.box.corners[None]).max(axis=2).min(axis=1)
        assert distance.max() < 1e-6
    for a, b in zip(again.frames, room.frames, strict=True):
        np.testing.assert_allclose(a.world_from_cam, b.world_from_cam, atol=1e-9)
        for vis in b.visible:
            assert a.vis(vis.obj).vis_frac == pytest.approx(vis.vis_frac, abs=0.12)


def test_scalar_depth_scale_ignored(room):
    """An integer depth_scale and a single intrinsic matrix hold for all views."""
    row = to_columns(room)
    row["depth_scale"], row["intrinsic"] = 1000, row["intrinsic"][0]
    again = read(row, room)
    assert [frame.depth_scale for frame in again.frames] == [1000.0] * 3
    np.testing.assert_allclose(again.frames[2].intrinsics, room.frames[0].intrinsics)
    one = {
        **row,
        "image": row["image"][0],
        "pose": row["pose"][0],
        "depth_map": row["depth_map"][0],
    }
    assert len(read(one, room).frames) == 1


def test_bad_rows(room):
    row = to_columns(room)
    with pytest.raises(ImporterError, match="'pose' is missing"):
        read({key: value for key, value in row.items() if key != "pose"}, room)
    with pytest.raises(ImporterError, match="pose has 2 entries for 3 images"):
        read({**row, "pose": row["pose"][:2]}, room)
    with pytest.raises(SceneSchemaError, match=r"no usable frame .*missing_image 3"):
        read({**row, "image": ["no.jpg"] * 3}, room)
