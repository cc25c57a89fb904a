"""Importers of raw scans: ScanNet, ScanNet++, ARKitScenes, Hypersim, each on files in its own layout.

One small world (two boxes on a floor, two cameras) is written in every format; what comes back must be
that world, whatever the axes, units and pixel conventions of the format.
"""

import struct

import numpy as np
import pytest

from spatialvlm.errors import ImporterError, SceneSchemaError
from spatialvlm.scenes.importers import arkitscenes, hypersim, scannet, scannetpp
from spatialvlm.scenes.importers.common import ImportOptions, ImportReport, rebase
from spatialvlm.scenes.importers.sens import SensReader
from spatialvlm.scenes.io import load_depth, load_instances, load_rgb, load_scene, save_scene
from spatialvlm.scenes.ply import read_mesh, read_vertices
from spatialvlm.scenes.render.raycast import cast_boxes
from tests.unit.scenes.scan_files import (
    BOXES,
    FLOOR,
    HEIGHT,
    LABELS,
    WIDTH,
    box_triangles,
    views,
    write_arkit,
    write_hypersim,
    write_mesh,
    write_ply,
    write_scannet,
    write_scannetpp_dslr,
    write_scannetpp_iphone,
)


def check_world(scene, tmp_path, size_tolerance=1e-5):
    """The imported scene is the small world, in memory and after a round trip through its file."""
    save_scene(rebase(scene, tmp_path / "imported"), tmp_path / "imported")
    scene = load_scene(tmp_path / "imported")
    assert [o.label for o in scene.objects] == list(LABELS)
    for item, box in zip(scene.objects, BOXES, strict=True):
        np.testing.assert_allclose(item.center, box.center, atol=size_tolerance)
        nearest = np.abs(item.box.corners[:, None] - box.corners[None]).max(axis=2).min(axis=1)
        assert nearest.max() < 2 * size_tolerance
    for frame, view in zip(scene.frames, views(), strict=True):
        np.testing.assert_allclose(
            frame.camera.world_from_cam, view.camera.world_from_cam, atol=1e-4
        )
        np.testing.assert_allclose(frame.camera.intrinsics, view.camera.intrinsics, atol=1e-3)
        assert load_rgb(scene, frame).shape == (HEIGHT, WIDTH, 3)
        if frame.depth is not None:
            np.testing.assert_allclose(load_depth(scene, frame), view.depth, atol=2e-3)
        if frame.instance_map is not None:
            np.testing.assert_array_equal(load_instances(scene, frame), view.ids)
        for vis in frame.visible:
            assert vis.in_frustum_frac < 0.3 or vis.vis_frac > 0.2
    assert {v.obj for v in scene.frames[0].visible if v.state == "visible"} == {0, 1}


@pytest.mark.parametrize("exported", [False, True])
def test_scannet(tmp_path, exported):
    write_scannet(tmp_path / "raw", exported=exported)
    report = ImportReport()
    options = ImportOptions(media=tmp_path / "media")
    (scene,) = scannet.iter_scenes(tmp_path / "raw", options, report)
    assert (scene.scene_id, scene.room_id) == ("scannet/scene9000_01", "scannet/scene9000")
    assert scene.frames[0].time_s == (None if exported else 0.5)
    assert (scene.frames[0].instance_map is not None) is exported
    # Segment clouds of 1,500 points with the exact corners: percentiles trim half a percent of height.
    check_world(scene, tmp_path, size_tolerance=0.01)
    assert scene.room.area_m2 == pytest.approx(144, rel=0.02)


def test_scannet_lost_frames_and_damage(tmp_path):
    lost = [np.full((4, 4), -np.inf)] * 2
    folder = write_scannet(tmp_path / "lost", poses=lost)
    report = ImportReport()
    with pytest.raises(SceneSchemaError, match="no usable frame"):
        list(scannet.iter_scenes(tmp_path / "lost", ImportOptions(media=tmp_path / "m"), report))
    assert report.counters["bad_pose"] == 2
    sens = folder / "scene9000_01.sens"
    data = sens.read_bytes()
    sens.write_bytes(data[:-10])
    with (
        SensReader(sens) as reader,
        pytest.raises(ImporterError, match=rf"offset {len(data) - 10}, 10 bytes"),
    ):
        list(reader)
    sens.write_bytes(struct.pack("<I", 3) + data[4:])
    with pytest.raises(ImporterError, match="version 3"):
        SensReader(sens)
    (folder / "scene9000_01.aggregation.json").unlink()
    with pytest.raises(ImporterError, match=r"aggregation\.json: missing"):
        list(scannet.iter_scenes(tmp_path / "lost", ImportOptions(), ImportReport()))


def test_ply(tmp_path):
    vertices = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    for binary in (True, False):
        write_ply(tmp_path / "a.ply", vertices, binary)
        np.testing.assert_allclose(read_vertices(tmp_path / "a.ply"), vertices, atol=1e-6)
        data = (tmp_path / "a.ply").read_bytes()
        (tmp_path / "a.ply").write_bytes(data[: len(data) // 2])
        with pytest.raises(ImporterError, match=r"a\.ply"):
            read_vertices(tmp_path / "a.ply")
    (tmp_path / "a.ply").write_bytes(b"solid")
    with pytest.raises(ImporterError, match="not a PLY"):
        read_vertices(tmp_path / "a.ply")


@pytest.mark.parametrize("depth_form", ["whole", "lz4"])
def test_scannetpp_iphone(tmp_path, depth_form):
    folder = write_scannetpp_iphone(tmp_path / "raw", depth_form)
    (scene,) = scannetpp.iter_scenes(
        tmp_path / "raw", ImportOptions(media=tmp_path / "m"), ImportReport()
    )
    assert scene.scene_id == "scannetpp/0a1b2c3d4e"
    check_world(scene, tmp_path)
    if depth_form == "lz4":
        data = (folder / "iphone" / "depth.bin").read_bytes()
        (folder / "iphone" / "depth.bin").write_bytes(data[:-5])
        with pytest.raises(ImporterError, match="frame 1 ends early"):
            list(
                scannetpp.iter_scenes(
                    tmp_path / "raw", ImportOptions(media=tmp_path / "m"), ImportReport()
                )
            )


def test_scannetpp_dslr_axes(tmp_path):
    write_scannetpp_dslr(tmp_path / "raw", bad_frame=True)
    report = ImportReport()
    (scene,) = scannetpp.iter_scenes(tmp_path / "raw", ImportOptions(), report)
    assert report.counters["bad_frame"] == 1
    assert all(frame.extra["unfiltered"] for frame in scene.frames)
    check_world(scene, tmp_path)


@pytest.mark.parametrize("binary", [True, False])
def test_depth_from_the_mesh_of_the_scan(tmp_path, binary):
    """DSLR frames have no depth: embree casts the mesh, and visibility is measured."""
    pytest.importorskip("embreex", reason="needs the extra 'scenes'")
    folder = write_scannetpp_dslr(tmp_path / "raw")
    mesh = folder / "scans" / "mesh_aligned_0.05.ply"
    write_mesh(mesh, *box_triangles([*BOXES, FLOOR]), binary)
    report = ImportReport()
    options = ImportOptions(mesh_depth=True, media=tmp_path / "media")
    (scene,) = scannetpp.iter_scenes(tmp_path / "raw", options, report)
    assert report.counters == {"mesh_depth": 2}
    for frame, view in zip(scene.frames, views(), strict=True):
        depth, _ = cast_boxes([*BOXES, FLOOR], view.camera)
        stored = load_depth(scene, frame)
        assert (np.abs(stored - depth) < 2e-3).mean() > 0.99
        assert "unfiltered" not in frame.extra
        assert frame.vis(0).occupancy
    data = mesh.read_bytes()
    mesh.write_bytes(data[:-40])
    with pytest.raises(ImporterError, match="aligned"):
        list(scannetpp.iter_scenes(tmp_path / "raw", options, ImportReport()))
    mesh.unlink()
    with pytest.raises(ImporterError, match="needs the mesh of the scan"):
        list(scannetpp.iter_scenes(tmp_path / "raw", options, ImportReport()))


def test_meshes_that_are_none(tmp_path):
    write_ply(tmp_path / "points.ply", np.zeros((4, 3)))
    with pytest.raises(ImporterError, match="has no faces"):
        read_mesh(tmp_path / "points.ply")
    write_mesh(tmp_path / "a.ply", np.zeros((3, 3)), [[0, 1, 7]])
    with pytest.raises(ImporterError, match="names vertex 7 of 3"):
        read_mesh(tmp_path / "a.ply")
    data = (tmp_path / "a.ply").read_bytes()
    at = data.index(b"end_header\n") + len(b"end_header\n") + 36
    (tmp_path / "a.ply").write_bytes(data[:at] + b"\x04" + data[at + 1 :])
    with pytest.raises(ImporterError, match="not all triangles"):
        read_mesh(tmp_path / "a.ply")


def test_arkitscenes(tmp_path):
    frames = write_arkit(tmp_path / "raw")
    report = ImportReport()
    (scene,) = arkitscenes.iter_scenes(tmp_path / "raw", ImportOptions(), report)
    assert (scene.scene_id, scene.room_id) == ("arkitscenes/40000002", "arkitscenes/420001")
    assert (scene.split, scene.frames[1].time_s) == ("train", 100.5)
    assert report.counters["no_pose_near_frame"] == 1
    check_world(scene, tmp_path)
    options = ImportOptions(upright=True, media=tmp_path / "m")
    (turned,) = arkitscenes.iter_scenes(tmp_path / "raw", options, ImportReport())
    assert (turned.frames[0].width, turned.frames[0].height) == (HEIGHT, WIDTH)
    before, after = (s.frames[0].vis(0) for s in (scene, turned))
    assert after.vis_frac == pytest.approx(before.vis_frac, abs=0.05)
    (frames / "lowres_wide.traj").write_text("1 2 3\n")
    with pytest.raises(ImporterError, match="3 numbers a line"):
        list(arkitscenes.iter_scenes(tmp_path / "raw", ImportOptions(), ImportReport()))


def test_hypersim(tmp_path):
    folder = write_hypersim(tmp_path / "raw")
    options = ImportOptions(media=tmp_path / "m")
    (scene,) = hypersim.iter_scenes(tmp_path / "raw", options, ImportReport())
    assert (scene.scene_id, scene.room_id) == ("hypersim/ai_900_001/cam_00", "hypersim/ai_900_001")
    check_world(scene, tmp_path)
    assert 195 <= load_rgb(scene, scene.frames[0]).mean() <= 210  # 0.8 of 255
    next(folder.glob("images/*final*/*.hdf5")).write_bytes(b"broken")
    with pytest.raises(ImporterError, match=r"color\.hdf5"):
        list(hypersim.iter_scenes(tmp_path / "raw", options, ImportReport()))


def test_official_splits_come_from_the_lists_of_the_datasets(tmp_path):
    options = ImportOptions(media=tmp_path / "m")
    cases = (
        (scannet, write_scannet, "scannetv2_val.txt", "scene9000_00\nscene9000_01\n", "val"),
        (scannet, write_scannet, "scannetv2_val.txt", "scene9000_00\n", "train"),
        (scannetpp, write_scannetpp_dslr, "splits/nvs_sem_val.txt", "0a1b2c3d4e\n", "val"),
        (scannetpp, write_scannetpp_dslr, "splits/sem_test.txt", "0a1b2c3d4e\n", "test"),
        (
            hypersim, write_hypersim, "metadata_images_split_scene_v1.csv",
            "scene_name,split_partition_name\nai_900_001,test\nai_900_001,\n", "test",
        ),
    )  # fmt: skip
    for number, (importer, write, name, text, split) in enumerate(cases):
        root = tmp_path / str(number)
        write(root)
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
        (scene,) = importer.iter_scenes(root, options, ImportReport())
        assert scene.split == split, name
