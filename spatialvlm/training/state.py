"""Everything that changes while a run goes on, and the files that say so: counters, RNG, ``run.json``."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spatialvlm import __version__
from spatialvlm.errors import CheckpointError, LaunchError
from spatialvlm.training.lock import FolderLock


@dataclass(slots=True)
class TrainState:
    """Counters of a run; saved with every checkpoint, restored on resume."""

    step: int = 0
    """Optimizer steps done, skipped and empty ones included."""
    total_steps: int = 0
    """Steps of the whole run, known before the first."""
    adam_step: int = 0
    """Steps that changed the weights (Adam's bias-correction count)."""
    samples: int = 0
    tokens: int = 0
    """Real tokens of the language model, no padding, no dummies."""
    label_tokens: int = 0
    skipped: int = 0
    empty: int = 0
    spikes: int = 0
    flops: float = 0.0
    wall_s: float = 0.0
    """Training time over all attempts."""
    attempt: int = 0
    """Starts of this run; replayed steps carry the higher number in the log."""
    loader: dict[str, Any] = field(default_factory=dict)
    """Position of the data path at the last step border."""
    trackers: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """JSON values for ``train_state.json``."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TrainState:
        """Inverse of :meth:`to_json`.

        Raises:
            CheckpointError: A counter or the position of the data path is missing, or a counter is unknown.
        """
        known = {f.name for f in fields(cls)}
        if known != set(values):
            raise CheckpointError(
                f"train_state.json does not hold the counters of this version: {sorted(known - set(values))} missing, "
                f"{sorted(set(values) - known)} unknown. Resume with the version that wrote the checkpoint."
            )
        state = cls(**values)
        if state.step and not state.loader:
            raise CheckpointError(
                f"train_state.json of step {state.step} holds no position of the data path; going on would repeat "
                "samples. Resume from another checkpoint with run.resume=PATH."
            )
        return state


def pack_rng() -> dict[str, Tensor]:
    """States of the Python, NumPy, Torch and CUDA generators as integer tensors."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002
    assert name == "MT19937"
    packed = {
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([0.0 if gauss is None else gauss, float(gauss is not None)], dtype=torch.float64),
        "numpy": torch.tensor([*np.asarray(keys).tolist(), position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }  # fmt: skip
    if torch.cuda.is_available():
        packed["cuda"] = torch.cuda.get_rng_state()
    return packed


def unpack_rng(packed: Mapping[str, Tensor]) -> None:
    """Restore :func:`pack_rng`.

    Raises:
        CheckpointError: A generator of this process has no saved state.
    """
    needed = {"python", "python_gauss", "numpy", "numpy_gauss", "torch"}
    if torch.cuda.is_available():
        needed.add("cuda")
    if missing := sorted(needed - set(packed)):
        raise CheckpointError(f"The checkpoint holds no random state for {missing}.")
    version, *words = packed["python"].tolist()
    gauss, has = packed["python_gauss"].tolist()
    random.setstate((version, tuple(words), gauss if has else None))
    *keys, position, has_gauss = packed["numpy"].tolist()
    np.random.set_state(  # noqa: NPY002
        (
            "MT19937",
            np.array(keys, dtype=np.uint32),
            position,
            has_gauss,
            float(packed["numpy_gauss"]),
        )
    )
    torch.set_rng_state(packed["torch"].to(torch.uint8))
    if "cuda" in packed and torch.cuda.is_available():
        torch.cuda.set_rng_state(packed["cuda"].to(torch.uint8))


def seed_everything(seed: int, *, step: int = 0, rank: int = 0) -> None:
    """Seed all generators from (seed, step, rank) through Philox, so ranks and resumes never share a stream."""
    stream = np.random.Generator(np.random.Philox(key=[seed, (step << 20) + rank]))
    values = stream.integers(0, 2**31 - 1, size=3)
    random.seed(int(values[0]))
    np.random.seed(int(values[1]))  # noqa: NPY002
    torch.manual_seed(int(values[2]))


def write_json(path: Path, value: Any) -> None:
    """Write through a temporary name, so that a reader never sees half a file."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


class RunFolder:
    """The directory of a run: ``run.json``, its lock, and the places of everything else. Rank 0 only."""

    def __init__(self, path: Path, *, private: bool) -> None:
        self.path = path
        self.private = private
        self._lock = FolderLock(path)
        self._record: dict[str, Any] = {}

    def open(self) -> dict[str, Any]:
        """Create or enter the folder and lock it; returns the previous ``run.json`` or ``{}``.

        Raises:
            LaunchError: The folder cannot be written, or a live run uses it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700 if self.private else 0o777)
            probe = self.path / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            msg = f"run.dir={self.path} cannot be written: {error}. Choose another directory."
            raise LaunchError(msg) from error
        self._lock.take()
        record_path = self.path / "run.json"
        previous: dict[str, Any] = {}
        if record_path.is_file():
            try:
                previous = dict(json.loads(record_path.read_text(encoding="utf-8")))
            except (ValueError, TypeError) as error:
                self.unlock()
                msg = f"{record_path} is no record of a run ({error}); move it away or choose another run.dir."
                raise LaunchError(msg) from error
        self._record = dict(previous)
        return previous

    def unlock(self) -> None:
        """Give the folder free."""
        self._lock.release()

    def record(self, **changes: Any) -> None:
        """Update ``run.json`` atomically."""
        self._record.update(changes, updated=time.strftime("%Y-%m-%dT%H:%M:%S%z"))
        write_json(self.path / "run.json", self._record)


def versions() -> dict[str, str]:
    """Versions of what decides numbers."""
    names = (
        "torch",
        "transformers",
        "accelerate",
        "deepspeed",
        "safetensors",
        "peft",
        "numpy",
    )
    return {"spatialvlm": __version__} | {name: metadata.version(name) for name in names}


def code_digest() -> str:
    """Identity of this package's source files, commits or not."""
    package = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(str(file.relative_to(package)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def git_revision(folder: Path) -> dict[str, Any]:
    """Commit and dirty flag of a checkout; empty strings outside of one."""
    commands = {"commit": ["rev-parse", "HEAD"], "status": ["status", "--porcelain"]}
    found: dict[str, str] = {}
    for name, command in commands.items():
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *command],
                capture_output=True,
                text=True,
                timeout=10,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return {"commit": "", "dirty": False}
        found[name] = done.stdout.strip() if done.returncode == 0 else ""
    return {"commit": found["commit"], "dirty": bool(found["status"])}


def environment(
    *, world_size: int, hosts: int, seed: int, recipe: str, overrides: Sequence[str]
) -> dict[str, Any]:
    """What ``environment.json`` holds; environment variables are never part of it.

    Args:
        world_size: Number of processes.
        hosts: Number of machines.
        seed: ``run.seed``.
        recipe: The YAML file as it was typed.
        overrides: Command-line overrides; only their keys are written.
    """
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "git": git_revision(Path(__file__).resolve().parents[2]),
        "versions": versions(),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cuda": torch.version.cuda if gpus else None,
        "driver": _first_line("/proc/driver/nvidia/version", "NVRM version:"),
        "gpus": gpus,
        "cpu": _first_line("/proc/cpuinfo", "model name") or platform.machine(),
        "cpus": os.cpu_count(),
        "ram_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "threads": torch.get_num_threads(),
        "world_size": world_size,
        "hosts": hosts,
        "seed": seed,
        "recipe": recipe,
        "overridden": sorted(item.partition("=")[0] for item in overrides),
    }


def _first_line(path: str, start: str) -> str | None:
    """Rest of the first line of a system file that begins with ``start``; ``None`` where there is no such file."""
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    found = (line.removeprefix(start).strip(" :\t") for line in lines if line.startswith(start))
    return next(found, None)
