import pytest

from spatialvlm.models.param_groups import freeze_modules, split_parts
from spatialvlm.testing.rig import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_in_exactly_one_part(rig, family):
    model = rig(family, {"camera_token": True}).model
    parts = split_parts(model)
    assert set(parts) == {
        "language_model",
        "vision_encoder",
        "projector",
        "geometry_fusion",
        "embeddings",
    }
    names = [name for members in parts.values() for name, _ in members]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    tied = family == "qwen3vl"
    assert [n for n, _ in parts["embeddings"]] == (
        ["backbone.model.language_model.embed_tokens.weight"]
        if tied
        else ["backbone.model.language_model.embed_tokens.weight", "backbone.lm_head.weight"]
    )
    assert all(name.startswith("fusion.") for name, _ in parts["geometry_fusion"])


def test_deepstack_mergers_are_projectors(rig):
    parts = split_parts(rig("qwen3vl").model)
    prefixes = {name.split(".")[3] for name, _ in parts["projector"]}
    assert prefixes == {"merger", "deepstack_merger_list"}


def test_frozen_parts_stay_in_eval_mode(rig):
    model = rig("qwen3vl").model
    for _, parameter in split_parts(model)["vision_encoder"]:
        parameter.requires_grad_(False)
    model.train()
    freeze_modules(model)
    assert not model.adapter.vision_blocks[0].training
    assert model.adapter.text_layers[0].training
