"""tools/cache_geometry.py fills exactly the entries that training asks for."""

import importlib.util
import json
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from spatialvlm.config import TrainConfig, load_config

SIZE = 64


def load_tool(root):
    spec = importlib.util.spec_from_file_location(
        "cache_geometry", root / "tools/cache_geometry.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["cache_geometry"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tool(data_dir):
    return load_tool(data_dir.parents[1])


@pytest.fixture
def recipe(tmp_path, tiny_checkpoint, tiny_vggt):
    """Two questions on one video, one on another, an image without geometry, a video that is missing."""
    generator = np.random.default_rng(0)
    for clip in ("a", "b"):
        (tmp_path / "clips" / clip).mkdir(parents=True)
        for frame in range(3):
            pixels = generator.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "clips" / clip / f"{frame}.png")
    Image.new("RGB", (SIZE, SIZE)).save(tmp_path / "one.png")

    def row(question, **media):
        marker = "<image>" if "images" in media else "<video>"
        turns = [
            {"role": "user", "content": f"{marker}\n{question}"},
            {"role": "assistant", "content": "a lamp"},
        ]
        return json.dumps({"messages": turns, **media})

    rows = [
        row("What?", videos=["clips/a"]),
        row("Where?", videos=["clips/a"]),
        row("What?", images=["one.png"]),
        row("What?", videos=["clips/b"]),
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    content = {
        "stage": 2,
        "run": {"dir": str(tmp_path / "run")},
        "model": {"backbone": "tiny_qwen3vl", "init_from": str(tiny_checkpoint("qwen3vl"))},
        "precision": "fp32",
        "optim": {"lr": 1e-3, "geometry_lr": 1e-3},
        "geometry": {
            "source": str(tiny_vggt),
            "layers": [-1],
            "size_policy": "match_grid",
            "cache": {"dir": str(tmp_path / "cache")},
        },
        "data": {
            "length": {"steps": 1},
            "families": {"spatial": 1},
            "index_dir": str(tmp_path / "index"),
            "sources": [
                {
                    "name": "clips",
                    "family": "spatial",
                    "format": "messages",
                    "files": ["rows.jsonl"],
                    "root": str(tmp_path),
                }
            ],
        },
        "step": {"global_batch_size": 4},
        "packing": {"max_tokens": 4096},
        "loader": {"num_workers": 0},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def run(tool, monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["cache_geometry.py", *map(str, arguments)])
    code = tool.main()
    return code, capsys.readouterr()


def test_every_video_once_and_training_finds_them(tool, recipe, tmp_path, monkeypatch, capsys):
    code, out = run(tool, monkeypatch, capsys, recipe)
    assert (code, out.out) == (
        0,
        "2 groups of frames: 2 computed, 0 found, 0 damaged, 0 evicted; 0 rows skipped\n",
    )
    code, out = run(tool, monkeypatch, capsys, recipe)
    assert "0 computed, 2 found" in out.out

    from spatialvlm.data.build import build_data
    from spatialvlm.data.sample import World
    from spatialvlm.models.build import build_layout, build_model
    from spatialvlm.typing import CostCoefficients

    config = load_config(recipe, [], TrainConfig)
    layout = build_layout(config.model.init_from, config.geometry)
    loader = build_data(
        config, config.model.init_from, layout, CostCoefficients(1, 0, 0, 0, 0), World(0, 1)
    )
    batches = next(iter(loader)).batches
    losses = {}
    for name, overrides in {"cached": [], "plain": ["geometry.cache.dir=null"]}.items():
        section = load_config(recipe, overrides, TrainConfig).geometry
        torch.manual_seed(0)
        model = build_model(config.model.init_from, section.model_copy(update={"init": "scratch"}))
        encoder = model.geometry.encoder
        with torch.no_grad():
            losses[name] = [model(batch).loss_sum.item() for batch in batches]
        if name == "cached":
            keys = {key for batch in batches for key in batch.get("geometry_keys", [])}
            assert encoder.stats.hits == len(keys) > 0
            assert encoder.stats.misses == 0
    assert losses["cached"] == losses["plain"]


def test_shards_share_the_work(tool, recipe, monkeypatch, capsys):
    for shard in ("0/2", "1/2"):
        _, out = run(tool, monkeypatch, capsys, recipe, "--shard", shard)
        assert out.out.startswith("1 groups of frames: 1 computed")
    _, out = run(tool, monkeypatch, capsys, recipe)
    assert out.out.startswith("2 groups of frames: 0 computed, 2 found")


def test_a_broken_video_is_skipped_and_counted(tool, recipe, tmp_path, monkeypatch, capsys):
    (tmp_path / "clips" / "b" / "1.png").write_bytes(b"not an image")
    code, out = run(tool, monkeypatch, capsys, recipe)
    assert code == 0
    assert out.out.startswith("1 groups of frames: 1 computed")
    assert out.out.endswith("1 rows skipped\n")


@pytest.mark.slow
def test_worker_processes(tool, recipe, data_dir):
    import subprocess

    root = data_dir.parents[1]
    command = [sys.executable, root / "tools/cache_geometry.py", recipe, "--workers", "2"]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root).stdout
    assert out.startswith("2 groups of frames: 2 computed")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("geometry.cache.dir=null", "geometry.cache.dir is not set"),
        ("geometry.cache.dri=x", "did you mean 'dir'"),
    ],
)
def test_recipes_without_a_cache(tool, recipe, monkeypatch, capsys, override, message):
    code, out = run(tool, monkeypatch, capsys, recipe, override)
    assert code == 2
    assert message in out.err


def test_bad_shard(tool, recipe, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(tool, monkeypatch, capsys, recipe, "--shard", "2/2")
    assert "need i/n with i < n" in capsys.readouterr().err
