"""What a log line holds: losses, rates, norms, speed, balance, memory, realised mixture.

Counts are summed over ranks with one all-reduce per log line; speeds are wall-clock over the whole interval,
waits, saves and evaluation included. FLOPs are those the model needs, without recomputation.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spatialvlm.data.faults import LOAD_REASONS
from spatialvlm.training.distributed import Processes
from spatialvlm.training.loss import LossSums
from spatialvlm.typing import Batch, CostCoefficients

PEAK_TFLOPS = {
    "H100": 989.0,
    "H200": 989.0,
    "A100": 312.0,
    "B200": 2250.0,
    "H20": 148.0,
}
"""Dense bf16 TFLOP/s of the data sheets, by a part of the device name (longest match)."""


def peak_flops(device: torch.device) -> float | None:
    """Data-sheet peak of the device in FLOP/s; ``None`` when unknown (CPU, other GPUs)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    known = [key for key in PEAK_TFLOPS if key in name]
    return PEAK_TFLOPS[max(known, key=len)] * 1e12 if known else None


def measure_gemm(device: torch.device) -> float:
    """Best matrix-multiplication rate of this process in FLOP/s: 8192³ bf16 on a GPU, 1024³ fp32 on CPU."""
    cuda = device.type == "cuda"
    size, dtype, repeats = (8192, torch.bfloat16, 20) if cuda else (1024, torch.float32, 5)
    left = torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(repeats):
        if cuda:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        left @ left
        if cuda:
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


@dataclass(frozen=True, slots=True)
class PackSize:
    """Integers of one batch that speed and cost are made of."""

    samples: int
    tokens: int
    """Real language-model tokens: no alignment padding, no dummy pack."""
    allocated: int
    label_tokens: int
    pairs: int
    """(query, key) pairs the attention rule allows."""
    head_rows: int
    patches: int
    patch_pairs: int
    geometry_tokens: int
    geometry_frame_pairs: int
    geometry_global_pairs: int
    saved: int = 0
    """Tokens that separate samples would have read again: a prefix with k branches is read once, not k times."""

    def flops(self, cost: CostCoefficients) -> float:
        """Training FLOPs of the pack under ``cost``."""
        return (
            cost.per_token * self.tokens
            + cost.per_pair * self.pairs
            + cost.per_head_row * self.head_rows
            + cost.per_patch * self.patches
            + cost.per_patch_pair * self.patch_pairs
            + cost.geometry_per_token * self.geometry_tokens
            + cost.geometry_per_frame_pair * self.geometry_frame_pairs
            + cost.geometry_per_global_pair * self.geometry_global_pairs
        )


def pack_size(batch: Batch, *, geometry_patch: int = 14, geometry_extra: int = 5) -> PackSize:
    """Count a batch on the host, before it is moved to the device.

    Args:
        batch: One pack.
        geometry_patch: Patch side of the geometry encoder in pixels.
        geometry_extra: Its camera and register tokens per frame.
    """
    uids = batch.get("uids") or []
    lengths = batch["segment_len"].tolist()
    parents = batch["segment_parent"].tolist()
    pairs = sum(
        n * (n + 1) // 2 + (n * lengths[p] if p >= 0 else 0)
        for n, p in zip(lengths, parents, strict=True)
    )
    grids = batch["media_grid_thw"].tolist() if "media_grid_thw" in batch else []
    shapes = batch["geometry_shapes"].tolist() if "geometry_shapes" in batch else []
    frames = [
        (s, (h // geometry_patch) * (w // geometry_patch) + geometry_extra) for s, h, w in shapes
    ]
    branches = Counter(parent for parent in parents if parent >= 0)
    real = int((batch["loss_weight"] > 0).sum())
    return PackSize(
        samples=len(uids),
        tokens=sum(lengths) if uids else 0,
        allocated=int(batch["input_ids"].numel()),
        label_tokens=real,
        pairs=pairs if uids else 0,
        head_rows=real,
        patches=sum(t * h * w for t, h, w in grids),
        patch_pairs=sum(t * (h * w) ** 2 for t, h, w in grids),
        geometry_tokens=sum(s * n for s, n in frames),
        geometry_frame_pairs=sum(s * n * n for s, n in frames),
        geometry_global_pairs=sum((s * n) ** 2 for s, n in frames),
        saved=sum((count - 1) * lengths[parent] for parent, count in branches.items()),
    )


@dataclass(slots=True)
class Interval:
    """Counts and times of this rank since the last log line."""

    started: float = field(default_factory=time.perf_counter)
    steps: int = 0
    samples: int = 0
    tokens: int = 0
    allocated: int = 0
    label_tokens: int = 0
    saved: int = 0
    flops: float = 0.0
    """Predicted for this rank."""
    wait_s: float = 0.0
    compute_s: float = 0.0
    """Forward and backward."""
    optimizer_s: float = 0.0
    """Gradient norms, clipping, update."""
    stall_s: float = 0.0
    """Saves."""
    pause_s: float = 0.0
    """Evaluations."""
    measured: int = 0
    """Steps whose gradient norms were read; under ZeRO only those that end an interval."""
    clipped: int = 0
    skipped: int = 0
    empty: int = 0
    packs: int = 0


_SUMMED = (
    "samples",
    "tokens",
    "allocated",
    "label_tokens",
    "saved",
    "flops",
    "wait_s",
    "compute_s",
    "optimizer_s",
)


class Meter:
    """Turns interval counts into the scalars of a log line.

    Args:
        processes: Ranks.
        sums: Loss sums, filled by the loop.
        total_steps: For the remaining time.
        max_tokens: ``packing.max_tokens``, for the fill of packs.
        peak: Peak FLOP/s of one device, or ``None``.
    """

    def __init__(
        self,
        processes: Processes,
        sums: LossSums,
        *,
        total_steps: int,
        max_tokens: int,
        peak: float | None,
    ) -> None:
        self.processes = processes
        self.sums = sums
        self.total_steps = total_steps
        self.max_tokens = max_tokens
        self.peak = peak
        self.gemm: float | None = None
        """Matrix-product rate of this process in FLOP/s, measured at the first line."""
        self.flops = 0.0
        """FLOPs of all ranks in the interval of the newest line."""
        self.interval = Interval()
        self._step_times: deque[float] = deque(maxlen=50)

    def read(
        self,
        step: int,
        *,
        lrs: Mapping[str, float],
        norms: Mapping[str, Tensor] | None,
        faults: Mapping[str, int],
    ) -> tuple[dict[str, float], list[float]]:
        """Scalars of the line (equal on all ranks) and the loss of every step in the interval; resets both.

        Args:
            step: Steps done.
            lrs: Rate per part.
            norms: Gradient norm per part, of the newest step.
            faults: Broken samples of this rank since its start, by reason.
        """
        mine = self.interval
        size, rank = self.processes.size, self.processes.rank
        own = torch.tensor([float(getattr(mine, name)) for name in _SUMMED], dtype=torch.float64)
        times = torch.zeros(size, dtype=torch.float64)
        times[rank] = mine.compute_s
        broken = torch.tensor([float(faults.get(name, 0)) for name in LOAD_REASONS]).double()
        flat = self.sums.flat()
        host = torch.cat([own, times, broken]).to(flat.device)
        reduced = self.processes.sum(torch.cat([host, flat])).cpu()
        counted, times, broken, sums = torch.split(
            reduced, [len(own), size, len(broken), len(flat)]
        )
        total = dict(zip(_SUMMED, counted.tolist(), strict=True))
        self.flops = total["flops"]
        losses, scalars = self.sums.read(sums)
        wall = max(time.perf_counter() - mine.started, 1e-9)
        extremes = torch.tensor(
            [mine.flops, _peak_memory(self.processes.device), _reserved(self.processes.device), _rss()],
            dtype=torch.float64,
        ).to(self.processes.device)  # fmt: skip
        most = self.processes.max(extremes).tolist()
        if self.gemm is None:
            self.gemm = measure_gemm(self.processes.device)
            wall_after = time.perf_counter()
        else:
            wall_after = mine.started + wall
        steps = max(mine.steps, 1)
        self._step_times.append(wall / steps)
        scalars |= {f"lr/{part}": lr for part, lr in lrs.items()}
        if norms is not None:
            scalars |= {f"grad_norm/{part}": float(norm) for part, norm in norms.items()}
        scalars |= {
            "clipped": mine.clipped / max(mine.measured, 1),
            "skipped": float(mine.skipped),
            "empty": float(mine.empty),
            "tokens": total["tokens"],
            "tokens_per_s": total["tokens"] / wall,
            "supervised_tokens_per_s": total["label_tokens"] / wall,
            "samples_per_s": total["samples"] / wall,
            "step_s": (wall - mine.stall_s - mine.pause_s) / steps,
            "forward_backward_s": total["compute_s"] / size / steps,
            "optimizer_s": total["optimizer_s"] / size / steps,
            "data_wait": total["wait_s"] / size / wall,
            "checkpoint/stall_s": mine.stall_s,
            "tflops_per_device": total["flops"] / wall / size / 1e12,
            "mfu_gemm": total["flops"] / wall / size / self.gemm,
            "padding": 1 - total["tokens"] / total["allocated"] if total["allocated"] else 0.0,
            "pack_fill": total["tokens"] / max(1, mine.packs * size) / self.max_tokens,
            "imbalance/predicted": most[0] * size / total["flops"] - 1 if total["flops"] else 0.0,
            "imbalance/time": float(times.max()) * size / total["compute_s"] - 1
            if total["compute_s"]
            else 0.0,
            "straggler": float(times.argmax()),
            "prefix/saved_tokens": total["saved"],
            "memory/peak_gib": most[1],
            "memory/reserved_gib": most[2],
            "memory/host_rss_gib": most[3],
            "eta_s": statistics.median(self._step_times) * max(0, self.total_steps - step),
        }
        scalars |= {
            f"faults/{n}": c for n, c in zip(LOAD_REASONS, broken.tolist(), strict=True) if c
        }
        if self.peak is not None:
            scalars["mfu"] = total["flops"] / wall / size / self.peak
        self.interval = Interval(started=wall_after)
        self.sums.reset()
        return scalars, losses


def _peak_memory(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else _rss()


def _reserved(device: torch.device) -> float:
    return torch.cuda.max_memory_reserved(device) / 2**30 if device.type == "cuda" else 0.0


def _rss() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
