"""How fast checkpoints are written, hashed, verified and read, beside the bare disk and hash.

python benchmarks/checkpoint_io.py --megabytes 300 --out /tmp/io --json benchmarks/results/checkpoint_io.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from spatialvlm.training.checkpoint import CheckpointStore, Snapshot, load_slices
from spatialvlm.training.checkpoint_files import verify
from spatialvlm.training.distributed import Processes
from spatialvlm.training.engines import make_engine
from spatialvlm.training.optim import build_adamw, plan_groups


def timed(work: Callable[[], object]) -> float:
    """Wall seconds of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=300, help="size of a checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="folder on the disk to measure")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    width, layers = 1024, max(1, round(arguments.megabytes * 1e6 / 12 / 1024**2))
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    processes = Processes(0, 1, torch.device("cpu"))
    groups = plan_groups(
        model, {"language_model": list(model.named_parameters())}, {"language_model": 1e-3}
    )
    engine = make_engine(
        "ddp",
        model,
        groups,
        lambda m: build_adamw(m, groups),
        processes,
        max_grad_norm=1.0,
        bf16=False,
    )
    engine.slices(loading=False)
    size = 12 * sum(p.numel() for p in model.parameters())
    shutil.rmtree(arguments.out, ignore_errors=True)
    store = CheckpointStore(arguments.out, processes)
    snapshot = Snapshot({"adam_step": 0}, {}, "", {})
    block = os.urandom(1 << 24)

    def write_plain() -> None:
        with (arguments.out / "plain").open("wb") as file:
            for _ in range(size // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())

    save = timed(lambda: store.save(1, engine, snapshot))
    path = arguments.out / "step-00000001"
    result = {
        "bytes": size,
        "save_GB_s": size / 1e9 / save,
        "plain_write_GB_s": size / 1e9 / timed(write_plain),
        "sha256_GB_s": size
        / 1e9
        / timed(lambda: [hashlib.sha256(block) for _ in range(size // len(block))]),
        "verify_full_GB_s": size / 1e9 / timed(lambda: verify(path)),
        "verify_sizes_s": timed(lambda: verify(path, mode="sizes")),
        "load_GB_s": size
        / 1e9
        / timed(lambda: load_slices(path, engine.slices(loading=True), groups)),
        "load_average": os.getloadavg()[0],
    }
    print(json.dumps(result, indent=1))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    shutil.rmtree(arguments.out)


if __name__ == "__main__":
    main()
