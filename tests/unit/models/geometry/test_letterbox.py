"""Views of very different aspect share a canvas; the padding never reaches a token."""

import numpy as np
import pytest
import torch
from PIL import Image

from spatialvlm.config.geometry import GeometryConfig
from spatialvlm.data.collate import Prepared, collate
from spatialvlm.data.encode import OverlongPolicy, fit
from spatialvlm.data.media.plan import MediaPolicy
from spatialvlm.data.media.store import MediaStore
from spatialvlm.data.prepare import load_pixels, plan_sample_media
from spatialvlm.data.sample import MediaRef, Sample, Turn
from spatialvlm.data.template import ChatTemplate, load_processor
from spatialvlm.errors import GeometryError
from spatialvlm.models.branch import GeometryBranch
from spatialvlm.models.build import build_layout, build_model
from spatialvlm.models.geometry.vggt_checkpoint import load_vggt
from spatialvlm.typing import ModalityFlags

FLAGS = ModalityFlags(True, False, True, True)


@pytest.fixture
def store(tmp_path):
    generator = np.random.default_rng(0)
    for name, size in {"wide": (64, 128), "tall": (128, 64), "wide2": (68, 128)}.items():
        pixels = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    return MediaStore(tmp_path)


@pytest.fixture(scope="module")
def geometry(tiny_vggt):
    return GeometryConfig(
        source=str(tiny_vggt),
        layers=(-1,),
        precision="fp32",
        size_policy="native",
        native_long=112,
        init="scratch",
    )


def pack(store, folder, layout, names):
    refs = tuple(MediaRef("image", "file", f"{name}.png") for name in names)
    turns = (Turn("user", (*range(len(refs)), "Where?")), Turn("assistant", ("there",)))
    sample = Sample("s", "s", "f", turns, refs, same_scene=True)
    policy = MediaPolicy.from_processor(load_processor(folder))
    infos = plan_sample_media(sample, store, policy, layout)
    template = ChatTemplate.from_checkpoint(folder)
    fitted = fit(sample, infos, template, layout, OverlongPolicy(4096))
    pixels = load_pixels(sample, fitted.media, store, layout)
    batch = collate(
        [Prepared("s", fitted.encoded, pixels)],
        [(0,)],
        flags=FLAGS,
        position_rows=layout.num_position_rows,
    )
    return batch, pixels


@pytest.mark.parametrize("family", ["qwen3vl", "internvl3"])
def test_padding_is_white_and_never_reaches_a_token(
    family, store, tiny_checkpoint, geometry, monkeypatch
):
    folder = tiny_checkpoint(family)
    layout = build_layout(folder, geometry)
    batch, pixels = pack(store, folder, layout, ("wide", "tall"))
    assert batch["geometry_shapes"].tolist() == [[2, 112, 112]]
    assert batch["geometry_content"].tolist() == [[56, 112], [112, 56]]
    assert (pixels[0].geometry[:, 56:] == 255).all()
    assert (pixels[1].geometry[:, :, 56:] == 255).all()

    torch.manual_seed(0)
    model = build_model(folder, geometry).eval()
    encode = model.geometry.encoder.forward

    def poisoned(videos, **kwargs):
        """Features of the padding become infinite."""
        features = encode(videos, **kwargs)
        for feature in features:
            for layer in feature.layers.values():
                layer[0, 4:] = torch.inf
                layer[1, :, 4:] = torch.inf
        return features

    with torch.no_grad():
        expected = model(batch).loss_sum
        monkeypatch.setattr(model.geometry.encoder, "forward", poisoned)
        model.geometry._recent.clear()
        assert torch.equal(model(batch).loss_sum, expected)
        del batch["geometry_content"]
        assert not model(batch).loss_sum.isfinite()


def test_nearly_equal_aspects_share_a_size_without_padding(store, tiny_checkpoint, geometry):
    folder = tiny_checkpoint("qwen3vl")
    layout = build_layout(folder, geometry)
    batch, pixels = pack(store, folder, layout, ("wide", "wide2"))
    assert "geometry_content" not in batch
    assert {p.geometry.shape for p in pixels} == {(1, 56, 112, 3)}


def test_the_branch_notices_an_encoder_that_was_unfrozen(tiny_vggt):
    encoder = load_vggt(tiny_vggt, layers=(0,))
    branch = GeometryBranch(encoder, {"camera_token": False, "check_every": 2}, None, lru_items=0)
    batch = {
        "media_group": torch.tensor([0]),
        "geometry_shapes": torch.tensor([[1, 28, 28]]),
        "geometry_u8": torch.zeros(28 * 28 * 3, dtype=torch.uint8),
    }
    branch.features(batch)
    encoder.aggregator.camera_token.requires_grad_()
    branch.features(batch)  # between two checks
    with pytest.raises(GeometryError, match="camera_token of the geometry encoder requires grad"):
        branch.features(batch)
