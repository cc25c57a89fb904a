"""Process group, handshake, and the one all-reduce of a step.

Accelerate starts the processes and picks the device; the rest is plain ``torch.distributed``. Small Python
objects travel over a gloo group of our own, so their time limit is independent of the training collectives.
"""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from spatialvlm.errors import LaunchError, SpatialVLMError

T = TypeVar("T")


@dataclass(slots=True)
class Processes:
    """Who we are, where we compute, and how small objects travel.

    Args:
        rank: This process, from 0.
        size: Number of processes.
        device: Where the model lives.
        timeout_s: Time limit of every training collective.
        objects: gloo group for Python objects; ``None`` with one process.
    """

    rank: int
    size: int
    device: torch.device
    timeout_s: float = 600.0
    objects: Any = None

    @property
    def is_main(self) -> bool:
        """Rank 0 writes shared files and talks to the user."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """``value`` of every rank, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        out: list[Any] = [None] * self.size
        dist.all_gather_object(out, value, group=self.objects)
        return out

    def broadcast(self, value: T) -> T:
        """Rank 0's ``value`` on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.objects)
        return box[0]

    def on_main(self, function: Callable[[], T]) -> T:
        """Run ``function`` on rank 0 only; its result, or its error, reaches every rank.

        Raises:
            SpatialVLMError: Whatever ``function`` raised, on all ranks alike.
        """
        answer: tuple[Any, SpatialVLMError | None] = (None, None)
        if self.is_main:
            try:
                answer = (function(), None)
            except SpatialVLMError as error:
                answer = (None, error)
        result, problem = self.broadcast(answer)
        if problem is not None:
            raise problem
        return result  # type: ignore[no-any-return]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier(group=self.objects)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, in place, on the device."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def max(self, values: Tensor) -> Tensor:
        """Maximum over ranks, in place, on the device."""
        if self.size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values


def start_processes(*, timeout_s: float, expected: int | None = None) -> Processes:
    """Join the launcher's processes and check that they really are one group.

    Args:
        timeout_s: Time limit of the training collectives.
        expected: ``parallel.world_size`` of the recipe, when it is set.

    Raises:
        LaunchError: The environment, Accelerate, and the process group disagree about the number of ranks.
    """
    from accelerate import PartialState

    wanted = int(os.environ.get("WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available()
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if cuda and local_size > torch.cuda.device_count():
        raise LaunchError(
            f"{local_size} processes on this machine but {torch.cuda.device_count()} visible GPUs. "
            "Set num_processes in the accelerate file, or CUDA_VISIBLE_DEVICES."
        )
    options: dict[str, Any] = {}
    if wanted > 1:
        options = {
            "backend": "nccl" if cuda else "gloo",
            # The watchdog speaks first: it can name the rank that is late.
            "timeout": dt.timedelta(seconds=timeout_s + 30),
        }
    deepspeed = launched_with_deepspeed()
    if deepspeed and not cuda:
        _prepare_deepspeed_on_cpu()
    state = PartialState(cpu=not cuda and not deepspeed, **options)
    if cuda:
        torch.cuda.set_device(state.device)
    device = state.device if cuda else torch.device("cpu")
    size = dist.get_world_size() if dist.is_initialized() else 1
    seen = {
        "WORLD_SIZE": wanted,
        "accelerate num_processes": state.num_processes,
        "process group": size,
        "parallel.world_size": expected if expected is not None else wanted,
    }
    if len(set(seen.values())) > 1:
        table = ", ".join(f"{name}={value}" for name, value in seen.items())
        raise LaunchError(
            f"The processes do not fit together: {table}. On CPU use distributed_type: MULTI_GPU or DEEPSPEED "
            "with use_cpu: false in the accelerate file (MULTI_CPU starts one process), and set num_processes."
        )
    objects = None
    if size > 1:
        objects = dist.new_group(backend="gloo", timeout=dt.timedelta(seconds=3600))
        ones = torch.ones(1, device=device)
        dist.all_reduce(ones)
        if int(ones.item()) != size:
            raise LaunchError(f"An all-reduce of ones gave {ones.item()} with {size} processes.")
    return Processes(state.process_index, size, device, timeout_s, objects)


def launched_with_deepspeed() -> bool:
    """Whether ``accelerate launch`` was given a DeepSpeed configuration."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def _prepare_deepspeed_on_cpu() -> None:
    """Use plain gloo: the shared-memory collective is compiled on first use and knows no time limit."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def same_everywhere(processes: Processes, facts: dict[str, str]) -> None:
    """Refuse ranks that run different code, libraries, or configurations.

    Raises:
        LaunchError: With a table of the differing facts per rank.
    """
    gathered = processes.gather(facts)
    lines = [
        f"  {name}: " + ", ".join(f"rank {r}={f.get(name)}" for r, f in enumerate(gathered))
        for name in facts
        if len({f.get(name) for f in gathered}) > 1
    ]
    if lines:
        raise LaunchError(
            "The ranks do not agree; install the same versions and use the same files on every node:\n"
            + "\n".join(lines)
        )


@contextmanager
def group_timeout(seconds: float) -> Iterator[None]:
    """Give every process group created inside the time limit of the run.

    DeepSpeed makes its own groups with the library default (30 minutes on gloo, 10 on NCCL) otherwise.
    """
    if not dist.is_initialized():
        yield
        return
    original = dist.new_group

    def new_group(*args: Any, **kwargs: Any) -> Any:
        kwargs.setdefault("timeout", dt.timedelta(seconds=seconds))
        return original(*args, **kwargs)

    dist.new_group = new_group
    try:
        yield
    finally:
        dist.new_group = original


@dataclass(slots=True)
class StepHeader:
    """What every rank must know before the first forward of a step; summed over ranks in one all-reduce."""

    denominator: float = 0.0
    """Sum of the loss weights of the step's supervised tokens (or samples)."""
    label_tokens: float = 0.0
    samples: float = 0.0
    tokens: float = 0.0
    """Real tokens of the language model."""
    packs: float = 0.0
    """Micro-steps; equal on all ranks."""
    stop: float = 0.0
    """Ranks that were asked to save and leave."""
    save_due: float = 0.0
    """Rank 0's clock says that a timed checkpoint is due."""
    written: float = 0.0
    """Ranks whose background save has been written."""
    fault: float = 0.0
    """Ranks whose data path raised."""
    broken: tuple[float, ...] = ()
    """Broken samples so far by source; of equal length on all ranks."""


def exchange(processes: Processes, header: StepHeader) -> StepHeader:
    """Sum a header over all ranks: the only data-dependent collective outside the model."""
    names = [f.name for f in fields(StepHeader) if f.name != "broken"]
    own = [*(getattr(header, n) for n in names), *header.broken]
    values = torch.tensor(own, dtype=torch.float64).to(processes.device)
    processes.sum(values)
    sums = values.tolist()
    return StepHeader(
        **dict(zip(names, sums[: len(names)], strict=True)), broken=tuple(sums[len(names) :])
    )


def leave(processes: Processes) -> None:
    """End of a successful run: wait for everyone, then take the process group down."""
    if processes.size > 1:
        processes.barrier()
        dist.destroy_process_group()
