"""Packs and shared prefixes give the loss and gradients of separate samples; neighbours are invisible."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from spatialvlm.config.geometry import GeometryConfig
from spatialvlm.config.training import LoraConfig
from spatialvlm.data.build import build_data
from spatialvlm.data.sample import World
from spatialvlm.models import attention
from spatialvlm.models.build import build_layout, build_model
from spatialvlm.typing import CostCoefficients

COST = CostCoefficients(
    per_token=1.0, per_pair=0.0, per_head_row=0.0, per_patch=0.0, per_patch_pair=0.0
)


def gradients(model, steps):
    """Loss and gradients of whole steps, normalised as the training loop does."""
    model.zero_grad(set_to_none=True)
    total = 0.0
    for step in steps:
        for batch in step.batches:
            loss = model(batch).loss_sum / step.denominator_local
            loss.backward()
            total += float(loss.detach())
    named = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    return total, named


def difference(a, b):
    """Relative difference of two whole gradients."""
    delta = sum(float((a[name].double() - b[name].double()).square().sum()) for name in a)
    size = sum(float(value.double().square().sum()) for value in b.values())
    return (delta / size) ** 0.5


@pytest.fixture(scope="module")
def build(tiny_checkpoint, tiny_vggt):
    """Function family, insertion -> model and function config -> first steps."""

    def make(family, insertion=None):
        geometry = None
        if insertion:
            geometry = GeometryConfig(
                source=str(tiny_vggt),
                layers=(-1,),
                insertion=insertion,
                precision="fp32",
                size_policy="match_grid",
            )
        folder = tiny_checkpoint(family)
        torch.manual_seed(0)
        model = build_model(folder, geometry, attention="tree_sdpa")
        if model.fusion is not None:  # a warm start would hide mistakes in the geometry path
            with torch.no_grad():
                for parameter in model.fusion.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
        layout = build_layout(folder, geometry)

        def first(config, count=1):
            config.geometry = geometry
            loader = build_data(config, folder, layout, COST, World())
            return [step for step, _ in zip(loader, range(count), strict=False)]

        return model, first

    return make


CASES = [(f, i) for f in ("qwen2_5vl", "qwen3vl", "internvl3") for i in (None, "interleaved")]
CASES += [("qwen3vl", "sequential"), ("qwen2_5vl", "in_place")]


@pytest.mark.parametrize(("family", "insertion"), CASES)
def test_shared_equals_packed_equals_separate(family, insertion, build, toy_config):
    model, first = build(family, insertion)
    common = {"step": {"global_batch_size": 40}}
    if insertion:  # every image and video of the spatial side goes through the encoder
        common["source_options"] = {"geometry": "on"}
    separate = {"compute": "separate"}
    shared = first(toy_config(**common))
    packed = first(toy_config(shared_prefix=separate, **common))
    alone = first(toy_config(shared_prefix=separate, packing={"enabled": False}, **common))
    one_step = [uid for batch in shared[0].batches for uid in batch["uids"]]
    assert sorted(one_step) == sorted(uid for batch in alone[0].batches for uid in batch["uids"])
    branches = sum(int((batch["segment_parent"] >= 0).sum()) for batch in shared[0].batches)
    assert branches >= 12
    if insertion:
        assert any("geometry_shapes" in batch for batch in shared[0].batches)
    reference_loss, reference = gradients(model, alone)
    for steps in (packed, shared):
        loss, grads = gradients(model, steps)
        assert loss == pytest.approx(reference_loss, rel=1e-5)
        assert difference(grads, reference) < 1e-5
        assert set(grads) == set(reference)


@pytest.mark.parametrize("family", ["qwen2_5vl", "qwen3vl", "internvl3"])
def test_poisoned_neighbour_changes_nothing(family, build, toy_config):
    """Replacing all text of one sample leaves every other sample's loss bit-identical."""
    model, first = build(family)
    checked = 0
    for batch in first(toy_config(packing={"max_tokens": 2000}))[0].batches:
        with torch.no_grad():
            before = model(batch).sample_loss
            for segment, parent in enumerate(batch["segment_parent"].tolist()):
                is_prefix = segment in batch["segment_parent"].tolist()
                start, size = (
                    int(batch["segment_start"][segment]),
                    int(batch["segment_len"][segment]),
                )
                inside = (batch["logit_index"] >= start) & (batch["logit_index"] < start + size)
                if is_prefix or not inside.any():
                    continue
                sample = int(batch["sample_index"][inside][0])
                ids = batch["input_ids"].clone()
                text = batch["token_kind"][0, start : start + size] == 0
                ids[0, start : start + size][text] = 7
                after = model({**batch, "input_ids": ids}).sample_loss
                others = torch.arange(len(before)) != sample
                assert torch.equal(after[others], before[others]), (segment, parent)
                assert after[sample] != before[sample]
                checked += 1
    assert checked == 12


@pytest.mark.parametrize("weighting", ["token", "sample", "sqrt"])
def test_accumulation_ranks_and_weights_change_nothing(
    weighting, build, toy_config, tiny_checkpoint
):
    """One pack, many micro-steps, or two ranks: the step's gradient is the same."""
    model, first = build("qwen3vl")
    folder = tiny_checkpoint("qwen3vl")
    common = {"data": {"loss_weighting": weighting}, "step": {"global_batch_size": 24}}
    one = first(toy_config(packing={"max_tokens": 8000}, **common))
    assert len(one[0].batches) == 1
    loss, reference = gradients(model, one)
    many = first(toy_config(packing={"max_tokens": 300}, **common))
    assert len(many[0].batches) >= 4
    ranks = []
    for rank in range(2):
        config = toy_config(packing={"max_tokens": 300}, **common)
        loader = build_data(config, folder, build_layout(folder), COST, World(rank, 2))
        ranks.append(next(iter(loader)))
    together = sum(step.denominator_local for step in ranks)
    assert together == pytest.approx(one[0].denominator_local, rel=1e-6)
    ranks = [replace(step, denominator_local=together) for step in ranks]
    for steps in (many, ranks):
        other, grads = gradients(model, steps)
        assert other == pytest.approx(loss, rel=1e-5)
        assert difference(grads, reference) < 1e-5


@pytest.mark.parametrize("branches", [2, 3, 8])
def test_group_sizes(branches, build, toy_config):
    model, first = build("qwen2_5vl")
    common = {"step": {"global_batch_size": 24}, "packing": {"max_tokens": 4000}}
    shared = first(
        toy_config(shared_prefix={"max_branches": branches, "min_media_per_step": 1}, **common)
    )
    alone = {"max_branches": branches, "min_media_per_step": 1, "compute": "separate"}
    separate = first(toy_config(shared_prefix=alone, **common))
    sizes = {len(group) for packs in shared[0].plan.packs for group in packs[0].groups}
    assert max(sizes) > 1
    loss, reference = gradients(model, separate)
    other, grads = gradients(model, shared)
    assert other == pytest.approx(loss, rel=1e-5)
    assert difference(grads, reference) < 1e-5


@pytest.mark.parametrize("variant", ["lora", "frozen_vision"])
def test_adapters_and_frozen_parts(variant, tiny_checkpoint, toy_config):
    folder = tiny_checkpoint("qwen2_5vl")
    lora = LoraConfig(parts=("language_model",), r=4) if variant == "lora" else None
    torch.manual_seed(0)
    model = build_model(folder, attention="tree_sdpa", lora=lora)
    if variant == "frozen_vision":
        for parameter in model.adapter.vision_encoder.parameters():
            parameter.requires_grad_(False)
    with torch.no_grad():  # a fresh adapter is zero
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)

    def first(config):
        return [next(iter(build_data(config, folder, build_layout(folder), COST, World())))]

    common = {"step": {"global_batch_size": 24}}
    loss, reference = gradients(
        model, first(toy_config(shared_prefix={"compute": "separate"}, **common))
    )
    other, grads = gradients(model, first(toy_config(**common)))
    assert other == pytest.approx(loss, rel=1e-5)
    assert difference(grads, reference) < 1e-5
    if variant == "lora":
        assert all("lora" in name for name in grads)


def random_tree(rng):
    """Roots and groups of random lengths, as packs hold them."""
    lengths, parents = [], []
    for _ in range(int(rng.integers(1, 5))):
        root = len(lengths)
        lengths.append(int(rng.integers(1, 13)))
        parents.append(-1)
        for _ in range(int(rng.choice([0, 0, 2, 3, 8]))):
            lengths.append(int(rng.integers(1, 9)))
            parents.append(root)
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return attention.Tree(starts, lengths, parents)


def test_random_packs_follow_the_rule_and_poison_changes_no_bit():
    """200 packs: equal to the rule as a dense mask; garbage in one segment reaches its branches only."""
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    layer = torch.nn.Module()
    layer.num_key_value_groups, layer.layer_idx = 1, 0
    for _ in range(200):
        tree = random_tree(rng)
        owner = torch.repeat_interleave(torch.arange(len(tree.length)), torch.tensor(tree.length))
        parent = torch.tensor(tree.parent)[owner]
        seen = (owner[:, None] == owner[None]) | (parent[:, None] == owner[None])
        q, k, v = (torch.randn(1, 2, tree.total, 4) for _ in range(3))
        found, _ = attention.tree_sdpa(layer, q, k, v, None, tree=tree)
        scores = (q @ k.transpose(2, 3) / 2).masked_fill(~seen.tril(), -torch.inf)
        wanted = (scores.softmax(-1) @ v).transpose(1, 2)
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
        bad = int(rng.integers(len(tree.length)))
        for x in (q, k, v):
            x[:, :, owner == bad] = 1e4
        after, _ = attention.tree_sdpa(layer, q, k, v, None, tree=tree)
        safe = (owner != bad) & (parent != bad)
        assert torch.equal(after[:, safe], found[:, safe])


class TestMutants:
    """The equality above notices typical mistakes."""

    @pytest.fixture(scope="class")
    def kit(self, build):
        return build("qwen3vl")

    def changed(self, kit, toy_config, mutate):
        model, first = kit
        step = first(toy_config())[0]
        batch = next(batch for batch in step.batches if (batch["segment_parent"] >= 0).any())
        with torch.no_grad():
            honest = float(model(batch).loss_sum)
            mutant = {
                key: value.clone() if isinstance(value, torch.Tensor) else value
                for key, value in batch.items()
            }
            mutate(mutant)
            return abs(float(model(mutant).loss_sum) - honest) / honest

    def test_branch_sees_its_sibling(self, kit, toy_config):
        def join(batch):
            """Two neighbouring branches become one segment."""
            parents = batch["segment_parent"].tolist()
            at = next(i for i in range(len(parents) - 1) if parents[i] == parents[i + 1] >= 0)
            batch["segment_len"][at] += batch["segment_len"][at + 1]
            keep = [i for i in range(len(parents)) if i != at + 1]
            renumber = {old: new for new, old in enumerate(keep)} | {-1: -1}
            for key in ("segment_start", "segment_len", "segment_parent"):
                batch[key] = batch[key][keep]
            batch["segment_parent"] = torch.tensor(
                [renumber[p] for p in batch["segment_parent"].tolist()], dtype=torch.int32
            )

        assert self.changed(kit, toy_config, join) > 1e-4

    def test_wrong_positions_in_a_branch(self, kit, toy_config):
        def shift(batch):
            at = int((batch["segment_parent"] >= 0).nonzero()[0])
            start, size = int(batch["segment_start"][at]), int(batch["segment_len"][at])
            batch["position_ids"][1:, :, start : start + size] -= batch["position_ids"][
                1, 0, start
            ].item()

        assert self.changed(kit, toy_config, shift) > 1e-4

    def test_branch_without_its_prefix_is_refused(self, kit, toy_config):
        def cut(batch):
            batch["segment_parent"].fill_(-1)

        with pytest.raises(ValueError, match="continues"):
            self.changed(kit, toy_config, cut)

    def test_detached_prefix(self, kit, toy_config, monkeypatch):
        """The prefix learns from its branches through attention alone, so a missing path there must be seen."""
        model, first = kit
        steps = first(toy_config())
        _, reference = gradients(model, steps)
        honest = attention._attend

        def detached(query, key, value, **options):
            size = key.shape[2] - query.shape[2]
            if size > 0:
                key, value = (
                    torch.cat([x[:, :, :size].detach(), x[:, :, size:]], dim=2)
                    for x in (key, value)
                )
            return honest(query, key, value, **options)

        monkeypatch.setattr(attention, "_attend", detached)
        _, mutant = gradients(model, steps)
        assert difference(mutant, reference) > 1e-2

    def test_mean_per_pack(self, kit, toy_config):
        """Packs hold different numbers of supervised tokens, so dividing by their own is another gradient."""
        model, first = kit
        (step,) = first(toy_config(packing={"max_tokens": 300}))
        _, reference = gradients(model, [step])
        packs = [
            replace(step, batches=[b], denominator_local=len(step.batches) * len(b["target_ids"]))
            for b in step.batches
        ]
        assert len(packs) > 1
        _, mutant = gradients(model, packs)
        assert difference(mutant, reference) > 1e-3
