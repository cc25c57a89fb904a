"""Pre-norm transformer block of DINOv2 and VGGT, with an explicit precision rule.

Linear weights may be bfloat16; everything else (norms, rotary tables, layer scale, residual stream)
is float32. The dtype of a matrix product is the dtype of its weight: inputs are cast right before it.
Blocks with bfloat16 weights equal blocks with float32 weights under autocast, at half the memory.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """Apply ``layer`` in the dtype of its weight."""
    output: Tensor = layer(x.to(layer.weight.dtype))
    return output


class Rope(NamedTuple):
    """Cosines and sines of rotary angles, shared by all blocks and heads."""

    cos: Float[Tensor, "L D"]
    sin: Float[Tensor, "L D"]

    def repeat(self, times: int) -> "Rope":
        """The same positions for ``times`` frames in a row."""
        return Rope(self.cos.repeat(times, 1), self.sin.repeat(times, 1))

    def rotate(self, x: Float[Tensor, "*B L D"]) -> Float[Tensor, "*B L D"]:
        """Rotate queries or keys; float32 in, float32 out."""
        first, second = x.reshape(*x.shape[:-1], 2, 2, -1).unbind(-2)  # each [*B, L, 2, D/4]
        turned = torch.stack([-second, first], dim=-2).flatten(-3)  # [*B, L, D]
        return x * self.cos + turned * self.sin


def rope_2d(positions: Float[Tensor, "L 2"], head_dim: int, base: float = 100.0) -> Rope:
    """Rotary angles of (row, column) positions in float32.

    The first half of a head is rotated by the row, the second half by the column. In each half the
    frequencies are ``base ** (-2j / half)`` and element ``j`` is paired with ``j + half / 2``.
    """
    half = head_dim // 2
    exponent = torch.arange(0, half, 2, device=positions.device, dtype=torch.float32) / half
    angles = positions[:, :, None] * base**-exponent  # [L, 2, half/2]
    angles = torch.cat([angles, angles], dim=-1).flatten(1)  # [L, head_dim]
    return Rope(angles.cos(), angles.sin())


class Attention(nn.Module):
    """Full self-attention; optionally with normalised queries and keys."""

    def __init__(self, dim: int, num_heads: int, qk_norm: bool, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.q_norm = nn.LayerNorm(dim // num_heads, eps=eps) if qk_norm else None
        self.k_norm = nn.LayerNorm(dim // num_heads, eps=eps) if qk_norm else None

    def forward(self, x: Float[Tensor, "B L D"], rope: Rope | None) -> Float[Tensor, "B L D"]:
        """Attend over the whole sequence; ``rope`` rotates after the norms."""
        qkv = linear(self.qkv, x).view(*x.shape[:2], 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, L, head_dim]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q.float()), self.k_norm(k.float())
        if rope is not None:
            q, k = rope.rotate(q.float()), rope.rotate(k.float())
        out = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
        return linear(self.proj, out.transpose(1, 2).flatten(2))


class LayerScale(nn.Module):
    """Learned scale per channel of a residual branch."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """Scale in float32."""
        return x.float() * self.gamma


class Mlp(nn.Module):
    """Two linear layers around an exact (erf) GELU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """Apply both layers in the dtype of their weights."""
        return linear(self.fc2, F.gelu(linear(self.fc1, x)))


class Block(nn.Module):
    """``x + scale * attention(norm(x))``, then the same with the MLP; float32 in and out."""

    def __init__(
        self, dim: int, num_heads: int, mlp_hidden: int, *, qk_norm: bool, eps: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads, qk_norm, eps)
        self.ls1 = LayerScale(dim)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, mlp_hidden)
        self.ls2 = LayerScale(dim)

    def forward(
        self, x: Float[Tensor, "B L D"], rope: Rope | None = None
    ) -> Float[Tensor, "B L D"]:
        """One block."""
        x = x + self.ls1(self.attn(self.norm1(x), rope))
        out: Tensor = x + self.ls2(self.mlp(self.norm2(x)))
        return out
