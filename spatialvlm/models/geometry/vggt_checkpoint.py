"""Read a VGGT aggregator out of any file that contains one."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from spatialvlm.errors import CheckpointError, ConfigError
from spatialvlm.models.geometry.loader import (
    Shape,
    Weights,
    check_names,
    encoder_fingerprint,
    open_weights,
)
from spatialvlm.models.geometry.vggt import Aggregator, Parts, Vggt, VggtConfig

logger = logging.getLogger(__name__)

UNUSED = "patch_embed.mask_token"
LICENCES = (
    "VGGT weights keep their own licence: facebook/VGGT-1B is CC BY-NC 4.0 (no commercial use), "
    "facebook/VGGT-1B-Commercial is gated under its own terms. See https://huggingface.co/facebook/VGGT-1B"
)
_announced: set[str] = set()


def load_vggt(
    source: str | Path,
    *,
    layers: Sequence[int] = (22,),
    parts: Parts = "both",
    precision: Literal["bf16", "fp32"] = "bf16",
    device: torch.device | str = "cpu",
    revision: str | None = None,
    reference_frame: Literal["first", "last"] = "first",
    vit_chunk: int = 32,
    output_dtype: torch.dtype = torch.bfloat16,
) -> Vggt:
    """Build a frozen VGGT encoder; only the tensors that ``layers`` need are read.

    Args:
        source: Folder, file, or hub id; any checkpoint that contains one VGGT aggregator.
        layers: Pair indices whose features are wanted, 0-based, negative from the end.
        parts: Halves of a frame/global pair.
        precision: ``bf16`` runs linear layers and attention in bfloat16; everything else, the patch
            convolution included (0.03 % of the work, an eighth of the error), is float32.
        device: Where the encoder lives.
        revision: Hub revision.
        reference_frame: Which frame of a group is the world frame.
        vit_chunk: Frames per pass of the patch encoder.
        output_dtype: Dtype of the features.

    Raises:
        CheckpointError: The source is unreadable, holds no or several aggregators, another model,
            or tensors of other names or shapes.
        ConfigError: A layer or choice that does not exist.
    """
    if precision not in ("bf16", "fp32"):
        raise ConfigError(f"geometry.precision={precision!r} is not one of: bf16, fp32")
    weights = open_weights(source, revision)
    prefix = find_prefix(weights.shapes, str(source))
    shapes = {
        name.removeprefix(prefix): shape
        for name, shape in weights.shapes.items()
        if name.startswith(prefix)
    }
    config = infer_config(shapes, str(source), prefix)
    num_pairs = 1 + max(_resolve(layers, config.depth))
    aggregator = build_meta(config, num_pairs, vit_chunk)
    _fill(aggregator, weights, shapes, prefix, f"{source} (prefix {prefix!r})", precision, device)
    encoder = Vggt(aggregator, layers, parts, reference_frame, output_dtype)
    encoder.fingerprint = encoder_fingerprint(
        "vggt",
        {**asdict(config), "precision": precision},
        weights,
        aggregator.state_dict(),
        prefix,
    )
    if str(source) not in _announced:
        _announced.add(str(source))
        logger.warning(LICENCES)
    return encoder


def build_meta(config: VggtConfig, num_pairs: int, vit_chunk: int = 32) -> Aggregator:
    """An aggregator without storage, for counting and for filling."""
    with torch.device("meta"):
        return Aggregator(config, num_pairs, vit_chunk)


def find_prefix(names: Mapping[str, Shape], source: str) -> str:
    """Where in a checkpoint the aggregator lies, for example ``aggregator.``.

    Raises:
        CheckpointError: No aggregator, several, or the one of VGGT-Omega.
    """
    if any("inter_frame_blocks" in name or "rope_embed.periods" in name for name in names):
        raise CheckpointError(
            f"{source} looks like VGGT-Omega, which is another architecture (geometry.encoder "
            "vggt_omega, not available yet). Use a VGGT-1B checkpoint with geometry.encoder=vggt"
        )
    prefixes = sorted(
        prefix
        for name in names
        if name.endswith("camera_token")
        and (prefix := name.removesuffix("camera_token")) + "frame_blocks.0.norm1.weight" in names
    )
    if len(prefixes) == 1:
        return prefixes[0]
    if prefixes:
        raise CheckpointError(
            f"{source} holds {len(prefixes)} VGGT aggregators, at {', '.join(prefixes)}; keep one"
        )
    top = sorted({name.split(".")[0] for name in names})
    raise CheckpointError(
        f"{source} holds no VGGT aggregator (no camera_token beside frame_blocks.0.norm1.weight); its "
        f"top-level names are {', '.join(top[:20])}"
    )


def infer_config(shapes: Mapping[str, Shape], source: str, prefix: str) -> VggtConfig:
    """Sizes of the aggregator from tensor shapes.

    Raises:
        CheckpointError: A tensor that states a size is missing, or the sizes contradict each other.
    """
    sized = (
        "camera_token",
        "register_token",
        "patch_embed.pos_embed",
        "patch_embed.patch_embed.proj.weight",
        "frame_blocks.0.attn.q_norm.weight",
        "frame_blocks.0.mlp.fc1.weight",
    )
    missing = [name for name in sized if name not in shapes]
    if missing:
        raise CheckpointError(
            f"{source} (prefix {prefix!r}) lacks {len(missing)} tensors that state sizes: "
            f"{', '.join(missing)}"
        )
    embed = shapes["camera_token"][-1]
    head_dim = shapes["frame_blocks.0.attn.q_norm.weight"][0]
    positions = shapes["patch_embed.pos_embed"][1] - 1
    grid = round(positions**0.5)
    if grid**2 != positions or embed % head_dim or head_dim % 4:
        raise CheckpointError(
            f"{source} (prefix {prefix!r}): {positions} positions are no square, or {embed} channels "
            f"do not divide into heads of {head_dim}"
        )
    return VggtConfig(
        grid=grid,
        patch_size=shapes["patch_embed.patch_embed.proj.weight"][-1],
        embed_dim=embed,
        depth=_num_blocks(shapes, "frame_blocks"),
        num_heads=embed // head_dim,
        vit_depth=_num_blocks(shapes, "patch_embed.blocks"),
        num_register_tokens=shapes["register_token"][2],
        mlp_hidden=shapes["frame_blocks.0.mlp.fc1.weight"][0],
    )


def _num_blocks(shapes: Mapping[str, Shape], stack: str) -> int:
    pattern = re.compile(rf"{re.escape(stack)}\.(\d+)\.")
    return 1 + max((int(m[1]) for name in shapes if (m := pattern.match(name))), default=-1)


def _resolve(layers: Sequence[int], depth: int) -> list[int]:
    """Layers counted from the first; a complaint if one is not in the file."""
    if not layers or any(not -depth <= layer < depth for layer in layers):
        raise ConfigError(
            f"geometry.layers={list(layers)}: this VGGT has layers {-depth}..{depth - 1}"
        )
    return [layer % depth for layer in layers]


def _fill(
    aggregator: Aggregator,
    weights: Weights,
    shapes: Mapping[str, Shape],
    prefix: str,
    origin: str,
    precision: str,
    device: torch.device | str,
) -> None:
    """Replace the meta parameters by tensors of the checkpoint, one at a time."""
    needed = {name: tuple(value.shape) for name, value in aggregator.state_dict().items()}
    check_names(needed, shapes, origin)
    last = len(aggregator.frame_blocks)
    skipped = re.compile(r"(?:frame|global)_blocks\.(\d+)\.")
    extra = [
        name
        for name in shapes
        if name not in needed
        and name != UNUSED
        and not ((m := skipped.match(name)) and int(m[1]) >= last)
    ]
    if extra:
        raise CheckpointError(
            f"{origin} holds {len(extra)} tensors that a VGGT aggregator does not have: "
            f"{', '.join(extra[:5])}"
        )
    for path, module in aggregator.named_modules():
        in_bf16 = isinstance(module, nn.Linear) and precision == "bf16"
        dtype = torch.bfloat16 if in_bf16 else torch.float32
        for name, _ in list(module.named_parameters(recurse=False)):
            key = f"{path}.{name}" if path else name
            value = weights.read(prefix + key).to(device=device, dtype=dtype)
            setattr(module, name, nn.Parameter(value, requires_grad=False))
