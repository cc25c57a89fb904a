"""Verification, balance, audit and export of finished rows."""

import json
import tarfile
from dataclasses import replace
from itertools import product

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from spatialvlm.errors import ConfigError, ContaminationError, DataError, MediaError, SynthesisError
from spatialvlm.scenes.io import load_scene, save_scene
from spatialvlm.synthesis import tasks as registry
from spatialvlm.synthesis.audit import audit, page, prune, read_rows
from spatialvlm.synthesis.balance import balance, bucket_of, quotas
from spatialvlm.synthesis.engine import synthesize
from spatialvlm.synthesis.export import export_rows
from spatialvlm.synthesis.parts import write_rows
from spatialvlm.synthesis.plan import make_plan
from spatialvlm.synthesis.probe import _matrix, _probe_classes, best_constant, case_of
from spatialvlm.synthesis.rows import SCHEMA
from spatialvlm.synthesis.verify import verify
from spatialvlm.synthesis.wording import Wording

TASKS = "left_right,depth_choice,dist_abs,size_abs,grounding_cam9,ssr_lcm,vsi_rel_dir,is_position"


@pytest.fixture(scope="module")
def made(tmp_path_factory, data_dir):
    """(scenes folder, rows folder) of three copies of the hand room."""
    scenes = tmp_path_factory.mktemp("scenes")
    room = load_scene(data_dir / "scenes" / "hand_room.json")
    for i in range(3):
        frames = [replace(f, rgb=f"rgb/{f.frame_id}.jpg") for f in room.frames]
        name = f"rooms/hand-{i}"
        copy = replace(
            room, scene_id=name, room_id=name, license="mine" if i else "other", frames=frames
        )
        save_scene(copy, scenes / name)
        (scenes / name / "rgb").mkdir()
        for frame in frames:
            Image.new("RGB", (640, 480), (90, 120, 150)).save(scenes / name / frame.rgb)
    rows = tmp_path_factory.mktemp("rows")
    plan = replace(make_plan(TASKS), wording=Wording(sentences=0.2, cot=0.5))
    synthesize(scenes, rows, plan, executor="serial")
    return scenes, rows


def edited(made, folder, change, count=1):
    """Copy of the rows in which ``change(row)`` was applied to the first ``count`` rows it returns for."""
    scenes, rows = made
    (folder / "plan.json").write_text((rows / "plan.json").read_text())
    left = count
    for path in sorted(rows.glob("*.parquet")):
        table = pq.read_table(path).to_pylist()
        for i, row in enumerate(table):
            new = change(dict(row)) if left else None
            if new is not None:
                table[i], left = new, left - 1
        write_rows(folder / path.name, table)
    assert left == 0
    return verify(folder, scenes)


def test_untouched_rows_agree_with_their_scenes(made):
    scenes, rows = made
    report = verify(rows, scenes)
    assert report.mismatches == []
    assert report.checked == report.rows > 250
    assert set(report.by_task) == set(TASKS.split(","))


def test_the_second_implementation_finds_a_wrong_task(made, monkeypatch):
    scenes, rows = made
    report = verify(rows, scenes, reference=1.0)
    assert report.mismatches == []
    assert {"left_right", "dist_abs", "size_abs", "ssr_lcm", "vsi_rel_dir"} <= set(report.by_reference)  # fmt: skip
    # With the sides swapped in the shared kernel, rows and re-derived answers agree and are wrong.
    from spatialvlm.synthesis.tasks import relation

    def mirrored(view, a, b):
        a_left, margin = left_of(view, a, b)
        return not a_left, margin

    left_of = relation.left_of
    monkeypatch.setattr(relation, "left_of", mirrored)
    wrong = rows.parent / "mirrored"
    synthesize(scenes, wrong, make_plan("left_right"), executor="serial")
    assert verify(wrong, scenes, reference=0.0).mismatches == []
    found = verify(wrong, scenes, reference=1.0).mismatches
    assert len(found) == 60
    assert "second implementation" in found[0]["problem"]


def test_sampling_checks_a_share(made):
    scenes, rows = made
    report = verify(rows, scenes, sample=0.2)
    assert 0.1 * report.rows < report.checked < 0.3 * report.rows


def flip_yes(row):
    if row["answer_type"] != "yesno" or row["form"] != "YN":
        return None
    value = row["answer_json"] == "false"
    text = "Yes" if value else "No"
    messages = [*row["messages"][:-1], {"role": "assistant", "content": text}]
    return {**row, "answer_json": json.dumps(value), "answer_text": text, "messages": messages}


def shift_number(row):
    if row["task"] != "dist_abs" or row["unit"] != "m":
        return None
    value = round(json.loads(row["answer_json"]) + 0.01, 2)
    return {**row, "answer_json": json.dumps(value), "answer_text": f"{value:.2f}"}


def other_object(row):
    evidence = json.loads(row["evidence"])
    if row["task"] != "left_right":
        return None
    evidence["args"]["objects"] = [99, 1]
    return {**row, "evidence": json.dumps(evidence)}


def shorter_dialogue(row):
    texts = row["answer_text"].split("\n")
    if row["task"] != "size_abs" or len(texts) < 2:
        return None
    return {**row, "answer_text": "\n".join(texts[:-1])}


def gone_from_the_chain(row):
    evidence = json.loads(row["evidence"])
    if row["variant"] != "chain":
        return None
    evidence[0]["args"]["triplets"][0][2] = 99
    return {**row, "evidence": json.dumps(evidence)}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (flip_yes, "is now"),
        (shift_number, "is now"),
        (other_object, "does not have"),
        (lambda r: {**r, "answer_text": "C"} if r["answer_type"] == "yesno" else None, "not a terse"),
        (lambda r: {**r, "choice_idx": (r["choice_idx"] + 1) % 2} if len(r["options"]) == 2 else None, "is not the answer"),
        (lambda r: {**r, "options": [r["options"][0]] * 2} if len(r["options"]) == 2 else None, "not distinct"),
        (lambda r: {**r, "id": "0" * 24}, "id does not belong"),
        (shorter_dialogue, "turns with"),
        (gone_from_the_chain, "does not have"),
        (lambda r: {**r, "scene_id": "rooms/gone"}, "not among the scenes"),
        (lambda r: {**r, "margin": {**r["margin"], "value": 0.0}}, "below its threshold"),
        (lambda r: {**r, "task": "left_off"}, "unknown task"),
        (lambda r: {**r, "images": r["images"][:-1]} if len(r["images"]) == 1 else None, "markers"),
    ],
)  # fmt: skip
def test_a_single_changed_row_is_found(made, tmp_path, change, problem):
    report = edited(made, tmp_path, change)
    assert len({item["id"] for item in report.mismatches}) == 1
    assert any(problem in item["problem"] for item in report.mismatches), report.mismatches


def test_verification_needs_the_stored_plan(made, tmp_path):
    scenes, rows = made
    with pytest.raises(SynthesisError, match="no parquet"):
        verify(tmp_path, scenes)
    write_rows(tmp_path / "part.parquet", read_rows(rows)[:3])
    with pytest.raises(SynthesisError, match=r"plan\.json"):
        verify(tmp_path, scenes)


# Balance ---------------------------------------------------------------------------------------------
def row_like(task, answer, number, **more):
    base = {
        "id": f"{task}-{number:06d}", "task": task, "variant": "", "form": "YN", "answer_type": "yesno",
        "answer_json": json.dumps(answer), "answer_text": str(answer), "unit": None, "options": [],
        "choice_idx": None, "slots": "[]", "marks": "[]", "messages": [{"role": "user", "content": "<image>\nQ?"}],
        "margin": {"kind": "x", "value": 1.0, "threshold": 1.0}, "evidence": "{}", "images": ["a.jpg"],
        "media_kind": "images", "template_id": f"{task}/YN/00", "room_id": f"rooms/{number % 7}",
        "scene_id": f"rooms/{number % 7}", "source": "rooms", "license": "x",
    }  # fmt: skip
    return {**dict.fromkeys(SCHEMA.names), **base, **more}


def test_yes_and_no_become_equally_frequent(tmp_path):
    rows = [row_like("left_right", i % 4 == 0, i) for i in range(4000)]
    write_rows(tmp_path / "a.parquet", rows)
    report = balance(tmp_path, tmp_path / "out")
    yes, no = (report.after["left_right", "yesno", word] for word in ("true", "false"))
    assert yes == 1000
    assert abs(no - 1000) < 100
    kept = read_rows(tmp_path / "out")
    assert len(kept) == yes + no
    assert [row["id"] for row in kept] == sorted(row["id"] for row in kept)


def test_number_bins_are_capped_at_twice_the_median_and_classes_at_a_quarter_more():
    counts = {("dist_abs", "number ", f"bin {i}"): n for i, n in enumerate((10, 20, 30, 900))}
    assert quotas(counts)["dist_abs", "number ", "bin 3"] == 60
    classes = {("is_count", "number", str(i)): n for i, n in enumerate((100, 100, 100, 900))}
    cap = quotas(classes)["is_count", "number", "3"]
    assert cap == pytest.approx(1.25 * (300 + cap) / 4, rel=1e-3)


def test_buckets_separate_measured_numbers_from_counts():
    near = row_like("dist_abs", 0.5, 0, answer_type="number", unit="m", variant="closest")
    far = row_like("dist_abs", 500, 0, answer_type="number", unit="cm", variant="closest")
    assert bucket_of(near)[1] == bucket_of(far)[1]
    assert bucket_of(near)[2] < bucket_of(far)[2]
    count = row_like("is_count", 3, 0, answer_type="number", unit="count")
    assert bucket_of(count) == ("is_count", "number", "3")


def test_turns_of_objects_are_evened_out_per_direction():
    for answer, word in ((36, "+30"), (-36, "-45"), ("45", "+45"), (-165, "-165")):
        row = row_like("is_rotation", answer, 0, answer_type="number", unit="deg")
        assert bucket_of(row) == ("is_rotation", "angle", word)


def named(number, first, second):
    slots = [{"label": label} for label in (first, second)]
    return row_like("size_rel", number % 2 == 0, number, slots=json.dumps(slots))


def test_no_pair_of_labels_dominates(tmp_path):
    labels = ["bed", "sofa", "desk", "lamp", "bin", "rug", "tv", "box"]
    every = [(a, b) for a in labels for b in labels if a < b]
    pairs = [every[i % len(every)] for i in range(1400)] + [("bed", "sofa")] * 1400
    write_rows(tmp_path / "a.parquet", [named(i, *pair) for i, pair in enumerate(pairs)])
    balance(tmp_path, tmp_path / "out")
    kept = [tuple(s["label"] for s in json.loads(r["slots"])) for r in read_rows(tmp_path / "out")]
    assert len(kept) > 1200
    assert kept.count(("bed", "sofa")) / len(kept) < 1.3 * 2 / len(every)


# Audit -----------------------------------------------------------------------------------------------
def leaky(number, leak):
    rng = np.random.default_rng(number)
    answer = bool(rng.integers(2))
    hint = ("large" if answer else "small") if leak else str(rng.choice(["large", "small"]))
    text = f"<image>\nIs the {hint} thing left?"
    return row_like(
        "left_right", answer, number, answer_text="Yes" if answer else "No",
        messages=[{"role": "user", "content": text}, {"role": "assistant", "content": "?"}],
    )  # fmt: skip


def test_the_probe_finds_answers_that_stand_in_the_question():
    found = audit([leaky(i, True) for i in range(400)]).tasks["left_right"]
    assert found.probe > 0.95
    assert found.constant < 0.6
    assert any("text-only probe" in text for text in found.warnings)
    clean = audit([leaky(i, False) for i in range(400)]).tasks["left_right"]
    assert clean.probe - clean.constant < 0.05
    assert clean.warnings == []


def test_pruning_removes_leaking_rows_only_when_there_is_a_leak():
    rows = [leaky(i, i % 2 == 0) for i in range(400)]
    removed = set(prune(rows, share=0.2))
    assert removed
    left = audit([row for row in rows if row["id"] not in removed]).tasks["left_right"]
    assert left.probe - left.constant < 0.2
    assert prune([leaky(i, False) for i in range(400)]) == []


def test_a_long_task_is_pruned_with_a_probe_of_a_sample(monkeypatch):
    monkeypatch.setattr("spatialvlm.synthesis.audit.MAX_PROBE_ROWS", 150)
    seen = []
    monkeypatch.setattr(
        "spatialvlm.synthesis.probe._matrix",
        lambda cases: seen.append(len(cases)) or _matrix(cases),
    )
    rows = [leaky(i, i % 2 == 0) for i in range(400)]
    removed = set(prune(rows, share=0.2, rounds=1))
    given_away = {row["id"] for row in rows if ("large" in row["messages"][0]["content"]) == (row["answer_text"] == "Yes")}  # fmt: skip
    assert len(removed) == 80
    assert removed < given_away  # also those outside the sample
    assert max(seen) == 150


def test_a_probe_of_rooms_in_one_fold_has_nothing_to_test_on():
    labels, folds = np.zeros(70, dtype=int), np.full(70, 3)
    assert _probe_classes(np.ones((70, 2)), labels, folds, 1) == 0.0


def test_pruning_removes_numbers_that_the_text_gives_away():
    def row(i, leak):
        value = 1.0 + i % 9
        word = f"n{i % 9}" if leak else f"n{(i * 7919) % 11}"
        return row_like(
            "dist_abs", value, i, form="NUM", answer_type="number", unit="m", answer_text=f"{value}",
            messages=[{"role": "user", "content": f"<image>\nHow far is {word}?"}],
        )  # fmt: skip

    rows = [row(i, i % 3 > 0) for i in range(600)]
    before = audit(rows).tasks["dist_abs"]
    assert before.probe - before.constant > 0.1
    removed = set(prune(rows, share=0.2))
    kept = [r for r in rows if r["id"] not in removed]
    assert 100 < len(kept) < 500
    after = audit(kept).tasks["dist_abs"]
    assert after.probe - after.constant <= 0.1


def test_an_audit_looks_at_every_row_once(made):
    rows = read_rows(made[1])
    whole, passed = audit(rows), audit(iter(rows))
    assert passed.to_dict() == whole.to_dict()
    doubled = audit([*rows, rows[3]])
    assert doubled.duplicates == 1
    assert any("occurred before" in text for text in doubled.warnings)


def test_skewed_option_positions_are_reported():
    options = ["left", "right", "front", "back"]
    rows = [
        row_like("mv_pos", options[0], i, form="MCQ", answer_type="mcq", options=options, choice_idx=int(i % 3 == 0), answer_text="AB"[int(i % 3 == 0)])
        for i in range(200)
    ]  # fmt: skip
    found = audit(rows).tasks["mv_pos"]
    assert found.position_p < 1e-6
    assert found.positions["C of 4"] == 0
    assert best_constant([case_of(row) for row in rows]) == pytest.approx(133 / 200)


def test_generated_options_are_uniform_and_ids_unique(made):
    rows = [row for row in read_rows(made[1]) if row["form"] == "MCQ"]
    result = audit(rows)
    assert result.duplicates == 0
    assert all(task.position_p > 0.001 for task in result.tasks.values())


def test_the_page_is_static_and_escapes_text(made):
    row = {**read_rows(made[1])[0]}
    row["messages"] = [
        {"role": "user", "content": "<image>\n<script>x</script>"},
        {"role": "assistant", "content": "y"},
    ]
    html = page(audit([row]), {row["task"]: row}, {row["images"][0]: "data:image/jpeg;base64,AA"})
    assert "<script>" not in html
    assert "http" not in html
    assert "data:image/jpeg" in html


# Export ----------------------------------------------------------------------------------------------
def test_an_export_counts_rows_that_have_no_such_format(made, tmp_path):
    scenes, rows = made
    manifest = export_rows(rows, scenes, tmp_path, "messages", render_marks=True, format_id=4)
    lacking = sum(4 not in row["formats_ok"] for row in read_rows(rows))
    assert manifest["rows_without_that_format"] == lacking > 0
    with pytest.raises(DataError, match="format 19 does not exist"):
        export_rows(rows, scenes, tmp_path, "messages", format_id=19)


def test_exports_hold_the_same_rows(made, tmp_path):
    scenes, rows = made
    count = len(read_rows(rows))
    for kind in ("sharegpt", "messages"):
        manifest = export_rows(rows, scenes, tmp_path / kind, kind, render_marks=True)
        lines = [json.loads(line) for line in (tmp_path / kind / "rows.jsonl").open()]
        assert len(lines) == manifest["rows"] == count
    line = json.loads((tmp_path / "sharegpt" / "rows.jsonl").read_text().splitlines()[0])
    assert {turn["from"] for turn in line["conversations"]} <= {"human", "gpt", "system"}
    marked = [r for r in read_rows(rows) if r["marks"] != "[]"]
    assert marked
    assert (tmp_path / "messages" / "images" / f"{marked[0]['id']}.0.jpg").is_file()


def test_webdataset_members_belong_together_and_shards_are_small(made, tmp_path):
    scenes, rows = made
    manifest = export_rows(
        rows,
        scenes,
        tmp_path,
        "webdataset",
        render_marks=True,
        shard_bytes=400_000,
        licenses=["other"],
    )
    assert manifest["skipped"].keys() == {"license mine"}
    shards = sorted(tmp_path.glob("*.tar"))
    assert len(shards) > 1
    seen = 0
    for shard in shards:
        with tarfile.open(shard) as archive:
            names = archive.getnames()
            for name in (n for n in names if n.endswith(".json")):
                row = json.load(archive.extractfile(name))
                images = row.get("image") or row["video"][0]
                assert set(images) <= set(names)
                seen += 1
    assert seen == manifest["rows"]


def test_a_format_can_be_fixed(made, tmp_path):
    scenes, rows = made
    export_rows(rows, scenes, tmp_path, "messages", format_id=8, render_marks=True)
    text = (tmp_path / "rows.jsonl").read_text()
    assert "<ref>region</ref><box>[[" in text
    shown = {json.loads(line)["id"]: line for line in text.splitlines()}
    videos = [r["id"] for r in read_rows(rows) if r["media_kind"] == "video"]
    assert all("<ref>" not in shown[i] for i in videos)


def test_marks_are_never_lost_and_images_never_replaced(made, tmp_path):
    scenes, rows = made
    with pytest.raises(ConfigError, match="--render-marks"):
        export_rows(rows, scenes, tmp_path / "a", "messages")
    with pytest.raises(MediaError, match="missing"):
        export_rows(rows, tmp_path, tmp_path / "b", "messages", render_marks=True)


def test_every_task_has_a_tag_of_each_taxonomy():
    all_tasks = registry.TASKS
    families = {"SM", "SR", "CP", "MC", "SAR"}
    capabilities = {"MM", "MR", "SR", "PT", "DA", "CR"}
    groups = {"rel", "persp", "meas", "complex"}
    dimensions = {"depth", "size", "rel", "persp", "shape", "nav"}
    assert {t.family for t in all_tasks.values()} == families
    assert {t.capability for t in all_tasks.values()} == capabilities
    for group, dimension in product(groups, ("",)):
        assert any(t.group == group for t in all_tasks.values()), dimension
    assert {t.dimension for t in all_tasks.values()} == dimensions


def test_schema_is_the_one_on_disk(made):
    path = sorted(made[1].glob("*.parquet"))[0]
    assert pq.read_schema(path).equals(SCHEMA)
    assert isinstance(SCHEMA.field("margin").type, pa.StructType)


def test_evaluation_scenes_are_skipped_or_marked_and_not_exported(made, tmp_path):
    scenes, _ = made
    plan, bad = make_plan("left_right"), ["rooms/hand-1"]
    synthesize(scenes, tmp_path / "a", plan, executor="serial", blocked=bad)
    assert "rooms/hand-1" not in {row["scene_id"] for row in read_rows(tmp_path / "a")}
    synthesize(scenes, tmp_path / "b", plan, executor="serial", blocked=bad, allow_blocked=True)
    marked = {r["scene_id"] for r in read_rows(tmp_path / "b") if "contaminated" in r["tags"]}
    assert marked == {"rooms/hand-1"}
    assert verify(tmp_path / "b", scenes).mismatches == []
    assert len(verify(tmp_path / "b", scenes, blocked=bad).mismatches) == 20
    with pytest.raises(ContaminationError, match="rooms/hand-1"):
        export_rows(tmp_path / "b", scenes, tmp_path / "c", "messages", render_marks=True)
    found = audit(read_rows(tmp_path / "b"), blocked=lambda ids: [s for s, _ in ids if s in bad])
    assert found.blocked == bad
