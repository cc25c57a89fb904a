"""Checkpoints that survive kill -9, bit flips, full disks, and a change of strategy or world size.

A save goes: free space -> ``step-N.tmp`` -> every rank streams its files, hashing while writing, fsync ->
sizes and hashes gathered -> rank 0 writes index, state, manifest, marker, fsync, rename, fsync of the parent
-> prune. The streaming may run in a thread on a copy while training goes on; what needs all ranks never does.
Only rank 0 renames and deletes, and only inside ``checkpoints/``. :mod:`.checkpoint_files` describes the files.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
from safetensors import SafetensorError, safe_open
from torch import Tensor

from spatialvlm.errors import CheckpointError
from spatialvlm.training.checkpoint_files import (
    FORMAT,
    SliceReader,
    checkpoints_in,
    file_digest,
    manifest_of,
    step_of,
    sync,
    verify,
    write_index,
    write_safetensors,
)
from spatialvlm.training.distributed import Processes
from spatialvlm.training.engines import Engine
from spatialvlm.training.faults import fault_point
from spatialvlm.training.optim import Group
from spatialvlm.training.slices import KINDS, Slice
from spatialvlm.training.state import pack_rng, unpack_rng, versions, write_json


def to_prune(
    found: Sequence[Path], *, keep_last: int, keep_every: int | None, newest_verified: Path | None
) -> list[Path]:
    """Which checkpoints may go: never the newest ``keep_last``, a kept multiple, or the last verified one."""
    protected = set(found[-max(2, keep_last) :])
    if keep_every:
        protected |= {p for p in found if step_of(p) % keep_every == 0}
    if newest_verified is not None:
        protected.add(newest_verified)
    return [p for p in found if p not in protected]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Small things that go into a checkpoint beside the slices."""

    state: Mapping[str, Any]
    """Counters of the run."""
    guard: Mapping[str, Any]
    config_yaml: str
    facts: Mapping[str, Any]
    """Recorded in the manifest: stage, lineage, base fingerprint, config hash, git."""


@dataclass(frozen=True, slots=True)
class PendingSave:
    """A checkpoint between :meth:`CheckpointStore.begin` and :meth:`CheckpointStore.commit`."""

    step: int
    engine: Engine
    snapshot: Snapshot
    rows: list[tuple[str, int, int]]
    """(name, offset, numel) of this rank's slices."""
    files: Future[dict[str, tuple[int, str]]]
    """This rank's files: name -> (bytes, sha256)."""


class CheckpointStore:
    """Saves, verifies, loads and prunes the checkpoints of one run.

    Args:
        folder: ``<run.dir>/checkpoints``.
        processes: Ranks.
        keep_last: Newest checkpoints kept, at least 2.
        keep_every: Multiples of this step are kept for good.
        verify_mode: ``full`` = every hash before use; ``sizes`` = names and sizes only.
    """

    def __init__(
        self,
        folder: Path,
        processes: Processes,
        *,
        keep_last: int = 2,
        keep_every: int | None = None,
        verify_mode: Literal["full", "sizes"] = "full",
    ) -> None:
        self.folder = folder
        self.processes = processes
        self.keep_last = keep_last
        self.keep_every = keep_every
        self.verify_mode = verify_mode
        self._newest: Path | None = None

    # ---- saving -------------------------------------------------------------------------------------

    def save(self, step: int, engine: Engine, snapshot: Snapshot) -> Path:
        """Write one checkpoint; on return it is complete on all ranks.

        Raises:
            CheckpointError: On every rank alike, when any rank could not write; older ones are untouched.
        """
        return self.commit(self.begin(step, engine, snapshot))

    def begin(
        self, step: int, engine: Engine, snapshot: Snapshot, *, background: bool = False
    ) -> PendingSave:
        """Start a checkpoint, on all ranks.

        Args:
            step: Number of finished steps.
            engine: Source of the slices.
            snapshot: Everything small.
            background: Copy this rank's state to host memory and let a thread write it; otherwise the files are
                written on return. Without memory for the copy they are too, and a warning says so.

        Raises:
            CheckpointError: On every rank alike, when the folder cannot be made.
        """
        rank, size = self.processes.rank, self.processes.size
        work = self._work(step)
        slices = engine.slices(loading=False)
        problem = ""
        if self.processes.is_main:
            try:
                self._begin(work, engine.groups)
            except OSError as error:
                problem = f"{work}: {error}"
        problem = self.processes.broadcast(problem)
        if problem:
            raise CheckpointError(f"Cannot start a checkpoint in {problem}")
        fault_point("save.tmp", step=step, rank=rank)
        suffix = f"{rank:05d}-of-{size:05d}.safetensors"
        tensors = {
            f"state-{suffix}": [
                (f"{kind}/{s.fqn}", s.views[kind]) for kind in KINDS for s in slices
            ],
            f"rng-{suffix}": list(pack_rng().items()),
        }
        background = background and _room_for_copy(tensors[f"state-{suffix}"])
        if background:
            tensors = {
                file: [(name, t.detach().to("cpu", copy=True)) for name, t in own]
                for file, own in tensors.items()
            }

        def write() -> dict[str, tuple[int, str]]:
            fault_point("save.write", step=step, rank=rank)
            files = {name: write_safetensors(work / name, own) for name, own in tensors.items()}
            fault_point("save.written", step=step, rank=rank)
            return files

        rows = [(s.fqn, s.offset, s.numel) for s in slices]
        files = _in_thread(write) if background else _now(write)
        return PendingSave(step, engine, snapshot, rows, files)

    def commit(self, pending: PendingSave) -> Path:
        """Wait for this rank's files and make the checkpoint valid, on all ranks.

        Raises:
            CheckpointError: On every rank alike, when any rank could not write; older ones are untouched.
        """
        step = pending.step
        final, work = self.path(step), self._work(step)
        problem, files = "", {}
        try:
            files = pending.files.result()
        except OSError as error:
            problem = f"rank {self.processes.rank}: {error}"
        answers = self.processes.gather((problem, files, pending.rows))
        problems = [p for p, _, _ in answers if p]
        if not problems and self.processes.is_main:
            try:
                self._commit(step, work, final, pending.engine, pending.snapshot, answers)
            except OSError as error:
                problems = [f"rank 0: {error}"]
        problems = self.processes.broadcast(problems)
        if problems:
            if self.processes.is_main:
                shutil.rmtree(work, ignore_errors=True)
            raise CheckpointError(
                f"Checkpoint {final} was not written ({'; '.join(problems)}). Older checkpoints are untouched. "
                "Free space or fix the file system, then resume."
            )
        self._newest = final
        if self.processes.is_main:
            self.prune()
        return final

    def path(self, step: int) -> Path:
        """Where the checkpoint after ``step`` steps is, or will be."""
        return self.folder / f"step-{step:08d}"

    def _work(self, step: int) -> Path:
        return self.path(step).with_suffix(".tmp")

    def _begin(self, work: Path, groups: Sequence[Group]) -> None:
        self._need_space(groups)
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()

    def require_space(self, groups: Sequence[Group]) -> None:
        """Refuse a run whose first checkpoint would not fit, before its first step.

        Raises:
            CheckpointError: Too little free space, or the folder cannot be made.
        """
        try:
            self._need_space(groups)
        except OSError as error:
            raise CheckpointError(f"{self.folder}: {error}") from error

    def _need_space(self, groups: Sequence[Group]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        expected = 12 * sum(group.numel for group in groups)
        free = shutil.disk_usage(self.folder).free
        if free < 1.1 * expected:
            raise OSError(
                errno.ENOSPC,
                f"{free / 1e6:,.0f} MB free, {1.1 * expected / 1e6:,.0f} MB needed. Free space, or lower "
                "checkpoint.keep_last; earlier checkpoints are untouched",
            )

    def _commit(
        self,
        step: int,
        work: Path,
        final: Path,
        engine: Engine,
        snapshot: Snapshot,
        answers: Sequence[tuple[str, dict[str, tuple[int, str]], list[tuple[str, int, int]]]],
    ) -> None:
        rank = self.processes.rank
        files = {name: entry for _, own, _ in answers for name, entry in own.items()}
        files["index.safetensors"] = write_index(
            work / "index.safetensors", engine.groups, [rows for _, _, rows in answers]
        )
        fault_point("save.index", step=step, rank=rank)
        write_json(
            work / "train_state.json",
            {"format": FORMAT, "counters": snapshot.state, "guard": snapshot.guard},
        )
        (work / "config.resolved.yaml").write_text(snapshot.config_yaml, encoding="utf-8")
        for name in ("train_state.json", "config.resolved.yaml"):
            sync(work / name)
            files[name] = file_digest(work / name)
        write_json(
            work / "manifest.json",
            {
                "format": FORMAT,
                "step": step,
                "world_size": self.processes.size,
                "strategy": engine.strategy,
                "versions": versions(),
                **snapshot.facts,
                "files": {name: list(files[name]) for name in sorted(files)},
            },
        )
        sync(work / "manifest.json")
        fault_point("save.manifest", step=step, rank=rank)
        marker = work / "COMPLETE"
        marker.write_text(file_digest(work / "manifest.json")[1])
        sync(marker)
        sync(work)
        fault_point("save.marker", step=step, rank=rank)
        if final.exists():
            shutil.rmtree(final)
        work.rename(final)
        fault_point("save.renamed", step=step, rank=rank)
        sync(self.folder)

    def prune(self) -> None:
        """Delete what is no longer kept; a failed delete is a warning."""
        found = checkpoints_in(self.folder)
        for path in to_prune(
            found,
            keep_last=self.keep_last,
            keep_every=self.keep_every,
            newest_verified=self._newest,
        ):
            doomed = path.with_name(path.name + ".tmp")
            try:
                path.rename(doomed)  # a half-deleted checkpoint is never taken for one
                fault_point(
                    "save.prune", step=step_of(self._newest or path), rank=self.processes.rank
                )
                shutil.rmtree(doomed)
            except OSError as error:
                warnings.warn(f"cannot delete the old checkpoint {path}: {error}", stacklevel=2)

    # ---- finding and loading --------------------------------------------------------------------------

    def newest_valid(self) -> tuple[Path | None, list[str]]:
        """Newest checkpoint that verifies, and why newer ones were rejected; equal on all ranks.

        Raises:
            CheckpointError: There are checkpoints and none of them verifies; starting over would hide the loss.
        """
        rejected = self.processes.on_main(self._remove_leftovers)
        damaged: list[str] = []
        for path in reversed(self.processes.on_main(lambda: checkpoints_in(self.folder))):
            problem = self._problem(path)
            if not problem:
                self._newest = path
                return path, rejected + damaged + self.set_aside_newer(step_of(path))
            damaged.append(problem)
        if damaged:
            raise CheckpointError(
                f"None of the {len(damaged)} checkpoints in {self.folder} can be used:\n  "
                + "\n  ".join(damaged)
                + "\nRestore one from a copy and start again, or give up this run: choose a new run.dir, or move "
                f"{self.folder.parent} away."
            )
        return None, rejected

    def _remove_leftovers(self) -> list[str]:
        removed = []
        for leftover in self.folder.glob("step-*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
            removed.append(f"{leftover.name}: left by an interrupted save or clean-up, removed")
        return removed

    def set_aside_newer(self, step: int) -> list[str]:
        """Rename checkpoints of later steps than the one a run goes on from; returns what was done.

        They are damaged, or belong to a past the run has left. Kept under their name, a later start would take them
        for this run's, and they would count among the ``keep_last`` while good ones are deleted.
        """

        def rename() -> list[str]:
            done = []
            for path in checkpoints_in(self.folder):
                if step_of(path) <= step:
                    continue
                names = (f"{path.name}.rejected{n or ''}" for n in itertools.count())
                aside = next(p for p in map(path.with_name, names) if not p.exists())
                path.rename(aside)
                done.append(f"{path.name}: later than step {step}, set aside as {aside.name}")
            return done

        return self.processes.on_main(rename)

    def _problem(self, path: Path) -> str:
        """First thing wrong with a checkpoint, or nothing; equal on all ranks, which divide the hashing."""
        problem = ""
        try:
            verify(path, mode=self.verify_mode, part=(self.processes.rank, self.processes.size))
        except (CheckpointError, OSError) as error:  # a disk may fail one rank alone
            problem = str(error)
        return next(filter(None, self.processes.gather(problem)), "")

    def verified(self, path: Path) -> Path:
        """``path`` when it verifies; equal on all ranks.

        Raises:
            CheckpointError: Naming the failing file.
        """
        if problem := self._problem(path):
            raise CheckpointError(problem)
        self._newest = path
        return path


def _now(write: Callable[[], dict[str, tuple[int, str]]]) -> Future[dict[str, tuple[int, str]]]:
    done: Future[dict[str, tuple[int, str]]] = Future()
    try:
        done.set_result(write())
    except OSError as error:
        done.set_exception(error)
    return done


def _in_thread(
    write: Callable[[], dict[str, tuple[int, str]]],
) -> Future[dict[str, tuple[int, str]]]:
    writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
    done = writer.submit(write)
    writer.shutdown(wait=False)
    return done


def _room_for_copy(tensors: Iterable[tuple[str, Tensor]]) -> bool:
    needed = 1.1 * sum(tensor.nbytes for _, tensor in tensors)
    free: float = psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if needed > free:
        warnings.warn(
            f"a background save copies {needed / 1e9:.1f} GB to host memory and {free / 1e9:.1f} GB are free for this "
            "process: training waits for this one. Set checkpoint.background: false to save like this without trying.",
            stacklevel=3,
        )
    return needed <= free


def load_slices(path: Path, slices: Sequence[Slice], groups: Sequence[Group]) -> None:
    """Fill an engine's views from a checkpoint written by any strategy and world size.

    Raises:
        CheckpointError: The trainable parameters differ by name or shape.
    """
    reader = SliceReader(path)
    planned = {fqn: shape for g in groups for fqn, shape in zip(g.fqns, g.shapes, strict=True)}
    if planned != reader.index.shapes:
        only_here = sorted(set(planned) - set(reader.index.shapes))[:3]
        only_there = sorted(set(reader.index.shapes) - set(planned))[:3]
        other = [
            n for n in planned if n in reader.index.shapes and planned[n] != reader.index.shapes[n]
        ][:3]
        raise CheckpointError(
            f"{path} holds other trainable parameters than this run: only in the run {only_here}, only in the "
            f"checkpoint {only_there}, other shape {other}. Use the configuration it was written with."
        )
    for piece in slices:
        for kind in KINDS:
            piece.views[kind].copy_(
                reader.read(kind, piece.fqn, piece.offset, piece.offset + piece.numel)
            )


def load_checkpoint(path: Path, engine: Engine, processes: Processes) -> dict[str, Any]:
    """Restore weights, moments and (same world size) random states; returns ``train_state.json``.

    Raises:
        CheckpointError: Missing counters or random states, or other parameters.
    """
    try:
        state: dict[str, Any] = json.loads((path / "train_state.json").read_text())
        counters = state["counters"]
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise CheckpointError(f"{path}: train_state.json cannot be used: {error}") from error
    load_slices(path, engine.slices(loading=True), engine.groups)
    engine.after_load(int(counters["adam_step"]))
    state["same_world"] = manifest_of(path)["world_size"] == processes.size
    return state


def restore_rng(path: Path, processes: Processes) -> None:
    """Continue this rank's random generators exactly where the checkpoint left them.

    Raises:
        CheckpointError: The file is missing or does not cover every generator.
    """
    file = path / f"rng-{processes.rank:05d}-of-{processes.size:05d}.safetensors"
    try:
        with safe_open(file, framework="pt") as opened:
            unpack_rng({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
