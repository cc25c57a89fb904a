"""Schedule values, groups by identity, and what is refused."""

import pytest
import torch
from torch import nn

from spatialvlm.errors import ConfigError
from spatialvlm.training.optim import (
    build_adamw,
    freeze_by_rate,
    group_table,
    make_schedule,
    plan_groups,
    set_lrs,
    verify_groups,
)
from tests.unit.training.fakes import RATES, FakeVLM, prepare


def test_cosine_values():
    schedule = make_schedule("cosine", 100, warmup_ratio=0.03)
    assert schedule.warmup_steps == 3
    assert schedule.factor(0) == pytest.approx(1 / 3)
    assert schedule.factor(2) == schedule.factor(3) == 1.0
    assert schedule.factor(50) == pytest.approx(0.52428, abs=1e-5)
    assert schedule.factor(99) == pytest.approx(0.00026, abs=1e-5)


@pytest.mark.parametrize(
    ("steps", "ratio", "warmup"), [(6501, 0.01, 66), (6501, 0.03, 196), (100, 0.1, 10), (7, 0.0, 0)]
)
def test_warmup_steps(steps, ratio, warmup):
    assert make_schedule("cosine", steps, warmup_ratio=ratio).warmup_steps == warmup


def test_linear_constant_and_floor():
    assert make_schedule("linear", 10, warmup_steps=0).factor(5) == pytest.approx(0.5)
    assert make_schedule("constant", 10, warmup_steps=2).factor(9) == 1.0
    floor = make_schedule("cosine", 10, warmup_steps=0, min_ratio=0.1)
    assert floor.factor(10) == pytest.approx(0.1)


def test_warmup_that_eats_the_run_is_refused():
    with pytest.raises(ConfigError, match="peak learning rate would never be used"):
        make_schedule("cosine", 20, warmup_steps=20)
    assert make_schedule("cosine", 2, warmup_steps=2).factor(1) == 1.0


def test_every_trainable_parameter_is_in_one_group():
    model = FakeVLM()
    parts, groups, factory = prepare(model)
    named = [fqn for group in groups for fqn in group.fqns]
    assert sorted(named) == sorted(name for name, _ in model.named_parameters())
    assert len(named) == len(set(named))
    decay = {g.name: g.weight_decay for g in groups}
    assert decay["language_model/decay"] == 0.01
    assert decay["language_model/no_decay"] == 0.0
    assert "embeddings/decay" not in decay  # tables never decay
    no_decay = next(g for g in groups if g.name == "language_model/no_decay")
    assert all(name.endswith(("bias", "norm.weight")) for name in no_decay.fqns)
    table = group_table(parts, groups)
    assert "vision_encoder" in table
    assert "frozen" not in table
    assert factory(model).defaults["betas"] == (0.9, 0.999)


def test_a_null_rate_freezes_parameters_not_modules():
    model = FakeVLM()
    rates = {**RATES, "vision_encoder": None}
    parts, groups, factory = prepare(model, rates)
    assert not any(p.requires_grad for _, p in parts["vision_encoder"])
    assert {g.part for g in groups} == {"language_model", "projector", "embeddings"}
    assert "frozen" in group_table(parts, groups)
    assert len(factory(model).param_groups) == len(groups)


def test_each_rate_works_alone():
    for part in RATES:
        model = FakeVLM()
        _, groups, _ = prepare(model, {part: 1e-3})
        assert {g.part for g in groups} == {part}
        assert all(g.lr == 1e-3 for g in groups)


def test_names_do_not_decide():
    """A vision module with a language-model name stays a vision parameter: groups follow objects."""
    model = FakeVLM()
    parts = model.parts()
    renamed = {
        part: [(f"layers.visual.merger.{n}", p) for n, p in members]
        for part, members in parts.items()
    }
    freeze_by_rate(renamed, RATES)
    groups = plan_groups(model, renamed, RATES)
    assert {g.part: g.numel for g in groups if g.decay} == {
        g.part: g.numel for g in plan_groups(model, parts, RATES) if g.decay
    }


def test_refusals_name_what_is_wrong():
    model = FakeVLM()
    parts = model.parts()
    freeze_by_rate(parts, RATES)
    model.extra = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"extra.weight trains but belongs to no part"):
        plan_groups(model, parts, RATES)
    del model.extra
    with pytest.raises(
        ConfigError, match=r"geometry_fusion has learning rate 0.001 but no parameters"
    ):
        plan_groups(model, parts, {**RATES, "geometry_fusion": 1e-3})
    with pytest.raises(ConfigError, match="is in language_model and in projector"):
        plan_groups(model, {**parts, "projector": parts["language_model"]}, RATES)
    freeze_by_rate(parts, {})
    with pytest.raises(ConfigError, match="nothing would train"):
        plan_groups(model, parts, {})


def test_position_and_class_tokens_do_not_decay():
    model = nn.Module()
    model.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
    model.table = nn.Embedding(4, 8)
    model.linear = nn.Linear(8, 8, bias=False)
    parts = {"vision_encoder": list(model.named_parameters())}
    groups = plan_groups(model, parts, {"vision_encoder": 1.0}, weight_decay=0.1)
    assert {g.name: g.fqns for g in groups} == {
        "vision_encoder/decay": ("linear.weight",),
        "vision_encoder/no_decay": ("cls_token", "table.weight"),
    }


def test_rates_follow_the_plan_and_equalised_groups_are_found():
    model = FakeVLM()
    _, groups, _ = prepare(model)
    optimizer = build_adamw(model, groups)
    lrs = set_lrs(optimizer, groups, 0.5)
    assert lrs == {part: rate * 0.5 for part, rate in RATES.items()}
    verify_groups(optimizer, groups, 0.5)
    optimizer.param_groups[1]["lr"] = optimizer.param_groups[0]["lr"] * 2
    with pytest.raises(ConfigError, match="differ from the plan"):
        verify_groups(optimizer, groups, 0.5)


@pytest.mark.parametrize("change", ["decay", "order", "lost"])
def test_every_step_finds_changed_groups(change):
    model = FakeVLM()
    _, groups, _ = prepare(model)
    optimizer = build_adamw(model, groups)
    if change == "decay":
        optimizer.param_groups[0]["weight_decay"] += 0.1
    elif change == "order":
        optimizer.param_groups[:2] = optimizer.param_groups[1::-1]
    else:
        del optimizer.param_groups[-1]
    with pytest.raises(ConfigError, match="differ from the plan"):
        set_lrs(optimizer, groups, 0.5)
