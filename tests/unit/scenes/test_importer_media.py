"""Where importers find pictures: lenses of their own, videos, frames borrowed from another import."""

import csv
import json
import pickle
import shutil
from dataclasses import replace

import av
import numpy as np
import pytest
from PIL import Image

from spatialvlm.errors import ImporterError, SceneSchemaError
from spatialvlm.scenes.boxes import Box
from spatialvlm.scenes.cameras import Camera
from spatialvlm.scenes.importers import (
    arkitscenes,
    embodiedscan,
    openspatial,
    scannet,
    scannetpp,
    vla3d,
    vsi_meta,
)
from spatialvlm.scenes.importers.common import ImportOptions, ImportReport, rebase, reference_scans
from spatialvlm.scenes.io import load_depth, load_rgb, load_scene, save_scene
from spatialvlm.scenes.render.raycast import cast_boxes
from spatialvlm.scenes.transforms import rigid, rz, yaw_of
from tests.unit.scenes.annotation_files import (
    vla_row,
    write_embodiedscan,
    write_vla,
    write_vlm3r,
)
from tests.unit.scenes.scan_files import (
    ALIGN,
    BOXES,
    HEIGHT,
    LABELS,
    WIDTH,
    picture,
    views,
    write_arkit,
    write_ply,
    write_scannet,
    write_scannetpp_iphone,
)


def write_3rscan(root):
    """A 3RScan scene of EmbodiedScan: wide colour, small depth of another lens as 16-bit PGM."""
    box = Box.upright((2.5, 0.0, 0.5), (0.6, 0.6, 1.0))
    color = Camera.look((0, 0, 1.4), 0.0, -15.0, hfov_deg=80, width=96, height=54)
    lens = np.array([[38.0, 0, 28.0], [0, 38.0, 21.5], [0, 0, 1]])
    sensor = Camera(lens, color.world_from_cam, 56, 43)
    folder = root / "3rscan" / "0a1b" / "sequence"
    folder.mkdir(parents=True)
    Image.fromarray(np.full((54, 96, 3), 90, np.uint8)).save(folder / "frame-000000.color.jpg")
    depth, _ = cast_boxes([box], sensor)
    values = (np.where(depth > 0, depth, 6.0) * 1000).round().astype(">u2")
    (folder / "frame-000000.depth.pgm").write_bytes(b"P5\n56 43\n65535\n" + values.tobytes())

    def matrix(k):
        return np.block([[k, np.zeros((3, 1))], [np.zeros((1, 3)), np.ones((1, 1))]])

    entry = {
        "sample_idx": "3rscan/0a1b",
        "axis_align_matrix": np.eye(4),
        "cam2img": matrix(color.intrinsics),
        "depth_cam2img": matrix(lens),
        "images": [
            {
                "img_path": "3rscan/0a1b/sequence/frame-000000.color.jpg",
                "depth_path": "3rscan/0a1b/sequence/frame-000000.depth.pgm",
                "cam2global": color.world_from_cam,
                "visible_instance_ids": [1],
            }
        ],
        "instances": [
            {"bbox_3d": [9, 9, 9, 0, 1, 1, 0, 0, 0], "bbox_label_3d": 1},
            {"bbox_3d": embodiedscan.box_values(box), "bbox_label_3d": 1},
            {"bbox_3d": [7, 7, 0.5, 1, 1, 1, 90.0, 0, 0], "bbox_label_3d": 99},
        ],
    }
    content = {"metainfo": {"categories": {"chair": 1}}, "data_list": [entry]}
    (root / "embodiedscan_infos_val.pkl").write_bytes(pickle.dumps(content))
    return box, color


def test_depth_of_another_lens_is_seen_by_the_colour_camera(tmp_path):
    box, color = write_3rscan(tmp_path / "raw")
    report = ImportReport()
    options = ImportOptions(media=tmp_path / "media")
    (scene,) = embodiedscan.iter_scenes(tmp_path / "raw", options, report)
    (frame,) = scene.frames
    depth = load_depth(scene, frame)
    expected, _ = cast_boxes([box], color)
    expected = np.where(expected > 0, expected, 6.0)
    seen = depth > 0
    assert 0.5 < seen.mean() < 0.95  # the depth sensor does not look as wide
    # Pixels on the outline of the box fall on either side of it.
    assert (np.abs(depth - expected)[seen] < 0.02).mean() > 0.95
    assert frame.vis(0).state == "visible"
    # Counted: a box without size, an angle in degrees. A label id without name is not a target.
    assert report.counters == {"bad_box": 1, "angle_range": 1}
    assert frame.extra["annotated_visible"] == [0]
    assert [(o.label, o.is_target) for o in scene.objects] == [("chair", True), ("unknown", False)]


def test_rescans_belong_to_the_room_of_their_reference(tmp_path):
    write_3rscan(tmp_path)
    listed = [{"reference": "ref0", "scans": [{"reference": "0a1b", "transform": []}]}]
    (tmp_path / "3RScan.json").write_text(json.dumps(listed))
    options = ImportOptions(media=tmp_path / "media")
    (scene,) = embodiedscan.iter_scenes(tmp_path, options, ImportReport())
    assert scene.room_id == "3rscan/ref0"
    (tmp_path / "3RScan.json").write_text('{"scans": 1}')
    reference_scans.cache_clear()
    with pytest.raises(ImporterError, match="not the scan list of 3RScan"):
        reference_scans(tmp_path)


def test_missing_pictures_are_counted_and_the_rest_is_imported(tmp_path):
    folder = write_scannet(tmp_path / "raw", exported=True)
    (folder / "color" / "0.jpg").unlink()
    report = ImportReport()
    options = ImportOptions(media=tmp_path / "media")
    (scene,) = scannet.iter_scenes(tmp_path / "raw", options, report)
    assert [frame.frame_id for frame in scene.frames] == ["1"]
    assert report.counters["missing_image"] == 1
    (folder / "color" / "1.jpg").write_bytes(b"\xff\xd8 torn")
    with pytest.raises(ImporterError, match=r"1\.jpg: cannot be opened"):
        list(scannet.iter_scenes(tmp_path / "raw", options, ImportReport()))
    (folder / "color" / "1.jpg").unlink()
    with pytest.raises(SceneSchemaError, match=r"no usable frame .*missing_image 2"):
        list(scannet.iter_scenes(tmp_path / "raw", options, ImportReport()))


def test_mirrored_and_impossible_cameras_are_counted(tmp_path):
    mirrored = np.diag([1.0, 1.0, -1.0, 1.0])
    write_scannet(tmp_path / "a", exported=True, poses=[ALIGN, mirrored])
    report = ImportReport()
    options = ImportOptions(media=tmp_path / "media")
    (scene,) = scannet.iter_scenes(tmp_path / "a", options, report)
    assert len(scene.frames) == 1
    assert report.counters["bad_pose"] == 1
    k = tmp_path / "a" / "scans" / "scene9000_01" / "intrinsic" / "intrinsic_color.txt"
    np.savetxt(k, np.diag([-50.0, 50.0, 1.0, 1.0]))
    with pytest.raises(SceneSchemaError, match="bad_intrinsics 2"):
        list(scannet.iter_scenes(tmp_path / "a", options, ImportReport()))


def test_mirrored_axes_are_the_same_solid_and_counted(tmp_path):
    frames = write_arkit(tmp_path)
    path = frames.parent / f"{frames.parent.name}_3dod_annotation.json"
    content = json.loads(path.read_text())
    obb = content["data"][0]["segments"]["obbAligned"]
    obb["normalizedAxes"] = [*obb["normalizedAxes"][:6], *(-v for v in obb["normalizedAxes"][6:])]
    skewed = content["data"][1]["segments"]["obbAligned"]
    skewed["normalizedAxes"] = [1, 0, 0, 0.5, 1, 0, 0, 0, 1]
    path.write_text(json.dumps(content))
    report = ImportReport()
    (scene,) = arkitscenes.iter_scenes(tmp_path, ImportOptions(), report)
    assert (report.counters["mirrored_axes"], report.counters["bad_box"]) == (1, 1)
    corners = scene.objects[0].box.corners
    nearest = np.abs(corners[:, None] - BOXES[0].corners[None]).max(axis=2).min(axis=1)
    assert nearest.max() < 1e-9


def test_scannet_depth_has_another_resolution(tmp_path):
    """Colour is 1296x968 and depth 640x480 there; here depth has half the pixels."""
    folder = write_scannet(tmp_path / "raw", exported=True)
    for index, view in enumerate(views()):
        half = view.depth[1::2, 1::2]
        Image.fromarray((half * 1000).round().astype(np.uint16)).save(
            folder / "depth" / f"{index}.png"
        )
    options = ImportOptions(media=tmp_path / "media")
    (scene,) = scannet.iter_scenes(tmp_path / "raw", options, ImportReport())
    for frame, view in zip(scene.frames, views(), strict=True):
        depth = load_depth(scene, frame)
        assert depth.shape == (HEIGHT, WIDTH)
        assert (np.abs(depth - view.depth) < 0.15).mean() > 0.9
        assert frame.vis(0).state == "visible"


def test_scannetpp_pictures_inside_the_video(tmp_path):
    folder = write_scannetpp_iphone(tmp_path / "raw", "whole")
    shutil.rmtree(folder / "iphone" / "rgb")
    with av.open(str(folder / "iphone" / "rgb.mp4"), "w") as video:
        stream = video.add_stream("mpeg4", rate=30)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for grey in (40, 200):
            image = np.full((HEIGHT, WIDTH, 3), grey, np.uint8)
            video.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        video.mux(stream.encode(None))
    options = ImportOptions(media=tmp_path / "media")
    (scene,) = scannetpp.iter_scenes(tmp_path / "raw", options, ImportReport())
    means = [load_rgb(scene, frame).mean() for frame in scene.frames]
    assert means == pytest.approx([40, 200], abs=6)
    save_scene(rebase(scene, tmp_path / "out"), tmp_path / "out")
    again = load_scene(tmp_path / "out")
    assert load_rgb(again, again.frames[1]).shape == (HEIGHT, WIDTH, 3)
    (folder / "iphone" / "rgb.mp4").write_bytes(b"no video")
    with pytest.raises(ImporterError, match=r"rgb\.mp4: cannot be decoded"):
        list(scannetpp.iter_scenes(tmp_path / "raw", options, ImportReport()))


def floor_points(width, length):
    u, v = np.meshgrid(np.linspace(0, width, 80), np.linspace(0, length, 60))
    return np.c_[u.ravel(), v.ravel(), np.full(u.size, 0.02)]


def test_floor_area_comes_from_the_mesh(tmp_path):
    frames = write_arkit(tmp_path / "arkit")
    write_ply(frames.parent / f"{frames.parent.name}_3dod_mesh.ply", floor_points(4.0, 3.0))
    (scene,) = arkitscenes.iter_scenes(tmp_path / "arkit", ImportOptions(), ImportReport())
    assert scene.room.area_m2 == pytest.approx(12.0, rel=0.01)
    assert (scene.room.area_method, scene.room.floor_z) == ("alpha", pytest.approx(0.02))
    folder = write_scannetpp_iphone(tmp_path / "pp", "whole")
    write_ply(folder / "scans" / "mesh_aligned_0.05.ply", floor_points(2.0, 5.0)[:1000])
    options = ImportOptions(media=tmp_path / "m")
    (scene,) = scannetpp.iter_scenes(tmp_path / "pp", options, ImportReport())
    assert (scene.room.area_m2, scene.room.area_method) == (None, "none")  # too few points


def test_arkit_visits_and_sky(tmp_path):
    write_arkit(tmp_path)
    (tmp_path / "metadata.csv").unlink()
    split = tmp_path / "3dod_train_val_splits.csv"
    for visit, room in (("380031", "arkitscenes/380031"), ("NA", "arkitscenes/40000002")):
        split.write_text(f"video_id,visit_id,fold\n40000002,{visit},Training\n")
        arkitscenes._metadata.cache_clear()
        options = ImportOptions(upright=True, media=tmp_path / "m")
        (scene,) = arkitscenes.iter_scenes(tmp_path, options, ImportReport())
        assert scene.room_id == room
        # Without a sky direction the poses decide; these pictures are upright.
        assert (scene.frames[0].width, scene.frames[0].height) == (WIDTH, HEIGHT)
    arkitscenes._metadata.cache_clear()


def test_vlm3r_frames(tmp_path):
    box, camera = write_vlm3r(tmp_path)
    report = ImportReport()
    (scene,) = vsi_meta.iter_scenes(tmp_path, ImportOptions(), report)
    assert [o.id for o in scene.objects] == ["7"]
    np.testing.assert_allclose(scene.objects[0].center, box.center, atol=1e-9)
    assert [frame.frame_id for frame in scene.frames] == ["000000", "000001"]
    np.testing.assert_allclose(scene.frames[0].intrinsics, camera.intrinsics)
    assert scene.frames[0].vis(0).state == "visible"
    assert report.counters == {"missing_image": 1}
    write_vlm3r(tmp_path, shift=3.0)
    vsi_meta._load.cache_clear()
    with pytest.raises(ImporterError, match="2 of 2 projected boxes miss their 2D box"):
        list(vsi_meta.iter_scenes(tmp_path, ImportOptions(), ImportReport()))
    vsi_meta._load.cache_clear()


def vla_scene(root, dataset, name, boxes):
    rows = [
        vla_row(
            object_id=index,
            raw_label=label,
            object_bbox_heading=yaw_of(box.rotation),
            **dict(
                zip(("object_bbox_cx", "object_bbox_cy", "object_bbox_cz"), box.center, strict=True)
            ),
            **{f"object_bbox_{axis}length": v for axis, v in zip("xyz", box.size, strict=True)},
        )
        for index, (label, box) in enumerate(zip(LABELS, boxes, strict=True))
    ]
    write_vla(root, rows)
    (root / dataset).mkdir(exist_ok=True)
    moved = (root / "ARKitScenes" / "40000001").rename(root / dataset / name)
    (moved / "40000001_object_result.csv").rename(moved / f"{name}_object_result.csv")


def test_vla3d_borrows_the_frames_of_an_import(tmp_path):
    write_scannet(tmp_path / "raw", exported=True)
    options = ImportOptions(media=tmp_path / "media")
    (lender,) = scannet.iter_scenes(tmp_path / "raw", options, ImportReport())
    folder = tmp_path / "imported" / lender.scene_id
    save_scene(rebase(lender, folder), folder)
    vla_scene(tmp_path / "vla", "ScanNet", "scene9000_01", BOXES)
    report = ImportReport()
    options = ImportOptions(rgb_root=tmp_path / "imported")
    (scene,) = vla3d.iter_scenes(tmp_path / "vla", options, report)
    assert scene.scene_id == lender.scene_id
    assert report.counters == {}
    assert scene.frames[0].vis(0).vis_frac == pytest.approx(
        lender.frames[0].vis(0).vis_frac, abs=0.02
    )
    assert load_rgb(scene, scene.frames[0]).shape == (HEIGHT, WIDTH, 3)
    # Boxes of another world are noticed, a scene nobody imported has no frames.
    far = [Box(box.center + np.array([3.0, 0, 0]), box.size, box.rotation) for box in BOXES]
    vla_scene(tmp_path / "far", "ScanNet", "scene9000_01", far)
    with pytest.raises(ImporterError, match=r"3\.00 m \(median\)"):
        list(vla3d.iter_scenes(tmp_path / "far", options, ImportReport()))
    # Without a common label nothing can be compared: the report says so.
    renamed = [replace(item, label="kiosk") for item in lender.objects]
    save_scene(rebase(replace(lender, objects=renamed), folder), folder)
    report = ImportReport()
    list(vla3d.iter_scenes(tmp_path / "far", options, report))
    assert report.counters["world_unchecked"] == 1
    report = ImportReport()
    options = ImportOptions(rgb_root=tmp_path / "raw")
    (scene,) = vla3d.iter_scenes(tmp_path / "vla", options, report)
    assert (scene.frames, report.counters) == ([], {"no_frames": 1})


def test_vla3d_frames_go_back_to_the_world_of_the_source(tmp_path):
    """EmbodiedScan aligns Matterport; VLA-3D's boxes stay in the raw world, region by region."""
    boxes = write_embodiedscan(tmp_path / "raw", sample="matterport3d/17DRP5sb8fy/region3")
    (lender,) = embodiedscan.iter_scenes(tmp_path / "raw", ImportOptions(), ImportReport())
    folder = tmp_path / "imported" / lender.scene_id
    save_scene(rebase(lender, folder), folder)
    raw = [box.transformed(rigid(rz(-0.3), rz(-0.3) @ [-0.5, 0.2, -0.1])) for box in boxes]
    vla_scene(tmp_path / "vla", "Matterport", "17DRP5sb8fy", raw)
    options = ImportOptions(rgb_root=tmp_path / "imported")
    (scene,) = vla3d.iter_scenes(tmp_path / "vla", options, ImportReport())
    assert scene.scene_id == "matterport3d/17DRP5sb8fy"
    before, after = lender.frames[0], scene.frames[0]
    assert after.vis(0).bbox2d == pytest.approx(before.vis(0).bbox2d, abs=0.5)


def test_openspatial_tables(tmp_path):
    write_scannet(tmp_path / "raw", exported=True)
    options = ImportOptions(media=tmp_path / "media")
    (scene,) = scannet.iter_scenes(tmp_path / "raw", options, ImportReport())
    openspatial.write_rows([rebase(scene, tmp_path)], tmp_path / "rows.parquet")
    (again,) = openspatial.iter_scenes(tmp_path, ImportOptions(), ImportReport())
    assert [o.label for o in again.objects] == list(LABELS)
    assert [f.rgb for f in again.frames] == [f.rgb for f in rebase(scene, tmp_path).frames]
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 torn")
    openspatial._rows.cache_clear()
    with pytest.raises(ImporterError, match=r"rows\.parquet: not a readable parquet"):
        openspatial.read_scene(tmp_path, "rows.parquet::0", ImportOptions(), ImportReport())
    with pytest.raises(ImporterError, match=r"rows\.parquet: not a readable parquet"):
        openspatial.list_scenes(tmp_path)


def test_real_vla3d_boxes_with_frames(real_dir, tmp_path):
    """Real VLA-3D boxes take the frames of an import of the same scan; the gaps between both are checked."""
    native = "47204840"
    source = real_dir / "vla3d" / "ARKitScenes" / native / f"{native}_object_result.csv"
    with source.open(newline="") as file:
        rows = list(csv.DictReader(file))
    folder = tmp_path / "raw" / "Training" / native
    frames = folder / f"{native}_frames"
    (frames / "lowres_wide_intrinsics").mkdir(parents=True)
    data = []
    for row in rows:
        center, size = (
            [float(row[f"object_bbox_{name}"]) for name in names]
            for names in (("cx", "cy", "cz"), ("xlength", "ylength", "zlength"))
        )
        axes = rz(float(row["object_bbox_heading"])).T.ravel().tolist()
        obb = {"centroid": center, "axesLengths": size, "normalizedAxes": axes}
        data.append(
            {"uid": row["object_id"], "label": row["raw_label"], "segments": {"obbAligned": obb}}
        )
    (folder / f"{native}_3dod_annotation.json").write_text(json.dumps({"data": data}))
    picture(frames / "lowres_wide" / f"{native}_5.000.png")
    (frames / "lowres_wide_intrinsics" / f"{native}_5.000.pincam").write_text(
        "64 48 50 50 31.5 23.5"
    )
    (frames / "lowres_wide.traj").write_text("5.0 1.6 0 0 0 0 0\n5.1 1.6 0 0 0 0 0\n")
    (lender,) = arkitscenes.iter_scenes(tmp_path / "raw", ImportOptions(), ImportReport())
    target = tmp_path / "imported" / lender.scene_id
    save_scene(rebase(lender, target), target)
    options = ImportOptions(rgb_root=tmp_path / "imported")
    scene = vla3d.read_scene(real_dir / "vla3d", f"ARKitScenes/{native}", options, ImportReport())
    assert len(scene.frames) == 1
    assert len(scene.objects) == len(rows)
