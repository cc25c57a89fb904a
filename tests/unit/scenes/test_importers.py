"""Importers without extracted media: EmbodiedScan pickles, VSI-Bench meta, VLA-3D tables."""

import codecs
import json
import os
import pickle

import numpy as np
import pytest

from spatialvlm.errors import ImporterError, SceneSchemaError, UnsafePickleError
from spatialvlm.scenes.boxes import Box
from spatialvlm.scenes.cameras import Camera
from spatialvlm.scenes.importers import embodiedscan, vla3d, vsi_meta
from spatialvlm.scenes.importers.common import (
    ImportOptions,
    ImportReport,
    ObjectList,
    choose_frames,
    depth_kind_suspect,
    normalise_label,
    quarter_turns_to_upright,
    rebase,
    turn_upright,
)
from spatialvlm.scenes.importers.unpickle import safe_load, safe_loads
from spatialvlm.scenes.io import load_scene, save_scene
from spatialvlm.scenes.render.raycast import cast_boxes
from spatialvlm.scenes.schema import Frame, Room, Scene
from spatialvlm.scenes.transforms import rx, rz
from tests.unit.scenes.annotation_files import (
    HEADER,
    vla_row,
    vsi_entry,
    write_embodiedscan,
    write_vla,
    write_vsi,
)


@pytest.mark.parametrize("sample", ["scannet/scene9000_00", "matterport3d/17DRP5sb8fy/region3"])
def test_embodiedscan(tmp_path, sample):
    boxes = write_embodiedscan(tmp_path, sample=sample)
    report = ImportReport()
    (scene,) = embodiedscan.iter_scenes(tmp_path, ImportOptions(), report)
    assert scene.scene_id == sample
    assert scene.room_id == (
        "scannet/scene9000" if "scannet" in sample else "matterport3d/17DRP5sb8fy"
    )
    assert (scene.split, [o.label for o in scene.objects]) == ("train", ["chair", "bin"])
    for item, box in zip(scene.objects, boxes, strict=True):
        np.testing.assert_allclose(item.center, box.center, atol=1e-6)
        corners = [b.corners[np.lexsort(b.corners.round(4).T)] for b in (item.box, box)]
        np.testing.assert_allclose(*corners, atol=1e-5)
    # Poses are in the aligned world: the camera of the fixture stands at (0, 0, 1.4).
    np.testing.assert_allclose(scene.frames[0].camera.centre, (0, 0, 1.4), atol=1e-9)
    assert scene.frames[0].vis(0).state == "visible"
    assert scene.frames[0].vis(0).depth_near == pytest.approx(2.1, abs=0.3)
    save_scene(rebase(scene, tmp_path / "out"), tmp_path / "out")
    again = load_scene(tmp_path / "out")
    assert again.path(again.frames[0].rgb).is_file()


def test_embodiedscan_bad_poses_and_boxes(tmp_path):
    write_embodiedscan(tmp_path, cam2global=np.full((4, 4), -np.inf))
    report = ImportReport()
    with pytest.raises(SceneSchemaError, match="no usable frame"):
        next(embodiedscan.iter_scenes(tmp_path, ImportOptions(), report))
    assert report.counters["bad_pose"] == 2
    bad = [{"bbox_3d": [1, 1, 1, 0, 1, 1, 0, 0, 0], "bbox_label_3d": 1},
           {"bbox_3d": [1, 1, np.nan, 1, 1, 1, 0, 0, 0], "bbox_label_3d": 1}]  # fmt: skip
    write_embodiedscan(tmp_path, instances=bad)
    embodiedscan._CACHE.clear()
    report = ImportReport()
    (scene,) = embodiedscan.iter_scenes(tmp_path, ImportOptions(), report)
    assert scene.objects == []
    assert report.counters["bad_box"] == 2


def test_embodiedscan_of_another_layout(tmp_path):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"data": []}))
    with pytest.raises(ImporterError, match="metainfo"):
        embodiedscan.list_scenes(tmp_path)


class _Payload:
    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


def _payloads():
    import numpy.testing

    yield "system", _Payload(os.system, "touch /tmp/spatialvlm-unsafe-pickle")
    yield "eval", _Payload(eval, "1+1")
    yield "getattr", _Payload(getattr, "x", "upper")
    yield "runstring", _Payload(numpy.testing.assert_raises, Exception)
    yield (
        "system",
        [1, {"nested": [_Payload(_Payload, os.system, "true")], "b": _Payload(os.system, "true")}],
    )


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_unsafe_pickle_load(protocol, tmp_path):
    for _, payload in _payloads():
        (tmp_path / "x.pkl").write_bytes(pickle.dumps(payload, protocol))
        with pytest.raises(UnsafePickleError, match=r"x\.pkl: the pickle asks for [\w.]+\.\w+"):
            safe_load(tmp_path / "x.pkl")


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_harmless_pickles_load(protocol):
    value = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": [
            np.float64(1.5),
            {1, 2},
            frozenset({3}),
            b"bytes",
            bytearray(b"x"),
            1 + 2j,
            (True, None),
        ],
        "c": np.array(["text"]),
        "d": slice(1, 2),
    }
    loaded = safe_loads(pickle.dumps(value, protocol))
    np.testing.assert_array_equal(loaded["a"], value["a"])
    assert loaded["b"] == value["b"]
    assert loaded["d"] == value["d"]
    assert codecs.encode("a", "rot13") == "n"  # the one allowed codec call is harmless


def test_module_functions_of_numpy_are_refused():
    for module, name in (
        ("numpy", "load"),
        ("numpy.core.multiarray", "fromfile"),
        ("builtins", "open"),
    ):
        data = f"c{module}\n{name}\n.".encode()
        with pytest.raises(UnsafePickleError, match=name):
            safe_loads(data)


def test_truncated_pickle(tmp_path):
    data = pickle.dumps({"a": np.zeros(1000)})
    (tmp_path / "x.pkl").write_bytes(data[: len(data) // 2])
    with pytest.raises(ImporterError, match=r"x\.pkl"):
        safe_load(tmp_path / "x.pkl")


def test_arkit_minmax_no_transpose(tmp_path):
    """Rows are axes: with columns the yaw is mirrored although min/max stay the same."""
    write_vsi(tmp_path, {"table": [vsi_entry(rz(np.radians(30)))]})
    (scene,) = vsi_meta.iter_scenes(tmp_path, ImportOptions(), ImportReport())
    corners = scene.objects[0].box.corners[:, :2]
    assert np.abs(corners - (0.616, 0.933)).sum(axis=1).min() < 2e-3
    assert np.abs(corners - (1.116, -0.067)).sum(axis=1).min() > 0.1


def test_vsi_meta_counts_refits_and_checks(tmp_path):
    write_vsi(tmp_path, {"chair": [vsi_entry(rx(0.4))]}, object_counts={"chair": 2})
    report = ImportReport()
    (scene,) = vsi_meta.iter_scenes(tmp_path, ImportOptions(), report)
    assert scene.objects[0].box_quality == "refit"
    assert scene.objects[0].box.is_upright
    assert report.counters == {"refit_box": 1, "no_frames": 1}
    assert scene.count_conflicts == {"chair"}
    assert scene.room.area_m2 == 20.5
    write_vsi(tmp_path, {"chair": [vsi_entry(rz(0.4), min=[0, 0, 0])]})
    vsi_meta._load.cache_clear()
    with pytest.raises(ImporterError, match="misses the stored min/max"):
        list(vsi_meta.iter_scenes(tmp_path, ImportOptions(), ImportReport()))


def test_real_vsi_meta(real_dir):
    root = real_dir / "vsi_bench_eval_only"
    report = ImportReport()
    scenes = list(vsi_meta.iter_scenes(root, ImportOptions(), report))
    assert len(scenes) == 60
    by_id = {scene.scene_id: scene for scene in scenes}
    light = by_id["scannetpp/7b6477cb95"].objects[0]
    assert light.label == "ceiling light"
    np.testing.assert_allclose(light.size.round(3), (1.331, 0.344, 0.317))
    for scene in scenes:
        scene.validate()
        assert all(item.box.is_upright for item in scene.objects)
    assert report.counters["refit_box"] > 50
    assert report.counters["bad_box"] == 0


def test_vla3d(tmp_path):
    statements = {
        "one": [{"target_index": "0", "relation": "near"}],
        "two": [{"target_index": "0"}, {"target_index": "1"}],
    }
    rows = [vla_row(), vla_row(object_id=1, raw_label="chair", object_bbox_cz="_"),
            vla_row(object_id=2, object_bbox_cx=9, object_front_heading=0.5 - np.pi / 2)]  # fmt: skip
    write_vla(tmp_path, rows, statements=statements)
    report = ImportReport()
    (scene,) = vla3d.iter_scenes(tmp_path, ImportOptions(), report)
    assert scene.scene_id == "arkitscenes/40000001"
    assert [o.label for o in scene.objects] == ["sofa", "sofa"]
    assert report.counters == {"missing_value": 1, "no_frames": 1, "multi_target_statement": 1}
    assert scene.extra["statements"] == [{"text": "one", "target": "0", "relation": "near"}]
    fronted = scene.objects[1]
    assert fronted.has_front
    assert fronted.box.yaw_rad == pytest.approx(0.5 - np.pi / 2)
    np.testing.assert_allclose(fronted.size, (0.9, 2, 0.8))
    write_vla(tmp_path, rows, header=[name for name in HEADER if name != "object_bbox_cy"])
    with pytest.raises(ImporterError, match="'object_bbox_cy' is missing"):
        list(vla3d.iter_scenes(tmp_path, ImportOptions(), ImportReport()))


def test_real_vla3d(real_dir):
    report = ImportReport()
    scenes = {s.scene_id: s for s in vla3d.iter_scenes(real_dir / "vla3d", ImportOptions(), report)}
    assert sorted(scenes) == ["3rscan/02b33e01-be2b-2d54-93fb-4145a709cec5", "arkitscenes/47204840"]
    scene = scenes["arkitscenes/47204840"]
    sofa = scene.objects[0]
    assert sofa.label == "sofa"
    np.testing.assert_allclose(sofa.center, (-0.885, 2.820, -0.815), atol=1e-3)
    np.testing.assert_allclose(sofa.size, (1.579, 1.052, 0.786), atol=1e-3)
    assert np.degrees(sofa.box.yaw_rad) == pytest.approx(84.8, abs=0.1)
    # The corners the dataset stores for the same object.
    path = real_dir / "vla3d/ARKitScenes/47204840/47204840_objects.json"
    stored = np.array(json.loads(path.read_text())["0"]["0"]["bbox"])
    distance = np.abs(stored[:, None] - sofa.box.corners[None]).max(axis=2).min(axis=1)
    assert distance.max() < 1e-3
    labels = {o.label for o in scenes["3rscan/02b33e01-be2b-2d54-93fb-4145a709cec5"].objects}
    assert {"wall", "floor"} <= labels
    assert report.counters["multi_target_statement"] > 0


def test_labels():
    assert normalise_label(" Trash_Can ") == "bin"
    assert normalise_label("book shelves") == "bookshelf"
    assert normalise_label("Couch") == "sofa"
    assert normalise_label("glass") == "glass"


def test_frame_choice():
    assert choose_frames(10, None) == list(range(10))
    assert choose_frames(5, 32) == [0, 1, 2, 3, 4]
    assert choose_frames(100, 3) == [0, 50, 99]
    assert choose_frames(0, 3) == []


def test_duplicates_are_merged_or_excluded():
    report = ImportReport()
    objects = ObjectList(report)
    for label, size in (("chair", 1.0), ("chair", 1.001), ("table", 1.0), ("lamp", 0.4)):
        objects.add(((0, 0, 0), (size, 1, 1), np.eye(3)), label, native_id=label, label_source="t")
    finished = objects.finish()
    assert [(o.label, o.is_target) for o in finished] == [
        ("chair", False),
        ("table", False),
        ("lamp", True),
    ]
    assert report.counters == {"duplicate_box": 1, "conflicting_box": 2}


@pytest.mark.parametrize("roll", [0, 1, 2, 3])
def test_turning_an_image_keeps_the_projection(roll):
    camera = Camera.look((0, 0, 1.5), 30.0, -10.0, hfov_deg=70, width=60, height=40)
    # A camera rolled by quarter turns sees a turned image.
    points = np.array([[3.0, 1.2, 0.4], [2.5, 2.0, 1.8], [2.0, 0.9, 1.0]])
    image = np.zeros((40, 60), np.uint8)
    pixels, _ = camera.project(points)
    for value, (u, v) in enumerate(pixels, start=1):
        image[int(v), int(u)] = value
    frame = Frame("f", None, 60, 40, camera.intrinsics, camera.world_from_cam)
    turned, moved = turn_upright(image, frame, roll)
    assert turned.shape == (moved.height, moved.width)
    again, _ = moved.camera.project(points)
    for value, (u, v) in enumerate(again, start=1):
        assert turned[int(v), int(u)] == value
    assert quarter_turns_to_upright(moved.camera) == (4 - roll) % 4


def test_ray_depth_declared_as_z_is_noticed():
    camera = Camera.look((0, 0, 1.5), 0.0, -30.0, hfov_deg=80, width=80, height=60)
    floor = Box.upright((0, 0, -0.05), (40, 40, 0.1))
    depth, _ = cast_boxes([floor], camera)
    v, u = np.mgrid[0:60, 0:80] + 0.5
    pixels = np.stack([u.ravel(), v.ravel()], axis=1)
    length = np.linalg.norm(camera.rays(pixels), axis=1).reshape(60, 80)
    scene = Scene("rooms/x", "rooms/x", "rooms", room=Room(floor_z=0.0))
    assert not depth_kind_suspect(depth, camera, scene)
    assert depth_kind_suspect(depth * length, camera, scene)
