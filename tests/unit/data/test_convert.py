"""Conversion between formats, and referring sets joined with scenes."""

import importlib.util
import json
import random
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from spatialvlm.data.formats import SourceAttrs
from spatialvlm.data.sample import scene_names
from spatialvlm.data.sources import Source
from spatialvlm.errors import DataError
from spatialvlm.scenes.io import iter_scenes, save_scene
from spatialvlm.scenes.schema import Frame, Object, Scene
from tests.unit.data.test_formats_fuzz import mutate

JPEG, MP4 = b"\xff\xd8 picture", b"\x00\x00\x00\x18ftyp film"


@pytest.fixture(scope="module")
def tool():
    path = Path(__file__).parents[3] / "tools" / "convert_data.py"
    spec = importlib.util.spec_from_file_location("convert_data", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def talk(question, answer="Yes.", **fields):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns} | fields


@pytest.fixture
def data(tmp_path):
    """A set with every kind of medium, and one row that cannot be read."""
    root = tmp_path / "set"
    (root / "clip").mkdir(parents=True)
    for n in range(3):
        (root / f"{n}.jpg").write_bytes(JPEG + bytes([n]))
        (root / "clip" / f"{n}.jpg").write_bytes(JPEG + bytes([9 - n]))
    (root / "v.mp4").write_bytes(MP4)
    rows = [
        talk("<image>\nOne?", image="0.jpg", question_type="count"),
        talk("Is <image> like <image>?", image=["1.jpg", "2.jpg"], system="Short."),
        talk("<video>\nWhat?", video="clip"),
        talk("<video>\nWhen?", video="v.mp4", video_start=1.0, video_end=2.0),
        talk("No media?", "«Ja»"),
        talk("", ""),
    ]
    path = root / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arguments(path, to, out, **options):
    default = {
        "format": "auto", "name": None, "media_root": None, "root": None, "scenes": None, "media_template": None,
        "answers": "first", "frames": 32, "shard_rows": 2, "limit": None, "decontaminate": False,
    }  # fmt: skip
    return Namespace(files=[path], to=to, out=out, **(default | options))


def reread(report):
    entry = report["source"]
    source = Source(
        SourceAttrs("again", "x", base=entry["base"]),
        files=entry["files"],
        root=entry["root"],
        format=entry["format"],
    )
    return source, [s for n in range(len(source.files)) for _, r in source.scan(n) for s in r]


@pytest.mark.parametrize("to", ["canonical", "messages", "webdataset", "arrow"])
def test_formats_come_back(tool, data, tmp_path, to):
    report = tool.convert(arguments(data, to, tmp_path / "out" / to))
    assert report["written"] == 5
    assert report["not_converted"] == {"empty_answer": 1}
    assert report["round_trip_checked"] == 5
    assert report["shards"] == 3
    source, samples = reread(report)
    assert [s.turns[-1].text for s in samples] == ["Yes."] * 4 + ["«Ja»"]
    assert [[m.kind for m in s.media] for s in samples] == [
        ["image"], ["image", "image"], ["video"], ["video"], [],
    ]  # fmt: skip
    assert samples[1].turns[1].parts == ("Is ", 0, " like ", 1, "?")
    assert samples[1].turns[0].text == "Short."
    assert samples[0].capability == "count"
    assert samples[3].media[0].clip_s == (1.0, 2.0)
    if to in ("webdataset", "arrow"):
        assert source.media_bytes(samples[1].media[0]) == [JPEG + b"\x01"]
        assert source.media_bytes(samples[2].media[0]) == [JPEG + bytes([9 - n]) for n in range(3)]
        assert source.media_bytes(samples[3].media[0]) == [MP4]
    else:
        assert (source.root / samples[0].media[0].path).read_bytes() == JPEG + b"\x00"


def test_media_outside_the_folder_of_the_rows_need_a_root(tool, tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "a.jpg").write_bytes(JPEG)
    path = tmp_path / "rows" / "r.jsonl"
    path.write_text(json.dumps(talk("<image>?", image="../a.jpg")) + "\n")
    with pytest.raises(DataError, match="refused_path 1"):
        tool.convert(arguments(path, "webdataset", tmp_path / "no"))
    report = tool.convert(arguments(path, "webdataset", tmp_path / "out", root=tmp_path))
    source, (sample,) = reread(report)
    assert (source.root, source.files) == (tmp_path / "out", ("r-00000.tar",))
    assert source.media_bytes(sample.media[0]) == [JPEG]
    with pytest.raises(DataError, match="does not hold the data files"):
        tool.convert(arguments(path, "webdataset", tmp_path / "x", root=tmp_path / "out"))


def write_embedded(path, cells):
    """One row with its pictures inside."""
    table = pa.Table.from_pylist([talk("<image>\nOne?", images=cells, meta_info="[]")])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as out:
        out.write_table(table)


def test_embedded_media_are_written_out_for_messages(tool, tmp_path):
    cells = [{"bytes": JPEG, "path": "a.jpg"}]
    write_embedded(tmp_path / "e.arrow", cells)
    report = tool.convert(arguments(tmp_path / "e.arrow", "messages", tmp_path / "out"))
    source, (sample,) = reread(report)
    assert (source.root / sample.media[0].path).read_bytes() == JPEG
    canonical = tool.convert(arguments(tmp_path / "e.arrow", "canonical", tmp_path / "canonical"))
    source, (sample,) = reread(canonical)
    assert source.media_bytes(sample.media[0]) == [JPEG]


def test_an_interrupted_conversion_continues(tool, data, tmp_path):
    out = tmp_path / "out"
    tool.convert(arguments(data, "canonical", out))
    shards = sorted(out.glob("*.jsonl"))[:3]
    before = [p.read_bytes() for p in shards]
    stamp = shards[0].stat().st_mtime_ns
    shards[1].unlink()
    report = tool.convert(arguments(data, "canonical", out))
    assert [p.read_bytes() for p in shards] == before
    assert shards[0].stat().st_mtime_ns == stamp
    assert report["written"] == 5
    with pytest.raises(DataError, match="holds another conversion"):
        tool.convert(arguments(data, "canonical", out, limit=1))


def test_what_a_format_cannot_carry_is_listed(tool, data, tmp_path, data_dir):
    spar = data_dir / "formats" / "spar.jsonl"
    with pytest.raises(DataError, match="no row was converted: mark 2"):
        tool.convert(arguments(spar, "messages", tmp_path / "out"))
    events = [json.loads(line) for line in (tmp_path / "out" / "spar.not_converted.jsonl").open()]
    assert [(e["uid"], e["reason"]) for e in events] == [
        ("spar/spar#0", "mark"),
        ("spar/spar#1", "mark"),
    ]
    (data.parent / "0.jpg").unlink()
    report = tool.convert(arguments(data, "webdataset", tmp_path / "tar"))
    assert report["not_converted"] == {"missing": 1, "empty_answer": 1}


def test_evaluation_scenes_are_left_out(tool, tmp_path):
    rows = [talk("<image>?", image=f"scene{n}_00/1.jpg") for n in ("0251", "9001")]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    report = tool.convert(
        arguments(tmp_path / "r.jsonl", "canonical", tmp_path / "o", decontaminate=True)
    )
    assert report["not_converted"] == {"blocked": 1}
    assert report["written"] == 1


@pytest.mark.parametrize("to", ["messages", "webdataset", "arrow"])
def test_renamed_media_keep_the_names_that_tell_their_scene(tool, tmp_path, to):
    """Otherwise a conversion would hide evaluation scenes from the block lists."""
    cells = [{"bytes": JPEG, "path": "scans/scene0251_00/3.jpg"}]
    write_embedded(tmp_path / "e.arrow", cells)
    report = tool.convert(arguments(tmp_path / "e.arrow", to, tmp_path / "one"))
    _, (sample,) = reread(report)
    assert "scans/scene0251_00/3.jpg" in scene_names(sample)
    (file,) = (tmp_path / "one").glob("e-0*")
    with pytest.raises(DataError, match="no row was converted: blocked 1"):
        tool.convert(arguments(file, "canonical", tmp_path / "two", decontaminate=True))


def scene(folder):
    objects = [
        Object(i, str(number), label, [0, 2.0 + i, 0.5], [1, 1, 1], np.eye(3))
        for i, (number, label) in enumerate([(4, "chair"), (7, "lamp")])
    ]
    pose = np.eye(4)
    pose[:3, :3] = [[1, 0, 0], [0, 0, 1], [0, -1, 0]]  # looks along +y, z up
    frames = [
        Frame(f"{n}", f"rgb/{n}.jpg", 64, 48, [[50, 0, 32], [0, 50, 24], [0, 0, 1]], pose)
        for n in range(5)
    ]
    made = Scene("scannet/scene9002_00", "scannet/scene9002", "scannet", objects, frames)
    save_scene(made, folder / "scene9002_00")


@pytest.mark.parametrize(
    ("name", "answers", "refused"),
    [
        ("scanrefer.json", [["lamp"]], {}),
        ("multi3drefer.json", [None, ["chair", "lamp"]], {}),
        ("nr3d.csv", [["chair"]], {"correct_guess": 1}),
        ("sr3d.csv", [["lamp"]], {}),
    ],
)
def test_referring_sets_are_joined_with_their_scenes(
    tool, data_dir, tmp_path, name, answers, refused
):
    scene(tmp_path / "scenes")
    report = tool.convert(
        arguments(
            data_dir / "formats" / name, "canonical", tmp_path / "out", format="referring",
            scenes=tmp_path / "scenes", frames=3,
        )
    )  # fmt: skip
    assert report["not_converted"] == refused
    source, samples = reread(report)
    found = [None if s.turns[1].text == "none" else json.loads(s.turns[1].text) for s in samples]
    assert [boxes and [b["label"] for b in boxes] for boxes in found] == answers
    lamp = [b for boxes in found if boxes for b in boxes if b["label"] == "lamp"]
    for box in lamp:
        assert box["bbox_3d"] == pytest.approx([3, 0, 0.5, 1, 1, 1, 0])
    ref = samples[0].media[0]
    assert (ref.store, ref.member) == ("frames", "0.jpg\n2.jpg\n4.jpg")
    assert (source.root / ref.path).resolve() == (tmp_path / "scenes/scene9002_00/rgb").resolve()
    assert samples[0].scene_id == "scannet/scene9002_00"


def test_command_line_errors(tool, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["convert_data.py", "absent.json", "--to", "canonical", "--out", str(tmp_path)]
    )
    assert tool.main() == 2
    assert "no such file" in capsys.readouterr().err


def test_mutated_referring_rows_are_joined_or_refused_with_their_place(tool, data_dir, tmp_path):
    scene(tmp_path / "scenes")
    args = arguments(tmp_path, "canonical", tmp_path, scenes=tmp_path / "scenes", frames=3)
    scenes = {one.scene_id.rpartition("/")[2]: one for one in iter_scenes(args.scenes)}
    rng, outcomes = random.Random(0), set()
    for name in ("scanrefer.json", "multi3drefer.json", "nr3d.csv", "sr3d.csv"):
        source = Source(SourceAttrs("s", "f"), files=[name], root=data_dir / "formats")
        for raw in source.container(0).scan():
            for junk in (
                None,
                3,
                "text",
                [],
                {"description": "x", "object_ids": "[1, ", "scene_id": "scene9002_00"},
            ):
                with pytest.raises(DataError, match="s/rows#7"):
                    tool.referring_sample(junk, scenes, "s/rows#7", source, args)
            for _ in range(200):
                try:
                    row = mutate(raw.value, rng)
                    found = tool.referring_sample(row, scenes, "s/rows#7", source, args)
                except DataError as error:
                    assert "s/rows#7" in str(error)  # noqa: PT017
                    outcomes.add(error.reason)
                else:
                    outcomes.add(found.turns[1].role)
    assert outcomes >= {"assistant", "schema", "missing", "correct_guess"}
