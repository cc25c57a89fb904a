"""Four promises, one row per framework: produced by running it, never from its documentation.

    sh benchmarks/peers/make_envs.sh                                                  # once, 6 GB each
    python benchmarks/peers/checks.py --json benchmarks/results/frameworks.json       # 10 minutes on an idle core
    python benchmarks/peers/checks.py --only ours llamafactory --check gradient leak

``gradient``  Eight samples with 1 to 120 words to learn give the same gradient in one batch, one by one, and packed.
``leak``      Two samples in one sequence: another neighbour of the same length changes nothing, nor does having none.
``ranks``     Two processes (gloo, DistributedDataParallel), one with only pictures, the other with only text: they finish within
              120 seconds, and the gradient is that of one process.
``resume``    Four steps, then steps 3 and 4 again from the checkpoint of step 2: losses and weights equal bit for bit.

Same model, rows, fp32, and AdamW for all, as in ``throughput.py``; clipping is off where gradients are compared. A difference is
``|a - b| / |a|`` of all parameters' gradients as the optimizer gets them. Up to 1e-5 is a PASS, more is a FAIL; ERROR
carries the framework's own message. ``ours`` runs with one sample per pack where it says "one by one".
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE.parent))

from mix import WORDS, Row, row, write_model, write_rows  # noqa: E402
from throughput import NAMES, SETTINGS, command_line, last_line, machine  # noqa: E402

TOLERANCE = 1e-5
LIMIT_S = 120
Record = dict[str, Any]


class FailedError(Exception):
    """A run that ended without a result; the text is the framework's."""


class Bench:
    """Runs one framework's script on one mix.

    Args:
        who: Framework.
        folder: Model, mixes, and results.
        envs: Environments of the peers.
    """

    def __init__(self, who: str, folder: Path, envs: Path) -> None:
        self.who = who
        self.folder = folder
        self.python = Path(sys.executable) if who == "ours" else envs / who / "bin" / "python"
        self.ours = who == "ours"
        self._runs = 0
        self.first: Record = {}
        """The first result."""

    def run(
        self,
        mix: str,
        batch: int,
        accumulate: int = 1,
        steps: int = 1,
        processes: int = 1,
        options: Mapping[str, Any] | None = None,
        model: Path | None = None,
    ) -> Record:
        """Train.

        Args:
            mix: Folder of rows.
            batch: Samples per forward of a process.
            accumulate: Forwards per optimizer step.
            steps: Optimizer steps.
            processes: Number of processes.
            options: The framework's own; clipping is off.
            model: Where the weights are at first.

        Returns:
            The probe's record of the first process, with its gradient.

        Raises:
            FailedError: The run crashed or took too long.
        """
        if not self.python.is_file():
            raise FailedError("no environment; run benchmarks/peers/make_envs.sh")
        self._runs += 1
        out = self.folder / f"{self.who}-{self._runs}.json"
        script = HERE / f"run_{self.who.replace('-', '_')}.py"
        together = batch * accumulate * processes
        if self.ours:
            size = {"batch": together, "steps": steps}
            fixed = {
                "optim.max_grad_norm": 1e9,
                "run.dir": f"{out}.run",
                "packing.enabled": batch > 1,
            }
        else:
            size = {"batch": batch, "accumulate": accumulate, "steps": steps}
            fixed = {"max_grad_norm": 1e9, "output_dir": f"{out}.run"}
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        command = [str(self.python), *(launcher if processes > 1 else []), str(script)]
        command += [str(self.folder), mix, str(out), "--probe"]
        command += ["--model", str(model)] if model else []
        command += [part for key, value in size.items() for part in (f"--{key}", str(value))]
        command += [
            "--set",
            *(f"{key}={text(value)}" for key, value in (fixed | dict(options or {})).items()),
        ]
        said = finish(command, out)
        record = json.loads(out.read_text())
        record["gradient"] = np.load(f"{out}.npy")
        record["run"] = Path(f"{out}.run")
        record["missing"] = [
            missing(line) for line in said.splitlines() if "There were missing keys" in line
        ]
        if processes > 1:
            record["other"] = json.loads(out.with_name(f"{out.name}.1").read_text())
        self.first = self.first or record
        return record

    def settings(self) -> Record:
        """Versions and options, those of the checks included."""
        options = dict(self.first.get("options", {}))
        for name in ("output_dir", "run.dir"):
            options.pop(name, None)
        return {
            "versions": self.first.get("versions"),
            "options": options,
            "sequences": SEQUENCES[self.who],
            "recompute": RECOMPUTE[self.who],
            "shuffle": SHUFFLE[self.who],
        }


def text(value: Any) -> str:
    """An option on the command line."""
    return value if isinstance(value, str) else json.dumps(value)


def missing(line: str) -> str:
    """The warning of ``transformers`` with a number in place of the names."""
    said, _, names = line[line.index("There were") :].partition(": [")
    return f"{said}: {names.count(',') + 1}"


def finish(command: list[str], out: Path) -> str:
    """Run a command and what it starts to its end, or to the time limit; what it said."""
    process = subprocess.Popen(
        command,
        env=os.environ | SETTINGS,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise FailedError(f"not finished after {LIMIT_S} s") from error
    if process.returncode or not out.exists():
        own = [line for line in output.splitlines() if "ChildFailedError" not in line]  # torchrun's
        raise FailedError(last_line("\n".join(own)) or f"exit code {process.returncode}")
    return output


def distance(one: Record, other: Record) -> float:
    """Relative difference of two gradients."""
    first, second = one["gradient"].astype(np.float64), other["gradient"].astype(np.float64)
    return float(np.linalg.norm(first - second) / np.linalg.norm(first))


# ---------------------------------------------------------------- the rows


def words(count: int, start: int) -> str:
    """Words in a fixed order."""
    return " ".join(WORDS[(start + 7 * i) % len(WORDS)] for i in range(count))


def sample(asked: int, answered: int, name: str = "", start: int = 0) -> Row:
    """A row with or without a picture."""
    media = {"images": [f"pictures/{name}.jpg"]} if name else {}
    return row(words(asked, start), words(answered, start + 3), **media)


def write_checks(folder: Path) -> None:
    """The mixes of the four checks."""
    rng = np.random.default_rng(0)
    few, many = [1, 2, 3, 5], [20, 45, 80, 120]
    unequal = (
        [sample(20, n, f"unequal{n}") for n in few],
        [sample(20, n, "" if n % 2 else f"unequal{n}") for n in many],
    )
    write_rows(folder / "unequal", *unequal, rng)
    # Equal answers: what unequal ones do is the first check's question.
    pictures, texts = [sample(15, 20, f"rank{i}") for i in range(4)], [sample(40, 20)] * 4
    write_rows(folder / "ranks", pictures, texts, rng)
    spatial = [sample(15, 6, f"spatial{i}", i) for i in range(8)]
    general = [sample(15, 20, f"general{i}", i) for i in range(8)]
    write_rows(folder / "resume", spatial, general, rng)
    # Sequences stay as long: the other neighbour has the same words in reverse order and its picture upside down.
    first, second = sample(25, 12, "first", 1), sample(25, 12, "second", 2)
    for mix, rows in {
        "pair": (first, second),
        "other_first": (reverse(first, "other"), second),
        "other_second": (first, reverse(second, "other")),
    }.items():
        write_rows(folder / mix, [rows[0]], [rows[1]], np.random.default_rng(1))
        for file in (folder / mix / "pictures").glob("other.jpg"):
            turned = Image.open(file).transpose(Image.Transpose.ROTATE_180)
            turned.save(file, quality=90)


def reverse(entry: Row, name: str) -> Row:
    """The same words backwards, about another picture."""
    asked, answered = (turn["content"].removeprefix("<image>") for turn in entry["messages"])
    backwards = [" ".join(reversed(part.split())) for part in (asked, answered)]
    return row(*backwards, images=[f"pictures/{name}.jpg"])


# ---------------------------------------------------------------- the checks

SEQUENCES: dict[str, dict[str, dict[str, Any]]] = {
    "ours": {"packs": {}},
    "trl": {
        "padding_free": {"padding_free": True},
        "packing": {"packing": True, "max_length": 4096},
    },
    "ms-swift": {
        "padding_free": {"padding_free": True},
        "packing": {"packing": True, "packing_length": 4096},
    },
    "llamafactory": {
        "neat_packing": {"neat_packing": True, "cutoff_len": 4096},
        "packing": {"packing": True, "cutoff_len": 4096},  # isolates nothing, by its documentation
    },
}
"""The ways to put several samples into one sequence."""

RECOMPUTE: dict[str, dict[str, Any]] = {
    "ours": {"memory.checkpoint_language_model": True},
    "trl": {"gradient_checkpointing": True},
    "ms-swift": {"gradient_checkpointing": True, "vit_gradient_checkpointing": True},
    "llamafactory": {"disable_gradient_checkpointing": False},
}
"""Activation checkpointing, the default of all four; the scripts turn it off."""

SHUFFLE: dict[str, dict[str, Any]] = {
    "ours": {},
    "trl": {"train_sampling_strategy": "random"},
    "ms-swift": {"train_dataloader_shuffle": True, "dataset_shuffle": True},
    "llamafactory": {"disable_shuffling": False},
}
"""The default order of all four; the scripts of the peers turn it off."""


def gradient(bench: Bench) -> Iterator[tuple[str, Callable[[], Record]]]:
    """Against eight accumulated samples."""
    single = functools.cache(lambda: bench.run("unequal", 1, 8))

    def compare(batch: int, processes: int = 1, options: Record | None = None) -> Record:
        other = bench.run("unequal", batch, 1, processes=processes, options=options)
        return judge({"difference": distance(single(), other)})

    yield "8 together", lambda: compare(8)
    yield "4 in each of 2 processes", lambda: compare(4, 2)
    if not bench.ours:  # it packs anyway
        for how, options in SEQUENCES[bench.who].items():
            yield how, lambda options=options: compare(1, options=options)


def leak(bench: Bench) -> Iterator[tuple[str, Callable[[], Record]]]:
    """The same answer beside another neighbour, and alone."""

    def compare(options: Record) -> Record:
        batch = 2 if bench.ours else 1  # one sequence
        pair = bench.run("pair", batch, options=options)
        if pair["forwards"] != [2]:
            raise FailedError(f"answers in each sequence: {pair['forwards']}, not 2")
        others = [
            bench.run(f"other_{which}", batch, options=options) for which in ("first", "second")
        ]
        alone = bench.run("pair", 1, 2)
        return judge(
            {
                "poisoned_neighbour": max(apart(pair, other, 1) for other in others),
                "no_neighbour": apart(pair, alone, 2),
            }
        )

    for how, options in SEQUENCES[bench.who].items():
        yield how, lambda options=options: compare(options)


def apart(one: Record, other: Record, common: int) -> float:
    """Largest relative difference in the loss of an answer that both have."""
    shared = one["answers"].keys() & other["answers"].keys()
    if len(shared) != common:
        raise FailedError(f"{len(shared)} common answers, not {common}")
    return max(abs(one["answers"][name] / other["answers"][name] - 1) for name in shared)


def ranks(bench: Bench) -> Iterator[tuple[str, Callable[[], Record]]]:
    """Pictures here, text there."""

    def compare(options: Record) -> Record:
        two = bench.run("ranks", 1, steps=2, processes=2, options=options)
        seen = list(zip(two["images"], two["other"]["images"], strict=True))
        if any(len(set(pair)) != 2 for pair in seen):
            raise FailedError(f"pictures on rank 0 and 1 by forward: {seen}")
        together = bench.run("ranks", 2, steps=2)
        return judge({"difference": distance(together, two)})

    yield "no recomputation", lambda: compare({})
    yield "recomputation (default)", lambda: compare(RECOMPUTE[bench.who])


def resume(bench: Bench) -> Iterator[tuple[str, Callable[[], Record]]]:
    """Steps 3 and 4 twice."""

    save: Record = {"checkpoint.every": 2}
    key, where = "run.resume", "checkpoints/step-00000002"
    if not bench.ours:
        save = {"save_strategy": "steps", "save_steps": 2}
        key, where = "resume_from_checkpoint", "checkpoint-2"
    if bench.who == "ms-swift":
        save["add_version"] = False
    options = SHUFFLE[bench.who] | save
    straight = functools.cache(lambda: bench.run("resume", 2, steps=4, options=options))

    def compare(start: bool = False) -> Record:
        saved = straight()["run"] / where
        again = bench.run(
            "resume",
            2,
            steps=4,
            options=options | {key: str(saved)},
            model=saved if start else None,
        )
        same = {name: straight()[name][2:] == again[name] for name in ("losses", "weights")}
        return {
            "verdict": "PASS" if all(same.values()) else "FAIL",
            "message": " ".join(again["missing"]),
            "losses_equal": same["losses"],
            "weights_equal": same["weights"],
            "start_to_first_step_cpu_s": straight()["first_step_at_cpu_s"],
            "resume_to_first_step_cpu_s": again["first_step_at_cpu_s"],
        }

    yield "as documented", compare
    if not bench.ours:
        yield "checkpoint also named as the model", lambda: compare(start=True)


def judge(differences: dict[str, float]) -> Record:
    """PASS within the tolerance."""
    passed = all(value <= TOLERANCE for value in differences.values())
    return {"verdict": "PASS" if passed else "FAIL", **differences}


CHECKS = {"gradient": gradient, "leak": leak, "ranks": ranks, "resume": resume}


def main() -> None:
    """Command line."""
    parser = command_line(__doc__)
    parser.add_argument("--check", nargs="+", choices=tuple(CHECKS), default=list(CHECKS))
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model")
        write_checks(folder)
        benches = [Bench(who, folder, args.envs) for who in args.only]
        for check in args.check:
            for bench in benches:
                for how, compare in CHECKS[check](bench):
                    try:
                        result = compare()
                    except FailedError as error:
                        result = {"verdict": "ERROR", "message": str(error)}
                    rows.append({"check": check, "who": bench.who, "how": how, **result})
                    print(json.dumps(rows[-1]), flush=True)
        settings = {bench.who: bench.settings() for bench in benches}
    result = {
        "command": " ".join(["python", *sys.argv]),
        "tolerance": TOLERANCE,
        "limit_s": LIMIT_S,
        "rows": rows,
        "settings": settings,
        **machine(),
    }
    if args.json and args.json.exists():  # keeps the rows that were not run now
        before = json.loads(args.json.read_text())
        done = {(entry["check"], entry["who"]) for entry in rows}
        kept = [entry for entry in before["rows"] if (entry["check"], entry["who"]) not in done]
        order = list(CHECKS)
        result["rows"] = sorted(
            kept + rows, key=lambda entry: (order.index(entry["check"]), NAMES.index(entry["who"]))
        )
        result["settings"] = before["settings"] | result["settings"]
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
