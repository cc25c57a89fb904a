"""Two gloo processes: gradients of shared prefixes under every strategy, against separate samples in one process.

Called with a recipe and the file for the result: relative difference of the whole gradient, and of the loss, by
strategy and computation.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed.ops
from deepspeed.utils import safe_get_full_grad

from spatialvlm.config import TrainConfig, load_config
from spatialvlm.data.build import build_data
from spatialvlm.data.sample import World
from spatialvlm.models.build import build_layout, build_model
from spatialvlm.training.build import build_groups
from spatialvlm.training.distributed import Processes
from spatialvlm.training.engines import deepspeed_settings, make_engine
from spatialvlm.training.optim import build_adamw
from spatialvlm.typing import CostCoefficients

ROOT = Path(__file__).resolve().parents[3]
COST = CostCoefficients(1.0, 0.0, 0.0, 0.0, 0.0)
STRATEGIES = ("ddp", "zero1", "zero2", "zero3")
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def fresh(config):
    """The recipe's model with a geometry branch that matters, and its optimizer groups."""
    torch.manual_seed(0)
    model = build_model(config.model.init_from, config.geometry, attention="tree_sdpa")
    with torch.no_grad():
        for parameter in model.fusion.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    _, groups = build_groups(config, model)
    return model, groups


def first_step(config, world):
    layout = build_layout(config.model.init_from, config.geometry)
    return next(iter(build_data(config, config.model.init_from, layout, COST, world)))


def reference(config):
    model, _ = fresh(config)
    step = first_step(config, World())
    loss = 0.0
    for batch in step.batches:
        part = model(batch).loss_sum / step.denominator_local
        part.backward()
        loss += float(part.detach())
    return loss, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def on_two(config, strategy, processes):
    model, groups = fresh(config)
    settings = None
    if strategy.startswith("zero"):
        file = ROOT / "configs" / "deepspeed" / f"{strategy}_cpu.json"
        settings = deepspeed_settings(
            json.loads(file.read_text()), bf16=False, max_grad_norm=1e9, reduce_dtype="fp32"
        )
    engine = make_engine(
        strategy, model, groups, lambda m: build_adamw(m, groups), processes, max_grad_norm=1e9, bf16=False,
        deepspeed=settings,
    )  # fmt: skip
    step = first_step(config, World(processes.rank, processes.size))
    total = torch.tensor([step.denominator_local], dtype=torch.float64)
    processes.sum(total)
    loss = torch.zeros(1, dtype=torch.float64)
    for number, batch in enumerate(step.batches):
        with engine.micro_step(last=number + 1 == len(step.batches)):
            out = engine(batch)
            engine.backward(out.loss_sum * (processes.size / total.item()))
        loss += out.loss_sum.detach().double()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    grads = {n: p.grad if settings is None else safe_get_full_grad(p) for n, p in named}
    branches = sum(int((batch["segment_parent"] >= 0).sum()) for batch in step.batches)
    return (processes.sum(loss) / total).item(), grads, branches, len(step.batches)


def main():
    config, out = load_config(Path(sys.argv[1]), [], TrainConfig), Path(sys.argv[2])
    alone = ["shared_prefix.compute=separate", "packing.enabled=false"]
    dist.init_process_group("gloo", timeout=dt.timedelta(seconds=60))
    rank = dist.get_rank()
    if rank == 0:  # measures the rows once
        first_step(config, World())
    dist.barrier()
    processes = Processes(
        rank, dist.get_world_size(), torch.device("cpu"), 60.0, dist.new_group(backend="gloo")
    )
    expected, wanted = reference(load_config(Path(sys.argv[1]), alone, TrainConfig))
    size = sum(float(g.double().square().sum()) for g in wanted.values())
    result = {}
    for strategy in STRATEGIES:
        loss, grads, branches, micro_steps = on_two(config, strategy, processes)
        missing = {name for name in wanted if grads.get(name) is None}
        apart = sum(
            float((g.double() - wanted[name].double()).square().sum())
            if name in wanted
            else float(g.double().square().sum())
            for name, g in grads.items()
            if g is not None
        )
        result[strategy] = {
            "loss": abs(loss - expected) / expected,
            "gradient": (apart / size) ** 0.5,
            "missing": sorted(missing),
            "branches": branches,
            "micro_steps": micro_steps,
        }
    if rank == 0:
        out.write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
