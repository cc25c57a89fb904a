"""What a user waits for: validation of a recipe, the first step of a run, the first step after a resume at step 100,000.

    python benchmarks/startup.py --json benchmarks/results/startup.json

Each figure is a process of its own, started as a user starts it (tiny Qwen3-VL, one thread, an index that exists).
CPU seconds of the process and its children, so that a busy machine changes little; wall seconds beside them.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import platform
import resource
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESUMED_STEP = 100_000
TARGETS = {
    "validation": "<= 2 s, no torch",
    "dry_run": "no target",
    "first_step": "<= 6 CPU-s",
    "resume": "<= 2 s above first_step",
}
# The child runs the recipe and reports when its first optimizer step has ended.
CHILD = "--child"


def cpu_s() -> float:
    """CPU seconds of this process and of children that have ended."""
    own, children = (
        resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def child(argv: list[str]) -> None:
    """Run a recipe as ``__main__``; write CPU seconds and loaded modules at the first step, or at the end."""
    out, *argv = argv
    sys.argv = [str(ROOT / "recipes" / "stage1.py"), *argv]
    sys.path[0] = str(ROOT / "recipes")

    def report() -> None:
        Path(out).write_text(json.dumps({"cpu_s": cpu_s(), "torch": "torch" in sys.modules}))

    if "--dry-run" not in argv and not any("no_such_key" in a for a in argv):
        from spatialvlm.training import recorder

        original = recorder.Recorder.end_step

        def end_step(self: recorder.Recorder, *args: object, **kwargs: object) -> None:
            original(self, *args, **kwargs)
            report()

        recorder.Recorder.end_step = end_step
        runpy.run_path(sys.argv[0], run_name="__main__")
        return
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit:
        report()


def launch(*argv: str) -> dict[str, float]:
    """One child; CPU seconds until its report, wall seconds until its end."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "report.json"
        started = time.perf_counter()
        done = subprocess.run([sys.executable, __file__, CHILD, str(out), *argv], env=env, capture_output=True, text=True, check=False)  # fmt: skip
        if not out.is_file():
            raise SystemExit(done.stderr[-3000:])
        return json.loads(out.read_text()) | {"wall_s": round(time.perf_counter() - started, 2)}


def write_inputs(folder: Path) -> Path:
    """Rows, a tiny checkpoint, and a recipe of 200,000 steps."""
    spec = importlib.util.spec_from_file_location(
        "small", ROOT / "tests" / "recipes" / "conftest.py"
    )
    small = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(small)
    from spatialvlm.testing import make_checkpoint

    rows = small.write_rows(folder / "rows")
    text = small.recipe_text(
        1, "qwen3vl", make_checkpoint("qwen3vl", folder / "model", seed=0), rows
    )
    path = folder / "recipe.yaml"
    path.write_text(text.replace("steps: 6", f"steps: {2 * RESUMED_STEP}"))
    return path


def move_to_step(run_dir: Path, step: int) -> None:
    """Turn the only checkpoint of a run into one of a later step, as if the steps between had been made."""
    (old,) = (run_dir / "checkpoints").iterdir()
    new = old.with_name(f"step-{step:08d}")
    old.rename(new)
    path = new / "train_state.json"
    state = json.loads(path.read_text())
    counters, loader = state["counters"], state["counters"]["loader"]
    per_step = loader["position"] // counters["step"]
    counters["step"] = counters["adam_step"] = loader["step"] = step
    loader["position"] = step * per_step
    path.write_text(json.dumps(state))
    manifest = json.loads((new / "manifest.json").read_text())
    data = path.read_bytes()
    manifest["step"] = step
    manifest["files"][path.name] = [len(data), hashlib.sha256(data).hexdigest()]
    text = json.dumps(manifest)
    (new / "manifest.json").write_text(text)
    (new / "COMPLETE").write_text(hashlib.sha256(text.encode()).hexdigest())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in TARGETS}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        recipe = str(write_inputs(folder))
        run_dir = folder / "run"
        once = [f"run.dir={run_dir}", "run.stop_after_steps=1", "log.report=false"]
        launch(recipe, *once)  # builds the index and the lengths
        for _ in range(arguments.repeats):
            samples["validation"].append(launch(recipe, "optim.no_such_key=1"))
            samples["dry_run"].append(launch(recipe, "--dry-run"))
            shutil.rmtree(run_dir)
            samples["first_step"].append(launch(recipe, *once))
            move_to_step(run_dir, RESUMED_STEP)
            samples["resume"].append(launch(recipe, *once))
            metrics = (run_dir / "metrics.jsonl").read_text().splitlines()
            assert json.loads(metrics[-1])["step"] == RESUMED_STEP, metrics[-1][:80]
    assert not any(sample["torch"] for sample in samples["validation"])
    medians = {
        name: {k: round(statistics.median(s[k] for s in own), 2) for k in ("cpu_s", "wall_s")}
        for name, own in samples.items()
    }
    report = {
        "command": f"python benchmarks/startup.py --repeats {arguments.repeats}",
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
        "medians": medians,
        "resume_above_first_step_cpu_s": round(medians["resume"]["cpu_s"] - medians["first_step"]["cpu_s"], 2),
        "samples": samples,
    }  # fmt: skip
    for name, target in TARGETS.items():
        print(
            f"{name:11} {medians[name]['cpu_s']:6.2f} CPU-s {medians[name]['wall_s']:6.2f} s wall   {target}"
        )
    print(
        f"a resume at step {RESUMED_STEP:,} costs {report['resume_above_first_step_cpu_s']} CPU-s more than a start"
    )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == [CHILD]:
        child(sys.argv[2:])
    else:
        main()
