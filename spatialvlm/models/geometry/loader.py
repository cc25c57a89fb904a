"""Weights of a frozen encoder, read tensor by tensor from a folder, a file, or the hub.

Only the tensors that are asked for are read, so heads and unused layers cost no memory. Nothing is
unpickled beyond tensors.
"""

import hashlib
import json
import logging
import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from spatialvlm.errors import CheckpointError, FingerprintError

logger = logging.getLogger(__name__)

Shape = tuple[int, ...]
FILE_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "model.pt",
    "pytorch_model.bin",
)
TORCH_SUFFIXES = (".pt", ".pth", ".bin")
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
NUMERICS_VERSION = 1
"""Raise it when the same weights start to give different features."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Named tensors, read on demand.

    Attributes:
        files: Files they come from; none for tensors in memory.
        shapes: Name -> shape of everything in the files.
        read: Reads one tensor on the CPU, in the dtype of the file.
    """

    files: tuple[Path, ...]
    shapes: Mapping[str, Shape]
    read: Callable[[str], Tensor]


def open_weights(source: str | Path, revision: str | None = None) -> Weights:
    """Find and open the weights of an encoder.

    Args:
        source: Folder, file (``.safetensors``, ``.pt``, ``.pth``, ``.bin``) or hub id.
        revision: Hub revision; ``None`` = default branch.

    Raises:
        CheckpointError: Nothing there, unreadable, gated, offline, or not a plain tensor file.
    """
    path = _locate(source, revision)
    if path.suffix == ".json":
        return _open_safetensors(_shards(path))
    if path.suffix == ".safetensors":
        return _open_safetensors([path])
    if path.suffix in TORCH_SUFFIXES:
        return _open_torch(path)
    raise CheckpointError(
        f"{path} is not a weight file: expected .safetensors, {', '.join(TORCH_SUFFIXES)}"
    )


def check_names(needed: Mapping[str, Shape], found: Mapping[str, Shape], origin: str) -> None:
    """Require every needed tensor with its shape.

    Args:
        needed: Name -> expected shape.
        found: Name -> shape in the file; other names are fine.
        origin: Where the weights come from, for the message.

    Raises:
        CheckpointError: A tensor is missing or has another shape.
    """
    missing = [name for name in needed if name not in found]
    if missing:
        raise CheckpointError(
            f"{origin} lacks {len(missing)} of {len(needed)} tensors: {', '.join(missing[:5])}"
            f"{', ...' if len(missing) > 5 else ''}. Download the complete file again"
        )
    for name, shape in needed.items():
        if tuple(found[name]) != tuple(shape):
            raise CheckpointError(
                f"{origin}: tensor {name} has shape {tuple(found[name])}, expected {tuple(shape)}"
            )


def encoder_fingerprint(
    name: str,
    config: Mapping[str, Any],
    weights: Weights,
    tensors: Iterable[str],
    prefix: str = "",
) -> str:
    """Identity of encoder, configuration, numerics and loaded weights.

    In a distributed run this is a collective call: rank 0 reads and hashes, the others receive its result.

    Args:
        name: Name of the encoder.
        config: Everything that changes features, as JSON values.
        weights: The files.
        tensors: Names of the tensors in use, without prefix.
        prefix: What stands before these names in the files; not part of the identity.

    Returns:
        64 hexadecimal digits.
    """
    distributed = dist.is_available() and dist.is_initialized()
    result = [""]
    if not distributed or dist.get_rank() == 0:
        content = {
            "encoder": name,
            "config": dict(config),
            "numerics": NUMERICS_VERSION,
            "weights": _weights_hash(weights, sorted(tensors), prefix),
        }
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        result[0] = hashlib.sha256(text.encode()).hexdigest()
    if distributed:
        dist.broadcast_object_list(result)
    return result[0]


def check_fingerprint(expected: str, actual: str, *, allow_mismatch: bool) -> None:
    """Compare a checkpoint's encoder with the one that was loaded.

    Raises:
        FingerprintError: They differ and a mismatch is not allowed.
    """
    if expected == actual:
        return
    message = (
        f"the geometry encoder has fingerprint {actual}, the checkpoint was trained with {expected}. "
        "Point geometry.source at the original weights and precision"
    )
    if not allow_mismatch:
        raise FingerprintError(f"{message}, or set geometry.allow_encoder_mismatch=true")
    logger.warning("%s; continuing because geometry.allow_encoder_mismatch=true", message)


_hashes: dict[tuple[Any, ...], str] = {}


def _weights_hash(weights: Weights, names: list[str], prefix: str) -> str:
    """SHA-256 over names, dtypes, shapes and bytes; once per state of the files, if there are any."""
    stats = [(str(file.resolve()), file.stat()) for file in weights.files]
    key = (
        tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in stats),
        tuple(names),
        prefix,
    )
    if key not in _hashes or not weights.files:
        digest = hashlib.sha256()
        for name in names:
            tensor = weights.read(prefix + name).contiguous()
            digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        _hashes[key] = digest.hexdigest()
    return _hashes[key]


def _locate(source: str | Path, revision: str | None) -> Path:
    """The one file to open: weights, or the index of a sharded checkpoint."""
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        for name in FILE_NAMES:
            if (path / name).is_file():
                return path / name
        raise CheckpointError(f"{path} holds none of {', '.join(FILE_NAMES)}")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and not path.suffix:
        return _download(str(source), revision)
    raise CheckpointError(
        f"geometry.source={source} is neither a file, a folder, nor a hub id; give the encoder's weights, for example "
        "facebook/VGGT-1B (geometry.source in training, model.geometry_source in evaluation)"
    )


def _download(repo: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    help_text = (
        f"See https://huggingface.co/{repo} for its licence and access, or download it elsewhere and "
        "set geometry.source to the local folder"
    )
    try:
        for name in FILE_NAMES:
            try:
                path = Path(hf_hub_download(repo, name, revision=revision))
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError:
                continue
            if path.suffix == ".json":
                for shard in sorted(set(_read_index(path).values())):
                    hf_hub_download(repo, shard, revision=revision)
            return path
    except GatedRepoError as error:
        raise CheckpointError(
            f"{repo} is gated and this account has no access. {help_text}"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{repo} has no revision {revision!r}. {help_text}") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(f"{repo} does not exist, or is private. {help_text}") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"{repo} is not in the local cache and the hub cannot be reached. {help_text}"
        ) from error
    raise CheckpointError(f"{repo} holds none of {', '.join(FILE_NAMES)}. {help_text}")


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map: dict[str, str] = json.loads(path.read_text())["weight_map"]
    except (json.JSONDecodeError, KeyError) as error:
        raise CheckpointError(f"{path} is not a checkpoint index: {error}") from error
    return weight_map


def _shards(index: Path) -> list[Path]:
    files = [index.parent / name for name in sorted(set(_read_index(index).values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(f"{index} names missing shards: {', '.join(missing)}")
    return files


def _open_safetensors(files: list[Path]) -> Weights:
    shapes: dict[str, Shape] = {}
    where: dict[str, tuple[Path, int, int, str]] = {}  # file, start, stop, dtype
    for file in files:
        try:
            with safe_open(
                file, framework="pt"
            ) as handle:  # checks offsets, sizes and completeness
                handle.keys()
            header, data = _read_header(file)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file} cannot be read as safetensors ({error}); it may be truncated, download it again"
            ) from error
        for name, entry in header.items():
            shapes[name] = tuple(entry["shape"])
            start, stop = entry["data_offsets"]
            where[name] = (file, data + start, data + stop, entry["dtype"])

    def read(name: str) -> Tensor:
        # Plain reads: with a memory map every page that was touched stays in this process.
        file, start, stop, kind = where[name]
        if kind not in SAFETENSORS_DTYPES:
            raise CheckpointError(
                f"{file}: tensor {name} is stored as {kind}, expected one of "
                f"{', '.join(SAFETENSORS_DTYPES)}; convert the checkpoint first"
            )
        content = bytearray(stop - start)
        with file.open("rb") as handle:
            handle.seek(start)
            handle.readinto(content)
        return torch.frombuffer(content, dtype=SAFETENSORS_DTYPES[kind]).view(shapes[name])

    return Weights(tuple(files), shapes, read)


def _read_header(file: Path) -> tuple[dict[str, Any], int]:
    """Entries of a safetensors file, and where its data begins."""
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        header: dict[str, Any] = json.loads(handle.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def _open_torch(path: Path) -> Weights:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds Python objects besides tensors and was refused, because loading them can run "
            "code. Convert it to .safetensors"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a PyTorch file ({error}); it may be truncated"
        ) from error
    if isinstance(content, dict):
        for wrapper in ("model", "state_dict"):
            if isinstance(content.get(wrapper), dict):
                content = content[wrapper]
                break
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected named tensors")
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    return Weights((path,), shapes, tensors.__getitem__)
