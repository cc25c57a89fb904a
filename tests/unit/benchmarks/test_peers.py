"""The pure parts of the comparison with other trainers: files, stopwatch, merging."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"


def load(name):
    """A script as a module; scripts are not a package."""
    spec = importlib.util.spec_from_file_location(
        f"benchmark_{Path(name).stem}", BENCHMARKS / f"{name}.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


mix = load("peers/mix")
throughput = load("throughput")


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def words(row, turn):
    content = row["messages"][turn]["content"]
    return len(content.replace("<image>", "").replace("<video>", "").split())


def test_images_mix_has_the_stated_shape(tmp_path):
    mix.write_mix(tmp_path, "images", 6)
    spatial, general = rows_of(tmp_path / "spatial.jsonl"), rows_of(tmp_path / "general.jsonl")
    assert len(spatial) == len(general) == 6
    for row in spatial:
        assert 1 <= len(row["images"]) <= 4
        assert row["messages"][0]["content"].count("<image>") == len(row["images"])
        assert 1 <= words(row, 1) <= 8
    text_only = [row for row in general if "images" not in row]
    assert len(text_only) == 3
    assert all(60 <= words(row, 0) + words(row, 1) <= 500 for row in text_only)
    for row in (*spatial, *general):
        for name in row.get("images", ()):
            assert all(224 <= side <= 640 for side in Image.open(tmp_path / name).size)


def test_every_clip_has_eight_questions_and_exact_frames(tmp_path, monkeypatch):
    monkeypatch.setattr(mix, "FRAMES", 2)
    mix.write_mix(tmp_path, "video", 16)
    spatial = rows_of(tmp_path / "spatial.jsonl")
    clips = [row["videos"][0] for row in spatial]
    assert [clips.count(clip) for clip in sorted(set(clips))] == [8, 8]
    assert len({row["messages"][0]["content"] for row in spatial}) == 16
    frames = sorted((tmp_path / clips[0]).iterdir())
    assert [Image.open(frame).size for frame in frames] == [(224, 224)] * 2


def test_peers_read_the_same_rows_in_turn(tmp_path, monkeypatch):
    monkeypatch.setattr(mix, "FRAMES", 2)
    mix.write_mix(tmp_path, "video", 8)
    mixed = mix.read_mixed(tmp_path)
    spatial, general = rows_of(tmp_path / "spatial.jsonl"), rows_of(tmp_path / "general.jsonl")
    assert [row["messages"] for row in mixed[::2]] == [row["messages"] for row in spatial]
    assert [row["messages"] for row in mixed[1::2]] == [row["messages"] for row in general]
    assert [len(row["videos"][0]) for row in mixed[::2]] == [2] * 8
    assert all(Path(file).is_file() for row in mixed for file in row["images"])


def test_equal_seeds_write_equal_files(tmp_path):
    for name in ("a", "b"):
        mix.write_mix(tmp_path / name, "images", 2, seed=3)
    files = [
        path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()
    ]
    assert len(files) > 4
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_stopwatch_leaves_out_the_warm_up(monkeypatch):
    torch = pytest.importorskip("torch")
    stopwatch = load("peers/stopwatch")
    seconds = iter([10.0, 10.5, 20.0, 20.5, 30.0, 30.5])  # each step, then its calibration
    monkeypatch.setattr(stopwatch, "cpu_seconds", lambda: next(seconds))
    monkeypatch.setattr(stopwatch, "gemm_rate", lambda: 1e9)
    threads = torch.get_num_threads()
    watch = stopwatch.Stopwatch(warmup=1)
    try:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        for tokens in (1000, 60, 40):
            watch.count(tokens, 2 * tokens, 4)
            optimizer.step()
    finally:
        watch.hook.remove()
        torch.set_num_threads(threads)
    result = watch.result()
    assert result["steps"] == 2
    assert result["tokens_per_cpu_s"] == pytest.approx(100 / 19)  # 20 s less two calibrations
    assert result["samples_per_cpu_s"] == pytest.approx(8 / 19)
    assert result["padding"] == pytest.approx(0.5)


def test_stopwatch_refuses_a_run_that_only_warmed_up():
    pytest.importorskip("torch")
    stopwatch = load("peers/stopwatch")
    watch = stopwatch.Stopwatch.__new__(stopwatch.Stopwatch)
    watch.warmup, watch.marks = 2, [{}, {}]
    with pytest.raises(RuntimeError, match="2 steps were made, 2 of them warm up"):
        watch.result()


@pytest.mark.parametrize("floating", [False, True])
def test_masks_tell_real_tokens_and_samples(floating):
    torch = pytest.importorskip("torch")
    read_mask = load("peers/stopwatch").read_mask
    assert read_mask(torch.tensor([[1, 1, 0], [0, 1, 1]])) == (4, 2)
    sample = torch.tensor([0, 0, 1, 1, 1, -1])  # two samples and padding in one pack
    same = (sample[:, None] == sample) & (sample >= 0)
    mask = (same & torch.ones(6, 6, dtype=torch.bool).tril())[None, None]
    if floating:
        mask = torch.zeros(1, 1, 6, 6).masked_fill(~mask, torch.finfo(torch.float32).min)
    assert read_mask(mask) == (5, 2)


def record(who, how, tokens, samples=1.0, mix="images"):
    return {"mix": mix, "who": who, "how": how, "tokens_per_cpu_s": tokens, "samples_per_cpu_s": samples}  # fmt: skip


def test_rounds_merge_to_medians_and_errors_stay():
    records = [record("trl", "8 padded", rate) for rate in (100.0, 300.0, 200.0)]
    records += [{"mix": "images", "who": "trl", "how": "padding_free", "error": "ValueError: no"}]
    merged = throughput.merge(records)
    assert merged[0]["tokens_per_cpu_s"] == 200.0
    assert merged[0]["rounds"] == [100.0, 300.0, 200.0]
    assert merged[1] == records[3]


def test_ratios_are_to_every_peer_and_name_the_hardest():
    rows = [
        record("ours", "packed", 300.0, 3.0),
        record("trl", "8 padded", 100.0, 2.0),
        record("ms-swift", "1 x 8", 200.0, 1.0),
        {"mix": "images", "who": "llamafactory", "how": "8 padded", "error": "no environment"},
    ]
    found = throughput.ratios(rows)
    tokens = found["images, packed, tokens_per_cpu_s"]
    assert tokens["to_each"] == {"trl 8 padded": 3.0, "ms-swift 1 x 8": 1.5}
    assert (tokens["best_peer"], tokens["ratio"]) == ("ms-swift 1 x 8", 1.5)
    assert found["images, packed, samples_per_cpu_s"]["best_peer"] == "trl 8 padded"
    assert not any(name.startswith("video") for name in found)
    assert throughput.ratios(rows[:1]) == {}


def test_a_peer_without_environment_is_a_row(tmp_path):
    entry = throughput.Entry("images", "trl", "8 padded", ())
    found = throughput.measure(entry, tmp_path, tmp_path / "no_envs")
    assert "make_envs.sh" in found["error"]


def test_the_exception_of_a_traceback_is_quoted():
    text = "Traceback\n  File x\nValueError: padding-free needs flash\n\n[rank0] shutting down\n"
    assert throughput.last_line(text) == "ValueError: padding-free needs flash"
