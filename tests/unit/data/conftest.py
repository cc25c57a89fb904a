"""A small mixed data set on disk, and the data path built over it."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from spatialvlm.config.data import (
    DataConfig,
    LoaderConfig,
    PackingConfig,
    SharedPrefixConfig,
    StepConfig,
)


def _picture(path, seed, size=(96, 120)):
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(small).resize(size[::-1], Image.Resampling.BICUBIC).save(path)


def _row(question, answer, *, images=(), video=None, **extra):
    row = {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ],
        **extra,
    }
    if images:
        row["images"] = list(images)
    if video:
        row["videos"] = [video]
    return row


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory):
    """Folder with ``spatial.jsonl`` (5 questions on each of 6 media) and ``general.jsonl`` (text and images)."""
    root = tmp_path_factory.mktemp("toy")
    spatial = []
    for scene in range(6):
        for view in range(3):
            _picture(root / f"s{scene}" / f"v{view}_{view}.5.png", 10 * scene + view)
        for q in range(5):
            text, answer = f"question {q} about scene {scene}, where is the box?", "left " * (1 + q)
            if scene < 2:
                row = _row(f"<image>\n{text}", answer, images=[f"s{scene}/v0_0.5.png"])
            elif scene < 4:
                images = [f"s{scene}/v{v}_{v}.5.png" for v in range(2)]
                row = _row(f"<image><image>{text}", answer, images=images)
            else:
                row = _row(f"<video>{text}", answer, video=f"s{scene}")
            spatial.append(row)
    general = [
        _row(f"tell me about thing {i} " * (1 + i % 5), f"thing {i} is good") for i in range(12)
    ]
    _picture(root / "g.png", 99, (150, 90))
    general += [_row(f"<image>What colour is part {i}?", "red", images=["g.png"]) for i in range(2)]
    for name, rows in [("spatial", spatial), ("general", general)]:
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture
def toy_config(toy_data, tmp_path):
    """Function overrides -> the data sections of a recipe over the toy data."""

    def make(*, geometry=None, data=None, step=None, packing=None, shared_prefix=None, loader=None, sources=None,
             source_options=None):  # fmt: skip
        spatial = {
            "name": "sp",
            "family": "spatial",
            "files": ["spatial.jsonl"],
            "root": str(toy_data),
        }
        default = [
            {**spatial, **(source_options or {})},
            {"name": "ge", "family": "general", "files": ["general.jsonl"], "root": str(toy_data)},
        ]
        data = {"index_dir": str(tmp_path / "index"), **(data or {})}
        media = {"num_frames": 3, **data.pop("media", {})}
        return SimpleNamespace(
            data=DataConfig(sources=sources or default, media=media, **data),
            step=StepConfig(**{"global_batch_size": 12, **(step or {})}),
            packing=PackingConfig(**{"max_tokens": 700, **(packing or {})}),
            shared_prefix=SharedPrefixConfig(**{"max_branches": 4, **(shared_prefix or {})}),
            loader=LoaderConfig(**{"num_workers": 0, **(loader or {})}),
            geometry=geometry,
            run=SimpleNamespace(dir=str(tmp_path)),
        )

    return make
