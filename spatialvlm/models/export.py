"""Directories for other programs: a plain 2D checkpoint, or the 3D one with a model card; optionally on the hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from spatialvlm.errors import CheckpointError, ConfigError
from spatialvlm.models.backbones import FAMILIES, adapter_of, require_config
from spatialvlm.models.directory import COMPANIONS, SPATIAL_JSON, SPATIAL_WEIGHTS, saved_geometry

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Variant = Literal["2d", "3d"]


def export(
    source: str | Path,
    target: str | Path,
    *,
    variant: Variant,
    dtype: Literal["bf16", "fp16", "fp32"] | None = None,
    adapters: str | Path | None = None,
) -> Path:
    """Write a directory to serve or to share; nothing is loaded but one weight file at a time.

    The 2D variant is a plain ``transformers`` checkpoint (``AutoModelForImageTextToText``, vLLM, ...). The 3D variant
    adds the fusion weights and a reference to the geometry encoder, never a copy of it.

    Args:
        source: Model directory (a run's ``final``).
        target: New or empty directory.
        variant: ``2d`` drops the geometry branch; ``3d`` needs one.
        dtype: Convert the weights; ``None`` = as they are.
        adapters: Directory of :func:`~spatialvlm.models.lora.save_adapters`, merged on the way; its fusion modules
            replace those of ``source``.

    Raises:
        CheckpointError: ``source`` is no model directory, or ``target`` is not empty.
        ConfigError: ``3d`` asked of a 2D directory.
    """
    origin, folder = Path(source), Path(target)
    config = require_config(origin)
    family = adapter_of(config["model_type"]).family
    spatial = (
        origin
        if adapters is None or not (Path(adapters) / SPATIAL_JSON).is_file()
        else Path(adapters)
    )
    saved = saved_geometry(spatial)
    if variant == "3d" and saved is None:
        raise ConfigError(
            f"{spatial} has no geometry branch ({SPATIAL_JSON} is missing); export it with variant 2d"
        )
    if folder.exists() and any(folder.iterdir()):
        raise CheckpointError(
            f"{folder} is not empty; choose a new directory, nothing is overwritten"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if adapters is not None:
        _merge_adapters(origin, Path(adapters), folder)
    else:
        for file in [
            *origin.glob("model*.safetensors"),
            *origin.glob("model*.index.json"),
            origin / "config.json",
        ]:
            shutil.copyfile(file, folder / file.name)
    for pattern in COMPANIONS:
        for file in origin.glob(pattern):
            shutil.copyfile(file, folder / file.name)
    if variant == "3d":
        for name in (SPATIAL_JSON, SPATIAL_WEIGHTS):
            shutil.copyfile(spatial / name, folder / name)
    if dtype is not None:
        for file in folder.glob("*.safetensors"):
            _convert(file, DTYPES[dtype])
        exported = require_config(folder)
        exported["dtype"] = str(DTYPES[dtype]).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(exported, indent=2), encoding="utf-8")
    card = model_card(
        family, saved if variant == "3d" else None, trained_with_geometry=saved is not None
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    return folder


def _convert(file: Path, dtype: torch.dtype) -> None:
    with safe_open(file, "pt") as tensors:
        metadata = tensors.metadata()
        state = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118  (no iterator)
    save_file(
        {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()},
        file,
        metadata=metadata,
    )


def _merge_adapters(origin: Path, adapters: Path, folder: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    if not (adapters / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{adapters} holds no adapter_config.json; point --adapters at saved adapters"
        )
    model = AutoModelForImageTextToText.from_pretrained(origin, local_files_only=True)
    PeftModel.from_pretrained(model, adapters).merge_and_unload().save_pretrained(folder)


def model_card(family: str, saved: dict[str, object] | None, *, trained_with_geometry: bool) -> str:
    """Markdown that says what the directory is, how to load it, and which position rule it was trained with.

    Args:
        family: Backbone family.
        saved: Contents of ``spatialvlm.json`` for a 3D directory.
        trained_with_geometry: Whether the weights come from a run with the geometry branch.
    """
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: image-text-to-text",
        "tags: [spatial-reasoning]",
        "---",
    ]
    lines += [f"# Fine-tuned with spatialvlm ({family}, {'3D' if saved else '2D'})", ""]
    if saved is None:
        lines += [
            "A plain `transformers` checkpoint:",
            "",
            "```python",
            "from transformers import AutoModelForImageTextToText, AutoProcessor",
            'model = AutoModelForImageTextToText.from_pretrained("this/directory")',
            'processor = AutoProcessor.from_pretrained("this/directory")',
            "```",
            "",
        ]
        if trained_with_geometry:
            lines += [
                "The weights were trained with a geometry branch, which this export leaves out.",
                "",
            ]
    else:
        encoder = saved["encoder"]
        assert isinstance(encoder, dict)
        lines += [
            "```python",
            "from spatialvlm.models.spatial_vlm import SpatialVLM",
            'model = SpatialVLM.from_pretrained("this/directory")',
            "```",
            "",
            f"Needs the frozen geometry encoder `{encoder['name']}` from `{encoder['source']}`, which keeps its own licence "
            f"and is not part of this directory. Fingerprint: `{encoder['fingerprint']}`. Without it the directory "
            "loads as a 2D model with `AutoModelForImageTextToText`.",
            "",
        ]
    if FAMILIES[family].uses_mrope:
        lines += [
            "Positions: text after an image or video starts behind the largest coordinate of everything before it "
            "(the rule of Qwen2-VL). Recent `transformers` releases ignore the temporal extent of a Qwen2.5-VL video "
            "there, so long videos get other text positions than in training.",
            "",
        ]
    return "\n".join(lines)


def push_to_hub(folder: str | Path, repo: str, *, private: bool = True) -> str:
    """Upload a directory; the token comes from the environment or ``hf auth login``.

    Args:
        folder: Exported directory.
        repo: ``owner/name``, created if needed.
        private: Visibility of a new repository.

    Returns:
        Address of the repository.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    url = api.create_repo(repo, private=private, exist_ok=True)
    api.upload_folder(folder_path=str(folder), repo_id=repo)
    return str(url)
