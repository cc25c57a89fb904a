"""Evaluation asks exactly as training teaches: the same tokens, positions and pixels up to the answer."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from spatialvlm.config.training import LoraConfig
from spatialvlm.data.encode import encode
from spatialvlm.data.formats import FORMATS, read_row
from spatialvlm.data.formats.base import SourceAttrs
from spatialvlm.data.media.plan import MediaPolicy
from spatialvlm.data.media.store import MediaStore
from spatialvlm.data.prepare import load_pixels, plan_sample_media
from spatialvlm.data.template import ChatTemplate, load_processor
from spatialvlm.evaluation.model_generator import PackGenerator
from spatialvlm.evaluation.prompts import build_messages
from spatialvlm.evaluation.registry import load_benchmark
from spatialvlm.evaluation.subject import Subject
from spatialvlm.models.build import build_layout
from spatialvlm.models.lora import adapter_tensors, save_adapters
from spatialvlm.testing.rig import Rig


def row(number, images, media_kind, question, answer, **fields):
    marker = {"images": "<image>\n" * len(images), "video": "<video>\n"}[media_kind]
    return {
        "id": f"r{number}",
        "gen_version": "1",
        "messages": [
            {"role": "user", "content": f"{marker}{question}"},
            {"role": "assistant", "content": answer},
        ],
        "media_kind": media_kind,
        "images": images,
        "frames_pinned": True,
        "task": f"task{number}",
        "form": "YN",
        "answer_type": "yesno",
        "answer_json": "true",
        "answer_text": "Yes",
        "options": [],
        "scene_id": "s0",
        "evidence": "{}",
        "marks": "[]",
        **fields,
    }


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    rng = np.random.default_rng(0)
    (folder / "clip").mkdir()
    for name in ("a.png", "b.png", *(f"clip/{i:03d}.png" for i in range(4))):
        Image.fromarray(rng.integers(0, 255, (96, 128, 3), dtype=np.uint8)).save(folder / name)
    mark = [{"image": 1, "kind": "box", "color": "red", "bbox": [10, 10, 60, 60]}]
    data = [
        row(0, ["a.png"], "images", "Left?", "Yes"),
        row(1, ["a.png", "b.png"], "images", "Is it the red box?", "Yes", marks=json.dumps(mark)),
        row(
            2,
            [f"clip/{i:03d}.png" for i in range(4)],
            "video",
            "Which first?",
            "Yes",
            frame_times_s=[0.0, 0.7, 1.4, 2.1],
        ),
    ]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in data))
    return path, data


def paint(image, marks, *, stored_size=None):
    """A mark hook that anyone can see."""
    return Image.new("RGB", image.size, marks[0].color)


@pytest.mark.parametrize("family", ["qwen3vl", "qwen2_5vl", "internvl3"])
def test_prompts_equal_training_samples(family, rows, tiny_checkpoint):
    path, data = rows
    folder = tiny_checkpoint(family)
    layout = build_layout(folder)
    template = ChatTemplate.from_checkpoint(folder)
    policy = MediaPolicy.from_processor(load_processor(folder)).with_budget(temporal=layout.tau)
    benchmark = load_benchmark("spatialvlm_rows", path)
    generator = PackGenerator(
        lambda packs, count: [], template, layout, policy, root=path.parent, draw_marks=paint
    )
    store = MediaStore(path.parent)
    attrs = SourceAttrs("rows", "spatial")
    for item, source in zip(benchmark.items, data, strict=True):
        (trained,) = read_row(source, FORMATS["spatialvlm_rows"], attrs)
        infos = plan_sample_media(trained, store, policy, layout)
        encoded = encode(trained, infos, template, layout)
        pixels = load_pixels(trained, infos, store, layout, paint)
        answer = int(np.flatnonzero(encoded.labels >= 0)[0])

        pack = generator.prepare([build_messages(item, benchmark.spec, root=path.parent)])
        assert pack["input_ids"][0].tolist() == encoded.input_ids[:answer].tolist()
        positions = np.asarray(pack["position_ids"]).reshape(len(encoded.position_ids), -1)
        assert (positions == encoded.position_ids[:, :answer]).all()
        frames = np.concatenate([medium.frames.ravel() for medium in pixels])
        assert (np.asarray(pack["frames_u8"]) == frames).all()


def test_blank_media_keep_their_sizes(rows, tiny_checkpoint, tmp_path):
    path, _ = rows
    folder = tiny_checkpoint("qwen3vl")
    layout = build_layout(folder)
    policy = MediaPolicy.from_processor(load_processor(folder)).with_budget(temporal=layout.tau)
    benchmark = load_benchmark("spatialvlm_rows", path)
    generator = PackGenerator(
        lambda packs, count: [],
        ChatTemplate.from_checkpoint(folder),
        layout,
        policy,
        root=path.parent,
        draw_marks=paint,
        scratch=tmp_path,
    )
    for item in benchmark.items:
        real, blank = (
            generator.prepare([build_messages(item, benchmark.spec, media=mode, root=path.parent)])
            for mode in ("real", "blank")
        )
        assert (real["frame_shapes"] == blank["frame_shapes"]).all()
        assert set(np.unique(blank["frames_u8"])) == {128}


def test_adapters_bring_the_fusion_that_was_trained_with_them(tiny_checkpoint, tiny_vggt, tmp_path):
    """A stage-2 run with adapters on a 2D base, saved alone and merged: the same prompts, the same tokens."""
    base, lora = tiny_checkpoint("qwen3vl"), LoraConfig(r=4, alpha=32.0)
    bench = Rig.load("qwen3vl", base, vggt=tiny_vggt, geometry={}, lora=lora)
    fresh = {name: x.clone() for name, x in bench.model.fusion.state_dict().items()}
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for x in [*adapter_tensors(bench.model).values(), *bench.model.fusion.parameters()]:
            x += 0.1 * torch.randn(x.shape, generator=noise)
    save_adapters(bench.model, tmp_path / "adapters")
    bench.model.save_pretrained(tmp_path / "merged")
    pack = bench.pack(prompts=True)
    found = [Subject(tmp_path / name).complete([pack], 6) for name in ("adapters", "merged")]
    assert found[0] == found[1]
    subject = Subject(tmp_path / "adapters")
    assert subject.layout.spatial_id is not None
    subject.model.fusion.load_state_dict(fresh)
    assert subject.complete([pack], 6) != found[0]  # the fusion matters
