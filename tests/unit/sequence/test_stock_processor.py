"""With the branch off, ids equal those of the stock processors, for images, several images and videos."""

import re

import numpy as np
import pytest
from PIL import Image

from spatialvlm.sequence.layout import MediaItem

FAMILIES = ["qwen2_5vl", "qwen3vl", "internvl3"]
PLACEHOLDER = {
    "qwen2_5vl": r"<\|image_pad\|>|<\|video_pad\|>",
    "qwen3vl": r"<\|image_pad\|>|<\|video_pad\|>",
    "internvl3": r"<IMG_CONTEXT>|<video>",
}
FPS = 2.0


@pytest.fixture(scope="module", params=FAMILIES)
def kit(request, tiny_checkpoint):
    from transformers import AutoProcessor

    from spatialvlm.models.build import build_layout

    folder = tiny_checkpoint(request.param)
    return request.param, AutoProcessor.from_pretrained(folder), build_layout(folder)


def images(count):
    generator = np.random.default_rng(count)
    sizes = [(128, 128), (96, 160), (160, 128)][:count]
    return [
        Image.fromarray(generator.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in sizes
    ]


def stock(processor, text, pictures, clips):
    kwargs = {}
    if clips:
        kwargs = {
            "videos": clips,
            "video_metadata": [
                {
                    "total_num_frames": len(clip),
                    "fps": FPS,
                    "frames_indices": list(range(len(clip))),
                    "height": 128,
                    "width": 128,
                    "duration": len(clip) / FPS,
                    "video_backend": "numpy",
                }
                for clip in clips
            ],
            "do_sample_frames": False,
        }
    return processor(text=[text], images=pictures or None, return_tensors="pt", **kwargs)


def message(parts):
    return [{"role": "user", "content": parts}]


CASES = {
    "one image": ([{"type": "image"}, {"type": "text", "text": "What?"}], 1, []),
    "three images": (
        [{"type": "image"}] * 2 + [{"type": "text", "text": " and "}, {"type": "image"}],
        3,
        [],
    ),
    "video": ([{"type": "video"}, {"type": "text", "text": "What?"}], 0, [4]),
    "odd video": ([{"type": "video"}, {"type": "text", "text": "What?"}], 0, [5]),
    "one frame": ([{"type": "video"}, {"type": "text", "text": "What?"}], 0, [1]),
    "image and video": (
        [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "Which?"}],
        1,
        [4],
    ),
    "text only": ([{"type": "text", "text": "Hello"}], 0, []),
}


@pytest.mark.parametrize("case", CASES)
def test_ids_equal_the_stock_processor(kit, case):
    family, processor, layout = kit
    parts, num_images, clip_lengths = CASES[case]
    pictures = images(num_images)
    generator = np.random.default_rng(0)
    clips = [
        generator.integers(0, 256, (length, 128, 128, 3), dtype=np.uint8) for length in clip_lengths
    ]
    text = processor.apply_chat_template(message(parts), add_generation_prompt=True)
    if (family, case) == ("qwen3vl", "one frame"):  # the stock processor has no answer here
        with pytest.raises(ValueError, match="temporal_factor"):
            stock(processor, text, pictures, clips)
        return
    expected = stock(processor, text, pictures, clips)

    def encode(piece):
        ids = processor.tokenizer(piece, add_special_tokens=False)["input_ids"]
        return np.array(ids, dtype=np.int64)

    items = {"image": iter([]), "video": iter([])}
    if family == "internvl3":
        side = expected["pixel_values"].shape[-1] // 14 if "pixel_values" in expected else 0
        tiles = iter(_tiles(expected, num_images, clip_lengths))
        items["image"] = (MediaItem("image", (n, side, side)) for n in tiles)
        items["video"] = (MediaItem("video", (n, side, side)) for n in clip_lengths)
    else:
        grids = expected.get("image_grid_thw")
        items["image"] = (
            MediaItem("image", tuple(grid)) for grid in ([] if grids is None else grids.tolist())
        )
        grids = expected.get("video_grid_thw")
        items["video"] = (
            MediaItem("video", tuple(grid), tuple(i / FPS for i in range(length)))
            for grid, length in zip(
                [] if grids is None else grids.tolist(), clip_lengths, strict=True
            )
        )
    pieces = []
    for piece in re.split(f"({PLACEHOLDER[family]})", text):
        if re.fullmatch(PLACEHOLDER[family], piece):
            pieces.append(next(items["video" if "video" in piece else "image"]))
        else:
            pieces.append(encode(piece))
    ours = layout.expand(pieces, encode).input_ids
    assert ours.tolist() == expected["input_ids"][0].tolist()


def _tiles(expected, num_images, clip_lengths):
    """Tiles of every image: all tiles that are no video frames, shared out by the test's own sizes."""
    if not num_images:
        return []
    total = len(expected["pixel_values"]) - sum(clip_lengths)
    if num_images == 1:
        return [total]
    context = expected["input_ids"][0].tolist()
    runs, last = [], None
    image_id = max(set(context), key=context.count)
    for token in context:
        if token == image_id:
            runs = [*runs, 1] if last != image_id else [*runs[:-1], runs[-1] + 1]
        last = token
    per_tile = sum(runs) // total
    return [run // per_tile for run in runs]
