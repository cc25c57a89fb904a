"""Aggregator of VGGT (arXiv 2503.11651): DINOv2 patches, then alternating frame and global attention.

Written from the paper and from tensors of a reference run; no heads. Parameter names and shapes are
those of the released checkpoints (``facebook/VGGT-1B`` and ``VGGT-1B-Commercial``).
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from spatialvlm.errors import ConfigError
from spatialvlm.models.geometry.base import IMAGE_MEAN, IMAGE_STD, GeometryEncoder
from spatialvlm.models.geometry.blocks import Block, Rope, rope_2d

VIT_EPS = 1e-6  # LayerNorm inside DINOv2, blocks and final norm
AGGREGATOR_EPS = 1e-5  # LayerNorm of frame and global blocks, query and key norms included
MATH_ATTENTION_LIMIT = 4096  # tokens above which quadratic attention memory deserves a warning

Parts = Literal["both", "frame", "global"]
PARTS = ("both", "frame", "global")


@dataclass(frozen=True, slots=True)
class VggtConfig:
    """Sizes of an aggregator; the defaults are the released model's."""

    grid: int = 37
    """Side of the grid of the stored position embedding, in patches."""
    patch_size: int = 14
    embed_dim: int = 1024
    depth: int = 24
    """Pairs of a frame and a global block."""
    num_heads: int = 16
    vit_depth: int = 24
    num_register_tokens: int = 4
    mlp_hidden: int = 4096

    @property
    def head_dim(self) -> int:
        """Channels per attention head, equal in all blocks."""
        return self.embed_dim // self.num_heads


def normalise(images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
    """Subtract the mean and divide by the deviation of each channel of RGB in [0, 1].

    Scalars instead of buffers: a checkpoint holds none, and no copy to the device is needed.
    """
    channels = zip(images.unbind(1), IMAGE_MEAN, IMAGE_STD, strict=True)
    return torch.stack([(channel - mean) / std for channel, mean, std in channels], dim=1)


class PatchEmbedding(nn.Module):
    """Non-overlapping convolution; the nesting keeps the released parameter names."""

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, patch_size)

    def forward(self, x: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B N D"]:
        """Patches in raster order, float32."""
        patches: Tensor = self.proj(x)
        return patches.flatten(2).transpose(1, 2)


class DinoVit(nn.Module):
    """DINOv2 ViT with register tokens; returns normalised patch tokens."""

    def __init__(self, config: VggtConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        self.grid, self.patch_size = config.grid, config.patch_size
        self.num_special = 1 + config.num_register_tokens
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.grid**2, dim))
        self.register_tokens = nn.Parameter(torch.zeros(1, config.num_register_tokens, dim))
        self.patch_embed = PatchEmbedding(config.patch_size, dim)
        self.blocks = nn.ModuleList(
            Block(dim, config.num_heads, config.mlp_hidden, qk_norm=False, eps=VIT_EPS)
            for _ in range(config.vit_depth)
        )
        self.norm = nn.LayerNorm(dim, eps=VIT_EPS)

    def positions(self, rows: int, cols: int) -> Float[Tensor, "1 N D"]:
        """Position embedding of the patches, resized to the grid in float32."""
        table = self.pos_embed[:, 1:]
        if (rows, cols) == (self.grid, self.grid):
            return table
        square = table.reshape(1, self.grid, self.grid, -1).permute(0, 3, 1, 2)
        resized = F.interpolate(
            square, size=(rows, cols), mode="bicubic", antialias=True, align_corners=False
        )
        return resized.flatten(2).transpose(1, 2)

    def embed(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B P D"]:
        """Class token, registers and patches of normalised images; only class and patches have positions."""
        patches: Tensor = self.patch_embed(images)
        rows, cols = (side // self.patch_size for side in images.shape[-2:])
        patches = patches + self.positions(rows, cols)
        special = torch.cat([self.cls_token + self.pos_embed[:, :1], self.register_tokens], dim=1)
        return torch.cat([special.expand(len(patches), -1, -1), patches], dim=1)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B N D"]:
        """Encode each frame alone; RGB in [0, 1]."""
        x = self.embed(normalise(images))
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.norm(x[:, self.num_special :])
        return out


class Aggregator(nn.Module):
    """VGGT without heads, up to the last requested layer.

    Args:
        config: Sizes.
        num_pairs: Frame/global pairs to build; layers behind them do not exist.
        vit_chunk: Frames per pass of the patch encoder; does not change the result.
    """

    def __init__(self, config: VggtConfig, num_pairs: int, vit_chunk: int = 32) -> None:
        super().__init__()
        self.config = config
        self.vit_chunk = vit_chunk
        dim, registers = config.embed_dim, config.num_register_tokens
        self.num_special = 1 + registers
        self.patch_embed = DinoVit(config)
        self.camera_token = nn.Parameter(torch.zeros(1, 2, 1, dim))
        self.register_token = nn.Parameter(torch.zeros(1, 2, registers, dim))

        def blocks() -> nn.ModuleList:
            return nn.ModuleList(
                Block(dim, config.num_heads, config.mlp_hidden, qk_norm=True, eps=AGGREGATOR_EPS)
                for _ in range(num_pairs)
            )

        self.frame_blocks, self.global_blocks = blocks(), blocks()

    def forward(
        self,
        images: Float[Tensor, "B S 3 H W"],
        layers: Sequence[int],
        parts: Parts = "both",
        output_dtype: torch.dtype = torch.float32,
    ) -> dict[int, Float[Tensor, "B S P C"]]:
        """Run up to the last requested pair.

        Args:
            images: float32 RGB in [0, 1]; normalised in here.
            layers: Pair indices to return, not negative.
            parts: Output of the frame block, of the global block, or both, concatenated.
            output_dtype: Dtype of the returned tensors.

        Returns:
            Pair index -> raw residual states, special tokens (camera first) before the patches.
        """
        batch, num_frames, _, height, width = images.shape
        rows, cols = height // self.config.patch_size, width // self.config.patch_size
        x = self._embed(images)  # [B*S, P, D]
        frame_rope = self._rope(rows, cols, images.device)
        global_rope = frame_rope.repeat(num_frames)
        kept: dict[int, Tensor] = {}
        for index in range(max(layers) + 1):
            x = self.frame_blocks[index](x, frame_rope)
            wanted = [x] if index in layers and parts != "global" else []
            x = x.reshape(batch, -1, x.shape[-1])  # [B, S*P, D]
            x = self.global_blocks[index](x, global_rope)
            x = x.reshape(batch * num_frames, -1, x.shape[-1])  # [B*S, P, D]
            if index in layers:
                wanted += [x] if parts != "frame" else []
                output = torch.cat([part.to(output_dtype) for part in wanted], dim=-1)
                kept[index] = output.view(batch, num_frames, *output.shape[1:])  # [B, S, P, C]
        return kept

    def _embed(self, images: Float[Tensor, "B S 3 H W"]) -> Float[Tensor, "F P D"]:
        """Camera token, registers and patches of every frame."""
        batch, num_frames = images.shape[:2]
        special = torch.cat([self.camera_token, self.register_token], dim=2)  # [1, 2, R, D]
        # Variant 0 marks the first frame of a group, the world frame; variant 1 all others.
        special = torch.cat([special[:, :1], special[:, 1:].expand(-1, num_frames - 1, -1, -1)], 1)
        special = special.expand(batch, -1, -1, -1).flatten(0, 1)  # [B*S, R, D]
        chunks = torch.split(images.flatten(0, 1), self.vit_chunk)
        return torch.cat([special, torch.cat([self.patch_embed(chunk) for chunk in chunks])], dim=1)

    def _rope(self, rows: int, cols: int, device: torch.device) -> Rope:
        """Patch (r, c) has position (r + 1, c + 1); special tokens stay at (0, 0)."""
        grid = torch.stack(
            torch.meshgrid(
                torch.arange(1, rows + 1, device=device),
                torch.arange(1, cols + 1, device=device),
                indexing="ij",
            ),
            dim=-1,
        ).flatten(0, 1)  # [N, 2]
        positions = F.pad(grid, (0, 0, self.num_special, 0)).float()  # [P, 2]
        return rope_2d(positions, self.config.head_dim)


class Vggt(GeometryEncoder):
    """VGGT aggregator as a frozen geometry encoder.

    Args:
        aggregator: Aggregator with weights.
        layers: Pair indices that :meth:`forward` returns by default; negative counts from ``depth``.
        parts: Halves of a pair: ``both`` (frame, then global), ``frame`` or ``global``.
        reference_frame: Which frame of a group is the world frame.
        output_dtype: Dtype of the features.
    """

    name = "vggt"
    depends_on_first_frame = True

    def __init__(
        self,
        aggregator: Aggregator,
        layers: Sequence[int] = (22,),
        parts: Parts = "both",
        reference_frame: Literal["first", "last"] = "first",
        output_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        if parts not in PARTS:
            raise ConfigError(f"geometry.parts={parts!r} is not one of: {', '.join(PARTS)}")
        config = aggregator.config
        self.aggregator = aggregator
        self.parts = parts
        self.reference_frame = reference_frame
        self.output_dtype = output_dtype
        self.patch_size = self.pixel_multiple = config.patch_size
        self.feature_dim = config.embed_dim * (2 if parts == "both" else 1)
        self.num_special = aggregator.num_special
        self.num_layers = config.depth
        self.default_layers = self.resolve_layers(layers)
        self.freeze()

    def encode(
        self, frames: UInt8[Tensor, "B S 3 H W"], layers: tuple[int, ...], return_special: bool
    ) -> tuple[dict[int, Float[Tensor, "B S gh gw C"]], Float[Tensor, "B S R C"] | None]:
        """Encode groups of one shape; layers are valid and not negative."""
        if max(layers) >= len(self.aggregator.frame_blocks):
            raise ConfigError(
                f"layer {max(layers)} was not loaded: this encoder was built for layers "
                f"{list(self.default_layers)}. Name all layers when loading it"
            )
        rows, cols = (side // self.patch_size for side in frames.shape[-2:])
        _warn_math_attention(frames, frames.shape[1] * (rows * cols + self.num_special))
        states = self.aggregator(frames.float() / 255, layers, self.parts, self.output_dtype)
        patches = {
            layer: state[:, :, self.num_special :].reshape(*frames.shape[:2], rows, cols, -1)
            for layer, state in states.items()
        }
        special = states[max(layers)][:, :, : self.num_special] if return_special else None
        return patches, special


def _warn_math_attention(frames: Tensor, num_tokens: int) -> None:
    """Warn when global attention would materialise a tokens-by-tokens matrix."""
    fused = (
        torch.backends.cuda.flash_sdp_enabled,
        torch.backends.cuda.mem_efficient_sdp_enabled,
        torch.backends.cuda.cudnn_sdp_enabled,
    )
    if (
        frames.is_cuda
        and num_tokens > MATH_ATTENTION_LIMIT
        and not any(enabled() for enabled in fused)  # type: ignore[no-untyped-call]
    ):
        warnings.warn(
            f"global attention over {num_tokens} tokens runs on the math backend and needs memory "
            "quadratic in them; enable a fused scaled_dot_product_attention backend",
            stacklevel=3,
        )
