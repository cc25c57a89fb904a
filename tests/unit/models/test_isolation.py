import pytest
import torch

from spatialvlm.errors import IsolationError
from spatialvlm.models import attention
from spatialvlm.models.isolation import probe_isolation
from spatialvlm.testing.rig import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_our_attention_passes(rig, family):
    bench = rig(family)
    bench.model.train()
    line = probe_isolation(bench.model)
    assert line.startswith("attention: language model tree_sdpa, vision per frame")
    assert line.endswith("on 3 layers")
    assert bench.model.training


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stock", ["sdpa", "eager"])
def test_stock_attention_is_caught(rig, family, stock):
    bench = rig(family)
    bench.model.adapter.text_config._attn_implementation_internal = stock
    with pytest.raises(IsolationError, match=r"layers \[0, 1, 2\] did not use the segments"):
        probe_isolation(bench.model)


def leaky(module, query, key, value, mask, scaling=None, tree=None, **kwargs):
    """Causal over the whole pack."""
    tree.layers_seen.append(module.layer_idx)
    whole = attention.Tree([0], [tree.total], [-1])
    return attention.tree_sdpa(module, query, key, value, None, scaling=scaling, tree=whole)


def cutting(module, query, key, value, mask, scaling=None, tree=None, **kwargs):
    """Isolated, but branches do not see their prefix."""
    tree.layers_seen.append(module.layer_idx)
    roots = attention.Tree(tree.start, tree.length, [-1] * len(tree.start))
    return attention.tree_sdpa(module, query, key, value, None, scaling=scaling, tree=roots)


@pytest.mark.parametrize(
    ("function", "message"), [(leaky, "see each other"), (cutting, "separate forward")]
)
def test_wrong_functions_are_caught(rig, monkeypatch, function, message):
    from transformers import AttentionInterface

    bench = rig("qwen3vl")
    monkeypatch.setitem(AttentionInterface._global_mapping, "tree_sdpa", function)
    with pytest.raises(IsolationError, match=message):
        probe_isolation(bench.model)


def test_probe_is_deterministic_and_leaves_the_generator_alone(rig):
    bench = rig("qwen3vl")
    state = torch.get_rng_state()
    assert probe_isolation(bench.model) == probe_isolation(bench.model)
    assert torch.equal(state, torch.get_rng_state())
