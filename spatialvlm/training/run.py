"""Opening and closing a run: its folder, what it may resume, where its weights come from, what it leaves."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spatialvlm.config import TrainConfig, dump_yaml, read_yaml
from spatialvlm.config.geometry import PositionsConfig
from spatialvlm.errors import USER_ERRORS, CheckpointError, ConfigError, LaunchError
from spatialvlm.training.checkpoint import (
    CheckpointStore,
    Snapshot,
    checkpoints_in,
    load_checkpoint,
    manifest_of,
    restore_rng,
)
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
        folder.record(
            state="running",
            owner=owner(),
            stage=config.stage,
            attempts=attempt,
            step=0 if run.checkpoint is None else manifest_of(run.checkpoint)["step"],
            reason=None,
            started=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        )
    processes.barrier()
    return run


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
        for line in store.set_aside_newer(manifest_of(run.checkpoint)["step"]):
            run.say(f"the run goes back to an earlier checkpoint: {line}")


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


def _enter(
    config: TrainConfig, folder: RunFolder, trust_remote_code: bool
) -> tuple[dict[str, Any], Path, dict[str, Any]]:
    _check_place(config)
    base, lineage = check_base(config, trust_remote_code=trust_remote_code)
    previous = folder.open()
    try:
        found = checkpoints_in(folder.path / "checkpoints")
        if not found and not previous.get("step"):
            previous = {}  # nothing was ever trained here
        if previous:
            _compare(config, folder.path)
        if config.run.resume == "none" and (found or previous):
            raise LaunchError(
                f"{folder.path} already holds a run (state {previous.get('state')!r}, {len(found)} checkpoints). Use "
                "run.resume=auto to continue it, or a new run.dir."
            )
    except USER_ERRORS:
        folder.unlock()
        raise
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
    found = (
        found.get("text_config") or found
    )  # the hub's Qwen2.5-VL has no section for the language model
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
        str(file.relative_to(folder)): [
            file.stat().st_size,
            hashlib.sha256(file.read_bytes()).hexdigest(),
        ]
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def _check_manifest(folder: Path) -> dict[str, Any]:
    """Every exported file is as it was written; returns the hash of the list."""
    path = folder.parent / f"{folder.name}.manifest.json"
    if not path.is_file():
        return {}
    expected = _read_json(path, "list of exported files")
    for name, (size, digest) in expected.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size:
            raise CheckpointError(
                f"{file} is missing or has another size than when it was exported."
            )
        if hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            raise CheckpointError(f"{file} has another sha256 than when it was exported.")
    return {"manifest_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def update_report(run_dir: Path, config: TrainConfig) -> None:
    """Rebuild ``report.html`` with the configured mixture beside the realised one."""
    weights = {name: w for name, w in config.data.families.items() if w > 0}
    total = sum(weights.values())
    write_report(run_dir, configured_shares={name: w / total for name, w in weights.items()})
