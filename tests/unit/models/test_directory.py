import json
import shutil

import pytest
import torch

from spatialvlm.config.geometry import GeometryConfig
from spatialvlm.errors import CheckpointError, ConfigError, FingerprintError
from spatialvlm.models.backbones import family_of
from spatialvlm.models.build import build_layout, build_model
from spatialvlm.models.directory import SPATIAL_JSON, SPATIAL_WEIGHTS, placeholder_id
from spatialvlm.models.spatial_vlm import SpatialVLM
from spatialvlm.testing import make_vggt
from spatialvlm.testing.rig import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_2d_directory_is_a_plain_checkpoint(rig, family, tmp_path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    bench = rig(family)
    folder = bench.model.save_pretrained(tmp_path / "out")
    names = {file.name for file in folder.iterdir()}
    assert {file.name for file in bench.folder.iterdir()} == names
    model, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, bench.model.backbone.state_dict()[name]), name
    AutoProcessor.from_pretrained(folder)
    assert "tree_sdpa" not in (folder / "config.json").read_text()


@pytest.mark.parametrize("family", FAMILIES)
def test_3d_round_trip_is_bitwise_and_also_a_2d_checkpoint(rig, family, tmp_path):
    from transformers import AutoModelForImageTextToText

    bench = rig(family, {"camera_token": True})
    bench.randomise_fusion()
    folder = bench.model.save_pretrained(tmp_path / "out")
    again = SpatialVLM.from_pretrained(folder)
    for name, tensor in bench.model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    batch = bench.pack()
    assert torch.equal(again(batch).loss_sum, bench.model(batch).loss_sum)
    saved = json.loads((folder / SPATIAL_JSON).read_text())
    assert saved["spatial_id"] == bench.layout.spatial_id == placeholder_id(folder)
    assert saved["encoder"]["fingerprint"] == bench.model.geometry.encoder.fingerprint
    assert (
        sum(file.stat().st_size for file in folder.glob("*.safetensors")) < 3e6
    )  # no encoder inside
    _, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert SpatialVLM.from_pretrained(folder, geometry=None).fusion is None


def test_stage_two_starts_from_stage_one(rig, tiny_vggt, tmp_path):
    first = rig("qwen3vl")
    with torch.no_grad():
        first.model.adapter.projector.linear_fc1.weight.mul_(2.0)
    folder = first.model.save_pretrained(tmp_path / "stage1")
    section = GeometryConfig(source=str(tiny_vggt), layers=(1,), precision="fp32")
    second = build_model(folder, section)
    for name, tensor in first.model.backbone.state_dict().items():
        assert torch.equal(tensor, second.backbone.state_dict()[name])
    projector = first.model.adapter.projector.state_dict()
    for name, tensor in second.fusion.projector_3d.state_dict().items():
        assert torch.equal(tensor, projector[name])


def test_a_layer_named_twice_is_refused(rig, tiny_vggt):
    folder = rig("qwen3vl").folder
    layers = SpatialVLM.from_pretrained(
        folder, geometry=_section(tiny_vggt, (0,))
    ).geometry.encoder.num_layers
    with pytest.raises(
        ConfigError, match=rf"{layers - 1} and -1 are the same of the {layers} layers of vggt"
    ):
        SpatialVLM.from_pretrained(folder, geometry=_section(tiny_vggt, (layers - 1, -1)))
    with pytest.raises(ConfigError, match="name it once"):
        build_layout(folder, GeometryConfig(source=str(tiny_vggt), layers=(0, 0)))


def _section(source, layers):
    return GeometryConfig(source=str(source), layers=layers, precision="fp32").model_dump(
        mode="json"
    )


def test_gathered_weights_and_dtype_can_be_given(rig, tmp_path):
    bench = rig("qwen3vl", {})
    state = {name: torch.zeros_like(tensor) for name, tensor in bench.model.state_dict().items()}
    folder = bench.model.save_pretrained(tmp_path / "out", state_dict=state, dtype=torch.bfloat16)
    again = SpatialVLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert all((p == 0).all() for p in again.parameters())


def test_another_encoder_is_noticed(rig, tiny_vggt, tmp_path):
    bench = rig("qwen3vl", {})
    folder = bench.model.save_pretrained(tmp_path / "out")
    other = make_vggt(tmp_path / "other.safetensors", seed=1)
    section = {"source": str(other), "layers": (1,), "precision": "fp32"}
    with pytest.raises(FingerprintError, match="fingerprint"):
        build_model(folder, GeometryConfig(**section))
    build_model(folder, GeometryConfig(**section, allow_encoder_mismatch=True))
    with pytest.raises(ConfigError, match=r"insertion=sequential \(saved: interleaved\)"):
        build_model(
            folder, GeometryConfig(**section | {"source": str(tiny_vggt)}, insertion="sequential")
        )


def test_in_place_needs_no_placeholder(rig, tmp_path):
    bench = rig("qwen3vl", {"insertion": "in_place"})
    folder = bench.model.save_pretrained(tmp_path / "out")
    assert json.loads((folder / SPATIAL_JSON).read_text())["spatial_id"] is None
    batch = bench.pack()
    assert torch.equal(
        SpatialVLM.from_pretrained(folder)(batch).loss_sum, bench.model(batch).loss_sum
    )


def test_broken_directories_are_explained(checkpoints, tmp_path):
    with pytest.raises(CheckpointError, match="no model directory"):
        SpatialVLM.from_pretrained(tmp_path / "missing")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        SpatialVLM.from_pretrained(empty)

    broken = tmp_path / "broken"
    shutil.copytree(checkpoints["qwen3vl"], broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        SpatialVLM.from_pretrained(broken)

    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"model_type": "llava"}))
    with pytest.raises(ConfigError, match=r"llava.*internvl, qwen2_5_vl, qwen3_vl, qwen3_vl_moe"):
        SpatialVLM.from_pretrained(broken)
    (broken / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        family_of(broken)


def test_missing_weights_are_an_error(checkpoints, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "partial"
    shutil.copytree(checkpoints["qwen3vl"], folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(key for key in tensors if "layers.0.mlp.up_proj" in key)
    tensors.pop(name)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 missing keys: .*up_proj"):
        SpatialVLM.from_pretrained(folder)


def test_lost_or_newer_spatial_files_are_errors(rig, tmp_path):
    bench = rig("qwen3vl", {})
    folder = bench.model.save_pretrained(tmp_path / "out")
    (folder / SPATIAL_WEIGHTS).rename(folder / "elsewhere")
    with pytest.raises(CheckpointError, match=r"no spatial\.safetensors"):
        SpatialVLM.from_pretrained(folder)
    (folder / "elsewhere").rename(folder / SPATIAL_WEIGHTS)
    saved = json.loads((folder / SPATIAL_JSON).read_text())
    (folder / SPATIAL_JSON).write_text(json.dumps(saved | {"format": 2}))
    with pytest.raises(CheckpointError, match="format 2"):
        SpatialVLM.from_pretrained(folder)


def test_placeholder_lies_behind_the_tokenizer(checkpoints):
    from transformers import AutoTokenizer

    for family, folder in checkpoints.items():
        size = len(AutoTokenizer.from_pretrained(folder))
        layout = build_layout(folder, GeometryConfig(source="unused"))
        assert layout.spatial_id == size
        assert build_layout(folder).spatial_id is None
        assert layout.family == family
