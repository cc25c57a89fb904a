"""What a checkpoint consists of on disk: its files, their hashes, and where every piece of a parameter is.

```
checkpoints/step-00001200/
  state-00003-of-00008.safetensors   param/<fqn>, exp_avg/<fqn>, exp_avg_sq/<fqn>: 1-D fp32 slices
  rng-00003-of-00008.safetensors     random generators of that rank
  index.safetensors                  rows (parameter, file, offset, numel), names, logical shapes
  train_state.json                   counters, loader position, guard
  config.resolved.yaml
  manifest.json                      {file: [bytes, sha256]}, versions, world size, strategy
  COMPLETE                           sha256 of manifest.json
```

Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from spatialvlm.errors import CheckpointError
from spatialvlm.training.optim import Group

FORMAT = 1
_DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64", torch.uint8: "U8"}


def write_safetensors(path: Path, tensors: Iterable[tuple[str, Tensor]]) -> tuple[int, str]:
    """Stream tensors into one safetensors file; a second thread hashes meanwhile. Returns (bytes, sha256).

    Unlike the library's writer it never holds more than one tensor on the host.
    """
    items = list(tensors)
    header: dict[str, Any] = {}
    at = 0
    for name, tensor in items:
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + size],
        }
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file, ThreadPoolExecutor(1) as hasher:
        for chunk in (struct.pack("<Q", len(text)), text):
            digest.update(chunk)
            file.write(chunk)
        for _, tensor in items:
            if not tensor.numel():
                continue
            data = tensor.detach().cpu().contiguous().numpy().data.cast("B")
            hashed = hasher.submit(digest.update, data)
            file.write(data)
            hashed.result()
        file.flush()
        os.fsync(file.fileno())
    return 8 + len(text) + at, digest.hexdigest()


def file_digest(path: Path) -> tuple[int, str]:
    """Size and sha256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return path.stat().st_size, digest.hexdigest()


def sync(path: Path) -> None:
    """Return when a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def step_of(path: Path) -> int:
    """Step number in a checkpoint's name."""
    return int(path.name.removeprefix("step-"))


def manifest_of(path: Path) -> dict[str, Any]:
    """What a verified checkpoint says about itself."""
    manifest: dict[str, Any] = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    return manifest


def checkpoints_in(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first (finished by name; :func:`verify` decides)."""
    return sorted(
        p for p in folder.glob("step-" + "[0-9]" * 8) if p.is_dir() and not p.is_symlink()
    )


def verify(
    path: Path, *, mode: Literal["full", "sizes"] = "full", part: tuple[int, int] = (0, 1)
) -> dict[str, Any]:
    """Check a checkpoint before anything is read from it; returns the manifest.

    Args:
        path: ``step-*`` folder.
        mode: ``full`` = every hash; ``sizes`` = names and sizes only.
        part: (i, n): hash only every n-th file from the i-th, because other processes hash the others.

    Raises:
        CheckpointError: Naming the checkpoint and the first file that is missing or differs.
    """
    if not path.is_dir() or path.is_symlink() or any(p.is_symlink() for p in path.iterdir()):
        raise CheckpointError(f"{path} is not a checkpoint directory without symbolic links.")
    try:
        marker = (path / "COMPLETE").read_text().strip()
        manifest_bytes = (path / "manifest.json").read_bytes()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: incomplete, {error}") from error
    if hashlib.sha256(manifest_bytes).hexdigest() != marker:
        raise CheckpointError(f"{path}: manifest.json does not match COMPLETE.")
    manifest: dict[str, Any] = json.loads(manifest_bytes)
    if manifest["format"] != FORMAT:
        raise CheckpointError(
            f"{path}: format {manifest['format']}, this version reads {FORMAT}. Resume with the version that wrote it."
        )
    for number, (name, (size, digest)) in enumerate(manifest["files"].items()):
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{path}: {name} is missing.")
        if file.stat().st_size != size:
            raise CheckpointError(
                f"{path}: {name} has {file.stat().st_size} bytes, expected {size}."
            )
        mine = mode == "full" and number % part[1] == part[0]
        if mine and file_digest(file)[1] != digest:
            raise CheckpointError(f"{path}: {name} has another sha256 than when it was written.")
    Index.read(path)
    return manifest


def write_index(
    path: Path, groups: Sequence[Group], rows_of_rank: Sequence[Sequence[tuple[str, int, int]]]
) -> tuple[int, str]:
    """Write ``index.safetensors``; returns (bytes, sha256).

    Args:
        path: The file.
        groups: Names and logical shapes.
        rows_of_rank: (name, offset, numel) of every slice, by rank.
    """
    names = [fqn for group in groups for fqn in group.fqns]
    shapes = [list(shape) for group in groups for shape in group.shapes]
    number = {fqn: i for i, fqn in enumerate(names)}
    rows = [
        (number[fqn], rank, offset, numel)
        for rank, own in enumerate(rows_of_rank)
        for fqn, offset, numel in own
    ]
    table = json.dumps({"names": names, "shapes": shapes, "files": len(rows_of_rank)}).encode()
    tensors = {
        "rows": torch.tensor(sorted(rows), dtype=torch.int64).view(-1, 4),
        "table": torch.frombuffer(bytearray(table), dtype=torch.uint8),
    }
    return write_safetensors(path, tensors.items())


@dataclass(frozen=True, slots=True)
class Index:
    """Which file holds which piece of which parameter."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    pieces: dict[str, list[tuple[int, int, int]]]
    """fqn -> (offset, numel, file), ascending; they tile the parameter exactly once."""
    num_files: int

    @classmethod
    def read(cls, path: Path) -> Index:
        """Read and check ``index.safetensors`` of a checkpoint.

        Raises:
            CheckpointError: Unreadable, or the pieces of a parameter overlap or leave a gap.
        """
        try:
            with safe_open(path / "index.safetensors", framework="pt") as file:
                rows = file.get_tensor("rows").tolist()
                table = json.loads(bytes(file.get_tensor("table").numpy()).decode())
        except (OSError, SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path}: index.safetensors cannot be read: {error}") from error
        names = table["names"]
        shapes = {n: tuple(s) for n, s in zip(names, table["shapes"], strict=True)}
        pieces: dict[str, list[tuple[int, int, int]]] = {n: [] for n in names}
        for number, file_number, offset, numel in rows:
            pieces[names[number]].append((offset, numel, file_number))
        for name, own in pieces.items():
            own.sort()
            at = 0
            for offset, numel, _ in own:
                if offset != at:
                    raise CheckpointError(
                        f"{path}: slices of {name} overlap or leave a gap at element {at}."
                    )
                at += numel
            if at != int(np.prod(shapes[name], dtype=np.int64)):
                raise CheckpointError(
                    f"{path}: slices of {name} hold {at} elements, shape {shapes[name]}."
                )
        return cls(path, shapes, pieces, table["files"])

    def file(self, number: int) -> Path:
        """State file of the rank that wrote it."""
        return self.path / f"state-{number:05d}-of-{self.num_files:05d}.safetensors"


class SliceReader:
    """Reads ranges of flattened parameters from a checkpoint through memory maps."""

    def __init__(self, path: Path) -> None:
        self.index = Index.read(path)
        self._open: dict[int, Any] = {}

    def read(self, kind: str, fqn: str, start: int, stop: int) -> Tensor:
        """Elements ``[start, stop)`` of one kind of one parameter, fp32 1-D."""
        out = torch.empty(stop - start, dtype=torch.float32)
        for offset, numel, number in self.index.pieces[fqn]:
            left, right = max(start, offset), min(stop, offset + numel)
            if left >= right:
                continue
            if number not in self._open:
                self._open[number] = safe_open(self.index.file(number), framework="pt")
            piece = self._open[number].get_slice(f"{kind}/{fqn}")[left - offset : right - offset]
            out[left - start : right - start] = piece
        return out

    def tensor(self, fqn: str) -> Tensor:
        """A whole parameter in its logical shape, fp32."""
        shape = self.index.shapes[fqn]
        return self.read("param", fqn, 0, int(np.prod(shape, dtype=np.int64))).view(shape)
