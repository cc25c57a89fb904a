"""Where the configuration becomes a token layout and a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from spatialvlm.config.geometry import GeometryConfig
from spatialvlm.config.training import LoraConfig
from spatialvlm.models.backbones import adapter_of, require_config
from spatialvlm.models.branch import GeometryBranch, build_fusion, meta_encoder
from spatialvlm.models.cost import cost_coefficients
from spatialvlm.models.directory import find_folder, placeholder_id
from spatialvlm.models.kernels import use_liger
from spatialvlm.models.lora import add_adapters
from spatialvlm.models.spatial_vlm import SpatialVLM
from spatialvlm.sequence.layout import TokenLayout
from spatialvlm.sequence.sizes import SizePolicy


def geometry_settings(geometry: GeometryConfig | None) -> dict[str, Any] | None:
    """The geometry section as plain values; ``None`` without an encoder."""
    if geometry is None or geometry.encoder == "none":
        return None
    return geometry.model_dump(mode="json")


def build_layout(checkpoint: str | Path, geometry: GeometryConfig | None = None) -> TokenLayout:
    """Token layout of a checkpoint with or without a geometry branch.

    Args:
        checkpoint: Model directory or hub id.
        geometry: The geometry section; ``None`` or encoder ``none`` = the stock layout.
    """
    folder = find_folder(checkpoint)
    config = require_config(folder)
    family = adapter_of(config["model_type"]).family
    ids = _marker_ids(family, config, folder)
    settings = geometry_settings(geometry)
    if geometry is None or settings is None:
        return TokenLayout(family=family, **ids)  # type: ignore[arg-type]
    inserts = geometry.insertion != "in_place"
    return TokenLayout(
        family=family,  # type: ignore[arg-type]
        **ids,
        spatial_id=placeholder_id(folder) if inserts else None,
        insertion=geometry.insertion,
        camera_token=geometry.camera_token,
        frames_as_images=geometry.frames_as_images,
        time=geometry.positions.time,
        time_2d=geometry.positions.time_2d,
        text_after_vision=geometry.positions.text_after_vision,
        size=SizePolicy(
            patch_size=meta_encoder(settings).patch_size,
            policy=geometry.size_policy,
            native_long=geometry.native_long,
            grid_min=geometry.grid_min,
            grid_max=geometry.grid_max,
            max_distortion=geometry.max_distortion,
        ),
    )


def _marker_ids(family: str, config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    vision = config["vision_config"]
    if family == "internvl3":
        from transformers import AutoTokenizer

        start, end = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(
            ["<img>", "</img>"]
        )
        image = config["image_token_id"]
        return {
            "image_id": image,
            "video_id": image,
            "vision_start_id": start,
            "vision_end_id": end,
        }
    return {
        "image_id": config["image_token_id"],
        "video_id": config["video_token_id"],
        "vision_start_id": config["vision_start_token_id"],
        "vision_end_id": config["vision_end_token_id"],
        "merge_size": vision.get("spatial_merge_size", 2),
        "tokens_per_second": float(vision.get("tokens_per_second", 2)),
    }


def build_model(
    checkpoint: str | Path,
    geometry: GeometryConfig | None = None,
    *,
    attention: str = "auto",
    lora: LoraConfig | None = None,
    liger: bool = False,
    head_rows: int = 1024,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> SpatialVLM:
    """Load a checkpoint and, in stage 2, create or load its geometry branch.

    Args:
        checkpoint: Model directory or hub id.
        geometry: The geometry section; ``None`` or encoder ``none`` = 2D.
        attention: ``packing.attention``.
        lora: The adapter section; ``None`` = no adapters.
        liger: ``model.liger``.
        head_rows: ``memory.head_rows``.
        dtype: Of the weights.
        device: Where the model runs.
        revision: Hub revision.
        trust_remote_code: Run the model class of the checkpoint, see the recipes' flag.
    """
    model = SpatialVLM.from_pretrained(
        checkpoint,
        attention=attention,
        geometry=geometry_settings(geometry),
        revision=revision,
        dtype=dtype,
        device=device,
        head_rows=head_rows,
        trust_remote_code=trust_remote_code,
    )
    _adapt(model, lora)
    if liger:
        use_liger(model.adapter.language_model)
    return model


def _adapt(model: SpatialVLM, lora: LoraConfig | None) -> None:
    if lora is not None:
        add_adapters(
            model, lora.parts, rank=lora.r, alpha=lora.alpha, dropout=lora.dropout, dora=lora.dora
        )


def build_meta_model(
    config_file: str | Path, geometry: GeometryConfig | None = None, lora: LoraConfig | None = None
) -> SpatialVLM:
    """A model without storage, for counting parameters and FLOPs.

    Args:
        config_file: A backbone's ``config.json`` (``configs/backbones/<name>.json``).
        geometry: The geometry section. An encoder that is no local file counts with the released sizes.
        lora: The adapter section.

    Raises:
        ConfigError: An unsupported model type.
    """
    from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

    values = json.loads(Path(config_file).read_text(encoding="utf-8"))
    adapter_class = adapter_of(values["model_type"])
    config = CONFIG_MAPPING[values["model_type"]].from_dict(values)
    with torch.device("meta"):
        backbone = AutoModelForImageTextToText.from_config(config)
    adapter = adapter_class(backbone, adapter_class.pixel_spec(config, {}))
    adapter.refuse_unsupported()
    settings = geometry_settings(geometry)
    fusion = branch = None
    if settings is not None:
        encoder = meta_encoder(settings)
        fusion = build_fusion(adapter, settings, feature_dim=encoder.feature_dim)
        branch = GeometryBranch(encoder, settings, None)
    model = SpatialVLM(adapter, fusion=fusion, geometry=branch)
    with torch.device("meta"):
        _adapt(model, lora)
    return model


__all__ = [
    "build_layout",
    "build_meta_model",
    "build_model",
    "cost_coefficients",
    "geometry_settings",
]
