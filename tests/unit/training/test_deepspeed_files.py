"""Checkpoints of other trainers: weights are taken over bit for bit, programs inside them never run."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from safetensors.torch import load_file

from spatialvlm.errors import CheckpointError
from spatialvlm.training.deepspeed_files import read_weights

TOOL = Path(__file__).resolve().parents[3] / "tools" / "import_deepspeed.py"


class RunsCode:
    """What a malicious file looks like: unpickling it writes a file."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def write(folder, trained, frozen=None, *, world=2):
    """A ZeRO-2 checkpoint of ``world`` ranks in DeepSpeed's layout."""
    step = folder / "global_step7"
    step.mkdir(parents=True)
    (folder / "latest").write_text("global_step7")
    module = {name: value.bfloat16() for name, value in {**trained, **(frozen or {})}.items()}
    shapes = {name: value.shape for name, value in trained.items()}
    head = {"module": module, "param_shapes": [shapes], "dp_world_size": world}
    torch.save(head, step / "mp_rank_00_model_states.pt")
    flat = torch.cat([value.flatten() for value in trained.values()])
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % world))
    own = len(flat) // world
    for rank in range(world):
        places, at = {}, 0
        for name, value in trained.items():
            start, stop = max(at, rank * own), min(at + value.numel(), (rank + 1) * own)
            if start < stop:
                places[name] = fragment_address(numel=stop - start, start=start - rank * own)
            at += value.numel()
        state = {
            "zero_stage": ZeroStageEnum.gradients,
            "loss_scaler": LossScaler(1.0),
            "single_partition_of_fp32_groups": [flat[rank * own : (rank + 1) * own].clone()],
            "param_slice_mappings": [places],
        }
        path = step / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": state}, path)
    return step


def test_masters_replace_the_rounded_copies_and_frozen_weights_stay(tmp_path):
    trained = {"a.weight": torch.randn(3, 5), "b.bias": torch.randn(4)}
    write(tmp_path, trained, {"frozen": torch.ones(2)}, world=3)
    found = read_weights(tmp_path)
    assert all(torch.equal(found[name], value) for name, value in trained.items())
    assert found["frozen"].dtype == torch.bfloat16


def test_a_file_that_would_run_code_is_refused_by_name(tmp_path):
    step = write(tmp_path / "run", {"a": torch.randn(4)})
    proof = tmp_path / "executed"
    torch.save({"module": {}, "x": RunsCode(proof)}, step / "mp_rank_00_model_states.pt")
    with pytest.raises(
        CheckpointError, match=r"would import .*pathlib\.Path.*nothing of it executed"
    ):
        read_weights(tmp_path / "run")
    assert not proof.exists()


def test_links_lost_ranks_and_other_folders_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="holds no"):
        read_weights(tmp_path)
    step = write(tmp_path / "run", {"a": torch.randn(4)})
    second = step / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    elsewhere = tmp_path / "elsewhere.pt"
    second.rename(elsewhere)
    with pytest.raises(CheckpointError, match="of 1 ranks, it was written by 2"):
        read_weights(tmp_path / "run")
    second.symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match="symbolic link"):
        read_weights(tmp_path / "run")
    (tmp_path / "run" / "latest").write_text("../../elsewhere")
    with pytest.raises(CheckpointError, match="no folder beside it"):
        read_weights(tmp_path / "run")


def test_the_tool_writes_a_model_directory(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    base = tiny_checkpoint("qwen3vl")
    weights = {
        name: value.float() + 0.25 for name, value in load_file(base / "model.safetensors").items()
    }
    write(tmp_path / "run", weights)
    target = tmp_path / "imported"
    argv = [str(TOOL), str(tmp_path / "run"), str(target), "--model", str(base), "--dtype", "fp32"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(TOOL), run_name="__main__")
    assert stop.value.code == 0
    assert "checkpoints are code" in capsys.readouterr().err
    found = load_file(target / "model.safetensors")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in found)
    assert (target / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("file", "field", "inside"),
    [
        ("bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt", "optimizer_state_dict", None),
        (
            "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt",
            "param_slice_mappings",
            "optimizer_state_dict",
        ),
        ("mp_rank_00_model_states.pt", "param_shapes", None),
    ],
)
def test_a_file_without_a_needed_field_is_named(tmp_path, file, field, inside):
    path = write(tmp_path, {"a": torch.randn(4)}) / file
    content = torch.load(path, weights_only=False)
    del (content[inside] if inside else content)[field]
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=rf"{file} holds no {field}"):
        read_weights(tmp_path)


@pytest.mark.parametrize(
    ("target", "model", "message"),
    [
        ("there", "base", "exists; choose a new directory"),
        ("no/such/place", "base", "is no directory; create it first"),
        ("new", "empty", "holds no config.json"),
    ],
)
def test_the_tool_looks_at_its_arguments_before_it_reads(
    tmp_path, monkeypatch, capsys, target, model, message
):
    for name in ("there", "base", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    argv = ["no_checkpoint", target, "--model", model]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(TOOL), *argv])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(TOOL), run_name="__main__")
    assert stop.value.code != 0
    assert message in capsys.readouterr().err
