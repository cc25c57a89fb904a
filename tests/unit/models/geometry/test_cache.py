"""Features from disk equal computed ones, and a damaged cache never reaches training."""

import errno
import multiprocessing
import os
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from spatialvlm.errors import CacheError, ConfigError
from spatialvlm.models.geometry import cache as cache_module
from spatialvlm.models.geometry.base import assert_frozen
from spatialvlm.models.geometry.cache import CachedEncoder, media_hash, pack, unpack
from spatialvlm.models.geometry.vggt import Vggt
from spatialvlm.models.geometry.vggt_checkpoint import load_vggt


@pytest.fixture(scope="module")
def encoder(data_dir):
    return load_vggt(data_dir / "vggt_tiny.safetensors", layers=(0, 1))


def frames(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


VIDEOS = [frames(2, 3, 28, 42), frames(1, 3, 28, 28, seed=1)]


@pytest.fixture
def calls(encoder):
    """One entry per group that the encoder really saw."""
    seen = []
    handle = encoder.aggregator.register_forward_hook(
        lambda module, args, output: seen.extend(range(len(args[0])))
    )
    yield seen
    handle.remove()


def same(one, two):
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert a.grid == b.grid
        assert sorted(a.layers) == sorted(b.layers)
        assert all(torch.equal(a.layers[k], b.layers[k]) for k in a.layers)
        assert (a.special is None) == (b.special is None)
        if a.special is not None:
            assert torch.equal(a.special, b.special)
    return True


def files(folder):
    return sorted(folder.glob("??/*.safetensors"))


@pytest.mark.parametrize("special", [False, True])
def test_round_trip_is_bitwise_and_skips_the_encoder(encoder, calls, tmp_path, special):
    plain = encoder(VIDEOS, return_special=special)
    calls.clear()
    cache = CachedEncoder(encoder, tmp_path)
    assert same(cache(VIDEOS, return_special=special), plain)
    assert len(calls) == 2
    again = CachedEncoder(encoder, tmp_path)
    assert same(again(VIDEOS, return_special=special), plain)
    assert len(calls) == 2
    assert (again.stats.hits, again.stats.misses) == (4, 0)
    assert len(files(tmp_path)) == 4
    assert not list(tmp_path.glob("**/*.tmp"))


def test_only_missing_groups_are_encoded_and_order_is_kept(encoder, calls, tmp_path):
    cache = CachedEncoder(encoder, tmp_path)
    cache(VIDEOS[:1])
    new = frames(2, 3, 28, 42, seed=7)
    calls.clear()
    mixed = cache([new, VIDEOS[0], VIDEOS[1]])
    assert len(calls) == 2
    assert same(mixed, encoder([new, VIDEOS[0], VIDEOS[1]]))


def test_the_cache_looks_like_the_encoder(encoder, tmp_path):
    cache = CachedEncoder(encoder, tmp_path)
    for name in ("feature_dim", "patch_size", "num_special", "fingerprint", "default_layers"):
        assert getattr(cache, name) == getattr(encoder, name)
    assert_frozen(cache.train())


def test_the_key_changes_with_everything_that_changes_features(encoder, tmp_path):
    cache = CachedEncoder(encoder, tmp_path)
    fields = cache.key_fields(media_hash(VIDEOS[0]), 0, special=False)
    paths = {cache.path(fields)}
    for name in fields:
        paths.add(cache.path({**fields, name: fields[name] + "x"}))
    assert len(paths) == 1 + len(fields) == 8
    video = VIDEOS[0].clone()
    video[1, 2, 3, 4] += 1
    assert media_hash(video) != media_hash(VIDEOS[0])
    assert media_hash(VIDEOS[0].reshape(1, 3, 56, 42)) != media_hash(VIDEOS[0])


def test_settings_of_the_encoder_enter_the_key(encoder, tmp_path):
    half = Vggt(encoder.aggregator, (0, 1), "frame")
    half.fingerprint = encoder.fingerprint
    CachedEncoder(encoder, tmp_path)(VIDEOS[:1])
    features = CachedEncoder(half, tmp_path)(VIDEOS[:1])[0]
    assert features.layers[0].shape[-1] == 64
    half.reference_frame = "last"
    CachedEncoder(half, tmp_path)(VIDEOS[:1])
    CachedEncoder(half, tmp_path, dtype="fp32")(VIDEOS[:1])
    assert len(files(tmp_path)) == 8


def damage_payload(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def damage_header(path):
    tensors = load_file(path)
    save_file(tensors, path, metadata={"fingerprint": "other"})


def truncate(path):
    path.write_bytes(path.read_bytes()[:100])


def other_entry(path):
    """A valid entry under the wrong name, as after a stale or mixed-up copy."""
    others = [p for p in files(path.parent.parent) if p != path]
    path.write_bytes(others[0].read_bytes())


@pytest.mark.parametrize("damage", [damage_payload, damage_header, truncate, other_entry])
def test_a_damaged_entry_is_recomputed(encoder, calls, tmp_path, caplog, damage):
    expected = CachedEncoder(encoder, tmp_path)(VIDEOS)
    broken = files(tmp_path)[0]
    damage(broken)
    calls.clear()
    cache = CachedEncoder(encoder, tmp_path)
    assert same(cache(VIDEOS), expected)
    assert cache.stats.corrupt == 1
    assert len(calls) == 1
    assert str(broken) in caplog.text
    calls.clear()
    assert same(CachedEncoder(encoder, tmp_path)(VIDEOS), expected)
    assert calls == []


def test_a_crash_before_the_rename_leaves_no_entry(encoder, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def crash(self, target):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(cache_module.Path, "replace", crash)
        with pytest.raises(Killed):
            CachedEncoder(encoder, tmp_path)(VIDEOS)
    assert files(tmp_path) == []
    assert same(CachedEncoder(encoder, tmp_path)(VIDEOS), encoder(VIDEOS))
    assert len(files(tmp_path)) == 4


def write_many(folder, source):
    encoder = load_vggt(source, layers=(0,))
    cache = CachedEncoder(encoder, folder)
    for _ in range(3):
        cache([frames(1, 3, 28, 28, seed=seed) for seed in range(4)])
        for path in files(folder):
            path.unlink(missing_ok=True)
    cache([frames(1, 3, 28, 28, seed=seed) for seed in range(4)])


def test_two_writers(data_dir, tmp_path):
    context = multiprocessing.get_context("fork")
    source = data_dir / "vggt_tiny.safetensors"
    workers = [context.Process(target=write_many, args=(tmp_path, source)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    cache = CachedEncoder(load_vggt(source, layers=(0,)), tmp_path)
    videos = [frames(1, 3, 28, 28, seed=seed) for seed in range(4)]
    assert same(cache(videos), cache.encoder(videos))
    assert cache.stats.corrupt == 0
    assert not list(tmp_path.glob("**/*.tmp"))


def test_spot_check(encoder, tmp_path):
    CachedEncoder(encoder, tmp_path)(VIDEOS)
    cache = CachedEncoder(encoder, tmp_path, verify_every=3)
    cache(VIDEOS)
    assert cache.stats.verified == 0
    cache(VIDEOS)
    assert cache.stats.verified == 1
    gamma = encoder.aggregator.global_blocks[0].ls2.gamma
    with torch.no_grad():
        gamma.neg_()  # other features under the same fingerprint
    try:
        with pytest.raises(CacheError, match=r"layer 0 differ.*cosine .* 0\.999 required"):
            CachedEncoder(encoder, tmp_path, verify_every=1)(VIDEOS)
    finally:
        with torch.no_grad():
            gamma.neg_()


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp8"])
def test_first_and_later_reads_are_the_same_in_every_precision(data_dir, tmp_path, dtype):
    encoder = load_vggt(
        data_dir / "vggt_tiny.safetensors",
        layers=(2,),
        precision="fp32",
        output_dtype=torch.float32,
    )
    plain = encoder(VIDEOS)
    first = CachedEncoder(encoder, tmp_path, dtype=dtype)(VIDEOS)
    cache = CachedEncoder(encoder, tmp_path, dtype=dtype, verify_every=1)
    assert same(cache(VIDEOS), first)
    assert cache.stats.verified == 1
    error = (first[0].layers[2] - plain[0].layers[2]).norm() / plain[0].layers[2].norm()
    assert error <= {"fp32": 0, "bf16": 0.003, "fp8": 0.03}[dtype]


def test_fp8_halves_the_file_and_survives_zeros():
    x = torch.randn(3, 2, 2, 64)
    x[0, 0, 0] = 0
    stored = pack("feat", x, "fp8")
    size = sum(t.numel() * t.element_size() for t in stored.values())
    assert size == x.numel() + 4 * 12
    assert torch.equal(unpack("feat", stored)[0, 0, 0], torch.zeros(64))
    assert torch.cosine_similarity(unpack("feat", stored), x, dim=-1)[1:].min() > 0.998


def test_disk_budget_evicts_the_least_recently_used(encoder, tmp_path):
    videos = [frames(1, 3, 28, 28, seed=seed) for seed in range(4)]
    probe = CachedEncoder(encoder, tmp_path / "probe")
    probe(videos[:1])
    size = sum(path.stat().st_size for path in files(tmp_path / "probe"))  # two layers
    cache = CachedEncoder(encoder, tmp_path / "c", max_gb=3.4 * size / 1e9)
    for age, video in enumerate(videos[:3]):
        before = set(files(cache.folder))
        cache([video])
        for path in set(files(cache.folder)) - before:
            os.utime(path, (time.time() - 1000 + age, time.time() - 1000 + age))
    cache([videos[0]])  # used again: video 1 is now the oldest
    cache([videos[3]])
    assert cache.stats.evicted == 2
    assert sum(path.stat().st_size for path in files(cache.folder)) <= cache.max_bytes
    cache.stats = cache_module.CacheStats()
    cache([videos[0], videos[2], videos[3]])
    assert (cache.stats.hits, cache.stats.misses) == (6, 0)
    cache([videos[1]])
    assert cache.stats.misses == 2


def test_an_entry_may_be_evicted_while_it_is_read(encoder, tmp_path, monkeypatch):
    expected = CachedEncoder(encoder, tmp_path)(VIDEOS)

    def gone(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(cache_module.os, "utime", gone)
    cache = CachedEncoder(encoder, tmp_path)
    assert same(cache(VIDEOS), expected)
    assert cache.stats.hits == 4


def test_an_entry_above_the_whole_budget_is_not_stored(encoder, tmp_path):
    cache = CachedEncoder(encoder, tmp_path, max_gb=1e-6)
    assert same(cache(VIDEOS), encoder(VIDEOS))
    assert files(tmp_path) == []


def test_a_full_disk_stops_writing_but_not_training(encoder, tmp_path, monkeypatch, caplog):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache_module.os, "fsync", full)
    cache = CachedEncoder(encoder, tmp_path)
    assert same(cache(VIDEOS), encoder(VIDEOS))
    assert same(cache(VIDEOS), encoder(VIDEOS))
    assert caplog.text.count("no space left") == 1
    assert not list(tmp_path.glob("**/*.*"))


def test_other_io_errors_are_not_hidden(encoder, tmp_path, monkeypatch):
    def broken(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(cache_module.os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output"):
        CachedEncoder(encoder, tmp_path)(VIDEOS)


def test_bad_settings(encoder, tmp_path):
    with pytest.raises(ConfigError, match="bf16, fp32, fp8"):
        CachedEncoder(encoder, tmp_path, dtype="fp16")
    anonymous = Vggt(encoder.aggregator, (0,))
    with pytest.raises(ConfigError, match="no fingerprint"):
        CachedEncoder(anonymous, tmp_path)
