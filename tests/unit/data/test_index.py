"""Row tables: columns, keys, rejects, blocked scenes, and what rebuilds them."""

import itertools
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spatialvlm.data.formats import SourceAttrs, sample_to_json
from spatialvlm.data.index import FLAG_BLOCKED, FLAG_NO_ID, media_and_prefix_key
from spatialvlm.data.index_build import build_index
from spatialvlm.data.sources import Source
from spatialvlm.errors import BudgetError, ConfigError, DataError
from spatialvlm.scenes.blacklist import Blacklist, BlockList, find_ids


def talk(question, answer="Yes.", **fields):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns} | fields


ROWS = [
    talk("<image>\nOne?", image="a.jpg", question_type="count"),
    talk("<image>\nTwo?", image="a.jpg", question_type="size"),
    talk("<image>\nTwo?", image="b.jpg"),
    talk("What? <image>", image="a.jpg"),
    talk("No media?"),
    [talk("<image>\nA?", image="a.jpg"), talk("<video>\nB?", video="v.mp4", scene_name="scene1")],
]


@pytest.fixture
def make(tmp_path):
    def make(rows=ROWS, name="rows.jsonl", **attrs):
        (tmp_path / name).write_text(
            "".join(json.dumps(r) + "\n" if not isinstance(r, str) else r + "\n" for r in rows)
        )
        return Source(
            SourceAttrs("s", "spatial", **attrs), files=[name], root=tmp_path, format="sharegpt"
        )

    return make


def test_columns(make, tmp_path):
    index = build_index(make(), tmp_path / "index")
    assert len(index) == 7
    prefix, media = index.column("prefix_key"), index.column("media_key")
    assert prefix[0] == prefix[1] == prefix[5] != prefix[2]
    assert prefix[3] not in (0, prefix[0])
    assert prefix[4] == media[4] == 0
    assert media[0] == media[3] != media[2]
    assert index.column("row").tolist() == [0, 1, 2, 3, 4, 5, 5]
    assert index.column("sub").tolist() == [0, 0, 0, 0, 0, 0, 1]
    assert index.column("images").tolist() == [1, 1, 1, 1, 0, 1, 0]
    assert index.column("videos").tolist() == [0, 0, 0, 0, 0, 0, 1]
    assert index.column("prompt_chars")[0] == len("\nOne?")
    assert index.column("answer_chars")[0] == 4
    assert index.capabilities == ("count", "size")
    assert index.column("capability").tolist() == [0, 1, -1, -1, -1, -1, -1]
    assert index.eligible().all()
    assert index.sample(6).media[0].path == "v.mp4"
    assert index.sample(6).uid == "s/rows#5.1"
    again = pickle.loads(pickle.dumps(index))
    assert [again.sample(i) for i in range(7)] == [index.sample(i) for i in range(7)]


def test_rows_with_media_after_the_first_answer_never_group(make, tmp_path):
    row = talk("<image>\nOne?", image=["a.jpg", "b.jpg"])
    row["conversations"] += talk("<image> Two?")["conversations"]
    index = build_index(make([row]), tmp_path / "index")
    assert index.column("prefix_key")[0] == 0
    assert index.column("media_key")[0] != 0


def test_marks_and_system_text_are_part_of_the_prefix(make, tmp_path):
    rows = [
        talk("<image>\nOne?", image="a.jpg"),
        talk("<image>\nOne?", image="a.jpg", system="Be short."),
    ]
    index = build_index(make(rows), tmp_path / "index")
    assert len(set(index.column("prefix_key").tolist())) == 2
    sample = index.sample(0)
    keys, others = media_and_prefix_key(sample), media_and_prefix_key(sample, b"other root")
    assert not set(keys) & set(others)


def test_tables_are_reused_until_files_or_options_change(make, tmp_path):
    def folder(source):
        return build_index(source, tmp_path / "index").folder

    first = folder(make())
    stamp = (first / "info.json").stat().st_mtime_ns
    os.utime(tmp_path / "rows.jsonl", ns=(0, (tmp_path / "rows.jsonl").stat().st_mtime_ns))
    assert (
        folder(
            Source(
                SourceAttrs("s", "spatial"), files=["rows.jsonl"], root=tmp_path, format="sharegpt"
            )
        )
        == first
    )
    assert (first / "info.json").stat().st_mtime_ns == stamp
    assert folder(make(pinned=True)) != first
    content = build_index(make(), tmp_path / "index").content_key
    os.utime(tmp_path / "rows.jsonl", ns=(0, 10**18))
    later = build_index(
        Source(SourceAttrs("s", "spatial"), files=["rows.jsonl"], root=tmp_path, format="sharegpt"),
        tmp_path / "index",
    )
    assert later.folder != first
    assert later.content_key == content


def test_full_verification_notices_what_size_time_and_ends_do_not(make, tmp_path):
    def first_answer(**options):
        return build_index(make_again(), tmp_path / "index", **options).column("answer_chars")[700]

    def make_again():
        return Source(
            SourceAttrs("s", "spatial"), files=["rows.jsonl"], root=tmp_path, format="sharegpt"
        )

    make([talk(f"{n:0200d}?", "abc") for n in range(1400)])
    path = tmp_path / "rows.jsonl"
    assert first_answer(verify_files=True) == 3
    stat, text = path.stat(), path.read_text().splitlines(keepends=True)
    text[700] = text[700].replace('"abc"', '"a"  ')
    path.write_text("".join(text))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size > 3 * 65_536
    assert first_answer() == 3
    assert first_answer(verify_files=True) == 1
    assert first_answer() == 1


def test_files_without_a_single_row_say_what_is_in_them(tmp_path):
    def fail(name, content, error, message):
        (tmp_path / name).write_bytes(content)
        source = Source(
            SourceAttrs("s", "spatial"), files=[name], root=tmp_path, cache_dir=tmp_path
        )
        with pytest.raises(error, match=message):
            build_index(source, tmp_path / "index")

    fail("a.jsonl", b"hello\n", DataError, r"source s: a\.jsonl:1 column 1: Expecting value")
    fail("b.jsonl", b'{"messages": [\n', DataError, r"source s: b\.jsonl:1 column 15")
    fail("c.jsonl", b'{"a": "caf\xe9"}\n', DataError, r"source s: c\.jsonl:1: UnicodeDecodeError")
    fail("d.jsonl", b"", DataError, r"d\.jsonl holds no rows")
    fail("e.jsonl", b"[1, 2]\n", ConfigError, r"source s, e\.jsonl: .* no JSON objects")
    fail("g.csv", b"a\ncaf\xe9\n", DataError, r"g\.csv is no CSV file in UTF-8")
    fail("f.parquet", b"\0" * 99, ConfigError, r"f\.parquet is not a readable parquet file")


def test_a_damaged_saved_dataset_and_a_damaged_table_are_named(make, tmp_path):
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"state\.json does not list data files"):
        Source(SourceAttrs("s", "spatial"), files=["saved"], root=tmp_path)
    source = make()
    (build_index(source, tmp_path / "index").folder / "info.json").write_text("{")
    with pytest.raises(DataError, match=r"info\.json is damaged .* Delete"):
        build_index(source, tmp_path / "index")


def test_an_index_folder_that_cannot_be_written_is_named(make, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write to .*file/index.*point data\.index_dir"):
        build_index(make(), tmp_path / "file" / "index")


def test_rejected_rows_are_listed_counted_and_bounded(make, tmp_path):
    rows = [talk(f"Q{i}?") for i in range(197)] + ["{oops", talk("Q?", ""), {"conversations": []}]
    source = make(rows)
    with pytest.raises(
        BudgetError,
        match=r"3 of 200 rows were rejected.*bad_json 1 \(first: s/rows#197, rows\.jsonl:198 column 2: "
        r".*empty_answer 1 \(first: s/rows#198, rows\.jsonl:199 has an empty answer",
    ):
        build_index(source, tmp_path / "index")
    index = build_index(source, tmp_path / "index", max_rejected_fraction=0.1)
    assert index.rejected() == {"bad_json": 1, "empty_answer": 1, "no_answer": 1}
    assert index.eligible().sum() == 197
    events = [
        json.loads(line) for line in (index.folder / "rejected.jsonl").read_text().splitlines()
    ]
    assert [e["row"] for e in events] == [197, 198, 199]
    assert "rows.jsonl:198 column 2" in events[0]["message"]
    with pytest.raises(DataError):
        index.sample(197)


def test_a_source_without_a_good_row_is_an_error(make, tmp_path):
    with pytest.raises(DataError, match="every row was rejected: no_answer 2"):
        build_index(make([{"conversations": []}] * 2), tmp_path / "index", max_rejected_fraction=1)
    with pytest.raises(DataError, match="has no rows"):
        build_index(make([], "empty.jsonl"), tmp_path / "index")


def test_excluded_rows_are_no_defect(make, tmp_path):
    rows = [talk("<image>?", image="procthor/1.jpg"), talk("<image>?", image="real/1.jpg")]
    index = build_index(make(rows, exclude_prefixes=("procthor",)), tmp_path / "index")
    assert index.rejected() == {"excluded": 1}
    assert index.eligible().tolist() == [False, True]
    samples = [sample for _, found in make(rows).scan(0) for sample in found]
    (tmp_path / "c.jsonl").write_text(
        "".join(json.dumps(sample_to_json(s)) + "\n" for s in samples)
    )
    attrs = SourceAttrs("c", "spatial", exclude_prefixes=("procthor",))
    canonical = Source(attrs, files=["c.jsonl"], root=tmp_path)
    assert build_index(canonical, tmp_path / "index").rejected() == {"excluded": 1}


def check(text):
    if "scene" not in text:
        return None
    return ("evaluation",) if "scene1" in text else ()


def test_blocked_scenes_are_found_in_fields_and_paths(make, tmp_path):
    rows = [
        *ROWS,
        talk("<image>?", image="scans/scene1/3.jpg"),
        talk("<image>?", image="scene2.jpg"),
    ]
    index = build_index(make(rows), tmp_path / "index", check=check, check_key="v1")
    blocked = (index.column("flags") & FLAG_BLOCKED) > 0
    assert blocked.tolist() == [False] * 6 + [True, True, False]
    unknown = (index.column("flags") & FLAG_NO_ID) > 0
    assert unknown.tolist() == [True, True, True, True, False, True, False, False, False]
    assert index.info["blocked"] == {"evaluation": 2}
    assert index.info["blocked_first"] == {"evaluation": ["s/rows#5.1", "s/rows#6"]}
    assert index.eligible(drop_blocked=True).sum() == 7
    other = build_index(index.source, tmp_path / "index", check=lambda text: (), check_key="v2")
    assert other.folder != index.folder
    assert not other.info["blocked"]


def test_blocked_scenes_are_found_wherever_a_row_names_them(make, tmp_path):
    """Ids given as numbers, frames below a folder of several scenes, and the names of embedded media."""
    picture = {"bytes": b"picture"}
    rows = [
        talk("<image>?", images=[picture | {"path": "scans/scene1/3.jpg"}], meta_info="[]"),
        talk("<image>?", images=[picture | {"path": "scans/scene2/3.jpg"}], meta_info="[]"),
        talk("<image>?", images=[picture | {"path": None}], meta_info="[]"),
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "cells.parquet")
    source = Source(
        SourceAttrs("cells", "spatial"), files=["cells.parquet"], root=tmp_path, cache_dir=tmp_path
    )
    flags = build_index(source, tmp_path / "index", check=check, check_key="1").column("flags")
    assert ((flags & FLAG_BLOCKED) > 0).tolist() == [True, False, False]
    assert ((flags & FLAG_NO_ID) > 0).tolist() == [False, False, True]

    def number(text):
        return ("evaluation",) if text == "47334096" else None

    frames = [["x/scene2/1.jpg", "x/scene1/1.jpg"], ["x/scene2/1.jpg", "x/scene2/2.jpg"]]
    source = make([talk("<video>?", video=names) for names in frames], "frames.jsonl")
    flags = build_index(source, tmp_path / "index", check=check, check_key="1").column("flags")
    assert ((flags & FLAG_BLOCKED) > 0).tolist() == [True, False]
    for key in ("scene_id", "scene_name", "room_id", "video_id"):
        source = make([talk("<image>?", image="a.jpg", **{key: 47334096})], f"{key}.jsonl")
        index = build_index(source, tmp_path / "index", check=number, check_key="2")
        assert index.info["blocked"] == {"evaluation": 1}, key


def test_prefixes_are_found_in_the_names_of_embedded_media(tmp_path):
    cells = [[{"bytes": b"picture", "path": f"{kind}/1.jpg"}] for kind in ("procthor", "real")]
    rows = [talk("<image>?", images=images, meta_info="[]") for images in cells]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "cells.parquet")
    attrs = SourceAttrs("cells", "spatial", exclude_prefixes=("procthor",))
    source = Source(attrs, files=["cells.parquet"], root=tmp_path, cache_dir=tmp_path)
    assert build_index(source, tmp_path / "index").eligible().tolist() == [False, True]


def test_two_processes_build_the_same_table(make, tmp_path, monkeypatch):
    monkeypatch.setattr("spatialvlm.data.index_build._PARALLEL_BYTES", 1)
    rows = [talk(f"<image> {i}?", image=f"{i % 9}.jpg", type=f"t{i % 4}") for i in range(500)] + [
        "{"
    ]
    source = make(rows)
    one = build_index(source, tmp_path / "one")
    two = build_index(source, tmp_path / "two", workers=2)
    for name in ("offset", "row", "prefix_key", "capability", "reason", "length"):
        assert np.array_equal(one.column(name), two.column(name)), name
    assert one.info == two.info
    assert (one.folder / "rejected.jsonl").read_text() == (
        two.folder / "rejected.jsonl"
    ).read_text()


def test_a_changed_file_is_noticed(make, tmp_path):
    index = build_index(make(), tmp_path / "index")
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(DataError, match=r"s/rows#0: .*bytes and had"):
        index.sample(0)
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(DataError, match=r"s/rows#0: .*has 0 bytes and had"):
        index.sample(0)


def test_a_failed_build_leaves_nothing_behind(make, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("spatialvlm.data.index_build._merge", full)
    with pytest.raises(DataError, match="No space left"):
        build_index(make(), tmp_path / "index")
    assert [p.suffix for p in (tmp_path / "index").iterdir()] == [".lock"]


def test_row_groups_of_parquet(tmp_path):
    table = pa.Table.from_pylist([talk(f"{n}?") for n in range(10)])
    for name in ("a", "b"):
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=4)
    attrs, files = SourceAttrs("s", "spatial"), ["a.parquet", "b.parquet"]
    by_group = Source(attrs, files=files, root=tmp_path, access="row_group")
    groups = build_index(by_group, tmp_path / "index").row_groups()
    assert len(groups) == 20
    sizes = [len(list(same)) for _, same in itertools.groupby(groups.tolist())]
    assert sizes == [4, 4, 2, 4, 4, 2]
    converted = Source(attrs, files=files, root=tmp_path, cache_dir=tmp_path / "index")
    assert build_index(converted, tmp_path / "index").row_groups() is None


def test_blocked_scenes_are_found_by_the_shipped_patterns(make, tmp_path):
    lists = [BlockList("planted", frozenset({"scannet/scene0251_00", "arkitscenes/47334096"}))]
    blacklist = Blacklist(lists)

    def check(text):
        return tuple(hit.list_name for hit in blacklist.hits(text)) if find_ids(text) else None

    paths = [
        "scannet/scene0251_00/1.jpg",  # planted
        "scannet/scene0251_01/1.jpg",  # another scan of the room
        "renamed/my_copy_of_scene0251_00.mp4/1.jpg",  # renamed folder
        "vlm3r_arkit_47334096/frame_00003.jpg",
        "g2vlm_arkit_47333851/1.jpg",  # not on the list
        "holiday/1.jpg",  # unknown source
    ]
    rows = [talk("<image>?", image=path) for path in paths]
    index = build_index(make(rows), tmp_path / "index", check=check, check_key="planted")
    flags = index.column("flags")
    assert ((flags & FLAG_BLOCKED) > 0).tolist() == [True, True, True, True, False, False]
    assert ((flags & FLAG_NO_ID) > 0).tolist() == [False] * 5 + [True]
    assert index.info["no_known_id"] == 1


def test_hashes_are_whole_or_not_there(make, tmp_path, monkeypatch):
    write_text = Path.write_text

    def half(self, text, **options):
        if not self.name.startswith("hashes"):
            return write_text(self, text, **options)
        write_text(self, text[:5])
        raise OSError("no space left on device")

    source = make([talk("Is it?", "Yes")])
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", half)
        with pytest.raises(OSError, match="no space"):
            build_index(source, tmp_path / "index", verify_files=True)
    assert len(build_index(source, tmp_path / "index", verify_files=True)) == 1
