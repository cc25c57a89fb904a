"""Generation for groups of prompts that share media.

A group is one pack without labels: the media prefix and its prompts as branches. The prefill is the training forward
(tree attention, vision and geometry once per group); afterwards every prompt becomes one row whose cache is
``[prefix | prompt]``, and all rows of all groups decode together. Positions continue exactly as in training, so the
result equals an uncached forward, token for token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from spatialvlm.models.attention import Tree
from spatialvlm.models.device import to_device
from spatialvlm.models.spatial_vlm import SpatialVLM
from spatialvlm.typing import Batch

Choose = Callable[[Tensor], Tensor]
"""float32 logits ``[rows, V]`` to int64 token ids ``[rows]``."""


def greedy(logits: Tensor) -> Tensor:
    """The most probable token of every row."""
    return logits.argmax(dim=-1)


def sampler(
    temperature: float, top_p: float = 1.0, generator: torch.Generator | None = None
) -> Choose:
    """Draw from the smallest set of tokens whose probability reaches ``top_p``.

    Args:
        temperature: Above 0.
        top_p: In (0, 1].
        generator: Seeded generator on the model's device.
    """

    def choose(logits: Tensor) -> Tensor:
        probability, order = (logits / temperature).softmax(dim=-1).sort(dim=-1, descending=True)
        before = probability.cumsum(dim=-1) - probability
        probability = probability.masked_fill(before >= top_p, 0.0)
        drawn = torch.multinomial(probability, 1, generator=generator)
        return order.gather(1, drawn)[:, 0]

    return choose


@torch.no_grad()
def generate(
    model: SpatialVLM,
    groups: Sequence[Batch],
    max_new_tokens: int,
    *,
    stop_ids: Iterable[int] = (),
    choose: Choose = greedy,
    max_rows: int = 64,
) -> list[list[list[int]]]:
    """Complete every prompt of every group.

    Args:
        model: In any mode; it is put into eval mode for the call.
        groups: Packs from ``data.prompts``: one root and its branches, or several roots; media as in training.
            On any device.
        max_new_tokens: Upper bound of each completion.
        stop_ids: Tokens that end a completion (and are not returned); empty = the checkpoint's own.
        choose: Picks the next tokens.
        max_rows: Prompts that decode together.

    Returns:
        Token ids per group, per prompt, in the order of the segments.
    """
    was_training = model.training
    model.eval()
    stops = torch.tensor(sorted(set(stop_ids)) or stop_tokens(model), device=model.device)
    results: list[list[list[int]]] = []
    waiting: list[_Rows] = []

    def flush() -> None:
        if waiting:
            completions = iter(_decode(model, _Rows.join(waiting), max_new_tokens, stops, choose))
            results.extend([[next(completions) for _ in rows.lengths] for rows in waiting])
            waiting.clear()

    for group in groups:
        rows = _prefill(model, to_device(group, model.device))
        if waiting and sum(len(r.lengths) for r in waiting) + len(rows.lengths) > max_rows:
            flush()
        waiting.append(rows)
    flush()
    model.train(was_training)
    return results


def _placeholder_mask(model: SpatialVLM, device: torch.device) -> Tensor:
    """Boolean ``[V]``: the spatial placeholder, which is never a word."""
    mask = torch.zeros(model.backbone.lm_head.out_features, dtype=torch.bool, device=device)
    spatial_id = None if model.geometry is None else model.geometry.spatial_id
    if spatial_id is not None and spatial_id < len(mask):
        mask[spatial_id] = True
    return mask


def stop_tokens(model: SpatialVLM) -> list[int]:
    """End-of-turn tokens of the checkpoint."""
    ids: Any = (
        getattr(model.backbone, "generation_config", None)
        and model.backbone.generation_config.eos_token_id
    )
    ids = ids if ids is not None else model.adapter.text_config.eos_token_id
    return sorted(ids) if isinstance(ids, list | tuple) else [ids]


class _Rows:
    """Prompts after their prefill, left-padded to one length.

    Attributes:
        keys: Per layer ``[rows, kv_heads, L, head_dim]``.
        values: As ``keys``.
        lengths: Tokens of every row.
        hidden: ``[rows, D]`` of the last token.
        position: int64 ``[position rows, rows]`` of the last token.
    """

    def __init__(
        self,
        keys: list[Tensor],
        values: list[Tensor],
        lengths: list[int],
        hidden: Tensor,
        position: Tensor,
    ) -> None:
        self.keys, self.values, self.lengths = keys, values, lengths
        self.hidden, self.position = hidden, position

    @classmethod
    def join(cls, parts: Sequence[_Rows]) -> _Rows:
        """All rows as one batch."""
        longest = max(part.keys[0].shape[2] for part in parts)
        layers = range(len(parts[0].keys))

        def stack(pick: Callable[[_Rows], list[Tensor]]) -> list[Tensor]:
            return [
                torch.cat([_left_pad(pick(part)[layer], longest) for part in parts])
                for layer in layers
            ]

        return cls(
            stack(lambda part: part.keys),
            stack(lambda part: part.values),
            [length for part in parts for length in part.lengths],
            torch.cat([part.hidden for part in parts]),
            torch.cat([part.position for part in parts], dim=1),
        )


class _Cache:
    """Keys and values with room for the completion: a step writes one column instead of copying everything.

    Args:
        keys: Per layer ``[rows, kv_heads, L, head_dim]``.
        values: As ``keys``.
        room: Columns to add.
    """

    def __init__(self, keys: list[Tensor], values: list[Tensor], room: int) -> None:
        self.length = keys[0].shape[2]
        grow = torch.nn.functional.pad
        self.keys = [grow(x, (0, 0, 0, room)) for x in keys]
        self.values = [grow(x, (0, 0, 0, room)) for x in values]

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any) -> tuple[Tensor, Tensor]:
        """Append the new columns of one layer; the library calls the layers in order."""
        end = self.length + key.shape[2]
        self.keys[layer][:, :, self.length : end] = key
        self.values[layer][:, :, self.length : end] = value
        if layer + 1 == len(self.keys):
            self.length = end
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]


def _left_pad(x: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, 0, length - x.shape[2], 0))


def _prefill(model: SpatialVLM, group: Batch) -> _Rows:
    """One forward of a group; cut its cache into one row per prompt."""
    from transformers import DynamicCache

    tree = Tree.from_tensors(group["segment_start"], group["segment_len"], group["segment_parent"])
    cache = DynamicCache()
    hidden, _ = model.hidden_states(group, cache=cache)
    prompts = [index for index in range(len(tree.start)) if index not in set(tree.parent)]
    last = torch.tensor([tree.start[i] + tree.length[i] - 1 for i in prompts], device=hidden.device)
    ranges = [tree.keys_of(index) for index in prompts]
    lengths = [sum(end - begin for begin, end in pieces) for pieces in ranges]

    def rows(x: Tensor) -> Tensor:
        pieces = [torch.cat([x[:, :, begin:end] for begin, end in own], dim=2) for own in ranges]
        return torch.cat([_left_pad(piece, max(lengths)) for piece in pieces])

    positions = group["position_ids"].reshape(-1, tree.total)  # [4 or 1, T]
    return _Rows(
        [rows(layer.keys) for layer in cache.layers],
        [rows(layer.values) for layer in cache.layers],
        lengths,
        hidden[0, last],
        positions[:, last],
    )


def _decode(
    model: SpatialVLM, rows: _Rows, max_new_tokens: int, stops: Tensor, choose: Choose
) -> list[list[int]]:
    """Decode all rows until each has met a stop token or the limit."""
    longest = rows.keys[0].shape[2]
    device = rows.hidden.device
    cache = _Cache(rows.keys, rows.values, max_new_tokens)
    rows.keys = rows.values = []  # only the cache holds them from here
    padding = longest - torch.tensor(rows.lengths, device=device)
    visible = torch.arange(longest, device=device) >= padding[:, None]  # [rows, L]
    # A completion continues behind every coordinate of its prompt, on all axes.
    position = rows.position[:1].clone() if len(rows.position) == 1 else rows.position.clone()
    never = _placeholder_mask(model, device)
    finished = torch.zeros(len(rows.lengths), dtype=torch.bool, device=device)
    hidden, produced = rows.hidden, []
    for step in range(max_new_tokens):
        logits = model.backbone.lm_head(hidden).float().masked_fill(never, -torch.inf)
        tokens = choose(logits)
        finished = finished | torch.isin(tokens, stops)
        produced.append(torch.where(finished, -1, tokens))
        if step + 1 == max_new_tokens or bool(finished.all()):
            break
        position = position + 1
        visible = torch.cat([visible, torch.ones_like(visible[:, :1])], dim=1)
        embeds = model.adapter.embeddings(tokens)[:, None]
        position_ids = position[:, :, None] if model.adapter.uses_mrope else position[0, :, None]
        hidden = model.adapter.read(embeds, position_ids, mask=visible[:, None, None], cache=cache)[
            :, 0
        ]
    ids = torch.stack(produced, dim=1).tolist() if produced else [[] for _ in rows.lengths]
    return [[token for token in row if token >= 0] for row in ids]
