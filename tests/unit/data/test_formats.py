"""Readers: every format's fixture, the rules on media, markers and turns, and reasons of rejected rows."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spatialvlm.data.formats import (
    FORMATS,
    Place,
    SourceAttrs,
    detect,
    read_row,
    sample_to_json,
)
from spatialvlm.data.sample import MediaRef
from spatialvlm.data.sources import Source
from spatialvlm.errors import ConfigError, DataError
from spatialvlm.typing import MarkSpec

# file -> format, rows, samples, (images, videos) per sample
CASES = {
    "sharegpt.json": ("sharegpt", 3, [(1, 0), (2, 0), (0, 0)]),
    "sensenova.jsonl": ("sensenova", 3, [(2, 0), (3, 0), (1, 0)]),
    "messages.jsonl": ("messages", 5, [(1, 0), (2, 0), (1, 0), (1, 0), (0, 1)]),
    "vsi590k.jsonl": ("vsi590k", 2, [(0, 1), (1, 0)]),
    "vlm3r.json": ("vlm3r", 2, [(0, 1), (0, 1)]),
    "vica.json": ("vica", 2, [(0, 1), (0, 1)]),
    "llava_video.json": ("llava_video", 2, [(0, 1), (0, 1)]),
    "qwen_finetune.json": ("qwen_finetune", 4, [(1, 0), (2, 0), (0, 1), (1, 0), (1, 0)]),
    "spar.jsonl": ("spar", 2, [(3, 0), (1, 0)]),
    "spar_info.jsonl": ("spar", 1, [(3, 0)]),
    "scanqa.json": ("scanqa", 2, [(0, 1), (0, 1)]),
}
REAL = {
    "llava_sharegpt.json": "sharegpt.json",
    "sensenova_si.jsonl": "sensenova.jsonl",
    "openai_messages.jsonl": "messages.jsonl",
    "vsi590k.jsonl": "vsi590k.jsonl",
    "vlm3r.json": "vlm3r.json",
    "vica.json": "vica.json",
    "llava_video.json": "llava_video.json",
    "qwen_finetune.json": "qwen_finetune.json",
    "spar.jsonl": "spar.jsonl",
    "spar_vgllm.jsonl": "spar_info.jsonl",
    "scanqa.json": "scanqa.json",
}


def open_source(root, *files, format="auto", **attrs):
    attrs.setdefault("media_template", "scannet/{scene_id}")
    return Source(SourceAttrs("s", "spatial", **attrs), files=files, root=root, format=format)


def read_all(source):
    found = [samples for n in range(len(source.files)) for _, samples in source.scan(n)]
    bad = [s for s in found if isinstance(s, DataError)]
    assert not bad, bad
    return [sample for samples in found for sample in samples]


def counts(samples):
    return [
        (sum(m.kind == "image" for m in s.media), sum(m.kind == "video" for m in s.media))
        for s in samples
    ]


@pytest.mark.parametrize("name", CASES)
def test_own_fixtures(data_dir, name):
    fmt, rows, expected = CASES[name]
    source = open_source(data_dir / "formats", name)
    assert source.format.name == fmt
    assert sum(1 for _ in source.container(0).scan()) == rows
    samples = read_all(source)
    assert counts(samples) == expected
    assert len({s.uid for s in samples}) == len(samples)


@pytest.mark.real
@pytest.mark.parametrize("name", REAL)
def test_real_fixtures(real_dir, name):
    fmt, rows, expected = CASES[REAL[name]]
    source = open_source(real_dir, f"formats/{name}", base="formats")
    assert source.format.name == fmt
    assert sum(1 for _ in source.container(0).scan()) == rows
    samples = read_all(source)
    assert counts(samples) == expected
    present = [(real_dir / m.path).exists() for s in samples for m in s.media]
    absent = {"vlm3r.json": 1, "vica.json": 1, "scanqa.json": 2}.get(name, 0)
    assert present.count(False) == absent


@pytest.mark.real
def test_real_embedded_fixtures(real_dir, tmp_path):
    expected = {
        "openspatial": ("embedded", [(1, 0), (2, 0)]),
        "vst": ("embedded", [(1, 0), (2, 0), (0, 1), (0, 0)]),
        "llava_onevision": ("llava_onevision", [(1, 0), (0, 0)]),
    }
    for name, (fmt, media) in expected.items():
        source = Source(
            SourceAttrs("s", "general"),
            files=[f"formats/{name}.parquet"],
            root=real_dir,
            cache_dir=tmp_path,
        )
        assert source.format.name == fmt
        samples = read_all(source)
        assert counts(samples) == media
        for ref in (ref for s in samples for ref in s.media):
            (data,) = source.media_bytes(ref)
            assert data[:4] in (b"\x89PNG", b"\x00\x00\x00\x1c")
        if name == "openspatial":
            assert samples[0].turns[1].text.startswith("[{'bbox_3d': [0.12,")
            assert json.loads(samples[0].meta["meta_info"])[0]["width"] == 64


@pytest.mark.real
def test_real_rows_without_answers_are_rejected(real_dir):
    source = open_source(real_dir, "sensenova_si/examples/examples.jsonl", base="sensenova_si")
    reasons = [s.reason for _, s in source.scan(0)]
    assert reasons == ["no_answer"] * 18


@pytest.mark.real
def test_real_joined_questions(real_dir):
    files = [f"formats/sqa3d_{part}.json" for part in ("questions", "annotations")]
    source = open_source(real_dir, *files)
    samples = read_all(source)
    assert [s.turns[1].text for s in samples] == ["backward", "no"]
    assert source.notes == []
    files = [
        f"sqa3d_test50/v1_balanced_{part}_test_scannetv2.json"
        for part in ("questions", "sqa_annotations")
    ]
    assert len(read_all(open_source(real_dir, *files))) == 50


def test_spar_carriers_agree(data_dir):
    plain = read_all(open_source(data_dir / "formats", "spar.jsonl"))[0]
    packed = read_all(open_source(data_dir / "formats", "spar_info.jsonl"))[0]
    assert packed._replace(uid=plain.uid) == plain
    assert [(m.color, m.image, m.xy) for m in plain.marks] == [
        ("red", 0, (100.0, 200.0)),
        ("blue", 2, (300.0, 400.0)),
        ("green", 1, (500.0, 600.0)),
    ]
    boxes = read_all(open_source(data_dir / "formats", "spar.jsonl"))[1].marks
    assert boxes[1] == MarkSpec(
        0, "box", "blue", "the blue box", bbox=(50, 60, 70, 80), units="norm1000", style="spar"
    )


SPAR_TYPES = {
    "depth_prediction_oo_mv": ("red blue green", [0, 1, 2]),
    "depth_prediction_oc_mv": ("red blue", [0, 1]),
    "distance_prediction_oo_mv": ("red blue", [0, 1]),
    "distance_prediction_oo_video": ("red blue", [0, 1]),
    "distance_prediction_oc_mv": ("red", [0]),
    "distance_infer_center_oo_mv": ("red green blue", [0, 1, 2]),
    "spatial_imagination_oc_mv": ("green blue red", [0, 1, 2]),
    "spatial_imagination_oc_video": ("green blue red", [0, 1, 2]),
    "spatial_imagination_oo_mv": ("green blue red yellow", [0, 1, 2, 3]),
    "spatial_imagination_oo_video": ("green blue red yellow", [0, 1, 2, 3]),
    "obj_spatial_relation_oo_mv": ("red green", [0, 1]),
    "obj_spatial_relation_oc_mv": ("red blue green", [0, 0, 0]),
    "position_matching": ("red", None),
    "obj_frame_locate": ("red", [0]),
    "obj_spatial_relation_oo": ("red blue", None),
    "depth_prediction_oc": ("red", None),
}


def spar_row(kind, **coordinates):
    turns = [{"from": "human", "value": "<image>" * 5}, {"from": "gpt", "value": "x"}]
    return {
        "conversations": turns,
        "image": [f"{i}.jpg" for i in range(5)],
        "type": kind,
    } | coordinates


@pytest.mark.parametrize("kind", SPAR_TYPES)
@pytest.mark.parametrize("shape", ["point", "bbox"])
def test_spar_colours_go_to_the_images_of_their_type(kind, shape):
    colours, positions = SPAR_TYPES[kind]
    numbers = [1, 2] if shape == "point" else [1, 2, 3, 4]
    row = spar_row(kind, **{f"{c}_{shape}": [numbers] for c in colours.split()})
    images = [4, 2, 3, 1]
    row[f"{shape}_img_idx"] = [images]
    (sample,) = read_row(row, FORMATS["spar"], SourceAttrs("s", "spatial"))
    found = {m.color: m.image for m in sample.marks}
    expected = [0] * 5 if positions is None else [images[p] for p in positions]
    assert found == dict(zip(colours.split(), expected, strict=False))
    video_boxes = kind.endswith("_video") and shape == "bbox"
    assert all(bool(m.label) == video_boxes for m in sample.marks)


def test_spar_lists_types_without_marks_and_unknown_types():
    def marks(kind, **coordinates):
        return read_row(
            spar_row(kind, **coordinates), FORMATS["spar"], SourceAttrs("s", "spatial")
        )[0].marks

    boxes = marks(
        "spatial_imagination_map_mv",
        bbox_list=[[[1, 2, 3, 4], [5, 6, 7, 8]]],
        bbox_img_idx=[[3, 1]],
    )
    assert [(m.label, m.image) for m in boxes] == [("object0", 3), ("object1", 1)]
    points = marks(
        "distance_infer_center_oo_video", point_list=[[[1, 2], [3, 4]]], point_img_idx=[[0, 4]]
    )
    assert [(m.label, m.image) for m in points] == [("objectA", 0), ("object0", 4)]
    for kind in ("obj_count", "room_size", "nav", "distance_infer_center_oc", "x_video_hard"):
        assert marks(kind, red_point=[[1, 2]], point_img_idx=[[0]]) == ()
    with pytest.raises(DataError, match="unknown type 'new_task'") as caught:
        marks("new_task", red_point=[[1, 2]], point_img_idx=[[0]])
    assert caught.value.reason == "spar_type"
    with pytest.raises(DataError, match="without an entry 1"):
        marks(
            "depth_prediction_oc_mv", red_point=[[1, 2]], blue_point=[[1, 2]], point_img_idx=[[0]]
        )
    with pytest.raises(DataError, match="on image 9 of 5"):
        marks("distance_prediction_oc_mv", red_point=[[1, 2]], point_img_idx=[[9]])


def test_spar_manifest(data_dir, tmp_path):
    source = open_source(data_dir / "formats", "spar_manifest.json")
    assert (source.files, source.repeat_time) == (("spar.jsonl",), 0.5)
    assert read_all(source)[0].media[0].path == "media/k/0.jpg"
    two = {n: {"root": ".", "annotation": "a.jsonl", "repeat_time": n} for n in (1, 2)}
    (tmp_path / "m.json").write_text(json.dumps(two))
    with pytest.raises(ConfigError, match="different repeat_time"):
        open_source(tmp_path, "m.json")


def test_scene_questions(data_dir):
    root = data_dir / "formats"
    assert len(read_all(open_source(root, "scanqa.json", answers="all"))) == 3
    (first,) = read_all(open_source(root, "scanqa.json", answers="all"))[:1]
    assert first.media == (MediaRef("video", "frames", "scannet/scene9002_00"),)
    assert first.uid == "s/scanqa#0"
    assert read_all(open_source(root, "scanqa.json", answers="all"))[2].uid == "s/scanqa#1.1"
    cycle = open_source(root, "scanqa.json", answers="cycle")
    raw = list(cycle.container(0).scan())[1]
    texts = [
        cycle.read(0, raw.row, raw.offset, raw.length, epoch)[0].turns[1].text for epoch in range(3)
    ]
    assert texts == ["4", "four", "4"]
    with pytest.raises(ConfigError, match="set media_template"):
        read_all(open_source(root, "scanqa.json", media_template=None))
    joined = open_source(root, "sqa3d_questions.json", "sqa3d_annotations.json")
    samples = read_all(joined)
    assert joined.format.name == "sqa3d"
    assert [s.turns[1].text for s in samples] == ["wardrobe", "yes"]
    assert samples[0].turns[0].text == "\nI face the bed. What is behind me?"
    assert "1 question_ids have no partner and are left out: [13]" in joined.notes[0]


@pytest.mark.parametrize("name", ["scanrefer.json", "multi3drefer.json", "nr3d.csv", "sr3d.csv"])
def test_referring_sets_name_the_tool(data_dir, name):
    with pytest.raises(
        DataError, match=rf"{name}.*convert_data\.py FILE --format referring --scenes"
    ):
        read_all(open_source(data_dir / "formats", name))


def generated(**fields):
    row = {
        "id": "0af3",
        "gen_version": "1",
        "messages": [
            {"role": "user", "content": "<image>\n<image>\nHow far is the red box?"},
            {"role": "assistant", "content": "1.85"},
        ],
        "media_kind": "images",
        "images": ["room_1/rgb/0.jpg", "room_1/rgb/3.jpg"],
        "frame_times_s": None,
        "frames_pinned": True,
        "task": "distance_abs",
        "family": "SM",
        "capability": "distance",
        "answer_type": "number",
        "answer_json": "1.85",
        "slots": "[]",
        "marks": json.dumps([{"image": 1, "kind": "box", "color": "red", "bbox": [1, 2, 3, 4]}]),
        "formats_ok": [0, 3],
        "scene_id": "rooms/1",
        "room_id": "rooms/1",
        "difficulty": 0.25,
        "margin": {"kind": "gap_m", "value": 0.4, "threshold": 0.1},
        "evidence": '{"args": {}}',
    }
    return row | fields


def test_generated_rows(tmp_path):
    video = generated(
        media_kind="video",
        frame_times_s=[0.0, 0.5],
        marks="[]",
        messages=[
            {"role": "user", "content": "<video>\nWhich first?"},
            {"role": "assistant", "content": "A"},
        ],
        answer_type="box",
    )
    pq.write_table(pa.Table.from_pylist([generated(), video]), tmp_path / "qa.parquet")
    source = Source(
        SourceAttrs("s", "spatial"), files=["qa.parquet"], root=tmp_path, cache_dir=tmp_path
    )
    assert source.format.name == "spatialvlm_rows"
    first, second = read_all(source)
    assert [m.path for m in first.media] == ["room_1/rgb/0.jpg", "room_1/rgb/3.jpg"]
    assert first.same_scene
    assert first.frames_pinned
    assert first.formats_ok == (0, 3)
    assert first.marks[0].bbox == (1, 2, 3, 4)
    assert first.margin == pytest.approx(4)
    assert (first.difficulty, first.capability, first.scene_id) == (0.25, "distance", "rooms/1")
    assert (first.coords, second.coords) == ("none", "norm1000")
    assert first.meta["answer_json"] == 1.85
    assert first.meta["family"] == "SM"
    assert first.family == "spatial"
    assert second.media == (MediaRef("video", "frames", "room_1/rgb", "0.jpg\n3.jpg"),)
    assert not second.same_scene
    assert second.meta["frame_times_s"] == [0.0, 0.5]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"media_kind": "audio"}, "media_kind 'audio'"),
        ({"images": "x"}, "expected a list of paths"),
        ({"marks": "[{]"}, "invalid JSON in column 'marks'"),
        ({"marks": '[{"image": 0, "kind": "box"}]'}, "expected an object with image, kind, color"),
        (
            {"marks": '[{"image": 0, "kind": "star", "color": "red"}]'},
            "mark of kind 'star'; known: box",
        ),
        (
            {"marks": '[{"image": 0, "kind": "box", "color": "red", "bbox": [1]}]'},
            "expected 4 numbers",
        ),
        ({"formats_ok": ["a"]}, "formats_ok"),
        ({"evidence": "{"}, "column 'evidence'"),
        ({"images": ["a.jpg"]}, "2 <image> markers and 1 image"),
    ],
)
def test_broken_generated_rows(fields, message):
    with pytest.raises(DataError, match=message):
        read_row(generated(**fields), FORMATS["spatialvlm_rows"], SourceAttrs("s", "spatial"))


def read(row, fmt="sharegpt", **attrs):
    return read_row(
        row, FORMATS[fmt], SourceAttrs("s", "general", **attrs), Place("d/rows.jsonl", "rows", 412)
    )


def talk(*turns, **fields):
    names = {"u": "human", "a": "gpt", "s": "system"}
    return {"conversations": [{"from": names[r], "value": t} for r, t in turns]} | fields


QA = (("u", "<image>?"), ("a", "!"))


def media(row, **attrs):
    return [(m.kind, m.store, m.path) for m in read(row, **attrs)[0].media]


@pytest.mark.parametrize("field", ["image", "images"])
@pytest.mark.parametrize(
    "value", ["a.jpg", ["a.jpg"], {"path": "a.jpg", "bytes": None}, [{"image_url": {"url": "a.jpg"}}], [{"image": "a.jpg"}]]
)  # fmt: skip
def test_rule_a_media_fields(field, value):
    assert media(talk(*QA, **{field: value})) == [("image", "file", "a.jpg")]


def test_rule_a_videos_and_bytes():
    ask = (("u", "<video>?"), ("a", "!"))
    assert media(talk(*ask, video="a.mp4")) == [("video", "file", "a.mp4")]
    assert media(talk(*ask, video="scene_1/")) == [("video", "frames", "scene_1")]
    (sample,) = read(talk(*ask, video=["s/a/1.jpg", "s/a/2.jpg"], video_start=1, video_end=2.5))
    assert sample.media == (MediaRef("video", "frames", "s/a", "1.jpg\n2.jpg", clip_s=(1.0, 2.5)),)
    (sample,) = read(talk(("u", "<image>"), ("a", "!"), video=["b/1.jpg", "c/2.jpg"]))
    assert sample.media == (MediaRef("video", "frames", ".", "b/1.jpg\nc/2.jpg"),)
    both = talk(
        ("u", "<video> <image> <video>"), ("a", "!"), image="i.jpg", video=["1.mp4", "2.mp4"]
    )
    assert [p for _, _, p in media(both)] == ["1.mp4", "i.jpg", "2.mp4"]
    (sample,) = read(talk(*QA, images=[{"bytes": True, "path": "x.png"}]))
    assert sample.media == (MediaRef("image", "cell", "d/rows.jsonl", "412/images/0"),)
    frames = [{"bytes": True, "path": f"{i}.png"} for i in range(2)]
    (sample,) = read(talk(*ask, images=frames, type="video"))
    assert sample.media[0].member == "412/images/0\n412/images/1"
    for empty in (None, "", []):
        assert media(talk(("u", "?"), ("a", "!"), image=empty, images=empty)) == []


def test_rule_b_markers():
    def parts(text, **fields):
        return read(talk(("u", text), ("a", "!"), **fields))[0].turns[0].parts

    assert parts("a <image>\n b", image="i.jpg") == ("a ", 0, "\n b")
    assert parts("<|vision_start|><|image_pad|><|vision_end|>b", image="i.jpg") == (0, "b")
    assert parts("<|video_pad|>b", video="v.mp4") == (0, "b")
    assert parts("no marker", image=["i.jpg", "j.jpg"]) == (0, 1, "no marker")
    assert parts("<image> clip", video="v.mp4") == (0, " clip")
    assert parts("Is a <box> here?") == ("Is a <box> here?",)
    bare = {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "b"}]},
                         {"role": "assistant", "content": "!"}], "images": ["i.jpg"]}  # fmt: skip
    assert read(bare, "messages")[0].turns[0].parts == (0, "b")


@pytest.mark.parametrize(
    ("row", "reason", "message"),
    [
        (talk(("u", "<image>" * 3), ("a", "!"), image=["a", "b"]), "marker_count",
         'd/rows.jsonl:413 has 3 <image> markers and 2 images. Add the missing path to "image" or remove a marker.'),
        (talk(("u", "<image>"), ("a", "!"), image=["a", "b"]), "marker_count", "1 <image> marker and 2 images. Add a marker"),
        (talk(*QA, image=None), "marker_count", "1 <image> marker and 0 images"),
        (talk(("u", "<video><image>"), ("a", "!"), video="v.mp4"), "marker_count", "1 <image> marker and 0 images"),
        (talk(("u", "?"), ("a", "see <image>"), image="a"), "marker_in_answer", "marker in assistant turn 1"),
        (talk(("s", "<image>"), *QA, image="a"), "marker_in_answer", "system turn 0"),
        (talk(("u", "?"), ("u", "?"), ("a", "!")), "turn_order", "user turn after user (turn 1)"),
        (talk(("a", "!"), ("u", "?"), ("a", "!")), "turn_order", "assistant turn after nothing"),
        (talk(("u", "?"), ("s", "x"), ("a", "!")), "turn_order", "system turn after user"),
        (talk(("u", "?")), "no_answer", "does not end with an assistant turn"),
        (talk(), "no_answer", "nothing can be learnt"),
        (talk(("u", "?"), ("a", " \n")), "empty_answer", "empty answer in turn 1"),
        ({"conversations": "hi"}, "schema", 'has str as list "conversations"'),
        (talk(*QA, video=["a.jpg", "/b.jpg"]), "schema", "rows.jsonl:413 mixes absolute and relative paths"),
        ({"text": "hi"}, "schema", "found keys ['text']"),
        ({"conversations": ["hi"]}, "schema", "has str as turn 0"),
        ({"conversations": [{"from": "tool", "value": ""}]}, "schema", "role 'tool' in turn 0; known: human, user"),
        ({"conversations": [{"from": "human", "value": 3}]}, "schema", "has 3 as content of turn 0"),
        ({"conversations": [{"from": "human", "value": [{"type": "image", "image": {"bytes": True}}]}]}, "schema", 'move them to a column "images"'),
        ({"conversations": [{"from": "human", "value": [{"type": "audio"}]}]}, "schema", "known types: text, image"),
        (talk(("u", "\ud800?"), ("a", "!")), "schema", "half a surrogate pair"),
        (talk(*QA, image="\udfff.jpg"), "schema", "half a surrogate pair"),
        (talk(*QA, image=5), "schema", 'has 5 in "image"'),
        (talk(*QA, video="v.mp4", video_start=3, video_end=1), "schema", "start < end"),
        ("text", "schema", "is str, not an object"),
    ],
)  # fmt: skip
def test_broken_rows(row, reason, message):
    with pytest.raises(DataError) as caught:
        read(row)
    assert caught.value.reason == reason
    assert message in str(caught.value)
    assert str(caught.value).startswith("d/rows.jsonl:413 ")


def test_paths_are_relative_to_the_root():
    assert media(talk(*QA, image="../x/./a.jpg"), base="sets/one") == [
        ("image", "file", "sets/x/a.jpg")
    ]
    assert media(talk(*QA, image="../../x.jpg"), base="sets") == [("image", "file", "../x.jpg")]
    assert media(talk(*QA, image="/etc/x"), base="sets") == [("image", "file", "/etc/x")]
    assert media(talk(*QA, image="https://h//x.jpg"), base="sets") == [
        ("image", "file", "https://h//x.jpg")
    ]


def test_options_of_a_source():
    row = talk(("u", "Which?\n<image>"), ("a", "[{'a': (1, 2)}]"), image="i.jpg", type="mcq", id=7)
    (sample,) = read(row, normalize_marker="front", fixes=("python_literal_json",), pinned=True,
                     capability_map={"mcq": "choice"}, coords="norm1", same_scene=True, geometry="off")  # fmt: skip
    assert sample.turns[0].parts == (0, "\nWhich?")
    assert sample.turns[1].text == '[{"a": [1, 2]}]'
    assert (sample.capability, sample.coords, sample.geometry) == ("choice", "norm1", "off")
    assert sample.frames_pinned
    assert sample.same_scene
    assert sample.meta == {"type": "mcq", "id": 7}
    assert read(row, capability_map={})[0].capability is None
    (plain,) = read(talk(("u", "?"), ("a", "[not python")), fixes=("python_literal_json",))
    assert plain.turns[1].text == "[not python"


def test_turns_kept_as_context():
    row = {"messages": [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "x", "weight": 0},
                        {"role": "user", "content": "2?"}, {"role": "assistant", "content": "y"}]}  # fmt: skip
    assert [t.train for t in read(row, "messages")[0].turns] == [False, False, False, True]


def test_detection():
    def name(*rows):
        return detect(rows, "source s").name

    assert name(talk(*QA, image="a", id=1), talk(*QA)) == "sharegpt"
    assert name(talk(*QA, image="a")) == "qwen_finetune"
    assert name([talk(*QA, image="a")], talk(*QA, video="v")) == "qwen_finetune"
    assert name({"messages": []}) == "messages"
    assert name(generated()) == "spatialvlm_rows"
    with pytest.raises(ConfigError, match=r"row 0 fits no format; its keys are \['a'\]"):
        name({"a": 1})
    with pytest.raises(
        ConfigError, match=r"rows disagree: row 0 fits messages; row 1 fits .*sharegpt"
    ):
        name({"messages": []}, talk(*QA))
    with pytest.raises(ConfigError, match="formats of different shape: scanqa, sharegpt"):
        name(talk(*QA, answers=["a"], scene_id="x", question="q"))
    with pytest.raises(ConfigError, match="no JSON objects"):
        name()


@pytest.mark.parametrize("name", CASES)
def test_canonical_rows_come_back_unchanged(data_dir, name):
    for sample in read_all(open_source(data_dir / "formats", name)):
        row = json.loads(json.dumps(sample_to_json(sample)))
        (again,) = read_row(row, FORMATS["canonical"], SourceAttrs("s", "spatial"))
        assert again._replace(uid=sample.uid) == sample


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"turns": [{"role": "user", "parts": [0]}]}, "medium below 0"),
        ({"turns": "x"}, "expected a list"),
        ({"media": [{"kind": "image", "store": "s3", "path": "x"}]}, "expected kind, store, path"),
        ({"media": [{"kind": "image", "store": "file", "path": "x"}]}, "uses media [] but lists 1"),
        ({"weight": -1}, "weight -1"),
        ({"geometry": "maybe"}, "known: auto, on, off"),
        ({"capability": 3}, "capability 3"),
        ({"meta": []}, "meta []"),
    ],
)
def test_broken_canonical_rows(fields, message):
    turns = [{"role": "user", "parts": ["?"]}, {"role": "assistant", "parts": ["!"]}]
    with pytest.raises(DataError) as caught:
        read({"uid": "a", "turns": turns} | fields, "canonical")
    assert message in str(caught.value)
