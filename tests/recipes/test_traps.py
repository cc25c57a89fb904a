"""Known defects of other frameworks and libraries, each with the test that keeps it out of this one.

``ELSEWHERE`` names the tests of other files; the rest are below, named after the defect.
"""

import copy
import json
import math
import re
import shutil
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from safetensors.torch import load_file
from torch import nn

from benchmarks.startup import move_to_step
from spatialvlm.config import TrainConfig, load_config
from spatialvlm.data.mixture import Mixture
from spatialvlm.data.plan import PackingArgs, plan_step
from spatialvlm.data.sample import DRAW_DTYPE, LENGTH_DTYPE
from spatialvlm.errors import LaunchError
from spatialvlm.models.spatial_vlm import SpatialVLM
from spatialvlm.training import checkpoint as checkpoint_module
from spatialvlm.training.build import build_groups
from spatialvlm.training.checkpoint import CheckpointStore, Snapshot
from spatialvlm.training.checkpoint_files import checkpoints_in
from spatialvlm.training.distributed import Processes, group_timeout, start_processes
from spatialvlm.training.engines import make_engine
from spatialvlm.training.optim import plan_groups
from spatialvlm.typing import CostCoefficients
from tests.unit.training.fakes import RATES, FakeLoader, FakeVLM, make_batch, prepare

ROOT = Path(__file__).resolve().parents[2]
ONE = Processes(0, 1, torch.device("cpu"))
ELSEWHERE = {
    "vision_lr_needs_no_other_flag": "tests/unit/training/test_optim.py::test_each_rate_works_alone",
    "no_parameter_is_lost": "tests/unit/training/test_optim.py::test_refusals_name_what_is_wrong",
    "every_rate_is_logged": "tests/recipes/test_recipes.py::test_golden_losses",
    "names_do_not_decide": "tests/unit/training/test_optim.py::test_names_do_not_decide",
    "scheduler_world_size": "tests/recipes/test_two_processes.py::test_stage_2_equals_one_process",
    "clip_value_reaches_engine": "tests/unit/training/test_engines.py::test_the_clipping_bound_reaches_every_engine",
    "zero2_dummy_after_forward": "tests/fault/test_engine_traps.py::test_engines_are_right_where_the_naive_form_is_wrong",
    "zero3_text_first_micro_step": "tests/fault/test_engine_traps.py::test_engines_are_right_where_the_naive_form_is_wrong",
    "ddp_text_last_micro_step": "tests/fault/test_engine_traps.py::test_engines_are_right_where_the_naive_form_is_wrong",
    "text_only_rank": "tests/fault/test_modalities.py::test_every_pair_of_modalities_gives_the_gradients_of_one_process",
    "image_and_video_calls": "tests/unit/models/test_spatial_vlm.py::test_vision_and_head_run_once_per_forward",
    "universal_copies_hyperparameters": "tests/unit/training/test_optim.py::test_rates_follow_the_plan_and_equalised_groups_are_found",
    "newest_by_name": "tests/unit/training/test_checkpoint.py::test_leftover_of_a_crash_is_removed_and_reported",
    "rng_failure_is_silent": "tests/unit/training/test_checkpoint.py::test_random_generators_continue",
    "key_prefix_mismatch_restarts": "tests/unit/training/test_checkpoint.py::test_other_parameters_are_refused_by_name",
    "bit_flip": "tests/unit/training/test_checkpoint.py::test_every_mutation_is_found_and_the_previous_checkpoint_used",
    "skip_forever": "tests/unit/training/test_loop.py::test_five_bad_steps_in_a_row_end_the_run_with_a_diagnosis",
    "mismatch_continues": "tests/unit/models/test_spatial_vlm.py::test_wrong_number_of_tokens_names_the_sample",
    "silent_eager": "tests/unit/models/test_isolation.py::test_stock_attention_is_caught",
    "export_names": "tests/recipes/test_recipes.py::test_adapters_are_merged_into_the_names_of_the_base",
    "mfu_ignores_vision": "tests/unit/models/test_cost.py::test_flops_of_a_real_step",
    "launcher_eats_flags": "tests/recipes/test_bad_input.py::test_command_line_and_exit_codes",
}


@pytest.mark.parametrize("trap", sorted(ELSEWHERE))
def test_the_named_test_exists(trap):
    file, _, name = ELSEWHERE[trap].partition("::")
    assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), flags=re.M), ELSEWHERE[trap]


def engine_of(model, rates=RATES, weight_decay=0.01):
    _, groups, factory = prepare(model, rates, weight_decay)
    return make_engine("ddp", model, groups, factory, ONE, max_grad_norm=1e9, bf16=False)


def train_steps(engine, number):
    for _, step in zip(range(number), FakeLoader(), strict=False):
        for batch in step.batches:
            engine.backward(engine(batch).loss_sum / step.denominator_local)
        assert engine.step(engine.grad_norms(due=True))


def test_module_requires_grad_is_not_freezing():
    """``module.requires_grad = False`` sets an attribute nobody reads."""
    model = FakeVLM()
    before = copy.deepcopy(model.state_dict())
    train_steps(engine_of(model, {**RATES, "vision_encoder": None}), 5)
    moved = {
        name for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert not any(name.startswith("visual") for name in moved)
    assert any(name.startswith("layers") for name in moved)


def test_own_rate_for_a_fourth_part():
    """Adam's first step moves a weight by its rate, so each part shows which rate it got."""
    model = FakeVLM()
    before = copy.deepcopy(model.state_dict())
    train_steps(engine_of(model, weight_decay=0.0), 1)
    named = model.parts()
    for part, rate in RATES.items():
        largest = max(float((p.detach() - before[n]).abs().max()) for n, p in named[part])
        assert largest == pytest.approx(rate, rel=1e-3), part


def test_mean_of_means():
    """Two micro-steps with 1 and 7 labels: one denominator for both, not the mean of two means."""
    batches = [make_batch(1, length=8, labels=1), make_batch(2, length=17, labels=7)]
    norms = {}
    for kind in ("ours", "naive"):
        engine = engine_of(FakeVLM())
        for batch in batches:
            labels = len(batch["logit_index"])
            engine.backward(engine(batch).loss_sum / (8 if kind == "ours" else 2 * labels))
        norms[kind] = float(engine.grad_norms(due=True)["total"])
    model = FakeVLM()
    sum(model(batch).loss_sum for batch in batches).div(8).backward()
    right = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
    assert norms["ours"] == pytest.approx(right, rel=1e-6)
    assert abs(norms["naive"] / right - 1) > 0.05


def test_decay_split_before_partition():
    """A parameter that ZeRO-3 has cut looks empty and one-dimensional; its logical shape decides."""
    model = nn.Module()
    model.matrix, model.bias = (nn.Parameter(torch.empty(0)) for _ in range(2))
    model.matrix.ds_shape, model.bias.ds_shape = torch.Size([4, 6]), torch.Size([6])
    parts = {"projector": list(model.named_parameters())}
    groups = plan_groups(model, parts, {"projector": 1.0}, weight_decay=0.1)
    assert {g.name: (g.fqns, g.numel) for g in groups} == {
        "projector/decay": (("matrix",), 24),
        "projector/no_decay": (("bias",), 6),
    }


@pytest.mark.parametrize("family", ["qwen3vl", "qwen2_5vl", "internvl3"])
def test_dummy_is_one_merge_unit(family, tiny_checkpoint):
    model = SpatialVLM.from_pretrained(tiny_checkpoint(family))
    _, grid = model.adapter.dummy_pixels(model.device, torch.float32)
    assert int(torch.as_tensor(grid).prod()) == 4
    assert len(model._see_dummy().tokens) == 1


def test_wrong_world_runs_alone(monkeypatch):
    """Two processes asked for, Accelerate started one: both would train on everything."""
    alone = SimpleNamespace(num_processes=1, process_index=0, device=torch.device("cpu"))
    monkeypatch.setattr("accelerate.PartialState", lambda **_: alone)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        LaunchError, match=r"WORLD_SIZE=2, accelerate num_processes=1.*use_cpu: false"
    ):
        start_processes(timeout_s=5)


def test_group_timeout(monkeypatch):
    asked = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "new_group", lambda *_, **options: asked.append(options))
    with group_timeout(6):
        dist.new_group([0])
    dist.new_group([0])
    assert asked == [{"timeout": timedelta(seconds=6)}, {}]


def test_delete_before_write(tmp_path, monkeypatch):
    """Looked at between all steps of a save: what was complete stays until the new one is."""
    store = CheckpointStore(tmp_path, ONE)
    engine = engine_of(FakeVLM())
    seen = []
    monkeypatch.setattr(checkpoint_module, "fault_point", lambda *_, **__: seen.append(len(checkpoints_in(tmp_path))))  # fmt: skip
    for step in range(1, 6):
        store.save(step, engine, Snapshot({"adam_step": 0}, {}, "", {}))
    by_save = np.array_split(seen, 5)
    assert [min(points) for points in by_save] == [0, 1, 2, 2, 2]
    assert [p.name for p in checkpoints_in(tmp_path)] == ["step-00000004", "step-00000005"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_only(value):
    model = FakeVLM()
    engine = engine_of(model)
    before = copy.deepcopy(model.state_dict())
    engine.backward(engine(make_batch(0)).loss_sum * value)
    assert engine.step(engine.grad_norms(due=True)) is False
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_tied_head_twice(run, recipe, tiny_checkpoint, tmp_path):
    """A table that is input and output has one entry in groups, checkpoints and the exported file."""
    out = tmp_path / "run"
    short = ("data.length.steps=2", "schedule.warmup_ratio=0.0", "checkpoint.every=2")
    assert run(1, recipe(1, "qwen3vl"), f"run.dir={out}", *short) == 0
    base = load_file(tiny_checkpoint("qwen3vl") / "model.safetensors")
    final = load_file(out / "final" / "model.safetensors")
    assert final.keys() == base.keys()
    (table,) = (name for name in final if "embed_tokens" in name or "lm_head" in name)
    assert not torch.equal(final[table], base[table])
    slices = load_file(out / "checkpoints" / "step-00000002" / "state-00000-of-00001.safetensors")
    (trained,) = (n for n in slices if n.startswith("param/") and ("embed_tokens" in n or "lm_head" in n))  # fmt: skip
    assert torch.equal(slices[trained], final[table].flatten())


def test_lora_dtype(recipe):
    """Weights load in bf16; every adapter is an fp32 master whatever the engine does later."""
    config = load_config(
        recipe(1, "qwen3vl"),
        ["precision=bf16", "lora={r: 4, alpha: 8}", "optim.vision_lr=null", "optim.embedding_lr=null"],
        TrainConfig,
    )  # fmt: skip
    model = SpatialVLM.from_pretrained(config.model.init_from, dtype=torch.bfloat16)
    parts, _ = build_groups(config, model)
    assert {p.dtype for _, p in parts["lora"]} == {torch.float32}
    assert {p.dtype for _, p in parts["embeddings"]} == {torch.bfloat16}


def test_class_by_folder_name(tiny_checkpoint, tmp_path):
    folder = tmp_path / "internvl3-llava-qwen2.5"
    shutil.copytree(tiny_checkpoint("qwen3vl"), folder)
    assert SpatialVLM.from_pretrained(folder).adapter.family == "qwen3vl"


def test_env_file():
    """The default multi-node launcher of DeepSpeed writes the whole environment, keys included, to disk."""
    files = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
    launchers = [yaml.safe_load(f.read_text()).get("deepspeed_config") for f in files]
    found = [section["deepspeed_multinode_launcher"] for section in launchers if section]
    assert len(found) >= 8
    assert set(found) == {"standard"}


def test_burst():
    """Steps of equal samples cost alike: no window of long samples piles up at the end of an order."""
    rng = np.random.default_rng(0)
    cost = CostCoefficients(per_token=1e9, per_pair=1e5, per_head_row=1e7, per_patch=1e8, per_patch_pair=1e3)  # fmt: skip
    spent = []
    for step in range(40):
        draws, sizes = np.zeros(64, DRAW_DTYPE), np.zeros(64, LENGTH_DTYPE)
        draws["position"] = np.arange(64 * step, 64 * step + 64)
        media = rng.choice([0, 500, 4000], 64, p=[0.25, 0.5, 0.25])
        sizes["patches"], sizes["tokens"] = media, rng.integers(50, 400, 64) + media // 4
        sizes["label_tokens"] = 20
        plan = plan_step(draws, sizes, cost, 8, PackingArgs(max_tokens=8192), step=step)
        spent.append(sum(max(pack.cost for pack in packs) for packs in plan.packs))
    assert np.quantile(spent, 0.95) / np.median(spent) <= 1.5


def test_resume_is_slow(run, recipe, tmp_path, monkeypatch):
    """At step 100,000 a resume draws what the next steps need, not what the past ones needed."""
    options = (f"run.dir={tmp_path / 'run'}", "data.length.steps=200000", "run.stop_after_steps=1")
    assert run(1, recipe(1, "qwen3vl"), *options) == 0
    move_to_step(tmp_path / "run", 100_000)
    drawn = []
    original = Mixture.draws

    def draws(self, start, stop):
        drawn.append((start, stop))
        return original(self, start, stop)

    monkeypatch.setattr(Mixture, "draws", draws)
    assert run(1, recipe(1, "qwen3vl"), *options) == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["step"] == 100_001
    assert min(start for start, _ in drawn) >= 8 * 100_000
    assert sum(stop - start for start, stop in drawn) <= 8 * 10
