"""Readers on random and on mutated rows: a sample or a documented reason, never a crash."""

import contextlib
import copy
import io
import json
import random
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spatialvlm.data.faults import INDEX_REASONS
from spatialvlm.data.formats import FORMATS, Place, SourceAttrs, read_row, sample_to_json
from spatialvlm.data.formats.base import media_path
from spatialvlm.data.index import media_and_prefix_key
from spatialvlm.data.media.paths import resolve
from spatialvlm.data.sample import scene_names
from spatialvlm.data.sources import Source
from spatialvlm.errors import ConfigError, DataError, MediaError
from tests.unit.data.test_formats import CASES, generated, talk

ATTRS = SourceAttrs(
    "s", "spatial", media_template="scans/{scene_id}", normalize_marker="front",
    fixes=("python_literal_json",), exclude_prefixes=("procthor",),
)  # fmt: skip
READABLE = [name for name in FORMATS if name != "referring"]


def check(row, name):
    """Read a row; what comes out must be consistent."""
    place = Place("d/r.jsonl", "r", 3)
    try:
        samples = read_row(row, FORMATS[name], ATTRS, place)
    except DataError as error:
        assert error.reason in INDEX_REASONS  # noqa: PT017
        assert "d/r.jsonl:4" in str(error)  # noqa: PT017
        return
    for sample in samples:
        used = [part for turn in sample.turns for part in turn.parts if not isinstance(part, str)]
        assert used == list(range(len(sample.media)))
        assert sample.turns[-1].role == "assistant"
        assert all(t.text.strip() for t in sample.turns if t.role == "assistant")
        media_and_prefix_key(sample)
        assert all(isinstance(name, str) for name in scene_names(sample))
        "".join([t.text for t in sample.turns] + [m.path for m in sample.media]).encode()
        if json.loads(json.dumps(row)) == row:
            assert json.loads(json.dumps(sample_to_json(sample)))


KEYS = sorted(
    [
        "conversations",
        "messages",
        "from",
        "value",
        "role",
        "content",
        "image",
        "images",
        "video",
        "videos",
        "system",
        "type",
        "text",
        "image_url",
        "url",
        "path",
        "bytes",
        "tar",
        "media_kind",
        "gen_version",
        "marks",
        "formats_ok",
        "frames_pinned",
        "difficulty",
        "margin",
        "answers",
        "scene_id",
        "question",
        "situation",
        "uid",
        "turns",
        "parts",
        "media",
        "kind",
        "store",
        "member",
        "frames",
        "clip_s",
        "spar_info",
        "red_point",
        "point_img_idx",
        "bbox_list",
        "video_start",
        "video_end",
        "capability",
        "weight",
        "meta",
        "train",
        "media_names",
        "scene_name",
        "video_id",
    ]
)
WORDS = [
    *KEYS,
    "human",
    "gpt",
    "user",
    "assistant",
    "<image>",
    "<video> x",
    "a.jpg",
    "b.mp4",
    "[1, 2]",
    "",
    "\ud800",
]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**30) | st.floats() | st.sampled_from(WORDS) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
QUICK = settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize("name", READABLE)
def test_random_rows(name):
    @QUICK
    @given(VALUES)
    def run(row):
        check(row, name)

    run()


def seeds(data_dir):
    """One good row of every format."""
    for name, (fmt, _, _) in CASES.items():
        source = Source(ATTRS, files=[name], root=data_dir / "formats")
        for raw in source.container(0).scan():
            yield fmt, raw.value
            (sample, *_) = read_row(
                raw.value, FORMATS[fmt], SourceAttrs("s", "f", media_template="{scene_id}")
            )
            yield "canonical", json.loads(json.dumps(sample_to_json(sample)))
    yield "spatialvlm_rows", generated()
    cells = [{"bytes": True, "path": "a.png"}, {"bytes": None, "path": "b.png"}]
    yield "embedded", talk(("u", "<image><image>"), ("a", "!"), images=cells, meta_info="[]")
    yield "llava_onevision", talk(("u", "<image>"), ("a", "!"), image=cells[0])
    yield (
        "sqa3d",
        {"situation": "x", "question": "y", "answers": [{"answer": "z"}], "scene_id": "s"},
    )


def places(value, path=()):
    """Paths of everything inside a row."""
    yield path
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, inner in items:
        yield from places(inner, (*path, key))


JUNK = [
    None,
    True,
    0,
    -1,
    1e308,
    float("nan"),
    "",
    "<image>",
    "<video>",
    "x" * 500,
    [],
    {},
    [[]],
    [None],
    {"a": 1},
    "\x00",
    "../../x",
]


def mutate(row, rng):
    row = copy.deepcopy(row)
    for _ in range(rng.randint(1, 3)):
        path = rng.choice(list(places(row)))
        if not path:
            continue
        parent = row
        for key in path[:-1]:
            parent = parent[key]
        action = rng.randrange(3)
        if action == 0:
            del parent[path[-1]]
        elif action == 1 and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[path[-1]]))
        else:
            parent[path[-1]] = copy.deepcopy(rng.choice(JUNK))
    return row


def test_mutated_rows(data_dir):
    rng = random.Random(0)
    rows = list(seeds(data_dir))
    assert {fmt for fmt, _ in rows} == set(READABLE)
    for fmt, row in rows:
        check(row, fmt)
        for _ in range(200):
            check(mutate(row, rng), fmt)


def test_mutated_files_are_read_to_the_end_or_refused(data_dir, tmp_path):
    rng = random.Random(1)
    for name in ("messages.jsonl", "qwen_finetune.json"):
        good = (data_dir / "formats" / name).read_bytes()
        for case in range(150):
            data = bytearray(good)
            for _ in range(rng.randint(1, 4)):
                at = rng.randrange(len(data))
                data[at : at + rng.randint(0, 2)] = rng.choice(
                    [b"", b'"', b"\\", b"{", b"]", b"\n", b"\xff"]
                )
            path = tmp_path / f"{case}{name}"
            path.write_bytes(data)
            source = Source(ATTRS, files=[path.name], root=tmp_path, format=CASES[name][0])
            try:
                found = list(source.scan(0))
            except DataError as error:
                assert path.name in str(error)  # noqa: PT017
                assert error.reason == "bad_json"  # noqa: PT017
                continue
            for raw, samples in found:
                if isinstance(samples, DataError):
                    assert samples.reason in INDEX_REASONS
                    assert path.name in str(samples)
                else:
                    assert source.read(0, raw.row, raw.offset, raw.length) == samples


def write_shards(folder):
    """The same rows with embedded pictures as parquet, Arrow and tar; returns their number."""
    picture = b"\xff\xd8 picture"
    rows = [
        talk(("u", f"<image>{n}?"), ("a", "!"), images=[{"bytes": picture, "path": "a.jpg"}], meta_info="[]")
        for n in range(20)
    ]  # fmt: skip
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, folder / "good.parquet", row_group_size=5)
    with (
        pa.OSFile(str(folder / "good.arrow"), "wb") as file,
        pa.ipc.new_file(file, table.schema) as out,
    ):
        out.write_table(table, max_chunksize=7)
    with tarfile.open(folder / "good.tar", "w") as tar:
        for n, row in enumerate(rows):
            text = json.dumps({"conversations": row["conversations"]}).encode()
            for name, data in ((f"{n}.json", text), (f"{n}.jpg", picture)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return len(rows)


@pytest.mark.parametrize(
    ("kind", "access"),
    [("parquet", "row_group"), ("parquet", "arrow"), ("arrow", "arrow"), ("tar", "arrow")],
)
def test_mutated_shards_are_read_whole_or_refused(kind, access, tmp_path):
    rng, outcomes = random.Random(2), set()
    expected = write_shards(tmp_path)
    good = (tmp_path / f"good.{kind}").read_bytes()
    for case in range(60):
        data = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(data))
            if rng.random() < 0.7:
                data[at] = rng.randrange(256)
            elif rng.random() < 0.5:
                del data[at : at + rng.randint(1, 30)]
            else:
                data = data[: max(1, at)]
        path = tmp_path / f"{access}{case}.{kind}"
        path.write_bytes(data)
        source = Source(
            ATTRS, files=[path.name], root=tmp_path, access=access, cache_dir=tmp_path / "cache",
            format="sharegpt" if kind == "tar" else "embedded",
        )  # fmt: skip
        try:
            found = list(source.scan(0))
            assert len(found) == expected
            for _, samples in found:
                if not isinstance(samples, DataError):
                    for ref in samples[0].media:
                        with contextlib.suppress(MediaError):
                            source.media_bytes(ref)
            outcomes.add("read")
        except (DataError, ConfigError) as error:
            assert path.stem in str(error)  # noqa: PT017
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_no_path_escapes_its_root(tmp_path):
    root = tmp_path / "root"
    (root / "in").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    (root / "to_out").symlink_to(tmp_path / "out")
    (root / "in" / "to_in").symlink_to(root / "in")
    (root / "loop").symlink_to(root / "loop")
    parts = [
        "..",
        ".",
        "",
        "in",
        "to_out",
        "to_in",
        "loop",
        "a.png",
        "~",
        "C:",
        "\\x",
        "\x00",
        "é",
        str(tmp_path),
    ]

    @QUICK
    @given(
        st.lists(st.sampled_from(parts), max_size=7),
        st.sampled_from(["", ".", "in", "to_in", "../root"]),
    )
    def run(names, base):
        try:
            found = resolve(root, base, media_path(".", "/".join(names)))
        except MediaError as error:
            assert error.reason == "refused_path"  # noqa: PT017
            return
        assert found.is_relative_to(root)

    run()
