"""Small image-question data, tiny checkpoints, and a way to run the shipped recipes as a user does."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (40, 60, 220),
    "yellow": (230, 210, 40),
}


def write_rows(folder: Path, *, num: int = 24) -> Path:
    """Squares on grey ground: where they are (spatial), which colour they have and text turns (general)."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    spatial, general = [], []
    for i in range(num):
        image = np.full((112, 112, 3), 128, np.uint8)
        name = list(COLOURS)[int(draw.integers(4))]
        x, y = int(draw.integers(0, 72)), int(draw.integers(0, 72))
        image[y : y + 40, x : x + 40] = COLOURS[name]
        Image.fromarray(image).save(folder / f"{i:03d}.png")
        side = "left" if x < 36 else "right"
        height = "top" if y < 36 else "bottom"
        for question, answer in (
            (f"Is the {name} square left or right?", side),
            ("Top or bottom?", height),
        ):
            spatial.append(
                {
                    "id": f"s{len(spatial)}",
                    "type": "side" if answer == side else "height",
                    "messages": [
                        {"role": "user", "content": f"<image>{question}"},
                        {"role": "assistant", "content": answer},
                    ],
                    "images": [f"{i:03d}.png"],
                }
            )
        general.append(
            {
                "messages": [
                    {"role": "user", "content": "<image>Which colour is the square?"},
                    {"role": "assistant", "content": f"It is {name}."},
                ],
                "images": [f"{i:03d}.png"],
            }
        )
        general.append(
            {
                "messages": [
                    {"role": "user", "content": f"What is {i} plus one?"},
                    {"role": "assistant", "content": str(i + 1)},
                ]
            }
        )
    for name, rows in (("spatial", spatial), ("general", general)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def rows(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows"))


def recipe_text(stage: int, family: str, model: Path, data: Path, vggt: Path | None = None) -> str:
    """A complete recipe over :func:`write_rows`."""
    geometry = (
        f"geometry: {{source: {vggt}, precision: fp32, layers: [-1]}}\n" if stage == 2 else ""
    )
    geometry_lr = ", geometry_lr: 1.0e-3" if stage == 2 else ""
    flag = ", geometry: on" if stage == 2 else ""
    return f"""
stage: {stage}
run: {{dir: unset}}
model: {{backbone: tiny_{family}, init_from: {model}}}
precision: fp32
optim: {{lr: 1.0e-3, vision_lr: 1.0e-4, projector_lr: 5.0e-4, embedding_lr: 1.0e-3, weight_decay: 0.01{geometry_lr}}}
{geometry}data:
  length: {{steps: 6}}
  index_dir: {data}/index
  sources:
    - {{name: squares, family: spatial, files: [spatial.jsonl], root: {data}{flag}}}
    - {{name: chat, family: general, files: [general.jsonl], root: {data}}}
step: {{global_batch_size: 8}}
packing: {{max_tokens: 256}}
shared_prefix: {{max_branches: 2}}
memory: {{checkpoint_language_model: false}}
loader: {{num_workers: 0}}
checkpoint: {{every: 3}}
log: {{every: 1, progress: none}}
"""


@pytest.fixture(scope="session")
def recipe(tmp_path_factory, rows, tiny_checkpoint, tiny_vggt):
    """Function (stage, family) -> path of a recipe on small data."""
    folder = tmp_path_factory.mktemp("recipes")

    def make(stage: int, family: str) -> Path:
        path = folder / f"stage{stage}_{family}.yaml"
        path.write_text(recipe_text(stage, family, tiny_checkpoint(family), rows, tiny_vggt))
        return path

    return make


def load_script(stage: int):
    """The shipped recipe as a module."""
    path = ROOT / "recipes" / f"stage{stage}.py"
    spec = importlib.util.spec_from_file_location(f"recipe_stage{stage}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run():
    """Run a recipe in this process, as its command line would; returns the exit code."""
    from spatialvlm.training.entry import run_recipe

    def call(stage: int, *argv: object) -> int:
        module = load_script(stage)
        return run_recipe(
            module.main, module.describe, stage=stage, doc=None, argv=[str(item) for item in argv]
        )

    return call


@pytest.fixture
def environment() -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": str(ROOT),
    }


def run_one(
    stage: int, config: Path, *overrides: str, env: dict[str, str], **kwargs
) -> subprocess.CompletedProcess:
    """The recipe in one plain process."""
    command = [sys.executable, str(ROOT / "recipes" / f"stage{stage}.py"), str(config), *overrides]
    return subprocess.run(
        command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=300, **kwargs
    )


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
