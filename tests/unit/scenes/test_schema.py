"""Scene records: round trips and one case per kind of bad input."""

import json

import numpy as np
import pytest
from PIL import Image

from spatialvlm.errors import BoxError, CameraError, SceneSchemaError
from spatialvlm.scenes.io import (
    iter_scenes,
    load_depth,
    load_instances,
    load_rgb,
    load_scene,
    read_scenes_parquet,
    save_scene,
    scene_from_dict,
    write_scenes_parquet,
)
from spatialvlm.scenes.schema import Scene, Vis, check_polygon, counter_clockwise


def minimal(**changes):
    """A valid scene with one object and one frame, as a dictionary."""
    values = {
        "schema": "scene/1",
        "scene_id": "rooms/x",
        "room_id": "rooms/x",
        "source": "rooms",
        "objects": [
            {
                "index": 0,
                "id": "a",
                "label": "chair",
                "center": [2, 0, 0],
                "size": [1, 1, 1],
                "R": np.eye(3).tolist(),
            }
        ],
        "frames": [frame("f0", 0.0)],
    }
    values.update(changes)
    return values


def frame(name, time_s, **changes):
    # Looks along +x.
    pose = [[0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]]
    k = [[20, 0, 16], [0, 20, 12], [0, 0, 1]]
    values = {
        "frame_id": name,
        "rgb": f"{name}.png",
        "width": 32,
        "height": 24,
        "intrinsics": k,
        "world_from_cam": pose,
        "time_s": time_s,
    }
    values.update(changes)
    return values


def read(values, root=None):
    return scene_from_dict(values, root=root, where="test")


def test_json_round_trip_keeps_unknown_keys(tmp_path):
    values = minimal(future="kept")
    values["objects"][0]["colour_histogram"] = [1, 2]
    scene = read(values)
    save_scene(scene, tmp_path / "a")
    again = load_scene(tmp_path / "a")
    assert again.extra == {"future": "kept"}
    assert again.objects[0].extra == {"colour_histogram": [1, 2]}
    assert again.to_dict() == scene.to_dict()
    assert again.root == tmp_path / "a"


def test_parquet_round_trip(tmp_path, data_dir):
    scenes = [load_scene(data_dir / "scenes" / "hand_room.json"), read(minimal())]
    write_scenes_parquet(scenes, tmp_path / "scenes.parquet")
    again = list(read_scenes_parquet(tmp_path / "scenes.parquet"))
    assert [s.to_dict() for s in again] == [s.to_dict() for s in scenes]
    assert again[0].root == scenes[0].root
    assert [s.scene_id for s in iter_scenes(tmp_path)] == ["rooms/hand-H", "rooms/x"]


def test_truncated_parquet(tmp_path):
    write_scenes_parquet([read(minimal())], tmp_path / "a.parquet")
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(data[:-20])
    with pytest.raises(SceneSchemaError, match=r"a\.parquet"):
        list(read_scenes_parquet(tmp_path / "a.parquet"))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"schema": "scene/2"}, SceneSchemaError, "schema is 'scene/2'"),
        ({"source": "mars"}, SceneSchemaError, "one of scannet"),
        ({"scene_id": "x"}, SceneSchemaError, "<source>/<native id>"),
        ({"frames": [frame("f", 0), frame("f", 1)]}, SceneSchemaError, "frame id 'f' occurs 2 times"),
        ({"frames": [frame("f", 1.0), frame("g", 0.5)]}, SceneSchemaError, "got 0.5 after 1.0"),
        ({"frames": [frame("f", 0, visible=[{"obj": 3, "bbox2d": [0, 0, 1, 1], "px": 1, "px_frac": 0, "in_frustum_frac": 1, "vis_frac": 1, "state": "visible"}])]}, SceneSchemaError, "names object 3"),
        ({"frames": [frame("f", 0, intrinsics=np.diag([-1, 1, 1]).tolist())]}, CameraError, "frame f: .*fx=-1"),
        ({"frames": [frame("f", 0, intrinsics=np.eye(4).tolist())]}, CameraError, "3x3"),
        ({"frames": [frame("f", 0, intrinsics=[[20, 0, 500], [0, 20, 12], [0, 0, 1]])]}, CameraError, "twice the image"),
        ({"frames": [frame("f", 0, world_from_cam=np.full((4, 4), -np.inf).tolist())]}, CameraError, "finite"),
        ({"frames": [frame("f", 0, world_from_cam=np.diag([1, 1, -1, 1]).tolist())]}, CameraError, "determinant -1"),
        ({"room": {"polygon_xy": [[0, 0], [1, 1], [1, 0], [0, 1]]}}, SceneSchemaError, "crosses itself"),
        ({"frames": [{"frame_id": "f"}]}, SceneSchemaError, "missing"),
    ],
)  # fmt: skip
def test_bad_scene(changes, error, message):
    with pytest.raises(error, match=message):
        read(minimal(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": [0, 1, 1]}, "at least 0.001 m"),
        ({"size": [float("nan"), 1, 1]}, "3 finite numbers"),
        ({"center": [float("inf"), 1, 1]}, "center must be 3 finite"),
        ({"R": (np.eye(3) * 1.1).tolist()}, "not orthonormal"),
        ({"R": np.diag([1, 1, -1]).tolist()}, "never repaired"),
    ],
)
def test_bad_box_names_the_object(changes, message):
    values = minimal()
    values["objects"][0].update(changes)
    with pytest.raises(BoxError, match=r"object 0 \('a', 'chair'\)") as caught:
        read(values)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"index": 4}, "must equal the position"), ({"support_parent": 9}, "does not exist")],
)
def test_bad_object(changes, message):
    values = minimal()
    values["objects"][0].update(changes)
    with pytest.raises(SceneSchemaError, match=message):
        read(values)


def test_duplicate_object_id():
    values = minimal()
    values["objects"].append({**values["objects"][0], "index": 1})
    with pytest.raises(SceneSchemaError, match="object id 'a' occurs 2 times"):
        read(values)


def test_lenient_validation_lists_all_problems():
    values = minimal(frames=[frame("f", 0), frame("f", 1)])
    values["objects"][0]["size"] = [0, 1, 1]
    problems = Scene.from_dict(values).validate(strict=False)
    assert len(problems) == 2


def test_not_a_scene_file(tmp_path):
    (tmp_path / "scene.json").write_text("{broken")
    with pytest.raises(SceneSchemaError, match="not a JSON file"):
        load_scene(tmp_path)
    with pytest.raises(SceneSchemaError, match="no such scene file"):
        load_scene(tmp_path / "nothing")
    with pytest.raises(SceneSchemaError, match=r"no scene\.json and no parquet"):
        list(iter_scenes(tmp_path / "nothing"))


def with_image(tmp_path, array, key, **changes):
    Image.fromarray(array).save(tmp_path / "x.png")
    values = minimal(frames=[frame("f", 0, **{key: "x.png"}, **changes)])
    scene = read(values, tmp_path)
    return scene, scene.frames[0]


def test_instance_map_errors(tmp_path):
    scene, first = with_image(tmp_path, np.full((24, 32), 7, np.uint16), "instance_map")
    with pytest.raises(SceneSchemaError, match="instance id 7 exceeds"):
        load_instances(scene, first)
    scene, first = with_image(tmp_path, np.zeros((10, 32), np.uint16), "instance_map")
    with pytest.raises(SceneSchemaError, match=r"\(24, 32\)"):
        load_instances(scene, first)
    many = minimal(frames=[frame("f", 0, instance_map="x.png")])
    many["objects"] = [{**many["objects"][0], "index": i, "id": str(i)} for i in range(300)]
    Image.fromarray(np.zeros((24, 32), np.uint8)).save(tmp_path / "x.png")
    scene = read(many, tmp_path)
    with pytest.raises(SceneSchemaError, match="8-bit instance map"):
        load_instances(scene, scene.frames[0])


@pytest.mark.parametrize(
    ("depth", "changes", "message"),
    [
        (np.full((24, 20), 2000, np.uint16), {}, "aspect ratios differ"),
        (np.zeros((24, 32), np.uint16), {}, "depth_scale"),
        (np.full((24, 32), 2000, np.uint16), {"depth_scale": 1.0}, "depth_scale"),
        (np.full((24, 32), 20, np.uint16), {}, "depth_scale"),
    ],
)
def test_depth_errors(tmp_path, depth, changes, message):
    scene, first = with_image(tmp_path, depth, "depth", **changes)
    with pytest.raises(SceneSchemaError, match=message):
        load_depth(scene, first)


def test_depth_of_another_resolution_and_along_rays(tmp_path):
    small = np.repeat(np.arange(1, 17, dtype=np.uint16)[None] * 1000, 12, axis=0)
    scene, first = with_image(tmp_path, small, "depth")
    depth = load_depth(scene, first)
    assert depth.shape == (24, 32)
    np.testing.assert_allclose(depth[0], np.repeat(np.arange(1, 17), 2))
    # hypersim_ray_depth: a fronto-parallel wall at 2 m has longer rays in the corners.
    v, u = np.mgrid[0:24, 0:32] + 0.5
    ray = 2.0 * np.sqrt(((u - 16) / 20) ** 2 + ((v - 12) / 20) ** 2 + 1)
    scene, first = with_image(
        tmp_path, (ray * 1000).round().astype(np.uint16), "depth", depth_kind="ray"
    )
    np.testing.assert_allclose(load_depth(scene, first), 2.0, atol=1e-3)


def test_missing_and_broken_images(tmp_path):
    scene = read(minimal(), tmp_path)
    with pytest.raises(SceneSchemaError, match="no such image"):
        load_rgb(scene, scene.frames[0])
    (tmp_path / "f0.png").write_bytes(b"not an image")
    with pytest.raises(SceneSchemaError, match="not a readable image"):
        load_rgb(scene, scene.frames[0])
    noise = np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "f0.png")
    data = (tmp_path / "f0.png").read_bytes()
    (tmp_path / "f0.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(SceneSchemaError, match="truncated"):
        load_rgb(scene, scene.frames[0])


def test_structural_labels_are_never_targets():
    values = minimal()
    for label, target in (("wall", False), ("", False), ("chair", True)):
        values["objects"][0]["label"] = label
        assert read(values).objects[0].is_target is target


def test_label_count_conflicts():
    scene = read(minimal(label_counts={"chair": 2}))
    assert scene.count_conflicts == {"chair"}
    assert read(minimal(label_counts={"chair": 1})).count_conflicts == frozenset()


def test_vis_of_an_object_outside_the_frustum_is_hidden():
    scene = read(minimal())
    vis = scene.frames[0].vis(0)
    assert (vis.state, vis.px, vis.clean) == ("hidden", 0, False)


@pytest.mark.parametrize(
    ("state", "inside", "occupancy", "clean"),
    [("visible", 0.9, True, True), ("visible", 0.6, True, False), ("visible", 0.9, None, True),
     ("ambiguous", 1.0, None, False), ("visible", 0.9, False, False)],
)  # fmt: skip
def test_clean(state, inside, occupancy, clean):
    assert Vis(0, (0, 0, 1, 1), 100, 0.1, inside, 0.9, state, occupancy).clean is clean


def test_polygons():
    square = [(0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0)]
    assert counter_clockwise(square) == square
    assert counter_clockwise(square[::-1])[0] == (0.0, 0.0)
    check_polygon(square, "test")
    with pytest.raises(SceneSchemaError, match="2 points"):
        check_polygon(square[:2], "test")


def test_json_is_strict(tmp_path):
    scene = read(minimal(extra={"x": 1.0}))
    path = save_scene(scene, tmp_path)
    assert json.loads(path.read_text())["extra"] == {"x": 1.0}
