"""Kill a training run at random moments and at named points of a save; it must resume to bit-identical results.

    python benchmarks/kill_harness.py --kills 20 --out /tmp/kill --json benchmarks/results/kill.json
    python benchmarks/kill_harness.py --kills 200 --out /tmp/kill --seed 1  # nightly size, about 20 minutes

One and two processes, DDP, ZeRO-1, ZeRO-2, ZeRO-3 and FSDP2 in turn, the last three with adapters too, two with
background saves; every second kill at a random moment of a random rank, the others at a point inside a save. Every
case: run with ``kill -9``, then run again without help. Checked: the second run finishes, losses, rates and norms of
every step, final weights, moments, random states, counters and data position are bitwise those of an undisturbed run,
at least one verified checkpoint exists after the kill once one had been written, and nothing temporary is left.

The sources are copied into ``<out>/source`` first and run from there, so editing them meanwhile changes nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
POINTS = (
    "save.tmp",
    "save.write",
    "save.written",
    "save.index",
    "save.manifest",
    "save.marker",
    "save.renamed",
    "save.prune",
)
CASES = (
    ("full", "ddp", 1),
    ("full", "zero2", 2),
    ("full", "zero3", 2),
    ("full", "fsdp2", 2),
    ("full", "ddp", 2),
    ("lora", "zero2", 2),
    ("lora", "zero3", 2),
    ("lora", "fsdp2", 2),
    ("full", "zero1", 2),
    ("background", "zero3", 2),
    ("background", "ddp", 2),
)
"""What is trained, strategy, ranks; an odd number of them, so that each meets both kinds of kill."""
OVERRIDES = {
    "full": (),
    "lora": (
        "lora={parts: [language_model], r: 4, alpha: 8.0}",
        "optim.embedding_lr=null",
        "optim.vision_lr=null",
    ),
    "background": ("checkpoint.background=true",),
}
STEPS, EVERY = 8, 2


def freeze(out: Path) -> Path:
    """Copy what the runs execute; returns the copy of this file."""
    source = out / "source"
    shutil.rmtree(source, ignore_errors=True)
    skip = shutil.ignore_patterns("__pycache__", "results", "golden")
    for name in ("spatialvlm", "recipes", "configs", "benchmarks", "tests/recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=skip)
    return source / "benchmarks" / Path(__file__).name


def revision() -> str:
    """Commit of the sources, with ``+`` when files differ from it."""
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)  # fmt: skip
    changed = subprocess.run([*git, "status", "--porcelain", "-uno", "--", "spatialvlm", "recipes"], capture_output=True, text=True, check=False)  # fmt: skip
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "")


def surroundings() -> dict:
    """What a result was measured with."""
    import deepspeed
    import torch

    return {
        "commit": os.environ.get("KILL_HARNESS_REVISION", ""),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "deepspeed": deepspeed.__version__},
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
    }  # fmt: skip


def write_inputs(folder: Path, *, num: int = 16) -> Path:
    """Rows, a tiny checkpoint, and a recipe."""
    spec = importlib.util.spec_from_file_location(
        "small", ROOT / "tests" / "recipes" / "conftest.py"
    )
    small = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(small)
    from spatialvlm.testing import make_checkpoint

    rows = small.write_rows(folder / "rows", num=num)
    model = make_checkpoint("qwen3vl", folder / "model", seed=0)
    path = folder / "recipe.yaml"
    text = small.recipe_text(1, "qwen3vl", model, rows)
    path.write_text(
        text.replace("steps: 6", f"steps: {STEPS}").replace("every: 3", f"every: {EVERY}")
    )
    return path


def tensors_in(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> type and shape of every tensor of a model directory."""
    from safetensors import safe_open

    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                piece = file.get_slice(name)
                found[name] = (piece.get_dtype(), tuple(piece.get_shape()))
    return found


def recipe(argv: list[str]) -> int:
    """Stage 1 in this process."""
    from spatialvlm.training.entry import run_recipe

    spec = importlib.util.spec_from_file_location("stage1", ROOT / "recipes" / "stage1.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return run_recipe(module.main, module.describe, stage=1, doc=None, argv=argv)


class Bench:
    """Runs of one recipe under one strategy."""

    def __init__(
        self, folder: Path, config: Path, strategy: str, size: int, overrides: tuple[str, ...] = ()
    ) -> None:
        self.folder, self.config, self.strategy, self.size = folder, config, strategy, size
        self.overrides = overrides
        self.background = overrides == OVERRIDES["background"]
        folder.mkdir(parents=True, exist_ok=True)
        self.straight = folder / "straight"
        self.start_s = 0.0
        """Seconds from a launch to its first log line, of the newest run."""

    def run(
        self,
        run_dir: Path,
        *,
        fault: str | None = None,
        kill_after_s: float | None = None,
        after_first_line: bool = False,
        rank: int = 0,
    ):
        """One launch; returns exit codes and seconds. ``after_first_line`` counts from the first log line."""
        from spatialvlm.testing.ranks import fork_ranks, launcher_environment

        env = launcher_environment(self.strategy, self.size, ROOT / "configs" / "deepspeed")
        if fault:
            env["SPATIALVLM_FAULT"] = fault
        argv = [str(self.config), f"run.dir={run_dir}", *self.overrides]
        if self.strategy == "fsdp2":
            argv.append("parallel.strategy=fsdp2")
        started = time.monotonic()
        killed, log = [False], run_dir / "metrics.jsonl"
        self.start_s = 0.0

        def during(pids: list[int]) -> None:
            now = time.monotonic() - started
            if not self.start_s and log.is_file() and log.stat().st_size:
                self.start_s = now
            origin = self.start_s if after_first_line else 0.0
            running = bool(self.start_s) or not after_first_line
            if (
                kill_after_s is not None
                and not killed[0]
                and running
                and now - origin > kill_after_s
            ):
                os.kill(pids[rank], signal.SIGKILL)
                killed[0] = True

        codes = fork_ranks(
            lambda: recipe(argv), env, size=self.size, log=self.folder / f"{run_dir.name}.log", timeout_s=120,
            during=during,
        )  # fmt: skip
        return codes, time.monotonic() - started

    def result(self, run_dir: Path) -> dict:
        """What must be equal: log values by step, counters, the bytes of the last checkpoint and of the export."""
        lines = [
            json.loads(line)
            for line in (run_dir / "metrics.jsonl").read_text().splitlines()
            if line.endswith("}")
        ]
        wanted = ("loss", "lr/", "grad_norm/", "token_acc", "tokens")
        by_step = {
            line["step"]: {
                k: v
                for k, v in line.items()
                if k.startswith(wanted) and not k.startswith("tokens_per")
            }
            for line in lines
        }
        last = run_dir / "checkpoints" / f"step-{STEPS:08d}"
        files = sorted(
            [*last.glob("state-*"), *last.glob("rng-*"), *(run_dir / "final").glob("*.safetensors")]
        )
        digests = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
        saved = json.loads((last / "train_state.json").read_text())
        own = ("attempt", "wall_s", "trackers")  # of a launch, not of the run
        saved["counters"] = {k: v for k, v in saved["counters"].items() if k not in own}
        return {"steps": by_step, "digests": digests, "state": saved}

    def case(self, name: str, **kill) -> dict:
        """Kill, look, resume, compare."""
        from spatialvlm.errors import CheckpointError
        from spatialvlm.training.checkpoint_files import checkpoints_in, verify

        run_dir = self.folder / name
        shutil.rmtree(run_dir, ignore_errors=True)
        codes, _ = self.run(run_dir, **kill)
        valid = 0
        for path in checkpoints_in(run_dir / "checkpoints") if run_dir.is_dir() else []:
            try:
                verify(path)
                valid += 1
            except CheckpointError:
                continue
        log = run_dir / "metrics.jsonl"
        reached = len(log.read_text().splitlines()) if log.is_file() else 0
        again, seconds = self.run(run_dir)
        expected = self.result(self.straight)
        problems = []
        if again != [0] * self.size:
            problems.append(f"resume exited with {again}")
        elif self.result(run_dir) != expected:
            problems.append("results differ from the undisturbed run")
        # Of background saves the next one waits for the one in flight.
        if reached > EVERY * (2 if self.background else 1) and valid == 0:
            problems.append(f"no verified checkpoint after {reached} steps")
        if left := [str(p.relative_to(run_dir)) for p in run_dir.rglob("*.tmp")]:
            problems.append(f"left behind: {left}")
        return {
            "case": name, "trained": self.folder.name, "strategy": self.strategy, "size": self.size, "first_exit": codes, "valid_after_kill": valid,
            "steps_before_kill": reached, "resume_s": round(seconds, 2), "problems": problems,
        }  # fmt: skip


def kill_of(
    number: int, rng: np.random.Generator, size: int, start_s: float, train_s: float
) -> tuple[str, dict]:
    """Name and arguments of the kill of a case: odd numbers any moment, even ones a point of a save.

    Random moments lie in the start of a run once in five cases, between its first and last step otherwise.
    """
    if number % 2:
        starting = number % 10 == 9
        after = float(rng.uniform(0.0, 0.9)) * (start_s if starting else train_s)
        return f"{number:03d}-random-{'start' if starting else 'steps'}-{after:.2f}s", {
            "kill_after_s": after,
            "after_first_line": not starting,
            "rank": int(rng.integers(size)),
        }
    point = POINTS[number // 2 % len(POINTS)]
    every_rank = point in ("save.tmp", "save.write", "save.written")
    rank = int(rng.integers(size)) if every_rank else 0
    first = 3 if point == "save.prune" else 1  # the first saves have nothing to delete
    step = EVERY * int(rng.integers(first, STEPS // EVERY + 1))
    return f"{number:03d}-{point}-{step}-rank{rank}", {"fault": f"{point}@{step}:{rank}:kill"}


def main() -> int:
    """Run the cases and write ``kill.json``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="the result once more, for the repository")
    arguments = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}  # fmt: skip
    out = arguments.out.resolve()
    if (out / "source") not in Path(__file__).resolve().parents:
        os.environ["KILL_HARNESS_REVISION"] = revision()
        os.execv(sys.executable, [sys.executable, str(freeze(out)), *sys.argv[1:]])
    sys.path.insert(0, str(ROOT))
    # Loaded once here; the forked ranks inherit it.
    import deepspeed  # noqa: F401
    import torch
    import transformers.models.qwen3_vl.modeling_qwen3_vl  # noqa: F401

    import spatialvlm.training.finish  # noqa: F401

    torch.set_num_threads(1)
    config = write_inputs(out)
    rng = np.random.default_rng(arguments.seed)
    benches: dict[tuple[str, str, int], tuple[Bench, float, float]] = {}
    results = []
    for number in range(arguments.kills):
        key = CASES[number % len(CASES)]
        trained, strategy, size = key
        if key not in benches:
            name = f"{trained}-{strategy}-{size}"
            bench = Bench(out / name, config, strategy, size, OVERRIDES[trained])
            shutil.rmtree(bench.straight, ignore_errors=True)
            codes, seconds = bench.run(bench.straight)
            assert codes == [0] * size, (bench.folder / "straight.log").read_text()[-2000:]
            assert tensors_in(bench.straight / "final") == tensors_in(out / "model")
            benches[key] = (bench, bench.start_s, seconds - bench.start_s)
        bench, start_s, train_s = benches[key]
        name, kill = kill_of(number, rng, size, start_s, train_s)
        results.append(bench.case(name, **kill))
        verdict = "; ".join(results[-1]["problems"]) or "ok"
        print(
            f"{bench.folder.name} {name}: exits {results[-1]['first_exit']}, {verdict}", flush=True
        )
    failed = sum(bool(r["problems"]) for r in results)
    report = {
        "command": f"python benchmarks/kill_harness.py --kills {arguments.kills} --seed {arguments.seed}",
        **surroundings(),
        "cases_run": len(results),
        "killed": sum(-9 in r["first_exit"] for r in results),
        "bit_for_bit": len(results) - failed,
        "cases": results,
    }  # fmt: skip
    for path in (out / "kill.json", arguments.json):
        if path is not None:
            path.write_text(json.dumps(report, indent=1) + "\n")
    print(
        f"{report['killed']} of {len(results)} were killed before their end; {len(results) - failed}/{len(results)} resumed bit for bit"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
