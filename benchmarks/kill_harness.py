"""Kill a training run at named points and at random moments; it must resume to bit-identical results.

    python benchmarks/kill_harness.py --cases 20 --out /tmp/kill            # one and two processes, ZeRO-2 and ZeRO-3
    python benchmarks/kill_harness.py --cases 200 --out /tmp/kill --seed 1  # nightly size

Every case: run with ``kill -9`` at one point, then run again without help. Checked: the second run finishes, losses,
rates and norms of every step, final weights and moments are bitwise those of an undisturbed run, at least one
verified checkpoint exists after the kill once one had been written, and no temporary directory is left.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import signal
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
)
STRATEGIES = (("ddp", 1), ("zero2", 2), ("zero3", 2), ("fsdp2", 2), ("ddp", 2))
STEPS, EVERY = 6, 2


def write_inputs(folder: Path) -> Path:
    """Rows, a tiny checkpoint, and a recipe."""
    spec = importlib.util.spec_from_file_location(
        "small", ROOT / "tests" / "recipes" / "conftest.py"
    )
    small = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(small)
    from spatialvlm.testing import make_checkpoint

    rows = small.write_rows(folder / "rows", num=16)
    model = make_checkpoint("qwen3vl", folder / "model", seed=0)
    path = folder / "recipe.yaml"
    text = small.recipe_text(1, "qwen3vl", model, rows)
    path.write_text(
        text.replace("steps: 6", f"steps: {STEPS}").replace("every: 3", f"every: {EVERY}")
    )
    return path


def recipe(argv: list[str]) -> int:
    """Stage 1 in this process."""
    from spatialvlm.training.entry import run_recipe

    spec = importlib.util.spec_from_file_location("stage1", ROOT / "recipes" / "stage1.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return run_recipe(module.main, module.describe, stage=1, doc=None, argv=argv)


class Bench:
    """Runs of one recipe under one strategy."""

    def __init__(self, folder: Path, config: Path, strategy: str, size: int) -> None:
        self.folder, self.config, self.strategy, self.size = folder, config, strategy, size
        folder.mkdir(parents=True, exist_ok=True)
        self.straight = folder / "straight"

    def run(
        self,
        run_dir: Path,
        *,
        fault: str | None = None,
        kill_after_s: float | None = None,
        rank: int = 0,
    ):
        """One launch; returns exit codes and seconds."""
        from spatialvlm.testing.ranks import fork_ranks, launcher_environment

        env = launcher_environment(self.strategy, self.size, ROOT / "configs" / "deepspeed")
        if fault:
            env["SPATIALVLM_FAULT"] = fault
        argv = [str(self.config), f"run.dir={run_dir}"]
        if self.strategy == "fsdp2":
            argv.append("parallel.strategy=fsdp2")
        started = time.monotonic()
        killed = [False]

        def during(pids: list[int]) -> None:
            if (
                kill_after_s is not None
                and not killed[0]
                and time.monotonic() - started > kill_after_s
            ):
                os.kill(pids[rank], signal.SIGKILL)
                killed[0] = True

        codes = fork_ranks(
            lambda: recipe(argv), env, size=self.size, log=self.folder / f"{run_dir.name}.log", timeout_s=120,
            during=during,
        )  # fmt: skip
        return codes, time.monotonic() - started

    def result(self, run_dir: Path) -> dict:
        """What must be equal: log values by step and the bytes of the last checkpoint and the export."""
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
        return {"steps": by_step, "digests": digests}

    def case(self, name: str, **kill) -> dict:
        """Kill, look, resume, compare."""
        from spatialvlm.errors import CheckpointError
        from spatialvlm.training.checkpoint import checkpoints_in, verify

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
        if reached > EVERY and valid == 0:
            problems.append(f"no verified checkpoint after {reached} steps")
        if list((run_dir / "checkpoints").glob("*.tmp")):
            problems.append("a temporary directory is left")
        return {
            "case": name, "strategy": self.strategy, "size": self.size, "first_exit": codes, "valid_after_kill": valid,
            "steps_before_kill": reached, "resume_s": round(seconds, 2), "problems": problems,
        }  # fmt: skip


def main() -> int:
    """Run the cases and write ``kill.json``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}  # fmt: skip
    # Loaded once here; the forked ranks inherit it.
    import deepspeed  # noqa: F401
    import torch
    import transformers.models.qwen3_vl.modeling_qwen3_vl  # noqa: F401

    import spatialvlm.training.finish  # noqa: F401

    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    config = write_inputs(arguments.out)
    rng = np.random.default_rng(arguments.seed)
    benches: dict[tuple[str, int], tuple[Bench, float]] = {}
    results = []
    for number in range(arguments.cases):
        key = STRATEGIES[number % len(STRATEGIES)]
        if key not in benches:
            bench = Bench(arguments.out / f"{key[0]}-{key[1]}", config, *key)
            shutil.rmtree(bench.straight, ignore_errors=True)
            codes, seconds = bench.run(bench.straight)
            assert codes == [0] * key[1], (bench.folder / "straight.log").read_text()[-2000:]
            benches[key] = (bench, seconds)
        bench, seconds = benches[key]
        if number % 4 == 3:  # any moment, any rank
            after = float(rng.uniform(0.3, 1.0)) * seconds
            kill = {"kill_after_s": after, "rank": int(rng.integers(key[1]))}
            name = f"{number:03d}-random-{after:.2f}s"
        else:
            point = POINTS[(number * 3 + number // len(POINTS)) % len(POINTS)]
            rank = (
                int(rng.integers(key[1]))
                if point in ("save.tmp", "save.write", "save.written")
                else 0
            )
            step = EVERY * int(rng.integers(1, STEPS // EVERY + 1))
            kill = {"fault": f"{point}@{step}:{rank}:kill"}
            name = f"{number:03d}-{point}-{step}-rank{rank}"
        results.append(bench.case(name, **kill))
        verdict = "; ".join(results[-1]["problems"]) or "ok"
        print(f"{key[0]}-{key[1]} {name}: exits {results[-1]['first_exit']}, {verdict}", flush=True)
    (arguments.out / "kill.json").write_text(json.dumps(results, indent=1))
    failed = sum(bool(r["problems"]) for r in results)
    print(f"{len(results) - failed}/{len(results)} resumed bit for bit")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
