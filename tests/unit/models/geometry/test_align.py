"""Features reach the right token: order of three vision towers, time merge, resampling."""

import pytest
import torch
from torch import nn
from transformers.models.internvl import InternVLConfig
from transformers.models.internvl.modeling_internvl import InternVLModel
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
)
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from spatialvlm.errors import AlignmentError
from spatialvlm.models.geometry.align import (
    frame_slots,
    frames_of_media,
    from_window_order,
    merge_time,
    resample,
    to_merge_units,
)

GRIDS = torch.tensor([[2, 12, 20], [1, 6, 10]])
NUM_PATCHES = 2 * 12 * 20 + 6 * 10


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_qwen2_5_states_come_back_in_window_order():
    torch.manual_seed(0)
    config = Qwen2_5_VLVisionConfig(
        depth=2,
        hidden_size=16,
        intermediate_size=16,
        num_heads=2,
        out_hidden_size=12,
        fullatt_block_indexes=[1],
        window_size=112,
        patch_size=14,
    )
    tower = Qwen2_5_VisionTransformerPretrainedModel(config).eval()
    output = tower(noise(NUM_PATCHES, 3 * 2 * 14 * 14), grid_thw=GRIDS)
    index, _ = get_vision_window_index(GRIDS, 2, 112, 14)
    ordered = from_window_order(output.last_hidden_state, index)
    assert (tower.merger(ordered) - output.pooler_output).abs().max() < 1e-6
    # Without it the states belong to other patches, and nothing would say so.
    assert (tower.merger(output.last_hidden_state) - output.pooler_output).abs().max() > 1e-3


@torch.no_grad()
def test_qwen3_states_are_already_in_order():
    torch.manual_seed(0)
    config = Qwen3VLVisionConfig(
        depth=2,
        hidden_size=16,
        intermediate_size=16,
        num_heads=2,
        out_hidden_size=12,
        num_position_embeddings=64,
        deepstack_visual_indexes=[0],
    )
    tower = Qwen3VLVisionModel(config).eval()
    output = tower(noise(NUM_PATCHES, 3 * 2 * 16 * 16), grid_thw=GRIDS)
    assert (tower.merger(output.last_hidden_state) - output.pooler_output).abs().max() < 1e-6


@torch.no_grad()
def test_internvl_pixel_shuffle_is_the_same_order():
    torch.manual_seed(0)
    config = InternVLConfig(
        vision_config={
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "image_size": [56, 56],
        },
        text_config={
            "model_type": "qwen2",
            "hidden_size": 12,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 16,
            "vocab_size": 32,
        },
        image_token_id=3,
    )
    model = InternVLModel(config).eval()
    pixels = noise(3, 3, 56, 56)
    expected = model.get_image_features(
        pixels, vision_feature_layer=-1, vision_feature_select_strategy="default"
    ).pooler_output
    hidden = model.vision_tower(pixels).last_hidden_state[:, 1:].view(3, 4, 4, 16)
    tokens = model.multi_modal_projector(to_merge_units(hidden).view(-1, 4 * 16))
    assert (tokens - expected.flatten(0, 1)).abs().max() < 1e-6


def test_merge_units_have_the_order_of_the_towers_positions():
    parts = []
    for units, rows, cols in GRIDS.tolist():
        grid = torch.stack(
            torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij"), -1
        )
        parts.append(to_merge_units(grid.expand(units, -1, -1, -1)))
    assert torch.equal(torch.cat(parts), get_vision_position_ids(GRIDS, 2))


def test_merge_units_refuse_odd_grids():
    with pytest.raises(AlignmentError, match="3x4 patches cannot be merged 2x2"):
        to_merge_units(torch.zeros(1, 3, 4, 1))


@pytest.mark.parametrize(
    ("num_frames", "pairs"),
    [
        (1, [[0, 0]]),
        (2, [[0, 1]]),
        (5, [[0, 1], [2, 3], [4, 4]]),
        (6, [[0, 1], [2, 3], [4, 5]]),
    ],
)
def test_frames_of_a_unit_and_their_merge(num_frames, pairs):
    frames = torch.arange(num_frames).float()[:, None] * torch.tensor([1.0, 10.0])
    slots = frame_slots(frames, 2)
    expected = torch.tensor(pairs).float()[:, :, None] * torch.tensor([1.0, 10.0])
    assert torch.equal(slots, expected)
    assert torch.equal(merge_time(slots, "concat"), expected.flatten(1))
    assert torch.equal(merge_time(slots, "mean"), expected.mean(1))
    assert torch.equal(merge_time(slots, "first"), expected[:, 0])
    assert torch.equal(frame_slots(frames, 1)[:, 0], frames)


def test_frames_are_shared_out_to_images_videos_and_mixtures():
    # Images 0 and 2 are views of one scene, 1 is a video of five frames, 3 has no geometry.
    grids = [(1, 4, 4), (3, 4, 4), (1, 2, 2), (1, 4, 4)]
    shares = frames_of_media([2, 5], grids, [0, 1, 0, -1], tau=2)
    assert shares == [slice(0, 1), slice(0, 5), slice(1, 2), None]
    assert frames_of_media([3], [(3, 2, 2)], [0], tau=1) == [slice(0, 3)]


@pytest.mark.parametrize(
    ("num_frames", "grids", "groups", "message"),
    [
        ([4], [(3, 2, 2)], [0], r"4 encoder frames for 1 media of \[3\] units"),
        ([3], [(1, 2, 2)] * 2, [0, 0], r"3 encoder frames for 2 media"),
        ([1, 1], [(1, 2, 2)], [0], r"2 groups, but the media name groups \[0\]"),
        ([1], [(1, 2, 2)] * 2, [0, 1], r"1 groups, but the media name groups \[0, 1\]"),
    ],
)
def test_frames_that_do_not_fit_the_media(num_frames, grids, groups, message):
    with pytest.raises(AlignmentError, match=message):
        frames_of_media(num_frames, grids, groups, tau=2)


def test_resample_is_the_identity_on_equal_grids():
    features = noise(2, 4, 6, 3).bfloat16()
    assert resample(features, (4, 6)) is features


def test_resample_interpolates_between_patch_centres_in_float32():
    ramp = torch.arange(4.0).view(1, 1, 4, 1).expand(1, 2, 4, 1)
    expected = torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3])
    assert torch.allclose(resample(ramp, (2, 8))[0, 0, :, 0], expected)
    # Shrinking averages (antialias): every patch contributes.
    peak = torch.zeros(1, 1, 8, 1)
    peak[0, 0, 1] = 1
    assert resample(peak, (1, 2))[0, 0, 0, 0] > 0.1
    assert resample(ramp.bfloat16(), (2, 8)).dtype == torch.bfloat16


def test_letterbox_padding_is_cropped_before_resampling():
    features = torch.full((1, 6, 6, 1), 9.0)
    features[:, :4, :3] = 1.0
    assert torch.equal(resample(features, (8, 6), content=(4, 3)), torch.ones(1, 8, 6, 1))
    assert torch.equal(resample(features, (4, 3), content=(4, 3)), torch.ones(1, 4, 3, 1))


def test_merge_units_keep_gradients():
    x = noise(1, 4, 4, 2).requires_grad_()
    nn.functional.mse_loss(to_merge_units(x), torch.zeros(16, 2)).backward()
    assert torch.allclose(x.grad, 2 * x / 32)
