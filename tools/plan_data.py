"""What a recipe will feed the model: rows, lengths, packs, savings and cost, before a run.

    python tools/plan_data.py configs/tiny/stage1_qwen3vl.yaml
    python tools/plan_data.py configs/stage1/qwen2_5vl_7b_ssr2d.yaml --world 8 --steps 1000 --json plan.json

Builds the index and the lengths (which a run then finds ready), plans steps, and prints per source: rows, eligible
rows, rejects by reason, sizes; and for the plan: shares, packs, padding, balance over ranks, group sizes, what shared
prefixes save, and how long the run would take on --gpus devices. No model weights are loaded.

Exit codes: 2 configuration or checkpoint, 3 too many broken rows, too few media per step, or other data faults.
"""

import argparse
import json
import sys
import time
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from spatialvlm.config import TrainConfig, load_config
from spatialvlm.errors import DataError, SpatialVLMError, run_command


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="YAML recipe of a stage")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    parser.add_argument("--steps", default="200", help="optimizer steps to plan, or 'all'")
    parser.add_argument("--world", type=int, default=8, help="data-parallel ranks")
    parser.add_argument("--workers", type=int, default=1, help="processes that measure rows")
    parser.add_argument(
        "--verify",
        choices=["ends", "full"],
        default="ends",
        help="how to tell that a data file is the one that was indexed: size, time and both ends, or all of it",
    )
    parser.add_argument("--gpus", type=int, default=0, help="devices of the estimate; 0 = --world")
    parser.add_argument(
        "--tflops", type=float, default=989.0, help="peak of one device (H100/H200 bf16: 989)"
    )
    parser.add_argument("--mfu", type=float, default=0.35, help="assumed model FLOPs utilisation")
    parser.add_argument("--json", type=Path, help="write everything here")
    args = parser.parse_args(argv)
    try:
        config = load_config(args.config, args.overrides, TrainConfig)
        result = plan(config, args)
    except SpatialVLMError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 3 if isinstance(error, DataError) else 2
    show(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


def plan(config: TrainConfig, args: argparse.Namespace) -> dict[str, Any]:
    """Everything the tool prints, as plain values."""
    from spatialvlm.data.sample import World
    from spatialvlm.data.summary import PlanSummary, source_summary
    from spatialvlm.synthesis.formats import DIALECT_OF, FormatExpander
    from spatialvlm.training.preview import preview_loader

    started = time.perf_counter()
    loader = preview_loader(
        config,
        World(0, args.world),
        expand_format=lambda family: FormatExpander(
            DIALECT_OF[family], marked=config.data.marked_formats
        ),
        report=partial(print, file=sys.stderr),
        workers=args.workers,
        verify_files=args.verify == "full",
    )
    built_s = time.perf_counter() - started
    total = loader.num_steps
    wanted = total if args.steps == "all" else min(int(args.steps), total)
    unit_sizes = [lane.size for lane in loader.mixture.lanes]
    summary = PlanSummary(args.world, config.packing.align, unit_sizes)
    started = time.perf_counter()
    shares: dict[str, dict[str, int]] = {}
    for steps_plan, draws, sizes, _ in islice(loader.plans(), wanted):
        summary.add(steps_plan, draws, sizes, loader.cost)
        for unit in ("samples", "tokens", "label_tokens", "patches"):
            own = shares.setdefault(unit, {})
            for key, value in (getattr(loader.shares(draws, sizes), unit) or {}).items():
                own[key] = own.get(key, 0) + value
    planned_s = time.perf_counter() - started
    packs = summary.as_dict(config.packing.max_tokens)
    gpus = args.gpus or args.world
    flops = packs["flops"] / max(summary.steps, 1) * total
    return {
        "config": str(args.config),
        "world": args.world,
        "global_batch_size": summary.samples / max(summary.steps, 1),
        "max_branches": loader.mixture.branches,
        "warnings": list(loader.mixture.warnings),
        "steps_total": total,
        "positions": loader.mixture.length,
        "sources": [
            source_summary(loader.lengths, loader.mixture, n)
            for n in range(len(config.data.sources))
        ],
        "shares": shares,
        "plan": packs,
        "estimate": {
            "flops_total": flops,
            "gpus": gpus,
            "tflops_per_gpu": args.tflops,
            "mfu": args.mfu,
            "days": flops / (gpus * args.tflops * 1e12 * args.mfu) / 86400,
        },
        "seconds": {"index_and_lengths": built_s, "plan": planned_s},
    }


def show(result: dict[str, Any]) -> None:
    """Print the summary."""
    print(f"{result['config']}: {result['positions']} samples, {result['steps_total']} optimizer steps of "
          f"{result['global_batch_size']:.0f} samples, {result['world']} ranks")  # fmt: skip
    for text in result["warnings"]:
        print(f"note: {text}")
    head = f"{'source':16} {'family':10} {'rows':>9} {'eligible':>9} {'drawn':>9}"
    print(f"\n{head}  tokens p50/p95/p99/max        labels p50/max  patches p50/max")
    for row in result["sources"]:
        t, lab, pat = row["tokens"], row["label_tokens"], row["patches"]
        sizes = f"{t['p50']}/{t['p95']}/{t['p99']}/{t['max']}"
        print(f"{row['source']:16} {row['family']:10} {row['rows']:9} {row['eligible']:9} {row['drawn_rows']:9}  "
              f"{sizes:28}  {lab['p50']}/{lab['max']:<12}  {pat['p50']}/{pat['max']}")  # fmt: skip
        for reason, count in row["rejected"].items():
            print(f"  left out: {reason} {count}")
        for name, count in row["notes"].items():
            print(f"  {name.replace('_', ' ')}: {count}")
        if row["tokens_removed"]:
            print(f"  tokens removed from over-long samples: {row['tokens_removed']:,}")
        for name, count in row["blocked"].items():
            print(f"  evaluation scenes of {name}: {count}")
    print("\nrealised shares (samples / LLM tokens / label tokens)")
    for key, samples in result["shares"].get("samples", {}).items():
        parts = [
            samples,
            *(result["shares"][unit].get(key, 0) for unit in ("tokens", "label_tokens")),
        ]
        totals = [
            max(family_total(result["shares"][unit]), 1)
            for unit in ("samples", "tokens", "label_tokens")
        ]
        print(
            f"  {key:28} "
            + " / ".join(f"{100 * a / b:5.1f} %" for a, b in zip(parts, totals, strict=True))
        )
    for text in label_notes(result["shares"]):
        print(f"note: {text}")
    p = result["plan"]
    print(f"\nplan of {p['steps']} steps: {p['packs']} packs ({p['empty_packs']} empty), "
          f"{p['micro_steps_per_step']:.2f} micro-steps per step, fill {100 * p['fill']:.1f} %, "
          f"padding {100 * p['padding']:.2f} %")  # fmt: skip
    print(f"  imbalance over ranks: cost {100 * p['cost_imbalance_mean']:.2f} %, "
          f"ViT patches {100 * p['patch_imbalance_mean']:.2f} %")  # fmt: skip
    print(f"  distinct media per step: mean {p['distinct_media_mean']:.1f}, least {p['distinct_media_min']}; "
          f"groups hold at most {result['max_branches']}")  # fmt: skip
    groups = ", ".join(f"{size}: {count}" for size, count in p["group_sizes"].items())
    print(
        f"  questions per group: {groups}; groups cut by a step border: {p['units_cut_by_steps']}"
    )
    print(f"  shared prefixes: {p['tokens_separate']:,} -> {p['tokens']:,} LLM tokens ({p['tokens_saved']:.2f}x fewer), "
          f"{p['flops_saved']:.2f}x fewer FLOPs")  # fmt: skip
    e = result["estimate"]
    print(f"\nwhole run: {e['flops_total']:.3g} FLOPs; {e['days']:.2f} days on {e['gpus']} GPUs of "
          f"{e['tflops_per_gpu']:.0f} TFLOP/s at {100 * e['mfu']:.0f} % utilisation (an assumption, not a measurement)")  # fmt: skip
    s = result["seconds"]
    print(
        f"took {s['index_and_lengths']:.1f} s for index and lengths, {s['plan']:.1f} s for the plan"
    )


def label_notes(shares: dict[str, dict[str, int]]) -> list[str]:
    """Families whose share of the label tokens is far from their share of the samples."""
    notes = []
    samples, labels = shares.get("samples", {}), shares.get("label_tokens", {})
    for key, count in samples.items():
        if not key.startswith("family/") or not count:
            continue
        share = count / family_total(samples)
        of_labels = labels.get(key, 0) / max(family_total(labels), 1)
        if of_labels < share / 2:
            notes.append(
                f"{key.replace('/', ' ')} has {100 * share:.0f} % of the samples and {100 * of_labels:.0f} % of the label "
                "tokens; data.loss_weighting: sample or sqrt changes what counts"
            )
    return notes


def family_total(counts: dict[str, int]) -> int:
    """Sum over families: everything once."""
    return sum(value for key, value in counts.items() if key.startswith("family/"))


if __name__ == "__main__":
    sys.exit(run_command(main))
