"""Whole recipes: :class:`TrainConfig` for stages 1 and 2."""

from __future__ import annotations

from typing import Literal

from spatialvlm.config.base import Section
from spatialvlm.config.data import (
    DataConfig,
    LoaderConfig,
    PackingConfig,
    SharedPrefixConfig,
    StepConfig,
    data_problems,
)
from spatialvlm.config.geometry import GeometryConfig, geometry_problems
from spatialvlm.config.training import (
    CheckpointConfig,
    ExportConfig,
    GuardConfig,
    LogConfig,
    LoraConfig,
    MemoryConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    ScheduleConfig,
    TrainEvaluationConfig,
    schedule_problems,
)


class TrainConfig(Section):
    """A training recipe. Stage 1 has no geometry branch (SSR-2D), stage 2 has one (SSR-3D)."""

    stage: Literal[1, 2]
    """Checked by the recipe."""
    run: RunConfig
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    lora: LoraConfig | None = None
    """``None`` = all weights of parts with a learning rate train."""
    geometry: GeometryConfig | None = None
    """``None`` = no geometry branch (stage 1); stage 2 requires the section."""
    step: StepConfig = StepConfig()
    packing: PackingConfig = PackingConfig()
    shared_prefix: SharedPrefixConfig = SharedPrefixConfig()
    loader: LoaderConfig = LoaderConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    precision: Literal["bf16", "fp32"] = "bf16"
    """Compute precision; master weights and moments are fp32."""
    memory: MemoryConfig = MemoryConfig()
    parallel: ParallelConfig = ParallelConfig()
    guard: GuardConfig = GuardConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    evaluation: TrainEvaluationConfig = TrainEvaluationConfig()
    export: ExportConfig = ExportConfig()

    def problems(self) -> list[tuple[str, str]]:
        """Contradictions between settings, as (key, message)."""
        found = data_problems(self.data, self.step, self.packing, self.shared_prefix)
        has_geometry = self.geometry is not None and self.geometry.encoder != "none"
        if self.stage == 1 and has_geometry:
            found.append(
                (
                    "geometry",
                    "stage 1 trains without the geometry branch; remove the section or use stage 2",
                )
            )
        if self.stage == 2 and self.geometry is None:
            found.append(
                (
                    "geometry",
                    "stage 2 needs this section (an empty one, `geometry: {}`, takes the defaults)",
                )
            )
        if self.geometry is not None:
            found += geometry_problems(self.geometry)
        if self.optim.geometry_lr is not None and not has_geometry:
            found.append(
                (
                    "optim.geometry_lr",
                    "there is no geometry branch; remove the rate or set geometry.encoder",
                )
            )
        found += [
            (
                f"data.sources.{source.name}.geometry",
                "'on' needs an encoder; set geometry.encoder, or use 'auto'",
            )
            for source in self.data.sources
            if source.geometry == "on" and not has_geometry
        ]
        rates = self.optim.lr_by_part()
        if all(rate is None for rate in rates.values()):
            found.append(
                (
                    "optim",
                    "every learning rate is null, so nothing would train; set at least optim.lr",
                )
            )
        if self.lora is not None:
            for part in self.lora.parts:
                if part == "embeddings":
                    found.append(
                        (
                            "lora.parts",
                            "adapters on 'embeddings' are not supported; train or freeze them",
                        )
                    )
                elif rates[part] is None:
                    found.append(
                        (
                            "lora.parts",
                            f"part {part!r} has no learning rate; adapters use the part's rate",
                        )
                    )
            if (
                self.lora.dropout > 0
                and self.shared_prefix.enabled
                and self.shared_prefix.dropout == "error"
            ):
                found.append(("lora.dropout", "dropout above 0 changes gradients under shared_prefix; set it to 0, or "
                              "shared_prefix.dropout to shared, or shared_prefix.enabled to false"))  # fmt: skip
        found += schedule_problems(self.schedule)
        if self.evaluation.every_steps and not (
            self.evaluation.sources or self.evaluation.benchmarks
        ):
            found.append(
                (
                    "evaluation.every_steps",
                    "there is nothing to evaluate; set sources or benchmarks",
                )
            )
        if (
            self.evaluation.select is not None
            and self.evaluation.select not in self.evaluation.benchmarks
        ):
            found.append(
                (
                    "evaluation.select",
                    f"{self.evaluation.select!r} is not one of evaluation.benchmarks",
                )
            )
        return found
