"""How long training stands still while it answers a benchmark, for every way to spread the weights.

    python benchmarks/evaluation_pause.py --out benchmarks/results/evaluation_pause.json

Two processes train a small random Qwen3-VL on a CPU with the shipped recipe and ask questions after every second step.
ZeRO-3 and FSDP2 gather the weights for the pause, so a pause costs no communication per token.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from spatialvlm.testing import make_checkpoint

ROOT = Path(__file__).resolve().parents[1]
ENGINES = {
    "ddp": ("cpu2_ddp", ()),
    "zero2": ("cpu2_zero2", ()),
    "zero3": ("cpu2_zero3", ()),
    "fsdp2": ("cpu2_ddp", ("parallel.strategy=fsdp2",)),
}
RECIPE = """
stage: 1
run: {{dir: unset}}
model: {{backbone: tiny_qwen3vl, init_from: {model}}}
precision: fp32
optim: {{lr: 1.0e-3, weight_decay: 0.01}}
data:
  length: {{steps: 6}}
  index_dir: {root}/index
  families: {{spatial: 1, general: 0}}
  sources: [{{name: rows, family: spatial, files: [rows.jsonl], root: {root}}}]
step: {{global_batch_size: 32}}
packing: {{max_tokens: 1024}}
memory: {{checkpoint_language_model: false}}
loader: {{num_workers: 0}}
log: {{every: 1, progress: none}}
evaluation:
  every_steps: 2
  benchmarks: [spatialvlm_rows]
  files: {{spatialvlm_rows: {root}/rows.jsonl}}
  media_root: {{spatialvlm_rows: {root}}}
"""


def write_rows(root: Path, pictures: int) -> None:
    """Four questions about every picture, in the form of the data engine."""
    rng = np.random.default_rng(0)
    lines = []
    for number in range(pictures):
        Image.fromarray(rng.integers(0, 255, (128, 128, 3), dtype=np.uint8)).save(
            root / f"{number}.png"
        )
        lines += [
            {
                "id": f"q{number}_{question}",
                "messages": [
                    {"role": "user", "content": f"<image>\nIs object {question} red?"},
                    {"role": "assistant", "content": "Yes"},
                ],
                "images": [f"{number}.png"],
                "media_kind": "images",
                "task": "colour",
                "answer_type": "yesno",
                "answer_json": "true",
                "options": [],
                "scene_id": f"s{number}",
                "evidence": "{}",
                "marks": "[]",
            }
            for question in range(4)
        ]
    (root / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def measure(engine: str, root: Path, recipe: Path) -> dict[str, Any]:
    """Seconds per step and per pause of one run; the first step and the first pause warm up."""
    file, overrides = ENGINES[engine]
    folder = root.parent / engine
    command = [str(Path(sys.executable).with_name("accelerate")), "launch", "--config_file"]
    command += [f"configs/accelerate/{file}.yaml", "recipes/stage1.py", str(recipe)]
    environment = {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "DS_ACCELERATOR": "cpu",
        **os.environ,
    }
    done = subprocess.run(
        [*command, f"run.dir={folder}", *overrides],
        cwd=ROOT,
        env=environment,
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{engine}: {done.stdout[-2000:]}{done.stderr[:2000]}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step_s"] for line in lines if "step_s" in line][1:]
    pauses = [line["evaluation/pause_s"] for line in lines if "evaluation/pause_s" in line]
    answers = (folder / "eval/step_00000002/spatialvlm_rows/predictions.jsonl").read_text()
    tokens = sum(json.loads(line)["num_new_tokens"] for line in answers.splitlines())
    return {
        "step_s": round(statistics.median(steps), 3),
        "pause_s": round(statistics.median(pauses[1:]), 3),
        "first_pause_s": round(pauses[0], 3),
        "questions": len(answers.splitlines()),
        "new_tokens": tokens,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=16, help="four questions each")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "data"
        root.mkdir()
        write_rows(root, args.pictures)
        model = make_checkpoint("qwen3vl", root / "model")
        recipe = root / "recipe.yaml"
        recipe.write_text(RECIPE.format(model=model, root=root))
        rows = {engine: measure(engine, root, recipe) for engine in args.engines}
    result = {
        "model": "random Qwen3-VL, tiny",
        "processes": 2,
        "device": "cpu, gloo",
        "engines": rows,
    }
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
