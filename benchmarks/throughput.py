"""Training speed on a CPU: this project and TRL, ms-swift, and LLaMA-Factory, side by side in one run.

    sh benchmarks/peers/make_envs.sh                                             # once, 6 GB each
    python benchmarks/throughput.py --json benchmarks/results/throughput.json    # about 10 minutes on an idle core
    python benchmarks/throughput.py --only ours trl --mix images

Everybody trains the same random Qwen2.5-VL (8 M parameters) on the same files (``benchmarks/peers/mix.py``), all parameters,
fp32, AdamW, one process, one thread, each through its own entry point in its own environment. Runs alternate; ``--rounds``
repeats them. Counted are real tokens and samples per CPU-second between optimizer steps, data path included, warm-up steps not.
Two ways to batch are tried for every peer: a padded batch, as everybody trains, and accumulation of single samples, which pads
nothing and is the fastest on a CPU. A peer without environment, or one that cannot run, is a row with its error. Last comes the share of the GEMM
rate that a mid-size model reaches here.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / "benchmarks" / "peers"
ENVS = ROOT / ".venv-peers"
NAMES = ("ours", "trl", "ms-swift", "llamafactory")
ROWS = {"images": 32, "video": 24, "text": 20}
"""Rows of each half of a mix."""
SETTINGS = {
    "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{PEERS}",
}  # fmt: skip
"""One thread, no GPU, no network."""


@dataclass(frozen=True)
class Entry:
    """One run of one framework."""

    mix: str
    who: str
    how: str
    arguments: tuple[str, ...]


def size(batch: int, accumulate: int, steps: int, warmup: int) -> tuple[str, ...]:
    """Arguments of a peer's script."""
    values = {"batch": batch, "accumulate": accumulate, "steps": steps, "warmup": warmup}
    return tuple(part for key, value in values.items() for part in (f"--{key}", str(value)))


def plan(mixes: Sequence[str], names: Sequence[str]) -> list[Entry]:
    """Runs of one round; 8 steps of 8 images rows, 3 of 16 video rows, 4 of 8 conversations."""
    found = []
    if "images" in mixes:
        found.append(Entry("images", "ours", "packed", ("--batch", "8", "--steps", "8")))
        for peer in NAMES[1:]:
            found.append(Entry("images", peer, "8 padded", size(8, 1, 8, 2)))
            found.append(Entry("images", peer, "1 x 8", size(1, 8, 8, 2)))
        packed = (*size(2, 1, 8, 2), "--set", "neat_packing=true", "cutoff_len=2048")
        found.append(Entry("images", "llamafactory", "neat_packing", packed))
    if "video" in mixes:
        ours = ("--batch", "16", "--steps", "3", "--warmup", "1")
        found.append(Entry("video", "ours", "shared prefixes", (*ours, "--share")))
        found.append(Entry("video", "ours", "packed", ours))
        found += [Entry("video", peer, "1 x 16", size(1, 16, 3, 1)) for peer in NAMES[1:]]
    if "text" in mixes:
        found.append(Entry("text", "ours", "packed", ("--batch", "8", "--steps", "4", "--warmup", "1")))  # fmt: skip
        for peer in NAMES[1:]:
            found.append(Entry("text", peer, "8 padded", size(8, 1, 4, 1)))
            found.append(Entry("text", peer, "1 x 8", size(1, 8, 4, 1)))
    return [entry for entry in found if entry.who in names]


REFUSED = (
    Entry("images", "trl", "padding_free", (*size(8, 1, 3, 2), "--set", "padding_free=true")),
    Entry("images", "ms-swift", "padding_free", (*size(8, 1, 3, 2), "--set", "padding_free=true")),
)
"""Run once to show the message."""


def command_line(description: str | None) -> argparse.ArgumentParser:
    """Options of everything that runs the frameworks."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--envs", type=Path, default=ENVS, help="folder of the peers' environments")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES))
    return parser


def main() -> None:
    """Command line."""
    parser = command_line(__doc__)
    parser.add_argument("--mix", nargs="+", choices=tuple(ROWS), default=list(ROWS))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--efficiency", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write = "import sys; from pathlib import Path; from mix import write_mix, write_model; root = Path(sys.argv[1]); "
        write += "write_model(root / 'model'); "
        write += "; ".join(f"write_mix(root / '{mix}', '{mix}', {ROWS[mix]})" for mix in args.mix)
        done = execute(sys.executable, "-c", write, str(folder))
        if done.returncode:
            raise SystemExit(f"the mixes could not be written: {last_line(done.stderr)}")
        records = []
        for number in range(args.rounds):
            entries = plan(args.mix, args.only)
            entries += (
                [e for e in REFUSED if e.who in args.only and e.mix in args.mix]
                if not number
                else []
            )
            for entry in entries:
                record = measure(entry, folder, args.envs)
                records.append({"mix": entry.mix, "who": entry.who, "how": entry.how, **record})
                print(describe(records[-1]), flush=True)
        efficiency = (
            measure_efficiency(folder) if args.efficiency and "images" in args.mix else None
        )
    rows = merge(records)
    result = {"rows": rows, "ratios": ratios(rows), "efficiency": efficiency, **machine()}
    print(json.dumps({"ratios": result["ratios"], "efficiency": efficiency}, indent=2))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def execute(*command: str) -> subprocess.CompletedProcess[str]:
    """One command, to its end."""
    return subprocess.run(
        command, env=os.environ | SETTINGS, capture_output=True, text=True, check=False
    )


def measure(entry: Entry, folder: Path, envs: Path) -> dict[str, Any]:
    """One run in its environment, or why there is none."""
    python = Path(sys.executable) if entry.who == "ours" else envs / entry.who / "bin" / "python"
    if not python.is_file():
        return {"error": "no environment; run benchmarks/peers/make_envs.sh"}
    out = folder / "out.jsonl"
    out.unlink(missing_ok=True)
    script = PEERS / f"run_{entry.who.replace('-', '_')}.py"
    done = execute(str(python), str(script), str(folder), entry.mix, str(out), *entry.arguments)
    if not out.exists():
        return {"error": last_line(done.stderr) or f"exit code {done.returncode}"}
    return json.loads(out.read_text())


def last_line(text: str) -> str:
    """The exception of a traceback."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception"))]
    return (named or lines or [""])[-1][:300]


def measure_efficiency(folder: Path) -> dict[str, Any]:
    """FLOPs of forward and backward against matrix products in the same process."""
    out = folder / "efficiency.jsonl"
    arguments = (
        "images",
        str(out),
        "--efficiency",
        "--batch",
        "4",
        "--steps",
        "3",
        "--warmup",
        "1",
    )
    done = execute(sys.executable, str(PEERS / "run_ours.py"), str(folder), *arguments)
    return json.loads(out.read_text()) if out.exists() else {"error": last_line(done.stderr)}


def merge(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per mix, framework, and way: medians over rounds, with the rates of every round."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["mix"], record["who"], record["how"]), []).append(record)
    rows = []
    for found in groups.values():
        good = [record for record in found if "error" not in record]
        if not good:
            rows.append(found[0])
            continue
        row = dict(good[-1])
        for name, value in row.items():
            if isinstance(value, float):
                row[name] = statistics.median(record[name] for record in good)
        row["rounds"] = [record["tokens_per_cpu_s"] for record in good]
        rows.append(row)
    return rows


def ratios(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Ours over every peer, by mix, way, and column, and which peer is the hardest to beat."""
    found: dict[str, Any] = {}
    for mix in ROWS:
        for column in ("tokens_per_cpu_s", "samples_per_cpu_s"):
            usable = [row for row in rows if row["mix"] == mix and column in row]
            peers = [row for row in usable if row["who"] != "ours"]
            for row in usable:
                if row["who"] != "ours" or not peers:
                    continue
                each = {
                    f"{peer['who']} {peer['how']}": row[column] / peer[column] for peer in peers
                }
                best = min(each, key=each.__getitem__)
                found[f"{mix}, {row['how']}, {column}"] = {
                    "best_peer": best,
                    "ratio": each[best],
                    "to_each": each,
                }
    return found


def describe(record: dict[str, Any]) -> str:
    """One line for the terminal."""
    start = f"{record['mix']:7} {record['who']:13} {record['how']:16}"
    if "error" in record:
        return f"{start} {record['error']}"
    return (
        f"{start} {record['tokens_per_cpu_s']:7.0f} tokens/CPU-s {record['samples_per_cpu_s']:6.2f} samples/CPU-s  "
        f"{record['tokens_per_sample']:5.0f} tokens/sample  padding {record['padding']:5.1%}  first loss {record['first_loss'] or math.nan:.3f}  core {record['gemm_gflops']:.0f} GFLOP/s"
    )


def machine() -> dict[str, Any]:
    """What a reader needs to repeat the run."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "commit": commit.stdout.strip(),
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
    }


if __name__ == "__main__":
    main()
