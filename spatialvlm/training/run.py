"""Opening and closing a run: its folder, what it may resume, where its weights come from, what it leaves."""

from __future__ import annotations

import hashlib
import json
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spatialvlm.config import TrainConfig, dump_yaml, read_yaml
from spatialvlm.errors import USER_ERRORS, CheckpointError, ConfigError, LaunchError
from spatialvlm.training.base import check_base, other_size, same_base
from spatialvlm.training.checkpoint import CheckpointStore, Snapshot, load_checkpoint, restore_rng
from spatialvlm.training.checkpoint_files import checkpoints_in, manifest_of
from spatialvlm.training.distributed import Processes, same_everywhere
from spatialvlm.training.engines import Engine
from spatialvlm.training.entry import Arguments, owner
from spatialvlm.training.estimate import MemoryRow
from spatialvlm.training.guard import Guard
from spatialvlm.training.launch import launch_plan
from spatialvlm.training.optim import Group, Parts, group_table, verify_groups
from spatialvlm.training.progress import duration
from spatialvlm.training.rank_log import start_rank_log
from spatialvlm.training.report import write_report
from spatialvlm.training.signals import StopFlag
from spatialvlm.training.state import (
    RunFolder,
    TrainState,
    code_digest,
    environment,
    git_revision,
    seed_everything,
    versions,
    write_json,
)

FREE_KEYS = (
    "log", "checkpoint", "loader", "parallel", "memory", "evaluation", "export",
    "run.dir", "run.resume", "run.resume_allow", "run.stop_after_steps", "run.private",
)  # fmt: skip
"""Settings that may differ on resume: they change neither data, model, nor optimisation."""


@dataclass(slots=True)
class OpenRun:
    """A run directory that this launch owns."""

    config: TrainConfig
    processes: Processes
    folder: RunFolder
    base: Path
    """Directory of the initial weights."""
    lineage: dict[str, Any]
    store: CheckpointStore
    checkpoint: Path | None
    """What will be resumed."""
    attempt: int
    done: bool
    """The run had finished before; there is nothing to do."""
    trust_remote_code: bool = False
    stop: StopFlag = field(default_factory=StopFlag)
    """Raised by a signal since the folder was opened."""
    memory: MemoryRow | None = None
    """Estimate for one device, once the model is known."""

    @property
    def path(self) -> Path:
        """Run folder."""
        return self.folder.path

    def say(self, text: str) -> None:
        """Tell the user, once."""
        if self.processes.is_main:
            sys.stderr.write(text + "\n")
            sys.stderr.flush()

    def show_groups(self, parts: Parts, groups: Sequence[Group]) -> None:
        """Print and save the table of parameter groups."""
        table = group_table(parts, groups)
        self.say(table)
        if self.processes.is_main:
            (self.path / "groups.txt").write_text(table + "\n", encoding="utf-8")

    def resume(self, engine: Engine) -> tuple[TrainState, Guard]:
        """Counters and guard: fresh, or those of the chosen checkpoint, whose weights go into ``engine``."""
        settings = self.config.guard
        guard = Guard(
            max_skipped_in_row=settings.max_skipped_in_row,
            max_skipped_fraction=settings.max_skipped_fraction,
            window=settings.window,
            max_empty_in_row=settings.max_empty_in_row,
            spike_loss=settings.spike_loss,
            spike_grad=settings.spike_grad,
            trace=settings.trace,
        )
        state = TrainState()
        if self.checkpoint is not None:
            saved = load_checkpoint(self.checkpoint, engine, self.processes)
            verify_groups(engine.optimizer, engine.groups, 1.0)
            state = TrainState.from_json(saved["counters"])
            try:
                guard.load_state_dict(saved["guard"])
            except KeyError as error:
                msg = f"{self.checkpoint}: train_state.json holds no {error} of the guard."
                raise CheckpointError(msg) from error
            self.say(
                f"resumed {self.checkpoint.name}: step {state.step}, {state.samples:,} samples"
            )
        state.attempt = self.attempt
        return state, guard

    def restore_rng(self, state: TrainState) -> None:
        """Last thing before the loop: continue the random generators, or re-seed after a change of world size."""
        if self.checkpoint is None:
            return
        manifest = manifest_of(self.checkpoint)
        if manifest["world_size"] == self.processes.size:
            restore_rng(self.checkpoint, self.processes)
        else:
            seed_everything(self.config.run.seed, step=state.step, rank=self.processes.rank)
            self.say(
                f"world size {manifest['world_size']} -> {self.processes.size}: random generators are re-seeded"
            )

    def snapshot(self, state: TrainState, guard: Guard) -> Snapshot:
        """What a checkpoint holds beside the slices."""
        text = dump_yaml(self.config)
        return Snapshot(
            state=state.to_json(),
            guard=guard.state_dict(),
            config_yaml=text,
            facts={
                "stage": self.config.stage,
                "lineage": self.lineage,
                "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
                "git": git_revision(Path(__file__).resolve().parents[2]),
            },
        )


def open_run(config: TrainConfig, arguments: Arguments, processes: Processes) -> OpenRun:
    """Handshake, folder, lock, initial weights, and what to resume.

    Raises:
        LaunchError: Ranks disagree, the launcher shards by itself, or the folder is in use, not writable, or holds
            another run.
        CheckpointError: Nothing valid to resume although a path was given, or the configuration changed.
        ConfigError: The run folder is inside the package or a data root, or the launcher's files decide what the
            recipe decides.
    """
    text = dump_yaml(config)
    strategy, settings = launch_plan(config, processes.device)
    facts = {
        "configuration": hashlib.sha256(text.encode()).hexdigest()[:12],
        "code": code_digest(),
        "strategy": strategy,
        "DeepSpeed file": hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12],
    }
    same_everywhere(processes, facts | versions())
    path = Path(config.run.dir)
    folder = RunFolder(path, private=config.run.private)
    store = CheckpointStore(
        path / "checkpoints",
        processes,
        keep_last=config.checkpoint.keep_last,
        keep_every=config.checkpoint.keep_every,
        verify_mode=config.checkpoint.verify,
    )
    trust = arguments.trust_remote_code
    previous, base, lineage = processes.on_main(lambda: _enter(config, folder, trust))
    attempt = int(previous.get("attempts", 0)) + 1
    done = previous.get("state") == "finished"
    run = OpenRun(config, processes, folder, base, lineage, store, None, attempt, done, trust)
    if done:
        run.say(_finished(path, previous))
        if processes.is_main:
            folder.unlock()
        return run
    start_rank_log(path, processes.rank, processes.size)
    run.stop.install()
    for name, digest in lineage.get("code", {}).items():
        run.say(f"trusted code of {config.model.init_from}: {name} sha256 {digest}")
    if (note := other_size(config, base)) is not None:
        run.say(f"warning: {note}")
    if config.stage == 2 and lineage.get("stage") is None:
        run.say(
            f"warning: model.init_from={config.model.init_from} is no export of stage 1; without stage 1 SSR's ablation "
            "loses 3.1 points on VSI-Bench (arXiv 2603.00409)"
        )
    try:
        _choose_checkpoint(run)
    except USER_ERRORS:
        if processes.is_main:
            folder.unlock()
        raise
    hosts = set(processes.gather(socket.gethostname()))
    if processes.is_main:
        (path / "config.resolved.yaml").write_text(text, encoding="utf-8")
        known = environment(
            world_size=processes.size,
            hosts=len(hosts),
            seed=config.run.seed,
            recipe=str(arguments.config),
            overrides=arguments.overrides,
        )
        write_json(path / "environment.json", known)
        step = 0 if run.checkpoint is None else manifest_of(run.checkpoint)["step"]
        folder.record(
            state="running",
            owner=owner(),
            stage=config.stage,
            attempts=attempt,
            fruitless=_fruitless(previous, step),
            started_at=step,
            step=step,
            reason=None,
            started=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        )
    processes.barrier()
    return run


def _fruitless(previous: Mapping[str, Any], step: int) -> int:
    """Launches in a row that died before their first checkpoint: whoever requeues them must end some day.

    Args:
        previous: ``run.json`` of the launch before.
        step: Where this one starts; a launch that left no newer checkpoint started there too.
    """
    died = previous.get("state") == "running" and previous.get("started_at") == step
    return int(previous.get("fruitless", 0)) + 1 if died else 0


def _finished(path: Path, record: Mapping[str, Any]) -> str:
    done = record.get("summary") or {}
    losses = done.get("final") or {}
    loss = f", last loss {losses['loss']:.4f}" if "loss" in losses else ""
    model = f" The model is in {path / done['export']}." if done.get("export") else ""
    return (
        f"{path} has finished: {record.get('step', 0):,} steps, {done.get('samples', 0):,} samples, "
        f"{duration(done.get('wall_s', 0.0))}{loss}.{model}\n"
        "Nothing to do. For another run use a new run.dir; for a longer one also set model.init_from to that model."
    )


def _choose_checkpoint(run: OpenRun) -> None:
    wanted, store = run.config.run.resume, run.store
    if wanted == "auto":
        run.checkpoint, notes = store.newest_valid()
        for line in notes:
            run.say(f"checkpoint rejected: {line}")
    elif wanted != "none":
        run.checkpoint = store.verified(Path(wanted))
        run.processes.on_main(lambda: _compare(run.config, run.checkpoint))
    if run.checkpoint is not None:
        same_base(run.config, run.lineage, run.checkpoint)
    if run.checkpoint is not None and wanted != "auto":
        for line in store.set_aside_newer(manifest_of(run.checkpoint)["step"]):
            run.say(f"the run goes back to an earlier checkpoint: {line}")


def _enter(
    config: TrainConfig, folder: RunFolder, trust_remote_code: bool
) -> tuple[dict[str, Any], Path, dict[str, Any]]:
    _check_place(config)
    base, lineage = check_base(config, trust_remote_code=trust_remote_code)
    previous = folder.open()
    try:
        found = checkpoints_in(folder.path / "checkpoints")
        used = bool(found or previous.get("step"))
        if previous and used:
            _compare(config, folder.path)
        if config.run.resume == "none" and used:
            raise LaunchError(
                f"{folder.path} already holds a run (state {previous.get('state')!r}, {len(found)} checkpoints). Use "
                "run.resume=auto to continue it, or a new run.dir."
            )
    except USER_ERRORS:
        folder.unlock()
        raise
    if not used:  # nothing was ever trained here
        previous = {k: previous[k] for k in ("state", "started_at", "fruitless") if k in previous}
    return previous, base, lineage


def _check_place(config: TrainConfig) -> None:
    path = Path(config.run.dir).resolve()
    package = Path(__file__).resolve().parents[1]
    here = Path.cwd().resolve()
    roots = [Path(source.root).resolve() for source in config.data.sources]
    # A root that holds the working directory itself is the user's project, not a data folder.
    forbidden = [package, *(root for root in roots if root != here and root not in here.parents)]
    for place in forbidden:
        if path == place or place in path.parents:
            raise ConfigError(
                f"run.dir={config.run.dir} lies inside {place}; choose a directory of its own."
            )


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings to dotted keys; lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            flat |= flatten(value, name + ".")
        else:
            flat[name] = value
    return flat


def changed_keys(
    old: Mapping[str, Any], new: Mapping[str, Any], allowed: Sequence[str]
) -> list[tuple[str, Any, Any]]:
    """Settings that differ and may not, as (key, old, new)."""
    before, after = flatten(old), flatten(new)
    free = (*FREE_KEYS, *allowed)
    return [
        (key, before.get(key), after.get(key))
        for key in sorted(set(before) | set(after))
        if before.get(key) != after.get(key)
        and not any(key == name or key.startswith(name + ".") for name in free)
    ]


def _compare(config: TrainConfig, folder: Path | None) -> None:
    assert folder is not None
    saved = folder / "config.resolved.yaml"
    if not saved.is_file():
        return
    changed = changed_keys(
        read_yaml(saved), config.model_dump(mode="json"), config.run.resume_allow
    )
    if changed:
        lines = "\n".join(f"  {key}: was {old!r}, now {new!r}" for key, old, new in changed)
        names = sorted({key for key, _, _ in changed})
        raise CheckpointError(
            f"{folder} holds a run with another configuration:\n{lines}\nUse a new run.dir, restore the values, or "
            f"allow the change with run.resume_allow={json.dumps(names)}."
        )


def update_report(run_dir: Path, config: TrainConfig) -> None:
    """Rebuild ``report.html`` with the configured mixture beside the realised one."""
    weights = {name: w for name, w in config.data.families.items() if w > 0}
    total = sum(weights.values())
    write_report(run_dir, configured_shares={name: w / total for name, w in weights.items()})
