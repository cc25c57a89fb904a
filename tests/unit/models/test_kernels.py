import importlib.machinery
import sys
import types

import pytest
import torch

from spatialvlm.errors import ConfigError
from spatialvlm.models.kernels import use_liger
from spatialvlm.testing.rig import gradients, worst_relative


class RMSNorm:
    """Same arguments as the kernel's, computed by PyTorch (the kernels need a GPU)."""

    calls = 0

    @classmethod
    def apply(cls, x, weight, eps, offset, casting_mode, in_place):
        cls.calls += 1
        assert (offset, casting_mode, in_place) == (0.0, "llama", False)
        return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)


class SiLUMul:
    calls = 0

    @classmethod
    def apply(cls, gate, up):
        cls.calls += 1
        return torch.nn.functional.silu(gate) * up


@pytest.fixture
def liger(monkeypatch):
    for name, content in {
        "liger_kernel": {},
        "liger_kernel.ops": {},
        "liger_kernel.ops.rms_norm": {"LigerRMSNormFunction": RMSNorm},
        "liger_kernel.ops.swiglu": {"LigerSiLUMulFunction": SiLUMul},
    }.items():
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)


def test_every_norm_and_mlp_is_replaced_and_numbers_stay(rig, liger):
    bench = rig("qwen3vl")
    expected = bench.model(bench.pack())
    expected.loss_sum.backward()
    wanted = gradients(bench.model)
    bench.model.zero_grad()
    layers = 3
    assert use_liger(bench.model.adapter.language_model) == layers * (2 + 2 + 1) + 1
    output = bench.model(bench.pack())
    output.loss_sum.backward()
    assert (RMSNorm.calls, SiLUMul.calls) == (layers * 4 + 1, layers)
    torch.testing.assert_close(output.loss_sum, expected.loss_sum, rtol=1e-5, atol=1e-5)
    assert worst_relative(gradients(bench.model), wanted) < 1e-5


def test_missing_package_is_named(rig, monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[gpu\]'"):
        use_liger(rig("qwen3vl").model.adapter.language_model)
