"""Train for hours with faults injected on the way; memory, file handles, shared memory and speed must stay flat.

    python benchmarks/soak.py --out /tmp/soak --steps 10000 --minutes 180 --json benchmarks/results/soak.json  # nightly
    python benchmarks/soak.py --out /tmp/soak --steps 2500  # 3 minutes, memory and speed are printed and not judged

One run of the shipped stage-1 recipe on a tiny model, with a loader worker per rank and one broken image in fifty.
It ends when both ``--steps`` and ``--minutes`` are reached. Every ``--faults-every`` steps something happens: a NaN
in a batch, a full disk, a slow disk, kill -9, SIGTERM, a killed loader worker or kill -9 inside a save; after the
last four the run is started again without help. One launch in five lives for 10,000 steps. Checked, on samples of
every rank and its workers: memory grows by less than 1 MB per 1,000 steps (from 500 steps after a start), no file
handle and no byte of /dev/shm is left over, CPU time per step rises by less than 5 %, every fault ended as it must, no
more than one save interval was trained twice, and steps that were trained twice gave the same loss.
"""

from __future__ import annotations

import argparse
import errno
import json
import multiprocessing
import os
import shutil
import signal
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import kill_harness
import numpy as np
import psutil

SAVE_EVERY, LOG_EVERY, SAMPLE_EVERY, SETTLED = 100, 20, 20, 500
LONG, MEASURED = 10_000, 5_000
"""Steps of every fifth launch, and the shortest settled launch whose memory and speed are judged: allocators fill up for
about 2,000 steps, which a short launch shows as growth."""
ALIVE = ("nan", "disk full", "slow disk")
"""Faults a run survives; they belong to a step and come back when it is trained again."""
ENDINGS = ("kill", "term", "worker", "kill in save")
"""Faults that end a launch; each happens once."""
EXPECTED = {"kill": -signal.SIGKILL, "term": 0, "worker": 3, "kill in save": -signal.SIGKILL}
BARS = {"memory_mb_per_1000_steps": 1.0, "handles": 1, "shm_bytes": 0, "drift": 0.05}


@dataclass(frozen=True)
class Fault:
    """What happens when, and on which rank."""

    step: int
    kind: str
    rank: int


def faults_of_launch(start: int, every: int, launch: int, size: int) -> list[Fault]:
    """Faults the run survives, then one that ends the launch: soon in four launches out of five, late in the fifth."""
    first = (start // every + 1) * every
    ending = ENDINGS[launch % (len(ENDINGS) + 1) % len(ENDINGS)]
    number = LONG // every if launch % (len(ENDINGS) + 1) == len(ENDINGS) else 1
    alive = [
        Fault(first + i * every, ALIVE[(launch + i) % len(ALIVE)], (launch + i) % size)
        for i in range(number)
    ]
    # Between two saves, so that there is something to train again; a save is where it says so.
    at = first + number * every + (0 if ending == "kill in save" else 77)
    return [*alive, Fault(at, ending, launch % size)]


class Tormentor:
    """Runs inside every rank: takes samples at step borders and does what the plan says."""

    def __init__(self, faults: Iterable[Fault], samples: Path, end: tuple[int, float]) -> None:
        self.faults = {fault.step: fault for fault in faults}
        self.samples, self.end = samples, end
        self.process = psutil.Process()
        self.poisoned = False

    def install(self) -> None:
        """Take the place of the fault points and of the way to the device."""
        from spatialvlm.training import checkpoint, loop

        to_device = loop.to_device

        def poisoned(batch, device):
            batch = to_device(batch, device)
            if self.poisoned:
                batch = {**batch, "loss_weight": batch["loss_weight"] * float("nan")}
            return batch

        loop.to_device = poisoned
        loop.fault_point = self.at
        checkpoint.fault_point = self.at

    def at(self, name: str, *, step: int, rank: int) -> None:
        """A step border or a point of a save."""
        fault = self.faults.get(step)
        mine = fault is not None and fault.rank == rank
        if name == "loop.data":
            if step % SAMPLE_EVERY == 0:
                self.sample(step, rank)
            self.poisoned = mine and fault.kind == "nan"
            over = step >= self.end[0] and time.time() >= self.end[1]
            if rank == 0 and over and fault is None:
                os.kill(os.getpid(), signal.SIGTERM)
            elif mine and fault.kind in ("kill", "term"):
                os.kill(os.getpid(), signal.SIGKILL if fault.kind == "kill" else signal.SIGTERM)
            elif mine and fault.kind == "worker":
                for worker in multiprocessing.active_children():
                    worker.kill()
        elif name == "save.write" and mine:
            if fault.kind == "disk full":
                raise OSError(errno.ENOSPC, "No space left on device (injected)")
            if fault.kind == "slow disk":
                time.sleep(3.0)
            if fault.kind == "kill in save":
                os.kill(os.getpid(), signal.SIGKILL)

    def sample(self, step: int, rank: int) -> None:
        """One line about this rank and its loader workers."""
        workers = [psutil.Process(child.pid) for child in multiprocessing.active_children()]
        line = {
            "step": step,
            "rank": rank,
            "pid": os.getpid(),
            "wall": time.monotonic(),
            "cpu": time.process_time(),
            "memory": self.process.memory_info().rss,
            "handles": self.process.num_fds(),
            "worker_memory": sum(worker.memory_info().rss for worker in workers),
            "worker_handles": sum(worker.num_fds() for worker in workers),
        }
        with self.samples.open("a") as file:
            file.write(json.dumps(line) + "\n")


def slope_mb(lives: list[list[dict]], key: str) -> float:
    """Megabytes per 1,000 steps: one slope for all lives, each with a level of its own."""
    above, below = 0.0, 0.0
    for life in lives:
        steps = np.array([line["step"] for line in life], dtype=float)
        values = np.array([line[key] for line in life], dtype=float)
        steps -= steps.mean()
        above += float(steps @ (values - values.mean()))
        below += float(steps @ steps)
    return above / below * 1000 / 1e6


def drift(lives: list[list[dict]], key: str) -> float:
    """Relative change of time per step from the first third of all windows to the last."""
    rates = [
        (b[key] - a[key]) / (b["step"] - a["step"])
        for life in lives
        for a, b in zip(life, life[5:], strict=False)  # one window holds one save
    ]
    third = max(len(rates) // 3, 1)
    return statistics.median(rates[-third:]) / statistics.median(rates[:third]) - 1


def shm() -> dict[str, int]:
    """Files of this user in /dev/shm and their bytes."""
    found = {}
    for path in Path("/dev/shm").glob("*"):
        try:
            status = path.stat()
        except FileNotFoundError:
            continue  # another process took it away
        if status.st_uid == os.getuid():
            found[path.name] = status.st_size
    return found


def measure(samples: list[dict]) -> dict[str, float]:
    """What must stay flat, over all ranks and lives."""
    by_pid = defaultdict(list)
    for line in samples:
        by_pid[line["pid"]].append(line)
    settled = [
        [line for line in life if line["step"] - life[0]["step"] >= SETTLED]
        for life in by_pid.values()
    ]
    assert any(settled), f"no launch reached {SETTLED} steps: raise --steps"
    longest = max(life[-1]["step"] - life[0]["step"] for life in settled if life)
    enough = min(MEASURED, longest)
    settled = [life for life in settled if life and life[-1]["step"] - life[0]["step"] >= enough]
    return {
        "launches_measured": len(settled),
        "steps_of_the_longest_launch": longest,
        "memory_mb_per_1000_steps": round(slope_mb(settled, "memory"), 3),
        "worker_memory_mb_per_1000_steps": round(slope_mb(settled, "worker_memory"), 3),
        "handles": max(max(l["handles"] for l in s) - s[0]["handles"] for s in settled),  # noqa: E741
        "worker_handles": max(max(l["worker_handles"] for l in s) - s[0]["worker_handles"] for s in settled),  # noqa: E741
        "cpu_s_per_step": round(statistics.median((s[-1]["cpu"] - s[0]["cpu"]) / (s[-1]["step"] - s[0]["step"]) for s in settled), 4),
        "drift": round(drift(settled, "cpu"), 4),
        "wall_drift": round(drift(settled, "wall"), 4),
    }  # fmt: skip


def twice_trained(log: Path) -> tuple[int, int]:
    """Log lines of the same steps in two attempts, and how many of them differ in their loss."""
    by_attempt = defaultdict(list)
    for text in log.read_text().splitlines():
        if text.endswith("}"):
            line = json.loads(text)
            by_attempt[line["attempt"]].append((line["step"], line["loss"]))
    seen: dict[tuple[int, int], float] = {}
    compared = different = 0
    for _, lines in sorted(by_attempt.items()):
        for (before, _), (step, loss) in pairwise(lines):
            key = (before, step)
            if key in seen:
                compared += 1
                different += seen[key] != loss
            seen[key] = loss
    return compared, different


def launches(arguments: argparse.Namespace, config: Path, out: Path) -> tuple[list[dict], list[str]]:  # fmt: skip
    """Start the run again and again until its end; what each launch met, and what went wrong."""
    from spatialvlm.testing.ranks import fork_ranks, launcher_environment

    run_dir, size = out / "run", arguments.size
    argv = [
        str(config), f"run.dir={run_dir}", "data.length={steps: 1000000}", "schedule={kind: constant, warmup_ratio: 0.0}",
        f"checkpoint.every={SAVE_EVERY}", f"log.every={LOG_EVERY}", "loader.num_workers=1", "data.max_bad_fraction=1.0",
    ]  # fmt: skip
    argv += arguments.set
    if arguments.strategy == "fsdp2":
        argv.append("parallel.strategy=fsdp2")
    end = (arguments.steps, time.time() + 60 * arguments.minutes)
    history: list[dict] = []
    problems: list[str] = []
    survived: list[Fault] = []
    reached = 0
    while not problems:
        plan = faults_of_launch(reached, arguments.faults_every, len(history), size)
        tormentor = Tormentor([*survived, *plan], out / "samples.jsonl", end)

        def body(tormentor: Tormentor = tormentor) -> int:
            tormentor.process = psutil.Process()
            tormentor.install()
            return kill_harness.recipe(argv)

        env = launcher_environment(arguments.strategy, size, kill_harness.ROOT / "configs" / "deepspeed")  # fmt: skip
        codes = fork_ranks(body, env, size=size, log=out / "run.log", timeout_s=6 * 3600)
        record = json.loads((run_dir / "run.json").read_text())
        state, step, ending = record["state"], record["step"], plan[-1]
        over = state == "preempted" and step >= end[0] and step < ending.step
        history.append({"from": reached, "to": step, "ending": "end" if over else ending.kind, "exits": codes, "state": state})  # fmt: skip
        print(f"launch {len(history)}: steps {reached}-{step}, {history[-1]['ending']}, exits {codes}, {state}", flush=True)  # fmt: skip
        if over:
            return history, problems
        if codes[ending.rank] != EXPECTED[ending.kind]:
            problems.append(f"{ending} ended with {codes}, expected {EXPECTED[ending.kind]}: {(out / 'run.log').read_text()[-2000:]}")  # fmt: skip
        saved = [int(p.name[5:]) for p in (run_dir / "checkpoints").glob("step-????????")]  # fmt: skip
        reached = max(saved, default=0)
        if reached < ending.step - SAVE_EVERY:
            problems.append(f"after {ending} the newest checkpoint is of step {reached}")
        survived = plan[:-1]  # the last one ended this launch and does not come back
        history[-1]["resumes_at"] = reached
        reached = max(reached, ending.step)
    return history, problems


def judge(report: dict) -> list[str]:
    """Bars that were missed."""
    found = report["measured"]
    missed = []
    for key, bar in BARS.items():
        if key.startswith(("memory", "drift")) and found["steps_of_the_longest_launch"] < MEASURED:
            continue  # too short to tell a leak from warm-up
        names = [n for n in (key, f"worker_{key}") if n in found]
        missed += [f"{n} = {found[n]}, bar {bar}" for n in names if found[n] > bar]
    if report["trained_twice"]["different"]:
        missed.append(f"steps trained twice gave another loss: {report['trained_twice']}")
    if report["skipped"] != report["nan_steps"]:
        missed.append(f"{report['skipped']} steps skipped, {report['nan_steps']} had a NaN")
    return missed


def main() -> int:
    """Run the soak and write ``soak.json``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=10_000, help="at least this many")
    parser.add_argument("--minutes", type=float, default=0.0, help="at least this long")
    parser.add_argument("--faults-every", type=int, default=500)
    parser.add_argument(
        "--strategy", default="ddp", choices=["ddp", "zero1", "zero2", "zero3", "fsdp2"]
    )
    parser.add_argument("--size", type=int, default=2, help="processes")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="key=value", help="changes to the recipe"
    )
    parser.add_argument("--json", type=Path, help="the result once more, for the repository")
    arguments = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}  # fmt: skip
    out = arguments.out.resolve()
    if (out / "source") not in Path(__file__).resolve().parents:
        os.environ["KILL_HARNESS_REVISION"] = kill_harness.revision()
        script = kill_harness.freeze(out).with_name(Path(__file__).name)
        os.execv(sys.executable, [sys.executable, str(script), *sys.argv[1:]])
    sys.path.insert(0, str(kill_harness.ROOT))
    os.environ["PYTHONPATH"] = str(kill_harness.ROOT)  # for the loader workers
    # Loaded once here; the forked ranks inherit it.
    import deepspeed  # noqa: F401
    import torch
    import transformers.models.qwen3_vl.modeling_qwen3_vl  # noqa: F401

    import spatialvlm.training.finish  # noqa: F401

    torch.set_num_threads(1)
    shutil.rmtree(out / "run", ignore_errors=True)
    (out / "samples.jsonl").unlink(missing_ok=True)
    config = kill_harness.write_inputs(out, num=50)
    image = out / "rows" / "007.png"
    image.write_bytes(image.read_bytes()[:150])
    before, started = shm(), time.monotonic()
    history, problems = launches(arguments, config, out)
    seconds = time.monotonic() - started
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    run_dir = out / "run"
    compared, different = twice_trained(run_dir / "metrics.jsonl")
    newest = sorted((run_dir / "checkpoints").glob("step-????????"))[-1]
    counters = json.loads((newest / "train_state.json").read_text())["counters"]
    nan_steps = {f.step for i, h in enumerate(history) for f in faults_of_launch(h["from"], arguments.faults_every, i, arguments.size) if f.kind == "nan" and f.step < counters["step"]}  # fmt: skip
    report = {
        "command": f"python benchmarks/soak.py --steps {arguments.steps} --minutes {arguments.minutes:g} --strategy {arguments.strategy} --size {arguments.size}",
        **kill_harness.surroundings(),
        "minutes": round(seconds / 60, 1),
        "steps": counters["step"],
        "skipped": counters["skipped"],
        "nan_steps": len(nan_steps),
        "trained_twice": {"log_lines": compared, "different": different},
        "measured": {**measure(samples), "shm_bytes": sum(shm().values()) - sum(before.values())},
        "launches": history,
    }  # fmt: skip
    report["problems"] = problems + judge(report)
    for path in (out / "soak.json", arguments.json):
        if path is not None:
            path.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({k: v for k, v in report.items() if k != "launches"}, indent=1))
    return 1 if report["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
