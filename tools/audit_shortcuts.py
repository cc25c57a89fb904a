r"""How much of a benchmark can be answered without looking?

    python tools/audit_shortcuts.py --bench vsi_bench --data test.jsonl --mode priors --out runs/audit
    python tools/audit_shortcuts.py --bench vsi_bench --data test.jsonl --mode rf --out runs/audit
    python tools/audit_shortcuts.py --bench vsi_bench --data test.jsonl --mode blind --vision RUN --blind RUN --out DIR
    python tools/audit_shortcuts.py --bench vsi_bench --data test.jsonl --mode circular --out DIR     # writes variants
    python tools/audit_shortcuts.py --bench circular_mcq --data DIR/variants.jsonl --mode circular --pred P --out DIR
    python tools/audit_shortcuts.py --bench vsi_bench --data test.jsonl --mode ibp --budget 500 --out DIR
    python tools/audit_shortcuts.py --bench vsi_bench --data test.jsonl --mode tst-llm --model DIR --backbone NAME --out DIR

- ``priors``   the option text that is usually right, the majority letter, the best constant number
- ``rf``       a random forest per question type (needs the extra ``audit``)
- ``blind``    a model with and without media: two result folders of recipes/evaluate.py (``evaluation.media=drop``)
- ``circular`` rotated options: hard and soft accuracy, consistency, position bias
- ``ibp``      iterative bias pruning, always beside random removals of the same size and types
- ``tst-llm``  test-set stress test: the model is fine-tuned on the text of the test set, one fold held out at a time

Folds keep scenes together where scenes are known (``--group``). Writes ``s_x.csv``, ``summary.json``, ``report.html``.
"""

import argparse
import csv
import hashlib
import html
import json
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from spatialvlm.errors import ConfigError, SpatialVLMError, run_command
from spatialvlm.evaluation import charts
from spatialvlm.evaluation.benchmarks.circular import (
    circular_variants,
    mmsi_variants,
    variant_rows,
)
from spatialvlm.evaluation.metrics import estimate
from spatialvlm.evaluation.predictions import read_predictions
from spatialvlm.evaluation.registry import load_benchmark
from spatialvlm.evaluation.runs import BenchRun, ItemRow, read_runs
from spatialvlm.evaluation.schema import Benchmark
from spatialvlm.evaluation.scoring import score, write_result
from spatialvlm.evaluation.shortcuts import (
    Diagnosis,
    diagnose_forest,
    diagnose_priors,
    make_folds,
    prune,
    summary,
    usable,
)

MODES = ("priors", "rf", "blind", "circular", "ibp", "tst-llm")


def write_scores(path: Path, found: Sequence[Diagnosis]) -> None:
    """``s_x.csv``: one line per item."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            [
                "id",
                "question_type",
                "format",
                "scene",
                "gold",
                "s",
                "s_base",
                "delta",
                "fold",
                "predicted",
            ]
        )
        for d in found:
            item = d.item
            form = "choice" if item.options else "number"
            numbers = [f"{d.score:.6f}", f"{d.base:.6f}", f"{d.score - d.base:.6f}", d.fold]
            writer.writerow(
                [item.id, item.question_type, form, item.cluster, item.gold, *numbers, d.predicted]
            )


def table_of(result: dict[str, Any]) -> str:
    """Accuracy per type as HTML."""
    lines = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{row['n']}</td><td>{charts.number(row['accuracy'])}"
        f" <small>± {charts.number(row['accuracy_se'])}</small></td><td>{charts.number(row['chance'])}</td></tr>"
        for name, row in [*result["per_type"].items(), ("all", result["micro"])]
    )
    head = "<tr><th>type</th><th>n</th><th>accuracy or MRA</th><th>chance</th></tr>"
    return f'<div class="scroll"><table>{head}{lines}</table></div>'


def write_page(path: Path, title: str, body: str) -> None:
    """A static page in the style of the evaluation report."""
    style = files("spatialvlm.evaluation").joinpath("report.css").read_text(encoding="utf-8")
    path.write_text(
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width, initial-scale=1"><title>{html.escape(title)}</title><style>{style}</style></head>'
        f"<body><main><h1>{html.escape(title)}</h1>{body}</main></body></html>\n",
        encoding="utf-8",
    )


def finish(out: Path, title: str, result: dict[str, Any], body: str) -> None:
    """``summary.json`` and ``report.html``."""
    (out / "summary.json").write_text(
        json.dumps(result, indent=1, default=str) + "\n", encoding="utf-8"
    )
    write_page(out / "report.html", title, body)
    print(f"wrote {out / 'report.html'}")


def diagnosis(bench: Benchmark, args: argparse.Namespace) -> None:
    """``priors`` and ``rf``."""
    items = usable(bench.items)
    fold = make_folds(items, args.folds, args.seed, group=args.group)
    arms = {}
    if args.mode == "priors":
        arms["option text"] = diagnose_priors(items, fold)
        arms["majority letter"] = diagnose_priors(items, fold, prior="majority_letter")
    else:
        arms["random forest"] = diagnose_forest(items, fold, seed=args.seed)
    results = {name: summary(found) for name, found in arms.items()}
    write_scores(args.out / "s_x.csv", next(iter(arms.values())))
    body = ""
    for name, result in results.items():
        row = result["micro"]
        print(
            f"{name}: {row['accuracy']:.1f} ± {charts.number(row['accuracy_se'])} (chance {charts.number(row['chance'])})"
        )
        body += f"<h2>{html.escape(name)}</h2>{table_of(result)}"
    facts = {
        "benchmark": bench.spec.name,
        "mode": args.mode,
        "folds": args.folds,
        "seed": args.seed,
        "group": args.group,
    }
    finish(args.out, f"Without looking: {bench.spec.title}", {**facts, "arms": results}, body)


def one_run(folder: Path, name: str) -> BenchRun:
    """The benchmark's part of a result folder."""
    runs = read_runs([folder])
    if name not in runs:
        raise ConfigError(f"{folder} has no result of {name}; found: {', '.join(runs)}")
    return runs[name][0]


def gap(
    vision: dict[str, ItemRow], blind: dict[str, ItemRow], ids: Sequence[str]
) -> dict[str, Any]:
    """Vision minus blind on some items, with its clustered error, in points."""
    common = [i for i in ids if i in vision and i in blind]
    clusters = [vision[i].cluster for i in common]
    difference = estimate([vision[i].score - blind[i].score for i in common], clusters)
    return {
        "vision": estimate([vision[i].score for i in common], clusters).value,
        "blind": estimate([blind[i].score for i in common], clusters).value,
        "gap": difference.value,
        "ci95": difference.ci95,
        "n": len(common),
    }


def read_arms(
    bench: Benchmark, args: argparse.Namespace
) -> tuple[dict[str, ItemRow], dict[str, ItemRow]] | None:
    """Per-item scores with and without media, if both folders are given."""
    if args.vision is None or args.blind is None:
        return None
    arms = [one_run(folder, bench.spec.name) for folder in (args.vision, args.blind)]
    for run, folder, is_blind in ((arms[0], args.vision, False), (arms[1], args.blind, True)):
        if "media" in run.manifest and run.blind != is_blind:
            raise ConfigError(
                f"--{'blind' if is_blind else 'vision'} {folder} was asked with media={run.manifest['media']}; "
                "the blind arm needs evaluation.media=drop, blank or shuffle, the other one real"
            )
    for key in ("protocol", "decoding"):
        if len({json.dumps(run.manifest.get(key)) for run in arms}) > 1:
            raise ConfigError(
                f"the two runs differ in {key}; a blind baseline needs the same {key} on both arms"
            )
    first, second = ({item.id: item for item in run.items()} for run in arms)
    return first, second


def blind(bench: Benchmark, args: argparse.Namespace) -> None:
    """Vision, blind, gap per question type, for the whole benchmark and for the ids of ``--ids``."""
    arms = read_arms(bench, args)
    if arms is None:
        raise ConfigError(
            "--mode blind needs --vision and --blind: result folders of recipes/evaluate.py"
        )
    subsets = {"all": [item.id for item in bench.items]}
    if args.ids:
        listed = set(args.ids.read_text().split())
        subsets["kept"] = [i for i in subsets["all"] if i in listed]
        if not subsets["kept"]:
            raise ConfigError(f"none of the {len(listed)} ids of {args.ids} is in {bench.path}")
    result: dict[str, Any] = {"benchmark": bench.spec.name, "mode": "blind"}
    body = ""
    for name, ids in subsets.items():
        types = sorted({item.question_type for item in bench.items})
        rows = {
            t: gap(*arms, [i for i in ids if i in arms[0] and arms[0][i].question_type == t])
            for t in types
        }
        rows = {t: row for t, row in rows.items() if row["n"]}
        rows["micro"] = gap(*arms, ids)
        macro = [row for t, row in rows.items() if t != "micro"]
        result[name] = {**rows, "macro_gap": sum(row["gap"] for row in macro) / len(macro)}
        lines = "".join(
            f"<tr><td>{html.escape(t)}</td><td>{row['n']}</td><td>{row['blind']:.1f}</td><td>{row['vision']:.1f}</td>"
            f"<td>{row['gap']:+.1f}</td></tr>"
            for t, row in rows.items()
        )
        head = "<tr><th>type</th><th>n</th><th>blind</th><th>vision</th><th>gap</th></tr>"
        body += f'<h2>{name}</h2><div class="scroll"><table>{head}{lines}</table></div>'
        print(f"{name}: blind {rows['micro']['blind']:.1f}, vision {rows['micro']['vision']:.1f}")
    finish(args.out, f"Blind baseline: {bench.spec.title}", result, body)


def circular(bench: Benchmark, args: argparse.Namespace) -> None:
    """Write rotated variants, or score answers to them."""
    if args.pred is None and args.style == "mmsi":
        rows = [
            row for item in bench.items for row in mmsi_variants({"index": item.id, **item.row})
        ]
        text = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
        (args.out / "variants.jsonl").write_text(text, encoding="utf-8")
        finish(
            args.out,
            f"Variants of {bench.spec.title}",
            {"variants": len(rows)},
            f"<p>{len(rows)} variants</p>",
        )
        return
    if args.pred is None:
        found = circular_variants(bench.items)
        rows = variant_rows(found, bench.spec, args.out)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (args.out / "variants.jsonl").write_text(text, encoding="utf-8")
        groups = {row["g_index"] for row in rows}
        result = {
            "variants": len(found.items),
            "groups": len(groups),
            "skipped": found.skipped,
            "numerically_ordered": found.ordered,
        }
        print(f"{len(found.items)} variants of {len(groups)} items, {len(found.skipped)} skipped")
        named = [m for row in rows for m in row["media"] if not m["path"].startswith("media/")]
        if named:
            print(f"their media lie in evaluation.media_root.circular_mcq={bench.media_root}")
        lines = "".join(
            f"<li>{html.escape(i)}: {html.escape(why)}</li>" for i, why in found.skipped.items()
        )
        finish(
            args.out,
            f"Variants of {bench.spec.title}",
            result,
            f"<p>{len(found.items)} variants</p><ul>{lines}</ul>",
        )
        return
    predictions, _ = read_predictions(args.pred)
    result = score(bench, predictions, "easi")
    write_result(result, args.out)
    extra = result.extra
    names = ("hard_circular", "soft_rows", "soft_groups", "vanilla", "consistency")
    scores = [charts.Bar(name, extra[name], None, charts.PALETTE[0]) for name in names]
    letters = [
        charts.Bar(x, share, None, charts.PALETTE[1]) for x, share in extra["letter_share"].items()
    ]
    gallery = charts.Gallery()
    plots = charts.bar_rows("circular scores", scores), charts.bar_rows("letters picked", letters)
    body = f'<div class="grid2">{"".join(map(gallery.show, plots))}</div>'
    gallery.write(args.out / "report_plots")
    print(", ".join(f"{name} {extra[name]:.1f}" for name in names))
    finish(args.out, f"Circular: {bench.spec.title}", dict(extra), body)


def ibp(bench: Benchmark, args: argparse.Namespace) -> None:
    """Iterative bias pruning beside its random control."""
    items = usable(bench.items)
    budget = args.budget if args.budget is not None else len(items) // 10
    if args.alloc == "global" and len({bool(item.options) for item in items}) == 2:
        print("warning: --alloc global ranks choices and numbers together", file=sys.stderr)

    llm = args.diagnostic == "tst-llm"
    first: dict[str, Diagnosis] = {}

    def diagnose(remaining: list) -> list[Diagnosis]:
        fold = make_folds(remaining, args.folds, args.seed, group=args.group)
        if llm:
            # One folder per set of items: an interrupted study finds its trained folds again.
            names = "\n".join(sorted(item.id for item in remaining))
            digest = hashlib.sha256(names.encode()).hexdigest()[:12]
            return train_and_read(remaining, fold, args, args.out / "rounds" / digest)
        if args.diagnostic == "rf":
            return diagnose_forest(remaining, fold, seed=args.seed)
        return diagnose_priors(remaining, fold)

    def judged(part: list) -> dict[str, Any]:
        """Accuracy of the diagnostic; the trained model is not trained again for it, its first reading is used."""
        return summary([first[item.id] for item in part] if llm else diagnose(part))

    if llm:
        first |= {d.item.id: d for d in diagnose(items)}
    found = prune(
        items,
        diagnose,
        budget=budget,
        batch=args.batch,
        threshold=args.threshold,
        alloc=args.alloc,
        # What training adds ranks a trained model: what it knew before is no property of the benchmark.
        key=(lambda d: d.score - d.base) if llm else (lambda d: d.score),
    )
    (args.out / "removed_ids.txt").write_text("".join(f"{i}\n" for i in found.removed))
    (args.out / "kept_ids.txt").write_text("".join(f"{i}\n" for i in found.kept))
    by_id = {item.id: item for item in items}
    before, after = judged(items), judged([by_id[i] for i in found.kept])
    control = [judged([by_id[i] for i in kept])["micro"]["accuracy"] for kept in found.control]
    result: dict[str, Any] = {
        "removed": len(found.removed),
        "kept": len(found.kept),
        "rounds": found.rounds,
        "blind_accuracy_before": before["micro"]["accuracy"],
        "blind_accuracy_after": after["micro"]["accuracy"],
        "blind_accuracy_random_control": control,
    }
    mean = sum(control) / len(control)
    better = after["micro"]["accuracy"] < min(control)
    sentence = (
        f"The diagnostic falls from {before['micro']['accuracy']:.1f} to {after['micro']['accuracy']:.1f}; random removal of "
        f"the same size and types gives {mean:.1f}."
    )
    if not better:
        sentence += " Pruning is not better than random removal here."
    arms = read_arms(bench, args)
    if arms is not None:
        pruned = gap(*arms, found.kept)
        gaps = [gap(*arms, kept)["gap"] for kept in found.control]
        result |= {"vision_blind_gap_pruned": pruned, "vision_blind_gap_control": gaps}
        sentence += f" Vision minus blind: {pruned['gap']:.1f} after pruning, {sum(gaps) / len(gaps):.1f} in the control."
    result["statement"] = sentence
    print(sentence)
    finish(
        args.out,
        f"Pruning: {bench.spec.title}",
        result,
        f"<p>{html.escape(sentence)}</p>{table_of(after)}",
    )


def train_and_read(
    items: list, fold: np.ndarray, args: argparse.Namespace, out: Path
) -> list[Diagnosis]:
    """Fine-tune on the text of the other folds, read the held-out one."""
    import torch

    from spatialvlm.evaluation.stress_test import run_stress_test
    from spatialvlm.evaluation.subject import Subject

    if args.model is None or args.backbone is None:
        raise ConfigError(
            "tst-llm needs --model DIR and --backbone NAME (a file of configs/backbones)"
        )
    launcher = shlex.split(args.launcher)
    return run_stress_test(
        items,
        fold,
        args.model,
        args.backbone,
        out,
        partial(Subject, device="cuda" if torch.cuda.is_available() else "cpu"),
        launcher=[sys.executable] if launcher == ["python"] else launcher,
        overrides=args.set,
        seed=args.seed,
    )


def stress_test(bench: Benchmark, args: argparse.Namespace) -> None:
    """What the text of the other folds teaches about the held-out one."""
    items = usable(bench.items)
    fold = make_folds(items, args.folds, args.seed, group=args.group)
    found = train_and_read(items, fold, args, args.out / "folds")
    write_scores(args.out / "s_x.csv", found)
    result = summary(found)
    base = estimate([d.base for d in found], [d.item.cluster for d in found])
    trained = estimate([d.score for d in found], [d.item.cluster for d in found])
    result |= {"zero_shot_score": base.value, "trained_score": trained.value}
    print(
        f"text only: {base.value:.1f} zero-shot, {trained.value:.1f} after training on the other folds"
    )
    finish(args.out, f"Stress test: {bench.spec.title}", result, table_of(result))


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bench", required=True)
    parser.add_argument("--data", required=True, help="benchmark file")
    parser.add_argument("--mode", required=True, choices=MODES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument(
        "--group", choices=["item", "scene"], help="default: scene where scenes are known"
    )
    parser.add_argument("--ids", type=Path, help="ids of a subset, one per line")
    parser.add_argument("--vision", type=Path, help="result folder with media")
    parser.add_argument("--blind", type=Path, help="result folder without media")
    parser.add_argument("--pred", type=Path, help="answers to circular variants")
    parser.add_argument(
        "--style", default="plain", choices=["plain", "mmsi"], help="form of circular variants"
    )
    parser.add_argument("--budget", type=int, help="items to prune; default a tenth")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--threshold", type=float, default=0.0)
    parser.add_argument("--alloc", default="per_type", choices=["global", "per_format", "per_type"])
    parser.add_argument("--diagnostic", default="rf", choices=["priors", "rf", "tst-llm"])
    parser.add_argument("--model", type=Path, help="model directory for tst-llm")
    parser.add_argument("--backbone", help="name of its dimensions, a file of configs/backbones")
    parser.add_argument("--launcher", default="python", help="what starts the training recipe")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="key=value", help="changes to the training recipe"
    )
    args = parser.parse_args(argv)
    try:
        bench = load_benchmark(args.bench, args.data)
        args.group = args.group or ("scene" if bench.clustered else "item")
        args.out.mkdir(parents=True, exist_ok=True)
        run = {
            "priors": diagnosis,
            "rf": diagnosis,
            "blind": blind,
            "circular": circular,
            "ibp": ibp,
            "tst-llm": stress_test,
        }
        run[args.mode](bench, args)
    except SpatialVLMError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
