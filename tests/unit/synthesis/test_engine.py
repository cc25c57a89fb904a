"""Generation into parts: equal files for any executor, resume, counters, refused folders."""

import json
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from spatialvlm.errors import ConfigError, SceneSchemaError
from spatialvlm.scenes.io import load_scene, save_scene
from spatialvlm.synthesis.engine import synthesize
from spatialvlm.synthesis.parts import SceneRef, split_into_parts
from spatialvlm.synthesis.plan import make_plan
from spatialvlm.synthesis.rows import SCHEMA, Reason

ROOT = Path(__file__).resolve().parents[3]
TASKS = "left_right,front_behind,depth_choice,is_count,vsi_count,locate_cell,object_colour"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory, data_dir):
    """Five copies of the hand room with ids of their own."""
    from dataclasses import replace

    folder = tmp_path_factory.mktemp("scenes")
    room = load_scene(data_dir / "scenes" / "hand_room.json")
    for i in range(5):
        frames = [replace(f, rgb=f"rgb/{f.frame_id}.jpg") for f in room.frames]
        copy = replace(room, scene_id=f"rooms/hand-{i}", frames=frames, root=None)
        save_scene(copy, folder / "rooms" / f"hand-{i}")
    return folder


def digests(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*.parquet"))}


def test_files_do_not_depend_on_executor_workers_or_shards(scenes, tmp_path):
    plan = make_plan(TASKS)
    synthesize(scenes, tmp_path / "serial", plan, executor="serial")
    synthesize(scenes, tmp_path / "two", plan, executor="process", workers=2)
    for index in (2, 0, 1):
        synthesize(scenes, tmp_path / "shards", plan, executor="serial", shard=(index, 3))
    expected = digests(tmp_path / "serial")
    assert len(expected) == 5
    assert digests(tmp_path / "two") == expected
    assert digests(tmp_path / "shards") == expected
    manifests = [
        json.loads((tmp_path / d / "manifest.json").read_text())
        for d in ("serial", "two", "shards")
    ]
    assert manifests[0] == manifests[1] == manifests[2]
    assert manifests[0]["complete"]
    assert manifests[0]["rows"] == sum(
        pq.read_metadata(p).num_rows for p in (tmp_path / "two").glob("*.parquet")
    )


def test_shards_are_incomplete_until_the_last_one(scenes, tmp_path):
    plan = make_plan("left_right")
    synthesize(scenes, tmp_path, plan, executor="serial", shard=(0, 2))
    assert not (tmp_path / "_SUCCESS").exists()
    synthesize(scenes, tmp_path, plan, executor="serial", shard=(1, 2))
    assert (tmp_path / "_SUCCESS").exists()


def test_resume_keeps_good_parts_and_rebuilds_broken_ones(scenes, tmp_path):
    plan = make_plan("left_right,locate_cell")
    synthesize(scenes, tmp_path, plan, executor="serial")
    before = digests(tmp_path)
    names = sorted(before)
    (tmp_path / names[1]).write_bytes(b"broken")
    (tmp_path / names[3]).with_suffix(".json").unlink()
    (tmp_path / f".{names[4]}.tmp").write_bytes(b"half")
    summary = synthesize(scenes, tmp_path, plan, executor="serial")
    assert (summary.parts, summary.skipped_parts) == (5, 3)
    assert digests(tmp_path) == before


def test_rows_of_another_plan_are_not_mixed_in(scenes, tmp_path):
    synthesize(scenes, tmp_path, make_plan("left_right"), executor="serial")
    with pytest.raises(ConfigError, match="another plan"):
        synthesize(scenes, tmp_path, make_plan("locate_cell"), executor="serial")
    synthesize(scenes, tmp_path, make_plan("locate_cell"), executor="serial", overwrite=True)
    tasks = {t for p in tmp_path.glob("*.parquet") for t in pq.read_table(p)["task"].to_pylist()}
    assert tasks == {"locate_cell"}


def test_overwrite_starts_over_and_leaves_other_files_alone(scenes, tmp_path):
    plan = make_plan("left_right")
    synthesize(scenes, tmp_path, plan, executor="serial")
    expected = digests(tmp_path)
    damaged = tmp_path / "part-00001-of-00005.json"
    damaged.write_text(damaged.read_text().replace('"rows": ', '"rows": 9'))
    strangers = [tmp_path / name for name in ("part-notes.parquet", "notes.json", "rows.parquet")]
    for path in strangers:
        path.write_text("mine")
    assert synthesize(scenes, tmp_path, plan, executor="serial").skipped_parts == 5
    (tmp_path / "part-00007-of-00009.parquet").write_text("left behind by a killed run")
    again = synthesize(scenes, tmp_path, plan, executor="serial", overwrite=True)
    assert (again.parts, again.skipped_parts) == (5, 0)
    assert [path.read_text() for path in strangers] == ["mine"] * 3
    assert {k: v for k, v in digests(tmp_path).items() if "-of-" in k} == expected
    assert '"rows": 9' not in damaged.read_text()


def test_overwrite_of_a_shard_keeps_the_other_shards(scenes, tmp_path):
    plan = make_plan("left_right")
    for index in (0, 1):
        synthesize(scenes, tmp_path, plan, executor="serial", shard=(index, 2), overwrite=True)
    assert (tmp_path / "_SUCCESS").exists()
    again = synthesize(scenes, tmp_path, plan, executor="serial")
    assert again.skipped_parts == 5


def test_rows_follow_the_schema(scenes, tmp_path):
    synthesize(scenes, tmp_path, make_plan(TASKS), executor="serial")
    table = pq.read_table(sorted(tmp_path.glob("*.parquet"))[0])
    assert table.schema.equals(SCHEMA)
    rows = table.to_pylist()
    assert len({row["id"] for row in rows}) == len(rows)
    order = [(row["scene_id"], row["task"], row["id"]) for row in rows]
    assert order == sorted(order)
    for row in rows:
        markers = row["messages"][0]["content"].count("<image>\n")
        videos = row["messages"][0]["content"].count("<video>\n")
        assert (markers, videos) == (
            (len(row["images"]), 0) if row["media_kind"] == "images" else (0, 1)
        )
        assert row["messages"][-1]["role"] == "assistant"
        assert row["images"][0].startswith("rooms/hand-")
        assert row["margin"]["value"] >= row["margin"]["threshold"] > 0
        assert set(json.loads(row["evidence"])) == {"args", "values"}


def test_counters_name_every_rejection(scenes, tmp_path):
    summary = synthesize(scenes, tmp_path, make_plan(TASKS), executor="serial", dry_run=True)
    assert not list(tmp_path.iterdir())
    reasons = {reason for _, reason in summary.counters} - {"rows"}
    assert reasons <= {str(reason) for reason in Reason}
    assert summary.counters["left_right", "rows"] == 5 * 20
    assert "depth_choice" in summary.table()


def test_blocked_scenes_are_skipped_and_listed(scenes, tmp_path):
    synthesize(
        scenes, tmp_path, make_plan("locate_cell"), executor="serial", blocked=["rooms/hand-3"]
    )
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["blocked_scenes"] == ["rooms/hand-3"]
    ids = {i for p in tmp_path.glob("*.parquet") for i in pq.read_table(p)["scene_id"].to_pylist()}
    assert ids == {f"rooms/hand-{i}" for i in (0, 1, 2, 4)}


def test_part_boundaries_follow_the_scene_list():
    def sizes(count):
        parts = split_into_parts([SceneRef(f"{i:05d}", "") for i in range(count)])
        return len(parts), len(parts[0].scenes)

    assert [sizes(n) for n in (1, 64, 65, 1000, 4096, 10000)] == [
        (1, 1), (64, 1), (33, 2), (63, 16), (64, 64), (157, 64),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("left_rigt", "did you mean 'left_right'"),
        ("", "no task"),
    ],
)
def test_unknown_tasks_are_answered_with_the_nearest_name(tasks, message):
    with pytest.raises(ConfigError, match=message):
        make_plan(tasks)


def test_all_problems_of_a_task_file_come_at_once(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(
        "tasks:\n  dist_abs: {count: -1, forms: [YN], colour: red}\n  front: {}\nsead: 3\n"
    )
    with pytest.raises(ConfigError) as error:
        make_plan(str(path))
    for word in ("count must be", "'YN'", "'colour'", "'front'", "did you mean 'seed'"):
        assert word in str(error.value)


def test_bad_shard_is_refused(scenes, tmp_path):
    with pytest.raises(ConfigError, match="shard 3/3"):
        synthesize(scenes, tmp_path, make_plan("left_right"), shard=(3, 3))


def test_the_command_writes_rows_and_reports(scenes, tmp_path):
    command = [
        sys.executable, str(ROOT / "tools" / "synthesize.py"), "--scenes", str(scenes), "--out",
        str(tmp_path), "--tasks", "left_right", "--per-task", "3", "--wording", "plain",
    ]  # fmt: skip
    run = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert run.returncode == 0, run.stderr
    assert "15 rows" in run.stdout
    again = subprocess.run(
        [*command[:6], "--tasks", "nothing"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert again.returncode == 2
    assert "ConfigError" in again.stderr


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("tasks: [left_right]", "'name: settings' pairs"),
        ("tasks: {left_right: 4}", "must be like"),
        ("tasks: {left_right: {forms: YN}}", "forms must be a list"),
        ("tasks: {left_right: {count: true}}", "count must be"),
        ("tasks: {left_right: {}}\nseed: 1.5", "seed must be an integer"),
        ("tasks: {left_right: {}}\nallow_split: val", "allow_split must be a list"),
        (
            "tasks: {left_right: {}}\nvisibility_filter: 'off'",
            "visibility_filter must be true or false",
        ),
        ("tasks: {left_right: {}}\nwording: plain", "wording must be keys and values"),
        ("tasks: {left_right: {}}\nwording: {sentences: 20}", "a share from 0 to 1"),
        ("tasks: {left_right: {}}\nwording: {paraphrases: 0}", "a positive integer"),
        ("tasks: {left_right: {}}\ntemplates: [gone.yaml]", "gone.yaml does not exist"),
    ],
)
def test_values_of_the_wrong_kind_are_refused(tmp_path, text, problem):
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=problem):
        make_plan(str(path))


def test_rows_of_another_list_of_scenes_are_not_mixed_in(scenes, tmp_path):
    plan = make_plan("left_right")
    synthesize(scenes, tmp_path, plan, executor="serial", limit=2)
    with pytest.raises(ConfigError, match="another list of scenes"):
        synthesize(scenes, tmp_path, plan, executor="serial")
    for index in (0, 1):
        synthesize(scenes, tmp_path, plan, executor="serial", shard=(index, 2), overwrite=True)
    assert len(list(tmp_path.glob("*.parquet"))) == 5
    assert (tmp_path / "_SUCCESS").exists()


def test_shards_are_merged_balanced_and_exported_together(scenes, tmp_path):
    command = runpy.run_path(str(ROOT / "tools" / "synthesize.py"))["main"]
    rows, even = tmp_path / "rows", tmp_path / "even"
    rows.mkdir()
    assert command(["--out", str(rows), "--merge-manifest"]) == 2
    assert not (rows / "_SUCCESS").exists()
    plan = make_plan("left_right")
    ask = ["--out", str(rows), "--merge-manifest", "--balance", str(even)]
    for index, code in ((0, 1), (1, 0)):
        synthesize(scenes, rows, plan, executor="serial", shard=(index, 2))
        assert command(ask) == code
        assert even.exists() == (code == 0)
    assert sum(pq.read_metadata(path).num_rows for path in even.glob("*.parquet")) > 0
    assert command([*ask[:-1], str(rows)]) == 2


def test_a_scene_that_is_there_twice_is_refused(scenes, tmp_path):
    for folder in ("a", "b"):
        save_scene(load_scene(scenes / "rooms" / "hand-0"), tmp_path / "scenes" / folder)
    with pytest.raises(
        SceneSchemaError, match=r"rooms/hand-0 is in .*a.scene\.json and in .*b.scene\.json"
    ):
        synthesize(tmp_path / "scenes", tmp_path / "rows", make_plan("left_right"))


def test_scenes_of_other_splits_are_named(scenes, tmp_path, capsys):
    room = load_scene(scenes / "rooms" / "hand-0")
    held_out = replace(
        room,
        scene_id="scannet/scene9999_00",
        room_id="scannet/scene9999",
        source="scannet",
        split="val",
    )
    save_scene(held_out, tmp_path / "scenes")
    command = runpy.run_path(str(ROOT / "tools" / "synthesize.py"))["main"]
    ask = ["--scenes", str(tmp_path / "scenes"), "--tasks", "left_right", "--out"]
    assert command([*ask, str(tmp_path / "a")]) == 0
    assert "1 scenes of other splits than train skipped (--allow-split)" in capsys.readouterr().out
    assert command([*ask, str(tmp_path / "b"), "--allow-split", "val"]) == 0
    assert "other splits" not in capsys.readouterr().out


def test_counts_and_rows_of_twins_agree(scenes, tmp_path):
    room = load_scene(scenes / "rooms" / "hand-0")
    moved = replace(room.objects[1], center=room.objects[1].center * 0.95)
    twin = replace(
        room,
        scene_id="rooms/hand-0-t1",
        objects=[room.objects[0], moved, *room.objects[2:]],
        extra={"twin": {"of": "rooms/hand-0"}},
    )
    save_scene(room, tmp_path / "scenes" / "a")
    save_scene(twin, tmp_path / "scenes" / "b")
    summary = synthesize(
        tmp_path / "scenes",
        tmp_path / "rows",
        make_plan("dist_abs,left_right", per_task=6),
        executor="serial",
    )
    made = [
        row
        for path in (tmp_path / "rows").glob("*.parquet")
        for row in pq.read_table(path).to_pylist()
    ]
    assert any("counterfactual" in row["tags"] for row in made)
    assert len(made) > 4 * 6
    for task in ("dist_abs", "left_right"):
        assert summary.counters[task, "rows"] == sum(row["task"] == task for row in made)


@pytest.mark.parametrize(
    ("option", "value"),
    [("--limit", "0"), ("--sentences", "20"), ("--max-failed", "-0.1"), ("--scene-timeout", "-1")],
)
def test_numbers_out_of_range_end_the_command(scenes, tmp_path, capsys, option, value):
    command = runpy.run_path(str(ROOT / "tools" / "synthesize.py"))["main"]
    out = tmp_path / "rows"
    assert (
        command(
            ["--scenes", str(scenes), "--tasks", "left_right", "--out", str(out), option, value]
        )
        == 2
    )
    assert f"{option} must be" in capsys.readouterr().err
    assert not out.exists()
