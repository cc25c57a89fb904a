"""Complete Hugging Face model directories with small random weights.

A directory written here is loaded by the same ``from_pretrained`` code as a released checkpoint: real
``transformers`` classes, the real special tokens and chat template structure, processor files, safetensors.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from spatialvlm.errors import CheckpointError
from spatialvlm.testing.tokenizer import (
    BASE_VOCAB,
    SPECIAL_TOKENS,
    token_ids,
    tokenizer_digest,
    write_tokenizer,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

Family = Literal["qwen2_5vl", "qwen3vl", "internvl3"]
Size = Literal["tiny", "demo"]

PRETRAINED = Path(__file__).parent / "assets" / "pretrained_qwen3vl.safetensors"

CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

QWEN_ROWS = 64 * math.ceil((BASE_VOCAB + len(SPECIAL_TOKENS["qwen3vl"]) + 1) / 64)
"""Embedding rows of the Qwen families: some are spare, as in the released checkpoints."""
INTERNVL_ROWS = BASE_VOCAB + len(SPECIAL_TOKENS["internvl3"]) - 1
"""Embedding rows of InternVL3: none is spare, ``<video>`` has none."""


def model_config(family: Family, size: Size = "tiny") -> dict[str, Any]:
    """``config.json`` of a small model.

    ``tiny`` has 2-3 layers of width 64 and serves tests. ``demo`` (2-4 M parameters) is just large enough to learn
    spatial tasks on 128 px rooms from scratch: at 128 px Qwen3-VL sees an 8 x 8 patch grid and 16 tokens.
    """
    small = size == "tiny"
    ids = token_ids(family)
    text: dict[str, Any] = {
        "hidden_size": 64 if small else 192,
        "intermediate_size": 128 if small else 512,
        "num_hidden_layers": 3 if small else 4,
        "num_attention_heads": 4 if small else 6,
        "num_key_value_heads": 2 if small else 3,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "use_cache": True,
        "vocab_size": INTERNVL_ROWS if family == "internvl3" else QWEN_ROWS,
    }
    build = {"qwen2_5vl": _qwen2_5vl, "qwen3vl": _qwen3vl, "internvl3": _internvl3}
    return build[family](text, ids, small)


def _internvl3(text: dict[str, Any], ids: dict[str, int], small: bool) -> dict[str, Any]:
    side = 56 if small else 112
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "image_token_id": ids["<IMG_CONTEXT>"],
        "image_seq_length": (side // 28) ** 2,
        "downsample_ratio": 0.5,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        "text_config": {
            **text,
            "model_type": "qwen2",
            "rope_theta": 1000000.0,
            "use_sliding_window": False,
        },
        "vision_config": {
            "model_type": "internvl_vision",
            "hidden_size": 32 if small else 128,
            "intermediate_size": 64 if small else 256,
            "num_hidden_layers": 2 if small else 3,
            "num_attention_heads": 2 if small else 4,
            "attention_bias": True,
            "image_size": [side, side],
            "patch_size": [14, 14],
            "norm_type": "layer_norm",
            "layer_norm_eps": 1e-6,
            "use_qk_norm": False,
            "layer_scale_init_value": 0.1,
            "use_mean_pooling": True,
        },
    }


def _qwen(text: dict[str, Any], ids: dict[str, int], small: bool) -> tuple[dict[str, Any], ...]:
    """What both Qwen families have: top-level ids, vision tower."""
    common: dict[str, Any] = {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }
    vision: dict[str, Any] = {
        "hidden_size": 32 if small else 128,
        "intermediate_size": 64 if small else 256,
        "depth": 3,
        "num_heads": 2 if small else 4,
        "in_channels": 3,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": text["hidden_size"],
    }
    return common, vision


def _qwen3vl(text: dict[str, Any], ids: dict[str, int], small: bool) -> dict[str, Any]:
    common, vision = _qwen(text, ids, small)
    sections = [4, 2, 2] if small else [6, 5, 5]
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "tie_word_embeddings": True,
        **common,
        "text_config": {
            **text,
            "model_type": "qwen3_vl_text",
            "head_dim": 16 if small else 32,
            "attention_bias": False,
            "rope_theta": 5000000.0,
            "rope_scaling": {
                "mrope_interleaved": True,
                "mrope_section": sections,
                "rope_type": "default",
            },
            "tie_word_embeddings": True,
        },
        "vision_config": {
            **vision,
            "model_type": "qwen3_vl_vision",
            "hidden_act": "gelu_pytorch_tanh",
            "patch_size": 16,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
    }


def _qwen2_5vl(text: dict[str, Any], ids: dict[str, int], small: bool) -> dict[str, Any]:
    common, vision = _qwen(text, ids, small)
    sections = [2, 3, 3] if small else [4, 6, 6]
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "tie_word_embeddings": False,
        **common,
        "text_config": {
            **text,
            "model_type": "qwen2_5_vl_text",
            "rope_theta": 1000000.0,
            "rope_scaling": {"mrope_section": sections, "rope_type": "default", "type": "default"},
            "use_sliding_window": False,
        },
        "vision_config": {
            **vision,
            "model_type": "qwen2_5_vl_vision",
            "hidden_act": "silu",
            "patch_size": 14,
            "window_size": 112,
            "tokens_per_second": 2,
            "fullatt_block_indexes": [1, 2],
        },
    }


def processor_configs(family: Family, config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Contents of the processor files, by file name; pixel budgets are lowered to the size of the models."""
    shared: dict[str, Any] = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
    }
    shared |= {"resample": 3, "rescale_factor": 1 / 255}
    if family == "internvl3":
        side = config["vision_config"]["image_size"][0]
        shared |= {
            "size": {"height": side, "width": side},
            "image_mean": IMAGENET_MEAN,
            "image_std": IMAGENET_STD,
        }
        shared |= {"processor_class": "InternVLProcessor"}
        tiles = {"crop_to_patches": False, "min_patches": 1, "max_patches": 12}
        return {
            "preprocessor_config.json": {
                "image_processor_type": "GotOcr2ImageProcessor",
                **shared,
                **tiles,
            },
            "video_preprocessor_config.json": {
                "video_processor_type": "InternVLVideoProcessor",
                **shared,
            },
            "processor_config.json": {
                "processor_class": "InternVLProcessor",
                "image_seq_length": config["image_seq_length"],
            },
        }
    patch = config["vision_config"]["patch_size"]
    shared |= {"patch_size": patch, "temporal_patch_size": 2, "merge_size": 2}
    if family == "qwen3vl":
        shared |= {
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
            "processor_class": "Qwen3VLProcessor",
        }
        video_type = "Qwen3VLVideoProcessor"
    else:
        shared |= {
            "image_mean": CLIP_MEAN,
            "image_std": CLIP_STD,
            "processor_class": "Qwen2_5_VLProcessor",
        }
        video_type = "Qwen2VLVideoProcessor"
    unit = (2 * patch) ** 2
    image_size = {"shortest_edge": 4 * unit, "longest_edge": 64 * unit}
    # Qwen3-VL budgets a whole video, Qwen2-VL one frame.
    video_size = {
        "shortest_edge": 4 * unit,
        "longest_edge": (64 * 32 if family == "qwen3vl" else 64) * unit,
    }
    frames = {"fps": 2, "min_frames": 2, "max_frames": 64}
    return {
        "preprocessor_config.json": {
            "image_processor_type": "Qwen2VLImageProcessor",
            **shared,
            "size": image_size,
        },
        "video_preprocessor_config.json": {
            "video_processor_type": video_type,
            **shared,
            **frames,
            "size": video_size,
        },
    }


def make_checkpoint(
    family: Family,
    path: str | Path,
    seed: int = 0,
    *,
    size: Size = "tiny",
    pretrained: bool = False,
) -> Path:
    """Write a complete model directory, with random weights or with the shipped ones.

    Args:
        family: ``qwen2_5vl``, ``qwen3vl`` or ``internvl3``.
        path: Directory, created if needed; files of the same names are replaced.
        seed: Seed of the weights; the same seed gives the same bytes. The global generator is untouched.
        size: ``tiny`` for tests, ``demo`` for a model that can learn.
        pretrained: The weights shipped as ``assets/pretrained_qwen3vl.safetensors`` (Qwen3-VL, ``demo`` size; see
            ``assets/pretrained_qwen3vl.md``): a model that sees rendered rooms.

    Returns:
        The directory.

    Raises:
        CheckpointError: No weights are shipped for this family and size, or the tokenizer is not theirs.
    """
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    config = model_config(family, size)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(
            AutoConfig.from_pretrained(folder), dtype=torch.float32
        )
        _init_tiny(model) if size == "tiny" else _init_demo(model)
    if pretrained:
        _load_pretrained(model, family, size)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    ids = token_ids(family)
    generation = {
        "bos_token_id": ids["<|endoftext|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
        "do_sample": False,
    }
    (folder / "generation_config.json").write_text(
        json.dumps(generation, indent=2), encoding="utf-8"
    )
    for name, content in processor_configs(family, config).items():
        (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
    write_tokenizer(family, folder)
    return folder


def _init_tiny(model: nn.Module) -> None:
    """Random values everywhere: with zero biases and unit norms many mistakes would not show."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                is_scale = name.endswith("weight") or "lambda" in name
                parameter.normal_(1.0 if is_scale else 0.0, 0.1)
            elif _is_position(name):
                parameter.normal_(0.0, 0.5)
            else:
                parameter.normal_(0.0, 0.08)


def _init_demo(model: nn.Module) -> None:
    """Library initialisation, but position tables that the first layers can see.

    With the library's std of .02 a tiny tower barely tells places apart and needs many more steps to learn where
    things are.
    """
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if _is_position(name):
                parameter.normal_(0.0, 0.5)


def ship_pretrained(folder: Path, target: Path = PRETRAINED) -> Path:
    """Store the weights of a model directory in half precision as the shipped ones.

    Args:
        folder: Directory of a ``demo`` sized Qwen3-VL that was trained with the shipped vocabulary.
        target: File to write, with the vocabulary's digest in its metadata.
    """
    from safetensors.torch import load_file, save_file

    weights: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    halves = {name: tensor.half() for name, tensor in weights.items()}
    save_file(halves, target, metadata={"tokenizer": tokenizer_digest()})
    return target


def _load_pretrained(model: nn.Module, family: Family, size: Size) -> None:
    """Replace random weights by the shipped ones, which are stored in half precision."""
    import torch
    from safetensors import safe_open

    if (family, size) != ("qwen3vl", "demo"):
        raise CheckpointError(
            f"pretrained weights are shipped for qwen3vl of demo size, not for {family} of {size} size;"
            " leave pretrained out for random weights"
        )
    with safe_open(PRETRAINED, framework="pt") as file:
        if (file.metadata() or {}).get("tokenizer") != tokenizer_digest():
            raise CheckpointError(
                f"{PRETRAINED} was trained with another vocabulary than bpe.json beside it;"
                " make it again with tools/pretrain_tiny.sh"
            )
        parameters = dict(
            model.named_parameters()
        )  # a tied head is listed once, under its first name
        if set(file.keys()) != set(parameters):
            raise CheckpointError(
                f"{PRETRAINED} does not hold the parameters of this model:"
                f" {sorted(set(file.keys()) ^ set(parameters))[:4]} differ;"
                " make it again with tools/pretrain_tiny.sh"
            )
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(file.get_tensor(name))


def _is_position(name: str) -> bool:
    return "pos_embed" in name or "position_embeddings" in name or "cls_token" in name
