"""The data sections of a config -> a loader; the only place of the data path that sees config objects."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from spatialvlm.data.encode import OverlongPolicy
from spatialvlm.data.faults import Quarantine
from spatialvlm.data.formats import SourceAttrs
from spatialvlm.data.hooks import DrawMarks, ExpandFormat, SceneCheck
from spatialvlm.data.index import SourceIndex
from spatialvlm.data.index_build import build_index
from spatialvlm.data.lengths import LengthTable
from spatialvlm.data.loader import StepComposition, StepLoader
from spatialvlm.data.media.plan import MediaPolicy
from spatialvlm.data.media.store import FrameCache, MediaStore
from spatialvlm.data.media.torchcodec import load_torchcodec
from spatialvlm.data.mixture import Mixture, mixture_for_steps
from spatialvlm.data.plan import PackingArgs
from spatialvlm.data.prepare import SampleEncoder, SourceMedia
from spatialvlm.data.record import data_record, write_record
from spatialvlm.data.sample import CoordConvention, World
from spatialvlm.data.sources import Source, check_sources
from spatialvlm.data.template import ChatTemplate, load_processor
from spatialvlm.data.units import SourceRows
from spatialvlm.errors import ConfigError, DataError
from spatialvlm.sequence.layout import TokenLayout
from spatialvlm.typing import CostCoefficients

if TYPE_CHECKING:
    from spatialvlm.config.data import (
        DataConfig,
        LoaderConfig,
        PackingConfig,
        SharedPrefixConfig,
        SourceConfig,
    )
    from spatialvlm.config.recipe import TrainConfig

MEASURE_AT_ONCE = 20_000
"""With ``lengths: auto`` and no cache, mixtures up to this many rows are measured before the run starts."""


NATIVE_COORDS: dict[str, CoordConvention] = {
    "qwen2_5vl": "abs_resized",
    "qwen3vl": "norm1000",
    "internvl3": "norm1000",
}
"""What the released checkpoints were trained to write boxes in."""


def build_data(
    config: TrainConfig,
    checkpoint_dir: str | Path,
    layout: TokenLayout,
    cost: CostCoefficients,
    world: World,
    *,
    blocked: SceneCheck | None = None,
    blocked_key: str = "",
    draw_marks: DrawMarks | None = None,
    expand_format: ExpandFormat | None = None,
    state: Mapping[str, Any] | None = None,
    new_order: bool = False,
    workers: int = 1,
    verify_files: bool = False,
    report: Callable[[str], None] = lambda _: None,
) -> StepLoader:
    """Index, measure, and order the sources of a run.

    Args:
        config: A training recipe; its sections ``data step packing shared_prefix loader`` are read.
        checkpoint_dir: Hugging Face directory with tokenizer, processor and chat template.
        layout: Token layout of the run.
        cost: FLOPs coefficients that balance the ranks.
        world: Rank and number of ranks.
        blocked: Looks up scene and room ids and media paths in the block lists.
        blocked_key: Identity of those lists.
        draw_marks: Draws marks into frames, picklable.
        expand_format: Realises instruction formats, picklable.
        state: Loader state to resume from.
        new_order: Accept a state of another order, and continue at its position.
        workers: Processes that index and measure.
        verify_files: Compare the data files whole with those that were indexed.
        report: Called with one line of text per stage of the work.

    Raises:
        ConfigError: Sources, weights, or the checkpoint do not fit together.
        DataError: Rows are blocked, broken beyond the budget, or too long.
    """
    encoder = build_encoder(
        config,
        checkpoint_dir,
        layout,
        blocked=blocked,
        blocked_key=blocked_key,
        draw_marks=draw_marks,
        expand_format=expand_format,
        workers=workers,
        verify_files=verify_files,
    )
    for text in coord_warnings(encoder):
        report(text)
    lengths = LengthTable(encoder)
    mode = choose_length_mode(config.data, lengths)
    if mode == "exact":
        for number, index in enumerate(encoder.indices):
            if not lengths.complete(number):
                report(f"measuring {len(index)} rows of {index.source.name}")
            lengths.measure_all(number, workers)
            section = config.data.sources[number]
            own = section.max_bad_fraction
            for note in lengths.check(
                number,
                max_bad=config.data.max_bad_fraction if own is None else own,
                max_overlong=config.data.max_rejected_fraction,
            ):
                report(note)
    mixture = build_mixture(config, encoder.indices, lengths, mode)
    notes = [note for index in encoder.indices for note in index.source.notes]
    for text in [*notes, *mixture.warnings]:
        report(text)
    # The recipe has made the run folder; the tools that only look must not.
    if world.rank == 0 and Path(config.run.dir).is_dir():
        record = data_record(lengths, mixture, blocked_key)
        write_record(Path(config.run.dir) / "data.json", mixture, record)
    return StepLoader(
        mixture,
        lengths,
        cost,
        world=world,
        packing=packing_args(config.packing, config.shared_prefix),
        composition=step_composition(config, world),
        loss_weighting=config.data.loss_weighting,
        align=config.packing.align,
        num_workers=num_workers(config.loader, world),
        prefetch_steps=config.loader.prefetch_steps,
        prefetch_mb=config.loader.prefetch_mb,
        timeout_s=config.loader.timeout_s,
        pin_memory=torch.cuda.is_available(),
        quarantine=build_quarantine(config, encoder, world),
        state=state,
        new_order=new_order,
    )


def build_encoder(
    config: TrainConfig,
    checkpoint_dir: str | Path,
    layout: TokenLayout,
    *,
    blocked: SceneCheck | None = None,
    blocked_key: str = "",
    draw_marks: DrawMarks | None = None,
    expand_format: ExpandFormat | None = None,
    workers: int = 1,
    verify_files: bool = False,
) -> SampleEncoder:
    """Sources, row tables, media access and template of a run.

    Raises:
        ConfigError: A file is missing or listed twice, or the checkpoint does not fit.
        DataError: A source has no usable row, or blocked scenes.
    """
    data = config.data
    if data.media.video_backend == "torchcodec":
        load_torchcodec()  # here, not in a worker
    template = ChatTemplate.from_checkpoint(checkpoint_dir, data.system)
    policy = MediaPolicy.from_processor(load_processor(checkpoint_dir))
    sources = [build_source(section, data, config) for section in data.sources]
    check_sources(sources)
    cache = FrameCache(data.media.cache_mb << 20)
    indices = []
    for source in sources:
        index = build_index(
            source,
            data.index_dir,
            check=blocked,
            check_key=blocked_key,
            workers=workers,
            max_rejected_fraction=data.max_rejected_fraction,
            verify_files=verify_files,
        )
        check_blocked(index, data)
        indices.append(index)
    names = sorted({name for index in indices for name in index.capabilities})
    return SampleEncoder(
        indices=indices,
        media=[
            SourceMedia(
                build_store(source, data, cache), media_policy(policy, section, data, layout)
            )
            for source, section in zip(sources, data.sources, strict=True)
        ],
        template=template,
        layout=layout,
        overlong=OverlongPolicy(
            config.packing.max_length or config.packing.max_tokens,
            data.overlong,
            data.media.min_frames,
        ),
        train_on=data.train_on,
        capabilities={name: number for number, name in enumerate(names)},
        draw_marks=draw_marks,
        expand_format=expand_format,
        coords=NATIVE_COORDS[template.family] if data.coords_to == "native" else None,
    )


def build_source(section: SourceConfig, data: DataConfig, config: TrainConfig) -> Source:
    """One entry of ``data.sources``."""
    default = config.geometry.default_flag if config.geometry is not None else "auto"
    return Source(
        SourceAttrs(
            name=section.name,
            family=section.family,
            base=section.base,
            coords=section.coords,
            geometry=section.geometry or default,
            pinned=section.pinned,
            answers=section.answers,
            fixes=section.fixes,
            normalize_marker=section.normalize_marker,
            media_template=section.media_template,
            capability_map=section.capability_map or None,
            exclude_prefixes=section.exclude_prefixes,
        ),
        files=section.files,
        root=section.root,
        format=section.format,
        access=section.access,
        cache_dir=data.index_dir,
    )


def build_store(source: Source, data: DataConfig, cache: FrameCache) -> MediaStore:
    """Media access of one source."""
    media = data.media
    return MediaStore(
        source.root,
        read_bytes=source.media_bytes,
        cache=cache,
        allow_absolute=media.allow_absolute,
        allow_outside_root=media.allow_outside_root,
        max_image_pixels=media.max_image_pixels,
        frame_dir_fps=media.frame_dir_fps,
        video_backend=media.video_backend,
    )


def media_policy(
    policy: MediaPolicy, section: SourceConfig, data: DataConfig, layout: TokenLayout
) -> MediaPolicy:
    """Size and sampling rules of one source: its own values, else the run's, else the checkpoint's."""
    own, run = section.media, data.media

    def pick(name: str) -> Any:
        value = getattr(own, name)
        return getattr(run, name) if value is None else value

    return policy.with_budget(
        min_pixels=pick("min_pixels"),
        max_pixels=pick("max_pixels"),
        video_max_pixels=pick("video_max_pixels"),
        video_total_pixels=pick("video_total_pixels"),
        frames=pick("frames"),
        num_frames=pick("num_frames"),
        fps=pick("fps"),
        max_frames=run.max_frames,
        max_tiles=run.max_tiles,
        max_image_pixels=run.max_image_pixels,
        frame_dir_fps=run.frame_dir_fps,
        temporal=layout.tau,
    )


def build_quarantine(config: TrainConfig, encoder: SampleEncoder, world: World) -> Quarantine:
    """Where broken samples of this rank are recorded, and how many a source may have."""
    limits = {
        section.name: section.max_bad_fraction
        for section in config.data.sources
        if section.max_bad_fraction is not None
    }
    for index in encoder.indices:
        if index.source.format.exact:
            limits.setdefault(index.source.name, 0.0)
    return Quarantine(
        Path(config.run.dir) / "quarantine.jsonl",
        [index.source.name for index in encoder.indices],
        limits=limits,
        default_limit=config.data.max_bad_fraction,
        rank=world.rank,
    )


def check_blocked(index: SourceIndex, data: DataConfig) -> None:
    """Apply ``data.decontamination`` to what indexing found.

    Raises:
        DataError: Blocked scenes under ``on_hit: error``, or rows without a known id under
            ``unknown: error``.
    """
    blocked, rules = index.info["blocked"], data.decontamination
    if blocked and rules.on_hit == "error":
        hits = "; ".join(
            f"{count} of {name}, first {', '.join(index.info['blocked_first'][name])}"
            for name, count in blocked.items()
        )
        raise DataError(
            f"source {index.source.name} holds rows of evaluation scenes: {hits}. Set "
            "data.decontamination.on_hit to drop (leaves them out) or allow (keeps them)",
            reason="blocked",
        )
    unknown = index.info["no_known_id"]
    if unknown and rules.unknown == "error":
        raise DataError(
            f"source {index.source.name} has {unknown} rows with media but without a known scene or room id, so they "
            "cannot be checked against the block lists. Set data.decontamination.unknown: report to accept them",
            reason="blocked",
        )


def coord_warnings(encoder: SampleEncoder) -> list[str]:
    """Sources whose box numbers are not in the backbone's convention and stay as they are."""
    native = NATIVE_COORDS[encoder.template.family]
    if encoder.coords is not None:
        return []
    out = []
    for index in encoder.indices:
        attrs, fmt = index.source.attrs, index.source.format
        own = attrs.coords or fmt.coords
        if own not in ("none", native):
            out.append(
                f"source {index.source.name} writes boxes as {own}, {encoder.template.family} was trained with "
                f"{native}; data.coords_to: native rewrites them"
            )
    return out


def choose_length_mode(data: DataConfig, lengths: LengthTable) -> str:
    """``exact`` or ``lazy`` for ``data.lengths``."""
    if data.lengths != "auto":
        return data.lengths
    missing = sum(lengths.unmeasured(source) for source in range(len(lengths.records)))
    return "exact" if missing <= MEASURE_AT_ONCE else "lazy"


def build_mixture(
    config: TrainConfig, indices: list[SourceIndex] | Any, lengths: LengthTable, mode: str
) -> Mixture:
    """The order of a run.

    Raises:
        ConfigError: Weights, lengths, or sources do not fit together.
    """
    data = config.data
    drop = data.decontamination.on_hit == "drop"
    rows = []
    for number, (index, section) in enumerate(zip(indices, data.sources, strict=True)):
        eligible = index.eligible(drop_blocked=drop) & lengths.usable(number)
        if not eligible.any():
            raise DataError(
                f"source {section.name}: no row can be used; unusable: {lengths.rejected(number) or index.rejected()}"
            )
        rows.append(
            SourceRows(
                name=section.name,
                family=section.family,
                prefix_key=index.column("prefix_key"),
                eligible=eligible,
                content_key=index.content_key,
                weight=section.weight,
                repeat=section.repeat * max(1.0, index.source.repeat_time),
                fraction=section.fraction * data.fraction * min(1.0, index.source.repeat_time),
                max_samples=section.max_samples,
                capability=index.column("capability"),
                capabilities=index.capabilities,
                mean_tokens=_mean_tokens(lengths, number, eligible)
                if data.unit == "tokens"
                else None,
                difficulty=_curriculum_key(index, data) if data.order == "curriculum" else None,
                row_group=index.row_groups(),
                cache_dir=index.folder,
            )
        )
    length = data.length
    samples = length.samples
    if length.steps is not None:
        samples = length.steps * config.step.global_batch_size
    shared = config.shared_prefix
    return mixture_for_steps(
        rows,
        data.families,
        global_batch_size=config.step.global_batch_size,
        max_branches=shared.max_branches if shared.enabled else 1,
        min_media_per_step=shared.min_media_per_step if shared.enabled else 1,
        seed=data.seed,
        unit=data.unit,
        capabilities=data.capabilities,
        curriculum_buckets=data.curriculum.buckets if data.order == "curriculum" else 0,
        epochs=length.epochs,
        of=length.of,
        samples=samples,
        mode=mode,
    )


def step_composition(config: TrainConfig, world: World) -> StepComposition:
    """What one optimizer step consumes.

    Raises:
        ConfigError: Fewer samples or packs per step than ranks.
    """
    step, shared = config.step, config.shared_prefix
    if step.unit == "samples" and step.global_batch_size < world.size:
        raise ConfigError(
            f"step.global_batch_size={step.global_batch_size} is below the {world.size} ranks; every rank needs a sample"
        )
    if step.packs_per_step is not None and step.packs_per_step % world.size:
        raise ConfigError(
            f"step.packs_per_step={step.packs_per_step} is no multiple of the {world.size} ranks"
        )
    media = shared.min_media_per_step
    if not shared.enabled:
        media = 1
    elif media == "auto":
        media = -(-step.global_batch_size // shared.max_branches)
    return StepComposition(
        global_batch_size=step.global_batch_size,
        unit=step.unit,
        tail=config.data.tail,
        lookahead=step.lookahead,
        packs_per_step=step.packs_per_step,
        steps=config.data.length.steps,
        min_media=media,
        strict_diversity=shared.diversity == "strict",
    )


def packing_args(packing: PackingConfig, shared: SharedPrefixConfig) -> PackingArgs:
    """Limits of packs and groups."""
    return PackingArgs(
        max_tokens=packing.max_tokens,
        enabled=packing.enabled,
        max_branches=shared.max_branches if shared.enabled else 1,
        compute=shared.compute,
        fixed_micro_steps=packing.fixed_micro_steps,
    )


def num_workers(loader: LoaderConfig, world: World) -> int:
    """``auto`` = the host's cores shared by its ranks, one left for training, at most 8."""
    if loader.num_workers != "auto":
        return loader.num_workers
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    return max(0, min(8, (os.cpu_count() or 1) // local - 1))


def _mean_tokens(lengths: LengthTable, source: int, eligible: Any) -> float:
    if not lengths.complete(source):
        raise ConfigError(
            "data.unit: tokens needs the length of every row; set data.lengths: exact"
        )
    return float(lengths.records[source]["tokens"][eligible].mean())


def _curriculum_key(index: SourceIndex, data: DataConfig) -> Any:
    key = index.column(data.curriculum.key)
    return -key if data.curriculum.key == "margin" else key
