"""The ``generate`` of ``transformers`` (beams, its samplers and processors) with the geometry branch.

Prompts are left-padded rows. Spatial tokens are already in the embeddings; visual tokens and deepstack features are
handed over as encoder outputs, which the library places itself. :mod:`spatialvlm.models.generation` is faster when
prompts share media.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from spatialvlm.errors import ConfigError
from spatialvlm.models.attention import Tree
from spatialvlm.models.spatial_vlm import SpatialVLM
from spatialvlm.typing import KIND_IMAGE, KIND_VIDEO, Batch


@torch.no_grad()
def library_generate(model: SpatialVLM, groups: Sequence[Batch], **options: Any) -> Tensor:
    """Call ``backbone.generate`` on the prompts of some groups.

    Args:
        model: In any mode; it is put into eval mode for the call.
        groups: As for :func:`~spatialvlm.models.generation.generate`.
        **options: Any option of ``generate``: ``num_beams``, ``num_return_sequences``, ``do_sample``, ...

    Returns:
        New tokens ``[prompts * num_return_sequences, steps]``, padded behind the end.

    Raises:
        ConfigError: ``transformers`` is older than 5.18, which cannot be handed encoder outputs.
    """
    if not hasattr(model.backbone, "_supports_mm_encoder_outputs"):
        raise ConfigError(
            f"library_generate needs transformers 5.18 or newer, {transformers.__version__} is installed. Upgrade it, or "
            "use spatialvlm.models.generation.generate (greedy or nucleus sampling)."
        )
    was_training, config = model.training, model.adapter.text_config
    model.eval()
    ours = config._attn_implementation
    suppressed = [] if model.geometry is None else [model.geometry.spatial_id]
    suppressed = [
        i for i in suppressed if i is not None and i < model.backbone.lm_head.out_features
    ]
    config._attn_implementation_internal = "sdpa"
    try:
        tokens: Tensor = model.backbone.generate(
            **library_inputs(model, groups),
            **({"suppress_tokens": suppressed} if suppressed else {}),
            **options,
        )
    finally:
        config._attn_implementation_internal = ours
        if model.adapter.uses_mrope:
            model.backbone.model.rope_deltas = None  # a later forward must not read it
        model.train(was_training)
    return tokens


def library_inputs(model: SpatialVLM, groups: Sequence[Batch]) -> dict[str, Any]:
    """Keyword arguments of ``backbone.generate``; build them anew for every call, the library changes them.

    Returns:
        ``inputs_embeds [B, L, D]``, ``attention_mask [B, L]``, ``position_ids [4, B, L]`` or ``[B, L]``, and
        ``mm_encoder_outputs``.
    """
    rows = [row for group in groups for row in _rows(model, group)]
    longest = max(row["embeds"].shape[0] for row in rows)

    def pad(x: Tensor) -> Tensor:  # in front, along the last axis
        return torch.nn.functional.pad(x, (longest - x.shape[-1], 0))

    positions = torch.stack([pad(row["positions"]) for row in rows], dim=1)  # [4 or 1, B, L]
    inputs: dict[str, Any] = {
        "inputs_embeds": torch.stack([pad(row["embeds"].t()).t() for row in rows]),
        "attention_mask": torch.stack([pad(torch.ones_like(row["positions"][0])) for row in rows]),
        "position_ids": positions if model.adapter.uses_mrope else positions[0],
    }
    outputs = {}
    for name, kind in (("image", KIND_IMAGE), ("video", KIND_VIDEO)):
        if model.adapter.frames_are_images and kind == KIND_VIDEO:
            continue  # its frames are images
        picked = [_pick(row, kind, model.adapter.frames_are_images) for row in rows]
        tokens = [tokens for tokens, _ in picked if len(tokens)]
        if tokens:
            outputs[name] = _encoder_output(
                model, tokens, [deep for own, deep in picked if len(own)]
            )
    return inputs | ({"mm_encoder_outputs": outputs} if outputs else {})


def _rows(model: SpatialVLM, group: Batch) -> list[dict[str, Any]]:
    """Every prompt of a group as a sequence of its own; media are encoded once."""
    tree = Tree.from_tensors(group["segment_start"], group["segment_len"], group["segment_parent"])
    embedded = model.embed(group)
    order = (
        embedded.visual[0].cumsum(0) - 1
    )  # index of every visual position among the visual tokens
    positions = group["position_ids"].reshape(-1, tree.total)
    rows = []
    for prompt in range(len(tree.start)):
        if prompt in tree.parent:
            continue
        index = torch.cat([torch.arange(a, b) for a, b in tree.keys_of(prompt)]).to(
            positions.device
        )
        rows.append(
            {
                "embeds": embedded.embeds[0, index],
                "positions": positions[:, index],
                "kind": group["token_kind"][0, index],
                "order": order[index],
                "tokens": embedded.visual_tokens,
                "deepstack": embedded.deepstack,
            }
        )
    return rows


def _pick(row: dict[str, Any], kind: int, frames_are_images: bool) -> tuple[Tensor, list[Tensor]]:
    """Visual tokens and deepstack features of one prompt and kind."""
    wanted = row["kind"] == kind
    if frames_are_images:
        wanted = (row["kind"] == KIND_IMAGE) | (row["kind"] == KIND_VIDEO)
    index = row["order"][wanted]
    return row["tokens"][index], [layer[index] for layer in row["deepstack"]]


def _encoder_output(model: SpatialVLM, tokens: list[Tensor], deepstack: list[list[Tensor]]) -> Any:
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    if model.adapter.frames_are_images:  # one row per frame
        size = int(model.backbone.config.image_seq_length)
        frames = torch.cat(tokens).view(-1, size, tokens[0].shape[-1])
        return BaseModelOutputWithPooling(pooler_output=frames)
    output = BaseModelOutputWithPooling(pooler_output=tokens)
    if deepstack[0]:
        from transformers.models.qwen3_vl.modeling_qwen3_vl import (
            BaseModelOutputWithDeepstackFeatures,
        )

        layers = [list(layer) for layer in zip(*deepstack, strict=True)]
        output = BaseModelOutputWithDeepstackFeatures(
            pooler_output=tokens, deepstack_features=layers
        )
    return output
