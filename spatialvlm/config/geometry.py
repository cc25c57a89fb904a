"""Section ``geometry``: encoder, fusion, token layout, positions, and the feature cache."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from spatialvlm.config.base import (
    Bool,
    Int,
    NonEmptyStr,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    Switch,
)


class TransConfig(Section):
    """MLP_trans of SSR eq. 2: geometry features to the width of the vision encoder."""

    hidden: PositiveInt | None = None
    """Hidden width; ``None`` = width of the vision encoder."""
    layers: Literal[2] = 2
    """Linear layers."""
    norm: Literal["layernorm"] = "layernorm"
    """Norm of every frame's feature vector before the MLP."""


class PositionsConfig(Section):
    """M-RoPE time axis (Qwen families)."""

    time: Literal["index", "seconds"] = "index"
    """Time of units where spatial tokens are inserted: 0..2T-1, or absolute time."""
    time_2d: Literal["stock", "index"] = "stock"
    """Time of units without spatial tokens."""
    text_after_vision: Literal["original", "stock"] = "original"
    """``original``: text continues after every coordinate before it; ``stock`` reproduces plain transformers."""


class FeatureCacheConfig(Section):
    """Precomputed features of the frozen encoder on disk."""

    dir: NonEmptyStr | None = None
    """Folder of the cache; ``None`` = off."""
    dtype: Literal["bf16", "fp32", "fp8"] = "bf16"
    """Stored precision."""
    verify_every: PositiveInt = 1000
    """Every so many hits one is recomputed and compared."""
    lru_items: NonNegativeInt = 4
    """Groups kept in memory."""
    max_gb: PositiveFloat | None = None
    """Disk budget; least recently used entries go first. ``None`` = no limit."""


class GeometryConfig(Section):
    """The geometry branch of SSR (arXiv 2603.00409); ``encoder: none`` is SSR-2D."""

    encoder: Literal["vggt", "dinov2", "none"] = "vggt"
    """Frozen encoder; ``dinov2`` sees each frame alone (control without multi-view)."""
    source: NonEmptyStr = "facebook/VGGT-1B"
    """Folder, file or hub id of the encoder's weights."""
    revision: NonEmptyStr | None = None
    """Hub revision; ``None`` = default branch."""
    layers: Annotated[tuple[Int, ...], Field(min_length=1)] = (22,)
    """0-based layer indices whose features are used; negative from the end."""
    parts: Literal["both", "frame", "global"] = "both"
    """Which half of a frame/global attention pair."""
    camera_token: Bool = False
    """One extra token per unit from the encoder's camera token."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Matrix products of the encoder; the residual stream stays fp32."""
    size_policy: Literal["auto", "match_grid", "native"] = "auto"
    """Encoder input size: the vision encoder's grid, or the size the encoder was trained at."""
    native_long: PositiveInt = 518
    """Long side under ``native``, in pixels."""
    grid_min: PositiveInt = 24
    """``auto`` matches the grid only from this many patches on the long side."""
    grid_max: PositiveInt = 44
    """``auto`` matches the grid only up to this many patches on the long side."""
    max_distortion: PositiveFloat = 1.10
    """``auto`` matches the grid only below this aspect distortion."""
    reference_frame: Literal["first", "last"] = "first"
    """World frame of the encoder."""
    vit_chunk: PositiveInt = 32
    """Frames per pass of the encoder's patch embedding; exact."""
    temporal_merge: Literal["concat", "mean", "first"] = "concat"
    """How the frames of one temporal unit are merged."""
    frames_as_images: Bool = False
    """Every frame becomes an image: one unit per frame, twice the visual tokens."""
    fusion: Literal["pre_projector", "post_projector"] = "pre_projector"
    """Where geometry meets vision: before the projector (SSR eq. 2-4) or after it."""
    insertion: Literal["interleaved", "sequential", "in_place"] = "interleaved"
    """Where spatial tokens go: after each unit, after all units, or into the visual tokens."""
    init: Literal["warm", "scratch"] = "warm"
    """``warm``: spatial tokens start equal to their 2D twins; ``scratch``: the paper's."""
    trans: TransConfig = TransConfig()
    detach_vit: Bool = False
    """Stop the gradient of spatial tokens before the vision encoder."""
    placeholder: NonEmptyStr = "<|spatial_pad|>"
    """Token that stands for a spatial token in ``input_ids``."""
    positions: PositionsConfig = PositionsConfig()
    default_flag: Switch = "auto"
    """``auto``: on for videos and images of one scene, off for single images and general data."""
    cache: FeatureCacheConfig = FeatureCacheConfig()
    allow_encoder_mismatch: Bool = False
    """Load a checkpoint that was trained with another encoder."""
    check_every: PositiveInt = 100
    """Steps between checks that the encoder is frozen and unpartitioned."""


def geometry_problems(geometry: GeometryConfig) -> list[tuple[str, str]]:
    """Contradictions inside the geometry section, as (key, message)."""
    found = []
    if geometry.camera_token and geometry.insertion == "in_place":
        found.append(
            ("geometry.camera_token", "needs extra tokens, which insertion: in_place does not have")
        )
    if geometry.camera_token and geometry.encoder != "vggt":
        found.append(("geometry.camera_token", f"encoder {geometry.encoder!r} has no camera token"))
    if geometry.encoder == "none" and geometry.default_flag == "on":
        found.append(("geometry.default_flag", "'on' needs an encoder, got encoder: none"))
    if geometry.grid_min > geometry.grid_max:
        found.append(
            (
                "geometry.grid_min",
                f"{geometry.grid_min} is above geometry.grid_max {geometry.grid_max}",
            )
        )
    return found
