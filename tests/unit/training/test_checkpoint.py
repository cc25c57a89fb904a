"""Saving, verifying, pruning and loading, with one process and a 4,000-parameter model."""

import json
import resource
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from spatialvlm.errors import CheckpointError
from spatialvlm.training import checkpoint as module
from spatialvlm.training.checkpoint import (
    CheckpointStore,
    Snapshot,
    load_checkpoint,
    restore_rng,
    to_prune,
)
from spatialvlm.training.checkpoint_files import (
    Index,
    SliceReader,
    checkpoints_in,
    verify,
    write_index,
    write_safetensors,
)
from spatialvlm.training.distributed import Processes
from spatialvlm.training.engines import make_engine
from spatialvlm.training.optim import Group
from spatialvlm.training.slices import replicated_slices
from spatialvlm.training.state import TrainState, pack_rng, unpack_rng
from tests.unit.training.fakes import FakeLoader, FakeVLM, prepare

ONE = Processes(0, 1, torch.device("cpu"))


def _engine(seed=0):
    model = FakeVLM(seed)
    _, groups, factory = prepare(model)
    return make_engine("ddp", model, groups, factory, ONE, max_grad_norm=1.0, bf16=False)


def _step(engine, start=0, steps=1):
    for _, data in zip(range(steps), FakeLoader(start=start), strict=False):
        for batch in data.batches:
            engine.backward(engine(batch).loss_sum / data.denominator_local)
        assert engine.step(engine.grad_norms(due=True))


def _snapshot(step=1):
    return Snapshot({"adam_step": step}, {}, "stage: 1\n", {"stage": 1})


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints", ONE)


def test_streamed_file_is_ordinary_safetensors(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b": torch.arange(4), "c": torch.empty(0)}
    size, digest = write_safetensors(tmp_path / "x.safetensors", tensors.items())
    assert (size, digest) == module.file_digest(tmp_path / "x.safetensors")
    found = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(found[k], v) for k, v in tensors.items())


def test_round_trip_restores_weights_moments_and_steps(store):
    engine = _engine()
    _step(engine, steps=3)
    path = store.save(3, engine, _snapshot(3))
    again = _engine(seed=5)
    load_checkpoint(path, again, ONE)
    _step(engine, start=3, steps=2)
    _step(again, start=3, steps=2)
    for (name, a), b in zip(engine.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert {p.name for p in path.iterdir()} == {
        "COMPLETE",
        "config.resolved.yaml",
        "index.safetensors",
        "manifest.json",
        "rng-00000-of-00001.safetensors",
        "state-00000-of-00001.safetensors",
        "train_state.json",
    }
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["strategy"] == "ddp"
    assert manifest["stage"] == 1


def test_background_save_holds_the_state_of_its_step_while_training_goes_on(store, monkeypatch):
    engine = _engine()
    _step(engine, steps=2)
    waited = store.save(2, engine, _snapshot(2))
    expected = {f.name: f.read_bytes() for f in waited.iterdir() if f.suffix == ".safetensors"}
    shutil.rmtree(waited)
    released = threading.Event()
    write = module.write_safetensors

    def slow(path, tensors):
        if path.name.startswith("state"):
            assert released.wait(30)
        return write(path, tensors)

    monkeypatch.setattr(module, "write_safetensors", slow)
    pending = store.begin(2, engine, _snapshot(2), background=True)
    _step(engine, start=2, steps=2)
    torch.randn(3)
    assert not pending.files.done()
    assert checkpoints_in(store.folder) == []  # not valid before every rank has written
    released.set()
    path = store.commit(pending)
    assert {f.name: f.read_bytes() for f in path.iterdir() if f.name in expected} == expected
    assert store.newest_valid() == (path, [])


def test_background_save_waits_when_memory_is_short(store, monkeypatch):
    engine = _engine()
    free = type("Memory", (), {"available": 10})()
    monkeypatch.setattr(module.psutil, "virtual_memory", lambda: free)
    with pytest.warns(UserWarning, match="copies 0.0 GB .* training waits for this one"):
        pending = store.begin(1, engine, _snapshot(), background=True)
    assert pending.files.done()
    assert store.commit(pending) == store.newest_valid()[0]


def test_every_mutation_is_found_and_the_previous_checkpoint_used(store):
    engine = _engine()
    for step in (1, 2):
        _step(engine, start=step)
        store.save(step, engine, _snapshot(step))
    newest = store.folder / "step-00000002"
    backup = newest.with_name("backup")
    shutil.copytree(newest, backup)
    rng = np.random.default_rng(0)
    names = sorted(p.name for p in newest.iterdir())
    aside = newest.with_name("step-00000002.rejected")
    newest.rename(aside)
    for case in range(104):
        shutil.rmtree(aside)
        shutil.copytree(backup, newest)
        file = newest / names[int(rng.integers(len(names)))]
        data = bytearray(file.read_bytes())
        kind = ("flip", "truncate", "delete", "zero", "swap")[case % 5]
        if kind == "flip":
            at = int(rng.integers(len(data)))
            data[at] ^= 1 << int(rng.integers(8))
            file.write_bytes(data)
        elif kind == "truncate":
            file.write_bytes(data[: int(rng.integers(len(data)))])
        elif kind == "delete":
            file.unlink()
        elif kind == "zero":
            file.write_bytes(bytes(len(data)))
        else:
            other = newest / names[(names.index(file.name) + 1) % len(names)]
            file.write_bytes(other.read_bytes())
            other.write_bytes(data)
        chosen, rejected = store.newest_valid()
        assert chosen == store.folder / "step-00000001", (kind, file.name)
        problem, note = rejected
        guilty = {file.name} | ({other.name} if kind == "swap" else set())
        marked = {"manifest.json", "COMPLETE"}
        guilty |= marked if guilty & marked else set()  # one is the hash of the other
        assert str(newest) in problem
        assert any(name in problem for name in guilty), (kind, guilty, problem)
        assert note == f"step-00000002: later than step 1, set aside as {aside.name}"


def test_ranks_divide_the_hashing_and_agree(store):
    engine = _engine()
    path = store.save(1, engine, _snapshot())
    (path / "train_state.json").write_bytes(b"x" * (path / "train_state.json").stat().st_size)
    found = []
    for rank in range(3):
        try:
            verify(path, part=(rank, 3))
        except CheckpointError:
            found.append(rank)
    assert len(found) == 1

    class Two(Processes):
        def gather(self, value):
            return ["", "rank 1 found it"]

        def broadcast(self, value):
            return value

    other = CheckpointStore(store.folder, Two(0, 2, torch.device("cpu")))
    with pytest.raises(CheckpointError, match="rank 1 found it"):
        other.verified(path)


def test_a_damaged_checkpoint_never_costs_a_good_one(store):
    """What was rejected at a resume neither counts among those kept nor comes back at the next start."""
    engine = _engine()
    for step in (2, 4, 6):
        store.save(step, engine, _snapshot(step))
    (store.folder / "step-00000006" / "train_state.json").write_text("{}")
    again = CheckpointStore(store.folder, ONE)
    assert again.newest_valid()[0] == store.folder / "step-00000004"
    again.save(5, engine, _snapshot(5))  # asked to stop there
    assert [p.name for p in checkpoints_in(store.folder)] == ["step-00000004", "step-00000005"]
    assert again.set_aside_newer(4) == ["step-00000005: later than step 4, set aside as step-00000005.rejected"]  # fmt: skip
    again.save(5, engine, _snapshot(5))
    assert again.set_aside_newer(4)[0].endswith("step-00000005.rejected1")
    assert CheckpointStore(store.folder, ONE).newest_valid()[0] == store.folder / "step-00000004"


def test_leftover_of_a_crash_is_removed_and_reported(store):
    engine = _engine()
    (store.folder / "step-00000004.tmp").mkdir(parents=True)
    chosen, rejected = store.newest_valid()
    assert chosen is None
    assert rejected == ["step-00000004.tmp: left by an interrupted save or clean-up, removed"]
    path = store.save(1, engine, _snapshot())
    assert store.newest_valid() == (path, [])


def test_disk_full_leaves_older_checkpoints_untouched(store, monkeypatch):
    engine = _engine()
    path = store.save(1, engine, _snapshot())
    before = module.file_digest(path / "state-00000-of-00001.safetensors")
    for point in ("save.write", "save.index", "save.manifest"):
        monkeypatch.setenv("SPATIALVLM_FAULT", f"{point}@2:0:nospace")
        with pytest.raises(CheckpointError, match="No space left"):
            store.save(2, engine, _snapshot(2))
        assert [p.name for p in store.folder.iterdir()] == ["step-00000001"]
    monkeypatch.delenv("SPATIALVLM_FAULT")
    assert module.file_digest(path / "state-00000-of-00001.safetensors") == before
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 10))
    with pytest.raises(CheckpointError, match=r"0 MB free.*lower checkpoint\.keep_last"):
        store.save(2, engine, _snapshot(2))
    assert verify(path)["step"] == 1


def test_a_file_that_breaks_off_while_it_is_written_leaves_nothing(store):
    """The real thing: the kernel stops the write in the middle of the file."""
    path = store.save(1, _engine(), _snapshot())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"rank 0: \[Errno 27\] File too large.*Older"):
            store.save(2, _engine(), _snapshot(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(store.folder.iterdir()) == [path]
    assert store.newest_valid() == (path, [])
    shutil.rmtree(store.folder)
    store.folder.write_text("")  # no folder can be made here any more
    with pytest.raises(CheckpointError, match=r"Cannot start a checkpoint in .*step-00000003"):
        store.save(3, _engine(), _snapshot(3))


def test_a_checkpoint_without_a_counter_or_a_data_position_is_refused():
    whole = TrainState(step=3, loader={"step": 3}).to_json()
    assert TrainState.from_json(whole).step == 3
    for key in whole:
        with pytest.raises(CheckpointError, match=rf"\['{key}'\] missing"):
            TrainState.from_json({k: v for k, v in whole.items() if k != key})
    with pytest.raises(CheckpointError, match=r"\['more'\] unknown"):
        TrainState.from_json(whole | {"more": 1})
    with pytest.raises(CheckpointError, match="step 3 holds no position of the data path"):
        TrainState.from_json(whole | {"loader": {}})
    assert TrainState.from_json(TrainState().to_json()).step == 0  # stopped before the first step


def test_other_parameters_are_refused_by_name(store):
    path = store.save(1, _engine(), _snapshot())
    model = FakeVLM()
    _, groups, factory = prepare(model, {"language_model": 1e-3})
    other = make_engine("ddp", model, groups, factory, ONE, max_grad_norm=1.0, bf16=False)
    with pytest.raises(CheckpointError, match=r"only in the checkpoint .*embed_tokens"):
        load_checkpoint(path, other, ONE)


def test_symbolic_links_are_refused(store, tmp_path):
    path = store.save(1, _engine(), _snapshot())
    outside = tmp_path / "outside.json"
    outside.write_text((path / "train_state.json").read_text())
    (path / "train_state.json").unlink()
    (path / "train_state.json").symlink_to(outside)
    with pytest.raises(CheckpointError, match="symbolic links"):
        verify(path)


def test_nothing_outside_is_deleted_through_a_link(store, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").touch()
    store.folder.mkdir()
    for name in ("step-00000001", "step-00000003.tmp"):
        (store.folder / name).symlink_to(outside)
    engine = _engine()
    for step in (5, 6, 7, 8):
        store.save(step, engine, _snapshot(step))
    assert CheckpointStore(store.folder, ONE).newest_valid()[0].name == "step-00000008"
    with pytest.raises(CheckpointError, match=r"Cannot start a checkpoint in .*File exists"):
        store.save(3, engine, _snapshot(3))
    assert [p.name for p in outside.iterdir()] == ["precious"]


@given(
    st.sets(st.integers(0, 60), max_size=20),
    st.integers(2, 4),
    st.sampled_from([None, 5, 10]),
    st.data(),
)
@settings(max_examples=100, deadline=None)
def test_prune_rule(steps, keep_last, keep_every, data):
    found = [Path(f"step-{s:08d}") for s in sorted(steps)]
    verified = data.draw(st.sampled_from(found)) if found else None
    gone = to_prune(found, keep_last=keep_last, keep_every=keep_every, newest_verified=verified)
    left = [p for p in found if p not in gone]
    assert len(left) >= min(2, len(found))
    assert verified is None or verified in left
    assert not set(found[-keep_last:]) & set(gone)
    if keep_every:
        assert not [p for p in gone if int(p.name[5:]) % keep_every == 0]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_slices_of_any_world_size_tile_every_parameter(tmp_path_factory, sizes, world):
    folder = tmp_path_factory.mktemp("tiles")
    model = torch.nn.ParameterDict(
        {f"p{i}": torch.nn.Parameter(torch.randn(n)) for i, n in enumerate(sizes)}
    )
    group = Group(
        "projector",
        False,
        1.0,
        0.0,
        tuple(f"p{i}" for i in range(len(sizes))),
        tuple((n,) for n in sizes),
    )
    optimizer = torch.optim.AdamW(model.parameters())
    rows = []
    for rank in range(world):
        slices = replicated_slices(model, optimizer, [group], rank, world, loading=False)
        write_safetensors(
            folder / f"state-{rank:05d}-of-{world:05d}.safetensors",
            ((f"param/{s.fqn}", s.views["param"]) for s in slices),
        )
        rows.append([(s.fqn, s.offset, s.numel) for s in slices])
    write_index(folder / "index.safetensors", [group], rows)
    reader = SliceReader(folder)
    for name, parameter in model.named_parameters():
        assert torch.equal(reader.tensor(name), parameter)
        assert torch.equal(reader.read("param", name, 0, 1), parameter[:1])
    if world > 1 and sum(sizes) > 1:
        holes = (
            [r if i else r[1:] for i, r in enumerate(rows)] if rows[0] else [r[:-1] for r in rows]
        )
        write_index(folder / "index.safetensors", [group], holes)
        with pytest.raises(CheckpointError, match="slices of"):
            Index.read(folder)


def test_random_generators_continue(tmp_path):
    import random

    states = pack_rng()
    expected = (random.random(), np.random.rand(), torch.rand(3).tolist())  # noqa: NPY002
    unpack_rng(states)
    assert (random.random(), np.random.rand(), torch.rand(3).tolist()) == expected  # noqa: NPY002
    with pytest.raises(CheckpointError, match="numpy"):
        unpack_rng({"torch": states["torch"]})
    with pytest.raises(CheckpointError, match="cannot be read"):
        restore_rng(tmp_path, ONE)
