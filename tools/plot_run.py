r"""Training curves of one or several runs as one static page.

    python tools/plot_run.py runs/stage1 runs/stage2 --out curves.html

Loss and gradient norm (logarithmic), speed, utilisation, data wait and memory of all runs in one chart each; learning
rates and evaluations of every run. From each ``metrics.jsonl``; what a run did not log is left out. Also writes
``<out>.csv`` with the plotted values and ``<out>_plots/`` with every chart as PNG and CSV.
"""

import argparse
import csv
import sys
from pathlib import Path

from spatialvlm.errors import SpatialVLMError, run_command
from spatialvlm.evaluation.report import curves_page, plotted, run_names
from spatialvlm.evaluation.runs import read_metrics


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("curves.html"))
    args = parser.parse_args(argv)
    try:
        page, gallery = curves_page(args.runs)
        rows = [
            [name, step["step"], key, step[key]]
            for name, run in zip(run_names(args.runs), args.runs, strict=True)
            for step in read_metrics(run)
            for key in sorted(step)
            if plotted(key) and isinstance(step[key], (int, float))
        ]
    except SpatialVLMError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(page, encoding="utf-8")
    gallery.write(args.out.with_name(f"{args.out.stem}_plots"))
    with args.out.with_suffix(".csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["run", "step", "key", "value"], *rows])
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
