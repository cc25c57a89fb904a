"""Activation checkpointing, compilation and fused kernels, block by block."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from spatialvlm.errors import ConfigError


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


def use_liger(layers: Sequence[nn.Module]) -> None:
    """Fused RMSNorm and SwiGLU of liger-kernel in the decoder layers; the loss is never replaced.

    Raises:
        ConfigError: The package is not installed.
    """
    try:
        from liger_kernel.transformers.monkey_patch import (
            _patch_rms_norm_module,
            _patch_swiglu_module,
        )
        from liger_kernel.transformers.swiglu import LigerSwiGLUMLP
    except ImportError as error:
        msg = 'model.liger needs the package: pip install -e ".[gpu]". Or set model.liger to false.'
        raise ConfigError(msg) from error
    for layer in layers:
        for module in layer.modules():
            if type(module).__name__.endswith("RMSNorm"):
                _patch_rms_norm_module(module)
            elif all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj")):
                _patch_swiglu_module(module, LigerSwiGLUMLP)
