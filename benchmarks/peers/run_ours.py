"""This project on a mix: the shipped stage 1 recipe, unchanged, under the stopwatch.

    python benchmarks/peers/run_ours.py FOLDER MIX OUT.jsonl --batch 8 --steps 10 [--share]

``--efficiency`` measures instead how much of the GEMM rate a mid-size model gets out of one core: FLOPs of forward and
backward over CPU seconds, against the best of many matrix products between the steps.
"""

from __future__ import annotations

import argparse
import functools
import json
import runpy
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from probe import Probe, answer_name, recorder
from stopwatch import Stopwatch, arguments, cpu_seconds, gemm_rate, overrides

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    parser = arguments()
    parser.add_argument("--share", action="store_true", help="shared prefixes of up to 8 questions")
    parser.add_argument("--efficiency", action="store_true")
    args = parser.parse_args()
    if args.efficiency:
        efficiency(args)
        return
    options = recipe(args)
    run = Path(tempfile.mkdtemp())
    config = run / "config.yaml"  # JSON is YAML
    config.write_text(json.dumps(options | {"run": {"dir": str(run / "run")}}), encoding="utf-8")
    found = recorder(args)
    watch_model(found)
    sys.argv = ["recipes/stage1.py", str(config), *args.set]
    try:
        runpy.run_path(str(ROOT / "recipes" / "stage1.py"), run_name="__main__")
    except SystemExit as exit:
        if exit.code:
            raise
    if isinstance(found, Stopwatch):
        lines = (run / "run" / "metrics.jsonl").read_text().splitlines()
        found.losses += [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]
    named = {key: value for key, value in options.items() if key not in ("model", "data")}
    found.write(args.out, named | overrides(args.set), ("accelerate",))


def recipe(args: argparse.Namespace) -> dict[str, Any]:
    """The configuration; what is not said has its default."""
    folder = args.folder / args.mix
    sources = [
        {"name": name, "family": name, "files": [f"{name}.jsonl"], "root": str(folder)}
        for name in ("spatial", "general")
    ]
    rate = 1e-5
    return {
        "stage": 1,
        "model": {"backbone": "tiny_qwen2_5vl", "init_from": str(args.folder / "model")},
        "precision": "fp32",
        "optim": dict.fromkeys(("lr", "vision_lr", "projector_lr", "embedding_lr"), rate),
        "schedule": {"kind": "constant", "warmup_steps": 0},
        "data": {
            "sources": sources,
            "families": {"spatial": 1, "general": 1},
            "length": {"steps": args.steps},
            "index_dir": str(folder / "index"),
        },
        "step": {"global_batch_size": args.batch},
        "packing": {"max_tokens": 4096},
        "shared_prefix": {"enabled": args.share},
        "memory": {"checkpoint_language_model": False},
        "loader": {"num_workers": 0},
        "log": {"every": 1},
        "checkpoint": {"every": 10_000},
    }


def efficiency(args: argparse.Namespace) -> None:
    """Share of the GEMM rate, packs of the mix, all parameters trained."""
    import torch
    from mix import write_model

    from spatialvlm.config import TrainConfig, load_config
    from spatialvlm.data.build import build_data
    from spatialvlm.data.sample import World
    from spatialvlm.models.build import build_layout, build_model
    from spatialvlm.training.build import build_cost
    from spatialvlm.training.metrics import pack_size

    torch.set_num_threads(1)
    args.steps += args.warmup
    work = Path(tempfile.mkdtemp())
    base = write_model(
        work / "model", text_width=768, text_layers=8, vision_width=512, vision_layers=8
    )
    file = work / "config.yaml"
    file.write_text(
        json.dumps(recipe(args) | {"run": {"dir": str(work / "run")}}), encoding="utf-8"
    )
    config = load_config(file, [], TrainConfig)
    layout = build_layout(base)
    model = build_model(base).train()
    cost = build_cost(config, model)
    steps = iter(build_data(config, base, layout, cost.balance, World()))
    rates, gemm = [], [gemm_rate(1024)]
    for number in range(args.steps):
        packs = next(steps).batches
        model.zero_grad(set_to_none=True)
        start = cpu_seconds()
        for pack in packs:
            model(pack).loss_sum.backward()
        spent = cpu_seconds() - start
        gemm.append(gemm_rate(1024))
        if number >= args.warmup:
            rates.append(sum(pack_size(pack).flops(cost.model) for pack in packs) / spent)
    result = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "gflops": statistics.median(rates) / 1e9,
        "gemm_gflops": max(gemm) / 1e9,
        "of_gemm": statistics.median(rates) / max(gemm),
        "steps": [rate / 1e9 for rate in rates],
    }
    with args.out.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(result) + "\n")


def watch_model(found: Stopwatch | Probe) -> None:
    """Look at the packs on their way into the model."""
    from spatialvlm.models.spatial_vlm import SpatialVLM

    original = SpatialVLM.forward

    @functools.wraps(original)
    def forward(self: Any, batch: Any) -> Any:
        output = original(self, batch)
        uids = batch.get("uids")
        if not self.training or not uids:
            return output
        if isinstance(found, Probe):
            means = (output.sample_loss / output.sample_weight).tolist()
            owner, tokens = batch["sample_index"], batch["target_ids"]
            names = [answer_name(tokens[owner == i]) for i in range(len(uids))]
            found.answered(dict(zip(names, means, strict=True)))
            found.losses.append(float(output.loss_sum))
            found.images.append(bool(batch["media_kind"].numel()))
        else:
            tokens = sum(batch["segment_len"].tolist())
            found.count(tokens, batch["input_ids"].numel(), len(uids))
        return output

    SpatialVLM.forward = forward


if __name__ == "__main__":
    main()
