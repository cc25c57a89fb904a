"""Where the initial weights of a run come from, and that they stay the same."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

from spatialvlm.config.geometry import GeometryConfig
from spatialvlm.errors import CheckpointError, ConfigError
from spatialvlm.training import base as base_module
from spatialvlm.training.base import (
    backbone_config,
    check_base,
    folder_manifest,
    other_size,
    same_base,
)


def settings(init_from, geometry=None):
    model = SimpleNamespace(
        init_from=init_from, revision=None, backbone="qwen2_5vl_3b", allow_unfinished=False
    )
    return SimpleNamespace(model=model, geometry=geometry)


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    kind = {"model_type": backbone_config("qwen2_5vl_3b")["model_type"]}
    (folder / "config.json").write_text(json.dumps(kind))
    save_file({"a": np.zeros(4)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("hub", [False, True])
def test_changed_weights_are_refused_from_a_folder_and_from_the_hub(
    base, hub, tmp_path, monkeypatch
):
    monkeypatch.setattr(base_module, "_download", lambda *_, **__: base)
    config = settings("owner/name" if hub else str(base))
    path, lineage = check_base(config)
    assert path == base
    (tmp_path / "manifest.json").write_text(json.dumps({"lineage": lineage}))
    same_base(config, check_base(config)[1], tmp_path)
    save_file({"a": np.ones(4)}, base / "model.safetensors")
    with pytest.raises(CheckpointError, match="was trained from other weights"):
        same_base(config, check_base(config)[1], tmp_path)


def test_an_older_checkpoint_from_the_hub_without_a_fingerprint_passes(base, tmp_path):
    (tmp_path / "manifest.json").write_text('{"lineage": {"hub": "owner/name"}}')
    config = settings(str(base))
    same_base(config, check_base(config)[1], tmp_path)


def test_stage_2_counts_positions_like_stage_1_and_remembers_where_it_came_from(base):
    run_dir = base.parent
    (run_dir / "run.json").write_text(json.dumps({"state": "finished", "stage": 1, "step": 7}))
    (run_dir / "base.manifest.json").write_text(json.dumps(folder_manifest(base)))
    (run_dir / "config.resolved.yaml").write_text("stage: 1\ngeometry: null\n")
    _, lineage = check_base(settings(str(base), GeometryConfig()))
    assert (lineage["stage"], lineage["step"]) == (1, 7)
    assert len(lineage["manifest_sha256"]) == len(lineage["config_sha256"]) == 64
    other = GeometryConfig(positions={"text_after_vision": "stock"})
    with pytest.raises(ConfigError, match=r"text_after_vision=stock, .* was trained with original"):
        check_base(settings(str(base), other))
    (run_dir / "config.resolved.yaml").write_text(
        "geometry: {encoder: none, positions: {text_after_vision: stock, time: seconds}}\n"
    )
    assert check_base(settings(str(base), other))[1]["step"] == 7


@pytest.mark.parametrize("nested", [False, True])  # the hub's Qwen2.5-VL has a flat configuration
def test_another_size_of_the_family_is_told(base, nested):
    config = settings("x")
    real = backbone_config("qwen2_5vl_3b")["text_config"]
    for name, expected in (("qwen2_5vl_3b", False), ("qwen2_5vl_7b", True)):
        config.model.backbone = name
        (base / "config.json").write_text(json.dumps({"text_config": real} if nested else real))
        note = other_size(config, base)
        assert (note is not None) == expected
    assert "has 36 layers of width 2048, model.backbone=qwen2_5vl_7b 28 of 3584" in note
