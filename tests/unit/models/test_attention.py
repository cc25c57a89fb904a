import itertools

import pytest
import torch
from torch import nn

from spatialvlm.errors import ConfigError, IsolationError
from spatialvlm.models import attention
from spatialvlm.models.attention import MASK_LIMIT, Tree, choose, tree_mask, tree_sdpa, varlen_sdpa

TREE = Tree([0, 5, 8, 12, 18], [5, 3, 4, 6, 2], [-1, 0, 0, -1, 3])


def layer(groups=2):
    module = nn.Module()
    module.num_key_value_groups = groups
    module.layer_idx = 0
    return module


def random_qkv(total, heads=4, kv_heads=2, dim=8, requires_grad=False):
    torch.manual_seed(0)
    shapes = [(1, heads, total, dim), (1, kv_heads, total, dim), (1, kv_heads, total, dim)]
    return [torch.randn(shape, requires_grad=requires_grad) for shape in shapes]


def reference(q, k, v, tree):
    """The rule, written out: softmax over the keys each query may see."""
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    segment = [i for i, n in enumerate(tree.length) for _ in range(n)]
    for query in range(tree.total):
        for key in range(tree.total):
            same = segment[query] == segment[key] or tree.parent[segment[query]] == segment[key]
            if key > query or not same:
                scores[:, :, query, key] = -torch.inf
    return (scores.softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("function", [tree_sdpa, tree_mask])
def test_follows_the_rule_with_gradients(function):
    qkv = random_qkv(TREE.total, requires_grad=True)
    output, _ = function(layer(), *qkv, None, tree=TREE)
    expected = reference(*qkv, TREE)
    torch.testing.assert_close(output, expected, atol=1e-6, rtol=1e-5)
    weight = torch.randn_like(output)
    found = torch.autograd.grad((output * weight).sum(), qkv)
    wanted = torch.autograd.grad((expected * weight).sum(), qkv)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)


def test_other_segments_change_nothing_at_all():
    q, k, v = random_qkv(TREE.total)
    before, _ = tree_sdpa(layer(), q, k, v, None, tree=TREE)
    for x in (q, k, v):
        x[:, :, 8:12] += 1.0  # the second branch of the first root
    after, _ = tree_sdpa(layer(), q, k, v, None, tree=TREE)
    kept = [i for i in range(TREE.total) if not 8 <= i < 12]
    assert torch.equal(before[:, kept], after[:, kept])
    assert not torch.equal(before[:, 8:12], after[:, 8:12])


@pytest.mark.parametrize(
    "segments",
    [
        ([0, 4], [5, 3], [-1, -1]),  # overlap
        ([0, 5, 8], [5, 3, 2], [-1, 0, 1]),  # a branch of a branch
        ([0, 5], [5, 3], [1, -1]),  # the parent comes later
    ],
)
def test_segments_that_are_no_tree_are_refused(segments):
    with pytest.raises(ValueError, match="does not continue a pack"):
        Tree(*segments)


def test_a_pack_without_segments_is_refused():
    with pytest.raises(IsolationError, match="without segments"):
        tree_sdpa(layer(), *random_qkv(4), None)
    with pytest.raises(IsolationError, match="length 4"):
        tree_sdpa(layer(), *random_qkv(4), None, tree=TREE)


def test_dropout_and_long_dense_masks_are_refused():
    with pytest.raises(ConfigError, match="dropout"):
        tree_sdpa(layer(), *random_qkv(TREE.total), None, dropout=0.1, tree=TREE)
    long = Tree([0], [MASK_LIMIT + 1], [-1])
    with pytest.raises(ConfigError, match="tree_mask holds"):
        tree_mask(layer(), *random_qkv(long.total, heads=1, kv_heads=1, dim=1), None, tree=long)


def test_varlen_index_gathers_prefix_then_branch():
    gather, query_ends, key_ends, longest_query, longest_key = TREE.varlen(torch.device("cpu"))
    assert gather.tolist()[5:13] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert query_ends.tolist() == [0, 5, 8, 12, 18, 20]
    assert key_ends.tolist() == [0, 5, 13, 22, 28, 36]
    assert (longest_query, longest_key) == (6, 9)


def test_choice_of_function():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert choose("auto", cpu) == "tree_sdpa"
    assert choose("auto", cuda) == "tree_flash"
    with pytest.raises(ConfigError, match="CUDA"):
        choose("tree_flex", cpu)
    with pytest.raises(ConfigError, match="tree_sdpa"):
        choose("sdpa", cpu)


@pytest.mark.parametrize("lengths", [[6, 6, 6], [4, 6, 4, 2, 6]])
def test_frames_are_separate_whatever_their_sizes(lengths):
    q, k, v = random_qkv(sum(lengths), heads=2, kv_heads=2)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    output, _ = varlen_sdpa(layer(1), q, k, v, None, cu_seq_lens_q=ends)
    for begin, end in itertools.pairwise(ends):
        part = [x[:, :, begin:end] for x in (q, k, v)]
        expected = nn.functional.scaled_dot_product_attention(*part).transpose(1, 2)
        torch.testing.assert_close(output[:, begin:end], expected, atol=1e-6, rtol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["tree_flash", "tree_flex"])
def test_kernels_equal_the_dense_mask(name):
    from spatialvlm.models.attention import TREE_ATTENTION

    tree = Tree([0, 300, 340, 400, 600], [300, 40, 60, 200, 20], [-1, 0, 0, -1, 3])
    qkv = [x.cuda().bfloat16().requires_grad_() for x in random_qkv(tree.total, dim=64)]
    output, _ = TREE_ATTENTION[name](layer(), *qkv, None, tree=tree)
    expected, _ = tree_mask(layer(), *qkv, None, tree=tree)
    torch.testing.assert_close(output, expected, atol=2e-2, rtol=2e-2)
    weight = torch.randn_like(output)
    found = torch.autograd.grad((output * weight).sum(), qkv)
    wanted = torch.autograd.grad((expected * weight).sum(), qkv)
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).float().norm() / b.float().norm() < 2e-2


def packed_reference(q, k, v, q_ends, k_ends, causal):
    """Attention of ragged sequences ``[T, heads, dim]``, causal to the lower right."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    outputs = []
    for i in range(len(q_ends) - 1):
        own = slice(q_ends[i], q_ends[i + 1]), slice(k_ends[i], k_ends[i + 1])
        parts = [
            x[s].transpose(0, 1)[None]
            for x, s in zip((q, k, v), (own[0], own[1], own[1]), strict=True)
        ]
        rows, columns = parts[0].shape[2], parts[1].shape[2]
        mask = torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows) if causal else None
        output = nn.functional.scaled_dot_product_attention(*parts, attn_mask=mask)
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


def new_api(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
):
    assert enable_gqa == (query.shape[1] != key.shape[1])
    return packed_reference(query, key, value, cu_seq_q, cu_seq_k, window_size == (-1, 0))


def old_api(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
    assert query.shape[1] == key.shape[1]
    return packed_reference(query, key, value, cu_seq_q, cu_seq_k, is_causal)


@pytest.mark.parametrize("api", [new_api, old_api])
def test_flash_path_gathers_and_passes_the_right_options(monkeypatch, api):
    """The kernel itself needs a GPU; around it stands a reference with the signatures of torch 2.15 and 2.10."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", api)
    monkeypatch.setattr(attention, "find_spec", lambda name: None)
    qkv = random_qkv(TREE.total, requires_grad=True)
    tree = Tree(TREE.start, TREE.length, TREE.parent)
    scale = qkv[0].shape[-1] ** -0.5
    output, _ = attention.tree_flash(layer(), *qkv, None, scaling=scale, tree=tree)
    expected, _ = tree_mask(layer(), *qkv, None, tree=tree)
    torch.testing.assert_close(output, expected, atol=1e-6, rtol=1e-5)
    weight = torch.randn_like(output)
    found = torch.autograd.grad((output * weight).sum(), qkv)
    wanted = torch.autograd.grad((expected * weight).sum(), qkv)
    for a, b in zip(found, wanted, strict=True):  # copies of a prefix add up
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)


def test_flex_path_masks_by_segment(monkeypatch):
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setitem(attention._COMPILED, "flex", flex_attention)
    qkv = random_qkv(TREE.total)
    tree = Tree(TREE.start, TREE.length, TREE.parent)
    output, _ = attention.tree_flex(layer(), *qkv, None, tree=tree)
    expected, _ = tree_mask(layer(), *qkv, None, tree=tree)
    torch.testing.assert_close(output, expected, atol=1e-6, rtol=1e-5)
