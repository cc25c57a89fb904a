"""With the geometry branch off, every fixture row becomes exactly the ids of the stock processor."""

import numpy as np
import pytest

from spatialvlm.data.encode import encode
from spatialvlm.data.formats import SourceAttrs
from spatialvlm.data.media.plan import MediaPolicy
from spatialvlm.data.media.store import MediaStore
from spatialvlm.data.prepare import plan_sample_media
from spatialvlm.data.sources import Source
from spatialvlm.data.template import ChatTemplate, load_processor
from spatialvlm.errors import DataError, MediaError
from spatialvlm.models.build import build_layout

FILES = [
    "llava_sharegpt.json", "sensenova_si.jsonl", "openai_messages.jsonl", "openspatial.parquet", "vst.parquet",
    "llava_onevision.parquet", "vsi590k.jsonl", "vlm3r.json", "vica.json", "llava_video.json", "qwen_finetune.json",
    "spar.jsonl", "spar_vgllm.jsonl",
]  # fmt: skip


ABSENT = {"fixture/vlm3r#1", "fixture/vica#1"}  # evaluation scenes, there to test the block lists


@pytest.fixture(scope="module", params=["qwen2_5vl", "qwen3vl", "internvl3"])
def kit(request, tiny_checkpoint):
    folder = tiny_checkpoint(request.param)
    processor = load_processor(folder)
    policy = MediaPolicy.from_processor(processor).with_budget(num_frames=6)
    return processor, policy, ChatTemplate.from_checkpoint(folder), build_layout(folder)


def stock_ids(processor, template, sample, infos, store):
    text = template.render(sample.turns, [ref.kind for ref in sample.media])
    images = [store.load(info.ref)[0] for info in infos if info.ref.kind == "image"]
    videos = [info for info in infos if info.ref.kind == "video"]
    options = {"images": images} if images else {}
    if videos:
        options["videos"] = [store.load(info.ref) for info in videos]
        options["video_metadata"] = [
            {
                "total_num_frames": info.header.num_frames,
                # the processor announces index / fps; folders of frames have times of their own
                "fps": 1.0,
                "frames_indices": list(info.times_s),
                "duration": 1.0,
            }
            for info in videos
        ]
        options["do_sample_frames"] = False
    if template.family == "internvl3":
        options["crop_to_patches"] = False
    return processor(text=[text], return_tensors="pt", **options)["input_ids"][0].tolist()


@pytest.mark.real
@pytest.mark.parametrize("name", FILES)
def test_ids(kit, name, real_dir, tmp_path):
    processor, policy, template, layout = kit
    attrs = SourceAttrs(name="fixture", family="spatial", base="formats")
    source = Source(attrs, files=[f"formats/{name}"], root=real_dir, cache_dir=tmp_path)
    store = MediaStore(real_dir, read_bytes=source.media_bytes)
    compared = 0
    for _, samples in source.scan(0):
        assert not isinstance(samples, DataError), samples
        for sample in samples:
            if sample.uid in ABSENT:
                with pytest.raises(MediaError, match="no such"):
                    plan_sample_media(sample, store, policy, layout)
                continue
            infos = plan_sample_media(sample, store, policy, layout)
            ours = encode(sample, infos, template, layout)
            assert ours.input_ids.tolist() == stock_ids(
                processor, template, sample, infos, store
            ), sample.uid
            supervised = ours.labels != -100
            assert template.decode(ours.labels[supervised]) == "".join(
                turn.text + "<|im_end|>" for turn in sample.turns if turn.role == "assistant"
            )
            assert np.all(ours.token_kind[supervised] == 0)
            compared += 1
    assert compared > 0
