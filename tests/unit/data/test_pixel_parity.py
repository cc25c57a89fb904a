"""What arrives in a batch, normalised by ``sequence.pixels``, is what the stock processors give."""

import numpy as np
import pytest
import torch

from spatialvlm.data.media.plan import MediaPolicy, plan_media
from spatialvlm.data.media.store import MediaStore
from spatialvlm.data.prepare import load_pixels
from spatialvlm.data.sample import MediaRef, Sample, Turn
from spatialvlm.data.template import load_processor
from spatialvlm.models.backbones import adapter_of, require_config
from spatialvlm.models.build import build_layout
from spatialvlm.sequence.pixels import PixelSpec, prepare

IMAGES = [
    "qwen3vl_spatial_understanding/lounge.jpg",
    "g2vlm_arkit_47333851/47333851_74735.839.jpg",
    "vlm3r_arkit_47334096/frame_00003.jpg",
    "qwen3vl_finetune/demo/images/10095.png",
    "qwen3vl_finetune/demo/images/COCO_train2014_000000580957.jpg",
    *(f"sensenova_si/examples/Q{n}.png" for n in (6, 7, 15, 16, 17, 18)),
    *(f"sensenova_si/examples/Q{n}.jpg" for n in ("8_1", "8_2", "8_3", "8_4", 10, 11)),
]
VIDEO = "qwen3vl_finetune/demo/videos/v_rBMQFpHspmo.mp4"


@pytest.fixture(scope="module", params=["qwen2_5vl", "qwen3vl", "internvl3"])
def kit(request, tiny_checkpoint, real_dir):
    folder = tiny_checkpoint(request.param)
    processor = load_processor(folder)
    image = processor.image_processor
    spec = PixelSpec(
        "frames" if request.param == "internvl3" else "patches",
        tuple(image.image_mean), tuple(image.image_std), getattr(image, "patch_size", 14),
    )  # fmt: skip
    return (
        MediaStore(real_dir),
        MediaPolicy.from_processor(processor),
        build_layout(folder),
        processor,
        spec,
    )


def ours(kit, ref):
    store, policy, layout, _, spec = kit
    info = plan_media(ref, store.header(ref), policy)
    sample = Sample("s", "s", "f", (Turn("user", (0, "q")),), (ref,))
    (pixels,) = load_pixels(sample, [info], store, layout)
    flat = torch.from_numpy(pixels.frames.reshape(-1))
    return prepare(flat, [pixels.frames.shape[:3]], [pixels.grid[0]], spec), info


@pytest.mark.real
@pytest.mark.parametrize("path", IMAGES)
def test_images(kit, path):
    ref = MediaRef("image", "file", path)
    values, info = ours(kit, ref)
    theirs = kit[3].image_processor(images=[kit[0].load(ref)[0]], return_tensors="pt")
    assert (values - theirs["pixel_values"]).abs().max() <= 1e-6
    if "image_grid_thw" in theirs:
        assert theirs["image_grid_thw"][0].tolist() == list(info.grid)


@pytest.mark.real
@pytest.mark.parametrize("count", [1, 2, 7, 8])
def test_videos(kit, count):
    store, _, layout, processor, _ = kit
    frames = tuple(int(i) for i in np.linspace(0, 433, count))
    ref = MediaRef("video", "file", VIDEO, frames=frames)
    values, info = ours(kit, ref)
    source = store.load(ref)
    if count == 1 and layout.family == "qwen3vl":  # the stock processor refuses a single frame
        source = np.repeat(source, 2, axis=0)
    theirs = processor.video_processor(videos=[source], do_sample_frames=False, return_tensors="pt")
    expected = theirs["pixel_values_videos"]
    expected = expected[0] if expected.ndim == 5 else expected
    assert (values - expected).abs().max() <= 1e-6
    if "video_grid_thw" in theirs:
        assert theirs["video_grid_thw"][0].tolist() == list(info.grid)


@pytest.mark.real
def test_video_header_of_a_real_file(kit):
    header = kit[0].header(MediaRef("video", "file", VIDEO))
    assert header.num_frames == 434
    assert header.size == (224, 398)
    assert header.fps == pytest.approx(3.0)


def test_specs_are_the_models_own(kit, tiny_checkpoint, request):
    """The numbers used here are the ones the model reads from its checkpoint."""
    family = request.node.callspec.params["kit"]
    adapter = adapter_of(require_config(tiny_checkpoint(family))["model_type"])
    assert adapter.family == family
