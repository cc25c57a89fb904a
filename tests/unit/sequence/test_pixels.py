import pytest
import torch

from spatialvlm.errors import AlignmentError
from spatialvlm.sequence.pixels import PixelSpec, prepare, split_frames
from spatialvlm.testing import make_checkpoint

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.5, 0.2)
SPEC = PixelSpec("patches", MEAN, STD, patch=2)


def frames(*shape):
    return torch.randint(
        0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


@pytest.mark.parametrize("family", ["qwen2_5vl", "qwen3vl", "internvl3"])
def test_equals_the_checkpoints_own_processor(family, tmp_path):
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(make_checkpoint(family, tmp_path))
    side = {"qwen2_5vl": 84, "qwen3vl": 96, "internvl3": 56}[family]
    image, video = frames(side, side, 3), frames(5, side, side, 3)
    options = {"do_resize": False, "return_tensors": "pt"}
    found_image = processor.image_processor([image.permute(2, 0, 1)], **options)
    found_video = processor.video_processor(
        [video.permute(0, 3, 1, 2)], do_sample_frames=False, **options
    )
    patch = processor.image_processor.patch_size if family != "internvl3" else 14
    spec = PixelSpec(
        "frames" if family == "internvl3" else "patches",
        tuple(processor.image_processor.image_mean),
        tuple(processor.image_processor.image_std),
        patch=patch,
    )
    shapes = [(1, side, side), (5, side, side)]
    units = [spec.grid(shape)[0] for shape in shapes]
    ours = prepare(torch.cat([image.flatten(), video.flatten()]), shapes, units, spec)
    videos = found_video["pixel_values_videos"]
    expected = torch.cat(
        [found_image["pixel_values"], videos[0] if family == "internvl3" else videos]
    )
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)


def test_patch_order_by_hand():
    frame = torch.zeros(1, 4, 8, 3, dtype=torch.uint8)
    frame[0, 2:4, 4:6] = 255  # patch (row 1, column 2): second merge unit, its third patch
    ours = prepare(frame, [(1, 4, 8)], [1], SPEC)
    dark = ours.min(dim=1).values == ours.min()
    assert ours.shape == (8, 3 * 2 * 2 * 2)
    assert dark.tolist() == [True] * 6 + [False] + [True]


def test_odd_video_repeats_its_last_frame_and_frames_as_images_repeat_each():
    video = frames(3, 4, 4, 3)
    paired = prepare(video, [(3, 4, 4)], [2], SPEC).view(2, 4, 3, 2, 4)
    assert torch.equal(paired[1, :, :, 0], paired[1, :, :, 1])
    assert not torch.equal(paired[0, :, :, 0], paired[0, :, :, 1])
    each = prepare(video, [(3, 4, 4)], [3], SPEC).view(3, 4, 3, 2, 4)
    assert torch.equal(each[:, :, :, 0], each[:, :, :, 1])
    assert torch.equal(each[0, :, :, 0], paired[0, :, :, 0])


def test_endpoints_map_exactly():
    frame = torch.zeros(1, 4, 4, 3, dtype=torch.uint8)
    spec = PixelSpec("frames", (0.5,) * 3, (0.5,) * 3, patch=2)
    assert prepare(frame, [(1, 4, 4)], [1], spec).unique().tolist() == [-1.0]
    assert prepare(frame + 255, [(1, 4, 4)], [1], spec).unique().tolist() == [1.0]


def test_bad_input_is_named():
    with pytest.raises(TypeError, match=r"uint8 RGB, got torch\.float32"):
        prepare(torch.zeros(48), [(1, 4, 4)], [1], SPEC)
    with pytest.raises(AlignmentError, match="need 96 values, the buffer has 48"):
        split_frames(frames(1, 4, 4, 3), [(2, 4, 4)])
    with pytest.raises(AlignmentError, match="4 x 6 px do not divide into 4 px"):
        prepare(frames(1, 4, 6, 3), [(1, 4, 6)], [1], SPEC)
    with pytest.raises(AlignmentError, match="5 frames cannot make 2"):
        prepare(frames(5, 4, 4, 3), [(5, 4, 4)], [2], SPEC)
