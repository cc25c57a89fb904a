"""Broken scenes: a named error that is recorded, or a counted rejection; never a wrong row."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spatialvlm.errors import BoxError, CameraError, SceneSchemaError
from spatialvlm.synthesis.context import SceneContext
from spatialvlm.synthesis.engine import Job, scene_rows
from spatialvlm.synthesis.parts import SceneRef
from spatialvlm.synthesis.plan import make_plan
from spatialvlm.synthesis.referral import by_direction, by_size
from spatialvlm.synthesis.rows import Reason, Reject
from spatialvlm.synthesis.tasks import TASKS

SIMPLE = "left_right,dist_abs,is_count,vsi_rel_dir,object_colour"


@pytest.fixture
def values(data_dir):
    """The hand room as a dictionary to break."""
    return json.loads((data_dir / "scenes" / "hand_room.json").read_text())


@pytest.fixture
def generate(tmp_path):
    """Rows and counters of a scene given as a dictionary."""

    def run(values, tasks=SIMPLE, **plan):
        folder = tmp_path / "scene"
        folder.mkdir(exist_ok=True)
        for frame in values.get("frames", []):
            frame["rgb"] = f"rgb/{frame['frame_id']}.jpg"
        path = folder / "scene.json"
        path.write_text(json.dumps(values))
        job = Job(tmp_path, tmp_path / "out", make_plan(tasks, overrides=plan))
        return scene_rows(job, SceneRef(values.get("scene_id", "x"), str(path)))

    return run


def flipped(rotation):
    return (np.array(rotation) @ np.diag([1.0, 1.0, -1.0])).tolist()


def pose(values, change):
    frame = values["frames"][0]
    matrix = np.array(frame["world_from_cam"], dtype=float)
    change(matrix)
    frame["world_from_cam"] = matrix.tolist()


def set_nan(matrix):
    matrix[0, 3] = np.nan


def set_inf(matrix):
    matrix[:3] = -np.inf


def mirror(matrix):
    matrix[:3, 0] *= -1


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda v: v.update(schema="scene/9"), SceneSchemaError, "schema is 'scene/9'"),
        (lambda v: pose(v, set_nan), (CameraError, SceneSchemaError), "finite"),
        (lambda v: pose(v, set_inf), (CameraError, SceneSchemaError), "finite"),
        (lambda v: pose(v, mirror), CameraError, "reflection|mirror|determinant|det"),
        (lambda v: v["objects"][2].update(size=[0.0, 1.0, 1.0]), BoxError, "size"),
        (lambda v: v["objects"][2].update(center=[float("nan"), 1.0, 1.0]), (BoxError, SceneSchemaError), "finite"),
        (lambda v: v["objects"][2].update(R=flipped(v["objects"][2]["R"])), BoxError, "reflection|mirror|determinant|det"),
        (lambda v: v["frames"][1].update(frame_id=v["frames"][0]["frame_id"]), SceneSchemaError, "frame"),
        (lambda v: v["frames"][0]["visible"][0].update(obj=99), SceneSchemaError, "99"),
    ],
)  # fmt: skip
def test_broken_values_are_named(values, generate, spoil, error, message):
    spoil(values)
    with pytest.raises(error, match=message):
        generate(values)


def test_depth_that_is_empty_missing_or_in_another_unit(values, generate, tmp_path):
    (tmp_path / "scene").mkdir()
    for frame in values["frames"]:
        frame["depth"] = f"{frame['frame_id']}.png"
    with pytest.raises(SceneSchemaError, match="no such image"):
        generate(values, "corr_obj")
    for pixels in (0, 1):
        for frame in values["frames"]:
            image = Image.fromarray(np.full((480, 640), pixels, dtype=np.uint16))
            image.save(tmp_path / "scene" / frame["depth"])
        with pytest.raises(SceneSchemaError, match="depth_scale"):
            generate(values, "corr_obj")


def test_a_scene_without_frames_or_objects_is_counted(values, generate):
    rows, counters = generate({**values, "frames": []})
    assert rows == []
    assert {reason for _, reason in counters} == {Reason.NEEDS_FRAMES, "rows"}
    for frame in values["frames"]:
        frame["visible"] = []
    rows, counters = generate({**values, "objects": []})
    assert rows == []
    assert counters["vsi_rel_dir", Reason.TOO_FEW_OBJECTS] == 1


def test_labels_that_name_nothing_are_never_asked_about(values, generate):
    named = {row["id"] for row in generate(values)[0] if "sofa" in json.dumps(row["messages"])}
    assert named
    for label in ("", "object", "wall", "unknown"):
        values["objects"][0].update(label=label)
        rows, _ = generate(values)
        assert rows
        for row in rows:
            objects = json.loads(row["evidence"])["args"].get("objects", [])
            assert 0 not in objects


def test_ambiguous_objects_are_rejected_with_their_reason(values, generate):
    for frame in values["frames"]:
        for record in frame["visible"]:
            record["state"] = "ambiguous"
    rows, counters = generate(values)
    assert rows == []
    assert counters["is_count", "rows"] == 0
    for task in SIMPLE.split(","):
        assert counters[task, "rows"] == 0
        assert any(
            count for (name, reason), count in counters.items() if name == task and reason != "rows"
        )
    assert counters["left_right", Reason.NO_CLEAN_OBJECT] == 1


def test_a_scene_with_too_little_for_a_question_says_so(values, generate):
    for frame in values["frames"]:  # one clean object, and none to compare it with
        frame["visible"] = [record for record in frame["visible"] if record["obj"] == 1]
    rows, counters = generate(values, "left_right,object_colour")
    assert {row["task"] for row in rows} == {"object_colour"}
    assert counters["left_right", Reason.NO_CANDIDATE] == 1


def test_every_reason_of_a_rejection_is_documented():
    page = (Path(__file__).resolve().parents[3] / "docs" / "tasks.md").read_text()
    assert [str(reason) for reason in Reason if f"`{reason}`" not in page] == []


COUNTING = "is_count,grounding_cam9,vsi_count,scene_caption"


def test_a_label_with_an_instance_left_out_neither_counts_nor_names(values, generate):
    assert any(
        "chair" in str(row["messages"]) for row in generate(values, f"{SIMPLE},{COUNTING}")[0]
    )
    values["objects"][3]["extra"] = {"excluded": "conflicting_box"}  # the second chair
    rows, _ = generate(values, f"{SIMPLE},{COUNTING},is_exist")
    assert rows
    assert not [row["messages"] for row in rows if "chair" in str(row["messages"])]


def test_labels_with_another_stated_count_are_not_counted(values, generate):
    values["label_counts"] = {"chair": 3, "sofa": 1}
    rows, counters = generate(values, COUNTING)
    for task in ("is_count", "grounding_cam9", "vsi_count"):
        assert counters[task, Reason.COUNT_CONFLICT] > 0
    for row in rows:
        text = str(row["messages"]).lower()
        assert "chairs" not in text
        assert "labelled chair" not in text


def test_lengths_need_a_metric_scene(hand_room):
    ctx = SceneContext(replace(hand_room, metric=False))
    args = {"variant": "distance", "frames": ["F0", "F2"], "objects": []}
    with pytest.raises(Reject, match="needs:metric"):
        TASKS["cam_motion"].derive(ctx, args)


def test_heights_and_sides_need_a_world_that_knows_up(hand_room, ask):
    tilted = SceneContext(replace(hand_room, gravity_aligned=False))
    for task, variant in (
        ("size_abs", "height"),
        ("size_abs", "short_side"),
        ("size_rel", "taller"),
    ):
        objects = ["bookshelf", "lamp"][: 1 if task == "size_abs" else 2]
        assert ask(task, variant, objects, ctx=tilted) == "needs:gravity"
        assert ask(task, variant, objects) != "needs:gravity"
    assert ask("size_rel", "bigger", ["bookshelf", "lamp"], ctx=tilted) == 4
    assert TASKS["vsti_cam_dir"].unmet_need(tilted) == Reason.NEEDS_GRAVITY
    level = SceneContext(hand_room)
    assert (
        by_direction(level, 0, [2], [1, 3, 4]) is not None
    )  # on the right of somebody at the table
    assert by_direction(tilted, 0, [2], [1, 3, 4]) is None
    assert by_size(level, 5, [6]).phrase == "the tallest lamp"
    assert by_size(tilted, 5, [6]) is None
