"""Where configuration becomes benchmarks and the evaluation function of a training run."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from spatialvlm.errors import ConfigError, DataError
from spatialvlm.evaluation.registry import find_spec, load_benchmark
from spatialvlm.evaluation.schema import Benchmark
from spatialvlm.evaluation.while_training import BenchmarkProbe, Ranks, together

if TYPE_CHECKING:
    from spatialvlm.config import TrainConfig
    from spatialvlm.data.hooks import DrawMarks
    from spatialvlm.evaluation.model_generator import PackGenerator
    from spatialvlm.sequence.layout import TokenLayout

__all__ = ["build_probe", "find_file", "open_benchmarks", "together"]

SUFFIXES = (".jsonl", ".json", ".parquet", ".tsv", ".csv", "")


class Files(Protocol):
    """The keys of a config section that say where benchmarks lie."""

    @property
    def benchmarks(self) -> tuple[str, ...]:
        """Names."""

    @property
    def data_root(self) -> str | None:
        """Folder of files and media."""

    @property
    def files(self) -> dict[str, str]:
        """Explicit file per benchmark."""

    @property
    def media_root(self) -> dict[str, str]:
        """Explicit media folder per benchmark."""


def find_file(section: Files, name: str) -> Path:
    """The local file of a benchmark: stated, or ``<data_root>/<name>.<suffix>``, or that folder.

    Raises:
        ConfigError: Neither a file nor a root is stated.
        DataError: The root has no such file.
    """
    if name in section.files:
        return Path(section.files[name])
    if section.data_root is None:
        raise ConfigError(
            f"no file for {name}: set evaluation.files.{name} or evaluation.data_root"
        )
    for suffix in SUFFIXES:
        path = Path(section.data_root) / f"{name}{suffix}"
        if path.exists():
            return path
    raise DataError(
        f"{section.data_root} has no {name}.jsonl, .json, .parquet, .tsv or folder {name}"
    )


def open_benchmarks(section: Files) -> list[Benchmark]:
    """All benchmarks of a section; an unknown name is answered before any file is read."""
    for name in section.benchmarks:
        find_spec(name)
    return [
        load_benchmark(name, find_file(section, name), media_root=section.media_root.get(name))
        for name in section.benchmarks
    ]


def build_probe(
    config: "TrainConfig",
    run_folder: Path,
    base: Path,
    layout: "TokenLayout",
    model: Any,
    generate: Callable[..., list[list[list[int]]]],
    ranks: Ranks,
    *,
    restore: Callable[[], None],
    draw_marks: "DrawMarks | None" = None,
) -> BenchmarkProbe | None:
    """Benchmarks between training steps; ``None`` when the recipe asks for none.

    Args:
        config: Training recipe.
        run_folder: Receives ``eval/`` and, with ``evaluation.select``, ``best/``.
        base: Model directory with tokenizer and processor.
        layout: Token layout of the run.
        model: The plain model inside the engine.
        generate: ``generate(model, packs, max_new_tokens)``.
        ranks: Processes of the run.
        restore: Puts the model back into training mode, frozen parts excepted.
        draw_marks: Hook for rows with marks.
    """
    section = config.evaluation
    if not section.every_steps or not section.benchmarks:
        return None
    import torch

    from spatialvlm.data.media.plan import MediaPolicy
    from spatialvlm.data.template import ChatTemplate, load_processor
    from spatialvlm.evaluation.model_generator import PackGenerator
    from spatialvlm.models.lora import save_adapters

    device = model.device.type
    media = config.data.media
    template = ChatTemplate.from_checkpoint(base)
    policy = MediaPolicy.from_processor(load_processor(base)).with_budget(
        min_pixels=media.min_pixels,
        max_pixels=media.max_pixels,
        video_max_pixels=media.video_max_pixels,
        video_total_pixels=media.video_total_pixels,
        temporal=layout.tau,
    )

    def complete(packs: list[Any], max_new_tokens: int) -> list[list[list[int]]]:
        with torch.autocast(device, torch.bfloat16, enabled=config.precision == "bf16"):
            return generate(model, packs, max_new_tokens)

    def generator(benchmark: Benchmark) -> "PackGenerator":
        return PackGenerator(
            complete,
            template,
            layout,
            policy,
            root=benchmark.media_root,
            frames=media.num_frames or 32,
            geometry=config.geometry.default_flag if config.geometry is not None else "auto",
            draw_marks=draw_marks,
        )

    def export() -> None:
        best = run_folder / "best"
        work = best.with_name("best.tmp")
        shutil.rmtree(work, ignore_errors=True)
        # By name: a state dict of FSDP2 would cut the weights again.
        weights = {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}
        if config.lora is not None and not config.export.merge_lora:
            save_adapters(model, work, state_dict=weights)
        else:
            model.save_pretrained(work, state_dict=weights)
        shutil.rmtree(best, ignore_errors=True)
        work.rename(best)

    return BenchmarkProbe(
        open_benchmarks(section),
        generator,
        run_folder / "eval",
        ranks,
        max_samples=section.max_samples,
        allow_absolute=section.allow_absolute_media,
        restore=restore,
        select=section.select,
        on_best=export,
    )
