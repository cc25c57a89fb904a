"""The geometry branch of a model: a frozen encoder outside the module tree, fusion modules inside it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spatialvlm.errors import AlignmentError, ConfigError
from spatialvlm.models.backbones import Backbone
from spatialvlm.models.geometry.base import GeometryEncoder, GeometryFeatures, assert_frozen
from spatialvlm.models.geometry.cache import CachedEncoder
from spatialvlm.models.geometry.fusion import GeometryFusion
from spatialvlm.sequence.pixels import split_frames
from spatialvlm.typing import Batch

FeatureSource = Callable[[Sequence[Tensor], Sequence[str]], list[GeometryFeatures]]


@dataclass
class GeometryBranch:
    """What :class:`~spatialvlm.models.spatial_vlm.SpatialVLM` needs to compute spatial tokens.

    A plain object, not a module: wrappers, optimizers, ``state_dict()`` and ``train()`` of the model must not see
    the encoder.

    Attributes:
        encoder: Frozen encoder on the model's device; ``None`` for a model that only counts (meta device).
        settings: The geometry section as plain values; saved beside the weights.
        spatial_id: Token id that stands for spatial tokens, ``None`` with ``in_place``.
        lru_items: Groups whose features stay in memory, by content key.
    """

    encoder: GeometryEncoder | None
    settings: Mapping[str, Any]
    spatial_id: int | None
    lru_items: int = 4
    _calls: int = 0
    _recent: OrderedDict[str, GeometryFeatures] = field(default_factory=OrderedDict)

    def content(self, batch: Batch) -> list[tuple[int, int] | None] | None:
        """Part of the encoder's patch grid that every medium fills; ``None`` = all, no padding."""
        if "geometry_content" not in batch:
            return None
        assert self.encoder is not None
        patch = self.encoder.patch_size
        sizes = [(height, width) for height, width in batch["geometry_content"].tolist()]
        return [(h // patch, w // patch) if h else None for h, w in sizes]

    def features(self, batch: Batch) -> list[GeometryFeatures]:
        """Features of every geometry group of a pack; equal groups are encoded once.

        Raises:
            AlignmentError: Group frames are missing.
            GeometryError: Something unfroze or sharded the encoder (looked at every ``check_every`` calls).
        """
        frames = group_frames(batch)
        if not frames:
            return []
        assert self.encoder is not None
        if self._calls % self.settings["check_every"] == 0:
            assert_frozen(self.encoder)
        self._calls += 1
        keys = [
            key or f"#{index}"
            for index, key in enumerate(batch.get("geometry_keys") or [""] * len(frames))
        ]
        known = {key: self._recent[key] for key in keys if key in self._recent}
        wanted = {key: group for key, group in zip(keys, frames, strict=True) if key not in known}
        if wanted:
            computed = self.encoder(
                list(wanted.values()), return_special=bool(self.settings["camera_token"])
            )
            known |= dict(zip(wanted, computed, strict=True))
        for key in keys:
            if self.lru_items and not key.startswith("#"):
                self._recent[key] = known[key]
                self._recent.move_to_end(key)
        while len(self._recent) > self.lru_items:
            self._recent.popitem(last=False)
        return [known[key] for key in keys]


def group_frames(batch: Batch) -> list[Tensor]:
    """uint8 ``[S, 3, H, W]`` of every geometry group, empty without geometry.

    Raises:
        AlignmentError: The pack names groups but holds no frames for them.
    """
    groups = batch["media_group"].tolist() if "media_group" in batch else []
    num_groups = max(groups, default=-1) + 1
    if num_groups == 0:
        return []
    if "geometry_u8" in batch:
        shapes = [(s, h, w) for s, h, w in batch["geometry_shapes"].tolist()]
        if len(shapes) != num_groups:
            raise AlignmentError(
                f"media name {num_groups} geometry groups, the pack holds frames of {len(shapes)}"
            )
        frames = split_frames(batch["geometry_u8"], shapes)
    else:
        media = split_frames(
            batch["frames_u8"], [(s, h, w) for s, h, w in batch["frame_shapes"].tolist()]
        )
        frames = []
        for group in range(num_groups):
            members = [
                medium for medium, owner in zip(media, groups, strict=True) if owner == group
            ]
            if len({medium.shape[1:] for medium in members}) != 1:
                raise AlignmentError(
                    f"frames of geometry group {group} have sizes {[tuple(m.shape[1:3]) for m in members]}; encoder "
                    "frames of one size must be collated as geometry_u8"
                )
            frames.append(torch.cat(members))
    return [group.movedim(-1, 1) for group in frames]


def load_encoder(settings: Mapping[str, Any], device: torch.device) -> GeometryEncoder:
    """The frozen encoder of a geometry section, on its device, behind the feature cache if there is one.

    Features have the dtype of ``precision``; the first norm of the fusion computes in float32 anyway.

    Args:
        settings: The geometry section as plain values.
        device: Where it runs.

    Raises:
        ConfigError: An unknown encoder.
    """
    builder = ENCODERS.get(settings["encoder"])
    if builder is None:
        raise ConfigError(
            f"geometry.encoder={settings['encoder']!r} is not one of: {', '.join(ENCODERS)}, none"
        )
    dtype = torch.bfloat16 if settings["precision"] == "bf16" else torch.float32
    encoder = builder(settings, device, dtype)
    cache = settings["cache"]
    if cache["dir"] is None:
        return encoder
    return CachedEncoder(
        encoder,
        cache["dir"],
        dtype=cache["dtype"],
        verify_every=cache["verify_every"],
        max_gb=cache["max_gb"],
    )


def _vggt(settings: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> GeometryEncoder:
    from spatialvlm.models.geometry.vggt_checkpoint import load_vggt

    return load_vggt(
        settings["source"],
        layers=settings["layers"],
        parts=settings["parts"],
        precision=settings["precision"],
        device=device,
        revision=settings["revision"],
        reference_frame=settings["reference_frame"],
        vit_chunk=settings["vit_chunk"],
        output_dtype=dtype,
    )


def _dinov2(
    settings: Mapping[str, Any], device: torch.device, dtype: torch.dtype
) -> GeometryEncoder:
    from spatialvlm.models.geometry.dinov2 import load_dinov2

    return load_dinov2(
        settings["source"],
        layers=settings["layers"],
        precision=settings["precision"],
        device=device,
        revision=settings["revision"],
        vit_chunk=settings["vit_chunk"],
        output_dtype=dtype,
    )


def _meta_dinov2(settings: Mapping[str, Any]) -> GeometryEncoder:
    from spatialvlm.models.geometry.dinov2 import meta_dinov2

    return meta_dinov2(settings["source"], settings["layers"])


def meta_encoder(settings: Mapping[str, Any]) -> GeometryEncoder:
    """An encoder without storage: sizes of a local file if there is one, else of the released model."""
    builder = META_ENCODERS.get(settings["encoder"])
    if builder is None:
        raise ConfigError(
            f"geometry.encoder={settings['encoder']!r} is not one of: {', '.join(ENCODERS)}, none"
        )
    return builder(settings)


def _meta_vggt(settings: Mapping[str, Any]) -> GeometryEncoder:
    from spatialvlm.models.geometry.loader import open_weights
    from spatialvlm.models.geometry.vggt import Vggt, VggtConfig
    from spatialvlm.models.geometry.vggt_checkpoint import build_meta, find_prefix, infer_config

    config, source = VggtConfig(), settings["source"]
    if Path(source).exists():
        shapes = open_weights(source).shapes
        prefix = find_prefix(shapes, str(source))
        own = {
            name.removeprefix(prefix): shape
            for name, shape in shapes.items()
            if name.startswith(prefix)
        }
        config = infer_config(own, str(source), prefix)
    pairs = 1 + max(layer % config.depth for layer in settings["layers"])
    return Vggt(build_meta(config, pairs), settings["layers"], settings["parts"])


# A new encoder is one file in models/geometry and one entry in each of these.
ENCODERS: dict[str, Callable[[Mapping[str, Any], torch.device, torch.dtype], GeometryEncoder]] = {
    "vggt": _vggt,
    "dinov2": _dinov2,
}
META_ENCODERS: dict[str, Callable[[Mapping[str, Any]], GeometryEncoder]] = {
    "vggt": _meta_vggt,
    "dinov2": _meta_dinov2,
}


def build_fusion(
    adapter: Backbone, settings: Mapping[str, Any], *, feature_dim: int
) -> GeometryFusion:
    """Fusion modules for a backbone; call it before sharding.

    Args:
        adapter: The backbone, complete.
        settings: The geometry section as plain values.
        feature_dim: Channels of one encoder layer.
    """
    if adapter.frames_are_images and settings["frames_as_images"]:
        raise ConfigError(
            f"geometry.frames_as_images has no effect on {type(adapter).__name__}, whose frames are images; remove it"
        )
    return GeometryFusion(
        adapter.projector,
        flatten_units=adapter.flatten_units,
        vision_dim=adapter.d_vit,
        text_dim=adapter.d_llm,
        feature_dim=feature_dim,
        num_layers=len(settings["layers"]),
        tau=1 if settings["frames_as_images"] else adapter.tau,
        fusion=settings["fusion"],
        insertion=settings["insertion"],
        temporal_merge=settings["temporal_merge"],
        hidden=settings["trans"]["hidden"],
        camera_token=settings["camera_token"],
        init=settings["init"],
        detach_vit=settings["detach_vit"],
    )
