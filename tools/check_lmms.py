r"""Run our models inside lmms-eval for real, offline, in an environment of its own.

    python tools/check_lmms.py --env .cache/lmms          # makes the environment (about 6 GB) and runs inside it
    .cache/lmms/bin/python tools/check_lmms.py            # again, later

Writes pictures, a clip and a few questions per task to a temporary folder, starts ``python -m lmms_eval --model
spatialvlm`` on all of our task files with a small random model, and checks that every answer and every score equal
those of this package's own engine and scorers.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("lmms-eval", "torch", "transformers", "datasets", "av")
CHOICES = {"A": "a chair", "B": "a table", "C": "a lamp", "D": "a shelf"}
LETTERED = [f"{letter}. {text}" for letter, text in CHOICES.items()]
Rows = list[dict[str, Any]]


def make_environment(folder: Path) -> Path:
    """A virtual environment with this checkout and the extra ``lmms``; its python."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    install = [str(python), "-m", "pip", "install", "--quiet", "-e", f"{ROOT}[lmms]"]
    subprocess.run(install, check=True)
    return python


def write_media(folder: Path) -> None:
    """Three pictures and a clip of twelve frames."""
    import av
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for number in range(3):
        noise = rng.integers(0, 255, (96, 96, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    with av.open(str(folder / "clip.mp4"), "w") as file:
        stream = file.add_stream("mpeg4", rate=6)
        stream.width = stream.height = 96
        for _ in range(12):
            pixels = rng.integers(0, 255, (96, 96, 3), dtype=np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode())


def questions() -> dict[str, tuple[str, Rows]]:
    """Task -> benchmark and rows in its own schema."""
    ours = [
        {
            "id": f"q{n}",
            "messages": [
                {"role": "user", "content": f"<image>\nIs object {n} red?"},
                {"role": "assistant", "content": "x"},
            ],
            "images": [f"{n % 3}.png"],
            "media_kind": "images",
            "task": f"task{n % 2}",
            "answer_type": "yesno",
            "answer_json": "true",
            "scene_id": f"s{n % 3}",
            "evidence": "{}",
            "marks": "[]",
        }
        for n in range(12)
    ]
    vsti = [
        {
            "id": n,
            "video_path": "clip.mp4",
            "question_type": "camera_displacement" if n % 2 else "obj_obj_relative_pos_lr",
            "question": f"Where is object {n}?",
            "options": None if n % 2 else LETTERED,
            "ground_truth": "1.5",
            "mc_answer": "A",
        }
        for n in range(4)
    ]
    space10 = [
        {
            "index": n,
            "question": f"Which of them is object {n}?",
            **CHOICES,
            "answer": "AB" if n % 2 else "C",
            "category": "oo",
            "image": f"['{n % 3}.png']",
        }
        for n in range(6)
    ]
    angles = [
        {
            "index": n,
            "question": f"Which view shows object {n}?",
            **dict(list(CHOICES.items())[:3]),
            "answer": "B",
            "category": "counting",
            "image": f"['{n % 3}.png', '{(n + 1) % 3}.png']",
        }
        for n in range(4)
    ]
    kinds = ("position", "size", "rotation", "counting", "existence")
    intern = [
        {
            "id": f"i{n}",
            "category": kinds[n % 5],
            "format": "mc" if n % 5 < 3 else "free",
            "question": f"What about object {n}?",
            "options": LETTERED if n % 5 < 3 else None,
            "answer": "A" if n % 5 < 3 else "3" if n % 5 == 3 else "yes",
            "image": f"{n % 3}.png",
        }
        for n in range(5)
    ]
    return {
        "spatialvlm_jsonl": ("spatialvlm_rows", ours),
        "spatialvlm_vstibench": ("vsti_bench", vsti),
        "spatialvlm_space10_single": ("space10", space10[::2]),
        "spatialvlm_space10_double": ("space10", space10[1::2]),
        "spatialvlm_all_angles": ("all_angles", angles),
        "spatialvlm_internspatial": ("internspatial", intern),
    }


def local_tasks(source: Path, target: Path, data: Path) -> None:
    """Our task files with local questions in place of the hub's; nothing else changes."""
    shutil.copytree(source, target)
    for file in target.glob("*.yaml"):
        lines = file.read_text(encoding="utf-8").splitlines()
        at = next(n for n, line in enumerate(lines) if line.startswith("dataset_path"))
        rest = lines[at + 1 :]
        while rest[0].startswith((" ", "dataset_")):
            rest = rest[1:]
        where = ["dataset_path: json", "dataset_kwargs:", "  data_files:"]
        where += [f"    test: {data / file.stem}.jsonl"]
        file.write_text("\n".join([*lines[:at], *where, *rest]) + "\n", encoding="utf-8")


def run_lmms(checkpoint: Path, tasks: Sequence[str], folder: Path) -> None:
    """``python -m lmms_eval`` on all tasks.

    Raises:
        SystemExit: It fails, or leaves no answers behind.
    """
    command = [sys.executable, "-m", "lmms_eval", "--model", "spatialvlm"]
    command += ["--model_args", f"checkpoint={checkpoint},dtype=fp32,device=cpu,frames=4"]
    command += ["--tasks", ",".join(tasks), "--batch_size", "4", "--log_samples"]
    command += ["--include_path", str(folder / "tasks"), "--output_path", str(folder / "out")]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "cache"),
    }
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    answered = {path.name.split("_samples_")[-1] for path in (folder / "out").rglob("*.jsonl")}
    if done.returncode or answered != {f"{task}.jsonl" for task in tasks}:
        print(done.stdout[-3000:], done.stderr[-3000:], answered, sep="\n", file=sys.stderr)
        raise SystemExit(1)


def compare(task: str, name: str, subject: Any, folder: Path) -> dict[str, Any]:
    """Answers and score of lmms-eval beside our own."""
    from spatialvlm.evaluation import lmms_adapter
    from spatialvlm.evaluation.generate import GenConfig
    from spatialvlm.evaluation.predictions import Prediction, read_predictions
    from spatialvlm.evaluation.prompts import build_messages
    from spatialvlm.evaluation.registry import load_benchmark
    from spatialvlm.evaluation.scoring import score

    bench = load_benchmark(name, folder / "data" / f"{task}.jsonl", media_root=folder)
    samples = next((folder / "out").rglob(f"*_samples_{task}.jsonl"))
    theirs, _ = read_predictions(samples, style="lmms")
    generator = subject.generator(folder, frames=4)
    config = GenConfig(bench.spec.max_new_tokens)
    ours, differing = {}, []
    for number, item in enumerate(bench.items):
        messages = build_messages(item, bench.spec, "lmms", root=folder)
        (answers,) = generator.generate([generator.prepare([messages])], config)
        # lmms-eval stops at two newlines, and its filters strip white space.
        text = lmms_adapter.cut(answers[0].text, "\n\n").strip()
        ours[item.key] = Prediction(item.id, text)
        if theirs[str(number), ""].text.strip() != text:
            differing.append((item.id, theirs[str(number), ""].text, text))
    results = next(path for path in (folder / "out").rglob("*_results.json"))
    their_score = json.loads(results.read_text())["results"][task]["score,none"]
    our_score = score(bench, ours, "lmms").headline["value"]
    return {
        "answers": len(theirs),
        "differing": differing,
        "score": their_score,
        "same_score": abs(their_score - our_score) < 1e-9,
    }


def check() -> dict[str, Any]:
    """Versions, and per task how the answers and the score compare."""
    from spatialvlm.evaluation import lmms_adapter
    from spatialvlm.evaluation.subject import Subject
    from spatialvlm.testing import make_checkpoint

    print(lmms_adapter.check())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "data").mkdir()
        write_media(folder)
        asked = questions()
        for task, (_, rows) in asked.items():
            lines = [json.dumps({**row, "media_root": str(folder)}) + "\n" for row in rows]
            (folder / "data" / f"{task}.jsonl").write_text("".join(lines))
        local_tasks(
            Path(lmms_adapter.__file__).parent / "lmms_tasks", folder / "tasks", folder / "data"
        )
        checkpoint = make_checkpoint("qwen3vl", folder / "model")
        run_lmms(checkpoint, list(asked), folder)
        subject = Subject(checkpoint)
        tasks = {task: compare(task, bench, subject, folder) for task, (bench, _) in asked.items()}
    versions = {name: version(name) for name in PACKAGES} | {"python": platform.python_version()}
    return {"versions": versions, "tasks": tasks}


def main() -> int:
    """Returns 0 when all answers and scores agree."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--env", type=Path, help="make this environment and run inside it")
    parser.add_argument("--out", type=Path, help="write versions and results as JSON")
    args = parser.parse_args()
    if args.env is not None:
        python = make_environment(args.env)
        rest = ["--out", str(args.out)] if args.out else []
        command = [str(python), str(Path(__file__).resolve()), *rest]
        return subprocess.run(command, check=False).returncode
    from spatialvlm.errors import run_command

    def run() -> int:
        found = check()
        print(json.dumps(found, indent=1))
        if args.out is not None:
            args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return int(any(t["differing"] or not t["same_score"] for t in found["tasks"].values()))

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
