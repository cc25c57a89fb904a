"""Plans: worked examples, every draw once, budgets kept, equal for all ranks, balanced."""

import numpy as np
import pytest

from spatialvlm.data.plan import (
    PackingArgs,
    best_fit_decreasing,
    imbalance,
    make_items,
    plan_step,
    shared_tokens_and_pairs,
)
from spatialvlm.data.sample import DRAW_DTYPE, LENGTH_DTYPE
from spatialvlm.errors import ConfigError, DataError
from spatialvlm.typing import CostCoefficients

TOKENS_ONLY = CostCoefficients(1.0, 0.0, 0.0, 0.0, 0.0)


def lengths(tokens, **columns):
    out = np.zeros(len(tokens), LENGTH_DTYPE)
    out["tokens"] = tokens
    for name, values in columns.items():
        out[name] = values
    return out


def draws(count):
    out = np.zeros(count, DRAW_DTYPE)
    out["position"] = np.arange(100, 100 + count)
    return out


def packed_tokens(plan):
    return sorted(pack.tokens for packs in plan.packs for pack in packs)


def test_best_fit_decreasing_example():
    sizes = [60, 50, 40, 30, 20]  # {60, 40} {50, 30, 20}
    assert best_fit_decreasing(sizes, 100) == 2
    # two packs would do, but levelling by cost needs a third
    plan = plan_step(draws(5), lengths(sizes), TOKENS_ONLY, 1, PackingArgs(max_tokens=100))
    assert packed_tokens(plan) == [60, 70, 70]
    plan = plan_step(draws(5), lengths(sizes), TOKENS_ONLY, 1, PackingArgs(max_tokens=110))
    assert packed_tokens(plan) == [90, 110]


def test_tokens_and_pairs_of_a_group():
    """Prefix 8, branches 5 and 3: 16 tokens and 36 + 55 + 30 = 121 pairs instead of 24 and 157."""
    assert shared_tokens_and_pairs(8, [13, 11]) == (16, 121)
    assert shared_tokens_and_pairs(0, [13])[1] + shared_tokens_and_pairs(0, [11])[1] == 157


def test_cost_by_hand():
    cost = CostCoefficients(2.0, 3.0, 5.0, 7.0, 11.0, 13.0, 17.0, 19.0)
    rows = lengths(
        [13, 11], prefix_tokens=8, label_tokens=[2, 1], patches=16, patch_pairs=256, group_key=1,
        geometry_tokens=4, geometry_frame_pairs=6, geometry_global_pairs=8,
    )  # fmt: skip
    (item,) = make_items(rows, cost, PackingArgs())
    media = 7 * 16 + 11 * 256 + 13 * 4 + 17 * 6 + 19 * 8
    assert item.tokens == 16
    assert item.cost == 2 * 16 + 3 * 121 + 5 * 3 + media
    singles = make_items(rows, cost, PackingArgs(max_branches=1))
    assert sum(i.cost for i in singles) == 2 * 24 + 3 * 157 + 5 * 3 + 2 * media


def test_groups_respect_branch_and_token_limits():
    rows = lengths([100 + i for i in range(10)], prefix_tokens=80, group_key=5)
    items = make_items(rows, TOKENS_ONLY, PackingArgs(max_branches=4))
    assert sorted(len(item.members) for item in items) == [2, 4, 4]
    items = make_items(rows, TOKENS_ONLY, PackingArgs(max_branches=8, max_tokens=140))
    assert all(item.tokens <= 140 for item in items)
    assert sorted(i for item in items for i in item.members) == list(range(10))
    assert {len(item.members) for item in items} == {2}


def test_keys_zero_never_group():
    items = make_items(
        lengths([10] * 4, group_key=[0, 0, 7, 7], prefix_tokens=5), TOKENS_ONLY, PackingArgs()
    )
    assert [item.members for item in items] == [(0,), (1,), (2, 3)]


def test_too_long_and_empty_slots():
    with pytest.raises(DataError, match="max_tokens=50"):
        make_items(lengths([10, 51]), TOKENS_ONLY, PackingArgs(max_tokens=50))
    plan = plan_step(draws(3), lengths([10, 0, 12]), TOKENS_ONLY, 1, PackingArgs())
    assert [d.position for packs in plan.packs for pack in packs for d in pack.draws] == [100, 102]


def test_fixed_micro_steps():
    rows = lengths([60, 50, 40, 30, 20])
    plan = plan_step(
        draws(5), rows, TOKENS_ONLY, 1, PackingArgs(max_tokens=100, fixed_micro_steps=4)
    )
    assert len(plan.packs) == 4
    with pytest.raises(ConfigError, match="needs 2"):
        plan_step(draws(5), rows, TOKENS_ONLY, 1, PackingArgs(max_tokens=100, fixed_micro_steps=1))


def test_packing_off_gives_one_item_per_pack():
    plan = plan_step(draws(5), lengths([9] * 5), TOKENS_ONLY, 2, PackingArgs(enabled=False))
    assert [len(pack.draws) for packs in plan.packs for pack in packs] == [1, 1, 1, 1, 1, 0]


def test_flags_cover_all_ranks():
    rows = lengths(
        [50, 50, 50, 50], images=[1, 0, 0, 0], videos=[0, 0, 2, 0], geometry_tokens=[0, 0, 9, 0]
    )
    plan = plan_step(draws(4), rows, TOKENS_ONLY, 2, PackingArgs(max_tokens=60))
    assert len(plan.flags) == 2
    for packs, flags in zip(plan.packs, plan.flags, strict=True):
        held = {d.position - 100 for pack in packs for d in pack.draws}
        assert flags.image == (0 in held)
        assert flags.video == flags.geometry == (2 in held)
    assert [flags.boundary for flags in plan.flags] == [False, True]


def test_random_plans():
    """Every draw once, no pack above the budget, groups share keys, packs a multiple of the ranks."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        count, world = int(rng.integers(1, 60)), int(rng.integers(1, 6))
        keys = rng.integers(0, 8, count)
        prefix = np.where(keys > 0, 10 * keys, 0)
        tokens = prefix + rng.integers(1, 120, count)
        rows = lengths(
            tokens, prefix_tokens=prefix, group_key=keys, label_tokens=rng.integers(0, 20, count)
        )
        args = PackingArgs(
            max_tokens=int(rng.integers(tokens.max(), 600)),
            max_branches=int(rng.integers(1, 9)),
            enabled=bool(rng.integers(2)),
        )
        cost = CostCoefficients(*rng.random(5))
        plan = plan_step(draws(count), rows, cost, world, args)
        assert plan == plan_step(draws(count), rows, cost, world, args)
        packs = [pack for micro in plan.packs for pack in micro]
        assert all(len(micro) == world for micro in plan.packs)
        assert sorted(d.position for pack in packs for d in pack.draws) == list(
            range(100, 100 + count)
        )
        for pack in packs:
            assert pack.tokens <= args.max_tokens
            assert sorted(i for group in pack.groups for i in group) == list(range(len(pack.draws)))
            for group in pack.groups:
                own = {int(keys[pack.draws[i].position - 100]) for i in group}
                assert len(group) <= args.max_branches
                assert len(group) == 1 or (len(own) == 1 and own != {0})


@pytest.mark.parametrize("images_of_a_sample", [(0, 4), (1, 2), (0, 3)])
@pytest.mark.parametrize("world", [2, 8, 32])
def test_ranks_are_balanced(world, images_of_a_sample):
    """Total cost and ViT patches per rank both stay below the 5 % the project promises."""
    rng = np.random.default_rng(1)
    cost = CostCoefficients(
        per_token=1e9, per_pair=1e5, per_head_row=1e7, per_patch=1e8, per_patch_pair=1e3
    )
    total, vision = [], []
    for _ in range(5):
        images = rng.integers(*images_of_a_sample, 512)
        patches = images * rng.integers(300, 660, 512)
        rows = lengths(
            rng.integers(30, 600, 512) + patches // 4, patches=patches, patch_pairs=480 * patches,
            label_tokens=rng.integers(1, 300, 512), images=images,
        )  # fmt: skip
        plan = plan_step(draws(512), rows, cost, world, PackingArgs(max_tokens=8192))
        total.append(imbalance(plan))
        for packs in plan.packs:
            of_rank = [sum(int(rows["patches"][d.position - 100]) for d in p.draws) for p in packs]
            vision.append(max(of_rank) / np.mean(of_rank) - 1)
    assert np.mean(total) < 0.05
    assert np.mean(vision) < 0.05
