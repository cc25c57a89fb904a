"""Which module produced the first non-finite number? One extra forward with hooks answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spatialvlm.errors import NonFiniteError
from spatialvlm.training.distributed import Processes
from spatialvlm.training.engines import Engine
from spatialvlm.typing import Batch


def bad_parameters(engine: Engine, processes: Processes) -> list[str]:
    """Names of trainable parameters that hold NaN or Inf on any rank."""
    mine = [
        s.fqn
        for s in engine.slices(loading=False)
        if not bool(torch.isfinite(s.views["param"]).all())
    ]
    return sorted({name for names in processes.gather(mine) for name in names})


def explain_non_finite(
    error: NonFiniteError, engine: Engine, batches: Sequence[Batch], processes: Processes
) -> NonFiniteError:
    """Extend the guard's message by the first bad output, its rank and samples, and the state of the weights."""
    parameters = bad_parameters(engine, processes)
    found = processes.gather(_first_bad_output(engine, batches))
    places = [f"{name} on rank {r}, samples {uids}" for r, (name, uids) in enumerate(found) if name]
    where = (
        f"First bad output: {places[0]}."
        if places
        else "Every output was finite; a gradient overflowed."
    )
    weights = (
        f"Parameters with NaN or Inf: {parameters[:5]}."
        if parameters
        else "All parameters are finite."
    )
    return NonFiniteError(
        f"{error} {where} {weights} Earlier checkpoints are unaffected. Try: inspect these samples, lower the "
        "learning rate of that part, or resume with guard.max_skipped_in_row raised."
    )


@torch.no_grad()
def _first_bad_output(engine: Engine, batches: Sequence[Batch]) -> tuple[str, list[str]]:
    first: list[str] = []
    uids: list[str] | None = None
    handles = [
        module.register_forward_hook(_hook(name, first))
        for name, module in engine.model.named_modules()
        if name
    ]
    try:
        # All of them: sharded engines gather weights, so the ranks need each other to the end.
        for batch in batches:
            engine(batch)
            if first and uids is None:
                uids = list(batch["uids"])[:8]
    finally:
        for handle in handles:
            handle.remove()
    return (first[0] if first else ""), uids or []


def _hook(name: str, first: list[str]) -> Any:
    def check(module: nn.Module, args: Any, output: Any) -> None:
        del module, args
        tensors = output if isinstance(output, tuple | list) else [output]
        bad = any(
            isinstance(t, Tensor) and t.is_floating_point() and not bool(torch.isfinite(t).all())
            for t in tensors
        )
        if bad and not first:
            first.append(name)

    return check
