"""Generated rows are read by our own loader; hooks realise marks and formats there."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from spatialvlm.data.formats import SourceAttrs
from spatialvlm.data.sources import Source
from spatialvlm.errors import DataError
from spatialvlm.scenes.io import load_scene, save_scene
from spatialvlm.synthesis.engine import synthesize
from spatialvlm.synthesis.export import export_rows
from spatialvlm.synthesis.formats import FormatExpander
from spatialvlm.synthesis.marks import draw_marks
from spatialvlm.synthesis.plan import make_plan

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def made(tmp_path_factory, data_dir):
    folder = tmp_path_factory.mktemp("made")
    room = load_scene(data_dir / "scenes" / "hand_room.json")
    frames = [replace(f, rgb=f"rgb/{f.frame_id}.jpg") for f in room.frames]
    save_scene(replace(room, scene_id="rooms/hand", frames=frames), folder / "scenes" / "hand")
    (folder / "scenes" / "hand" / "rgb").mkdir()
    for frame in frames:
        Image.new("RGB", (640, 480), (90, 120, 150)).save(folder / "scenes" / "hand" / frame.rgb)
    synthesize(folder / "scenes", folder / "rows", make_plan("all", per_task=6), executor="serial")
    return folder


def read(folder, files, base, **more):
    source = Source(
        SourceAttrs("rows", "spatial", base=base),
        files=files,
        root=folder,
        cache_dir=folder / "cache",
        **more,
    )
    samples = []
    for number in range(len(source.files)):
        for _, found in source.scan(number):
            assert not isinstance(found, DataError), found
            samples += found
    return source, samples


def test_every_row_becomes_a_sample_and_every_format_can_be_shown(made):
    files = [f"rows/{p.name}" for p in sorted((made / "rows").glob("*.parquet"))]
    source, samples = read(made, files, "scenes")
    assert source.format.name == "spatialvlm_rows"
    assert len(samples) > 150
    assert {len(s.media) for s in samples} >= {1, 2}
    expand = FormatExpander()
    shown = 0
    for sample in samples:
        assert sample.frames_pinned
        assert sample.turns[-1].role == "assistant"
        for epoch in range(3):
            other = expand(sample, epoch)
            shown += other.turns != sample.turns
            for mark in other.marks:
                media = sample.media[mark.image] if sample.media[0].kind == "image" else None
                with Image.open(made / media.path) as image:
                    draw_marks(image.resize((160, 120)), [mark], stored_size=(640, 480))
    assert shown > 50


@pytest.mark.parametrize("kind", ["sharegpt", "messages"])
def test_exports_are_read_back(made, kind):
    export_rows(made / "rows", made / "scenes", made / "scenes", kind, render_marks=True)
    _, samples = read(made, ["scenes/rows.jsonl"], "scenes")
    _, rows = read(
        made, [f"rows/{p.name}" for p in sorted((made / "rows").glob("*.parquet"))], "scenes"
    )
    assert len(samples) == len(rows)
    for sample, row in zip(samples, rows, strict=True):
        assert [t.text.strip() for t in sample.turns] == [t.text.strip() for t in row.turns]
        assert len(sample.media) == len(row.media)


def test_general_rows_are_read_and_splits_differ(tmp_path):
    for split in ("train", "test"):
        command = [
            sys.executable,
            str(ROOT / "tools" / "make_general.py"),
            "--out",
            str(tmp_path),
            "--num",
            "120",
            "--split",
            split,
            "--size",
            "64",
        ]
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        assert done.returncode == 0, done.stderr
    texts = {}
    for split in ("train", "test"):
        _, samples = read(tmp_path, [f"{split}.jsonl"], ".")
        assert len(samples) == 120
        assert {len(s.media) for s in samples} == {0, 1}
        for sample in samples:
            for media in sample.media:
                assert (tmp_path / media.path).is_file()
        texts[split] = {s.turns[-1].text for s in samples if "word" in s.turns[0].text}
    assert texts["train"].isdisjoint(texts["test"])
