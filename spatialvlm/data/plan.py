"""Which draws go into which pack on which rank: one plan per optimizer step, the same on every rank.

A step's draws become items (shared-prefix groups and single samples), items become packs of bounded
length, and packs are dealt to ranks so that every micro-step costs all ranks about the same. The plan is a
pure function of draws, lengths and world size, so nothing is communicated.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from spatialvlm.data.sample import Draw, PackPlan, StepPlan
from spatialvlm.errors import ConfigError, DataError
from spatialvlm.typing import CostCoefficients, ModalityFlags

if TYPE_CHECKING:
    import numpy.typing as npt

    from spatialvlm.data.sample import DrawArray, LengthArray


@dataclass(frozen=True, slots=True)
class PackingArgs:
    """Limits of packs and groups.

    ``max_branches`` 1 switches sharing off; ``compute="separate"`` plans as if shared, then lists every
    sample alone, to compare the two. ``fixed_micro_steps`` forces that many micro-steps.
    """

    max_tokens: int = 16_384
    enabled: bool = True
    max_branches: int = 8
    compute: Literal["shared", "separate"] = "shared"
    fixed_micro_steps: int | None = None


class Item(NamedTuple):
    """One group or single sample."""

    members: tuple[int, ...]
    """Indices into the step's draws, ascending."""
    tokens: int
    cost: float
    media_cost: float
    """Its part for vision and geometry encoders."""


def plan_step(
    draws: DrawArray,
    lengths: LengthArray,
    cost: CostCoefficients,
    world: int,
    packing: PackingArgs,
    *,
    step: int = 0,
) -> StepPlan:
    """Plan one optimizer step.

    Args:
        draws: The step's draws, in order.
        lengths: One record per draw; a draw of 0 tokens is an empty slot and is left out.
        cost: FLOPs coefficients of the model.
        world: Number of ranks; the number of packs is a multiple of it.
        packing: Limits.
        step: Number written into the plan.

    Raises:
        DataError: A sample is longer than ``packing.max_tokens``.
        ConfigError: ``fixed_micro_steps`` is infeasible.
    """
    items = make_items(lengths, cost, packing)
    packs = _pack(items, world, packing)
    packs.sort(key=lambda pack: -sum(item.cost for item in pack))
    plans = [_pack_plan(pack, draws, packing) for pack in packs]
    micro_steps, flags = [], []
    for index in range(0, len(plans), world):
        turn = plans[index : index + world]
        micro_steps.append(tuple(turn if index // world % 2 == 0 else reversed(turn)))
        members = [
            i for pack in packs[index : index + world] for item in pack for i in item.members
        ]
        flags.append(_flags(lengths[members], boundary=index + world >= len(plans)))
    first = int(draws["position"][0]) if len(draws) else 0
    return StepPlan(step, range(first, first + len(draws)), tuple(micro_steps), tuple(flags))


def make_items(lengths: LengthArray, cost: CostCoefficients, packing: PackingArgs) -> list[Item]:
    """Groups of draws with equal keys, at most ``max_branches`` and ``max_tokens`` each, and singles.

    Raises:
        DataError: A single sample above ``max_tokens``.
    """
    by_key: dict[int, list[int]] = {}
    singles: list[list[int]] = []
    keys = lengths["group_key"].tolist()
    tokens, prefix = lengths["tokens"].tolist(), lengths["prefix_tokens"].tolist()
    for index, (key, count) in enumerate(zip(keys, tokens, strict=True)):
        if count > packing.max_tokens:
            raise DataError(
                f"draw {index} of the step has {count} tokens, more than packing.max_tokens={packing.max_tokens}; "
                "raise it or lower packing.max_length",
                reason="overlong",
            )
        if count == 0:
            continue
        if key and packing.max_branches > 1:
            by_key.setdefault(key, []).append(index)
        else:
            singles.append([index])
    groups = [part for group in by_key.values() for part in _split(group, tokens, prefix, packing)]
    costs = member_cost(lengths, cost)
    items = [_item(group, lengths, costs, cost) for group in groups + singles]
    return sorted(items, key=lambda item: item.members)


def member_cost(lengths: LengthArray, cost: CostCoefficients) -> dict[str, Any]:
    """Parts of the predicted cost per draw: ``media`` is paid once per group, ``head`` per sample."""
    media = (
        cost.per_patch * lengths["patches"]
        + cost.per_patch_pair * lengths["patch_pairs"]
        + cost.geometry_per_token * lengths["geometry_tokens"]
        + cost.geometry_per_frame_pair * lengths["geometry_frame_pairs"]
        + cost.geometry_per_global_pair * lengths["geometry_global_pairs"]
    )
    head = cost.per_head_row * lengths["label_tokens"]
    return {"media": media.tolist(), "head": head.tolist()}


def shared_tokens_and_pairs(prefix: int, lengths: Sequence[int]) -> tuple[int, int]:
    """Tokens and attention pairs of samples of the given lengths behind one prefix.

    A prefix of P tokens has P(P+1)/2 pairs, a branch of L tokens L·P + L(L+1)/2.
    """
    branches = [length - prefix for length in lengths]
    tokens = prefix + sum(branches)
    pairs = prefix * (prefix + 1) // 2 + sum(n * prefix + n * (n + 1) // 2 for n in branches)
    return tokens, pairs


def _item(
    group: list[int], lengths: LengthArray, costs: dict[str, Any], cost: CostCoefficients
) -> Item:
    rows = lengths[group]
    prefix = int(rows["prefix_tokens"].min()) if len(group) > 1 else 0
    tokens, pairs = shared_tokens_and_pairs(prefix, rows["tokens"].tolist())
    media = costs["media"][group[0]]
    flops = cost.per_token * tokens + cost.per_pair * pairs + sum(costs["head"][i] for i in group)
    return Item(tuple(group), tokens, flops + media, media)


def _split(
    group: list[int], tokens: list[int], prefix: list[int], packing: PackingArgs
) -> list[list[int]]:
    """Cut equal-key draws into groups that fit, longest branches first."""
    if len(group) == 1:
        return [group]
    shared = min(prefix[i] for i in group)
    parts: list[tuple[int, list[int]]] = []  # branch tokens, members
    for i in sorted(group, key=lambda i: (-tokens[i], i)):
        own = tokens[i] - shared
        fitting = [
            part
            for part in parts
            if len(part[1]) < packing.max_branches and shared + part[0] + own <= packing.max_tokens
        ]
        if fitting:
            best = max(fitting, key=lambda part: part[0])
            parts[parts.index(best)] = (best[0] + own, [*best[1], i])
        else:
            parts.append((own, [i]))
    return [sorted(members) for _, members in parts]


def _pack(items: list[Item], world: int, packing: PackingArgs) -> list[list[Item]]:
    """Distribute items over packs: as few as best-fit-decreasing needs, then level their cost."""
    if not packing.enabled:
        packs = [[item] for item in items]
        if packing.fixed_micro_steps is not None:
            raise ConfigError("packing.fixed_micro_steps needs packing.enabled: true")
        return packs + [[] for _ in range(max(-len(packs) % world, world if not packs else 0))]
    fewest = best_fit_decreasing([item.tokens for item in items], packing.max_tokens)
    count = world * max(-(-fewest // world), 1)
    if packing.fixed_micro_steps is not None:
        wanted = world * packing.fixed_micro_steps
        if wanted < count:
            raise ConfigError(
                f"packing.fixed_micro_steps={packing.fixed_micro_steps} gives {wanted} packs, but this step needs "
                f"{count} of {packing.max_tokens} tokens; raise it, or lower step.global_batch_size"
            )
        count = wanted
    while True:
        found = _level(items, count, packing.max_tokens)
        if found is not None:
            return found
        if packing.fixed_micro_steps is not None:
            raise ConfigError(
                f"packing.fixed_micro_steps={packing.fixed_micro_steps}: {len(items)} items of this step do not fit "
                f"{count} packs of {packing.max_tokens} tokens; raise either"
            )
        count += world


def _level(items: list[Item], count: int, max_tokens: int) -> list[list[Item]] | None:
    """Deal items to packs so that media cost and language cost are both level; None when one finds no room.

    Sharded engines meet in every layer, so a rank that is late in its vision encoder delays all others
    even if its total is average. Large items first, each goes where the larger of the two loads, in units
    of their means, stays smallest.
    """
    media_mean = sum(item.media_cost for item in items) / count or 1.0
    text_mean = sum(item.cost - item.media_cost for item in items) / count or 1.0
    shares = {
        item.members: (item.media_cost / media_mean, (item.cost - item.media_cost) / text_mean)
        for item in items
    }
    packs: list[list[Item]] = [[] for _ in range(count)]
    media, text = np.zeros(count), np.zeros(count)
    room = np.full(count, max_tokens)
    for item in sorted(items, key=lambda item: (-max(shares[item.members]), item.members)):
        own_media, own_text = shares[item.members]
        load = np.maximum(media + own_media, text + own_text) + 0.1 * (media + text)
        at = int(np.argmin(np.where(room >= item.tokens, load, np.inf)))
        if room[at] < item.tokens:
            return None
        packs[at].append(item)
        media[at] += own_media
        text[at] += own_text
        room[at] -= item.tokens
    return packs


def best_fit_decreasing(sizes: Sequence[int], capacity: int) -> int:
    """Number of bins best-fit-decreasing uses."""
    rooms: list[int] = []
    for size in sorted(sizes, reverse=True):
        at = bisect_left(rooms, size)
        left = (rooms.pop(at) if at < len(rooms) else capacity) - size
        insort(rooms, left)
    return len(rooms)


def _pack_plan(pack: list[Item], draws: DrawArray, packing: PackingArgs) -> PackPlan:
    pack = sorted(pack, key=lambda item: item.members)
    members = [i for item in pack for i in item.members]
    groups, at = [], 0
    for item in pack:
        groups.append(tuple(range(at, at + len(item.members))))
        at += len(item.members)
    if packing.compute == "separate":
        groups = [(i,) for i in range(len(members))]
    return PackPlan(
        draws=tuple(Draw(*draws[i].item()) for i in members),
        groups=tuple(groups),
        tokens=sum(item.tokens for item in pack),
        cost=sum(item.cost for item in pack),
    )


def _flags(lengths: LengthArray, *, boundary: bool) -> ModalityFlags:
    return ModalityFlags(
        image=bool(np.any(lengths["images"] > 0)),
        video=bool(np.any(lengths["videos"] > 0)),
        geometry=bool(np.any(lengths["geometry_tokens"] > 0)),
        boundary=boundary,
    )


def split_window(
    window: StepPlan, draws: DrawArray, lengths: LengthArray, world: int, first_step: int
) -> list[tuple[StepPlan, npt.NDArray[np.bool_]]]:
    """Cut the plan of many draws, made for ``packs_per_step`` ranks, into optimizer steps.

    Args:
        window: Its micro-steps become steps.
        draws: The window's draws.
        lengths: One record per draw.
        world: Number of ranks, a divisor of ``packs_per_step``.
        first_step: Number of the first step.

    Returns:
        Per step its plan, and which draws it holds.
    """
    place = {int(position): at for at, position in enumerate(draws["position"])}
    out = []
    for number, packs in enumerate(window.packs):
        micro_steps, flags = [], []
        mask = np.zeros(len(draws), np.bool_)
        for start in range(0, len(packs), world):
            turn = packs[start : start + world]
            members = [place[draw.position] for pack in turn for draw in pack.draws]
            mask[members] = True
            micro_steps.append(turn)
            flags.append(_flags(lengths[members], boundary=start + world >= len(packs)))
        plan = StepPlan(first_step + number, window.positions, tuple(micro_steps), tuple(flags))
        out.append((plan, mask))
    return out


def imbalance(plan: StepPlan) -> float:
    """Mean over micro-steps of (largest pack cost / mean pack cost) - 1."""
    ratios = []
    for packs in plan.packs:
        costs = [pack.cost for pack in packs]
        if any(costs):
            ratios.append(max(costs) * len(costs) / sum(costs) - 1)
    return float(np.mean(ratios)) if ratios else 0.0


def distinct_media(sizes: LengthArray) -> int:
    """Distinct media lists of a step; samples without media count one each."""
    keys = sizes["media_key"][sizes["tokens"] > 0]
    return int(len(np.unique(keys[keys > 0])) + np.sum(keys == 0))
