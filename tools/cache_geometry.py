"""Compute the geometry features of a recipe's data once, so that training reads them from disk.

    python tools/cache_geometry.py configs/stage2/qwen2_5vl_7b_interleaved.yaml geometry.cache.dir=/fast/features
    python tools/cache_geometry.py CONFIG geometry.cache.dir=DIR geometry.cache.max_gb=500 --workers 8
    python tools/cache_geometry.py CONFIG geometry.cache.dir=DIR --shard 0/4      # one of four machines

Rows, frames and sizes are chosen by the same code as in training, so training with the same recipe finds every
entry. A video that many rows ask about is encoded once. Stopping at any moment loses at most the video in work: run
the command again and it continues. Worker k uses GPU k modulo the number of GPUs. Rows that cannot be read are
counted and skipped here; training decides about them by its own budget.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spatialvlm.config import TrainConfig, load_config
from spatialvlm.errors import ConfigError, DataError, SpatialVLMError, run_command

if TYPE_CHECKING:
    from torch import Tensor

    from spatialvlm.data.prepare import SampleEncoder


def main() -> int:
    """Parse, start the workers, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="training recipe with a geometry section")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    parser.add_argument("--workers", type=int, default=1, help="processes on this machine")
    parser.add_argument("--shard", default="0/1", help="part of the work for this machine, i/n")
    args = parser.parse_args()
    try:
        part, num_parts = (int(number) for number in args.shard.split("/"))
        if not 0 <= part < num_parts or args.workers < 1:
            raise ValueError
    except ValueError:
        parser.error(
            f"--shard {args.shard} --workers {args.workers}: need i/n with i < n, and >= 1"
        )
    try:
        config = load_config(args.config, args.overrides, TrainConfig)
        if config.geometry is None or config.geometry.encoder == "none":
            raise ConfigError(f"{args.config} has no geometry encoder; nothing to cache")
        if config.geometry.cache.dir is None:
            raise ConfigError("geometry.cache.dir is not set; give the folder of the cache")
        total = args.workers * num_parts
        first = part * args.workers
        if args.workers == 1:
            counts = work(config, first, total)
        else:
            import multiprocessing

            jobs = [(config, first + worker, total) for worker in range(args.workers)]
            with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
                counts = sum(pool.starmap(work, jobs, chunksize=1), Counter())
    except SpatialVLMError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    print(
        f"{counts['groups']} groups of frames: {counts['misses']} computed, {counts['hits']} found, "
        f"{counts['corrupt']} damaged, {counts['evicted']} evicted; {counts['skipped']} rows skipped"
    )
    if counts["evicted"]:
        print(
            f"geometry.cache.max_gb={config.geometry.cache.max_gb} does not hold all of it; training will recompute "
            "what was evicted. Raise the budget, or use geometry.cache.dtype=fp8"
        )
    return 0


def work(config: TrainConfig, worker: int, num_workers: int) -> Counter[str]:
    """Cache every ``num_workers``-th group of frames."""
    import torch
    from tqdm import tqdm

    from spatialvlm.data.build import build_encoder
    from spatialvlm.models.branch import load_encoder
    from spatialvlm.models.build import build_layout, geometry_settings
    from spatialvlm.models.geometry.cache import CachedEncoder
    from spatialvlm.synthesis.marks import draw_marks

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_workers))
    gpus = torch.cuda.device_count()
    device = torch.device(f"cuda:{worker % gpus}" if gpus else "cpu")
    settings = geometry_settings(config.geometry)
    assert settings is not None
    encoder = load_encoder(settings, device)
    assert isinstance(encoder, CachedEncoder)
    base = config.model.init_from
    layout = build_layout(base, config.geometry)
    samples = build_encoder(config, base, layout, draw_marks=draw_marks)
    counts: Counter[str] = Counter()
    groups = unique_groups(samples, worker, num_workers, counts)
    for frames in tqdm(groups, desc=f"worker {worker}", unit="group", disable=worker > 0):
        encoder([frames.to(device)], return_special=settings["camera_token"])
        counts["groups"] += 1
    stats = encoder.stats
    counts.update(
        hits=stats.hits, misses=stats.misses, corrupt=stats.corrupt, evicted=stats.evicted
    )
    return counts


def unique_groups(
    samples: SampleEncoder, worker: int, num_workers: int, counts: Counter[str]
) -> Iterator[Tensor]:
    """uint8 ``[S, 3, H, W]`` of every distinct geometry group that falls to this worker."""
    import torch

    from spatialvlm.data.encode import geometry_groups
    from spatialvlm.data.prepare import load_pixels

    seen: set[Any] = set()
    for source, index in enumerate(samples.indices):
        store = samples.media[source].store
        for row in range(len(index)):
            try:
                sample, fitted = samples.fitted(source, row)
                groups = geometry_groups(sample, samples.layout)
                media = tuple(
                    (group, info.ref, info.size)
                    for group, info in zip(groups, fitted.media, strict=True)
                    if group >= 0
                )
                known = not media or (str(store.root), media) in seen
                if known:
                    continue
                seen.add((str(store.root), media))
                if (len(seen) - 1) % num_workers != worker:
                    continue
                pixels = load_pixels(
                    sample, fitted.media, store, samples.layout, samples.draw_marks
                )
            except DataError:
                counts["skipped"] += 1
                continue
            for group in range(max(groups) + 1):
                frames = [p.geometry for p in pixels if p.group == group and p.geometry is not None]
                yield torch.cat([torch.from_numpy(f) for f in frames]).movedim(-1, 1)


if __name__ == "__main__":
    sys.exit(run_command(main))
