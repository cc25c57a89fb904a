r"""Run the lmms-eval adapter for real, offline, on a small random model.

    python -m venv .venv-lmms && .venv-lmms/bin/pip install -e ".[lmms]"
    .venv-lmms/bin/python tools/check_lmms.py

Writes pictures and rows to a temporary folder, starts ``python -m lmms_eval --model spatialvlm`` on the task
``spatialvlm_jsonl``, and checks that every answer equals the one of this package's own engine.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from spatialvlm.errors import run_command
from spatialvlm.evaluation import lmms_adapter
from spatialvlm.evaluation.generate import GenConfig
from spatialvlm.evaluation.predictions import read_predictions
from spatialvlm.evaluation.prompts import build_messages
from spatialvlm.evaluation.registry import load_benchmark
from spatialvlm.evaluation.subject import Subject
from spatialvlm.testing import make_checkpoint


def write_rows(folder: Path) -> Path:
    """Twelve questions about three pictures."""
    rng = np.random.default_rng(0)
    (folder / "data").mkdir()
    for n in range(3):
        Image.fromarray(rng.integers(0, 255, (96, 96, 3), dtype=np.uint8)).save(folder / f"{n}.png")
    rows = [
        {
            "id": f"q{n}",
            "messages": [
                {"role": "user", "content": f"<image>\nIs object {n} red?"},
                {"role": "assistant", "content": "x"},
            ],
            "images": [f"{n % 3}.png"],
            "media_kind": "images",
            "media_root": str(folder),
            "task": f"task{n % 2}",
            "answer_type": "yesno",
            "answer_json": "true",
            "scene_id": f"s{n % 3}",
            "evidence": "{}",
            "marks": "[]",
        }
        for n in range(12)
    ]
    path = folder / "data" / "lmms.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def main() -> int:
    """Returns 0 when all answers agree."""
    print(lmms_adapter.check())
    tasks = Path(lmms_adapter.__file__).parent / "lmms_tasks"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = write_rows(folder)
        checkpoint = make_checkpoint("qwen3vl", folder / "model")
        command = [
            sys.executable,
            "-m",
            "lmms_eval",
            "--model",
            "spatialvlm",
            "--tasks",
            "spatialvlm_jsonl",
        ]
        command += [
            "--model_args",
            f"checkpoint={checkpoint},dtype=fp32,device=cpu,frames=4",
            "--batch_size",
            "4",
        ]
        command += [
            "--include_path",
            str(tasks),
            "--log_samples",
            "--output_path",
            str(folder / "out"),
        ]
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(folder / "cache"),
        }
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            print(done.stdout[-3000:], done.stderr[-3000:], sep="\n", file=sys.stderr)
            return 1
        written = sorted((folder / "out").rglob("*.json*"))
        if not any("_samples_" in path.name for path in written):
            print(done.stdout[-3000:], done.stderr[-3000:], written, sep="\n", file=sys.stderr)
            return 1
        samples = next((folder / "out").rglob("*_samples_spatialvlm_jsonl.jsonl"))
        theirs, _ = read_predictions(samples, style="lmms")
        bench = load_benchmark("spatialvlm_rows", rows, media_root=folder)
        generator = Subject(checkpoint).generator(folder, frames=4)
        config = GenConfig(bench.spec.max_new_tokens)
        differing = []
        for number, item in enumerate(bench.items):
            pack = generator.prepare([build_messages(item, bench.spec, root=folder)])
            ours = generator.generate([pack], config)[0][0].text
            text = theirs[str(number), ""].text.strip()  # its filters strip white space
            if text != lmms_adapter.cut(ours, "\n\n").strip():
                differing.append((item.id, text, ours))
        print(f"{len(theirs)} answers through lmms-eval, {len(differing)} differ from our own run")
        for line in differing:
            print(*line, sep="\n  ")
        return 1 if differing or len(theirs) != len(bench.items) else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
