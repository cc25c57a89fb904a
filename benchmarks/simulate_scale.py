"""What 512 ranks and 12 M samples would do, on one core: order, balance, checkpoints, restarts, the header.

    python benchmarks/simulate_scale.py --out benchmarks/results/simulate_scale.json

Ids and sizes only, no media, no model. The order and the planner are the shipped ones; times of disks and networks are
arithmetic on the stated rates.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import statistics
import time
from dataclasses import fields
from pathlib import Path

import numpy as np

from spatialvlm.data.mixture import Mixture
from spatialvlm.data.plan import PackingArgs, imbalance, plan_step
from spatialvlm.data.sample import LENGTH_DTYPE
from spatialvlm.data.units import SourceRows
from spatialvlm.training.distributed import StepHeader
from spatialvlm.training.report import svg_lines
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


def control_traffic() -> dict:
    """The step header and the heartbeats."""
    return {
        "header_bytes_per_step": 8 * len(fields(StepHeader)),
        "heartbeat_writes_per_s_at_512_ranks": round(512 / 5, 1),
    }


def write_plots(result: dict, folder: Path) -> None:
    """Imbalance and checkpoint time over the number of ranks (log2 on the x axis)."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = result["balance"]
    imbalances = {
        name: [(math.log2(row["world"]), 100 * row[name]) for row in rows]
        for name in ("random", "planner")
    }
    times = {
        model: [
            (math.log2(r["ranks"]), r["s_at_1_GB_per_node"])
            for r in result["checkpoints"]
            if r["model"] == model
        ]
        for model in sorted({r["model"] for r in result["checkpoints"]})
    }
    for name, series in (("scale_imbalance", imbalances), ("scale_checkpoint", times)):
        svg = svg_lines(series).split("<p class")[0]
        (folder / f"{name}.svg").write_text(
            svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1) + "\n"
        )


def main() -> None:
    """Run everything and write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plots", type=Path, help="folder of two SVG files")
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
