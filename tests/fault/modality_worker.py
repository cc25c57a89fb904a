"""Every pair of modalities on two ranks under every engine, against one process; prints a JSON file.

    python tests/fault/modality_worker.py OUT

The parent only loads libraries; ranks are forked from it.
"""

from __future__ import annotations

import datetime as dt
import itertools
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}

KINDS = ("image", "video", "both", "text", "none")
PAIRS = list(itertools.product(KINDS, KINDS))
MIXED = [
    ("image", "text"),
    ("text", "image"),
    ("video", "none"),
    ("none", "both"),
    ("text", "none"),
    ("none", "none"),
]
WITHOUT_DUMMY = ("ddp", "zero3")
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
RATES = {"language_model": 1e-3, "vision_encoder": 1e-3, "projector": 1e-3, "embeddings": 1e-3}
VARIANTS = {
    "geometry": (RATES | {"geometry_fusion": 1e-3}, PAIRS, STRATEGIES),
    "plain": (RATES, MIXED, STRATEGIES),
    "frozen_vision": (RATES | {"vision_encoder": None}, MIXED, STRATEGIES),
    "lora": ({"lora": 1e-3, "projector": 1e-3}, MIXED, STRATEGIES),
}


def build(folder: Path, variant: str):
    """The tiny model with groups and an optimizer factory."""
    from spatialvlm.models.lora import add_adapters
    from spatialvlm.models.param_groups import freeze_modules, split_parts
    from spatialvlm.testing.rig import Rig
    from spatialvlm.training.optim import build_adamw, freeze_by_rate, plan_groups

    rates = VARIANTS[variant][0]
    geometry = {} if variant == "geometry" else None
    rig = Rig.load("qwen3vl", folder / "model", vggt=folder / "vggt.safetensors", geometry=geometry)
    if geometry is not None:
        rig.randomise_fusion()
    if variant == "lora":
        import torch

        add_adapters(rig.model, ["language_model"], rank=4, alpha=8)
        with torch.no_grad():
            for name, parameter in rig.model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter))
    parts = split_parts(rig.model)
    freeze_by_rate(parts, rates)
    rig.model.train()
    freeze_modules(rig.model)
    groups = plan_groups(rig.model, parts, rates)
    return rig, groups, lambda model: build_adamw(model, groups)


def pack(rig, kind: str, seed: int):
    """A batch of one modality; ``none`` is what the data path calls a dummy pack."""
    from spatialvlm.testing.packs import Member

    group = 0 if rig.model.fusion is not None else -1
    clips = {
        "image": (rig.clip(group=group),),
        "video": (rig.clip("video", 3, wide=True, group=group),),
        "both": (rig.clip(), rig.clip("video", 2, group=group)),
        "text": (),
        "none": (),
    }[kind]
    batch = rig.pack([Member(clips, branches=(4 + seed % 3,), seed=seed)])
    if kind == "none":
        batch["loss_weight"] = batch["loss_weight"] * 0
        batch["uids"] = []
    return batch


def micro_steps(rig, pair, number: int, rank: int):
    """Two micro-steps of a rank; the all-text one comes first or last in turn."""
    own = pack(rig, pair[rank], 10 * number + rank)
    text = pack(rig, "text", 10 * number + 5 + rank)
    return [own, text] if number % 2 else [text, own]


def one_step(engine, batches, denominator: float, size: int):
    """Loss and norms of a step; the rate is 0, so weights stay."""
    loss = 0.0
    for i, batch in enumerate(batches):
        with engine.micro_step(last=i + 1 == len(batches)):
            out = engine(batch)
            engine.backward(out.loss_sum * (size / denominator))
        loss += out.loss_sum.item()
    norms = {k: float(v) for k, v in engine.grad_norms(due=True).items()}
    engine.step(engine.grad_norms(due=True))
    return loss / denominator, norms


def rank_body(
    folder: Path, variant: str, strategy: str, size: int, out: Path, *, dummy: bool = True
) -> int:
    """All pairs of a variant under one engine; without ``dummy`` packs without media skip the vision pass."""
    import torch
    import torch.distributed as dist

    from spatialvlm.models.geometry.base import assert_frozen
    from spatialvlm.training.distributed import Processes
    from spatialvlm.training.engines import deepspeed_settings, make_engine
    from spatialvlm.training.optim import set_lrs

    torch.set_num_threads(1)
    rank = int(os.environ.get("RANK", "0"))
    if size > 1:
        dist.init_process_group("gloo", timeout=dt.timedelta(seconds=20))
    processes = Processes(rank, size, torch.device("cpu"), 20.0)
    rig, groups, factory = build(folder, variant)
    settings = None
    if strategy.startswith("zero"):
        file = json.loads((ROOT / "configs" / "deepspeed" / f"{strategy}_cpu.json").read_text())
        settings = deepspeed_settings(file, bf16=False, max_grad_norm=1e9, reduce_dtype="fp32")
    engine = make_engine(
        strategy, rig.model, groups, factory, processes, max_grad_norm=1e9, bf16=False, deepspeed=settings,
    )  # fmt: skip
    set_lrs(engine.optimizer, groups, 0.0)
    if rig.model.geometry is not None:
        encoder = rig.model.geometry.encoder
        assert_frozen(encoder, (p for g in engine.optimizer.param_groups for p in g["params"]))
    if not dummy:
        rig.model._see_dummy = lambda: None
    engine._checked = True  # a frozen vision encoder leaves some deepstack norms without a gradient
    found = []
    for number, pair in enumerate(VARIANTS[variant][1]):
        steps = [micro_steps(rig, pair, number, r) for r in range(2)]
        everything = [batch for own in steps for batch in own]
        denominator = float(sum(float(batch["loss_weight"].sum()) for batch in everything))
        mine = everything if size == 1 else steps[rank]
        loss, norms = one_step(engine, mine, denominator, size)
        total = torch.tensor([loss], dtype=torch.float64)
        found.append([float(processes.sum(total)), norms])
    if rank == 0:
        out.write_text(json.dumps(found))
    return 0


def main() -> int:
    """Fork all engines, one after the other."""
    folder = Path(sys.argv[1])
    import deepspeed.ops
    import transformers.models.qwen3_vl.modeling_qwen3_vl  # noqa: F401

    import spatialvlm.training.engines  # noqa: F401
    from spatialvlm.testing import make_checkpoint, make_vggt
    from spatialvlm.testing.ranks import fork_ranks, launcher_environment

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    make_checkpoint("qwen3vl", folder / "model", seed=0)
    make_vggt(folder / "vggt.safetensors", seed=0)
    results, exits = {}, {}
    for variant, (_, _, strategies) in VARIANTS.items():
        for strategy, size in [("ddp", 1), *((s, 2) for s in strategies)]:
            name = f"{variant}/{strategy}-{size}"
            out = folder / "out.json"
            env = launcher_environment(strategy, size, ROOT / "configs" / "deepspeed")
            exits[name] = fork_ranks(
                lambda v=variant, s=strategy, n=size, o=out: rank_body(folder, v, s, n, o),
                env, size=size, log=folder / "ranks.log", timeout_s=180,
            )  # fmt: skip
            results[name] = json.loads(out.read_text()) if exits[name] == [0] * size else None
            out.unlink(missing_ok=True)
    for strategy in WITHOUT_DUMMY:
        exits[f"without dummy/{strategy}"] = fork_ranks(
            lambda s=strategy: rank_body(folder, "geometry", s, 2, folder / "no.json", dummy=False),
            launcher_environment(strategy, 2, ROOT / "configs" / "deepspeed"),
            size=2, log=folder / "without_dummy.log", timeout_s=60,
        )  # fmt: skip
    (folder / "modalities.json").write_text(json.dumps({"exits": exits, "results": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
