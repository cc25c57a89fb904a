import pytest
import torch

from spatialvlm.config.training import LoraConfig
from spatialvlm.errors import ConfigError
from spatialvlm.models.lora import adapter_tensors, add_adapters, merge_state, save_adapters
from spatialvlm.models.param_groups import split_parts
from spatialvlm.models.spatial_vlm import SpatialVLM
from spatialvlm.testing.rig import FAMILIES


def shake(model):
    """Adapters start as the identity; move them so that merging has something to merge."""
    generator = torch.Generator().manual_seed(0)
    for parameter in adapter_tensors(model).values():
        with torch.no_grad():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_trains_beside_the_fusion_and_merges_into_a_plain_directory(rig, family, dora, tmp_path):
    lora = LoraConfig(parts=("language_model", "projector"), r=4, alpha=8.0, dora=dora)
    bench = rig(family, {}, lora=lora)
    parts = split_parts(bench.model)
    assert sum(name.count("lora_A") for name, _ in parts["lora"]) == sum(
        name.count("base_layer.weight") for members in parts.values() for name, _ in members
    )
    for part, members in parts.items():
        for _, parameter in members:
            parameter.requires_grad_(part in ("lora", "geometry_fusion"))
    bench.model(bench.pack()).loss_sum.backward()
    assert {part for part, members in parts.items() for _, p in members if p.grad is not None} == {
        "lora",
        "geometry_fusion",
    }
    shake(bench.model)
    expected = bench.model(bench.pack()).loss_sum
    folder = bench.model.save_pretrained(tmp_path / "merged")
    plain = SpatialVLM.from_pretrained(folder)
    torch.testing.assert_close(plain(bench.pack()).loss_sum, expected, rtol=1e-5, atol=1e-4)
    assert not any("lora" in name for name in plain.state_dict())


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_merging_equals_pefts(rig, dora):
    bench = rig("qwen3vl", lora=LoraConfig(r=4, alpha=8.0, dora=dora))
    shake(bench.model)
    ours = merge_state(bench.model, bench.model.state_dict())
    for name, module in bench.model.named_modules():
        if hasattr(module, "adapter_layer_names"):
            module.merge()
            torch.testing.assert_close(
                ours[f"{name}.weight"], module.base_layer.weight, atol=1e-6, rtol=1e-5
            )


def test_only_the_asked_parts_carry_adapters(rig):
    bench = rig("qwen3vl", lora=LoraConfig(parts=("vision_encoder",), r=2, alpha=4.0))
    names = {name.split(".lora_")[0] for name in adapter_tensors(bench.model)}
    assert (
        len(names) == 4 * 3
    )  # qkv, proj, fc1, fc2 of three blocks; neither mergers nor patch embedding
    assert all(".visual.blocks." in name for name in names)


def test_adapters_alone_load_with_peft(rig, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    bench = rig("qwen3vl", lora=LoraConfig(r=4, alpha=8.0, dora=True))
    shake(bench.model)
    folder = save_adapters(bench.model, tmp_path / "adapters")
    assert (folder / "adapter_model.safetensors").stat().st_size < 0.2 * sum(
        file.stat().st_size for file in bench.folder.glob("*.safetensors")
    )
    peft_model = PeftModel.from_pretrained(
        AutoModelForImageTextToText.from_pretrained(bench.folder), folder
    )
    found = adapter_tensors(peft_model.base_model.model)
    expected = adapter_tensors(bench.model.backbone)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_bad_requests_are_named(rig, tmp_path):
    bench = rig("qwen3vl")
    with pytest.raises(ConfigError, match="'geometry_fusion' cannot carry adapters"):
        add_adapters(bench.model, ["geometry_fusion"], rank=2, alpha=4)
    with pytest.raises(ConfigError, match="no adapters to save"):
        save_adapters(bench.model, tmp_path)


def test_released_adapter_sizes():
    from pathlib import Path

    from spatialvlm.models.build import build_meta_model

    backbones = Path(__file__).resolve().parents[3] / "configs" / "backbones"
    lora = LoraConfig(r=64, alpha=128.0)
    for name, count in (("qwen2_5vl_7b", 161_480_704), ("qwen3vl_8b", 174_587_904)):
        model = build_meta_model(backbones / f"{name}.json", lora=lora)
        assert sum(parameter.numel() for parameter in adapter_tensors(model).values()) == count
