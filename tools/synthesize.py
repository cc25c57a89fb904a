"""Generate spatial questions with exact answers from a folder of scenes.

    python tools/synthesize.py --scenes data/demo/rooms/train --out data/demo/qa/train \
        --tasks left_right,front_behind,dist_abs --workers 2 --seed 0

``--tasks`` takes task ids, ``all``, or a YAML file (``configs/synthesis/``). The rows are the same for
any executor, number of workers and sharding; a killed run continues where it stopped, ``--overwrite``
starts over. Rejected candidates are counted by task and reason.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from tqdm import tqdm

from spatialvlm.errors import ConfigError, ContaminationError, SpatialVLMError, run_command
from spatialvlm.scenes import blacklist
from spatialvlm.synthesis.balance import balance
from spatialvlm.synthesis.engine import SCENE_TIMEOUT_S, merge_manifest, synthesize
from spatialvlm.synthesis.export import export_rows
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
    parser.add_argument(
        "--tasks", "--config", default="all", help="task ids, 'all', or a YAML file"
    )
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
    parser.add_argument(
        "--allow-unfiltered",
        action="store_true",
        help="use scenes whose visibility was not measured",
    )
    parser.add_argument(
        "--allow-split", nargs="+", help="splits of imported scenes to use (default: train)"
    )
    parser.add_argument(
        "--max-failed", type=float, default=0.01, help="share of scenes that may fail"
    )
    parser.add_argument(
        "--scene-timeout",
        type=float,
        default=SCENE_TIMEOUT_S,
        metavar="S",
        help="longest time for one scene, 0 = no limit; slow and failed scenes are tried twice, then listed",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="start over: remove the parts of earlier runs in --out (with --shard: those of the shard and of other "
        "plans). Leave it out to continue an interrupted run",
    )
    parser.add_argument("--dry-run", action="store_true", help="count only, write nothing")
    parser.add_argument("--balance", type=Path, metavar="DIR", help="write evened-out rows to DIR")
    parser.add_argument("--export", choices=("sharegpt", "messages", "webdataset"))
    parser.add_argument("--export-to", type=Path, metavar="DIR", help="default: OUT/export")
    parser.add_argument("--format-id", type=int, help="realise one of the 19 instruction formats")
    parser.add_argument("--dialect", choices=("internvl", "qwen", "plain"), default="internvl")
    parser.add_argument(
        "--render-marks", action="store_true", help="draw marks into exported images"
    )
    parser.add_argument("--license-allow", nargs="+", default=(), help="export only these licences")
    parser.add_argument(
        "--blacklist", nargs="+", type=Path, default=(), help="further lists of scenes"
    )
    parser.add_argument(
        "--strict-contamination", action="store_true", help="stop at the first evaluation scene"
    )
    parser.add_argument(
        "--allow-contaminated", action="store_true", help="use evaluation scenes too"
    )
    parser.add_argument(
        "--merge-manifest",
        action="store_true",
        help="make no rows: merge the sidecars of --out (after sharded runs), then --balance and --export",
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
    if arguments.allow_split:
        overrides["allow_split"] = arguments.allow_split
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


def check_numbers(arguments: argparse.Namespace) -> None:
    """Refuse numbers that would make no rows, or rows nobody asked for.

    Raises:
        ConfigError: Names the option and its range.
    """
    for name, low, high in (
        ("limit", 1, None),
        ("sentences", 0, 1),
        ("max_failed", 0, 1),
        ("scene_timeout", 0, None),
    ):
        value = getattr(arguments, name)
        if value is not None and not (value >= low and (high is None or value <= high)):
            span = f"at least {low}" if high is None else f"from {low} to {high}"
            raise ConfigError(f"--{name.replace('_', '-')} must be {span}, got {value}.")


def shard_of(text: str) -> tuple[int, int]:
    """``"1/3"`` to ``(1, 3)``."""
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit()):
        raise ConfigError(f"--shard must look like 0/4, got {text!r}.")
    return int(index), int(count)


def blocked_scenes(arguments: argparse.Namespace) -> list[str]:
    """Ids of the scenes that belong to an evaluation set or to one of its rooms.

    Raises:
        ContaminationError: There is one and ``--strict-contamination`` is set.
    """
    lists = [*blacklist.shipped_lists(), *map(blacklist.load_list, arguments.blacklist)]
    refs = list_scenes(arguments.scenes)
    found = blacklist.blocked_scenes([(ref.scene_id, ref.room_id) for ref in refs], lists)
    if found and arguments.strict_contamination and not arguments.allow_contaminated:
        raise ContaminationError(
            f"{len(found)} of {len(refs)} scenes belong to evaluation sets, first {found[0]}. "
            "Remove them or drop --strict-contamination to skip them."
        )
    return found


def finish(arguments: argparse.Namespace) -> None:
    """Balance and export what was generated."""
    rows = arguments.out
    if arguments.balance:
        report = balance(rows, arguments.balance)
        print(
            f"balanced: {report.after.total():,} of {report.before.total():,} rows "
            f"in {arguments.balance}"
        )
        rows = arguments.balance
    if arguments.export:
        if arguments.scenes is None:
            raise ConfigError("--scenes is missing: exports check the images of the scenes.")
        target = arguments.export_to or arguments.out / "export"
        manifest = export_rows(
            rows,
            arguments.scenes,
            target,
            arguments.export,
            format_id=arguments.format_id,
            dialect=arguments.dialect,
            render_marks=arguments.render_marks,
            licenses=arguments.license_allow,
            allow_contaminated=arguments.allow_contaminated,
        )
        print(f"exported: {manifest['rows']:,} rows to {target}")


def merge(arguments: argparse.Namespace) -> int:
    """Merge the sidecars of sharded runs, then balance and export what they made if nothing is missing."""
    try:
        manifest = merge_manifest(arguments.out)
        print(f"{manifest['rows']} rows in {manifest['parts']}/{manifest['expected_parts']} parts")
        if manifest["complete"]:
            finish(arguments)
        elif arguments.balance or arguments.export:
            print("parts are missing: nothing was balanced or exported", file=sys.stderr)
    except SpatialVLMError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0 if manifest["complete"] else 1


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code (2: configuration, 1: too many scenes failed)."""
    arguments = parse_arguments(argv)
    if arguments.merge_manifest:
        return merge(arguments)
    try:
        if arguments.scenes is None:
            raise ConfigError("--scenes is missing: name the folder of the scenes.")
        check_numbers(arguments)
        plan = plan_from(arguments)
        shard = shard_of(arguments.shard)
        blocked = blocked_scenes(arguments)
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

    def stop(number: int, _: object) -> None:
        print("stopped: finished parts are kept, the same command continues", file=sys.stderr)
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, stop)
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
            blocked=blocked,
            allow_blocked=arguments.allow_contaminated,
            dry_run=arguments.dry_run,
            max_failed=arguments.max_failed,
            scene_timeout_s=arguments.scene_timeout,
            progress=show,
        )
    except SpatialVLMError as error:
        bar.close()
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    bar.close()
    print(summary.table())
    if blocked:
        what = "used, rows are tagged" if arguments.allow_contaminated else "skipped"
        print(f"{len(blocked)} evaluation scenes {what}")
    other = sorted(set(summary.skipped_scenes) - set(blocked))
    if other:
        allowed = ", ".join(plan.allow_split)
        print(
            f"{len(other)} scenes of other splits than {allowed} skipped (--allow-split), first {other[0]}"
        )
    print(
        f"{summary.rows} rows, {summary.skipped_parts} of {summary.parts} parts were there already"
    )
    if not arguments.dry_run:
        try:
            finish(arguments)
        except SpatialVLMError as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            return 2
    for scene, trace in sorted(summary.failed_scenes.items()):
        print(f"failed: {scene}\n{trace}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
