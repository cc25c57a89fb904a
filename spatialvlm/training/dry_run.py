"""``--dry-run``: what would be trained, on what, and what it needs, without weights, data, or a GPU.

Parameters and FLOPs come from the model on the meta device; data files that are not there are listed as such,
only a real run fails on them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from spatialvlm.config import TrainConfig, dump_yaml
from spatialvlm.config.data import SourceConfig
from spatialvlm.models.build import build_meta_model
from spatialvlm.models.spatial_vlm import SpatialVLM
from spatialvlm.sequence.pixels import PixelSpec
from spatialvlm.training.base import backbone_file
from spatialvlm.training.build import build_cost, build_groups
from spatialvlm.training.estimate import GB, format_memory, require_fit
from spatialvlm.training.launch import strategy_of
from spatialvlm.training.metrics import peak_flops
from spatialvlm.training.optim import group_table
from spatialvlm.training.plan import SUPERVISED_SHARE, VISUAL_SHARE, pack_patches, plan_memory
from spatialvlm.training.progress import duration
from spatialvlm.training.session import build_schedule
from spatialvlm.typing import CostCoefficients

ASSUMED_MFU = 0.4
"""Utilisation behind the time estimate; stated beside it."""
REFERENCE_TFLOPS = 989.0
"""H100 and H200, dense bf16, used when no known GPU is present."""


def dry_run(config: TrainConfig) -> None:
    """Print the resolved configuration, groups, data, steps, files, FLOPs, time and memory.

    Raises:
        ConfigError: Groups, warm-up, or (``memory.strict``) memory do not work out.
    """
    out = sys.stdout
    out.write(f"--- configuration\n{dump_yaml(config)}")
    model = build_meta_model(backbone_file(config.model.backbone), config.geometry)
    parts, groups = build_groups(config, model)
    trainable = sum(group.numel for group in groups)
    total = sum(p.numel() for _, members in parts.items() for _, p in members)
    out.write(f"\n--- parameter groups ({trainable:,} of {total:,} parameters train)\n")
    out.write(group_table(parts, groups) + "\n")
    for group in groups:
        out.write(
            f"  {group.name}: lr {group.lr:g}, weight decay {group.weight_decay:g}, {group.numel:,} parameters\n"
        )
    out.write("\n--- data\n" + describe_data(config) + "\n")
    steps = planned_steps(config)
    if steps is not None:
        schedule = build_schedule(config, steps)
        out.write(f"steps: {steps:,}, warm-up {schedule.warmup_steps:,}\n")
    elif config.step.unit == "packs":
        out.write(
            "steps: unknown, a step is a number of packs; tools/plan_data.py counts them, data.length={steps: n} sets them\n"
        )
    else:
        out.write("steps: unknown until the data files are here\n")
    out.write("\n--- files\n" + describe_files(config, trainable, total) + "\n")
    out.write("\n--- compute\n" + describe_compute(config, model, steps) + "\n")
    out.write("\n--- memory\n" + describe_memory(config, trainable, total - trainable) + "\n")


def source_files(source: SourceConfig) -> list[Path]:
    """Data files of a source that exist."""
    root = Path(source.root)
    return sorted(path for pattern in source.files for path in root.glob(pattern) if path.is_file())


def count_rows(path: Path) -> int | None:
    """Rows of a data file, from its footer or its line breaks; ``None`` for other formats."""
    if path.suffix == ".parquet":
        from pyarrow import parquet

        return int(parquet.ParquetFile(path).metadata.num_rows)
    if path.suffix == ".jsonl":
        with path.open("rb") as file:
            return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))
    return None


def rows_of(source: SourceConfig) -> int | None:
    """Rows of a source after ``fraction`` and ``max_samples``; ``None`` when unknown."""
    files = source_files(source)
    counts = [count_rows(path) for path in files]
    if not files or any(count is None for count in counts):
        return None
    rows = round(sum(count for count in counts if count) * source.fraction)
    return rows if source.max_samples is None else min(rows, source.max_samples)


def describe_data(config: TrainConfig) -> str:
    """Sources with their sizes, and the configured mixture."""
    weights = {name: w for name, w in config.data.families.items() if w > 0}
    total = sum(weights.values())
    lines = ["source                family        rows       repeat  files"]
    for source in config.data.sources:
        rows = rows_of(source)
        files = source_files(source)
        where = f"{len(files)} file(s)" if files else f"not found: {source.root}/{source.files[0]}"
        shown = "unknown" if rows is None else f"{rows:,}"
        lines.append(
            f"{source.name:20}  {source.family:12}  {shown:>9}  {source.repeat:6g}  {where}"
        )
    shares = ", ".join(f"{name} {w / total:.1%}" for name, w in weights.items())
    lines.append(f"mixture by {config.data.unit}: {shares}")
    if config.step.unit == "samples":
        lines.append(
            f"a step: {config.step.global_batch_size} samples over all ranks, in packs of at most "
            f"{config.packing.max_tokens:,} tokens"
        )
    else:
        packs = config.step.packs_per_step or 0
        lines.append(
            f"a step: {packs} packs of at most {config.packing.max_tokens:,} tokens, so at most "
            f"{packs * config.packing.max_tokens:,} tokens per step"
        )
    return "\n".join(lines)


def planned_steps(config: TrainConfig) -> int | None:
    """Optimizer steps, when they follow from the recipe or from rows that are here."""
    length, batch = config.data.length, config.step.global_batch_size
    if length.steps is not None:
        return length.steps
    if config.step.unit == "packs":
        return None
    if length.samples is not None:
        return length.samples // batch
    families = {name: w for name, w in config.data.families.items() if w > 0}
    of = length.of or ("spatial" if "spatial" in families else next(iter(families)))
    rows = [
        (rows_of(source), source.repeat) for source in config.data.sources if source.family == of
    ]
    if any(count is None for count, _ in rows):
        return None
    own = sum(count * repeat for count, repeat in rows if count is not None)
    assert length.epochs is not None
    return (
        int(own * config.data.fraction * length.epochs * sum(families.values()) / families[of])
        // batch
    )


def describe_files(config: TrainConfig, trainable: int, total: int) -> str:
    """Disk space of checkpoints and of the model that a run leaves behind."""
    keep = config.checkpoint.keep_last
    lines = [
        f"checkpoints: {12 * trainable / GB:.1f} GB each, every {config.checkpoint.every:,} steps, the newest {keep} kept "
        "and one more while it is written"
    ]
    if not config.export.final:
        return "\n".join([*lines, "model: none (export.final=false)"])
    final = f"{config.run.dir}/final"
    if config.lora is not None and not config.export.merge_lora:
        lines.append(f"adapters: {final}, about {4 * trainable / GB:.1f} GB")
    else:
        fp32 = config.export.dtype == "fp32"
        size = (4 if fp32 else 2) * total / GB
        note = "twice the size of bf16" if fp32 else "from a bf16 base"
        lines.append(f"model: {final}, about {size:.1f} GB, {note}")
    return "\n".join(lines)


def pack_flops(config: TrainConfig, cost: CostCoefficients, pixels: PixelSpec) -> float:
    """Training FLOPs of one full pack under the stated shares.

    Attention spans samples of 1,024 tokens, vision frames of 1,024 patches, and in the geometry encoder, which sees one
    token per patch and frame, videos of ``num_frames`` such frames.
    """
    tokens = config.packing.max_tokens
    sample = min(1024, tokens)
    patches = pack_patches(config, pixels.merge**2)
    seen = patches * (1 if pixels.layout == "frames" else pixels.temporal)
    video = min(seen, 1024 * config.data.media.num_frames)
    return (
        cost.geometry_per_token * seen
        + cost.geometry_per_frame_pair * seen * min(1024, seen)
        + cost.geometry_per_global_pair * seen * video
        + cost.per_token * tokens
        + cost.per_pair * tokens / sample * sample * (sample + 1) / 2
        + cost.per_head_row * tokens * SUPERVISED_SHARE
        + cost.per_patch * patches
        + cost.per_patch_pair * patches * min(1024, patches)
    )


def describe_compute(config: TrainConfig, model: SpatialVLM, steps: int | None) -> str:
    """FLOPs per token and per pack, and the time they imply."""
    cost = build_cost(config, model)
    pixels = model.adapter.pixels
    need, spent = pack_flops(config, cost.model, pixels), pack_flops(config, cost.balance, pixels)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak = peak_flops(device) or REFERENCE_TFLOPS * 1e12
    world = config.parallel.world_size or int(os.environ.get("WORLD_SIZE", "8"))
    seconds = need / (peak * ASSUMED_MFU)
    seen = ", geometry encoder included" if cost.model.geometry_per_token else ""
    lines = [
        f"per language-model token {cost.model.per_token / 1e9:.2f} GFLOP, per vision patch "
        f"{cost.model.per_patch / 1e9:.2f} GFLOP (forward and backward of what trains)",
        f"a full pack ({VISUAL_SHARE:.0%} visual{seen}, {SUPERVISED_SHARE:.0%} supervised): {need / 1e12:.1f} TFLOP, "
        f"{spent / 1e12:.1f} with recomputation",
        f"time: about {seconds:.2f} s per pack and device at {ASSUMED_MFU:.0%} of {peak / 1e12:.0f} TFLOP/s (an "
        "assumption, not a measurement)",
    ]
    packs = config.step.packs_per_step
    if packs is not None:
        lines.append(
            f"      about {duration(1000 * seconds * packs / world)} per 1,000 steps on {world} devices"
        )
    elif steps is not None:
        lines.append(
            f"      at most {duration(steps * seconds * config.step.global_batch_size / world)} for {steps:,} steps on "
            f"{world} devices, if every sample filled a pack"
        )
    return "\n".join(lines)


def describe_memory(config: TrainConfig, trainable: int, frozen: int) -> str:
    """Memory per strategy and number of devices.

    Raises:
        ConfigError: With ``memory.strict``, when the configured strategy does not fit the device.
    """
    device = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    given = config.parallel.world_size or int(os.environ.get("WORLD_SIZE", "1"))
    tokens = config.packing.max_tokens
    activations, rows = plan_memory(
        config,
        trainable=trainable,
        frozen=frozen,
        worlds=sorted({1, 8, given}),
        device_bytes=device,
    )
    lines = [
        f"one pack of {tokens:,} tokens; activations: "
        + ", ".join(f"{name} {value / 1e9:.1f} GB" for name, value in activations.items()),
        format_memory(rows),
    ]
    if device is not None:
        strategy, _ = strategy_of(config)
        row = next(r for r in rows if r.strategy == strategy and r.world == given)
        warning = require_fit(row, strict=config.memory.strict, device_gb=device / 1e9)
        lines += [] if warning is None else [f"warning: {warning}"]
    return "\n".join(lines)
