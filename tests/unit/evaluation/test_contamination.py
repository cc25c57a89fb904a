"""Planted leaks at every level, legitimate repeats, unknown sources, exit codes."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spatialvlm.evaluation import contamination as co

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def tool():
    return runpy.run_path(str(ROOT / "tools" / "decontaminate.py"))["main"]


def vsi_scans():
    from spatialvlm.scenes.blacklist import shipped_lists

    ids = sorted(scene for block in shipped_lists() for scene in block.scene_ids)
    return [i.partition("/")[2] for i in ids if i.startswith("scannet/")]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chat(text):
    return [{"role": "user", "content": text}, {"role": "assistant", "content": "x"}]


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A benchmark with pictures, and training rows that touch it in every way."""
    folder = tmp_path_factory.mktemp("leaks")
    rng = np.random.default_rng(0)

    def picture(path, seed):
        small = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
        image = Image.fromarray(small).resize((96, 96), Image.Resampling.BICUBIC)
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=95) if path.suffix == ".jpg" else image.save(path)
        return image

    bench_image = picture(folder / "bench" / "imgs" / "q1.png", 1)
    question = (
        "Standing by the sofa and facing the table, is the lamp to my left or to my right side?"
    )
    bench = write(
        folder / "bench.jsonl",
        [
            {"id": "1", "image": "imgs/q1.png", "scene_id": "scene0706_00", "question": question},
            {
                "id": "2",
                "image": "imgs/q2.png",
                "scene_id": "scene0706_00",
                "question": "How many chairs?",
            },
        ],
    )
    train = folder / "train"
    (train / "other").mkdir(parents=True)
    (train / "other" / "copy.png").write_bytes((folder / "bench" / "imgs" / "q1.png").read_bytes())
    bench_image.resize((90, 90)).save(train / "other" / "again.jpg", quality=60)
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(
        train / "other" / "noise.png"
    )
    rows = {
        "scan": {"video": f"scannet/{vsi_scans()[0]}.mp4", "messages": chat("A?")},
        "sibling": {"video": f"scannet_{vsi_scans()[0][:-2]}77/x.mp4", "messages": chat("A?")},
        "windows": {
            "image": f"D:\\data\\scans\\{vsi_scans()[1]}\\color\\1.jpg",
            "messages": chat("A?"),
        },
        "copy": {"source": "web", "image": "other/copy.png", "messages": chat("A?")},
        "again": {"source": "web", "image": "other/again.jpg", "messages": chat("A?")},
        "template": {
            "source": "web",
            "image": "other/noise.png",
            "messages": chat(f"<image>\n{question}"),
        },
        "same": {"scene_id": "scene0706_01", "messages": chat(question)},
        "path": {"source": "web", "image": "deep/imgs/q2.png", "messages": chat("A?")},
        "unknown": {"image": "x.png", "messages": chat("Q about scene0706_00 in words only")},
        "fine": {"scene_id": "scene0001_00", "messages": chat("A?")},
    }
    path = write(folder / "train.jsonl", [{"id": name, **row} for name, row in rows.items()])
    return folder, path, bench


def levels(folder, path, bench):
    benches = [
        co.benchmark_keys("vsi"),
        co.benchmark_keys(f"mine={bench}", root=folder / "bench", media=True),
    ]
    found = {}
    for _, row in co.stream_records(path):
        verdict = co.check_record(row, benches, root=folder / "train", media=True)
        found[row["id"]] = (
            sorted({(m.benchmark, m.level) for m in verdict.matches}),
            verdict.known,
        )
    return found


def test_every_level_is_found(planted):
    found = levels(*planted)
    assert found["scan"][0] == [("vsi", "scene")]
    assert found["sibling"][0] == [("vsi", "room")]
    assert found["windows"][0] == [("vsi", "scene")]
    assert found["copy"][0] == [("mine", "media_sha256"), ("mine", "media_similar")]
    assert found["again"][0] == [("mine", "media_similar")]
    assert found["template"][0] == [("mine", "text")]  # reported, no hit
    assert ("mine", "room") in found["same"][0]
    assert ("mine", "text_same_scene") in found["same"][0]
    assert found["path"][0] == [("mine", "image")]
    assert found["fine"] == ([], True)
    assert found["unknown"] == ([], False)


def test_command_line(tool, planted, tmp_path, capsys):
    folder, path, bench = planted
    base = ["--train", str(path), "--bench", "vsi", f"mine={bench}", "--out", str(tmp_path / "out")]
    media = [
        "--media",
        "--train-root",
        str(folder / "train"),
        "--bench-root",
        str(folder / "bench"),
    ]
    assert tool([*base, *media]) == 0
    assert (
        "10 records: 7 with hits, 1 of unknown source, 1 repeated questions"
        in capsys.readouterr().out
    )
    assert tool([*base, *media, "--fail-on-hit", "--drop"]) == 2
    clean = [
        json.loads(line)["id"]
        for line in (tmp_path / "out" / "train.clean.jsonl").read_text().splitlines()
    ]
    assert clean == ["template", "unknown", "fine"]
    removed = [
        json.loads(line) for line in (tmp_path / "out" / "removed.jsonl").read_text().splitlines()
    ]
    assert len(removed) == 7
    assert all(entry["reasons"] for entry in removed)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["hits"]["vsi"] == {"room": 1, "scene": 2}
    assert summary["benchmarks"]["vsi"] == 288
    header = (tmp_path / "out" / "hits.csv").read_text().splitlines()[0]
    assert header == "train_file,line,id,benchmark,level,key"


def test_pictures_of_other_scenes_are_no_hits(tmp_path):
    """Frames of every scan have the same names; only a path without a scene is known by its end."""
    bench = write(
        tmp_path / "bench.jsonl",
        [{"id": "1", "image": "val/scene0706_00/color/0.jpg"}, {"id": "2", "image": "web/7.jpg"}],
    )
    keys = [co.benchmark_keys(f"mine={bench}")]

    def levels_of(path):
        return [match.level for match in co.check_record({"image": path}, keys).matches]

    assert levels_of("train/scene0001_00/color/0.jpg") == []
    assert levels_of("train/scene0706_00/color/5.jpg") == ["scene"]
    assert levels_of("other/web/7.jpg") == ["image"]


def test_media_that_were_not_compared_are_counted(tool, planted, tmp_path, capsys):
    """With a wrong root every comparison is skipped; that must not look like a clean result."""
    folder, path, bench = planted
    out = tmp_path / "out"
    base = ["--train", str(path), "--bench", f"mine={bench}", "--out", str(out), "--media"]
    assert tool([*base, "--train-root", str(tmp_path), "--bench-root", str(folder / "bench")]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["media_missing"] == {"train": 8, "mine": 1}
    message = capsys.readouterr().err
    assert f"8 media files were not compared, they are not under --train-root {tmp_path}" in message
    assert "e.g. imgs/q2.png" in message


def test_clean_copies_of_one_name_do_not_replace_each_other(tool, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "train.jsonl", [{"id": name, "source": "web"}])
    files = [str(tmp_path / name / "train.jsonl") for name in ("a", "b")]
    out = tmp_path / "out"
    assert tool(["--train", *files, "--bench", "vsi", "--out", str(out), "--drop"]) == 0
    kept = [json.loads(p.read_text())["id"] for p in sorted(out.glob("*.clean.jsonl"))]
    assert sorted(kept) == ["a", "b"]


def test_exit_codes_without_hits(tool, tmp_path):
    path = write(tmp_path / "t.jsonl", [{"id": "u", "image": "x.png"}])
    base = ["--train", str(path), "--bench", "vsi", "--out", str(tmp_path / "out")]
    assert tool([*base, "--fail-on-hit"]) == 0
    assert tool([*base, "--fail-on-hit", "--fail-on-unknown"]) == 3
    assert tool(["--train", str(path), "--bench", "nothing", "--out", str(tmp_path / "out")]) == 1
    path.write_text("{")
    assert tool(base) == 1


def test_rooms_from_metadata(tmp_path):
    (tmp_path / "metadata.csv").write_text(
        "video_id,visit_id,fold\n41069021,421,Training\n41069025,421,Training\n"
    )
    aliases = co.arkit_rooms(tmp_path / "metadata.csv")
    assert set(aliases.values()) == {"arkitscenes/visit-421"}
    (tmp_path / "3RScan.json").write_text('[{"reference": "a", "scans": [{"reference": "b"}]}]')
    assert co.rescans(tmp_path / "3RScan.json") == {"3rscan/a": "3rscan/a", "3rscan/b": "3rscan/a"}


def test_a_video_is_hashed_by_eight_of_its_frames(tmp_path):
    import av

    from spatialvlm.errors import DataError

    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 64
        for shade in range(0, 200, 10):
            pixels = np.full((64, 64, 3), shade, np.uint8)
            pixels[: 4 + shade // 5, 32:] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(stream.encode())
    assert len(co.picture_hashes(path)) == 8
    assert len(co.video_pictures(path, 100)) == 20
    for name in ("broken.mp4", "broken.png"):
        (tmp_path / name).write_bytes(b"nothing")
        with pytest.raises(DataError, match=f"{name} is no readable"):
            co.picture_hashes(tmp_path / name)


def test_videos_need_three_similar_frames():
    keys = co.BenchmarkKeys("v", co.Blacklist([]))
    keys.hashes = np.array([0, 2**60, 2**40 - 1], dtype=np.uint64)
    keys.hash_owner = ["clip.mp4"] * 3
    own = [1, 2**60, 2**40 - 1]
    assert [m.key for m in co._similar(keys, "t.mp4", own)] == ["clip.mp4"]
    assert co._similar(keys, "t.mp4", own[:1]) == []
    assert [m.key for m in co._similar(keys, "t.png", own[:1])] == ["clip.mp4"]
