import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from spatialvlm.config.training import LoraConfig
from spatialvlm.errors import CheckpointError, ConfigError
from spatialvlm.models.export import export
from spatialvlm.models.lora import adapter_tensors, save_adapters
from spatialvlm.models.spatial_vlm import SpatialVLM
from spatialvlm.testing.rig import FAMILIES

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("family", FAMILIES)
def test_2d_export_of_a_3d_model_is_the_backbone(rig, family, tmp_path):
    from transformers import AutoModelForImageTextToText

    bench = rig(family, {})
    final = bench.model.save_pretrained(tmp_path / "final")
    folder = export(final, tmp_path / "out", variant="2d")
    assert not any("spatial" in file.name for file in folder.iterdir())
    model, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    original = AutoModelForImageTextToText.from_pretrained(bench.folder)
    assert model.config.to_dict() == original.config.to_dict() | {"_name_or_path": str(folder)}
    for name, tensor in original.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    card = (folder / "README.md").read_text()
    assert "AutoModelForImageTextToText" in card
    assert ("Positions:" in card) == (family != "internvl3")


def test_3d_export_refers_to_the_encoder(rig, tmp_path):
    bench = rig("qwen3vl", {})
    bench.randomise_fusion()
    final = bench.model.save_pretrained(tmp_path / "final")
    folder = export(final, tmp_path / "out", variant="3d")
    again = SpatialVLM.from_pretrained(folder)
    assert torch.equal(again(bench.pack()).loss_sum, bench.model(bench.pack()).loss_sum)
    card = (folder / "README.md").read_text()
    assert bench.model.geometry.encoder.fingerprint in card
    half = export(final, tmp_path / "half", variant="3d", dtype="bf16")
    state = SpatialVLM.from_pretrained(half, dtype=torch.bfloat16).state_dict()
    for name, tensor in bench.model.state_dict().items():
        assert torch.equal(tensor.bfloat16(), state[name])
    assert json.loads((half / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("geometry", [None, {}], ids=["2d", "3d"])
def test_adapters_merge_on_the_way(rig, geometry, tmp_path):
    bench = rig("qwen3vl", geometry, lora=LoraConfig(r=4, alpha=8.0))
    if geometry is not None:
        bench.randomise_fusion()
    for parameter in adapter_tensors(bench.model).values():
        torch.nn.init.normal_(parameter, std=0.05)
    adapters = save_adapters(bench.model, tmp_path / "adapters")
    variant = "2d" if geometry is None else "3d"
    folder = export(bench.folder, tmp_path / "out", variant=variant, adapters=adapters)
    found = SpatialVLM.from_pretrained(folder)(bench.pack()).loss_sum
    torch.testing.assert_close(found, bench.model(bench.pack()).loss_sum, rtol=1e-5, atol=1e-4)


def test_refusals(rig, checkpoints, tmp_path):
    with pytest.raises(ConfigError, match="no geometry branch"):
        export(checkpoints["qwen3vl"], tmp_path / "out", variant="3d")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(CheckpointError, match="not empty"):
        export(checkpoints["qwen3vl"], tmp_path / "full", variant="2d")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        export(checkpoints["qwen3vl"], tmp_path / "new", variant="2d", adapters=tmp_path)


def test_command_line(checkpoints, tmp_path, monkeypatch, capsys):
    arguments = ["export.py", str(checkpoints["qwen3vl"]), str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", arguments)
    script = runpy.run_path(str(ROOT / "tools" / "export.py"))
    assert script["main"]() == 0
    assert "model.safetensors" in capsys.readouterr().out
    assert script["main"]() == 2
    assert "is not empty" in capsys.readouterr().err


def test_pushing_creates_a_private_repository(checkpoints, tmp_path, monkeypatch, capsys):
    calls = []

    class Api:
        def create_repo(self, repo, *, private, exist_ok):
            calls.append(("create", repo, private))
            return f"hub/{repo}"

        def upload_folder(self, *, folder_path, repo_id):
            calls.append(("upload", folder_path, repo_id))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    out = str(tmp_path / "out")
    monkeypatch.setattr(
        sys, "argv", ["export.py", str(checkpoints["qwen3vl"]), out, "--push", "me/model"]
    )
    assert runpy.run_path(str(ROOT / "tools" / "export.py"))["main"]() == 0
    assert calls == [("create", "me/model", True), ("upload", out, "me/model")]
    assert capsys.readouterr().out.endswith("hub/me/model\n")
