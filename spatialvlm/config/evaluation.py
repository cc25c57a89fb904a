"""The recipe of ``recipes/evaluate.py``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from spatialvlm.config.base import Bool, Fraction, NonEmptyStr, NonNegativeInt, PositiveInt, Section


class EvalRunConfig(Section):
    """Where results go and how an interrupted evaluation continues."""

    dir: NonEmptyStr
    """Run folder; one sub-folder per benchmark."""
    resume: Literal["auto", "none"] = "auto"
    """``auto`` skips items that are already answered."""
    overwrite: Bool = False
    """Discard answers that were made with other settings."""


class EvalModelConfig(Section):
    """The checkpoint under test."""

    init_from: NonEmptyStr
    """Model directory: plain, with a geometry branch, or adapters."""
    revision: NonEmptyStr | None = None
    """Hub revision; ``None`` = default branch."""
    geometry_source: NonEmptyStr | None = None
    """Encoder weights; ``None`` = the source recorded in the model directory."""
    allow_encoder_mismatch: Bool = False
    """Accept another geometry encoder than the one used in training."""


class EvaluationConfig(Section):
    """What is asked, how it is generated, how it is scored."""

    benchmarks: Annotated[tuple[NonEmptyStr, ...], Field(min_length=1)]
    """Benchmark names; ``python -m spatialvlm.evaluation list`` prints them."""
    data_root: NonEmptyStr | None = None
    """Folder of benchmark files and media; ``None`` when ``files`` names each file."""
    files: dict[str, NonEmptyStr] = {}
    """Explicit file per benchmark."""
    media_root: dict[str, NonEmptyStr] = {}
    """Explicit media folder per benchmark; default: the folder of its file."""
    protocol: Literal["official", "lmms", "easi"] = "official"
    """Prompt, extraction and aggregation rules."""
    unparsed: Literal["wrong", "expected", "random"] = "wrong"
    """How answers without a readable choice count."""
    strip_think: Bool = False
    """Remove everything through the last ``</think>`` before extraction."""
    allow_absolute_media: Bool = False
    """Accept absolute media paths in benchmark files."""
    frames: PositiveInt = 32
    """Frames per video."""
    frame_policy: Literal["linspace", "uniform_tail"] = "linspace"
    """How frames are chosen."""
    max_pixels: PositiveInt | None = None
    """Largest image after resizing; ``None`` = the checkpoint's processor."""
    batch_size: Literal["auto"] | PositiveInt = 8
    """Prompts generated together."""
    max_new_tokens: PositiveInt | None = None
    """``None`` = per benchmark."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Compute precision."""
    shared_prefix: Bool = True
    """Encode the media of several questions once."""
    num_workers: NonNegativeInt = 4
    """Decoding threads per rank."""
    prefetch: PositiveInt = 2
    """Batches decoded ahead."""
    limit: PositiveInt | None = None
    """Items per benchmark, stratified by question type and marked partial; ``None`` = all."""
    limit_seed: NonNegativeInt = 0
    """Seed of the limited subset."""
    seed: NonNegativeInt = 0
    """Seed of random choices in scoring."""
    media: Literal["real", "drop", "blank", "shuffle"] = "real"
    """``drop``: the blind baseline; ``blank``: grey images; ``shuffle``: media of another item."""
    max_failures: Fraction = 0.005
    """Share of items with unreadable media that ends the run."""
    score_only: Bool = False
    """Score existing predictions; no model is loaded."""
    quiet: Bool = False
    """No progress output."""


class EvalConfig(Section):
    """An evaluation recipe."""

    run: EvalRunConfig
    evaluation: EvaluationConfig
    model: EvalModelConfig | None = None
    """Required unless ``evaluation.score_only``."""

    def problems(self) -> list[tuple[str, str]]:
        """Contradictions between settings, as (key, message)."""
        found = []
        if self.model is None and not self.evaluation.score_only:
            found.append(
                ("model.init_from", "is required and has no default; pass model.init_from=DIR")
            )
        return found


class SweepConfig(Section):
    """A study over one config key: ``tools/scaling.py``."""

    out: NonEmptyStr
    """Folder of the study; one run and one evaluation per point below it."""
    recipe: NonEmptyStr
    """Training recipe, for example ``recipes/stage1.py``."""
    config: NonEmptyStr
    """Its YAML file."""
    axis: NonEmptyStr = "data.fraction"
    """Config key that changes; ``data.fraction`` is the scaling study, any other key an ablation."""
    values: Annotated[tuple[str | float | int | bool, ...], Field(min_length=1)]
    """Values of the key, ascending for ``data.fraction``."""
    hold: Literal["epochs", "tokens", "steps"]
    """What stays the same over the points; printed on every plot."""
    samples: PositiveInt | None = None
    """Training samples at fraction 1; ``None`` plots the fraction itself."""
    overrides: tuple[NonEmptyStr, ...] = ()
    """Further ``key=value`` for every training run."""
    seeds_at_smallest: PositiveInt = 3
    """Runs of the first value, for the noise between seeds."""
    seed: NonNegativeInt = 0
    """Seed of the other points."""
    eval_config: NonEmptyStr
    """YAML file of the evaluation."""
    eval_overrides: tuple[NonEmptyStr, ...] = ()
    """``key=value`` for every evaluation."""
    launcher: NonEmptyStr = "python"
    """What starts a recipe, for example ``accelerate launch --config_file FILE``."""
