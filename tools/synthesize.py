"""Generate spatial questions with exact answers from a folder of scenes.

    python tools/synthesize.py --scenes data/demo/rooms/train --out data/demo/qa/train \
        --tasks left_right,front_behind,dist_abs --workers 2 --seed 0

``--tasks`` takes task ids, ``all``, or a YAML file (``configs/synthesis/``). The rows are the same for
any executor, number of workers and sharding; a killed run continues where it stopped. Rejected
candidates are counted by task and reason.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from tqdm import tqdm

from spatialvlm.errors import ConfigError, SpatialVLMError
from spatialvlm.synthesis.engine import merge_manifest, synthesize
from spatialvlm.synthesis.parts import list_scenes
from spatialvlm.synthesis.plan import SynthesisPlan, make_plan
from spatialvlm.synthesis.wording import Wording


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenes", type=Path, help="folder of scenes")
    parser.add_argument("--out", type=Path, required=True, help="folder of the rows")
    parser.add_argument("--tasks", default="all", help="task ids, 'all', or a YAML file")
    parser.add_argument("--per-task", type=int, help="rows per scene and task")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--executor", choices=("serial", "process", "ray"), default="process")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument(
        "--shard", default="0/1", metavar="I/N", help="only parts with index mod N = I"
    )
    parser.add_argument("--limit", type=int, help="only the first so many scenes")
    parser.add_argument(
        "--wording",
        choices=("varied", "plain"),
        help="plain: one short wording, objects named by colour and label, no marks, no hints",
    )
    parser.add_argument("--sentences", type=float, help="share of rows answered by a sentence")
    parser.add_argument("--templates", nargs="+", help="further template files")
    parser.add_argument(
        "--geometry", choices=("box", "points"), help="answers from boxes or points"
    )
    parser.add_argument(
        "--no-visibility-filter", action="store_true", help="questions may name hidden objects"
    )
    parser.add_argument("--allow-unfiltered", action="store_true")
    parser.add_argument("--max-failed", type=float, default=0.01)
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--dry-run", action="store_true", help="count only, write nothing")
    parser.add_argument(
        "--merge-manifest", action="store_true", help="only merge the sidecars of --out"
    )
    return parser.parse_args(argv)


def plan_from(arguments: argparse.Namespace) -> SynthesisPlan:
    """Plan of the task file with the overrides of the command line."""
    overrides: dict[str, Any] = {}
    for name in ("seed", "geometry"):
        if getattr(arguments, name) is not None:
            overrides[name] = getattr(arguments, name)
    if arguments.templates:
        overrides["templates"] = arguments.templates
    if arguments.no_visibility_filter:
        overrides["visibility_filter"] = False
    if arguments.allow_unfiltered:
        overrides["allow_unfiltered"] = True
    plan = make_plan(arguments.tasks, per_task=arguments.per_task, overrides=overrides)
    wording = plan.wording
    if arguments.wording:
        wording = Wording.plain() if arguments.wording == "plain" else Wording()
    if arguments.sentences is not None:
        wording = dataclasses.replace(wording, sentences=arguments.sentences)
    return dataclasses.replace(plan, wording=wording)


def shard_of(text: str) -> tuple[int, int]:
    """``"1/3"`` to ``(1, 3)``."""
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit()):
        raise ConfigError(f"--shard must look like 0/4, got {text!r}.")
    return int(index), int(count)


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code (2: configuration, 1: scenes failed)."""
    arguments = parse_arguments(argv)
    if arguments.merge_manifest:
        manifest = merge_manifest(arguments.out)
        print(f"{manifest['rows']} rows in {manifest['parts']}/{manifest['expected_parts']} parts")
        return 0 if manifest["complete"] else 1
    try:
        if arguments.scenes is None:
            raise ConfigError("--scenes is missing: name the folder of the scenes.")
        plan = plan_from(arguments)
        shard = shard_of(arguments.shard)
        total = len(list_scenes(arguments.scenes)[: arguments.limit])
    except SpatialVLMError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    bar = tqdm(total=total, unit="scene", desc=str(arguments.out))
    rows = 0

    def show(scenes: int, made: int) -> None:
        nonlocal rows
        rows += made
        bar.update(scenes)
        bar.set_postfix(rows=rows)

    try:
        summary = synthesize(
            arguments.scenes,
            arguments.out,
            plan,
            executor=arguments.executor,
            workers=arguments.workers,
            shard=shard,
            limit=arguments.limit,
            overwrite=arguments.overwrite,
            dry_run=arguments.dry_run,
            max_failed=arguments.max_failed,
            progress=show,
        )
    except SpatialVLMError as error:
        bar.close()
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    bar.close()
    print(summary.table())
    print(
        f"{summary.rows} rows, {summary.skipped_parts} of {summary.parts} parts were there already"
    )
    for scene, trace in sorted(summary.failed_scenes.items()):
        print(f"failed: {scene}\n{trace}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
