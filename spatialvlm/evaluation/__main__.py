"""Score, compare and report from the command line.

python -m spatialvlm.evaluation score --bench vsi_bench --data test.jsonl --pred preds.jsonl --out DIR
python -m spatialvlm.evaluation compare DIR_A DIR_B
python -m spatialvlm.evaluation report --runs runs/eval_a runs/eval_b --training runs/stage1 --out report.html
python -m spatialvlm.evaluation prompts --bench vsi_bench --data test.jsonl --limit 3
python -m spatialvlm.evaluation list
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from spatialvlm.errors import USER_ERRORS
from spatialvlm.evaluation.conventions import with_conventions
from spatialvlm.evaluation.predictions import by_row_number, read_manifest, read_predictions
from spatialvlm.evaluation.prompts import MEDIA_MODES, build_messages, derangement
from spatialvlm.evaluation.reading import load_items
from spatialvlm.evaluation.registry import BENCHMARKS, check_media, find_spec, load_benchmark
from spatialvlm.evaluation.schema import PROTOCOLS
from spatialvlm.evaluation.scoring import UNPARSED, check_protocol, score, write_result


def _score(args: argparse.Namespace) -> None:
    check_protocol(args.protocol)
    ids = set(Path(args.ids).read_text().split()) if args.ids else None
    spec = with_conventions(
        find_spec(args.bench),
        strict_mra=args.mra == "strict",
        single_existence=args.existence == "single",
        default_options=args.caa_default_options,
    )
    benchmark = load_items(spec, args.data, media_root=args.media_root, ids=ids, strict=args.strict)
    predictions, warnings = read_predictions(args.pred, style=args.format)
    if args.format == "lmms":
        # Its numbers count all rows of the file, also those that --ids or a sub-set leave out.
        every = load_items(replace(spec, select=None), args.data).items
        chosen = {item.key for item in benchmark.items}
        predictions = {k: p for k, p in by_row_number(every, predictions).items() if k in chosen}
        warnings.append(
            f"lmms-eval's sample log holds row numbers only: {args.data} must have the rows of its split in their order"
        )
    manifest = read_manifest(Path(args.pred[0]).parent)
    result = score(
        benchmark,
        predictions,
        args.protocol,
        args.unparsed,
        args.seed,
        allow_partial=args.allow_partial,
        strip_think=args.strip_think,
        use_extracted=args.use_extracted,
        manifest=manifest,
    )
    for warning in [*warnings, *result.warnings]:
        print(f"warning: {warning}", file=sys.stderr)
    print(result.line())
    if args.allow_partial:
        print(
            f"coverage {100 * result.n / len(benchmark.items):.1f} % of {len(benchmark.items)} items"
        )
    if args.out:
        from spatialvlm.evaluation.report import write_report

        folder = Path(args.out)
        write_result(result, folder)
        kept = {"data_file": str(args.data), "media_root": args.media_root, **manifest}
        (folder / "manifest.json").write_text(json.dumps(kept, indent=1) + "\n")
        if Path(args.pred[0]).resolve() != (folder / "predictions.jsonl").resolve():
            from spatialvlm.evaluation.predictions import write_predictions

            write_predictions(
                folder / "predictions.jsonl", (p.to_row() for p in predictions.values())
            )
        write_report([folder], folder / "report.html", extra_baselines=args.baselines)


def _compare(args: argparse.Namespace) -> None:
    from spatialvlm.evaluation.runs import paired_runs, read_runs

    for name, runs in read_runs(args.folders).items():
        if len(runs) != 2:
            print(f"{name}: in one folder only")
            continue
        pair = paired_runs(runs[0], runs[1], allow_partial=args.allow_partial)
        ci = f"[{pair.ci95[0]:.2f}, {pair.ci95[1]:.2f}]" if pair.ci95 else "no interval"
        p = "–" if pair.p is None else f"{pair.p:.2g}"
        print(
            f"{name}: {pair.difference:+.2f} points ({pair.name}), 95 % CI {ci}, p {p}, n {pair.n}"
        )


def _report(args: argparse.Namespace) -> None:
    from spatialvlm.evaluation.report import text_table, write_report

    benchmarks = write_report(
        args.runs,
        args.out,
        training=args.training,
        extra_baselines=args.baselines,
        samples=args.samples,
        title=args.title,
    )
    print(text_table(benchmarks))
    print(f"wrote {args.out}")


def _prompts(args: argparse.Namespace) -> None:
    benchmark = load_benchmark(args.bench, args.data, media_root=args.media_root)
    if args.check_media:
        check_media(benchmark)
    donors = derangement(benchmark) if args.media == "shuffle" else {}
    for item in benchmark.items[: args.limit]:
        messages = build_messages(
            item,
            benchmark.spec,
            check_protocol(args.protocol),
            args.media,
            root=benchmark.media_root,
            donor=donors.get(item.key),
            allow_absolute=args.allow_absolute_media,
        )
        print(json.dumps({"id": item.id, "messages": messages}, ensure_ascii=False, default=repr))


def _list(args: argparse.Namespace) -> None:  # noqa: ARG001
    for name, spec in sorted(BENCHMARKS.items()):
        count = "" if spec.expected_n is None else f"{spec.expected_n} items"
        print(f"{name:16} {spec.title:32} {count:12} needs: {', '.join(spec.columns)}")


def main(arguments: list[str] | None = None) -> int:
    """Run one command; errors of the user are one line and exit code 1."""
    parser = argparse.ArgumentParser(
        prog="python -m spatialvlm.evaluation", description=__doc__.split("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)

    one = commands.add_parser("score", help="score an existing prediction file")
    one.add_argument("--bench", required=True)
    one.add_argument("--data", required=True, help="benchmark file")
    one.add_argument("--pred", required=True, nargs="+", help="prediction files (JSON lines)")
    one.add_argument("--format", default="jsonl", help="jsonl, or lmms for lmms-eval sample logs")
    one.add_argument("--protocol", default="official", help=" | ".join(PROTOCOLS))
    one.add_argument("--unparsed", default="wrong", help=" | ".join(UNPARSED))
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--allow-partial", action="store_true")
    one.add_argument("--strict", action="store_true", help="refuse an unexpected number of items")
    one.add_argument("--strip-think", action="store_true")
    one.add_argument("--use-extracted", action="store_true")
    one.add_argument(
        "--mra", choices=["official", "strict"], default="official", help="strict: < instead of <="
    )
    one.add_argument(
        "--existence",
        choices=["pairs", "single"],
        default="pairs",
        help="InternSpatial-Bench: whether both questions of a pair must be right",
    )
    one.add_argument(
        "--caa-default-options",
        type=int,
        metavar="K",
        help="SITE-Bench: options assumed where a row's do not parse (EASI: 4)",
    )
    one.add_argument("--media-root")
    one.add_argument("--ids", help="file with the ids of a subset, one per line")
    one.add_argument("--baselines", nargs="*", default=[])
    one.add_argument("--out", help="folder for result.json, per_item.csv, report.html")
    one.set_defaults(run=_score)

    two = commands.add_parser("compare", help="paired difference of two result folders")
    two.add_argument("folders", nargs=2)
    two.add_argument("--allow-partial", action="store_true", help="compare the common items only")
    two.set_defaults(run=_compare)

    three = commands.add_parser("report", help="one HTML page for one or several runs")
    three.add_argument("--runs", required=True, nargs="+")
    three.add_argument("--training", nargs="*", default=[], help="run folders of training")
    three.add_argument(
        "--baselines", nargs="*", default=[], help="further files of published numbers"
    )
    three.add_argument(
        "--samples", type=int, default=3, help="right, wrong and unparsed answers shown per task"
    )
    three.add_argument("--title", default="")
    three.add_argument("--out", required=True)
    three.set_defaults(run=_report)

    four = commands.add_parser("prompts", help="print the messages of some items")
    four.add_argument("--bench", required=True)
    four.add_argument("--data", required=True)
    four.add_argument("--protocol", default="official")
    four.add_argument("--media", default="real", help=" | ".join(MEDIA_MODES))
    four.add_argument("--media-root")
    four.add_argument("--allow-absolute-media", action="store_true")
    four.add_argument("--check-media", action="store_true")
    four.add_argument("--limit", type=int, default=5)
    four.set_defaults(run=_prompts)

    commands.add_parser("list", help="all benchmarks").set_defaults(run=_list)
    args = parser.parse_args(arguments)
    try:
        args.run(args)
    except USER_ERRORS as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
