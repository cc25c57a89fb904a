"""Neural lifting backends on the real transformers classes with tiny random weights."""

import numpy as np
import pytest

from spatialvlm.errors import BackendUnavailableError
from spatialvlm.scenes.lifting import hf_backends
from spatialvlm.scenes.lifting.features import FeatureStore
from spatialvlm.scenes.lifting.hf_backends import (
    DepthAnythingDepth,
    DepthPro,
    GroundingDinoDetector,
    Sam2Segmenter,
    match_label,
)
from spatialvlm.scenes.lifting.protocols import Detection

pytestmark = pytest.mark.slow
IMAGES = np.random.default_rng(0).integers(0, 255, (2, 48, 64, 3)).astype(np.uint8)


def save_depth_anything(path, estimation):
    from transformers import (
        DepthAnythingConfig,
        DepthAnythingForDepthEstimation,
        Dinov2Config,
        DPTImageProcessor,
    )

    backbone = Dinov2Config(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, mlp_ratio=2, image_size=28, patch_size=14,
        out_indices=[1, 2, 3, 4], reshape_hidden_states=False, apply_layernorm=True,
    )  # fmt: skip
    config = DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=16, neck_hidden_sizes=[8] * 4, fusion_hidden_size=8,
        head_hidden_size=8, depth_estimation_type=estimation, max_depth=10,
    )  # fmt: skip
    DepthAnythingForDepthEstimation(config).save_pretrained(path)
    DPTImageProcessor(
        size={"height": 28, "width": 28}, ensure_multiple_of=14, keep_aspect_ratio=True
    ).save_pretrained(path)


@pytest.mark.parametrize("estimation", ["metric", "relative"])
def test_depth_anything(tmp_path, estimation):
    save_depth_anything(tmp_path, estimation)
    backend = DepthAnythingDepth(str(tmp_path), metric=estimation == "metric")
    depth = backend.depth(IMAGES)
    assert depth.shape == (2, 48, 64)
    assert np.isfinite(depth).all()
    assert (depth >= 0).all()
    assert backend.metric is (estimation == "metric")
    assert backend.version.startswith(tmp_path.name)
    np.testing.assert_array_equal(depth, backend.depth(IMAGES))


def save_sam2(path):
    from transformers import (
        Sam2Config,
        Sam2HieraDetConfig,
        Sam2ImageProcessorFast,
        Sam2MaskDecoderConfig,
        Sam2Model,
        Sam2Processor,
        Sam2PromptEncoderConfig,
        Sam2VisionConfig,
    )

    hiera = Sam2HieraDetConfig(
        hidden_size=8, num_attention_heads=1, image_size=[64, 64], blocks_per_stage=[1, 1, 2, 1],
        embed_dim_per_stage=[8, 16, 32, 64], num_attention_heads_per_stage=[1, 2, 4, 8],
        window_size_per_stage=[4] * 4, window_positional_embedding_background_size=[4, 4],
        global_attention_blocks=[3],
    )  # fmt: skip
    vision = Sam2VisionConfig(
        backbone_config=hiera, backbone_channel_list=[64, 32, 16, 8],
        backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]], fpn_hidden_size=16,
    )  # fmt: skip
    config = Sam2Config(
        vision_config=vision,
        prompt_encoder_config=Sam2PromptEncoderConfig(hidden_size=16, image_size=64, patch_size=16),
        mask_decoder_config=Sam2MaskDecoderConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            mlp_dim=16,
            iou_head_hidden_dim=16,
        ),
    )
    Sam2Model(config).save_pretrained(path)
    processor = Sam2ImageProcessorFast(
        size={"height": 64, "width": 64}, mask_size={"height": 16, "width": 16}
    )
    Sam2Processor(processor, target_size=64).save_pretrained(path)


def test_sam2(tmp_path):
    save_sam2(tmp_path)
    backend = Sam2Segmenter(str(tmp_path))
    boxes = [[Detection("a", (2, 3, 20, 30), 0.9), Detection("b", (2, 3, 40, 30), 0.8)], []]
    masks = backend.segment(IMAGES, boxes)
    assert [len(found) for found in masks] == [2, 0]
    for mask in masks[0]:
        assert mask.pixels.shape == (48, 64)
        assert mask.pixels.dtype == np.bool_
        assert 0 <= mask.score <= 1


def test_sam2_encodes_every_picture_once(tmp_path, monkeypatch):
    """Masks of two prompts in two calls (segment, refine) take one pass of the image encoder."""
    save_sam2(tmp_path)
    boxes = [[Detection("a", (2, 3, 20, 30), 0.9)], [Detection("b", (2, 3, 40, 30), 0.8)]]
    results = {}
    for name, store in (("alone", None), ("shared", FeatureStore())):
        backend = Sam2Segmenter(str(tmp_path), store=store)
        encode, passes = backend._model.get_image_embeddings, []
        monkeypatch.setattr(
            backend._model,
            "get_image_embeddings",
            lambda pixels, encode=encode, passes=passes: passes.append(1) or encode(pixels),
        )
        found = [backend.segment(IMAGES, boxes), backend.segment(IMAGES, boxes[::-1])]
        results[name] = [m.pixels for call in found for masks in call for m in masks]
        assert len(passes) == {"alone": 4, "shared": 2}[name]
    for alone, shared in zip(results["alone"], results["shared"], strict=True):
        np.testing.assert_array_equal(alone, shared)


def test_version_changes_with_the_weights(tmp_path):
    import torch

    save_sam2(tmp_path)
    before = Sam2Segmenter(str(tmp_path))
    assert before.version == Sam2Segmenter(str(tmp_path)).version
    with torch.no_grad():
        next(before._model.parameters()).add_(1.0)
    before._model.save_pretrained(tmp_path)
    assert Sam2Segmenter(str(tmp_path)).version != before.version


def save_depth_pro(path, *, fov=True):
    from transformers import (
        DepthProConfig,
        DepthProForDepthEstimation,
        DepthProImageProcessor,
        Dinov2Config,
    )

    def encoder():
        return Dinov2Config(
            hidden_size=16, num_hidden_layers=4, num_attention_heads=2, mlp_ratio=2, image_size=16, patch_size=8,
            apply_layernorm=True,
        )  # fmt: skip

    config = DepthProConfig(
        fusion_hidden_size=8, patch_size=16, intermediate_hook_ids=[2, 1], intermediate_feature_dims=[8, 8],
        scaled_images_ratios=[0.5, 1.0], scaled_images_overlap_ratios=[0.0, 0.2],
        scaled_images_feature_dims=[16, 8], merge_padding_value=1, use_fov_model=fov, num_fov_head_layers=1,
        image_model_config=encoder(), patch_model_config=encoder(), fov_model_config=encoder(),
    )  # fmt: skip
    DepthProForDepthEstimation(config).save_pretrained(path)
    DepthProImageProcessor(size={"height": 32, "width": 32}).save_pretrained(path)


def test_depth_pro_gives_depth_and_focal_length_in_one_pass(tmp_path, monkeypatch):
    save_depth_pro(tmp_path)
    backend = DepthPro(str(tmp_path))
    forward, passes = backend._model.forward, []
    monkeypatch.setattr(
        backend._model, "forward", lambda **inputs: passes.append(1) or forward(**inputs)
    )
    depth = backend.depth(IMAGES)
    k = backend.intrinsics(IMAGES)
    assert depth.shape == (2, 48, 64)
    assert (depth > 0).all()
    assert k.shape == (2, 3, 3)
    assert k[0, 0, 0] != 0
    np.testing.assert_array_equal(k[:, :2, 2], [[32, 24]] * 2)
    assert len(passes) == 1
    save_depth_pro(tmp_path / "without", fov=False)
    with pytest.raises(BackendUnavailableError, match="no field-of-view head"):
        DepthPro(str(tmp_path / "without"))


def save_grounding_dino(path):
    from transformers import (
        BertConfig,
        BertTokenizerFast,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessor,
        GroundingDinoProcessor,
        SwinConfig,
    )

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?", "chair", "table", "sofa"]
    swin = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1] * 4,
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_indices=[2, 3, 4],
    )
    text = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=64,
    )  # fmt: skip
    config = GroundingDinoConfig(
        backbone_config=swin, text_config=text, num_queries=6, d_model=32, num_feature_levels=4,
        encoder_layers=1, encoder_ffn_dim=16, encoder_attention_heads=2, encoder_n_points=2,
        decoder_layers=2, decoder_ffn_dim=16, decoder_attention_heads=2, decoder_n_points=2, max_text_len=16,
    )  # fmt: skip
    GroundingDinoForObjectDetection(config).save_pretrained(path)
    images = GroundingDinoImageProcessor(size={"shortest_edge": 128, "longest_edge": 192})
    tokenizer = BertTokenizerFast(vocab={word: index for index, word in enumerate(words)})
    GroundingDinoProcessor(images, tokenizer).save_pretrained(path)


def test_grounding_dino(tmp_path, monkeypatch):
    save_grounding_dino(tmp_path)
    monkeypatch.setattr(hf_backends, "BOX_THRESHOLD", 0.0)
    monkeypatch.setattr(hf_backends, "TEXT_THRESHOLD", 0.0)
    backend = GroundingDinoDetector(str(tmp_path))
    found = backend.detect(IMAGES, [["chair"], []])
    assert found[1] == []
    for detection in found[0]:
        x0, y0, x1, y1 = detection.bbox
        assert detection.label == "chair"
        assert 0 <= x0 < x1 <= 64
        assert 0 <= y0 < y1 <= 48


def test_phrases_are_matched_to_the_asked_labels():
    labels = ["table", "coffee table", "floor lamp"]
    assert match_label("coffee table", labels) == "coffee table"
    assert match_label("table .", labels) == "table"
    assert match_label("lamp", labels) == "floor lamp"
    assert match_label("sofa", labels) is None
    assert match_label(" . ", labels) is None


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(BackendUnavailableError, match=r"Sam2Model from .*nothing"):
        Sam2Segmenter(str(tmp_path / "nothing"))
