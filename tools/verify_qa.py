"""Derive every answer of generated rows again and report disagreements.

    python tools/verify_qa.py data/demo/qa/train --scenes data/demo/rooms/train --workers 2

Exit code 1 if any row disagrees with its scene, 2 if there is nothing to verify.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from spatialvlm.errors import SpatialVLMError, run_command
from spatialvlm.scenes.blacklist import blocked_scenes
from spatialvlm.synthesis.parts import list_scenes
from spatialvlm.synthesis.verify import verify


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", type=Path, help="folder written by synthesize.py")
    parser.add_argument("--scenes", type=Path, required=True)
    parser.add_argument("--sample", type=float, default=1.0, help="share of the rows to check")
    parser.add_argument(
        "--reference",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="share of the checked rows whose answer is computed by a second implementation, too",
    )
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument(
        "--allow-contaminated", action="store_true", help="rows about evaluation scenes are fine"
    )
    parser.add_argument("--report", type=Path, help="write the result as JSON")
    arguments = parser.parse_args(argv)
    started = time.perf_counter()
    try:
        refs = list_scenes(arguments.scenes)
        lists = [] if arguments.allow_contaminated else None
        report = verify(
            arguments.rows,
            arguments.scenes,
            sample=arguments.sample,
            reference=arguments.reference,
            workers=arguments.workers,
            blocked=blocked_scenes([(ref.scene_id, ref.room_id) for ref in refs], lists),
        )
    except SpatialVLMError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    seconds = time.perf_counter() - started
    if arguments.report:
        arguments.report.write_text(json.dumps(report.to_dict(), indent=1), encoding="utf-8")
    for item in report.mismatches[:20]:
        print(f"{item['id']} {item['task']}: {item['problem']}")
    rate = report.checked / seconds if seconds else 0.0
    second = sum(report.by_reference.values())
    print(
        f"{second} answers of {len(report.by_reference)} tasks computed by a second implementation"
    )
    print(
        f"{report.checked} of {report.rows} rows checked, {len(report.mismatches)} disagreements "
        f"({rate:,.0f} rows/s)"
    )
    return 1 if report.mismatches else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
