"""Everything the loop is handed: schedule, recorder, saver, trackers, watchdog of one launch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from spatialvlm.config import TrainConfig
from spatialvlm.data.loader import StepLoader
from spatialvlm.errors import ConfigError
from spatialvlm.training.build import Cost
from spatialvlm.training.checkpoint_files import step_of
from spatialvlm.training.distributed import Processes
from spatialvlm.training.engines import Engine
from spatialvlm.training.export import export
from spatialvlm.training.guard import Guard
from spatialvlm.training.loop import Fetcher, Run
from spatialvlm.training.loss import LossSums
from spatialvlm.training.metrics import Meter, peak_flops
from spatialvlm.training.optim import Schedule, make_schedule
from spatialvlm.training.plan import write_plan
from spatialvlm.training.progress import Progress
from spatialvlm.training.recorder import Recorder
from spatialvlm.training.run import OpenRun, update_report
from spatialvlm.training.saver import Saver
from spatialvlm.training.signals import StopFlag
from spatialvlm.training.state import TrainState
from spatialvlm.training.trackers import JsonLines, TensorBoard, Tracker, Trackers, Wandb
from spatialvlm.training.watchdog import Watchdog


@dataclass(slots=True)
class Session:
    """What :func:`~spatialvlm.training.loop.train` is handed."""

    run: Run
    steps: Fetcher
    record: Recorder
    save: Saver
    guard: Guard
    stop: StopFlag
    watch: Watchdog
    trackers: Trackers | None
    progress: Progress | None

    def close(self) -> None:
        """Stop threads and workers, flush trackers, give signals back."""
        self.watch.stop()
        self.stop.uninstall()
        self.steps.loader.close()
        if self.progress is not None:
            self.progress.close()
        if self.trackers is not None:
            self.trackers.close()


def build_schedule(config: TrainConfig, steps: int) -> Schedule:
    """Learning rate of a run of ``steps`` optimizer steps.

    Raises:
        ConfigError: The warm-up does not fit.
    """
    section = config.schedule
    return make_schedule(
        section.kind,
        steps,
        warmup_ratio=None if section.warmup_steps is not None else section.warmup_ratio,
        warmup_steps=section.warmup_steps,
        min_ratio=section.min_ratio,
    )


def total_steps(config: TrainConfig, loader: StepLoader) -> int:
    """Optimizer steps of the run; with steps of packs this plans everything that is left.

    Raises:
        ConfigError: Steps of packs, and lengths that nobody has measured.
    """
    counted = config.step.unit == "samples" or config.data.length.steps is not None
    sources = range(len(config.data.sources))
    if not counted and not all(loader.lengths.complete(number) for number in sources):
        raise ConfigError(
            "The number of steps is unknown: step.unit is packs and the lengths of some rows are not measured. Measure "
            "them once with tools/plan_data.py, set data.lengths=exact to do it at the start, or state the number: "
            "data.length={steps: n}."
        )
    return loader.num_steps


def _faults_by_reason(loader: StepLoader) -> dict[str, int]:
    counts: dict[str, int] = {}
    for (_, reason), count in (loader.quarantine.counts if loader.quarantine else {}).items():
        counts[reason] = counts.get(reason, 0) + count
    return counts


def build_session(
    config: TrainConfig,
    run: OpenRun,
    state: TrainState,
    guard: Guard,
    loader: StepLoader,
    engine: Engine,
    cost: Cost,
) -> Session:
    """Schedule, trackers, saver, recorder, signals and watchdog of one launch.

    Raises:
        ConfigError: The warm-up does not fit the number of steps, or a tracker is not installed.
    """
    processes = run.processes
    schedule = _planned_schedule(config, run, state, loader, engine)
    trackers, progress = None, None
    if processes.is_main:
        trackers = _trackers(config, run, state)
        progress = Progress(schedule.total_steps, state.step, config.log.progress)
    save = _saver(config, run, state, guard)
    record = Recorder(
        processes,
        _meter(config, processes, loader, schedule),
        trackers=trackers,
        progress=progress,
        guard=guard,
        folder=run.folder,
        log_every=config.log.every,
        total_steps=schedule.total_steps,
        cost=cost.model,
        save=save,
        max_grad_norm=config.optim.max_grad_norm,
        faults=partial(_faults_by_reason, loader),
    )
    watch = Watchdog(
        run.path,
        processes.rank,
        processes.size,
        timeout_s=config.parallel.timeout_s,
        first_timeout_s=config.parallel.first_step_timeout_s,
    )
    watch.start()
    steps = Fetcher(loader, processes.device)
    run.restore_rng(state)
    return Session(
        run=Run(
            processes,
            schedule,
            config.run.stop_after_steps,
            config.evaluation.every_steps,
            None if run.memory is None else run.memory.total,
        ),
        steps=steps,
        record=record,
        save=save,
        guard=guard,
        stop=run.stop,
        watch=watch,
        trackers=trackers,
        progress=progress,
    )


def _planned_schedule(
    config: TrainConfig, run: OpenRun, state: TrainState, loader: StepLoader, engine: Engine
) -> Schedule:
    """Number of steps and learning rate; writes ``plan.json`` when the disk has room for the checkpoints."""
    if not state.total_steps or config.run.resume_allow:
        state.total_steps = total_steps(config, loader)
    schedule = build_schedule(config, state.total_steps)
    if schedule.warmup_steps >= schedule.total_steps:
        run.say(
            f"warning: the warm-up takes all {schedule.total_steps} steps; the peak rate is reached in the last one"
        )
    run.processes.on_main(lambda: run.store.require_space(engine.groups))
    if run.processes.is_main:
        assert run.memory is not None
        write_plan(
            run.path / "plan.json",
            config,
            schedule,
            strategy=engine.strategy,
            world_size=run.processes.size,
            positions=loader.mixture.length,
            trainable=sum(group.numel for group in engine.groups),
            memory=run.memory,
        )
    return schedule


def _saver(config: TrainConfig, run: OpenRun, state: TrainState, guard: Guard) -> Saver:
    def after_save(path: Path) -> None:
        run.folder.record(state="running", step=step_of(path), checkpoint=path.name, fruitless=0)
        if config.log.report:
            update_report(run.path, config)

    save = Saver(
        run.store,
        lambda now: run.snapshot(now, guard),
        every=config.checkpoint.every,
        every_s=config.checkpoint.every_s,
        on_error=config.checkpoint.on_error,
        background=config.checkpoint.background,
        after=after_save,
        export_every=config.checkpoint.export_every,
        export=lambda engine, checkpoint, target: export(config, run, engine, checkpoint, target),
    )
    if run.checkpoint is not None:
        save.last_step = state.step
    return save


def _meter(
    config: TrainConfig, processes: Processes, loader: StepLoader, schedule: Schedule
) -> Meter:
    sources = config.data.sources
    sums = LossSums(
        tuple(source.name for source in sources),
        tuple(source.family for source in sources),
        tuple(loader.lengths.encoder.capabilities or ()),
        processes.device,
    )
    return Meter(
        processes,
        sums,
        total_steps=schedule.total_steps,
        max_tokens=config.packing.max_tokens,
        peak=peak_flops(processes.device),
    )


def _trackers(config: TrainConfig, run: OpenRun, state: TrainState) -> Trackers:
    found: list[Tracker] = [JsonLines(run.path / "metrics.jsonl", attempt=run.attempt)]
    if config.log.tensorboard:
        found.append(TensorBoard(run.path / "tensorboard"))
    if config.log.wandb is not None:
        wandb = Wandb(
            run.path,
            project=config.log.wandb.project,
            entity=config.log.wandb.entity,
            mode=config.log.wandb.mode,
            tags=config.log.wandb.tags,
            config=config.model_dump(mode="json"),
            run_id=state.trackers.get("wandb"),
        )
        state.trackers["wandb"] = wandb.run_id
        found.append(wandb)
    return Trackers(found)
