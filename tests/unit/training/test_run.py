"""Where the initial weights of a run come from, and that they stay the same."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

from spatialvlm.errors import CheckpointError
from spatialvlm.training import run
from spatialvlm.training.run import backbone_config, check_base, same_base


def settings(init_from):
    model = SimpleNamespace(
        init_from=init_from, revision=None, backbone="qwen2_5vl_3b", allow_unfinished=False
    )
    return SimpleNamespace(model=model)


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
    monkeypatch.setattr(run, "_download", lambda *_, **__: base)
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
