"""A tiny model with the layout and the frame sizes that fit it, for tests and benchmarks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from spatialvlm.config.geometry import GeometryConfig
from spatialvlm.models.build import build_layout, build_model
from spatialvlm.testing.packs import Clip, Member, random_pack
from spatialvlm.typing import Batch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from spatialvlm.models.spatial_vlm import SpatialVLM
    from spatialvlm.sequence.layout import TokenLayout

FAMILIES = ("qwen2_5vl", "qwen3vl", "internvl3")
GEOMETRY_HW = (56, 70)
"""Encoder frame size of random packs; differs from every ViT grid, so features are resampled."""


@dataclasses.dataclass
class Rig:
    """A loaded model beside everything needed to make packs for it."""

    family: str
    folder: Path
    model: SpatialVLM
    layout: TokenLayout

    @classmethod
    def load(
        cls,
        family: str,
        folder: Path,
        *,
        vggt: Path | None = None,
        geometry: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Rig:
        """Load a tiny checkpoint.

        Args:
            family: Of the checkpoint.
            folder: Model directory.
            vggt: Encoder file.
            geometry: Keys of the geometry section; ``None`` = 2D.
            **kwargs: For :func:`~spatialvlm.models.build.build_model`.
        """
        section = None
        if geometry is not None:
            values = {"source": str(vggt), "layers": (1,), "precision": "fp32", **geometry}
            section = GeometryConfig(**values)
        return cls(
            family, folder, build_model(folder, section, **kwargs), build_layout(folder, section)
        )

    def clip(
        self,
        kind: Literal["image", "video"] = "image",
        frames: int = 1,
        *,
        wide: bool = False,
        group: int = -1,
    ) -> Clip:
        """A medium whose size the backbone takes."""
        if self.family == "internvl3":
            return Clip(kind, frames, 56, 56, group)
        unit = 32 if self.family == "qwen3vl" else 28
        return Clip(kind, frames, 2 * unit, (3 if wide else 2) * unit, group)

    def members(self) -> list[Member]:
        """A video group with branches, same-scene images, a plain image group, and text."""
        return [
            Member((self.clip("video", 3, wide=True, group=0),), branches=(5, 7, 6)),
            Member((self.clip(group=0), self.clip(group=0)), branches=(9,), seed=1),
            Member((self.clip(),), branches=(4, 4), seed=2),
            Member(seed=3),
        ]

    def pack(self, members: Sequence[Member] | None = None, **kwargs: Any) -> Batch:
        """A random pack of ``members``, or of :meth:`members`."""
        chosen = self.members() if members is None else members
        return random_pack(
            chosen, self.layout, self.model.adapter.pixels, geometry_hw=GEOMETRY_HW, **kwargs
        )

    def separate(self) -> Iterator[list[Member]]:
        """The samples of :meth:`members`, each alone."""
        for member in self.members():
            for branch in range(len(member.branches)):
                yield [dataclasses.replace(member, keep=branch)]

    def randomise_fusion(self, std: float = 0.1) -> None:
        """Random fusion weights: a warm start hides mistakes behind zeros."""
        import torch

        assert self.model.fusion is not None
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.model.fusion.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all gradients by name."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def worst_relative(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Largest relative difference of a tensor; tensors that vanish in exact arithmetic are left out.

    A key bias without rotary embedding, for example, has zero gradient and only rounding to compare.
    """
    import torch

    assert found.keys() == expected.keys()
    whole = torch.cat([tensor.flatten() for tensor in expected.values()]).norm()
    return max(
        float((found[name] - tensor).norm() / tensor.norm())
        for name, tensor in expected.items()
        if tensor.norm() > 1e-5 * whole
    )
