"""Attention for packs: samples are isolated, branches see their shared prefix.

A pack is one row ``[1, T]`` tiled by segments. Query ``q`` may see key ``k`` iff ``k <= q`` and
(``segment(q) == segment(k)`` or ``parent(segment(q)) == segment(k)``). The rule is stated once, by a
:class:`Tree` that travels through ``transformers`` as the keyword argument ``tree``; four functions compute it:

==============  ======  =====================================================================
``tree_sdpa``   any     one SDPA call per segment, a branch's keys are ``[prefix | branch]``
``tree_flash``  CUDA    one variable-length call, prefix keys gathered per branch
``tree_flex``   CUDA    FlexAttention with a block mask
``tree_mask``   any     dense mask; the reference in tests, at most 4,096 tokens
==============  ======  =====================================================================

They are registered under their own names, because the library's own functions must never see a pack: they
either ignore the segments or cut branches from their prefix, without a word.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable
from functools import cached_property
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from spatialvlm.errors import ConfigError, IsolationError

AttentionFunction = TypeVar("AttentionFunction", bound=Callable[..., Any])
MASK_LIMIT = 4096
# Segments are Python integers that differ from pack to pack: traced, every pack would compile anew.
eager: Callable[[AttentionFunction], AttentionFunction] = torch.compiler.disable
FLEX_BLOCK = 128


class Tree:
    """Segments of one pack, read once per forward.

    Args:
        start: First position of every segment, ascending; segments tile the sequence.
        length: Number of tokens.
        parent: Index of the prefix segment, -1 for a root. A prefix is always a root and comes first.

    Attributes:
        layers_seen: Layer indices whose attention used this tree, filled for the start-up probe.
    """

    def __init__(self, start: list[int], length: list[int], parent: list[int]) -> None:
        self.start, self.length, self.parent = start, length, parent
        self.total = start[-1] + length[-1]
        self.layers_seen: list[int] = []
        position = 0
        for index, (begin, size, up) in enumerate(zip(start, length, parent, strict=True)):
            if begin != position or size < 1 or up >= index or (up >= 0 and parent[up] >= 0):
                raise ValueError(
                    f"segment {index} (start {begin}, length {size}, parent {up}) does not continue a pack of roots "
                    f"and their branches at position {position}"
                )
            position += size

    @classmethod
    def from_tensors(cls, start: Tensor, length: Tensor, parent: Tensor) -> Tree:
        """From the integer tensors ``[num_segments]`` of a batch; keep them on the CPU to avoid a synchronisation."""
        return cls(start.tolist(), length.tolist(), parent.tolist())

    def keys_of(self, index: int) -> list[tuple[int, int]]:
        """Half-open key ranges that segment ``index`` may see: its prefix, if any, then itself."""
        up = self.parent[index]
        own = (self.start[index], self.start[index] + self.length[index])
        return [own] if up < 0 else [(self.start[up], self.start[up] + self.length[up]), own]

    @cached_property
    def segment_of(self) -> Tensor:
        """int64 ``[T]``: segment of every position."""
        return torch.repeat_interleave(torch.arange(len(self.length)), torch.tensor(self.length))

    def mask(self, device: torch.device) -> Tensor:
        """Boolean ``[T, T]``, true where query (row) may see key (column)."""
        segment = self.segment_of.to(device)
        parent = torch.tensor(self.parent, device=device)[segment]
        causal = torch.ones(self.total, self.total, dtype=torch.bool, device=device).tril()
        return causal & ((segment[:, None] == segment) | (parent[:, None] == segment))

    def on_device(
        self, name: str, device: torch.device, build: Callable[[torch.device], Any]
    ) -> Any:
        """Build an index or a mask once per pack and keep it for the other layers."""
        cache: dict[tuple[str, torch.device], Any] = self.__dict__.setdefault("_device_cache", {})
        if (name, device) not in cache:
            cache[name, device] = build(device)
        return cache[name, device]

    def varlen(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, int, int]:
        """Gathered key index, cumulative query and key lengths (int32), largest lengths."""
        index: list[Tensor] = []
        key_lengths: list[int] = []
        for segment in range(len(self.start)):
            ranges = self.keys_of(segment)
            index += [torch.arange(begin, end) for begin, end in ranges]
            key_lengths.append(sum(end - begin for begin, end in ranges))
        cumulative = [
            torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (self.length, key_lengths)
        ]
        query_ends, key_ends = (ends.to(device, non_blocking=True) for ends in cumulative)
        gather = torch.cat(index).to(device, non_blocking=True)
        return gather, query_ends, key_ends, max(self.length), max(key_lengths)


def _attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """SDPA; on CUDA without the math kernel, which would fill the memory with scores instead of failing."""
    if not query.is_cuda:
        return scaled_dot_product_attention(query, key, value, **options)
    fused = [
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
    ]
    with sdpa_kernel(fused):
        return scaled_dot_product_attention(query, key, value, **options)


def _repeat_heads(module: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    repeats = getattr(module, "num_key_value_groups", 1)
    if repeats == 1:
        return key, value
    return key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)


def _without_tree(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
) -> tuple[Tensor, None]:
    """Attention of generation steps: the caller states the mask in full."""
    if mask is None:
        raise IsolationError(
            "tree attention was called without segments and without a mask, so it cannot know which samples a "
            "sequence holds. Call the language model through SpatialVLM, or set another attention implementation."
        )
    if query.shape[2] == 1 and mask.shape[1] == 1:
        # One query per row: heads that share keys become queries, so the cache is not copied per head.
        packed = query.view(query.shape[0], key.shape[1], -1, query.shape[3])
        output = _attend(packed, key, value, attn_mask=mask, scale=scaling).view(query.shape)
    else:
        key, value = _repeat_heads(module, key, value)
        output = _attend(query, key, value, attn_mask=mask, scale=scaling)
    return output.transpose(1, 2), None


def _enter(module: nn.Module, query: Tensor, tree: Tree, dropout: float) -> None:
    if query.shape[0] != 1 or query.shape[2] != tree.total:
        raise IsolationError(
            f"segments describe a pack [1, {tree.total}], attention got queries of batch {query.shape[0]}, length "
            f"{query.shape[2]}. Generation steps must pass a mask instead of segments."
        )
    if dropout:
        raise ConfigError(
            f"attention dropout {dropout} is not supported with packs; set attention_dropout to 0"
        )
    tree.layers_seen.append(getattr(module, "layer_idx", -1))


@eager
def tree_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    tree: Tree | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """One SDPA call per segment.

    Args:
        module: Attention layer; its ``num_key_value_groups`` is honoured.
        query: ``[1, heads, T, head_dim]``.
        key: ``[1, kv_heads, T, head_dim]``.
        value: As ``key``.
        attention_mask: Used only without ``tree`` (generation).
        scaling: Factor of the scores.
        dropout: Must be 0.
        tree: Segments of the pack.

    Returns:
        ``[1, T, heads, head_dim]`` and ``None``.
    """
    if tree is None:
        return _without_tree(module, query, key, value, attention_mask, scaling)
    _enter(module, query, tree, dropout)
    # Splits, not slices: the backward pass of a slice writes zeros over the whole pack, once per segment.
    queries, keys, values = (
        torch.split(x, tree.length, dim=2) for x in (query, *_repeat_heads(module, key, value))
    )
    outputs = []
    for own, up in enumerate(tree.parent):
        q, k, v = queries[own], keys[own], values[own]
        if up < 0:
            outputs.append(_attend(q, k, v, is_causal=True, scale=scaling))
            continue
        k, v = torch.cat([keys[up], k], dim=2), torch.cat([values[up], v], dim=2)
        shape, prefix = (tree.length[own], k.shape[2]), tree.length[up]
        mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril(prefix)
        outputs.append(_attend(q, k, v, attn_mask=mask, scale=scaling))
    return torch.cat(outputs, dim=2).transpose(1, 2), None


@eager
def tree_mask(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    tree: Tree | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Dense boolean mask; the reference. Shapes as in :func:`tree_sdpa`."""
    if tree is None:
        return _without_tree(module, query, key, value, attention_mask, scaling)
    _enter(module, query, tree, dropout)
    if tree.total > MASK_LIMIT:
        raise ConfigError(
            f"packing.attention: tree_mask holds a {tree.total} x {tree.total} mask; the limit is {MASK_LIMIT} tokens. "
            "Use tree_sdpa, tree_flash or tree_flex."
        )
    mask = tree.on_device("mask", query.device, tree.mask)
    return _without_tree(module, query, key, value, mask, scaling)


@eager
def tree_flash(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    tree: Tree | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """One variable-length FlashAttention call (bf16 or fp16, CUDA). Shapes as in :func:`tree_sdpa`.

    A prefix is gathered once per branch; gradients of the copies add up through the gather. Causality is aligned
    to the lower right, so the last query of a branch sees all its keys.
    """
    if tree is None:
        return _without_tree(module, query, key, value, attention_mask, scaling)
    _enter(module, query, tree, dropout)
    gather, query_ends, key_ends, longest_query, longest_key = tree.on_device(
        "varlen", query.device, tree.varlen
    )
    keys, values = (
        x[0].transpose(0, 1).index_select(0, gather) for x in (key, value)
    )  # [T_k, kv_heads, head_dim]
    output = _varlen_kernel()(
        query[0].transpose(0, 1),
        keys,
        values,
        query_ends,
        key_ends,
        longest_query,
        longest_key,
        scaling,
    )
    return output.unsqueeze(0), None


def _varlen_kernel() -> Callable[..., Tensor]:
    """Variable-length attention on ``[T, heads, head_dim]``: flash-attn if installed, else PyTorch's own.

    Both align causality to the lower right when there are more keys than queries.
    """
    if find_spec("flash_attn") is not None:
        from flash_attn import flash_attn_varlen_func

        def flash(q: Tensor, k: Tensor, v: Tensor, q_ends: Tensor, k_ends: Tensor, q_max: int, k_max: int,
                  scale: float | None, causal: bool = True) -> Tensor:  # fmt: skip
            output: Tensor = flash_attn_varlen_func(
                q, k, v, q_ends, k_ends, q_max, k_max, softmax_scale=scale, causal=causal
            )
            return output

        return flash
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(
        varlen_attn
    ).parameters  # its options changed between torch 2.10 and 2.15

    def native(q: Tensor, k: Tensor, v: Tensor, q_ends: Tensor, k_ends: Tensor, q_max: int, k_max: int,
               scale: float | None, causal: bool = True) -> Tensor:  # fmt: skip
        options: dict[str, Any] = {"scale": scale} if "scale" in known else {}
        if "scale" not in known and scale is not None:
            q = q * (scale * q.shape[-1] ** 0.5)
        if "window_size" in known:
            options["window_size"] = (-1, 0) if causal else (-1, -1)
        else:
            options["is_causal"] = causal
        repeats = q.shape[1] // k.shape[1]
        if repeats > 1 and "enable_gqa" in known:
            options["enable_gqa"] = True
        elif repeats > 1:
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        q, k, v = (x.contiguous() for x in (q, k, v))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            output = varlen_attn(q, k, v, q_ends, k_ends, q_max, k_max, **options)
        assert isinstance(output, Tensor)
        return output

    return native


@eager
def tree_flex(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    tree: Tree | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compiled FlexAttention with a block mask, padded to whole blocks. Shapes as in :func:`tree_sdpa`."""
    if tree is None:
        return _without_tree(module, query, key, value, attention_mask, scaling)
    _enter(module, query, tree, dropout)
    padding = -tree.total % FLEX_BLOCK
    query, key, value = (nn.functional.pad(x, (0, 0, 0, padding)) for x in (query, key, value))
    block_mask = tree.on_device(
        "flex", query.device, lambda device: _flex_mask(tree, padding, device)
    )
    output = _flex_kernel()(
        query, key, value, block_mask=block_mask, scale=scaling, enable_gqa=True
    )
    return output[:, :, : tree.total].transpose(1, 2), None


def _flex_mask(tree: Tree, padding: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    segment = nn.functional.pad(tree.segment_of, (0, padding), value=len(tree.length)).to(device)
    parent = torch.tensor([*tree.parent, -1], device=device)[segment]

    def allowed(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & ((segment[q] == segment[k]) | (parent[q] == segment[k]))

    size = tree.total + padding
    return create_block_mask(allowed, None, None, size, size, device=device, BLOCK_SIZE=FLEX_BLOCK)


_COMPILED: dict[str, Callable[..., Tensor]] = {}


def _flex_kernel() -> Callable[..., Tensor]:
    if "flex" not in _COMPILED:
        from torch.nn.attention.flex_attention import flex_attention

        _COMPILED["flex"] = torch.compile(flex_attention, dynamic=True)
    return _COMPILED["flex"]


@eager
def varlen_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Full attention inside frames (vision encoders): frames of equal size share one SDPA call.

    The library's loop makes one call per frame, which costs more than the products when frames are small. In half
    precision on CUDA one variable-length call serves all frames.

    Args:
        module: Attention layer (unused; the interface passes it).
        query: ``[1, heads, N, head_dim]``, the patches of all frames; or ``[F, heads, N, head_dim]``, one frame per row.
        key: As ``query``.
        value: As ``query``.
        attention_mask: Must be ``None``.
        scaling: Factor of the scores.
        cu_seq_lens_q: int32 ``[num_frames + 1]``, first patch of every frame and the end; ``None`` = one frame per row.
        max_length_q: Patches of the largest frame.

    Returns:
        ``[1, N, heads, head_dim]`` (or ``[F, N, heads, head_dim]``) and ``None``.
    """
    assert attention_mask is None
    del module
    if cu_seq_lens_q is None:
        output = _attend(query, key, value, scale=scaling)
        return output.transpose(1, 2), None
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        ends = cu_seq_lens_q
        output = _varlen_kernel()(
            q, k, v, ends, ends, max_length_q, max_length_q, scaling, causal=False
        )
        return output.unsqueeze(0), None
    lengths = cu_seq_lens_q.diff().tolist()
    if len(set(lengths)) == 1:
        q, k, v = (
            x[0].view(x.shape[1], -1, lengths[0], x.shape[3]).transpose(0, 1)
            for x in (query, key, value)
        )
        output = _attend(q, k, v, scale=scaling)  # [frames, heads, length, head_dim]
        return output.transpose(1, 2).flatten(0, 1).unsqueeze(0), None
    chunks = [torch.split(x[0], lengths, dim=1) for x in (query, key, value)]
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, length in enumerate(lengths):
        by_length[length].append(index)
    outputs: list[Tensor] = [query] * len(lengths)
    for members in by_length.values():
        q, k, v = (torch.stack([chunk[index] for index in members]) for chunk in chunks)
        result = _attend(q, k, v, scale=scaling).transpose(1, 2)
        for index, frame in zip(members, result.unbind(0), strict=True):
            outputs[index] = frame
    return torch.cat(outputs).unsqueeze(0), None


TREE_ATTENTION = {
    "tree_sdpa": tree_sdpa,
    "tree_flash": tree_flash,
    "tree_flex": tree_flex,
    "tree_mask": tree_mask,
}
# The library hands `cu_seq_lens_q` only to implementations with "flash" in their name.
VISION_ATTENTION = "frames_flash_sdpa"


def register() -> None:
    """Make the functions known to ``transformers``; the mask builders keep a given mask and build none."""
    from transformers import AttentionInterface, AttentionMaskInterface

    for name, function in TREE_ATTENTION.items():
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, _no_mask)
    AttentionInterface.register(VISION_ATTENTION, varlen_sdpa)


def _no_mask(*_args: Any, **_kwargs: Any) -> None:
    return None


def choose(name: str, device: torch.device) -> str:
    """Resolve ``packing.attention``.

    Args:
        name: ``auto`` or one of the four names.
        device: Where the model runs.

    Raises:
        ConfigError: A CUDA-only function on another device, or an unknown name.
    """
    if name == "auto":
        return "tree_flash" if device.type == "cuda" else "tree_sdpa"
    if name not in TREE_ATTENTION:
        raise ConfigError(
            f"packing.attention={name!r} is not one of: auto, {', '.join(TREE_ATTENTION)}"
        )
    if name in ("tree_flash", "tree_flex") and device.type != "cuda":
        raise ConfigError(
            f"packing.attention={name} needs a CUDA device, the model runs on {device}; use tree_sdpa"
        )
    return name


def kernel_name(name: str) -> str:
    """What an attention name runs, for the log."""
    varlen = (
        "flash-attn" if find_spec("flash_attn") is not None else "PyTorch's variable-length kernel"
    )
    if name == VISION_ATTENTION:
        return f"per frame ({varlen} in half precision on CUDA, SDPA elsewhere)"
    return f"{name} ({varlen})" if name == "tree_flash" else name
