import hashlib
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from spatialvlm.errors import CheckpointError
from spatialvlm.testing import checkpoints, make_checkpoint, make_vggt
from spatialvlm.testing.checkpoints import PRETRAINED, ship_pretrained
from spatialvlm.testing.tokenizer import SPECIAL_TOKENS, token_ids

ROOT = Path(__file__).resolve().parents[3]
FAMILIES = ["qwen2_5vl", "qwen3vl", "internvl3"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: make_checkpoint(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_loads_with_the_auto_classes_and_misses_nothing(folders, family):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, info = AutoModelForImageTextToText.from_pretrained(
        folders[family], output_loading_info=True
    )
    assert not any(info.values()), info
    processor = AutoProcessor.from_pretrained(folders[family])
    assert processor.tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS[family])) == list(
        token_ids(family).values()
    )
    rows = model.get_input_embeddings().weight.shape[0]
    spare = rows - len(processor.tokenizer)
    assert spare < 0 if family == "internvl3" else spare > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_tokenizer_round_trip_is_exact(folders, family):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folders[family])
    text = "How far is the red chair?\n 12.5 m – naïve 椅子 🙂  two  spaces"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert tokenizer("12").input_ids == tokenizer("1").input_ids + tokenizer("2").input_ids
    assert tokenizer("<|im_end|>").input_ids == [token_ids(family)["<|im_end|>"]]


def test_system_prompt_only_in_qwen2_5(folders):
    from transformers import AutoTokenizer

    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    turns = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    expected = {"qwen2_5vl": system + turns, "qwen3vl": turns, "internvl3": turns}
    for family, folder in folders.items():
        assert (
            AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, tokenize=False)
            == expected[family]
        )


def test_same_seed_same_bytes(folders, tmp_path):
    def digest(folder):
        return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()

    state = torch.get_rng_state()
    again = make_checkpoint("qwen3vl", tmp_path / "again")
    assert torch.equal(state, torch.get_rng_state())
    assert digest(again) == digest(folders["qwen3vl"])
    assert digest(make_checkpoint("qwen3vl", tmp_path / "other", seed=1)) != digest(again)


def test_vggt_file_has_the_released_layout(tmp_path):
    with safe_open(make_vggt(tmp_path / "v.safetensors"), "pt") as file:
        keys = set(file.keys())
        assert file.get_tensor("aggregator.frame_blocks.0.attn.q_norm.weight").shape == (16,)
        assert file.get_tensor("aggregator.patch_embed.pos_embed").shape == (1, 26, 32)
    aggregator = [key for key in keys if key.startswith("aggregator.")]
    assert len(aggregator) == 10 + 14 * 1 + 18 * 2 * 2
    assert keys - set(aggregator) == {"camera_head.token_norm.weight"}


def test_config_file_is_the_hub_style_one(folders):
    config = json.loads((folders["qwen3vl"] / "config.json").read_text())
    assert config["text_config"]["rope_scaling"]["mrope_interleaved"] is True
    assert config["architectures"] == ["Qwen3VLForConditionalGeneration"]


def test_command_line(tmp_path, monkeypatch, capsys):
    arguments = ["make_tiny.py", str(tmp_path), "--size", "tiny", "--family", "internvl3"]
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(str(ROOT / "tools" / "make_tiny.py"))["main"]()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "tiny_internvl3",
        "tiny_vggt.safetensors",
    ]
    assert "tiny_internvl3  1.2 MB" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*arguments, "--pretrained"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "tools" / "make_tiny.py"))["main"]()
    assert "--pretrained has weights for qwen3vl only" in capsys.readouterr().err


def test_demo_sizes_stay_small(tmp_path):
    folder = make_checkpoint("qwen3vl", tmp_path, size="demo")
    assert 10e6 < (folder / "model.safetensors").stat().st_size < 20e6


def test_the_shipped_weights_are_small_and_load(tmp_path):
    assert PRETRAINED.stat().st_size <= 8_000_000
    folder = make_checkpoint("qwen3vl", tmp_path / "a", size="demo", pretrained=True)
    shipped, written = load_file(PRETRAINED), load_file(folder / "model.safetensors")
    assert set(shipped) == set(written)
    assert all((written[name] == shipped[name].float()).all() for name in shipped)
    assert ship_pretrained(folder, tmp_path / "again").read_bytes() == PRETRAINED.read_bytes()


def test_shipped_weights_fit_one_model_and_one_vocabulary(tmp_path, monkeypatch):
    for family, size in (("qwen2_5vl", "demo"), ("qwen3vl", "tiny")):
        with pytest.raises(CheckpointError, match="shipped for qwen3vl of demo size, not for"):
            make_checkpoint(family, tmp_path, size=size, pretrained=True)
    monkeypatch.setattr(checkpoints, "tokenizer_digest", lambda: "other")
    with pytest.raises(CheckpointError, match="trained with another vocabulary"):
        make_checkpoint("qwen3vl", tmp_path, size="demo", pretrained=True)
