"""Three ways to train on wrong gradients without noticing, beside our engines; writes ``traps.json``.

python tests/fault/trap_worker.py OUT
"""

from __future__ import annotations

import datetime as dt
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}

# Strategy, and whether sample i of 4 has an image; with two ranks, micro-step 0 holds samples 0 and 1.
TRAPS = {
    "zero2_dummy_after_forward": ("zero2", lambda i: i % 2 == 0),  # rank 1 sees text only
    "zero3_text_first_micro_step": ("zero3", lambda i: i >= 2),
    "ddp_text_last_micro_step": ("ddp", lambda i: i < 2),
}


def norms_of_three_steps(strategy: str, size: int, image, *, naive: bool, out: Path) -> int:
    """Gradient norms with rate 0; ``naive`` adds a dummy to the loss (ZeRO-2) or leaves it out."""
    import torch
    import torch.distributed as dist

    from spatialvlm.training.distributed import Processes
    from spatialvlm.training.engines import deepspeed_settings, make_engine
    from spatialvlm.training.optim import set_lrs
    from tests.unit.training.fakes import FakeLoader, FakeVLM, prepare

    torch.set_num_threads(1)
    rank = int(os.environ.get("RANK", "0"))
    if size > 1:
        dist.init_process_group("gloo", timeout=dt.timedelta(seconds=15))
    processes = Processes(rank, size, torch.device("cpu"), 15.0)
    model = FakeVLM(dummy=not naive)
    _, groups, factory = prepare(model)
    settings = None
    if strategy.startswith("zero"):
        file = json.loads((ROOT / "configs" / "deepspeed" / f"{strategy}_cpu.json").read_text())
        settings = deepspeed_settings(file, bf16=False, max_grad_norm=1e9, reduce_dtype="fp32")
    engine = make_engine(
        strategy, model, groups, factory, processes, max_grad_norm=1e9, bf16=False, deepspeed=settings
    )  # fmt: skip
    engine._checked = True
    loader = FakeLoader(rank=rank, size=size, kinds=lambda _, i: image(i))
    found = []
    for _, step in zip(range(3), loader, strict=False):
        total = processes.sum(torch.tensor([step.denominator_local], dtype=torch.float64)).item()
        set_lrs(engine.optimizer, groups, 0.0)
        for i, batch in enumerate(step.batches):
            with engine.micro_step(last=i + 1 == len(step.batches)):
                loss = engine(batch).loss_sum
                if naive and strategy == "zero2" and not batch["flags"].image:
                    unseen = torch.zeros(4, 3)
                    for block in model.visual:
                        unseen = block(unseen)
                    loss = loss + 0.0 * model.projector(unseen).sum()
                engine.backward(loss * (size / total))
        norms = engine.grad_norms(due=True)
        found.append({part: float(norm) for part, norm in norms.items()})
        engine.step(norms)
    if rank == 0:
        out.write_text(json.dumps(found))
    return 0


def main() -> int:
    """Fork every case."""
    folder = Path(sys.argv[1])
    import deepspeed.ops

    import spatialvlm.training.engines  # noqa: F401
    import tests.unit.training.fakes  # noqa: F401
    from spatialvlm.testing.ranks import fork_ranks, launcher_environment

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    results = {}
    for name, (strategy, image) in TRAPS.items():
        for kind, chosen, size in (("reference", "ddp", 1), ("ours", strategy, 2), ("naive", strategy, 2)):  # fmt: skip
            out = folder / f"{name}-{kind}.json"
            codes = fork_ranks(
                lambda s=chosen, n=size, i=image, k=kind, o=out: norms_of_three_steps(s, n, i, naive=k == "naive", out=o),
                launcher_environment(chosen, size, ROOT / "configs" / "deepspeed"),
                size=size, log=folder / f"{name}-{kind}.log", timeout_s=60,
            )  # fmt: skip
            norms = json.loads(out.read_text()) if out.is_file() else None
            results[f"{name}/{kind}"] = {"exits": codes, "norms": norms}
    (folder / "traps.json").write_text(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
