"""A small random geometry encoder file in the tensor layout of the released VGGT checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Literal


def vggt_shapes(
    *,
    embed: int,
    heads: int,
    depth: int,
    vit_depth: int,
    image: int,
    patch: int = 14,
    registers: int = 4,
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the aggregator's tensors, without prefix.

    Args:
        embed: Channels.
        heads: Heads of the frame and global blocks.
        depth: Number of (frame, global) block pairs.
        vit_depth: Number of patch-embedding transformer blocks.
        image: Side of the training image in pixels; ``image / patch`` is the side of the position grid.
        patch: Patch side in pixels.
        registers: Register tokens per frame.
    """
    shapes: dict[str, tuple[int, ...]] = {
        "camera_token": (1, 2, 1, embed),
        "register_token": (1, 2, registers, embed),
        "patch_embed.cls_token": (1, 1, embed),
        "patch_embed.pos_embed": (1, 1 + (image // patch) ** 2, embed),
        "patch_embed.register_tokens": (1, registers, embed),
        "patch_embed.mask_token": (1, embed),
        "patch_embed.patch_embed.proj.weight": (embed, 3, patch, patch),
        "patch_embed.patch_embed.proj.bias": (embed,),
        "patch_embed.norm.weight": (embed,),
        "patch_embed.norm.bias": (embed,),
    }
    linear = {"attn.qkv": (3 * embed, embed), "attn.proj": (embed, embed)}
    linear |= {"mlp.fc1": (4 * embed, embed), "mlp.fc2": (embed, 4 * embed)}
    stacks = {"patch_embed.blocks": vit_depth, "frame_blocks": depth, "global_blocks": depth}
    for stack, count in stacks.items():
        norms = {"norm1": embed, "norm2": embed}
        if stack != "patch_embed.blocks":
            norms |= {"attn.q_norm": embed // heads, "attn.k_norm": embed // heads}
        for index in range(count):
            prefix = f"{stack}.{index}"
            for name, width in norms.items():
                shapes |= {f"{prefix}.{name}.weight": (width,), f"{prefix}.{name}.bias": (width,)}
            for name, shape in linear.items():
                shapes |= {f"{prefix}.{name}.weight": shape, f"{prefix}.{name}.bias": shape[:1]}
            shapes |= {f"{prefix}.ls1.gamma": (embed,), f"{prefix}.ls2.gamma": (embed,)}
    return shapes


def make_vggt(path: str | Path, seed: int = 0, *, size: Literal["tiny", "demo"] = "tiny") -> Path:
    """Write a geometry encoder file (``.safetensors``) with random weights.

    Norms, gammas, biases and tokens are random too, so that no term of the computation is hidden. A head tensor is
    included because released files have heads, which a loader must skip.

    Args:
        path: File to write; its folder is created.
        seed: Seed of the weights.
        size: ``tiny`` (2 pairs of width 32, 4 M multiply-adds per frame) or ``demo`` (3 pairs of width 64).

    Returns:
        The file.
    """
    import torch
    from safetensors.torch import save_file

    dims = {"embed": 32, "heads": 2, "depth": 2, "vit_depth": 1, "image": 70}
    if size == "demo":
        dims = {"embed": 64, "heads": 2, "depth": 3, "vit_depth": 2, "image": 112}
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in vggt_shapes(**dims).items():
        value = torch.randn(shape, generator=generator)
        if name.endswith("gamma"):
            value = 0.4 + 0.1 * value
        elif name.endswith("weight") and "norm" in name:
            value = 1.0 + 0.15 * value
        elif "token" in name or "pos_embed" in name:
            value = 0.5 * value
        elif name.endswith("bias"):
            value = 0.1 * value
        else:
            value = value * shape[-1] ** -0.5 if len(shape) == 2 else value * 588**-0.5
        tensors[f"aggregator.{name}"] = value
    tensors["camera_head.token_norm.weight"] = torch.ones(2 * dims["embed"])
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file, metadata={"format": "pt"})
    return file
