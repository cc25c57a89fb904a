"""Model directories: a plain Hugging Face directory, plus two files when there is a geometry branch.

``spatial.safetensors`` holds the fusion modules, ``spatialvlm.json`` the geometry settings and a reference (name,
source, fingerprint) to the frozen encoder, never its weights. ``transformers`` ignores both files, so the 2D part of
every directory loads with ``AutoModelForImageTextToText``.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from spatialvlm.errors import CheckpointError, ConfigError
from spatialvlm.models.attention import VISION_ATTENTION, choose
from spatialvlm.models.backbones import (
    Backbone,
    adapter_of,
    image_processor_config,
    require_config,
)
from spatialvlm.models.backbones.base import read_json
from spatialvlm.models.branch import GeometryBranch, build_fusion, load_encoder
from spatialvlm.models.geometry.loader import check_fingerprint
from spatialvlm.models.lora import has_adapters, merge_state
from spatialvlm.models.spatial_vlm import SpatialVLM

FORMAT = 1
SPATIAL_JSON = "spatialvlm.json"
SPATIAL_WEIGHTS = "spatial.safetensors"
# Settings that decide names, shapes or meaning of the fusion weights.
STRUCTURE = (
    "encoder", "layers", "parts", "camera_token", "temporal_merge", "frames_as_images", "fusion", "insertion", "trans",
)  # fmt: skip
COMPANIONS = (
    "tokenizer*", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json", "*processor_config.json",
    "chat_template*", "generation_config.json",
)  # fmt: skip


def find_folder(name: str | Path, revision: str | None = None) -> Path:
    """A local directory: the given one, or a hub download.

    Args:
        name: Directory or hub id (``owner/name``).
        revision: Hub revision; ``None`` = default branch.

    Raises:
        CheckpointError: Neither exists.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        raise CheckpointError(
            f"{name} is no model directory; point model.init_from at a folder with a config.json, or at a hub id"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(name), revision=revision))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{name} is no local directory and could not be downloaded ({error}); see https://huggingface.co/{name} for "
            "access, or download it elsewhere and set model.init_from to the folder"
        ) from error


def saved_geometry(folder: Path) -> dict[str, Any] | None:
    """Contents of ``spatialvlm.json``, ``None`` for a 2D directory.

    Raises:
        CheckpointError: Written by a newer version, or its weights are missing.
    """
    saved = read_json(folder, SPATIAL_JSON)
    if not saved:
        return None
    if saved.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder / SPATIAL_JSON} has format {saved.get('format')}, this version reads {FORMAT}; update spatialvlm"
        )
    if not (folder / SPATIAL_WEIGHTS).is_file():
        raise CheckpointError(
            f"{folder} has {SPATIAL_JSON} but no {SPATIAL_WEIGHTS}; copy the whole directory again"
        )
    return saved


def placeholder_id(folder: Path) -> int:
    """Id that stands for spatial tokens: the saved one, or the first behind the tokenizer.

    The embedding row of this id is never looked up, so it may lie in the spare rows or behind the table: no embedding
    is ever resized.
    """
    saved = saved_geometry(folder)
    if saved is not None and saved["spatial_id"] is not None:
        return int(saved["spatial_id"])
    from transformers import AutoTokenizer

    vocabulary: dict[str, int] = AutoTokenizer.from_pretrained(folder).get_vocab()
    return 1 + max(vocabulary.values())


def load(
    name: str | Path,
    *,
    attention: str = "auto",
    vision_attention: str = VISION_ATTENTION,
    geometry: Mapping[str, Any] | Literal["saved"] | None = "saved",
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    head_rows: int = 1024,
    linear_patches: bool = True,
    trust_remote_code: bool = False,
) -> SpatialVLM:
    """Load a model directory. See :meth:`SpatialVLM.from_pretrained`."""
    folder, device = find_folder(name, revision), torch.device(device)
    adapter = _load_backbone(folder, dtype, trust_remote_code).to(device)
    adapter.configure(
        attention=choose(attention, device),
        vision_attention=vision_attention,
        linear_patches=linear_patches,
    )
    saved = saved_geometry(folder) if geometry is not None else None
    settings = saved["geometry"] if saved and geometry == "saved" else geometry
    if not isinstance(settings, Mapping) or settings["encoder"] == "none":
        return SpatialVLM(adapter, head_rows=head_rows, source=folder)
    encoder = load_encoder(settings, device)
    fusion = build_fusion(adapter, settings, feature_dim=encoder.feature_dim)
    if saved is not None:
        _check_structure(saved["geometry"], settings, folder)
        check_fingerprint(
            saved["encoder"]["fingerprint"],
            encoder.fingerprint,
            allow_mismatch=settings["allow_encoder_mismatch"],
        )
        _fill(fusion, folder / SPATIAL_WEIGHTS)
    spatial_id = None if settings["insertion"] == "in_place" else placeholder_id(folder)
    branch = GeometryBranch(encoder, settings, spatial_id, settings["cache"]["lru_items"])
    return SpatialVLM(adapter, fusion=fusion, geometry=branch, head_rows=head_rows, source=folder)


def _load_backbone(folder: Path, dtype: torch.dtype, trust_remote_code: bool) -> Backbone:
    from transformers import AutoModelForImageTextToText

    adapter = adapter_of(require_config(folder)["model_type"])
    try:
        model, report = AutoModelForImageTextToText.from_pretrained(
            folder,
            dtype=dtype,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
        )
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder} cannot be loaded: {error}") from error
    for what in ("missing_keys", "mismatched_keys"):
        if report.get(what):
            names = sorted(map(str, report[what]))
            raise CheckpointError(
                f"{folder} has {len(names)} {what.replace('_', ' ')}: {', '.join(names[:5])}; the weights do not belong "
                "to its config.json"
            )
    return adapter(model, adapter.pixel_spec(model.config, image_processor_config(folder)))


def _check_structure(saved: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    different = [key for key in STRUCTURE if _plain(saved[key]) != _plain(wanted[key])]
    if different:
        pairs = ", ".join(f"{key}={wanted[key]} (saved: {saved[key]})" for key in different)
        raise ConfigError(
            f"the geometry section differs from the one {folder} was trained with: {pairs}. Use the saved values, or "
            f"start from its 2D part by removing {SPATIAL_JSON} and {SPATIAL_WEIGHTS}"
        )


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _fill(fusion: torch.nn.Module, file: Path) -> None:
    try:
        tensors = load_file(file)
        fusion.load_state_dict(tensors)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{file} does not fit the geometry section beside it: {error}"
        ) from error


def save(
    model: SpatialVLM,
    target: str | Path,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a model directory. See :meth:`SpatialVLM.save_pretrained`."""
    folder = Path(target)
    folder.mkdir(parents=True, exist_ok=True)
    state = dict(model.state_dict() if state_dict is None else state_dict)
    if has_adapters(model):
        state = merge_state(model, state)
    if dtype is not None:
        state = {name: tensor.to(dtype) for name, tensor in state.items()}
    backbone = {
        k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")
    }
    model.adapter.model.save_pretrained(folder, state_dict=backbone)
    save_spatial(model, folder, state)
    for pattern in COMPANIONS if model.source is not None else ():
        for file in model.source.glob(pattern) if model.source is not None else ():
            if file.parent.resolve() != folder.resolve():
                shutil.copyfile(file, folder / file.name)
    return folder


def save_spatial(model: SpatialVLM, folder: Path, state: Mapping[str, Tensor]) -> None:
    """Write the two files of the geometry branch; nothing without one."""
    if model.fusion is None:
        return
    fusion = {
        name.removeprefix("fusion."): tensor.contiguous().cpu()
        for name, tensor in state.items()
        if name.startswith("fusion.")
    }
    save_file(fusion, folder / SPATIAL_WEIGHTS, metadata={"format": "pt"})
    (folder / SPATIAL_JSON).write_text(json.dumps(_description(model), indent=2), encoding="utf-8")


def _description(model: SpatialVLM) -> dict[str, Any]:
    assert model.geometry is not None
    branch = model.geometry
    return {
        "format": FORMAT,
        "geometry": _plain(dict(branch.settings)),
        "spatial_id": branch.spatial_id,
        "encoder": {
            "name": branch.settings["encoder"],
            "source": str(branch.settings["source"]),
            "revision": branch.settings["revision"],
            "fingerprint": branch.encoder.fingerprint if branch.encoder is not None else "",
        },
    }
