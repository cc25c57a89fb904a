"""Weights from every kind of source, and every way in which a source can be wrong."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from spatialvlm.errors import CheckpointError, FingerprintError
from spatialvlm.models.geometry import loader
from spatialvlm.models.geometry.loader import check_fingerprint, open_weights
from spatialvlm.models.geometry.vggt_checkpoint import load_vggt

PREFIXES = [
    "aggregator.",
    "vggt.aggregator.",
    "spatial_encoder.vggt_model.aggregator.",
    "model.geometry_encoder.vggt.aggregator.",
    "weights.aggregator.",
]
FRAMES = torch.arange(2 * 3 * 28 * 28).reshape(2, 3, 28, 28).to(torch.uint8)


@pytest.fixture(scope="module")
def tensors(data_dir):
    """Tensors of the aggregator, without prefix."""
    prefix = "weights.aggregator."
    content = load_file(data_dir / "vggt_tiny.safetensors")
    return {k.removeprefix(prefix): v for k, v in content.items() if k.startswith(prefix)}


@pytest.fixture(scope="module")
def expected(data_dir):
    return load_vggt(data_dir / "vggt_tiny.safetensors", layers=(0,))([FRAMES])[0].layers[0]


def under(prefix, tensors):
    return {prefix + name: value for name, value in tensors.items()}


def same(encoder, expected):
    return torch.equal(encoder([FRAMES])[0].layers[0], expected)


@pytest.mark.parametrize("outer", ["", "module."])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_every_known_prefix(tensors, expected, tmp_path, prefix, outer):
    path = tmp_path / "vggt.safetensors"
    heads = {"camera_head.trunk.0.weight": torch.ones(2), "depth_head.x": torch.ones(1)}
    save_file(under(outer + prefix, tensors) | heads, path)
    assert same(load_vggt(path, layers=(0,)), expected)


def test_folder_shards_and_torch_files_are_the_same_encoder(tensors, expected, tmp_path):
    full = under("aggregator.", tensors)
    names = sorted(full)
    single, sharded, legacy, wrapped = (tmp_path / name for name in "abcd")
    for folder in (single, sharded, legacy, wrapped):
        folder.mkdir()
    save_file(full, single / "model.safetensors")
    weight_map = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
    for part in set(weight_map.values()):
        save_file({n: full[n] for n in names if weight_map[n] == part}, sharded / part)
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    torch.save(full, legacy / "model.pt")
    torch.save({"model": full, "step": 3}, wrapped / "pytorch_model.bin")
    encoders = [load_vggt(f, layers=(0,)) for f in (single, sharded, legacy, wrapped)]
    encoders.append(load_vggt(legacy / "model.pt", layers=(0,)))
    assert all(same(encoder, expected) for encoder in encoders)


def test_only_needed_tensors_are_read(tensors, tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    save_file(under("aggregator.", tensors) | {"track_head.huge": torch.ones(1000)}, path)
    weights = open_weights(path)
    read = []

    def spy(name):
        read.append(name)
        return weights.read(name)

    monkeypatch.setattr(
        "spatialvlm.models.geometry.vggt_checkpoint.open_weights",
        lambda *_: loader.Weights(weights.files, weights.shapes, spy),
    )
    load_vggt(path, layers=(1,))
    unused = {"patch_embed.mask_token"} | {n for n in tensors if "_blocks.2." in n}
    assert {name.removeprefix("aggregator.") for name in read} == set(tensors) - unused
    assert len(read) == 2 * len(set(read))  # filled once, hashed once


def test_memory_is_that_of_the_needed_tensors(tensors, tmp_path, monkeypatch):
    """One tensor at a time is in memory besides those already in the model."""
    path = tmp_path / "m.safetensors"
    save_file(under("aggregator.", tensors), path)
    weights = open_weights(path)
    alive = []

    def spy(name):
        import weakref

        tensor = weights.read(name)
        alive[:] = [ref for ref in alive if ref() is not None]
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(
        "spatialvlm.models.geometry.vggt_checkpoint.open_weights",
        lambda *_: loader.Weights(weights.files, weights.shapes, spy),
    )
    load_vggt(path, layers=(0,), precision="bf16")
    assert len(alive) <= 2


def test_truncated_depth_loads_when_no_later_block_is_asked_for(tensors, expected, tmp_path):
    path = tmp_path / "m.safetensors"
    save_file(under("a.", {n: t for n, t in tensors.items() if "_blocks.2." not in n}), path)
    assert same(load_vggt(path, layers=(0,)), expected)


# --- wrong checkpoints ------------------------------------------------------------------------------


def write(tmp_path, content):
    path = tmp_path / "bad.safetensors"
    save_file(content, path)
    return path


def without(tensors, *parts):
    return {n: t for n, t in tensors.items() if not any(part in n for part in parts)}


def test_missing_tensors_are_counted_and_named(tensors, tmp_path):
    path = write(tmp_path, under("aggregator.", without(tensors, "frame_blocks.1.mlp")))
    message = r"prefix 'aggregator\.'.* lacks 4 of \d+ tensors: frame_blocks\.1\.mlp"
    with pytest.raises(CheckpointError, match=message):
        load_vggt(path, layers=(1,))


def test_missing_size_tensors(tensors, tmp_path):
    path = write(tmp_path, under("aggregator.", without(tensors, "q_norm", "pos_embed")))
    with pytest.raises(CheckpointError, match=r"lacks 2 tensors.*pos_embed.*q_norm"):
        load_vggt(path, layers=(0,))


def test_wrong_shape(tensors, tmp_path):
    bad = {**tensors, "global_blocks.0.ls1.gamma": torch.ones(7)}
    path = write(tmp_path, under("aggregator.", bad))
    with pytest.raises(
        CheckpointError, match=r"global_blocks\.0\.ls1\.gamma.*\(7,\), expected \(64,\)"
    ):
        load_vggt(path, layers=(0,))


def test_unexpected_tensor(tensors, tmp_path):
    path = write(tmp_path, under("aggregator.", {**tensors, "frame_blocks.0.extra": torch.ones(1)}))
    with pytest.raises(CheckpointError, match=r"1 tensors that a VGGT .*frame_blocks\.0\.extra"):
        load_vggt(path, layers=(0,))


@pytest.mark.parametrize(
    "name", ["aggregator.inter_frame_blocks.2.x", "aggregator.rope_embed.periods"]
)
def test_vggt_omega_is_recognised(tensors, tmp_path, name):
    path = write(tmp_path, under("aggregator.", tensors) | {name: torch.ones(1)})
    with pytest.raises(CheckpointError, match="VGGT-Omega"):
        load_vggt(path, layers=(0,))


def test_two_aggregators(tensors, tmp_path):
    clones = {name: value.clone() for name, value in tensors.items()}
    path = write(tmp_path, under("a.", tensors) | under("b.", clones))
    with pytest.raises(CheckpointError, match=r"2 VGGT aggregators, at a\., b\."):
        load_vggt(path, layers=(0,))


def test_no_aggregator(tmp_path):
    path = write(tmp_path, {"model.layers.0": torch.ones(1), "lm_head.weight": torch.ones(1)})
    with pytest.raises(CheckpointError, match="top-level names are lm_head, model"):
        load_vggt(path, layers=(0,))


def test_sizes_that_do_not_fit_together(tensors, tmp_path):
    bad = {**tensors, "patch_embed.pos_embed": torch.ones(1, 30, 64)}
    path = write(tmp_path, under("aggregator.", bad))
    with pytest.raises(CheckpointError, match="29 positions are no square"):
        load_vggt(path, layers=(0,))


# --- wrong files ------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_pickled_objects_are_refused_and_not_executed(tmp_path, capsys):
    path = tmp_path / "model.pt"
    torch.save({"model": Evil()}, path)
    with pytest.raises(CheckpointError, match=r"refused.*safetensors"):
        load_vggt(path, layers=(0,))
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_truncated_file(tensors, tmp_path, suffix):
    path = tmp_path / f"m{suffix}"
    if suffix == ".pt":
        torch.save(tensors, path)
    else:
        save_file(tensors, path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="truncated"):
        load_vggt(path, layers=(0,))


def test_not_tensors_at_all(tmp_path):
    path = tmp_path / "m.pt"
    torch.save([torch.ones(1)], path)
    with pytest.raises(CheckpointError, match="holds a list"):
        load_vggt(path, layers=(0,))


def test_wrong_places(tmp_path):
    (tmp_path / "weights.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    index = tmp_path / "sharded" / "model.safetensors.index.json"
    index.parent.mkdir()
    index.write_text(json.dumps({"weight_map": {"a": "part-1.safetensors"}}))
    for source, message in {
        tmp_path / "weights.txt": "not a weight file",
        tmp_path / "empty": "holds none of model.safetensors",
        tmp_path / "nowhere.safetensors": "neither a file, a folder, nor a hub id",
        index.parent: "missing shards: part-1.safetensors",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            load_vggt(source, layers=(0,))
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="not a checkpoint index"):
        load_vggt(index.parent, layers=(0,))


def hub_error(kind):
    import httpx
    from huggingface_hub import errors

    response = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co/x"))
    if kind == "offline":
        return errors.LocalEntryNotFoundError("no network")
    name = {
        "gated": "GatedRepoError",
        "missing": "RepositoryNotFoundError",
        "rev": "RevisionNotFoundError",
    }
    return getattr(errors, name[kind])("message", response=response)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("gated", "facebook/VGGT-1B-Commercial is gated"),
        ("missing", "does not exist, or is private"),
        ("rev", "no revision 'main'"),
        ("offline", "not in the local cache and the hub cannot be reached"),
    ],
)
def test_hub_failures_name_the_licence_page_and_the_local_way(monkeypatch, kind, message):
    def fail(*args, **kwargs):
        raise hub_error(kind)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_vggt("facebook/VGGT-1B-Commercial", layers=(0,), revision="main")
    assert "https://huggingface.co/facebook/VGGT-1B-Commercial" in str(caught.value)
    assert "geometry.source to the local folder" in str(caught.value)


def test_hub_tries_file_names_in_order(monkeypatch, data_dir, expected):
    import httpx
    from huggingface_hub.errors import RemoteEntryNotFoundError

    asked = []

    def download(repo, name, revision):
        asked.append(name)
        if name != "model.pt":
            response = httpx.Response(404, request=httpx.Request("GET", "https://x"))
            raise RemoteEntryNotFoundError("none", response=response)
        return str(data_dir / "vggt_tiny.safetensors")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert same(load_vggt("facebook/VGGT-1B", layers=(0,)), expected)
    assert asked == ["model.safetensors", "model.safetensors.index.json", "model.pt"]


# --- identity ---------------------------------------------------------------------------------------


def test_fingerprint_depends_on_weights_precision_and_used_layers_only(tensors, tmp_path, data_dir):
    base = load_vggt(data_dir / "vggt_tiny.safetensors", layers=(0,))
    assert len(base.fingerprint) == 64
    renamed = tmp_path / "a.safetensors"
    save_file(under("module.aggregator.", tensors) | {"point_head.x": torch.ones(1)}, renamed)
    changed = tmp_path / "b.safetensors"
    touched = {**tensors, "global_blocks.0.ls2.gamma": tensors["global_blocks.0.ls2.gamma"] + 1}
    save_file(under("weights.aggregator.", touched), changed)
    assert load_vggt(renamed, layers=(0,)).fingerprint == base.fingerprint
    others = {
        load_vggt(renamed, layers=(0,), precision="fp32").fingerprint,
        load_vggt(renamed, layers=(1,)).fingerprint,
        load_vggt(changed, layers=(0,)).fingerprint,
    }
    assert len(others) == 3
    assert base.fingerprint not in others


def test_hash_is_computed_once_per_file_state(tensors, tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    save_file(under("aggregator.", tensors), path)
    monkeypatch.setattr(loader, "_hashes", {})
    for _ in range(3):
        load_vggt(path, layers=(0,))
    assert len(loader._hashes) == 1
    save_file(under("aggregator.", {n: t + 1 for n, t in tensors.items()}), path)
    load_vggt(path, layers=(0,))
    assert len(loader._hashes) == 2


def test_fingerprint_mismatch(caplog):
    check_fingerprint("a", "a", allow_mismatch=False)
    with pytest.raises(
        FingerprintError, match=r"fingerprint bb, .*trained with aa.*allow_encoder_mismatch"
    ):
        check_fingerprint("aa", "bb", allow_mismatch=False)
    check_fingerprint("aa", "bb", allow_mismatch=True)
    assert "continuing" in caplog.text


def test_licences_are_announced_once(data_dir, caplog, monkeypatch):
    monkeypatch.setattr("spatialvlm.models.geometry.vggt_checkpoint._announced", set())
    for _ in range(2):
        load_vggt(data_dir / "vggt_tiny.safetensors", layers=(0,))
    assert caplog.text.count("CC BY-NC 4.0") == 1


def fingerprint_on_rank(rank, store, source, queue):
    """Both ranks load; only rank 0 may hash."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    loader._hashes.clear()
    encoder = load_vggt(source, layers=(0,))
    queue.put((rank, encoder.fingerprint, len(loader._hashes)))
    torch.distributed.destroy_process_group()


def test_rank_0_hashes_for_all(tmp_path, data_dir):
    import multiprocessing

    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    source = data_dir / "vggt_tiny.safetensors"
    workers = [
        context.Process(target=fingerprint_on_rank, args=(rank, tmp_path / "store", source, queue))
        for rank in range(2)
    ]
    for worker in workers:
        worker.start()
    results = sorted(queue.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert [(rank, hashed) for rank, _, hashed in results] == [(0, 1), (1, 0)]
    assert results[0][1] == results[1][1] == load_vggt(source, layers=(0,)).fingerprint
