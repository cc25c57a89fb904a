"""Where the initial weights of a run come from: checked, fingerprinted, and remembered as lineage."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spatialvlm.config import TrainConfig, read_yaml
from spatialvlm.config.geometry import PositionsConfig
from spatialvlm.errors import CheckpointError, ConfigError
from spatialvlm.training.checkpoint_files import file_digest, manifest_of


def check_base(
    config: TrainConfig, *, trust_remote_code: bool = False
) -> tuple[Path, dict[str, Any]]:
    """Where the initial weights come from; a stage-1 export must be a finished one.

    Args:
        config: Recipe.
        trust_remote_code: The user allowed the directory's own Python files.

    Returns:
        The directory, and where it comes from (path or hub id, revision, fingerprint, stage, trusted code).

    Raises:
        CheckpointError: Missing, not a model directory, pickled weights, code that nobody allowed, or an unfinished
            stage.
        ConfigError: Another backbone than ``model.backbone``, or code without a fixed revision.
    """
    source = config.model.init_from
    path = Path(source)
    lineage: dict[str, Any] = {"path": source}
    if not path.exists():
        if (
            source.count("/") == 1
            and not source.startswith((".", "/", "~"))
            and path.parent.name != "runs"
        ):
            revision = config.model.revision
            path = _download(source, revision, code=trust_remote_code)
            _check_backbone(config, path)
            lineage = {"hub": source, "revision": revision, "fingerprint": base_fingerprint(path)}
            return path, lineage | _remote_code(config, path, trusted=trust_remote_code)
        raise CheckpointError(
            f"model.init_from={source} does not exist. Give a model directory (a previous stage's final/), or a hub "
            "id such as Qwen/Qwen2.5-VL-7B-Instruct."
        )
    if not (path / "config.json").is_file():
        hint = (
            f" Did you mean {path / 'final'}?" if (path / "final" / "config.json").is_file() else ""
        )
        raise CheckpointError(f"model.init_from={source} holds no config.json, so no model.{hint}")
    if not list(path.glob("*.safetensors")):
        pickled = [p.name for p in [*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")]]
        raise CheckpointError(
            f"model.init_from={source} holds no safetensors files (found {pickled or 'no weights'}). Pickled weights "
            "can run code and are refused; convert them with safetensors first."
        )
    _check_backbone(config, path)
    lineage |= {"fingerprint": base_fingerprint(path)}
    lineage |= _remote_code(config, path, trusted=trust_remote_code)
    record_path = path.parent / "run.json"
    if record_path.is_file():
        record = _read_json(record_path, "record of a run")
        if record.get("state") != "finished" and not config.model.allow_unfinished:
            raise CheckpointError(
                f"model.init_from={source} belongs to a run that is {record.get('state')!r} at step "
                f"{record.get('step')}. Finish it, or set model.allow_unfinished=true."
            )
        lineage |= {"stage": record.get("stage"), "step": record.get("step")}
        lineage |= _check_manifest(path)
        lineage |= _check_positions(config, path.parent / "config.resolved.yaml")
    return path, lineage


def _check_positions(config: TrainConfig, saved: Path) -> dict[str, Any]:
    """A stage that follows another one must count positions like it; returns the hash of the earlier settings."""
    if not saved.is_file():
        return {}
    keys = ("time_2d", "text_after_vision")  # the third one concerns spatial tokens only
    geometry = read_yaml(saved).get("geometry") or {}
    before = PositionsConfig(**geometry.get("positions", {}))
    now = PositionsConfig() if config.geometry is None else config.geometry.positions
    for key in keys:
        if getattr(before, key) != getattr(now, key):
            raise ConfigError(
                f"geometry.positions.{key}={getattr(now, key)}, but model.init_from={config.model.init_from} was trained "
                f"with {getattr(before, key)}. Use the same value in both stages."
            )
    return {"config_sha256": hashlib.sha256(saved.read_bytes()).hexdigest()}


def _check_backbone(config: TrainConfig, path: Path) -> None:
    expected = backbone_config(config.model.backbone).get("model_type")
    values = _read_json(path / "config.json", "model configuration")
    found = values.get("model_type")
    if values.get("quantization_config"):
        raise ConfigError(
            f"model.init_from={path} holds quantised weights; they cannot be trained, with adapters or without. Use the "
            "unquantised model; configs/*/qwen2_5vl_3b_lora.yaml fits 24 GB."
        )
    if expected != found:
        raise ConfigError(
            f"model.init_from={path} is a {found!r} model, model.backbone={config.model.backbone} a {expected!r}. "
            "Change one of them."
        )


def other_size(config: TrainConfig, folder: Path) -> str | None:
    """A warning when a model directory is another size of the family than ``model.backbone``."""
    found = _read_json(folder / "config.json", "model configuration")
    # The hub's Qwen2.5-VL has no section for the language model.
    found = found.get("text_config") or found
    expected = backbone_config(config.model.backbone)["text_config"]
    sizes = [(text.get("num_hidden_layers"), text.get("hidden_size")) for text in (found, expected)]
    if sizes[0] == sizes[1]:
        return None
    (layers, width), (own_layers, own_width) = sizes
    return (
        f"model.init_from={config.model.init_from} has {layers} layers of width {width}, model.backbone="
        f"{config.model.backbone} {own_layers} of {own_width}; estimates of memory and time are for the latter"
    )


def _remote_code(config: TrainConfig, folder: Path, *, trusted: bool) -> dict[str, Any]:
    """``{"code": {file: sha256}}`` of a directory whose configuration names Python files of its own, else ``{}``."""
    asks = [
        file.name
        for file in sorted(folder.glob("*.json"))
        if file.stat().st_size < 1 << 20 and b'"auto_map"' in file.read_bytes()
    ]
    if not asks:
        return {}
    files = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.glob("*.py"))
    }
    if not trusted:
        raise CheckpointError(
            f"model.init_from={config.model.init_from} asks to run its own code ({', '.join(asks)} name an auto_map, "
            f"files {sorted(files) or 'on the hub'}); that is refused. No supported family needs it: delete the "
            "auto_map entries of a local copy. If you have read the code, pass --trust-remote-code and set "
            "model.revision to the 40-digit commit you have read."
        )
    if not re.fullmatch("[0-9a-f]{40}", config.model.revision or ""):
        raise ConfigError(
            f"--trust-remote-code needs model.revision, the 40 hexadecimal digits of the commit you have read, got "
            f"{config.model.revision!r}."
        )
    return {"code": files}


def _read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON object beside or inside a model directory."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        msg = f"{path} is no {what} ({error}); download or export the model again."
        raise CheckpointError(msg) from error


def backbone_file(name: str) -> Path:
    """``configs/backbones/<name>.json``.

    Raises:
        ConfigError: There is no such file; the known names are listed.
    """
    folder = Path(__file__).resolve().parents[2] / "configs" / "backbones"
    path = folder / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.json")))
        raise ConfigError(f"model.backbone={name!r} is not one of: {known}")
    return path


def backbone_config(name: str) -> dict[str, Any]:
    """Contents of :func:`backbone_file`."""
    values: dict[str, Any] = json.loads(backbone_file(name).read_text())
    return values


def _download(name: str, revision: str | None, *, code: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja", *(["*.py"] if code else [])]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"model.init_from={name}: neither a directory here nor reachable on the hub ({error}). Download it once "
            "with network access, or give a local directory."
        ) from error


def base_fingerprint(folder: Path) -> str:
    """Identity of a model directory: names and sizes of its weight files, first and last MiB of each."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as opened:
            digest.update(opened.read(1 << 20))
            opened.seek(max(0, size - (1 << 20)))
            digest.update(opened.read(1 << 20))
    return digest.hexdigest()


def folder_manifest(folder: Path) -> dict[str, list[Any]]:
    """Size and sha256 of every file of a model directory."""
    return {
        str(file.relative_to(folder)): list(file_digest(file))
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def _check_manifest(folder: Path) -> dict[str, Any]:
    """``{"manifest_sha256": ...}`` when every exported file is as it was written; ``{}`` without a list of them."""
    path = folder.parent / f"{folder.name}.manifest.json"
    if not path.is_file():
        return {}
    expected = _read_json(path, "list of exported files")
    again = "Copy it again, or export a checkpoint of that run with tools/export.py."
    for name, (size, digest) in expected.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size:
            raise CheckpointError(
                f"{file} is missing or has another size than when it was exported (expected {size} bytes). {again}"
            )
        if file_digest(file)[1] != digest:
            raise CheckpointError(f"{file} has another sha256 than when it was exported. {again}")
    return {"manifest_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def same_base(config: TrainConfig, lineage: Mapping[str, Any], checkpoint: Path) -> None:
    """Frozen weights are not in a checkpoint, so it is of use only on the weights it was made from.

    Args:
        config: Recipe.
        lineage: Of the weights as they are now, from :func:`check_base`.
        checkpoint: ``step-*`` folder; older ones that started from the hub hold no fingerprint and pass.

    Raises:
        CheckpointError: The weights changed.
    """
    manifest = manifest_of(checkpoint)
    before, now = manifest["lineage"].get("fingerprint"), lineage["fingerprint"]
    if before not in (None, now):
        raise CheckpointError(
            f"{checkpoint} was trained from other weights than model.init_from={config.model.init_from} holds now "
            f"(fingerprint {before[:12]}, now {now[:12]}). Put the original weights back, or start a new run.dir from "
            "the changed ones."
        )
