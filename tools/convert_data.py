r"""Convert a dataset between formats; join referring sets with the scenes they refer to.

    python tools/convert_data.py data/vsi/vsi_590k.jsonl --to canonical --out data/vsi_canonical
    python tools/convert_data.py rows.parquet --to webdataset --out shards
    python tools/convert_data.py ScanRefer_train.json --format referring --scenes data/scannet \
        --to canonical --out data/scanrefer

Streaming, atomic, and continued when interrupted. Rows that cannot be converted are listed in
``<name>.not_converted.jsonl`` with their reason. Ends with a round-trip check of 1,000 rows and the
source entry for a training config. Exit codes: 0 fine, 2 wrong arguments or input.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from spatialvlm.data.containers import Container
from spatialvlm.data.convert import SUFFIX, Converter, Item, check_round_trip
from spatialvlm.data.formats import FORMATS, SourceAttrs
from spatialvlm.data.sample import MediaRef, Sample, Turn
from spatialvlm.data.sources import Source
from spatialvlm.errors import DataError, SpatialVLMError, run_command

FRAMES = 32


def main() -> int:
    """Run the command line; returns the exit code."""
    args = parse_args()
    try:
        report = convert(args)
    except SpatialVLMError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report, indent=2))
    return 0


def parse_args() -> argparse.Namespace:
    """Arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, help="data files of one format")
    parser.add_argument("--format", default="auto", choices=["auto", *FORMATS])
    parser.add_argument("--to", required=True, choices=list(SUFFIX))
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument(
        "--name", default=None, help="name of shards and uids (default: first file's)"
    )
    parser.add_argument(
        "--media-root", type=Path, help="folder media paths start from (default: of the files)"
    )
    parser.add_argument(
        "--root", type=Path, help="folder no medium may leave (default: of files and media)"
    )
    parser.add_argument("--scenes", type=Path, help="scenes that a referring set refers to")
    parser.add_argument("--media-template", help='media of ScanQA and SQA3D, "scannet/{scene_id}"')
    parser.add_argument("--answers", default="first", choices=["first", "all"])
    parser.add_argument(
        "--frames", type=int, default=FRAMES, help="frames per scene of referring sets"
    )
    parser.add_argument("--shard-rows", type=int, default=10_000)
    parser.add_argument("--limit", type=int, help="convert only the first rows")
    parser.add_argument(
        "--decontaminate", action="store_true", help="leave out rows of evaluation scenes"
    )
    return parser.parse_args()


def convert(args: argparse.Namespace) -> dict[str, Any]:
    """Run a conversion and return its report."""
    files = [path.resolve() for path in args.files]
    missing = [str(path) for path in files if not path.is_file()]
    if missing:
        raise DataError(f"no such file: {', '.join(missing)}.")
    name = args.name or files[0].stem
    media_root = (args.scenes or args.media_root or files[0].parent).resolve()
    root = Path(os.path.commonpath([*(f.parent for f in files), media_root]))
    if args.root is not None:
        root = args.root.resolve()
        if not all(path.is_relative_to(root) for path in (*files, media_root)):
            raise DataError(f"--root {root} does not hold the data files and {media_root}.")
    attrs = SourceAttrs(
        name,
        "converted",
        base=os.path.relpath(media_root, root),
        answers=args.answers,
        media_template=args.media_template,
    )
    source = Source(
        attrs,
        files=[os.path.relpath(f, root) for f in files],
        root=root,
        format=args.format,
        cache_dir=args.out / ".cache",
    )
    items = limited(args, read_items(source, args))
    described = [str(f) + str(f.stat().st_size) for f in files]
    options = [
        args.format,
        args.answers,
        args.media_template,
        args.frames,
        args.limit,
        args.decontaminate,
    ]
    key = hashlib.blake2b(json.dumps([described, options]).encode(), digest_size=8).hexdigest()
    converter = Converter(
        args.out,
        args.to,
        root=root,
        read_bytes=source.media_bytes,
        shard_rows=args.shard_rows,
        key=key,
    )
    shards = converter.run(name, items)
    if not shards or not converter.written:
        counts = ", ".join(f"{reason} {n}" for reason, n in converter.not_converted.items())
        raise DataError(
            f"no row was converted: {counts}. See {args.out / name}.not_converted.jsonl."
        )
    refused = {
        json.loads(line)["uid"]
        for line in (args.out / f"{name}.not_converted.jsonl").read_text().splitlines()
    }
    kept = (s for uid, s in limited(args, read_items(source, args)) if uid not in refused)
    expected = (s for s in kept if isinstance(s, Sample))
    alone = args.to in ("webdataset", "arrow")  # such shards hold their media
    common = args.out.resolve() if alone else Path(os.path.commonpath([root, args.out.resolve()]))
    base = "." if alone else os.path.relpath(root, common)
    checked = check_round_trip(
        [shard.resolve() for shard in shards], expected, SourceAttrs(name, "converted", base=base),
        root=common, to=args.to,
    )  # fmt: skip
    entry = {
        "name": name,
        "family": "spatial",
        "format": "canonical" if args.to == "canonical" else "messages",
        "root": str(common),
        "base": base,
        "files": [os.path.relpath(args.out.resolve() / f"{name}-*{SUFFIX[args.to]}", common)],
    }
    return {
        "written": converter.written,
        "not_converted": dict(converter.not_converted),
        "shards": len(shards),
        "round_trip_checked": checked,
        "source": entry,
    }


def limited(args: argparse.Namespace, items: Iterator[Item]) -> Iterator[Item]:
    """The first ``--limit`` items."""
    for number, item in enumerate(items):
        if args.limit is not None and number >= args.limit:
            return
        yield item


def read_items(source: Source, args: argparse.Namespace) -> Iterator[Item]:
    """Every sample with its uid, or why there is none."""
    if args.format == "referring":
        items = join_referring(source, args)
    else:
        items = (
            item
            for n in range(len(source.files))
            for raw, result in source.scan(n)
            for item in (
                [(source.place(n, raw.row).uid(source.name), result)]
                if isinstance(result, DataError)
                else [(sample.uid, sample) for sample in result]
            )
        )
    if not args.decontaminate:
        yield from items
        return
    from spatialvlm.data.sample import scene_names
    from spatialvlm.scenes.blacklist import Blacklist

    blacklist = Blacklist()
    for uid, sample in items:
        if isinstance(sample, Sample):
            hits = [hit for text in scene_names(sample) for hit in blacklist.hits(text)]
            if hits:
                text = f"{uid} names {hits[0].scene_id} of {hits[0].list_name}."
                yield uid, DataError(text, reason="blocked")
                continue
        yield uid, sample


# Referring sets ------------------------------------------------------------------------------------


def join_referring(source: Source, args: argparse.Namespace) -> Iterator[Item]:
    """Statements with the boxes of their targets, in the frame of the scene's first view."""
    from spatialvlm.scenes.io import iter_scenes

    if args.scenes is None:
        raise DataError("referring sets hold no boxes; give the scenes with --scenes DIR.")
    scenes = {scene.scene_id.rpartition("/")[2]: scene for scene in iter_scenes(args.scenes)}
    for n in range(len(source.files)):
        container: Container = source.container(n)
        for raw in container.scan():
            place = source.place(n, raw.row)
            uid = place.uid(source.name)
            try:
                if isinstance(raw.value, DataError):
                    raise raw.value
                yield uid, referring_sample(raw.value, scenes, uid, source, args)
            except DataError as error:
                yield uid, error


def referring_sample(
    row: Any,
    scenes: Mapping[str, Any],
    uid: str,
    source: Source,
    args: argparse.Namespace,
) -> Sample:
    """One statement -> one grounding sample over frames of its scene."""
    from spatialvlm.answers import boxes_json
    from spatialvlm.synthesis.grounding import (
        JSON_SHAPE,
        SSR_CONVENTION,
        labelled,
        ssr_box,
        ssr_frame,
    )
    from spatialvlm.synthesis.rows import Reject

    if not isinstance(row, Mapping):
        raise DataError(f"{uid} is {type(row).__name__}, not an object.", reason="schema")
    scene_id = row.get("scene_id") or row.get("scan_id")
    statement = row.get("description") or row.get("utterance")
    if not isinstance(scene_id, str) or not isinstance(statement, str) or not statement.strip():
        raise DataError(f"{uid} has no scene id or no statement.", reason="schema")
    if str(row.get("correct_guess", "True")).lower() == "false":
        raise DataError(
            f"{uid}: the listener of this statement guessed wrong.", reason="correct_guess"
        )
    if scene_id not in scenes:
        raise DataError(f"{uid}: scene {scene_id} is not below {args.scenes}.", reason="missing")
    scene = scenes[scene_id]
    frames = [frame for frame in scene.frames if frame.rgb]
    if not frames:
        raise DataError(f"{uid}: scene {scene_id} has no images.", reason="no_frames")
    step = max(1, -(-len(frames) // args.frames))
    frames = frames[::step]
    objects = {obj.id.rpartition("/")[2]: obj for obj in scene.objects}
    boxes = []
    try:
        view = ssr_frame(frames[0].camera, "camera_up")
        for target in target_ids(row, uid):
            if target not in objects:
                raise DataError(f"{uid}: scene {scene_id} has no object {target}.", reason="schema")
            boxes.append(
                labelled(objects[target].label, ssr_box(objects[target], view, tilt="refit"))
            )
    except Reject as reject:
        raise DataError(f"{uid}: {reject}", reason="schema") from reject
    question = (
        f"\nFind every object that this statement describes: {statement.strip()}\n{SSR_CONVENTION} Answer as "
        f"{JSON_SHAPE}, or none if there is no such object."
    )
    folder = Path(os.path.relpath(scene.path(frames[0].rgb).parent, source.root)).as_posix()
    names = "\n".join(os.path.relpath(scene.path(f.rgb), source.root / folder) for f in frames)
    return Sample(
        uid=uid,
        source=source.name,
        family=source.family,
        turns=(
            Turn("user", (0, question), train=False),
            Turn("assistant", (boxes_json(boxes) if boxes else "none",)),
        ),
        media=(MediaRef("video", "frames", folder, names),),
        capability="grounding",
        frames_pinned=True,
        scene_id=scene.scene_id,
        room_id=scene.room_id,
        meta={"statement": statement, "targets": target_ids(row, uid)},
    )


def target_ids(row: Mapping[str, Any], uid: str) -> list[str]:
    """Target ids as text: ``object_ids`` (Multi3DRefer), ``object_id`` (ScanRefer), ``target_id`` (ReferIt3D)."""
    for key in ("object_ids", "object_id", "target_id"):
        value = row.get(key)
        if value is None:
            continue
        if isinstance(value, str) and value.startswith("["):
            try:
                value = ast.literal_eval(value)
            except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
                raise DataError(f"{uid} has {key} {value!r:.80}.", reason="schema") from error
        return [str(v) for v in value] if isinstance(value, list) else [str(value)]
    raise DataError(f"{uid} names no target object.", reason="schema")


if __name__ == "__main__":
    sys.exit(run_command(main))
