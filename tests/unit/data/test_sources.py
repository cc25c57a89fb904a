"""Containers and sources: every kind of file gives the same rows by scan and by random access."""

import io
import json
import pickle
import tarfile
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spatialvlm.data.arrow_rows import ArrowRows
from spatialvlm.data.containers import JsonArray, JsonLines
from spatialvlm.data.formats import SourceAttrs
from spatialvlm.data.sample import MediaRef
from spatialvlm.data.sources import Source, check_sources
from spatialvlm.data.tar_rows import TarRows
from spatialvlm.errors import ConfigError, DataError, MediaError


def talk(number, **fields):
    return {
        "id": number,
        "conversations": [
            {"from": "human", "value": f'Wie spät? {number} " [ {{ \\ ]'},
            {"from": "gpt", "value": "Acht."},
        ],
    } | fields


def values(container):
    scanned = list(container.scan())
    for raw in scanned:
        assert container.read(raw.row, raw.offset, raw.length) == raw.value
    return [raw.value for raw in scanned]


ROWS = [talk(n) for n in range(20)]


def test_json_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps(row, ensure_ascii=n % 2 == 0) for n, row in enumerate(ROWS)]
    path.write_text("\ufeff" + "\n".join([*lines[:7], "", "  ", *lines[7:]]))
    container = JsonLines(path)
    assert values(container) == ROWS
    assert [raw.row for raw in container.scan()] == [*range(7), *range(9, 22)]


def test_json_lines_in_parts_are_the_whole(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    container = JsonLines(path)
    whole = list(container.scan())
    for parts in (1, 2, 3, 7, 40):
        ranges = container.ranges(parts)
        assert [raw for part in ranges for raw in container.scan(*part)] == whole


@pytest.mark.parametrize("indent", [None, 2])
def test_json_array(tmp_path, indent, monkeypatch):
    path = tmp_path / "a.json"
    rows = [*ROWS, [talk(20), talk(21)], talk(22, text="x" * 5000)]
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=False))
    assert values(JsonArray(path)) == rows
    monkeypatch.setattr("spatialvlm.data.containers._BLOCK", 37)
    assert values(JsonArray(path)) == rows


def test_broken_rows_name_file_line_and_column(tmp_path):
    lines = tmp_path / "a.jsonl"
    lines.write_bytes(b'{"a": 1}\n{"a": "say "no""}\n{"a": 2}\n["\xff"]\n')
    found = [raw.value for raw in JsonLines(lines).scan()]
    assert found[0] == {"a": 1}
    assert found[2] == {"a": 2}
    assert isinstance(found[1], DataError)
    assert found[1].reason == "bad_json"
    assert "a.jsonl:2 column 13" in str(found[1])
    assert 'say "no"' in str(found[1])
    assert found[3].reason == "bad_json"
    assert "a.jsonl:4: UnicodeDecodeError" in str(found[3])
    array = tmp_path / "a.json"
    array.write_text('[\n {"a": 1},\n {"a":\n  "{"bbox": [1, 2]}"},\n {"a": 2}\n]')
    found = [raw.value for raw in JsonArray(array).scan()]
    assert found[0] == {"a": 1}
    assert found[2] == {"a": 2}
    assert "a.json:4 column" in str(found[1])


def test_a_cut_array_is_an_error_not_a_short_set(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[\n{"a": 1},\n{"a": "2')
    with pytest.raises(DataError, match=r"ends inside the row at line [23]"):
        list(JsonArray(path).scan())


def test_text_after_an_array_is_an_error_not_a_silent_end(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1},\n{"a": 2}]\n[{"a": 3}]')
    with pytest.raises(DataError, match=r"goes on after its array, near line 2.*\[\{"):
        list(JsonArray(path).scan())
    path.write_text("")
    with pytest.raises(DataError, match="ends inside the row at line 1"):
        list(JsonArray(path).scan())


def embedded():
    return pa.table(
        {
            "conversations": [row["conversations"] for row in ROWS],
            "image": [
                {"bytes": b"img%d" % n, "path": f"{n}.png"} if n % 3 else None for n in range(20)
            ],
            "images": [
                [{"bytes": b"a", "path": "a.png"}, {"bytes": b"b%d" % n, "path": ""}][: n % 3]
                for n in range(20)
            ],
            "raw": [b"r" if n else None for n in range(20)],
        }
    )


@pytest.mark.parametrize("kind", ["parquet", "arrow", "stream"])
def test_arrow_rows_hide_bytes_and_give_them_on_request(tmp_path, kind):
    path = tmp_path / f"a.{'parquet' if kind == 'parquet' else 'arrow'}"
    if kind == "parquet":
        pq.write_table(embedded(), path, row_group_size=6)
    else:
        new = pa.ipc.new_file if kind == "arrow" else pa.ipc.new_stream
        with pa.OSFile(str(path), "wb") as sink, new(sink, embedded().schema) as out:
            out.write_table(embedded(), max_chunksize=6)
    container = ArrowRows(path, groups_open=2)
    rows = values(container)
    assert len(container) == 20
    assert rows[4]["image"] == {"bytes": True, "path": "4.png"}
    assert rows[3]["image"] is None
    assert rows[5]["images"] == [{"bytes": True, "path": "a.png"}, {"bytes": True, "path": ""}]
    assert rows[6]["images"] == []
    assert (rows[0]["raw"], rows[1]["raw"]) == (False, True)
    assert container._cell("5/images/1") == b"b5"
    assert container._cell("19/image/-1") == b"img19"
    assert container._cell("1/raw/-1") == b"r"
    with pytest.raises(MediaError, match="cell 3/image/-1 holds no bytes"):
        container._cell("3/image/-1")
    for member in (
        "99/image/-1",
        "-1/image/-1",
        "5/image/0",
        "5/raw/0",
        "5/other/0",
        "5/images/7",
        "5/images",
        "x/y/z",
    ):
        with pytest.raises(MediaError, match="has no cell") as caught:
            container._cell(member)
        assert caught.value.reason == "bad_cell"


def test_cells_of_other_files_are_media_errors(tmp_path):
    for name in ("a.txt", "b.arrow", "c.jsonl"):
        (tmp_path / name).write_text("no")
    mine = Source(SourceAttrs("s", "x"), files=["c.jsonl"], root=tmp_path, format="canonical")
    refs = {
        name: MediaRef("image", "cell", name, "0/image/-1")
        for name in ("a.txt", "b.arrow", "c.jsonl")
    }
    for ref in refs.values():
        with pytest.raises(MediaError) as caught:
            mine.media_bytes(ref)
        assert caught.value.reason == "bad_cell"
    with pytest.raises(MediaError, match="not below"):
        mine.media_bytes(MediaRef("image", "tar", "gone.tar", "x"))
    with pytest.raises(MediaError, match="outside"):
        mine.media_bytes(MediaRef("image", "tar", "../gone.tar", "x"))


def test_row_groups_are_read_once_per_neighbourhood(tmp_path):
    pq.write_table(embedded(), tmp_path / "a.parquet", row_group_size=5)
    container = ArrowRows(tmp_path / "a.parquet", groups_open=2)
    for row in (0, 1, 7, 2, 8):
        container.read(row, row, 0)
    assert container.rows_decoded == 10
    container.read(12, 12, 0)
    container.read(0, 0, 0)
    assert container.rows_decoded == 20
    assert container.read_amplification == 20 / 7
    assert container.group_starts == (0, 5, 10, 15, 20)


def test_few_files_of_row_groups_stay_open(tmp_path):
    for n in range(7):
        pq.write_table(embedded(), tmp_path / f"{n}.parquet", row_group_size=5)
    mine = source(tmp_path, "*.parquet", access="row_group", format="sharegpt")
    first = mine.container(0)
    for n in (1, 2, 0, 3, 4):
        mine.container(n)
    assert list(mine._containers) == ["2.parquet", "0.parquet", "3.parquet", "4.parquet"]
    assert mine.container(0) is first


def test_much_read_amplification_is_logged_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("spatialvlm.data.arrow_rows._AMPLIFICATION_AFTER", 5)
    pq.write_table(embedded(), tmp_path / "a.parquet", row_group_size=10)
    container = ArrowRows(tmp_path / "a.parquet", groups_open=1)
    for n in range(20):
        container.read(n % 2 * 10, 0, 0)
    assert [r.getMessage() for r in caplog.records] == [
        f"{tmp_path / 'a.parquet'}: 8.0 rows are decoded for every row that is read; "
        "set access: arrow for this source"
    ]


def write_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_tar_shards(tmp_path, monkeypatch):
    path = tmp_path / "s.tar"
    question = [{"from": "human", "value": "<image><image>?"}, {"from": "gpt", "value": "x"}]
    clip = [{"from": "human", "value": "<video>?"}, {"from": "gpt", "value": "x"}]
    write_tar(
        path,
        [
            ("d/0.10.jpg", b"ten"),
            ("d/0.json", json.dumps({"conversations": question, "image": ["p", "q"]}).encode()),
            ("d/0.9.jpg", b"nine"),
            ("1.json", json.dumps({"conversations": clip, "video": "v"}).encode()),
            ("1.0.jpg", b"f0"),
            ("1.1.jpg", b"f1"),
            ("2.jpg", b"alone"),
            ("../3.json", b"{}"),
        ],
    )
    source = Source(SourceAttrs("t", "general"), files=["s.tar"], root=tmp_path, cache_dir=tmp_path)
    found = [samples for _, samples in source.scan(0)]
    monkeypatch.setattr(
        "spatialvlm.data.tar_rows._tar_members", None
    )  # the second time from the cache
    again = Source(SourceAttrs("t", "general"), files=["s.tar"], root=tmp_path, cache_dir=tmp_path)
    assert [s for _, s in again.scan(0)][:2] == found[:2]
    images = found[0][0].media
    assert [ref.member for ref in images] == ["d/0.9.jpg", "d/0.10.jpg"]
    assert [source.media_bytes(ref) for ref in images] == [[b"nine"], [b"ten"]]
    (video,) = found[1][0].media
    assert (video.kind, source.media_bytes(video)) == ("video", [b"f0", b"f1"])
    assert "has no 2.json" in str(found[2])
    assert found[3].reason == "refused_path"
    raw = next(source.container(0).scan())
    assert source.read(0, raw.row, raw.offset, raw.length) == found[0]


def test_compressed_tar_is_refused(tmp_path):
    write_tar(tmp_path / "s.tar", [("a.json", b"{}" * 4000)], "w:gz")
    with pytest.raises(ConfigError, match="not an uncompressed tar"):
        TarRows(tmp_path / "s.tar")


def source(tmp_path, *files, name="s", **options):
    return Source(SourceAttrs(name, "spatial"), files=files, root=tmp_path, **options)


def test_sources_read_the_same_row_again(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    (tmp_path / "b.json").write_text(json.dumps(ROWS))
    pq.write_table(embedded(), tmp_path / "c.parquet")
    for name, options in (("a.jsonl", {}), ("b.json", {}), ("c.parquet", {"access": "row_group"})):
        mine = pickle.loads(pickle.dumps(source(tmp_path, name, **options)))
        for raw, samples in mine.scan(0):
            if isinstance(samples, DataError):  # more media than markers
                assert samples.reason == "marker_count"
                continue
            assert mine.read(0, raw.row, raw.offset, raw.length) == samples
            assert samples[0].uid == f"s/{name[0]}#{raw.row}"


def test_parquet_is_converted_once(tmp_path):
    pq.write_table(embedded(), tmp_path / "c.parquet", row_group_size=7)
    mine = source(tmp_path, "c.parquet", cache_dir=tmp_path / "cache", format="sharegpt")
    assert len(list(mine.scan(0))) == 20
    (converted,) = (tmp_path / "cache" / "files").glob("*.arrow")
    before = converted.stat().st_mtime_ns
    again = source(tmp_path, "c.parquet", cache_dir=tmp_path / "cache", format="sharegpt")
    assert [s for _, s in again.scan(0)][1] == [s for _, s in mine.scan(0)][1]
    assert converted.stat().st_mtime_ns == before


def test_saved_hugging_face_datasets(tmp_path):
    folder = tmp_path / "saved"
    folder.mkdir()
    for n in range(2):
        with pa.OSFile(str(folder / f"data-{n}.arrow"), "wb") as sink:
            part = pa.Table.from_pylist(ROWS[10 * n : 10 * n + 10])
            with pa.ipc.new_stream(sink, part.schema) as out:
                out.write_table(part)
    files = [{"filename": f"data-{n}.arrow"} for n in range(2)]
    (folder / "state.json").write_text(json.dumps({"_data_files": files}))
    mine = source(tmp_path, "saved")
    assert mine.files == ("saved/data-0.arrow", "saved/data-1.arrow")
    assert [s[0].meta["id"] for n in range(2) for _, s in mine.scan(n)] == list(range(20))


def test_globs_and_equal_stems(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "rows.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    mine = source(tmp_path, "*/rows.jsonl")
    assert mine.stems == ("x/rows", "y/rows")


def test_wrong_files_are_named(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(ConfigError, match=r"no file 'b\.jsonl'"):
        source(tmp_path, "b.jsonl")
    with pytest.raises(ConfigError, match=r"a\.jsonl is listed twice"):
        source(tmp_path, "a.jsonl", "a.jsonl")
    monkeypatch.setattr("spatialvlm.data.sources.MAX_FILES", 1)
    with pytest.raises(ConfigError, match="2 files, more than 1"):
        source(tmp_path, "a.*")
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="known kind"):
        source(tmp_path, "a.txt", format="sharegpt").container(0)
    with pytest.raises(ConfigError, match="unknown format 'share'"):
        source(tmp_path, "a.jsonl", format="share")
    with pytest.raises(ConfigError, match=r"without state\.json"):
        source(tmp_path.parent, tmp_path.name)
    with pytest.raises(ConfigError, match="both 'p' and 'q'"):
        check_sources([source(tmp_path, "a.jsonl", name=n) for n in "pq"])
    with pytest.raises(ConfigError, match="two sources are named"):
        check_sources([source(tmp_path, "a.jsonl"), source(tmp_path, "a.jsonl")])
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ConfigError, match=r"bad\.parquet is not a readable"):
        source(tmp_path, "bad.parquet", access="row_group").container(0)


def test_hub_roots_are_fetched_once_and_found_offline(tmp_path, monkeypatch):
    asked = []

    class Api:
        def dataset_info(self, name, revision):
            return SimpleNamespace(sha="c0ffee")

    def download(name, **options):
        asked.append((name, options["revision"], options["allow_patterns"]))
        options["local_dir"].mkdir(parents=True)
        (options["local_dir"] / "a.jsonl").write_text(json.dumps(ROWS[0]) + "\n")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    attrs = SourceAttrs("s", "spatial")
    root = "hf://datasets/owner/set@v1"
    first = Source(attrs, files=["a.jsonl"], root=root, cache_dir=tmp_path)
    assert first.revision == "c0ffee"
    assert asked == [("owner/set", "c0ffee", ["a.jsonl"])]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    again = Source(attrs, files=["a.jsonl"], root=root, cache_dir=tmp_path)
    assert (again.root, again.revision) == (tmp_path / "hub/owner--set/c0ffee", "c0ffee")
    assert len(list(again.scan(0))) == len(asked) == 1
    with pytest.raises(ConfigError, match="never fetched"):
        Source(attrs, files=["a.jsonl"], root="hf://datasets/owner/other", cache_dir=tmp_path)
    with pytest.raises(ConfigError, match="is no address"):
        Source(attrs, files=["a.jsonl"], root="hf://owner/set", cache_dir=tmp_path)
