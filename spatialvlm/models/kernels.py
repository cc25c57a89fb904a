"""Fused kernels for the decoder: RMSNorm and SwiGLU of liger-kernel; never its loss."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn

from spatialvlm.errors import ConfigError


def use_liger(language_model: nn.Module) -> int:
    """Replace the forward of every RMSNorm and SwiGLU MLP; parameters and names stay.

    Args:
        language_model: Decoder of any backbone.

    Returns:
        Number of modules that changed.

    Raises:
        ConfigError: liger-kernel is not installed, or nothing could be replaced.
    """
    if find_spec("liger_kernel") is None:
        raise ConfigError(
            "model.liger=true needs liger-kernel: pip install -e '.[gpu]', or set model.liger=false"
        )
    changed = 0
    for module in language_model.modules():
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            module.forward = partial(_rms_norm, module)
        elif all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
            if type(module.act_fn).__name__ not in ("SiLU", "SiLUActivation"):
                raise ConfigError(
                    f"model.liger=true: the MLP uses {type(module.act_fn).__name__}, not SiLU; switch it off"
                )
            module.forward = partial(_swiglu, module)
        else:
            continue
        changed += 1
    if not changed:
        raise ConfigError(
            "model.liger=true: the language model has no RMSNorm or SwiGLU; switch it off"
        )
    return changed


def _rms_norm(module: Any, hidden: Tensor) -> Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    # Arguments: input, weight, eps, offset of the weight, casting mode, overwrite the incoming gradient.
    result: Tensor = LigerRMSNormFunction.apply(
        hidden, module.weight, module.variance_epsilon, 0.0, "llama", False
    )
    return result


def _swiglu(module: Any, hidden: Tensor) -> Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    product = LigerSiLUMulFunction.apply(module.gate_proj(hidden), module.up_proj(hidden))
    result: Tensor = module.down_proj(product)
    return result
