"""Sections of a training recipe besides data and geometry."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from spatialvlm.config.base import (
    Bool,
    Fraction,
    NonEmptyStr,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)
from spatialvlm.config.data import SourceConfig

PartName = Literal["language_model", "vision_encoder", "projector", "geometry_fusion", "embeddings"]


class RunConfig(Section):
    """Where the run lives and how it continues."""

    dir: NonEmptyStr
    """Run folder: config, metrics, checkpoints, final model, report."""
    seed: NonNegativeInt = 42
    """Seed of everything but the order of the data."""
    resume: NonEmptyStr = "auto"
    """``auto`` = newest valid checkpoint of ``dir`` or fresh start; ``none``; or a checkpoint path."""
    resume_allow: tuple[NonEmptyStr, ...] = ()
    """Config sections or keys that may differ from the checkpoint's."""
    stop_after_steps: PositiveInt | None = None
    """Save and leave after this many steps of this process; ``None`` = run to the end."""
    private: Bool = True
    """Create the run folder readable by its owner only."""


class ModelConfig(Section):
    """Which weights are trained."""

    backbone: NonEmptyStr
    """Name of ``configs/backbones/<name>.json``: dimensions for ``--dry-run``, checked when loading."""
    init_from: NonEmptyStr
    """Hugging Face directory or hub id, or a previous stage's ``final``."""
    allow_unfinished: Bool = False
    """Accept a previous stage that has not finished."""
    revision: NonEmptyStr | None = None
    """Hub revision; ``None`` = default branch."""
    liger: Bool = False
    """RMSNorm and SwiGLU kernels of liger-kernel."""
    compile: Bool = False
    """``torch.compile`` of each decoder layer and vision block."""


class LoraConfig(Section):
    """Low-rank adapters; the adapted part's own weights freeze."""

    parts: Annotated[tuple[PartName, ...], Field(min_length=1)] = ("language_model",)
    """Parts whose linear layers get adapters; their learning rate becomes the adapters'."""
    r: PositiveInt = 128
    """Rank."""
    alpha: PositiveFloat = 256.0
    """Scale numerator; the update is scaled by alpha / r."""
    dropout: Annotated[float, Field(strict=True, ge=0, lt=1)] = 0.0
    """Dropout on the adapters' input; above 0 it excludes exact shared prefixes."""
    dora: Bool = False
    """Weight-decomposed adapters (arXiv 2402.09353)."""


class OptimConfig(Section):
    """AdamW with one learning rate per part of the model; ``None`` freezes the part."""

    lr: PositiveFloat | None = None
    """Peak learning rate of the language model, reached after warm-up."""
    vision_lr: PositiveFloat | None = None
    """Peak learning rate of the vision encoder."""
    projector_lr: PositiveFloat | None = None
    """Peak learning rate of the projector (with Qwen3-VL's deepstack mergers)."""
    embedding_lr: PositiveFloat | None = None
    """Peak learning rate of the token embeddings and the output head."""
    geometry_lr: PositiveFloat | None = None
    """Peak learning rate of the geometry fusion (stage 2)."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Decay rates of the first and second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.0
    """Decay of weight matrices; never of norms, biases, embeddings, adapters."""
    weight_decay_by_part: dict[PartName, NonNegativeFloat] = {}
    """Overrides ``weight_decay`` for a part."""
    max_grad_norm: PositiveFloat = 1.0
    """Global gradient norm above which gradients are scaled down."""
    fused: Literal["auto"] | Bool = "auto"
    """Fused AdamW kernel; ``auto`` = on CUDA."""

    def lr_by_part(self) -> dict[str, float | None]:
        """Learning rate of every part, by the part's name."""
        return {
            "language_model": self.lr,
            "vision_encoder": self.vision_lr,
            "projector": self.projector_lr,
            "embeddings": self.embedding_lr,
            "geometry_fusion": self.geometry_lr,
        }


class ScheduleConfig(Section):
    """Learning rate as a function of the step."""

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after warm-up."""
    warmup_ratio: Annotated[float, Field(strict=True, ge=0, lt=1)] | None = 0.03
    """Share of all steps used to warm up; ``None`` when ``warmup_steps`` is set."""
    warmup_steps: NonNegativeInt | None = None
    """Steps used to warm up; ``None`` = by ratio."""
    min_ratio: Fraction = 0.0
    """Last learning rate over the peak."""


def schedule_problems(schedule: ScheduleConfig) -> list[tuple[str, str]]:
    """Contradictions inside the schedule, as (key, message)."""
    if schedule.warmup_steps is None and schedule.warmup_ratio is None:
        return [("schedule", "set warmup_ratio or warmup_steps")]
    explicit = {key for key in schedule.model_fields_set if getattr(schedule, key) is not None}
    if {"warmup_steps", "warmup_ratio"} <= explicit:
        return [("schedule.warmup_steps", "set warmup_steps or warmup_ratio, not both")]
    return []


class MemoryConfig(Section):
    """Trading time for memory."""

    checkpoint_language_model: Bool = True
    """Recompute decoder layers in the backward pass."""
    checkpoint_vision: Bool = False
    """Recompute vision blocks in the backward pass."""
    head_rows: PositiveInt = 1024
    """Supervised positions whose logits exist at the same time."""
    strict: Bool = False
    """An estimate above the device's memory is an error instead of a warning."""


class ParallelConfig(Section):
    """How the model is spread over processes."""

    strategy: Literal["auto", "ddp", "fsdp2"] = "auto"
    """``auto`` = the launcher's DeepSpeed stage, else ``ddp``."""
    world_size: PositiveInt | None = None
    """Refuse to start with another number of processes; ``None`` = any."""
    reduce_dtype: Literal["bf16", "fp32"] = "bf16"
    """Gradient reduction under ZeRO."""
    timeout_s: PositiveFloat = 600.0
    """No progress for this long ends the run."""
    first_step_timeout_s: PositiveFloat = 1800.0
    """The same before the first step has ended."""


class GuardConfig(Section):
    """Non-finite gradients and spikes."""

    max_skipped_in_row: PositiveInt = 5
    """Skipped steps in a row that end the run."""
    max_skipped_fraction: Fraction = 0.01
    """Share of skipped steps in ``window`` that ends the run."""
    window: PositiveInt = 1000
    """Steps the share is measured over."""
    max_empty_in_row: PositiveInt = 10
    """Steps in a row without a supervised token that end the run."""
    spike_loss: PositiveFloat = 6.0
    """Recorded above median + this many median absolute deviations."""
    spike_grad: PositiveFloat = 5.0
    """Recorded above this many medians of a part's gradient norm."""
    trace: Bool = True
    """Name the first module with a non-finite output before stopping."""


class CheckpointConfig(Section):
    """Training checkpoints."""

    every: PositiveInt = 500
    """Steps between checkpoints."""
    every_s: PositiveFloat | None = None
    """Seconds between checkpoints, in addition; ``None`` = by steps only."""
    keep_last: Annotated[int, Field(strict=True, ge=2)] = 2
    """Newest checkpoints kept."""
    keep_every: PositiveInt | None = None
    """Multiples of this step are kept for good; ``None`` = none."""
    background: Bool = False
    """Training goes on while a thread writes a copy in host memory: 12 bytes per trained parameter, divided over the
    ranks. ``false`` = training waits."""
    verify: Literal["full", "sizes"] = "full"
    """Before use: every hash, or only names and sizes."""
    on_error: Literal["retry", "stop"] = "retry"
    """A save that fails: try again at the next step, or stop."""
    export_every: PositiveInt | None = None
    """Steps between exported model directories; ``None`` = only at the end."""


class WandbConfig(Section):
    """Weights & Biases tracker; the key comes from the environment."""

    project: NonEmptyStr = "spatialvlm"
    """Project name."""
    entity: NonEmptyStr | None = None
    """Team or user; ``None`` = the account's default."""
    mode: Literal["online", "offline"] = "online"
    """``offline`` writes files for a later sync."""
    tags: tuple[NonEmptyStr, ...] = ()
    """Tags of the run."""


class LogConfig(Section):
    """What is written while the run goes."""

    every: PositiveInt = 10
    """Steps between log lines."""
    wandb: WandbConfig | None = None
    """``None`` = off."""
    tensorboard: Bool = False
    """Write TensorBoard event files."""
    report: Bool = True
    """Write ``report.html``."""
    progress: Literal["auto", "bar", "lines", "none"] = "auto"
    """``auto`` = bar on a terminal, lines elsewhere."""


class TrainEvaluationConfig(Section):
    """Evaluation while training."""

    every_steps: PositiveInt | None = None
    """Steps between evaluations; ``None`` = off."""
    sources: tuple[SourceConfig, ...] = ()
    """Held-out sources in the form of ``data.sources``, never drawn for training; teacher-forced loss."""
    benchmarks: tuple[NonEmptyStr, ...] = ()
    """Benchmarks answered by generation."""
    data_root: NonEmptyStr | None = None
    """Folder of benchmark files and media; ``None`` when ``files`` names each file."""
    files: dict[str, NonEmptyStr] = {}
    """Explicit file per benchmark."""
    media_root: dict[str, NonEmptyStr] = {}
    """Explicit media folder per benchmark; default: the folder of its file."""
    allow_absolute_media: Bool = False
    """Accept absolute media paths in benchmark files."""
    select: NonEmptyStr | None = None
    """Benchmark whose headline marks the best checkpoint; ``None`` = none."""
    max_samples: PositiveInt = 512
    """Samples per source and items per benchmark."""


class ExportConfig(Section):
    """The model directory a run leaves behind."""

    final: Bool = True
    """Write ``final/`` at the end."""
    dtype: Literal["base", "fp32"] = "base"
    """The dtypes of the base checkpoint, or fp32 (twice the size)."""
    merge_lora: Bool = True
    """Merge adapters into the weights; ``False`` writes them as adapters."""
