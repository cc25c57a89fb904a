"""Activation checkpointing and compilation, block by block."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_blocks(blocks: Sequence[nn.Module], *, preserve_rng: bool) -> None:
    """Recompute each block in the backward pass (non-reentrant, so hooks and frozen inputs work).

    Args:
        blocks: Decoder layers or vision blocks.
        preserve_rng: Needed only when some dropout is active.
    """
    for block in blocks:
        block.forward = functools.partial(_recompute, block.forward, preserve_rng)


def _recompute(forward: Any, preserve_rng: bool, *args: Any, **kwargs: Any) -> Any:
    return checkpoint(
        forward, *args, use_reentrant=False, preserve_rng_state=preserve_rng, **kwargs
    )


def compile_blocks(blocks: Sequence[nn.Module]) -> None:
    """``torch.compile`` every block with dynamic shapes; beyond 8 recompilations it runs eagerly and says so."""
    import torch._dynamo.config

    torch._dynamo.config.recompile_limit = 8
    for block in blocks:
        block.compile(dynamic=True)
