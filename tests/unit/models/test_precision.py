"""Reduced precision, recomputation, compilation: same numbers within reason."""

import pytest
import torch

from spatialvlm.testing.rig import FAMILIES, gradients, worst_relative


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_weights_and_bf16_autocast_stay_close(rig, family):
    losses = {}
    for name in ("fp32", "weights", "autocast"):
        dtype = torch.bfloat16 if name == "weights" else torch.float32
        bench = rig(family, {"precision": "bf16"}, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=name == "autocast"):
            output = bench.model(bench.pack())
            output.loss_sum.backward()
        assert output.loss_sum.dtype == torch.float32
        assert all(
            p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in bench.model.parameters()
        )
        losses[name] = output.loss_sum.item()
    assert losses["weights"] == pytest.approx(losses["fp32"], rel=2e-2)
    assert losses["autocast"] == pytest.approx(losses["fp32"], rel=2e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputing_blocks_changes_no_bit(rig, family):
    from spatialvlm.training.memory import checkpoint_blocks

    found = []
    for recompute in (False, True):
        bench = rig(family, {})
        bench.randomise_fusion()
        if recompute:
            checkpoint_blocks(bench.model.adapter.text_layers, preserve_rng=False)
            checkpoint_blocks(bench.model.adapter.vision_blocks, preserve_rng=False)
        output = bench.model(bench.pack())
        output.loss_sum.backward()
        found.append((output.loss_sum, gradients(bench.model)))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(found[0][1][name], grad) for name, grad in found[1][1].items())


@pytest.mark.slow
def test_compiled_blocks_agree(rig):
    """One block of each stack: compiling all of them takes minutes on a CPU and shows nothing more."""
    from spatialvlm.training.memory import compile_blocks

    bench = rig("qwen3vl")
    expected = bench.model(bench.pack())
    expected.loss_sum.backward()
    wanted = gradients(bench.model)
    bench.model.zero_grad()
    compile_blocks([bench.model.adapter.text_layers[0], bench.model.adapter.vision_blocks[0]])
    output = bench.model(bench.pack())
    output.loss_sum.backward()
    torch.testing.assert_close(output.loss_sum, expected.loss_sum, rtol=1e-5, atol=1e-5)
    assert worst_relative(gradients(bench.model), wanted) < 1e-4
