"""Shared prefixes with a geometry branch on two processes, DDP and ZeRO-1/2/3: the gradient of separate samples."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

WORKER = Path(__file__).with_name("gradient_worker.py")


@pytest.fixture(scope="module")
def results(toy_data, tiny_checkpoint, tiny_vggt, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    recipe = {
        "stage": 2,
        "run": {"dir": str(folder / "run")},
        "model": {"backbone": "tiny_qwen3vl", "init_from": str(tiny_checkpoint("qwen3vl"))},
        "precision": "fp32",
        "optim": dict.fromkeys(
            ("lr", "vision_lr", "projector_lr", "embedding_lr", "geometry_lr"), 1.0e-3
        ),
        "geometry": {
            "source": str(tiny_vggt),
            "precision": "fp32",
            "layers": [-1],
            "size_policy": "match_grid",
        },
        "data": {
            "sources": [
                {"name": name, "family": name, "files": [f"{name}.jsonl"], "root": str(toy_data)}
                for name in ("spatial", "general")
            ],
            "index_dir": str(folder / "index"),
            "media": {"num_frames": 3},
        },
        "step": {"global_batch_size": 24},
        "packing": {"max_tokens": 400},
        "shared_prefix": {"max_branches": 4},
        "loader": {"num_workers": 0},
    }
    path, out = folder / "recipe.yaml", folder / "result.json"
    path.write_text(yaml.safe_dump(recipe))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launch, str(WORKER), str(path), str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.smoke
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3"])
def test_sharded_shared_prefixes_equal_separate_samples(results, strategy):
    found = results[strategy]
    assert found["branches"] >= 4
    assert found["micro_steps"] >= 2
    assert found["missing"] == []
    assert found["loss"] < 1e-5
    assert found["gradient"] < 1e-5
