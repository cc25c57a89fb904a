"""The 19 instruction formats and the marks they draw."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from spatialvlm.data.sample import MediaRef, Sample, Turn
from spatialvlm.data.template import FAMILY_OF_MODEL_TYPE
from spatialvlm.errors import DataError, MarkError
from spatialvlm.scenes.visibility import encode_rle
from spatialvlm.synthesis.formats import (
    DIALECT_OF,
    FormatExpander,
    allowed_formats,
    expand_slots,
    reference,
    text_and_view,
)
from spatialvlm.synthesis.generate import generate_scene
from spatialvlm.synthesis.marks import PALETTE, draw_marks, mark_from_dict, rle_to_mask
from spatialvlm.synthesis.plan import make_plan
from spatialvlm.synthesis.rows import Draws

CHAIR = {
    "obj": 2,
    "label": "chair",
    "phrase": "blue chair",
    "unique": True,
    "size": [640, 480],
    "boxes": {"0": [142.2, 309.8, 232.7, 453.3]},
    "masks": {},
    "spans": [[0, 3, 17]],
}


def masked(slot):
    mask = np.zeros((480, 640), dtype=bool)
    mask[310:453, 142:232] = True
    return {**slot, "masks": {"0": encode_rle(mask)}}


def sample_of(slot, formats):
    question = "Is the blue chair left of the table?"
    return Sample(
        uid="rows/part#1",
        source="rows",
        family="spatial",
        turns=(Turn("user", (0, f"\n{question}")), Turn("assistant", ("Yes",))),
        media=(MediaRef("image", "file", "a.jpg"),),
        formats_ok=tuple(formats),
        meta={"slots": [slot]},
    )


def test_there_are_nineteen_formats_and_no_mark_without_a_view():
    pairs = [text_and_view(i) for i in range(19)]
    assert len(set(pairs)) == 19
    assert (5, 1) not in pairs
    assert pairs[0] == (1, 1)
    assert pairs[16:] == [(5, 2), (5, 3), (5, 4)]
    with pytest.raises(DataError, match="format 19"):
        text_and_view(19)


def test_which_formats_a_row_allows():
    assert allowed_formats([masked(CHAIR)]) == list(range(19))
    # Named by a mark and without masks: no T1, no T2, no V3.
    assert allowed_formats([{**CHAIR, "unique": False}]) == [8, 9, 11, 12, 13, 15, 16, 18]
    assert allowed_formats([{**CHAIR, "boxes": {}}]) == [0, 4]
    # Shown in the second image only: numbers in the text would be read as a place in the first.
    second = {**CHAIR, "boxes": {"1": CHAIR["boxes"]["0"]}}
    assert allowed_formats([CHAIR, second]) == [0, 1, 3, 4, 5, 7, 16, 18]


@pytest.mark.parametrize(
    ("format_id", "question", "kinds"),
    [
        (0, "Is the blue chair left of the table?", []),
        (1, "Is the blue chair left of the table?", ["box"]),
        (4, "Is <ref>blue chair</ref> left of the table?", []),
        (8, "Is <ref>region</ref><box>[[222,645,364,944]]</box> left of the table?", []),
        (12, "Is <ref>blue chair</ref><box>[[222,645,364,944]]</box> left of the table?", []),
        (15, "Is <ref>blue chair</ref><box>[[222,645,364,944]]</box> left of the table?", ["id"]),
        (18, "Is region 1 left of the table?", ["id"]),
    ],
)
def test_text_and_marks_of_a_format(format_id, question, kinds):
    shown = FormatExpander("internvl")(sample_of(CHAIR, [format_id]), epoch=0)
    assert shown.turns[0].parts == (0, f"\n{question}")
    assert [mark.kind for mark in shown.marks] == kinds
    assert shown.coords == ("norm1000" if "<box>" in question else "none")


def test_marks_are_named_in_the_text_as_they_are_drawn():
    for format_id, kind in ((16, "box"), (17, "mask")):
        shown = FormatExpander()(sample_of(masked(CHAIR), [format_id]), epoch=3)
        (mark,) = shown.marks
        assert shown.turns[0].text == f"\nIs the {mark.color} {kind} left of the table?"
        assert mark.name == f"the {mark.color} {kind}"


def test_dialects():
    assert reference("region", [1, 2, 3, 4], "qwen") == (
        "<|object_ref_start|>region<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|>"
    )
    assert reference("blue chair", [1, 2, 3, 4], "plain") == "blue chair [1, 2, 3, 4]"
    with pytest.raises(DataError, match="llava"):
        expand_slots([CHAIR], 8, "llava", Draws("x"))
    with pytest.raises(DataError, match="no masks"):
        expand_slots([CHAIR], 17, "plain", Draws("x"))


def test_a_row_is_shown_in_every_allowed_format_over_the_epochs():
    sample = sample_of(masked(CHAIR), range(19))
    texts = {FormatExpander()(sample, epoch).turns[0].text for epoch in range(150)}
    assert len(texts) >= 10
    again = FormatExpander()(sample, 7)
    assert again == FormatExpander()(sample, 7)
    shares = {
        marked: np.mean([bool(FormatExpander(marked=marked)(sample, e).marks) for e in range(200)])
        for marked in (None, 0.0, 0.3, 1.0)
    }
    assert shares[0.0] == 0
    assert shares[1.0] == 1
    assert shares[0.3] == pytest.approx(0.3, abs=0.1)
    assert shares[None] > 0.6
    only = {FormatExpander(formats=(4,))(sample, epoch).turns[0].text for epoch in range(5)}
    assert only == {"\nIs <ref>blue chair</ref> left of the table?"}


def test_generated_rows_hold_exact_places_of_every_name(hand_room):
    rows, _ = generate_scene(
        hand_room, make_plan("left_right,depth_choice,depth_order,is_position")
    )
    checked = 0
    for row in rows:
        contents = [m["content"].removeprefix("<image>\n") for m in row["messages"]]
        for slot in json.loads(row["slots"]):
            for message, start, end in slot["spans"]:
                named = contents[message][start:end].lower().removeprefix("the ")
                checked += 1
                assert named == slot["phrase"] or (
                    not slot["unique"] and named.startswith("object in the")
                )
        if row["form"] == "OE" and row["task"] == "depth_choice":
            assert any(s[0] == 1 for slot in json.loads(row["slots"]) for s in slot["spans"])
    assert checked > 100


def test_marks_are_drawn_where_they_say_at_any_size():
    image = Image.new("RGB", (320, 240), (128, 128, 128))
    box = mark_from_dict({"image": 0, "kind": "box", "color": "red", "bbox": [100, 100, 300, 400]})
    drawn = np.asarray(draw_marks(image, [box], stored_size=(640, 480)))
    changed = np.argwhere((drawn != 128).any(axis=2))
    assert changed.min(axis=0).tolist() == [50, 50]
    assert changed.max(axis=0).tolist() == [199, 149]
    assert tuple(drawn[50, 60]) == PALETTE["red"]
    assert (drawn[100, 100] == 128).all()
    assert (np.asarray(image) == 128).all()


def test_masks_points_and_ids_change_their_place_only():
    image = Image.new("RGB", (64, 48), (128, 128, 128))
    mask = np.zeros((48, 64), dtype=bool)
    mask[10:20, 30:40] = True
    marks = [
        mark_from_dict({"image": 0, "kind": "mask", "color": "blue", "rle": encode_rle(mask)}),
        mark_from_dict({"image": 0, "kind": "point", "color": "green", "xy": [8, 40]}),
    ]
    drawn = np.asarray(draw_marks(image, marks))
    assert tuple(drawn[10, 30]) == PALETTE["blue"]
    assert tuple(drawn[15, 35]) != (128, 128, 128)
    assert tuple(drawn[40, 8]) == PALETTE["green"]
    assert (drawn[30, 50] == 128).all()
    numbered = mark_from_dict(
        {"image": 0, "kind": "id", "color": "white", "bbox": [5, 5, 40, 40], "label": "1"}
    )
    assert (np.asarray(draw_marks(image, [numbered])) != 128).any()


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"image": 0, "kind": "box", "color": "beige", "bbox": [0, 0, 1, 1]}, "beige"),
        ({"image": 0, "kind": "box", "color": "red"}, "no position"),
        ({"image": 0, "kind": "box", "color": "red", "bbox": ["a", 0, 1, 1]}, "mark"),
    ],
)
def test_bad_marks_are_refused(record, message):
    with pytest.raises(MarkError, match=message):
        mark_from_dict(record)


def test_a_mark_outside_the_image_is_never_ignored():
    mark = mark_from_dict({"image": 0, "kind": "point", "color": "red", "xy": [700, 10]})
    with pytest.raises(MarkError, match="outside"):
        draw_marks(Image.new("RGB", (640, 480)), [mark])
    with pytest.raises(MarkError, match="runs sum"):
        rle_to_mask({"size": [2, 2], "counts": [1, 1]})


def test_palette_colours_are_far_apart():
    from spatialvlm.scenes.rooms.appearance import lab

    colours = [np.asarray(lab(rgb)) for rgb in PALETTE.values()]
    for i, one in enumerate(colours):
        for other in colours[:i]:
            assert np.linalg.norm(one - other) >= 25


def test_spar_boxes_grow_outwards_at_the_scale_of_the_stored_image():
    image = Image.new("RGB", (320, 240), (128, 128, 128))
    record = {"image": 0, "kind": "box", "color": "red", "units": "norm1000", "style": "spar"}
    mark = mark_from_dict({**record, "bbox": [250, 250, 750, 750]})
    drawn = np.asarray(draw_marks(image, [mark], stored_size=(640, 480)))
    changed = np.argwhere((drawn != 128).any(axis=2))
    assert changed.min(axis=0).tolist() == [50, 70]  # 60 - 10, 80 - 10
    assert (drawn[61, 81] == 128).all()


def test_every_backbone_family_has_a_dialect():
    assert set(DIALECT_OF) == set(FAMILY_OF_MODEL_TYPE.values())
    text = {
        family: FormatExpander(dialect)(sample_of(CHAIR, [4]), epoch=0).turns[0].text
        for family, dialect in DIALECT_OF.items()
    }
    assert "<ref>blue chair</ref>" in text["internvl3"]
    for family in ("qwen2_5vl", "qwen3vl"):
        assert "<|object_ref_start|>blue chair<|object_ref_end|>" in text[family]


def test_a_plan_can_keep_its_questions_as_written(hand_room):
    plan = make_plan("left_right,is_position", per_task=8)
    rows = {}
    for name, wording in (
        ("varied", plan.wording),
        ("kept", replace(plan.wording, formats=False)),
        ("unmarked", replace(plan.wording, marks=0.0)),
        ("asked for", replace(plan.wording, marks=0.0, formats=True)),
    ):
        rows[name], _ = generate_scene(hand_room, replace(plan, wording=wording))
    for name in ("varied", "asked for"):
        assert any(len(row["formats_ok"]) > 1 for row in rows[name])
    assert [row["messages"] for row in rows["kept"]] == [row["messages"] for row in rows["varied"]]
    for row in rows["kept"] + rows["unmarked"]:
        assert row["formats_ok"] == ([] if json.loads(row["marks"]) else [0])


def test_no_format_gives_the_answer_away(hand_room):
    plan = make_plan("grounding_2d,locate_cell,object_colour,left_right", per_task=6)
    plan = replace(plan, wording=replace(plan.wording, masks=False))
    allowed = {"grounding_2d": {0, 4}, "locate_cell": {0, 4}, "object_colour": {0, 4, 8, 12}}
    seen = {}
    for row in generate_scene(hand_room, plan)[0]:
        seen.setdefault(row["task"], set()).update(row["formats_ok"])
    assert len(seen["left_right"]) > 4
    for task, formats in allowed.items():
        assert seen[task] == formats
