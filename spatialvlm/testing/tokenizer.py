"""A small byte-level BPE tokenizer with the special tokens of the real checkpoints.

The base vocabulary has 1,024 entries (256 bytes and 768 merges learned from ``assets/corpus.txt``, sentences
written for this package); the special tokens follow in the order in which Qwen2.5-VL, Qwen3-VL and InternVL3
number them, so that their relative positions and roles are the real ones.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).parent / "assets"
BASE_VOCAB = 1024

# The pre-tokenizer of the Qwen2 family: single digits, an optional leading space kept with the word.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

QWEN2_5_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>",
    "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>",
)  # fmt: skip
QWEN3_SPECIAL = (*QWEN2_5_SPECIAL, "<tool_response>", "</tool_response>", "<think>", "</think>")
# `<video>` comes last: in InternVL3-8B its id lies behind the last embedding row, as here.
INTERNVL_SPECIAL = (
    *QWEN2_5_SPECIAL, "<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>",
    "<video>",
)  # fmt: skip
# Added tokens that the real tokenizers do not skip when decoding.
NOT_SPECIAL = frozenset(
    ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
) | frozenset(
    token
    for token in QWEN2_5_SPECIAL
    if "fim_" in token or token in ("<|repo_name|>", "<|file_sep|>")
)

SPECIAL_TOKENS = {
    "qwen2_5vl": QWEN2_5_SPECIAL,
    "qwen3vl": QWEN3_SPECIAL,
    "internvl3": INTERNVL_SPECIAL,
}

_NAMED_TOKENS: dict[str, dict[str, str]] = {
    "qwen2_5vl": {},
    "qwen3vl": {},
    "internvl3": {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
}


def tokenizer_digest() -> str:
    """SHA-256 of the shipped vocabulary; weights trained with it carry it."""
    return hashlib.sha256((ASSETS / "bpe.json").read_bytes()).hexdigest()


def train_bpe(corpus: Path = ASSETS / "corpus.txt", path: Path = ASSETS / "bpe.json") -> None:
    """Learn the shipped base vocabulary again; needed only when the corpus changes.

    Args:
        corpus: One sentence per line.
        path: Written as ``{"vocab": {piece: id}, "merges": [[left, right], ...]}``.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BASE_VOCAB,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus.read_text(encoding="utf-8").splitlines(), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    assert len(model["vocab"]) == BASE_VOCAB, f"the corpus gave only {len(model['vocab'])} pieces"
    path.write_text(
        json.dumps({"vocab": model["vocab"], "merges": model["merges"]}, ensure_ascii=True),
        encoding="utf-8",
    )


def token_ids(family: str) -> dict[str, int]:
    """Ids of the special tokens of one family, by their text."""
    return {token: BASE_VOCAB + index for index, token in enumerate(SPECIAL_TOKENS[family])}


def write_tokenizer(family: str, folder: Path) -> None:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and ``chat_template.jinja``.

    Args:
        family: ``qwen2_5vl``, ``qwen3vl`` or ``internvl3``.
        folder: Existing directory.
    """
    base = json.loads((ASSETS / "bpe.json").read_text(encoding="utf-8"))
    added: list[dict[str, Any]] = [
        {
            "id": index, "content": token, "special": token not in NOT_SPECIAL,
            "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
        }
        for token, index in token_ids(family).items()
    ]  # fmt: skip
    split = {
        "type": "Split",
        "pattern": {"Regex": SPLIT_PATTERN},
        "behavior": "Isolated",
        "invert": False,
    }
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, **base,
        },
    }  # fmt: skip
    config: dict[str, Any] = {
        "add_prefix_space": False,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 32768,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
        "added_tokens_decoder": {
            str(entry["id"]): {key: value for key, value in entry.items() if key != "id"}
            for entry in added
        },
        **_NAMED_TOKENS[family],
    }
    if _NAMED_TOKENS[family]:
        config["extra_special_tokens"] = _NAMED_TOKENS[family]
    (folder / "tokenizer.json").write_text(
        json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    template = (ASSETS / f"{family}.jinja").read_text(encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
