r"""Render procedural rooms with exact boxes, depth, instance maps and visibility.

    python tools/render_rooms.py --num 200 --frames 8 --size 128 --preset small --split train \
        --out data/demo/rooms/train --workers 2 --seed 0

Room ``i`` has seed ``--seed + i`` and goes to ``<out>/<split>-<seed>/{scene.json, rgb, instance, depth}``.
The files do not depend on the number of workers. A second run skips finished rooms.

Presets: ``realistic`` furnished rooms, ``small`` few large objects for small images, ``turntable`` one piece
from 48 sides, ``blocks`` stacks of cubes (these two have their own number of frames). ``--twins 0.2`` adds
counterfactual twins (one object moved, removed, or everything mirrored) to a fifth of the rooms.
"""

import argparse
import multiprocessing
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from spatialvlm.errors import SpatialVLMError, run_command
from spatialvlm.scenes.rooms.appearance import rng_for
from spatialvlm.scenes.rooms.build import RenderConfig, RoomSpec, is_written, write_room

Job = tuple[RoomSpec, Path, RenderConfig]


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num", "--rooms", type=int, default=64, help="number of rooms")
    parser.add_argument(
        "--frames", type=int, default=8, help="frames per room, half a second apart"
    )
    parser.add_argument("--size", type=int, default=336, help="width and height in pixels")
    parser.add_argument(
        "--preset", choices=("realistic", "small", "turntable", "blocks"), default="realistic"
    )
    parser.add_argument("--split", choices=("train", "val", "test"), default="train")
    parser.add_argument("--grammar", help="only this layout grammar of the split")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first room")
    parser.add_argument("--ssaa", type=int, default=2, help="colour samples per pixel side")
    parser.add_argument(
        "--renderer",
        choices=("numpy", "cycles"),
        default="numpy",
        help="cycles: path-traced colours by Blender (pip install bpy), seconds per frame",
    )
    parser.add_argument("--twins", type=float, default=0.0, help="share of rooms that get a twin")
    parser.add_argument("--no-depth", action="store_true", help="do not store depth images")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    for name in ("num", "frames", "size", "ssaa", "workers"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    if not 0 <= arguments.seed <= 10_000_000 - arguments.num:
        parser.error(f"--seed must lie in 0..9999999 for every room, got {arguments.seed}")
    if not 0 <= arguments.twins <= 1 or (
        arguments.twins and arguments.preset not in ("realistic", "small")
    ):
        parser.error("--twins is a share between 0 and 1 and needs the preset realistic or small")
    return arguments


def render(job: Job) -> tuple[str, str | None]:
    """Write one room unless it is there; returns its name and an error message."""
    spec, out, config = job
    try:
        write_room(spec, out, config)
    except SpatialVLMError as error:
        return spec.name, str(error)
    return spec.name, None


def main() -> int:
    """Render what is missing; exit 1 when a room failed."""
    arguments = parse_arguments()
    config = RenderConfig(
        num_frames=arguments.frames,
        width=arguments.size,
        height=arguments.size,
        ssaa=arguments.ssaa,
        depth=not arguments.no_depth,
        renderer=arguments.renderer,
    )
    specs = [
        RoomSpec(arguments.seed + i, arguments.split, arguments.preset, arguments.grammar)
        for i in range(arguments.num)
    ]
    specs += [
        replace(spec, twin=1)
        for spec in specs
        if rng_for("has twin", spec.split, spec.preset, spec.seed).random() < arguments.twins
    ]
    arguments.out.mkdir(parents=True, exist_ok=True)
    jobs = [
        (spec, arguments.out, config)
        for spec in specs
        if not is_written(spec, arguments.out, config)
    ]
    start, failed = time.monotonic(), []
    progress = tqdm(total=len(specs), initial=len(specs) - len(jobs), unit="room", desc="rooms")
    if arguments.workers == 1 or len(jobs) < 2:
        results = map(render, jobs)
    else:
        for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ[variable] = "1"  # read by the spawned workers
        pool = multiprocessing.get_context("spawn").Pool(min(arguments.workers, len(jobs)))
        results = pool.imap_unordered(render, jobs, chunksize=1)
    for name, error in results:
        progress.update()
        if error is not None:
            failed.append(name)
            progress.write(f"{name}: {error}", file=sys.stderr)
    progress.close()
    seconds = time.monotonic() - start
    print(f"{len(jobs) - len(failed)} rooms rendered in {seconds:.1f} s, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
