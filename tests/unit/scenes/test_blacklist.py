"""Evaluation scenes: shipped list, id patterns, room rules, refusals."""

from collections import Counter

import pytest

from spatialvlm.errors import ContaminationError, SceneError
from spatialvlm.scenes.blacklist import (
    BlockList,
    blocked_scenes,
    find_hits,
    find_ids,
    load_list,
    require_clean,
    room_of,
    shipped_lists,
)


def test_shipped_list_holds_the_288_vsi_bench_scenes():
    (vsi,) = shipped_lists()
    assert vsi.name == "VSI-Bench"
    counts = Counter(scene_id.split("/")[0] for scene_id in vsi.scene_ids)
    assert counts == {"arkitscenes": 150, "scannet": 88, "scannetpp": 50}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("scans/scene0251_00/color/0.jpg", ["scannet/scene0251_00"]),
        ("data\\scannet\\scene0251_00\\0.jpg", ["scannet/scene0251_00"]),
        ("scannet_scene0251_00.mp4", ["scannet/scene0251_00"]),
        ("arkitscenes/41069025/41069025_74735.839.jpg", ["arkitscenes/41069025"] * 2),
        ("arkitscenes_41069025.mp4", ["arkitscenes/41069025"]),
        ("scannetpp/7b6477cb95/dslr/x.jpg", ["scannetpp/7b6477cb95"]),
        ("scannetpp_7b6477cb95.mp4", ["scannetpp/7b6477cb95"]),
        (
            "3RScan/02b33e01-be2b-2d54-93fb-4145a709cec5/x",
            ["3rscan/02b33e01-be2b-2d54-93fb-4145a709cec5"],
        ),
        ("mp3d/17DRP5sb8fy/region1", ["matterport3d/17DRP5sb8fy"]),
        ("hypersim/ai_001_010/images/f.jpg", ["hypersim/ai_001_010"]),
        ("train2017/000000580957.jpg", ["coco/000000580957"]),
        ("COCO_train2014_000000580957.jpg", ["coco/000000580957"]),
        ("takes/cmu_bike01_2/video.mp4", ["egoexo4d/cmu_bike01_2"]),
        ("images/20240131/photo_1234.jpg", []),
        ("frame_000123.jpg", []),
        ("a sentence about a chair and a table", []),
    ],
)
def test_find_ids(text, expected):
    assert find_ids(text) == expected


def test_rescan_leak():
    """Another scan of an evaluation room is a hit at room level."""
    hits = find_hits(["scene0251_00", "x/scene0251_01/1.jpg", "scene0000_00"])
    assert [(h.level, h.key) for h in hits] == [
        ("scene", "scannet/scene0251_00"),
        ("room", "scannet/scene0251"),
    ]


def test_room_rules():
    assert room_of("scannet/scene0251_02") == "scannet/scene0251"
    assert room_of("matterport3d/17DRP5sb8fy/region3") == "matterport3d/17DRP5sb8fy"
    assert room_of("rooms/train-0000003-t2") == "rooms/train-0000003"
    assert room_of("hypersim/ai_001_002") == "hypersim/ai_001_002"
    visits = {
        "arkitscenes/41069025": "arkitscenes/visit-7",
        "arkitscenes/41069026": "arkitscenes/visit-7",
    }
    lists = [BlockList("mine", frozenset({"arkitscenes/41069025"}))]
    assert [hit.level for hit in find_hits(["41069026.jpg"], lists, visits)] == ["room"]
    assert find_hits(["41069026.jpg"], lists) == []


def test_real_samples(real_dir):
    names = [p.name for p in sorted((real_dir / "g2vlm_arkit_47333851").iterdir())]
    assert find_hits(names) == []
    hits = find_hits([str(p) for p in (real_dir / "vlm3r_arkit_47334096").iterdir()])
    assert hits
    assert {hit.scene_id for hit in hits} == {"arkitscenes/47334096"}


def test_require_clean():
    require_clean(["rooms/train-0000001", "scene0000_00"], "my data")
    with pytest.raises(ContaminationError, match=r"my data: 1 values.*scannet/scene0251_00"):
        require_clean(["scene0251_00"], "my data")


def test_edited_list_is_refused(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("# name: mine\nscannet/scene0001_00\n")
    assert load_list(path).scene_ids == {"scannet/scene0001_00"}
    path.write_text("# name: mine\n# sha256: 00\nscannet/scene0001_00\n")
    with pytest.raises(SceneError, match="edited or cut off"):
        load_list(path)
    path.write_text("scene0001_00\n")
    with pytest.raises(SceneError, match=r"mine\.txt:1"):
        load_list(path)


def test_a_scene_is_blocked_by_its_id_its_room_or_the_scan_it_names():
    lists = [BlockList("mine", frozenset({"scannet/scene0251_00", "arkitscenes/41069025"}))]
    scenes = [
        ("scannet/scene0251_01", "scannet/scene0251"),
        ("scannet/scene0251_02", "scannet/scene0251_02"),  # a room id of somebody's own
        ("scannet/scene0252_00", "scannet/scene0252"),
        ("arkitscenes/41069025", "arkitscenes/421015"),
        ("arkitscenes/41069026", "arkitscenes/421015"),
        ("arkitscenes/41069027", "arkitscenes/421016"),
        ("lifted/scene0251_00", "lifted/scene0251_00"),
        ("lifted/kitchen", "scannet/scene0251_00"),
        ("rooms/train-0000001", "rooms/train-0000001"),
    ]
    free = {"scannet/scene0252_00", "arkitscenes/41069027", "rooms/train-0000001"}
    assert set(blocked_scenes(scenes, lists)) == {scene for scene, _ in scenes} - free
    assert blocked_scenes(scenes, []) == []
