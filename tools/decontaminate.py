r"""Find training rows that show evaluation scenes, pictures, or questions.

    python tools/decontaminate.py --train data/train.jsonl --bench vsi --out runs/decontamination
    python tools/decontaminate.py --train a.jsonl b.parquet --bench vsi viewspatial=vs.json \
        --media --train-root data --bench-root data/viewspatial --out DIR --drop --fail-on-hit

Writes ``hits.csv`` (one line per hit), ``text_matches.csv`` (questions that repeat; no hits by themselves),
``unknown.csv`` (rows whose source is not recognised), ``summary.json``, ``report.html``; with ``--drop`` also the
clean files and ``removed.jsonl``.

Exit codes: 0 clean (or no ``--fail-on-*``), 2 hits with ``--fail-on-hit``, 3 unknown sources with
``--fail-on-unknown``, 1 any error.
"""

import argparse
import csv
import html
import json
import sys
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from spatialvlm.errors import DataError, SpatialVLMError, run_command
from spatialvlm.evaluation.contamination import (
    arkit_rooms,
    benchmark_keys,
    check_record,
    iter_files,
    media_paths,
    record_id,
    rescans,
    stream_records,
)

STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:20px auto;max-width:1000px;padding:0 14px;color:#1d2430}"
    "table{border-collapse:collapse}td,th{padding:5px 10px;border-bottom:1px solid #e3e6ea;text-align:left;"
    "overflow-wrap:anywhere}.scroll{overflow-x:auto}"
)


def write_page(path: Path, summary: dict, hits: list[list]) -> None:
    """One static page: counts and the first hits."""
    cells = lambda values: "".join(f"<td>{html.escape(str(v))}</td>" for v in values)  # noqa: E731
    counts = "".join(
        f"<tr>{cells((bench, level, n))}</tr>"
        for bench, levels in summary["hits"].items()
        for level, n in levels.items()
    )
    lines = "".join(f"<tr>{cells(hit)}</tr>" for hit in hits[:200])
    path.write_text(
        '<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>Decontamination</title><style>{STYLE}</style><h1>Decontamination</h1>"
        f"<p>{summary['records']} records, {summary['records_with_hits']} with hits, {summary['unknown']} of unknown "
        f"source, {summary['text_matches']} repeated questions.</p>"
        f"<h2>Hits</h2><table><tr><th>benchmark<th>level<th>records</tr>{counts}</table>"
        f'<h2>First hits</h2><div class="scroll"><table><tr><th>file<th>line<th>id<th>benchmark<th>level<th>key</tr>'
        f"{lines}</table></div>\n",
        encoding="utf-8",
    )


def warn_of_missing(option: str, root: Path, paths: Collection[str]) -> None:
    """Media that were not compared make a clean result worth less."""
    if paths:
        print(
            f"warning: {len(paths)} media files were not compared, they are not under {option} {root}, e.g. {min(paths)}",
            file=sys.stderr,
        )


def run(args: argparse.Namespace) -> int:
    """Check all files; returns the exit code."""
    aliases: dict[str, str] = {}
    if args.arkit_metadata:
        aliases |= arkit_rooms(args.arkit_metadata)
    if args.rscan_json:
        aliases |= rescans(args.rscan_json)
    benchmarks = [
        benchmark_keys(spec, root=args.bench_root, aliases=aliases or None, media=args.media)
        for spec in args.bench
    ]
    out = args.out
    out.mkdir(parents=True, exist_ok=True)
    header = ["train_file", "line", "id", "benchmark", "level", "key"]
    hits: list[list] = []
    text: list[list] = []
    unknown: list[list] = []
    counts: Counter = Counter()
    sources: Counter = Counter()
    records = with_hits = 0
    missing: set[str] = set()
    copies: Counter = Counter()
    removed = (out / "removed.jsonl").open("w", encoding="utf-8") if args.drop else None
    for path in iter_files(args.train):
        clean = None
        if args.drop:
            if path.suffix == ".parquet":
                raise DataError(
                    f"--drop writes JSON lines and cannot copy {path}; convert it first"
                )
            copies[path.stem] += 1  # files of several folders may have one name
            again = f"-{copies[path.stem]}" if copies[path.stem] > 1 else ""
            clean = (out / f"{path.stem}{again}.clean.jsonl").open("w", encoding="utf-8")
        for number, row in stream_records(path):
            records += 1
            verdict = check_record(row, benchmarks, root=args.train_root, media=args.media)
            if args.media:
                missing |= {p for p in media_paths(row) if not (args.train_root / p).is_file()}
            own = [m for m in verdict.matches if m.hit]
            place = [str(path), number, record_id(row, number)]
            hits += [[*place, m.benchmark, m.level, m.key] for m in own]
            text += [[*place, m.benchmark, m.level, m.key] for m in verdict.matches if not m.hit]
            with_hits += bool(own)
            for pair in {(m.benchmark, m.level) for m in own}:
                counts[pair] += 1
            for source in verdict.sources:
                sources[source] += 1
            if not verdict.known:
                unknown.append(place)
            if clean is not None and removed is not None:
                if own:
                    reasons = [f"{m.benchmark}:{m.level}:{m.key}" for m in own]
                    removed.write(
                        json.dumps(
                            {"file": str(path), "line": number, "reasons": reasons, "row": row}
                        )
                        + "\n"
                    )
                else:
                    clean.write(json.dumps(row, ensure_ascii=False) + "\n")
        if clean is not None:
            clean.close()
    if removed is not None:
        removed.close()
    for name, head, lines in (
        ("hits.csv", header, hits),
        ("text_matches.csv", header, text),
        ("unknown.csv", header[:3], unknown),
    ):
        with (out / name).open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([head, *lines])
    by_bench: dict[str, dict[str, int]] = {}
    for (bench, level), n in sorted(counts.items()):
        by_bench.setdefault(bench, {})[level] = n
    summary = {
        "records": records,
        "records_with_hits": with_hits,
        "hits": by_bench,
        "sources": dict(sources.most_common()),
        "unknown": len(unknown),
        "text_matches": len(text),
        "benchmarks": {b.name: len(b.blacklist.scenes) for b in benchmarks},
        "media_compared": args.media,
        "media_missing": {
            "train": len(missing),
            **{b.name: len(b.missing) for b in benchmarks},
        },
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    write_page(out / "report.html", summary, hits)
    print(
        f"{records} records: {with_hits} with hits, {len(unknown)} of unknown source, {len(text)} repeated questions; "
        f"wrote {out}"
    )
    if args.media:
        warn_of_missing("--train-root", args.train_root, missing)
        for bench in benchmarks:
            warn_of_missing("--bench-root", args.bench_root, bench.missing)
    if with_hits and args.fail_on_hit:
        return 2
    return 3 if unknown and args.fail_on_unknown else 0


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", nargs="+", required=True, help="training files or folders")
    parser.add_argument(
        "--bench", nargs="+", required=True, help="vsi, a list file *.txt, or NAME=FILE"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--media", action="store_true", help="compare media files (slow)")
    parser.add_argument("--train-root", type=Path, help="folder of the training media")
    parser.add_argument("--bench-root", type=Path, help="folder of the benchmark media")
    parser.add_argument(
        "--arkit-metadata", type=Path, help="metadata.csv of ARKitScenes (video to visit)"
    )
    parser.add_argument("--rscan-json", type=Path, help="3RScan.json (scan to reference scan)")
    parser.add_argument("--drop", action="store_true", help="write clean copies and removed.jsonl")
    parser.add_argument("--fail-on-hit", action="store_true")
    parser.add_argument("--fail-on-unknown", action="store_true")
    args = parser.parse_args(argv)
    if args.media and (args.train_root is None or args.bench_root is None):
        parser.error("--media needs --train-root and --bench-root")
    try:
        return run(args)
    except SpatialVLMError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(run_command(main))
