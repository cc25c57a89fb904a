"""The per-frame encoder behind the same interface."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
)

from spatialvlm.errors import CheckpointError, ConfigError, GeometryError
from spatialvlm.models.geometry.base import assert_frozen
from spatialvlm.models.geometry.cache import CachedEncoder
from spatialvlm.models.geometry.dinov2 import load_dinov2, meta_dinov2
from spatialvlm.models.geometry.vggt import normalise

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 56}
KINDS = {
    "dinov2": (Dinov2Config, Dinov2Model, {"mlp_ratio": 2, "patch_size": 14}, 1),
    "registers": (
        Dinov2WithRegistersConfig,
        Dinov2WithRegistersModel,
        {"mlp_ratio": 2, "patch_size": 14, "num_register_tokens": 4},
        5,
    ),
    "dinov3": (
        DINOv3ViTConfig,
        DINOv3ViTModel,
        {"intermediate_size": 64, "num_register_tokens": 2},
        3,
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for kind, (config, model, extra, _) in KINDS.items():
        torch.manual_seed(0)
        made[kind] = tmp_path_factory.mktemp(kind)
        net = model(config(**SIZES, **extra))
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        net.save_pretrained(made[kind])
    return made


def frames(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_the_residual_states_of_transformers(folders, kind):
    _, model_class, _, num_special = KINDS[kind]
    encoder = load_dinov2(
        folders[kind], layers=(0, -2), precision="fp32", output_dtype=torch.float32
    )
    p = encoder.patch_size
    assert (encoder.num_special, encoder.feature_dim) == (num_special, 32)
    video = frames(3, 3, 2 * p, 3 * p)
    features = encoder([video], return_special=True)[0]
    assert features.grid == (3, 2, 3)
    model = model_class.from_pretrained(folders[kind]).eval()
    with torch.no_grad():
        states = model(normalise(video.float() / 255), output_hidden_states=True).hidden_states
    for layer in (0, 1):
        expected = states[layer + 1][:, num_special:].reshape(3, 2, 3, 32)
        assert (features.layers[layer] - expected).abs().max() < 1e-5
    assert (features.special - states[2][:, :num_special]).abs().max() < 1e-5
    assert len(encoder.blocks) == 2


def test_every_frame_is_seen_alone(folders):
    encoder = load_dinov2(folders["dinov2"], precision="fp32", vit_chunk=2)
    video = frames(5, 3, 28, 42)
    together = encoder([video])[0].layers[1]
    alone = torch.cat([encoder([frame[None]])[0].layers[1] for frame in video])
    assert (together.float() - alone.float()).abs().max() < 2e-2  # one bfloat16 step of the output
    assert not encoder.depends_on_first_frame


def test_bf16_is_close_and_ignores_an_ambient_autocast(folders):
    exact = load_dinov2(folders["dinov2"], precision="fp32", output_dtype=torch.float32)
    encoder = load_dinov2(folders["dinov2"], precision="bf16", output_dtype=torch.float32)
    video = [frames(2, 3, 28, 42)]
    ours, reference = encoder(video)[0].layers[1], exact(video)[0].layers[1]
    assert 0 < (ours - reference).norm() / reference.norm() < 0.01
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(exact(video)[0].layers[1], reference)


def test_frozen_and_cached_like_any_encoder(folders, tmp_path):
    encoder = load_dinov2(folders["dinov2"])
    assert_frozen(encoder.train())
    video = [frames(2, 3, 28, 28)]
    plain = encoder(video)[0].layers[1]
    CachedEncoder(encoder, tmp_path)(video)
    cache = CachedEncoder(load_dinov2(folders["dinov2"]), tmp_path)
    assert torch.equal(cache(video)[0].layers[1], plain)
    assert cache.stats.hits == 1


def test_fingerprints(folders):
    prints = {load_dinov2(folders[kind]).fingerprint for kind in KINDS}
    prints.add(load_dinov2(folders["dinov2"], precision="fp32").fingerprint)
    assert len(prints) == 4
    assert load_dinov2(folders["dinov2"]).fingerprint in prints


def test_meta_build_has_the_sizes_without_storage(folders):
    small = meta_dinov2(folders["registers"], (0,))
    assert (small.feature_dim, small.num_special, len(small.blocks)) == (32, 5, 1)
    large = meta_dinov2("facebook/dinov2-large", (22,))
    assert (large.feature_dim, large.patch_size, large.num_layers) == (1024, 14, 24)
    assert all(p.is_meta for p in (*small.parameters(), *large.parameters()))


def test_bad_sources(folders, tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere cannot be loaded as a DINO model"):
        load_dinov2(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(CheckpointError, match=r"is a clip model; .*dinov2, dinov2_with_registers"):
        load_dinov2(tmp_path)
    (tmp_path / "config.json").write_text((folders["dinov2"] / "config.json").read_text())
    tensors = load_file(folders["dinov2"] / "model.safetensors")
    del tensors["encoder.layer.1.norm1.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors: encoder\.layer\.1\.norm1\.weight"):
        load_dinov2(tmp_path)


def test_bad_use(folders):
    encoder = load_dinov2(folders["dinov3"], layers=(0,))
    with pytest.raises(GeometryError, match="multiples of 16"):
        encoder([frames(1, 3, 28, 32)])
    with pytest.raises(ConfigError, match="layer 2 was not loaded"):
        encoder([frames(1, 3, 32, 32)], layers=(-1,))
    with pytest.raises(ConfigError, match=r"layers -3\.\.2"):
        load_dinov2(folders["dinov2"], layers=(22,))
    with pytest.raises(ConfigError, match="bf16, fp32"):
        load_dinov2(folders["dinov2"], precision="fp16")


def test_the_layout_takes_the_patch_size_of_the_encoder(folders, tiny_checkpoint):
    from spatialvlm.config.geometry import GeometryConfig
    from spatialvlm.models.build import build_layout

    for kind, size in (("dinov3", (64, 96)), ("dinov2", (56, 84))):
        section = GeometryConfig(
            encoder="dinov2", source=str(folders[kind]), layers=(-1,), size_policy="match_grid"
        )
        layout = build_layout(tiny_checkpoint("qwen3vl"), section)
        assert layout.geometry_size((200, 300), (4, 6)) == size
