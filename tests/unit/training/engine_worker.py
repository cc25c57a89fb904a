"""Two gloo processes, every strategy in one launch; prints one JSON object on rank 0."""

from __future__ import annotations

import datetime as dt
import gc
import json
import math
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed.ops

from spatialvlm.errors import NonFiniteError
from spatialvlm.training.checkpoint import CheckpointStore, Snapshot, load_checkpoint
from spatialvlm.training.distributed import Processes
from spatialvlm.training.engines import deepspeed_settings, make_engine
from spatialvlm.training.estimate import state_bytes
from spatialvlm.training.optim import build_adamw, plan_groups, set_lrs, verify_groups
from spatialvlm.training.trace import explain_non_finite
from spatialvlm.typing import LossOutput
from tests.unit.training.fakes import RATES, FakeLoader, FakeVLM, make_batch, prepare

ROOT = Path(__file__).resolve().parents[3]
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def engine_for(strategy, processes, seed=0, rates=RATES):
    torch.manual_seed(1)
    model = FakeVLM(seed)
    _, groups, factory = prepare(model, rates)
    return make_engine(
        strategy,
        model,
        groups,
        factory,
        processes,
        max_grad_norm=0.5,
        bf16=False,
        deepspeed=cpu_settings(strategy),
    )


def run_steps(engine, processes, start, stop, poison=(), kinds=None):
    loader = FakeLoader(
        rank=processes.rank, size=processes.size, start=start, poison=poison, kinds=kinds
    )
    losses, norms, applied = [], [], []
    for step, data in zip(range(start, stop), loader, strict=False):
        total = torch.tensor([data.denominator_local], dtype=torch.float64)
        processes.sum(total)
        set_lrs(engine.optimizer, engine.groups, 1.0 / (step + 1))
        loss = torch.zeros(1, dtype=torch.float64)
        for i, batch in enumerate(data.batches):
            with engine.micro_step(last=i + 1 == len(data.batches)):
                out = engine(batch)
                engine.backward(out.loss_sum * (processes.size / total.item()))
            loss += out.loss_sum.detach().double()
        found = engine.grad_norms(due=True)
        norms.append({k: float(v) for k, v in found.items()})
        applied.append(engine.step(found))
        if applied[-1] and engine.strategy.startswith("zero"):  # what DeepSpeed clipped by
            norms[-1]["deepspeed"] = float(engine.engine.get_global_grad_norm())
        losses.append((processes.sum(loss) / total).item())
    return losses, norms, applied


def local_state(engine):
    """Copies of this rank's masters and moments."""
    return [view.clone() for s in engine.slices(loading=False) for view in s.views.values()]


class Wide(nn.Module):
    """Two million parameters, so that what is fixed (buckets, counters) weighs little."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(512, 512, bias=False) for _ in range(8))

    def forward(self, batch):
        x = batch["x"]
        for layer in self.layers:
            x = layer(x)
        nothing = torch.zeros(1)
        return LossOutput(x.sum(), *(nothing,) * 6)


def tensor_bytes():
    """Bytes of all storages that Python can reach."""
    gc.collect()
    found = {}
    for item in gc.get_objects():
        if type(item) in (torch.Tensor, nn.Parameter, DTensor):
            local = item.to_local() if type(item) is DTensor else item
            found[local.untyped_storage().data_ptr()] = local.untyped_storage().nbytes()
    return sum(found.values())


def bytes_per_parameter(strategy, processes):
    """Measured and estimated bytes of weights, gradients, masters and moments per parameter, between two micro-steps."""
    before = tensor_bytes()
    model = Wide()
    total = sum(p.numel() for p in model.parameters())
    groups = plan_groups(
        model, {"language_model": list(model.named_parameters())}, {"language_model": 1e-3}
    )
    settings = cpu_settings(strategy)
    engine = make_engine(
        strategy, model, groups, lambda m: build_adamw(m, groups), processes, max_grad_norm=1.0, bf16=False,
        deepspeed=settings,
    )  # fmt: skip
    batch = {"x": torch.ones(2, 512)}
    for last in (True, True, False):
        with engine.micro_step(last=last):
            engine.backward(engine(batch).loss_sum)
        if last:
            engine.step(engine.grad_norms(due=True))
    kept = [p.grad for p in model.parameters() if p.grad is not None]
    measured = (tensor_bytes() - before) / total
    del kept
    bucket = settings["zero_optimization"]["reduce_bucket_size"] if settings else 0
    planned = state_bytes(strategy, trainable=total, frozen=0, world=processes.size, bf16=False, bucket=bucket)  # fmt: skip
    return measured, planned / total


def cpu_settings(strategy):
    if not strategy.startswith("zero"):
        return None
    file = ROOT / "configs" / "deepspeed" / f"{strategy}_cpu.json"
    return deepspeed_settings(
        json.loads(file.read_text()), bf16=False, max_grad_norm=0.5, reduce_dtype="fp32"
    )


def main():
    out_dir = Path(sys.argv[1])
    strategies = sys.argv[2].split(",")
    size = int(os.environ.get("WORLD_SIZE", "1"))
    objects = None
    if size > 1:
        dist.init_process_group("gloo", timeout=dt.timedelta(seconds=60))
        objects = dist.new_group(backend="gloo")
    rank = dist.get_rank() if size > 1 else 0
    processes = Processes(rank, size, torch.device("cpu"), 60.0, objects)
    result = {}
    for strategy in strategies:
        engine = engine_for(strategy, processes)
        found = {"first": run_steps(engine, processes, 0, 3)}
        store = CheckpointStore(out_dir / f"{strategy}-{size}", processes)
        snapshot = Snapshot({"adam_step": 3}, {}, "stage: 1\n", {})
        path = store.save(3, engine, snapshot)
        found["second"] = run_steps(engine, processes, 3, 6)
        verify_groups(engine.optimizer, engine.groups, 1.0 / 6)
        found["nan"] = run_steps(engine, processes, 6, 8, poison={(6, size - 1)})
        before = local_state(engine)
        bad = run_steps(
            engine, processes, 8, 10, poison={(8, size - 1): math.inf, (9, 0): -math.inf}
        )
        same = [torch.equal(a, b) for a, b in zip(before, local_state(engine), strict=True)]
        found["inf"] = [*bad, processes.gather(all(same)), run_steps(engine, processes, 10, 11)]
        batches = [make_batch(2 * i + rank, image=True) for i in range(2)]
        if rank == size - 1:
            batches[0]["frames_u8"] = torch.full_like(batches[0]["frames_u8"], math.nan, dtype=torch.float32)  # fmt: skip
        diagnosis = explain_non_finite(NonFiniteError("5 in a row."), engine, batches, processes)
        found["diagnosis"] = processes.gather(str(diagnosis))
        again = engine_for(strategy, processes, seed=7)
        load_checkpoint(path, again, processes)
        found["resumed"] = run_steps(again, processes, 3, 6)
        store.save(6, again, snapshot)
        if strategy.startswith("zero"):  # what other trainers leave behind, for the importer
            again.engine.save_checkpoint(str(out_dir / f"native-{strategy}"), tag="global_step6")
        result[strategy] = found
    result["memory"] = {s: bytes_per_parameter(s, processes) for s in strategies}
    for origin in sys.argv[3].split(",") if len(sys.argv) > 3 else []:
        for strategy in strategies:
            engine = engine_for(strategy, processes, seed=9)
            load_checkpoint(out_dir / origin / "step-00000003", engine, processes)
            again = CheckpointStore(out_dir / f"{origin}-as-{strategy}", processes)
            again.save(3, engine, snapshot)
            result[f"{origin}->{strategy}"] = {"resumed": run_steps(engine, processes, 3, 6)}
    if rank == 0:
        (out_dir / f"result-{size}.json").write_text(json.dumps(result))
    if size > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
