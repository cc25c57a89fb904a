"""Sections ``data``, ``step``, ``packing``, ``shared_prefix``, ``loader``: what is trained on, in which order."""

from __future__ import annotations

from typing import Annotated, Any, Literal

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
    Switch,
)

FormatName = Literal[
    "auto", "canonical", "embedded", "llava_onevision", "llava_video", "messages", "qwen_finetune", "scanqa",
    "sensenova", "sharegpt", "spar", "spatialvlm_rows", "sqa3d", "vica", "vlm3r", "vsi590k",
]  # fmt: skip


class SourceMediaConfig(Section):
    """Media policy of one source; ``None`` takes the value of ``data.media``."""

    frames: Literal["uniform", "fps"] | None = None
    """How frames of a video are chosen."""
    num_frames: PositiveInt | None = None
    """Frames per video under ``uniform``."""
    fps: PositiveFloat | None = None
    """Frames per second; required with ``frames: fps``, ``None`` otherwise."""
    min_pixels: PositiveInt | None = None
    """Smallest image after resizing, in pixels."""
    max_pixels: PositiveInt | None = None
    """Largest image after resizing, in pixels."""
    video_max_pixels: PositiveInt | None = None
    """Largest video frame after resizing, in pixels."""
    video_total_pixels: PositiveInt | None = None
    """Largest sum of pixels over the frames of one video."""


class SourceConfig(Section):
    """One dataset: files of one format below one root."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
    """Unique name used in logs, counts and quarantine."""
    family: NonEmptyStr
    """Side of the mixture, e.g. ``spatial`` or ``general``."""
    files: Annotated[tuple[NonEmptyStr, ...], Field(min_length=1)]
    """Data files, relative to ``root``; glob patterns allowed."""
    root: NonEmptyStr
    """Folder that no file of the source may leave."""
    base: str = "."
    """Folder below ``root`` that media paths of the rows start from."""
    format: FormatName = "auto"
    """Row format; ``auto`` decides by the keys of the first rows."""
    repeat: NonNegativeFloat = 1.0
    """Times each row is drawn per epoch; 2.5 gives two full passes and half of a third."""
    fraction: Annotated[float, Field(strict=True, gt=0, le=1)] = 1.0
    """Seeded subset of the rows, nested for growing fractions."""
    max_samples: PositiveInt | None = None
    """Upper limit of rows after ``fraction``; ``None`` = all."""
    weight: NonNegativeFloat | None = None
    """Share inside its family; ``None`` = eligible rows times ``repeat``."""
    coords: Literal["abs_source", "abs_resized", "norm1000", "norm1", "none"] | None = None
    """Convention of coordinates in the text; ``None`` = the format's own."""
    geometry: Switch | None = None
    """Whether samples use the geometry branch; ``None`` = ``geometry.default_flag``."""
    pinned: Bool = False
    """The question names frames: never choose others, never drop any."""
    answers: Literal["first", "cycle", "all"] = "first"
    """Which answer of a row with several: the first, one per epoch, or one sample each."""
    fixes: tuple[Literal["python_literal_json"], ...] = ()
    """Repairs applied to answers: ``python_literal_json`` rewrites Python literals as JSON."""
    normalize_marker: Literal["keep", "front"] = "keep"
    """``front`` moves media of the first turn before its text, so that rows on one medium can share a prefix."""
    media_template: str | None = None
    """Media path for formats that only name a scene, e.g. ``scannet/{scene_id}``; ``None`` elsewhere."""
    access: Literal["arrow", "row_group"] = "arrow"
    """How parquet with embedded bytes is read row by row."""
    capability_map: dict[str, str] = {}
    """Question type of a row -> capability used in logs and weights."""
    exclude_prefixes: tuple[str, ...] = ()
    """Media path prefixes whose rows are left out, counted."""
    media: SourceMediaConfig = SourceMediaConfig()
    max_bad_fraction: Fraction | None = None
    """Budget of broken media of this source; ``None`` = ``data.max_bad_fraction``."""


class LengthConfig(Section):
    """When the run ends; exactly one of ``epochs``, ``samples``, ``steps``."""

    epochs: PositiveFloat | None = None
    """Epochs of the family ``of``."""
    of: str | None = None
    """Family whose rows define an epoch; ``None`` = the only family, or ``spatial``."""
    samples: PositiveInt | None = None
    """Number of samples."""
    steps: PositiveInt | None = None
    """Number of optimizer steps."""


class MediaConfig(Section):
    """How images and videos are decoded and sized."""

    frames: Literal["uniform", "fps"] = "uniform"
    """``uniform`` = ``num_frames`` evenly spaced, both ends included; ``fps`` = by time."""
    num_frames: PositiveInt = 32
    """Frames per video under ``uniform``."""
    fps: PositiveFloat | None = None
    """Frames per second; required with ``frames: fps``, ``None`` otherwise."""
    min_frames: PositiveInt = 8
    """``overlong: drop_frames`` never goes below."""
    max_frames: PositiveInt = 512
    """Upper limit under ``fps``."""
    cache_mb: NonNegativeInt = 256
    """Decoded frames kept per loader worker, in MB."""
    max_image_pixels: PositiveInt = 89_478_485
    """Larger images are refused before decoding."""
    min_pixels: PositiveInt | None = None
    """Smallest image after resizing; ``None`` = the checkpoint's processor."""
    max_pixels: PositiveInt | None = None
    """Largest image or video frame after resizing; ``None`` = the checkpoint's processor."""
    video_max_pixels: PositiveInt | None = None
    """Largest video frame after resizing; ``None`` = ``max_pixels``."""
    video_total_pixels: PositiveInt | None = None
    """Largest sum of pixels over the frames of one video; ``None`` = the checkpoint's processor."""
    max_tiles: PositiveInt = 1
    """InternVL images without geometry: most tiles per image."""
    allow_absolute: Bool = False
    """Accept absolute media paths."""
    allow_outside_root: Bool = False
    """Accept media paths that leave the source's root."""
    video_backend: Literal["pyav", "torchcodec"] = "pyav"
    """What decodes video files; both give the same frames."""
    frame_dir_fps: PositiveFloat = 1.0
    """Assumed rate of frame folders without times."""


class DecontaminationConfig(Section):
    """Evaluation scenes that must not be trained on; checked before the first step."""

    lists: tuple[NonEmptyStr, ...] = ("vsi_bench",)
    """Built-in names or paths of text files with one scene id per line."""
    on_hit: Literal["error", "drop", "allow"] = "error"
    """What a hit does."""
    unknown: Literal["report", "error"] = "report"
    """What rows without a recognised scene id do."""


class CurriculumConfig(Section):
    """Order by a key of the rows instead of shuffling."""

    key: Literal["difficulty", "margin"] = "difficulty"
    """Easy first: ascending difficulty, or descending margin."""
    buckets: PositiveInt = 10
    """Quantile buckets, shuffled inside."""


class DataConfig(Section):
    """Sources, mixture, media, labels and faults."""

    sources: Annotated[tuple[SourceConfig, ...], Field(min_length=1)]
    """Datasets of the mixture."""
    families: dict[str, NonNegativeFloat] = {"spatial": 1.0, "general": 1.0}
    """Weight of each side of the mixture."""
    seed: NonNegativeInt = 0
    """Seed of the order; everything else draws from ``run.seed``."""
    length: LengthConfig = LengthConfig(epochs=1.0)
    tail: Literal["drop", "pad"] = "drop"
    """Last incomplete step: left out, or filled by drawing on."""
    unit: Literal["samples", "tokens"] = "samples"
    """What the mixture's weights count."""
    capabilities: dict[str, NonNegativeFloat] = {}
    """Optional weights of capabilities inside a family; empty = by rows."""
    order: Literal["shuffled", "curriculum"] = "shuffled"
    """Order of the rows inside each source."""
    curriculum: CurriculumConfig = CurriculumConfig()
    fraction: Annotated[float, Field(strict=True, gt=0, le=1)] = 1.0
    """Scales every source through its seeded nested subset."""
    media: MediaConfig = MediaConfig()
    overlong: Literal["reject", "drop_frames", "truncate_text_turns"] = "reject"
    """Samples above ``packing.max_length``; every outcome is counted."""
    max_bad_fraction: Fraction = 0.001
    """Budget of samples whose media cannot be read."""
    max_rejected_fraction: Fraction = 0.01
    """Budget of rows rejected while indexing."""
    lengths: Literal["auto", "exact", "lazy"] = "auto"
    """Measure every row ahead (``exact``), when planned (``lazy``), or whatever the cache allows."""
    index_dir: NonEmptyStr = ".cache/index"
    """Folder of the index and length caches."""
    loss_weighting: Literal["token", "sample", "sqrt"] = "token"
    """Every supervised token, every sample, or the square root in between counts the same."""
    train_on: Literal["all", "last"] = "all"
    """Which assistant turns are supervised."""
    system: str = "stock"
    """``stock`` = the template's default, ``none``, or the text itself."""
    marked_formats: Fraction | None = None
    """Share of generated rows shown in an instruction format with drawn marks, of those that may be shown with
    and without; ``None`` = every format is as likely as another. A question with marks shares its prefix with
    no other one."""
    coords_to: Literal["keep", "native"] = "keep"
    """``native`` rewrites coordinates into the backbone's convention."""
    decontamination: DecontaminationConfig = DecontaminationConfig()


class StepConfig(Section):
    """What one optimizer step consumes."""

    unit: Literal["samples", "packs"] = "samples"
    """``samples``: composition independent of the world size; ``packs``: a fixed number of packs."""
    global_batch_size: PositiveInt = 128
    """Samples per step over all ranks (``unit: samples``)."""
    lookahead: PositiveInt = 1024
    """Draws packed together (``unit: packs``)."""
    packs_per_step: PositiveInt | None = None
    """Packs per step over all ranks; required with ``unit: packs``, ``None`` otherwise."""


class PackingConfig(Section):
    """How samples become flattened sequences."""

    enabled: Bool = True
    """``False`` = one sample or group per pack."""
    max_tokens: PositiveInt = 16_384
    """Tokens of one pack, text and media."""
    max_length: PositiveInt | None = None
    """Tokens of one sample; ``None`` = ``max_tokens``."""
    attention: Literal["auto", "tree_sdpa", "tree_flash", "tree_flex", "tree_mask"] = "auto"
    """Attention backend; all isolate, a start-up probe proves it."""
    align: PositiveInt = 1
    """Pad a pack to a multiple of this (128 with ``tree_flex``)."""
    fixed_micro_steps: PositiveInt | None = None
    """Force this many micro-steps per step; ``None`` = as many as needed."""


class SharedPrefixConfig(Section):
    """Questions about the same media share one visual prefix."""

    enabled: Bool = True
    """``False`` also changes the order: rows are drawn singly."""
    compute: Literal["shared", "separate"] = "shared"
    """``separate`` keeps order and packs but computes every sample alone."""
    max_branches: PositiveInt = 8
    """Questions per group."""
    min_media_per_step: Literal["auto"] | PositiveInt = "auto"
    """Distinct media a step must hold; ``auto`` = ceil(global_batch_size / max_branches)."""
    diversity: Literal["warn", "strict"] = "warn"
    """A step with fewer distinct media: logged, or an error."""
    dropout: Literal["error", "shared"] = "error"
    """Dropout with shared prefixes: refused, or (``shared``) one mask for the prefix of a group, which is no
    longer the gradient of separate samples."""


class LoaderConfig(Section):
    """Worker processes of the data path."""

    num_workers: Literal["auto"] | NonNegativeInt = "auto"
    """Worker processes per rank; 0 loads in the training process."""
    prefetch_steps: PositiveInt = 1
    """Optimizer steps loaded ahead."""
    prefetch_mb: PositiveInt = 2048
    """Memory of prefetched batches per rank, in MB."""
    timeout_s: PositiveFloat = 120.0
    """Longest time for one pack."""


_LENGTH_KEYS = ("epochs", "samples", "steps")


def data_problems(
    data: DataConfig, step: StepConfig, packing: PackingConfig, shared_prefix: SharedPrefixConfig
) -> list[tuple[str, str]]:
    """Contradictions inside the data sections, as (key, message)."""
    found: list[tuple[str, str]] = []

    def add(key: str, message: str, *values: Any) -> None:
        found.append((key, message.format(*values)))

    names = [source.name for source in data.sources]
    for name in sorted({n for n in names if names.count(n) > 1}):
        add("data.sources", "two sources are named {!r}; names are unique", name)
    used = {source.family for source in data.sources}
    for source in data.sources:
        if source.family not in data.families:
            add(f"data.sources.{source.name}.family", "{!r} is not one of data.families: {}", source.family,
                ", ".join(sorted(data.families)))  # fmt: skip
    for family, weight in data.families.items():
        if weight > 0 and family not in used:
            add(
                f"data.families.{family}",
                "no source has this family; add one or set its weight to 0",
            )
    if not any(weight > 0 for weight in data.families.values()):
        add("data.families", "all weights are 0")
    chosen = [key for key in _LENGTH_KEYS if getattr(data.length, key) is not None]
    if len(chosen) != 1:
        add("data.length", "set exactly one of epochs, samples, steps; got {}", chosen or "none")
    if data.length.of is not None and data.length.of not in data.families:
        add(
            "data.length.of",
            "{!r} is not one of data.families: {}",
            data.length.of,
            ", ".join(sorted(data.families)),
        )
    policies: list[tuple[str, MediaConfig | SourceMediaConfig]] = [("data.media", data.media)]
    policies += [(f"data.sources.{source.name}.media", source.media) for source in data.sources]
    for prefix, media in policies:
        if media.frames == "fps" and media.fps is None and data.media.fps is None:
            add(f"{prefix}.fps", "frames: fps needs a rate")
        if media.min_pixels and media.max_pixels and media.min_pixels > media.max_pixels:
            add(
                f"{prefix}.min_pixels",
                "{} is above max_pixels {}",
                media.min_pixels,
                media.max_pixels,
            )
    if packing.max_length is not None and packing.max_length > packing.max_tokens:
        add(
            "packing.max_length",
            "{} is above packing.max_tokens {}",
            packing.max_length,
            packing.max_tokens,
        )
    if data.unit == "tokens" and data.lengths == "lazy":
        add("data.unit", "tokens needs exact lengths; set data.lengths to exact")
    if step.unit == "packs" and step.packs_per_step is None:
        add("step.packs_per_step", "is required with step.unit: packs")
    if step.unit == "packs" and data.lengths == "lazy" and data.length.steps is None:
        add(
            "data.length",
            "the number of steps is unknown with step.unit: packs and lazy lengths; set steps",
        )
    if (
        isinstance(shared_prefix.min_media_per_step, int)
        and shared_prefix.min_media_per_step > step.global_batch_size
    ):
        add("shared_prefix.min_media_per_step", "{} is above step.global_batch_size {}",
            shared_prefix.min_media_per_step, step.global_batch_size)  # fmt: skip
    return found
