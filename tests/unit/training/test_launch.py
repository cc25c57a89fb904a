"""What an accelerate file may not decide; answered before any weight is read."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from spatialvlm.errors import ConfigError, LaunchError
from spatialvlm.training.distributed import Processes
from spatialvlm.training.launch import launch_plan
from spatialvlm.training.run import open_run
from spatialvlm.training.state import code_digest

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")


def recipe(precision="fp32", strategy="auto", compile=False):
    return SimpleNamespace(
        precision=precision,
        model=SimpleNamespace(compile=compile),
        parallel=SimpleNamespace(strategy=strategy, reduce_dtype="bf16"),
        optim=SimpleNamespace(max_grad_norm=0.7),
    )


@pytest.fixture
def launcher(monkeypatch):
    """Function (environment of the launcher)."""
    for name in ("USE_FSDP", "USE_DEEPSPEED", "DEEPSPEED_CONFIG_FILE", "MIXED_PRECISION", "GRADIENT_ACCUMULATION_STEPS"):  # fmt: skip
        monkeypatch.delenv(f"ACCELERATE_{name}", raising=False)
    monkeypatch.delenv("SPATIALVLM_TEST", raising=False)

    def set_environment(**values):
        for name, value in values.items():
            monkeypatch.setenv(f"ACCELERATE_{name}", str(value))

    return set_environment


def test_the_launchers_file_and_the_recipe_make_the_strategy(launcher):
    assert launch_plan(recipe(), CPU) == ("ddp", None)
    assert launch_plan(recipe(strategy="fsdp2"), CPU) == ("fsdp2", None)
    launcher(
        USE_DEEPSPEED="true",
        DEEPSPEED_CONFIG_FILE=ROOT / "configs/deepspeed/zero3.json",
        MIXED_PRECISION="no",
        GRADIENT_ACCUMULATION_STEPS="1",
    )
    strategy, settings = launch_plan(recipe(), CPU)
    assert (strategy, settings["gradient_clipping"]) == ("zero3", 0.7)
    with pytest.raises(LaunchError, match="Set it to auto"):
        launch_plan(recipe(strategy="fsdp2"), CPU)
    with pytest.raises(ConfigError, match="refused with ZeRO-3"):
        launch_plan(recipe(compile=True), CPU)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"USE_FSDP": "true"}, LaunchError, "parallel.strategy=fsdp2"),
        ({"GRADIENT_ACCUMULATION_STEPS": "4"}, ConfigError, "decides with step.global_batch_size"),
        ({"MIXED_PRECISION": "fp16"}, ConfigError, "mixed_precision=fp16 .* precision: fp32"),
        ({"USE_DEEPSPEED": "true"}, ConfigError, "without deepspeed_config_file"),
        (
            {"USE_DEEPSPEED": "true", "DEEPSPEED_CONFIG_FILE": "gone.json"},
            ConfigError,
            "'gone.json' of the accelerate file cannot be read",
        ),
    ],
)
def test_what_a_launcher_may_not_decide(launcher, values, error, message):
    launcher(**values)
    with pytest.raises(error, match=message):
        launch_plan(recipe(), CPU)


def test_a_wrong_json_is_told_before_the_run_folder_and_the_weights(
    launcher, tmp_path, monkeypatch
):
    file = json.loads((ROOT / "configs/deepspeed/zero2.json").read_text())
    (tmp_path / "mine.json").write_text(json.dumps(file | {"optimizer": {"type": "Adam"}}))
    launcher(USE_DEEPSPEED="true", DEEPSPEED_CONFIG_FILE=tmp_path / "mine.json")
    monkeypatch.setattr("spatialvlm.training.run.dump_yaml", lambda config: "")
    with pytest.raises(ConfigError, match="optimizer: remove it; the recipe decides with optim"):
        open_run(recipe(), None, Processes(0, 1, CPU))


def test_ranks_with_other_code_or_another_json_are_listed(launcher, monkeypatch):
    class Two(Processes):
        def gather(self, value):
            other = {**value, "code": "0" * 12, "DeepSpeed file": "1" * 12}
            return [value, other]

    monkeypatch.setattr("spatialvlm.training.run.dump_yaml", lambda config: "")
    with pytest.raises(LaunchError, match=rf"code: rank 0={code_digest()}, rank 1=0+\n  DeepSpeed"):
        open_run(recipe(), None, Two(0, 2, CPU))


def test_bf16_on_a_cpu_is_for_tests_only(launcher, monkeypatch):
    with pytest.raises(ConfigError, match="set precision=fp32"):
        launch_plan(recipe(precision="bf16"), CPU)
    monkeypatch.setenv("SPATIALVLM_TEST", "1")
    assert launch_plan(recipe(precision="bf16"), CPU)[0] == "ddp"
    launcher(MIXED_PRECISION="bf16")  # the same in both places
    assert launch_plan(recipe(precision="bf16"), torch.device("cuda"))[0] == "ddp"


def test_shipped_launcher_files_name_the_json_of_their_strategy():
    for path in sorted((ROOT / "configs" / "accelerate").glob("*.yaml")):
        file = yaml.safe_load(path.read_text())
        assert {"mixed_precision", "gradient_accumulation_steps"}.isdisjoint(file), path
        zero = next((part for part in path.stem.split("_") if part.startswith("zero")), None)
        assert ("deepspeed_config" in file) == (zero is not None), path
        if zero is not None:
            json_file = ROOT / file["deepspeed_config"]["deepspeed_config_file"]
            assert f"zero{json.loads(json_file.read_text())['zero_optimization']['stage']}" == zero
