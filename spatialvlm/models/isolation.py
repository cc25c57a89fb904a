"""Start-up probe: samples of a pack must not see each other, on the real model with its real attention."""

from __future__ import annotations

import torch
from torch import Tensor

from spatialvlm.errors import IsolationError
from spatialvlm.models.attention import Tree, kernel_name
from spatialvlm.models.spatial_vlm import SpatialVLM

PROBE = Tree(start=[0, 6, 11, 15, 22, 28], length=[6, 5, 4, 7, 6, 5], parent=[-1, 0, 0, -1, 3, 3])
# A branch against its own forward: other kernel shapes, so rounding differs.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-2}


@torch.no_grad()
def probe_isolation(model: SpatialVLM) -> str:
    """Run a few short text packs; call it once before training, on every rank.

    Checks that every decoder layer used the segments, that changing a branch leaves every other hidden state
    bit-identical, and that each branch equals its separate forward.

    Returns:
        One line for the log: which attention runs where, and how close packed and separate samples are.

    Raises:
        IsolationError: A check failed; names the attention function and the first layer or segment.
    """
    was_training = model.training
    model.eval()
    name = model.adapter.text_config._attn_implementation
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(
        0, model.adapter.embeddings.num_embeddings, (1, PROBE.total), generator=generator
    )
    ids = ids.to(model.device)
    before = _hidden(model, ids, PROBE)

    expected = list(range(len(model.adapter.text_layers)))
    if PROBE.layers_seen != expected:
        missing = sorted(set(expected) - set(PROBE.layers_seen))
        raise IsolationError(
            f"attention {name!r}: decoder layers {missing or PROBE.layers_seen} did not use the segments of the pack. "
            "Set packing.attention to one of tree_sdpa, tree_flash, tree_flex"
        )
    changed = 2
    start, end = PROBE.start[changed], PROBE.start[changed] + PROBE.length[changed]
    other = ids.clone()
    other[:, start:end] = (other[:, start:end] + 1) % model.adapter.embeddings.num_embeddings
    after = _hidden(model, other, PROBE)
    for segment in range(len(PROBE.start)):
        own = slice(PROBE.start[segment], PROBE.start[segment] + PROBE.length[segment])
        if segment != changed and not torch.equal(before[:, own], after[:, own]):
            raise IsolationError(
                f"attention {name!r}: changing segment {changed} changed segment {segment} of the same pack; samples "
                "see each other. Choose another packing.attention"
            )
    worst = 0.0
    for segment, up in enumerate(PROBE.parent):
        pieces = [segment] if up < 0 else [up, segment]
        rows = torch.cat(
            [torch.arange(PROBE.start[i], PROBE.start[i] + PROBE.length[i]) for i in pieces]
        )
        alone = _hidden(model, ids[:, rows], Tree([0], [len(rows)], [-1]))
        tail = slice(len(rows) - PROBE.length[segment], None)
        packed = before[:, rows][:, tail].float()
        difference = float((alone[:, tail].float() - packed).norm() / packed.norm())
        worst = max(worst, difference)
        if difference > TOLERANCE[model.adapter.embeddings.weight.dtype]:
            raise IsolationError(
                f"attention {name!r}: segment {segment} differs from its separate forward by {difference:.1e} "
                "(relative); branches do not see their prefix as a separate sample would"
            )
    model.train(was_training)
    vision = model.adapter.vision_config._attn_implementation
    geometry = "" if model.geometry is None else ", geometry SDPA"
    return (
        f"attention: language model {kernel_name(name)}, vision {kernel_name(vision)}{geometry}; packed = separate "
        f"within {worst:.1e} on {len(expected)} layers"
    )


def _hidden(model: SpatialVLM, ids: Tensor, tree: Tree) -> Tensor:
    tree.layers_seen.clear()
    first = [0 if up < 0 else tree.length[up] for up in tree.parent]
    counter = torch.cat(
        [torch.arange(n) + begin for n, begin in zip(tree.length, first, strict=True)]
    )
    positions = counter.to(ids.device)[None]
    if model.adapter.uses_mrope:
        positions = positions.expand(4, 1, -1)
    return model.adapter.read(model.adapter.embeddings(ids), positions, tree=tree)
