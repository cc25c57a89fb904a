"""Prompts equal the beginning of training samples, in groups or alone."""

import pytest
import torch

from spatialvlm.data.encode import encode
from spatialvlm.data.media.plan import MediaPolicy
from spatialvlm.data.media.store import MediaStore
from spatialvlm.data.prepare import plan_sample_media
from spatialvlm.data.prompts import encode_prompt_group
from spatialvlm.data.sample import MediaRef, Sample, Turn
from spatialvlm.data.template import ChatTemplate, load_processor
from spatialvlm.errors import DataError, MarkError
from spatialvlm.models.build import build_layout
from spatialvlm.typing import MarkSpec


@pytest.fixture(scope="module", params=["qwen2_5vl", "qwen3vl", "internvl3"])
def kit(request, tiny_checkpoint, toy_data):
    folder = tiny_checkpoint(request.param)
    policy = MediaPolicy.from_processor(load_processor(folder)).with_budget(num_frames=3)
    return MediaStore(toy_data), policy, ChatTemplate.from_checkpoint(folder), build_layout(folder)


VIDEO = MediaRef("video", "frames", "s4")


def questions(count, media=VIDEO, **fields):
    return [
        Sample(
            f"q{i}",
            "s",
            "f",
            (Turn("user", (0, f"question {i}?")), Turn("assistant", ("ref",))),
            (media,),
            **fields,
        )
        for i in range(count)
    ]


def test_group_is_the_beginning_of_training(kit):
    store, policy, template, layout = kit
    samples = questions(3)
    batch = encode_prompt_group(samples, store, policy, template, layout)
    assert batch["segment_parent"].tolist() == [-1, 0, 0, 0]
    prefix = int(batch["segment_len"][0])
    for i, sample in enumerate(samples):
        whole = encode(sample, plan_sample_media(sample, store, policy, layout), template, layout)
        answer = int((whole.labels != -100).argmax())
        start, size = int(batch["segment_start"][i + 1]), int(batch["segment_len"][i + 1])
        ids = (
            batch["input_ids"][0, :prefix].tolist()
            + batch["input_ids"][0, start : start + size].tolist()
        )
        assert ids == whole.input_ids[:answer].tolist()
        positions = batch["position_ids"].reshape(layout.num_position_rows, -1)[
            :, start : start + size
        ]
        assert positions.tolist() == whole.position_ids[:, prefix:answer].tolist()
    assert (batch["labels"] == -100).all()
    assert len(batch["media_kind"]) == 1


def test_single_and_text_only(kit):
    store, policy, template, layout = kit
    alone = encode_prompt_group(questions(1), store, policy, template, layout)
    assert alone["segment_parent"].tolist() == [-1]
    texts = [Sample(f"t{i}", "s", "f", (Turn("user", (f"hi {i}",)),)) for i in range(2)]
    batch = encode_prompt_group(texts, store, policy, template, layout)
    assert batch["segment_parent"].tolist() == [-1, -1]
    assert batch["frames_u8"].numel() == 0


def test_refusals(kit):
    store, policy, template, layout = kit
    a, b = questions(2)
    other = questions(1, MediaRef("video", "frames", "s5"))[0]
    with pytest.raises(DataError, match="different media"):
        encode_prompt_group([a, other], store, policy, template, layout)
    later = Sample("l", "s", "f", (Turn("user", ("first text ", 0, "q")),), a.media)
    with pytest.raises(DataError, match="before the end of their media"):
        encode_prompt_group([b, later], store, policy, template, layout)
    with pytest.raises(DataError, match="tokens, more than 5"):
        encode_prompt_group([a], store, policy, template, layout, max_length=5)


def test_marks_are_drawn_on_the_named_frame(kit):
    store, policy, template, layout = kit

    def paint(image, marks, *, stored_size):
        assert stored_size == (120, 96)
        image.paste((255, 0, 0), (0, 0, image.width, image.height))
        return image

    mark = MarkSpec(image=1, kind="box", color="red", bbox=(1, 1, 5, 5))
    marked = questions(2, marks=(mark,))
    with pytest.raises(MarkError, match="no draw_marks hook"):
        encode_prompt_group(marked, store, policy, template, layout)
    batch = encode_prompt_group(marked, store, policy, template, layout, draw_marks=paint)
    plain = encode_prompt_group(questions(2), store, policy, template, layout)
    frames = batch["frames_u8"].view(3, -1, 3)
    assert torch.equal(frames[[0, 2]], plain["frames_u8"].view(3, -1, 3)[[0, 2]])
    assert (frames[1] == torch.tensor([255, 0, 0], dtype=torch.uint8)).all()
