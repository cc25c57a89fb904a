"""Questions about rendered rooms: shipped task files, ablation switches, ray."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from spatialvlm.errors import SynthesisError
from spatialvlm.scenes.io import load_depth, load_scene
from spatialvlm.scenes.rooms.build import RenderConfig, RoomSpec, write_room
from spatialvlm.synthesis.audit import read_rows
from spatialvlm.synthesis.context import SceneContext
from spatialvlm.synthesis.engine import synthesize
from spatialvlm.synthesis.generate import generate_scene
from spatialvlm.synthesis.plan import make_plan
from spatialvlm.synthesis.points import boxes_of_visible_points
from spatialvlm.synthesis.rows import Reject
from spatialvlm.synthesis.tasks import TASKS
from spatialvlm.synthesis.tasks.extra import CELL_LETTERS
from spatialvlm.synthesis.verify import verify
from spatialvlm.synthesis.wording import Wording

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = sorted((ROOT / "configs" / "synthesis").glob("*.yaml"))


@pytest.fixture(scope="module")
def rooms(tmp_path_factory):
    """Two small rendered rooms."""
    folder = tmp_path_factory.mktemp("rooms")
    config = RenderConfig(num_frames=10, width=128, height=128)
    for seed in (100, 103):
        write_room(RoomSpec(seed=seed, split="train"), folder, config)
    return folder


ANSWER_PYTHON = {
    "mcq": str, "text": str, "yesno": bool, "number": int | float, "list": list, "coord": list, "box": list,
    "json": list,
}  # fmt: skip


def scenes_of(folder):
    return [load_scene(path) for path in sorted(folder.glob("**/scene.json"))]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_task_files_load_and_say_what_they_are_for(path):
    plan = make_plan(str(path))
    assert plan.tasks
    head = path.read_text().splitlines()[:3]
    assert [line.split()[1] for line in head] == ["Purpose", "Command", "Yield"]


def test_all_task_files_together_cover_every_task():
    named = set()
    for path in CONFIGS:
        if path.stem not in ("all", "tiny"):
            named |= set(make_plan(str(path)).tasks)
    assert set(make_plan(str(ROOT / "configs/synthesis/all.yaml")).tasks) == set(TASKS)
    assert len(named) >= 40


def test_nearly_every_task_has_rows_in_two_rooms_and_all_verify(rooms, tmp_path):
    synthesize(
        rooms, tmp_path, make_plan(str(ROOT / "configs/synthesis/tiny.yaml")), executor="serial"
    )
    report = verify(tmp_path, rooms, reference=1.0)
    assert report.mismatches == []
    assert len(report.by_reference) >= 18
    for row in read_rows(tmp_path):
        answer, evidence = json.loads(row["answer_json"]), json.loads(row["evidence"])
        several = isinstance(evidence, list)
        for one, part in zip(
            answer if several else [answer], evidence if several else [evidence], strict=True
        ):
            assert set(part) == {"args", "values"}
            assert isinstance(one, ANSWER_PYTHON[row["answer_type"]]), row["task"]
        if (
            row["task"] == "corr_point"
        ):  # no candidate gives itself away by being much nearer or farther
            _, truth, *wrong = (candidate["xy"] for candidate in json.loads(row["marks"]))
            scene = next(s for s in scenes_of(rooms) if s.scene_id == row["scene_id"])
            frame = next(f for f in scene.frames if f.frame_id == row["frame_ids"][1])
            depth = load_depth(scene, frame)
            at = [float(depth[int(y), int(x)]) for x, y in (truth, *wrong)]
            assert all(abs(z - at[0]) < 0.45 * at[0] for z in at[1:])
        if row["task"] == "corr_obj":  # other formats would mark the object in both views
            assert row["formats_ok"] == []
        assert row["margin"]["value"] >= row["margin"]["threshold"] > 0
        assert row["margin"]["kind"]
    # Whether a label repeats visibly, cameras ring a centre, or a route exists depends on the room.
    assert set(TASKS) - set(report.by_task) <= {
        "vsi_count",
        "cam_pose",
        "route_plan",
        "vsi_route",
        "da_blocks",
    }


def test_masks_make_every_format_possible(rooms):
    plan = replace(make_plan("is_size", per_task=4), wording=Wording(masks=True))
    rows, _ = generate_scene(scenes_of(rooms)[0], plan)
    assert rows
    assert any(row["formats_ok"] == list(range(19)) for row in rows)
    for slot in json.loads(rows[0]["slots"]):
        for rle in slot["masks"].values():
            assert sum(rle["counts"]) == 128 * 128


@pytest.mark.parametrize("kind", ["colour", "label"])
def test_cells_of_things_and_things_of_cells_are_one_map(rooms, kind):
    checked = 0
    for scene in scenes_of(rooms):
        ctx = SceneContext(scene)
        for frame in scene.frames:
            args = {"variant": kind, "objects": [], "frames": [frame.frame_id]}
            try:
                forward = TASKS["cell_map"].derive(ctx, args).answer
            except Reject:
                continue
            backward = TASKS["cell_map"].derive(ctx, {**args, "variant": f"{kind}_cells"}).answer
            words = dict.fromkeys(CELL_LETTERS, "none")
            names = []
            for entry in backward.split(", ") if backward != "none" else []:
                name, letters = re.fullmatch(r"(.+?) ([A-P](?: [A-P])*)", entry).groups()
                names.append(name)
                words |= dict.fromkeys(letters.split(), name)
            assert names == sorted(names)
            assert " ".join(f"{letter} {word}" for letter, word in words.items()) == forward
            checked += bool(names)
    assert checked >= 3


def test_chains_of_thought_end_in_the_typed_answer(rooms):
    plan = replace(make_plan("vsi_rel_dir,vsi_rel_dist", per_task=30), wording=Wording(cot=1.0))
    found = 0
    for scene in scenes_of(rooms):
        for row in generate_scene(scene, plan)[0]:
            if "cot" in row["tags"]:
                found += 1
                reply = row["messages"][-1]["content"]
                assert "at [5, 5]" in reply
                assert reply.endswith(f"So the answer is {row['answer_text']}.")
                assert row["form"] == "SENT"
    assert found >= 3


def test_boxes_of_visible_points_lie_inside_the_annotated_boxes(rooms):
    scene = scenes_of(rooms)[0]
    seen = boxes_of_visible_points(scene)
    smaller = 0
    for before, after in zip(scene.objects, seen.objects, strict=True):
        if not after.is_target:
            continue
        # A pixel of a slanted surface reaches a little over the edge.
        assert before.box.contains(after.box.corners, margin=0.08).all()
        smaller += after.box.volume < 0.95 * before.box.volume
    assert smaller >= 3
    exact, _ = generate_scene(scene, make_plan("size_abs", per_task=20))
    partial, _ = generate_scene(
        scene, make_plan("size_abs", per_task=20, overrides={"geometry": "points"})
    )
    assert {row["answer_text"] for row in exact} != {row["answer_text"] for row in partial}


def test_each_ablation_switch_changes_the_rows_it_should_and_nothing_else(rooms):
    """OpenSpatial's ablations: one key of the task file each."""
    scenes = scenes_of(rooms)
    tasks = "size_abs,left_right,dist_abs,vsi_abs_dist,corr_obj"

    def make(**overrides):
        plan = make_plan(tasks, per_task=20, overrides=overrides)
        return {r["id"]: r for s in scenes for r in generate_scene(s, plan)[0]}

    base = make()
    points = make(geometry="points")
    same = base.keys() & points.keys()
    assert sum(base[i]["answer_json"] != points[i]["answer_json"] for i in same) > 20
    loose = make(visibility_filter=False)
    assert loose.keys() - base.keys()
    assert all(row["margin"]["value"] >= row["margin"]["threshold"] > 0 for row in loose.values())
    assert {row["task"] for row in loose.values()} == set(tasks.split(","))
    fewer = generate_scene(scenes[0], make_plan("left_right,dist_abs", per_task=20))[0]
    # A subset of tasks leaves the rows of the remaining tasks as they were.
    expected = [r for r in base.values() if r["scene_id"] == scenes[0].scene_id]
    kept = {"left_right", "dist_abs"}
    without = [{**r, "config_hash": ""} for r in expected if r["task"] in kept]
    order = {"dist_abs": 0, "left_right": 1}
    assert [{**r, "config_hash": ""} for r in fewer] == sorted(
        without, key=lambda r: (order[r["task"]], r["id"])
    )
    hashes = {row["config_hash"] for rows in (base, points, loose) for row in rows.values()}
    assert len(hashes) == 3


def test_points_need_depth(hand_room):
    with pytest.raises(SynthesisError, match="depth"):
        boxes_of_visible_points(hand_room)


def test_without_the_visibility_filter_hidden_objects_are_asked_about(rooms):
    scene = scenes_of(rooms)[0]
    strict, loose = SceneContext(scene), SceneContext(scene, visibility_filter=False)
    more = sum(len(set(loose.view(i).clean) - set(strict.view(i).clean)) for i in range(10))
    assert more > 0
    rows, _ = generate_scene(scene, make_plan("left_right", overrides={"visibility_filter": False}))
    assert rows
    assert all(row["margin"]["value"] >= row["margin"]["threshold"] for row in rows)


def test_unmeasured_visibility_needs_a_word_of_permission(rooms):
    scene = scenes_of(rooms)[0]
    frames = [
        replace(
            f,
            depth=None,
            instance_map=None,
            visible=[replace(v, occupancy=None) for v in f.visible],
        )
        for f in scene.frames
    ]
    bare = replace(scene, frames=frames)
    rows, counters = generate_scene(bare, make_plan("left_right"))
    assert rows == []
    assert counters["left_right", "needs:visibility"] == 1
    rows, _ = generate_scene(bare, make_plan("left_right", overrides={"allow_unfiltered": True}))
    assert rows
    assert "unfiltered" in rows[0]["tags"]


@pytest.mark.smoke
def test_ray_writes_the_same_files(rooms, tmp_path):
    pytest.importorskip("ray", reason="ray is not installed (pip install -e '.[ray]')")
    plan = make_plan("left_right,locate_cell")
    synthesize(rooms, tmp_path / "serial", plan, executor="serial")
    synthesize(rooms, tmp_path / "ray", plan, executor="ray", workers=2)
    files = [p.name for p in sorted((tmp_path / "serial").glob("*.parquet"))]
    assert len(files) == 2
    for name in files:
        assert (tmp_path / "ray" / name).read_bytes() == (tmp_path / "serial" / name).read_bytes()


def test_twins_give_pairs_that_differ_in_the_answer_only(tmp_path):
    config = RenderConfig(num_frames=6, width=96, height=96)
    for twin in (0, 1):
        write_room(RoomSpec(seed=500, split="train", twin=twin), tmp_path / "rooms", config)
    plan = make_plan("left_right,dist_abs,vsi_abs_dist,is_exist,locate_cell", per_task=40)
    synthesize(tmp_path / "rooms", tmp_path / "rows", plan, executor="serial")
    rows = {row["id"]: row for row in read_rows(tmp_path / "rows")}
    pairs = [row for row in rows.values() if "counterfactual" in row["tags"]]
    assert len(pairs) >= 3
    for row in pairs:
        partner = rows[row["group_id"]]
        assert partner["scene_id"] != row["scene_id"]
        assert partner["room_id"] == row["room_id"]
        assert partner["messages"][:-1] == row["messages"][:-1]
        assert partner["answer_text"] != row["answer_text"]
    assert verify(tmp_path / "rows", tmp_path / "rooms").mismatches == []


def test_stacks_of_cubes(tmp_path):
    import numpy as np

    from spatialvlm.synthesis.rows import Draws
    from spatialvlm.synthesis.tasks.blocks import (
        from_camera,
        grid_text,
        missing_cubes,
        missing_piece,
        num_cubes,
        other_pieces,
        seen_from,
        silhouette,
    )

    heights = np.array([[2, 1], [0, 3]])
    assert num_cubes(heights) == 6
    assert silhouette(heights, axis=1) == [2, 3]
    assert missing_cubes(heights) == 6
    assert seen_from(heights, 90.0) == ([2, 3], 0.0)
    assert seen_from(heights, -90.0)[0] == [3, 2]
    assert seen_from(heights, 0.0)[0] == [3, 2]
    assert seen_from(heights, 170.0) == ([2, 3], pytest.approx(10.0))
    bordered = np.array([[0, 0, 0], [0, 2, 0], [0, 1, 3]])  # nobody sees where the empty grid ends
    assert seen_from(bordered, 90.0)[0] == [2, 3]
    assert seen_from(bordered, 0.0)[0] == [3, 2]

    assert grid_text(from_camera(missing_piece(heights), 90.0)) == "2 0 / 1 3"
    for heading in (0.0, 90.0, 180.0, -90.0):
        # Stack and piece together are full: what the piece leaves free is the outline of the stack.
        piece = from_camera(missing_piece(heights), heading)
        assert (3 - piece).max(axis=0).tolist() == seen_from(heights, heading)[0]
        wrong = other_pieces(piece, Draws(heading))
        assert len({*wrong, grid_text(piece)}) == 4

    write_room(
        RoomSpec(seed=1, split="train", preset="blocks"),
        tmp_path / "rooms",
        RenderConfig(width=96, height=96),
    )
    synthesize(tmp_path / "rooms", tmp_path / "rows", make_plan("da_blocks"), executor="serial")
    report = verify(tmp_path / "rows", tmp_path / "rooms")
    assert report.mismatches == []
    assert report.checked > 0
    rows = read_rows(tmp_path / "rows")
    assert {row["variant"] for row in rows} == {"count", "silhouette", "complete", "assemble"}
    for row in rows:  # left and right are those of one camera, which two pictures must name
        sided = row["variant"] in ("silhouette", "assemble")
        assert ("camera of view 1" in str(row["messages"])) == (sided and row["num_views"] == 2)
