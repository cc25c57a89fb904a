"""What 512 ranks and 12 M samples would do, on one core: order, balance, checkpoints, restarts, the control traffic.

    python benchmarks/simulate_scale.py --out benchmarks/results/simulate_scale.json --plots docs/images

Ids and sizes only, no media, no model. Order, planner, index, checkpoint store and key-value store are the shipped ones;
times of disks and networks are arithmetic on the stated rates where the table says so.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, fields
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch.distributed import TCPStore

from spatialvlm.data.formats import SourceAttrs
from spatialvlm.data.index_build import build_index
from spatialvlm.data.mixture import Mixture
from spatialvlm.data.plan import PackingArgs, imbalance, plan_step
from spatialvlm.data.sample import LENGTH_DTYPE
from spatialvlm.data.sources import Source
from spatialvlm.data.units import SourceRows
from spatialvlm.evaluation.charts import PALETTE, Series, line_chart
from spatialvlm.training.checkpoint import CheckpointStore, Snapshot
from spatialvlm.training.checkpoint_files import verify, write_safetensors
from spatialvlm.training.distributed import Processes, StepHeader
from spatialvlm.training.optim import Group
from spatialvlm.training.slices import KINDS, Slice
from spatialvlm.training.watchdog import Heartbeat
from spatialvlm.typing import CostCoefficients

WORLDS = (1, 2, 8, 64, 512)
# Qwen2.5-VL-7B, everything trains, language model recomputed.
COST = CostCoefficients(
    per_token=8 * 6.525e9, per_pair=16.0 * 28 * 3584, per_head_row=6.0 * 3584 * 152064, per_patch=6 * 0.632e9,
    per_patch_pair=12.0 * 4 * 1280,
)  # fmt: skip


def build_mixture(rows: int) -> Mixture:
    """One spatial and one general source, 1:1, no groups."""
    sources = [
        SourceRows(
            name=name, family=name, prefix_key=np.zeros(rows // 2, np.uint64), eligible=np.ones(rows // 2, bool),
            content_key=name,
        )
        for name in ("spatial", "general")
    ]  # fmt: skip
    return Mixture(sources, {"spatial": 1.0, "general": 1.0}, branches=1, epochs=1.0, of="spatial")


def lengths_of(draws: np.ndarray) -> np.ndarray:
    """Sizes as a function of the row: 25 % text, 50 % image, 25 % video."""
    sizes = np.zeros(len(draws), LENGTH_DTYPE)
    rng = np.random.default_rng(0)
    table = rng.random((4096, 2))
    kind, spread = table[(draws["row"] * 7 + draws["source"]) % 4096].T
    image, video = (kind >= 0.25) & (kind < 0.75), kind >= 0.75
    text = (60 + 440 * spread).astype(int)
    visual = np.where(video, 3744, np.where(image, (256 + 768 * spread).astype(int), 0))
    sizes["tokens"] = text + visual
    sizes["label_tokens"] = np.maximum(1, text // 5)
    sizes["visual_tokens"] = visual
    sizes["patches"] = 4 * visual
    sizes["patch_pairs"] = np.where(video, 16 * (4 * 234) ** 2, (4 * visual) ** 2)
    sizes["frames"] = np.where(video, 32, image)
    sizes["images"], sizes["videos"] = image, video
    return sizes


def order(rows: int, batch: int) -> dict:
    """Composition of steps for every world size; how fast positions become draws."""
    mixture = build_mixture(rows)
    steps = mixture.length // batch
    digests: dict[str, list[str]] = {}
    for step in (0, 1, 777, steps - 1):
        draws = mixture.draws(step * batch, (step + 1) * batch)
        sizes = lengths_of(draws)
        for world in WORLDS:
            plan = plan_step(draws, sizes, COST, world, PackingArgs(max_branches=1), step=step)
            positions = sorted(
                d.position for packs in plan.packs for pack in packs for d in pack.draws
            )
            rows_drawn = [
                (d.source, d.row) for packs in plan.packs for pack in packs for d in pack.draws
            ]
            assert len(positions) == len(set(positions)) == batch
            digest = hashlib.sha256(repr(sorted(rows_drawn)).encode()).hexdigest()[:12]
            digests.setdefault(str(step), []).append(digest)
    started = time.process_time()
    mixture.draws(0, 1_000_000)
    seconds = time.process_time() - started
    seen = np.zeros(rows, bool)
    for start in range(0, mixture.length, 1 << 20):
        draws = mixture.draws(start, min(start + (1 << 20), mixture.length))
        index = draws["source"].astype(np.int64) * (rows // 2) + draws["row"]
        assert not seen[index].any()
        seen[index] = True
    return {
        "samples": rows,
        "global_batch": batch,
        "steps": steps,
        "dropped": mixture.length - steps * batch,
        "equal_for_all_worlds": all(len(set(d)) == 1 for d in digests.values()),
        "each_sample_once": bool(seen.all()),
        "cpu_s_per_million_draws": round(seconds, 2),
        "digests": {step: found[0] for step, found in digests.items()},
    }


def balance(rows: int, batch: int) -> list[dict]:
    """Imbalance of ranks: random placement against the planner."""
    mixture = build_mixture(rows)
    table = []
    for world in (8, 64, 512):
        found = {"random": [], "planner": [], "micro_steps": [], "dummy": [], "ms": [], "fill": []}
        for step in range(4):
            draws = mixture.draws(step * batch, (step + 1) * batch)
            sizes = lengths_of(draws)
            started = time.process_time()
            plan = plan_step(draws, sizes, COST, world, PackingArgs(max_branches=1), step=step)
            found["ms"].append(1000 * (time.process_time() - started))
            flops = (
                COST.per_token * sizes["tokens"] + COST.per_pair * sizes["tokens"].astype(float) ** 2 / 2
                + COST.per_patch * sizes["patches"] + COST.per_patch_pair * sizes["patch_pairs"]
            )  # fmt: skip
            shuffled = np.random.default_rng(step).permutation(flops)
            per_rank = np.array([shuffled[r::world].sum() for r in range(world)])
            found["random"].append(per_rank.max() / per_rank.mean() - 1)
            found["planner"].append(imbalance(plan))
            packs = [pack for packs in plan.packs for pack in packs]
            found["micro_steps"].append(len(plan.packs))
            found["dummy"].append(sum(not pack.draws for pack in packs))
            found["fill"].append(sum(p.tokens for p in packs) / len(packs) / 16_384)
        table.append(
            {"world": world, **{k: round(statistics.mean(v), 4) for k, v in found.items()}}
        )
    return table


def checkpoints() -> list[dict]:
    """Write time of a full state at stated rates, and how often to write it (Young 1974: sqrt(2 C MTBF))."""
    table = []
    for name, parameters in (("Qwen2.5-VL-3B", 3_754_622_976), ("Qwen2.5-VL-7B", 8_292_166_656), ("Qwen3-VL-8B", 8_767_123_696)):  # fmt: skip
        size = 12 * parameters
        for ranks, per_node in ((8, 8), (64, 8), (512, 8)):
            nodes = ranks // per_node
            fast, slow = size / nodes / 1e9, size / min(nodes, ranks) / 0.46e9
            table.append(
                {
                    "model": name, "ranks": ranks, "bytes": size, "bytes_per_rank": size // ranks,
                    "s_at_1_GB_per_node": round(fast, 1), "s_at_one_0.46_GB_stream_per_node": round(slow, 1),
                    "interval_min_at_mtbf_8h": round(math.sqrt(2 * slow * 8 * 3600) / 60, 1),
                }
            )  # fmt: skip
    return table


def restart() -> dict:
    """Cost of a restart at step 100,000: the order is a function, so nothing is skipped or replayed."""
    mixture = build_mixture(12_000_000)
    started = time.process_time()
    mixture.at(12_000_000 - 1)
    mixture.draws(11_000_000, 11_000_000 + 4096)
    return {
        "cpu_ms_to_first_draws_at_the_end_of_12M": round(1000 * (time.process_time() - started), 2),
        "verify_99.5GB_over_8_ranks_at_1.37GB_s": round(99.5 / 8 / 1.37, 1),
        "choice_of_checkpoint": "one broadcast",
    }


def change_of_world(batch: int) -> dict:
    """512 -> 448 ranks: the same samples per step, equal micro-steps through dummy packs."""
    mixture = build_mixture(1_000_000)
    draws = mixture.draws(0, batch)
    sizes = lengths_of(draws)
    found = {}
    for world in (512, 448):
        plan = plan_step(draws, sizes, COST, world, PackingArgs(max_branches=1))
        packs = [pack for packs in plan.packs for pack in packs]
        found[str(world)] = {
            "micro_steps": len(plan.packs),
            "dummy_packs": sum(not pack.draws for pack in packs),
            "samples": sum(len(pack.draws) for pack in packs),
        }
    return found


class OtherRanks(Processes):
    """Rank 0 of many: what the others would have written appears when their answers are gathered."""

    folder: Path

    def gather(self, value: Any) -> list[Any]:
        if isinstance(value, str):  # what rank 0 found wrong with a checkpoint
            return [value]
        problem, _, rows = value
        answers = [value]
        for rank in range(1, self.size):
            suffix = f"{rank:05d}-of-{self.size:05d}.safetensors"
            piece = torch.full((8,), float(rank))
            files = {
                name: write_safetensors(self.folder / name, [("param/w", piece)])
                for name in (f"state-{suffix}", f"rng-{suffix}")
            }
            moved = [(fqn, numel * rank, numel) for fqn, _, numel in rows]
            answers.append((problem, files, moved))
        self.gathered = time.perf_counter()
        return answers

    def broadcast(self, value: Any) -> Any:
        return value

    def on_main(self, function: Callable[[], Any]) -> Any:
        return function()


def manifest(ranks: int = 512, tensors: int = 729) -> dict:
    """Commit, check, and fall back with ``2 * ranks`` real small files and an index of ``tensors * ranks`` rows."""
    names = tuple(f"model.layers.{i}.weight" for i in range(tensors))
    group = Group("language_model", True, 1e-5, 0.0, names, ((ranks,),) * tensors)
    slices = [Slice(name, 0, 1, dict.fromkeys(KINDS, torch.zeros(1))) for name in names]
    engine: Any = SimpleNamespace(strategy="zero3", groups=[group], slices=lambda **_: slices)
    processes = OtherRanks(0, ranks, torch.device("cpu"))
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        store = CheckpointStore(folder, processes)
        committed = []
        for step in (1, 2):
            processes.folder = folder / f"step-{step:08d}.tmp"
            store.save(step, engine, Snapshot({"adam_step": step}, {}, "", {}))
            committed.append(time.perf_counter() - processes.gathered)
        newest = folder / "step-00000002"
        started = time.perf_counter()
        verify(newest)
        checked = time.perf_counter() - started
        lost = newest / f"state-{ranks - 1:05d}-of-{ranks:05d}.safetensors"
        lost.unlink()
        chosen, rejected = store.newest_valid()
        assert chosen is not None
        assert lost.name in rejected[0]
        return {
            "files": 2 * ranks,
            "index_rows": tensors * ranks,
            "commit_s": round(min(committed), 2),
            "check_s": round(checked, 2),
            "one_file_lost_falls_back_to": chosen.name,
        }


def startup_storm(readers: int = 512, rows: int = 20_000, tensors: int = 729) -> dict:
    """Every rank opens the same index and reads the header of the same weights, from the page cache."""
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        with (folder / "rows.jsonl").open("w") as file:
            for i in range(rows):
                turns = [{"from": "human", "value": f"Question {i}?"}, {"from": "gpt", "value": "4"}]  # fmt: skip
                file.write(json.dumps({"id": i, "conversations": turns}) + "\n")
        write_safetensors(
            folder / "model.safetensors",
            ((f"model.layers.{i}.weight", torch.zeros(4096)) for i in range(tensors)),
        )

        def source() -> Source:
            return Source(SourceAttrs("rows", "general"), files=["rows.jsonl"], root=folder, format="sharegpt")  # fmt: skip

        build_index(source(), folder / "index")
        table = {}
        for name, work in (
            ("index", lambda: build_index(source(), folder / "index").column("prefix_key")),
            ("weights_header", lambda: _tensor_names(folder / "model.safetensors")),
        ):
            read, started = _bytes_read(), time.perf_counter()
            for _ in range(readers):
                work()
            seconds = time.perf_counter() - started
            table[name] = {
                "ms_each": round(1000 * seconds / readers, 2),
                "kB_each": round((_bytes_read() - read) / readers / 1e3, 1),
            }
    return {"readers": readers, **table}


def _tensor_names(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def _bytes_read() -> int:
    """Bytes this process took with ``read`` calls; pages of memory maps are not among them."""
    return int(Path("/proc/self/io").read_text().split()[1])


def straggler(batch: int, slower: float = 1.3, rank: int = 77) -> dict:
    """One of 512 ranks is slower: how much longer a step takes, and in how many steps it is the slowest."""
    mixture = build_mixture(1_000_000)
    steps, named, stretched = 40, 0, []
    for step in range(steps):
        draws = mixture.draws(step * batch, (step + 1) * batch)
        plan = plan_step(draws, lengths_of(draws), COST, 512, PackingArgs(max_branches=1), step=step)  # fmt: skip
        times = np.array([[pack.cost for pack in packs] for packs in plan.packs]).sum(0)
        even = times.max()
        times[rank] *= slower
        stretched.append(times.max() / even)
        named += int(times.argmax() == rank)
    return {
        "slower": slower,
        "step_time": round(statistics.mean(stretched), 3),
        "named_in_share_of_steps": named / steps,
    }


def control_traffic(clients: int = 512, seconds: float = 10.0, period: float = 5.0) -> dict:
    """The step header, and heartbeats of ``clients`` threads on a real store (one process: Python's lock included)."""
    server = TCPStore("localhost", 0, clients + 1, is_master=True, wait_for_workers=False)
    beat = json.dumps(asdict(Heartbeat(0, "host", 1, 0, "forward", ("source/file#1",) * 8, 0.0)))
    times: dict[str, list[float]] = {"set": [], "get": []}
    opened = threading.Barrier(clients + 1)

    def client(rank: int) -> None:
        store = TCPStore("localhost", server.port, is_master=False, timeout=timedelta(seconds=60))
        key = f"heartbeat/{rank}"
        store.set(key, beat)
        opened.wait()
        time.sleep(period * rank / clients)
        for _ in range(round(seconds / period)):
            started = time.perf_counter()
            store.set(key, beat)
            middle = time.perf_counter()
            store.get(key)
            times["set"].append(middle - started)
            times["get"].append(time.perf_counter() - middle)
            time.sleep(period)

    threads = [threading.Thread(target=client, args=(rank,)) for rank in range(clients)]
    for thread in threads:
        thread.start()
    opened.wait()
    for thread in threads:
        thread.join()
    return {
        "header_bytes_per_step": 8 * (len(fields(StepHeader)) - 1),
        "header_bytes_per_source": 8,
        "heartbeat_bytes": len(beat),
        "heartbeat_writes_per_s": round(clients / period, 1),
        **{
            f"{name}_ms_p{share}": round(1000 * float(np.percentile(found, share)), 2)
            for name, found in times.items()
            for share in (50, 99)
        },
    }


def write_plots(result: dict, folder: Path) -> None:
    """Imbalance and checkpoint time over the number of ranks, as ``scale_imbalance.png`` and ``scale_checkpoint.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = result["balance"]
    worlds = [row["world"] for row in rows]
    imbalances = [
        Series(name, worlds, [100 * row[key] for row in rows], color)
        for (name, key), color in zip(
            (("random packs", "random"), ("planner", "planner")), PALETTE, strict=False
        )
    ]
    times = []
    for model, color in zip(sorted({r["model"] for r in result["checkpoints"]}), PALETTE, strict=False):  # fmt: skip
        own = [r for r in result["checkpoints"] if r["model"] == model]
        times.append(Series(model, [r["ranks"] for r in own], [r["s_at_1_GB_per_node"] for r in own], color))  # fmt: skip
    for name, series, title, unit in (
        ("scale_imbalance", imbalances, "Slowest rank over the mean", "% above the mean"),
        ("scale_checkpoint", times, "One checkpoint at 1 GB/s per node of 8 ranks", "seconds"),
    ):
        plot = line_chart(title, series, "ranks", unit, log_x=True, log_y=True)
        assert plot is not None
        plot.drawing.png(folder / f"{name}.png")


def main() -> None:
    """Run everything and write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plots", type=Path, help="folder of two pictures")
    parser.add_argument("--samples", type=int, default=8_000_000)
    parser.add_argument("--batch", type=int, default=4096)
    arguments = parser.parse_args()
    started = time.process_time()
    result = {
        "command": "python benchmarks/simulate_scale.py",
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "order": order(arguments.samples, arguments.batch),
        "balance": balance(1_000_000, arguments.batch),
        "checkpoints": checkpoints(),
        "restart": restart(),
        "world_512_to_448": change_of_world(arguments.batch),
        "manifest": manifest(),
        "startup_storm": startup_storm(),
        "straggler": straggler(arguments.batch),
        "control": control_traffic(),
    }
    result["cpu_s"] = round(time.process_time() - started, 1)
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.plots is not None:
        write_plots(result, arguments.plots)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
