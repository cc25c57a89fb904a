"""All strategies on two real processes in one launch, against one process; and the DeepSpeed JSON rules."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spatialvlm.errors import ConfigError
from spatialvlm.training.checkpoint_files import SliceReader
from spatialvlm.training.deepspeed_files import read_weights
from spatialvlm.training.engines import deepspeed_settings
from spatialvlm.training.slices import KINDS

ROOT = Path(__file__).resolve().parents[3]
WORKER = ROOT / "tests" / "unit" / "training" / "engine_worker.py"
STRATEGIES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    one = [sys.executable, str(WORKER), str(folder), "ddp"]
    two = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(WORKER),
    ]
    origins = "ddp-1,ddp-2,zero2-2,zero3-2,fsdp2-2"
    for command in (one, [*two, str(folder), ",".join(STRATEGIES), origins]):
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
    return {
        "folder": folder,
        **json.loads((folder / "result-2.json").read_text()),
        "one": json.loads((folder / "result-1.json").read_text())["ddp"],
    }


def _close(found, expected):
    losses, norms, applied = found
    assert losses == pytest.approx(expected[0], rel=1e-5)
    assert applied == expected[2]
    for found_norms, b in zip(norms, expected[1], strict=True):
        a = dict(found_norms)
        assert a.pop("deepspeed", a["total"]) == pytest.approx(a["total"], rel=1e-5)
        assert a == pytest.approx(b, rel=1e-5)
        squares = sum(v**2 for k, v in a.items() if k != "total")
        assert squares**0.5 == pytest.approx(a["total"], rel=1e-5)


@pytest.mark.smoke
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_equal_one(results, strategy):
    """Unequal label counts per rank and step; losses, norms of every part, clipping."""
    for phase in ("first", "second"):
        _close(results[strategy][phase], results["one"][phase])
        reported = ["deepspeed" in norms for norms in results[strategy][phase][1]]
        assert reported == [strategy.startswith("zero")] * 3


@pytest.mark.smoke
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_resume_is_bitwise(results, strategy):
    assert results[strategy]["resumed"] == results[strategy]["second"]


@pytest.mark.smoke
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_nan_on_one_rank_skips_the_step_everywhere(results, strategy):
    losses, _, applied = results[strategy]["nan"]
    assert applied == [False, True]
    assert losses[1] == pytest.approx(results["one"]["nan"][0][1], rel=1e-5)


@pytest.mark.smoke
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_infinities_on_either_rank_change_no_weight_and_no_moment(results, strategy):
    _, norms, applied, unchanged, after = results[strategy]["inf"]
    assert applied == [False, False]
    assert not any(math.isfinite(step["total"]) for step in norms)
    assert unchanged == [True, True]
    _close(after, results["one"]["inf"][-1])


@pytest.mark.smoke
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_bad_output_of_one_rank_is_named_by_both(results, strategy):
    """Also where a forward gathers weights: the other rank must not wait for one that has found its answer."""
    first, second = results[strategy]["diagnosis"]
    assert first == second
    assert "5 in a row. First bad output: " in first
    assert "visual.0" in first
    assert "on rank 1, samples ['fake#1']. All parameters are finite." in first


@pytest.mark.smoke
@pytest.mark.parametrize("origin", ["ddp-1", "ddp-2", "zero2-2", "zero3-2", "fsdp2-2"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_checkpoints_move_between_strategies_and_world_sizes(results, origin, strategy):
    """Weights and moments without a change of a bit, so what is exported from them is the same too."""
    written = SliceReader(results["folder"] / origin / "step-00000003")
    again = SliceReader(results["folder"] / f"{origin}-as-{strategy}" / "step-00000003")
    assert again.index.shapes == written.index.shapes
    for name, shape in written.index.shapes.items():
        for kind in KINDS:
            own = (kind, name, 0, math.prod(shape))
            assert torch.equal(again.read(*own), written.read(*own)), own
    _close(results[f"{origin}->{strategy}"]["resumed"], results["one"]["second"])


@pytest.mark.smoke
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_memory_of_weights_gradients_and_moments_is_what_the_estimate_says(results, strategy):
    """Between two micro-steps, in bytes per parameter; a reduction bucket may or may not exist at that moment."""
    measured, planned = results["memory"][strategy]
    bucket = 4 * 500_000 / (8 * 512**2) if strategy.startswith("zero") else 0.0
    assert planned - bucket - 0.02 * planned <= measured <= planned + 0.04 * planned


@pytest.mark.smoke
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_clipping_bound_reaches_every_engine(results, strategy):
    """Adam's step hides a missing clip; its first moment does not."""
    assert max(norms["total"] for norms in results["one"]["first"][1]) > 2 * 0.5
    expected = SliceReader(results["folder"] / "ddp-1" / "step-00000003")
    found = SliceReader(results["folder"] / f"{strategy}-2" / "step-00000003")
    for name, shape in expected.index.shapes.items():
        size = math.prod(shape)
        torch.testing.assert_close(
            found.read("exp_avg", name, 0, size), expected.read("exp_avg", name, 0, size), rtol=1e-4, atol=1e-7,
        )  # fmt: skip


@pytest.mark.smoke
@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_native_deepspeed_files_are_read_without_running_them(results, strategy):
    weights = read_weights(results["folder"] / f"native-{strategy}")
    ours = SliceReader(results["folder"] / f"{strategy}-2" / "step-00000006")
    assert set(weights) == set(ours.index.shapes)
    assert all(torch.equal(weights[name], ours.tensor(name)) for name in weights)


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero1_cpu", "zero2_cpu", "zero3_cpu"])
def test_shipped_json_is_accepted_and_completed(name):
    file = json.loads((ROOT / "configs" / "deepspeed" / f"{name}.json").read_text())
    settings = deepspeed_settings(file, bf16=True, max_grad_norm=1.0, reduce_dtype="fp32")
    assert (
        settings["gradient_accumulation_steps"] == settings["train_micro_batch_size_per_gpu"] == 1
    )
    assert settings["bf16"] == {"enabled": True, "check_grad_overflow": True}
    assert settings["communication_data_type"] == "fp32"
    assert "auto" not in json.dumps(settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": {}}, "optimizer: remove it"),
        ({"scheduler": {}}, "decides with schedule"),
        ({"gradient_clipping": 1.0}, "decides with optim.max_grad_norm"),
        ({"train_batch_size": 8}, "decides with step.global_batch_size"),
        ({"fp16": {"enabled": True}}, "fp16: refused"),
        ({"bf16": {"enabled": True}}, "decides with precision"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {}}}, "offload is refused"),
        ({"zero_optimization": {"stage": 0}}, "stage=0 is not one of"),
        (
            {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}},
            "another optimizer class",
        ),
    ],
)
def test_json_that_decides_too_much_is_refused(change, message):
    file = json.loads((ROOT / "configs" / "deepspeed" / "zero2.json").read_text())
    with pytest.raises(ConfigError, match=message):
        deepspeed_settings({**file, **change}, bf16=True, max_grad_norm=1.0, reduce_dtype="bf16")
