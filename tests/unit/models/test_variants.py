"""Model variants that share an adapter: mixture of experts, InternVL3.5's decoder, tied and untied heads."""

import json
import shutil

import pytest
import torch

from spatialvlm.data.template import FAMILY_OF_MODEL_TYPE, ChatTemplate
from spatialvlm.models.backbones import MODEL_TYPES
from spatialvlm.models.build import cost_coefficients
from spatialvlm.models.isolation import probe_isolation
from spatialvlm.models.param_groups import split_parts
from spatialvlm.testing.rig import Rig, gradients, worst_relative


def rewrite(source, target, change):
    """A checkpoint directory like ``source`` with a changed config and fresh weights."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((target / "config.json").read_text())
    change(config)
    (target / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(target))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.1)
    model.save_pretrained(target)
    (target / "config.json").write_text(json.dumps(config))
    return target


def experts(config):
    config["model_type"] = "qwen3_vl_moe"
    config["architectures"] = ["Qwen3VLMoeForConditionalGeneration"]
    config["vision_config"]["model_type"] = "qwen3_vl_moe_vision"
    config["text_config"] |= {
        "model_type": "qwen3_vl_moe_text",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
        "mlp_only_layers": [],
    }


def internvl3_5(config):
    text = config["text_config"]
    text.pop("use_sliding_window")
    text |= {"model_type": "qwen3", "head_dim": 16, "attention_bias": False}


def untied(config):
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False


def tied(config):
    config["tie_word_embeddings"] = True


def hub_style(config):
    """Released Qwen2.5-VL checkpoints keep the language model's settings at the top level."""
    text = config.pop("text_config")
    text.pop("model_type")
    text["rope_scaling"] = {"type": "mrope", "mrope_section": text["rope_scaling"]["mrope_section"]}
    config |= text
    config["vision_config"]["in_chans"] = config["vision_config"].pop("in_channels")
    config["vision_config"].pop("model_type")


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("qwen3vl", experts),
        ("internvl3", internvl3_5),
        ("qwen3vl", untied),
        ("qwen2_5vl", tied),
        ("qwen2_5vl", hub_style),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_variant_loads_isolates_and_trains(checkpoints, tiny_vggt, tmp_path, family, change):
    folder = rewrite(checkpoints[family], tmp_path / "variant", change)
    assert ChatTemplate.from_checkpoint(folder).family == family
    bench = Rig.load(family, folder, vggt=tiny_vggt, geometry={})
    probe_isolation(bench.model)
    bench.randomise_fusion()
    packed = bench.model(bench.pack())
    packed.loss_sum.backward()
    found = gradients(bench.model)
    bench.model.zero_grad()
    for member in bench.separate():
        bench.model(bench.pack(member)).loss_sum.backward()
    assert worst_relative(found, gradients(bench.model)) < 2e-4
    parts = split_parts(bench.model)
    assert len(parts["embeddings"]) == (1 if change in (experts, tied) else 2)
    assert cost_coefficients(bench.model).per_token > 0
    again = Rig.load(
        family, bench.model.save_pretrained(tmp_path / "out"), vggt=tiny_vggt, geometry={}
    )
    assert torch.equal(again.model(again.pack()).loss_sum, bench.model(bench.pack()).loss_sum)


def test_data_and_models_know_the_same_model_types():
    assert {name: a.family for name, a in MODEL_TYPES.items()} == FAMILY_OF_MODEL_TYPE


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            r"full attention in every layer.*sliding_attention",
        ),
        ({"attention_dropout": 0.1}, r"attention_dropout=0\.1"),
        ({"output_router_logits": True}, "balance loss"),
    ],
)
def test_what_would_mix_samples_is_refused(checkpoints, tmp_path, setting, message):
    from spatialvlm.errors import ConfigError

    folder = rewrite(
        checkpoints["qwen2_5vl"],
        tmp_path / "variant",
        lambda config: config["text_config"].update(setting),
    )
    with pytest.raises(ConfigError, match=message):
        Rig.load("qwen2_5vl", folder)
