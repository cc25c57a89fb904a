"""Look for answers that can be guessed: priors, option positions, templates, a text-only probe.

    python tools/audit_qa.py data/demo/qa/train --scenes data/demo/rooms/train --out audit

Writes ``OUT/audit.json`` and ``OUT/audit.html`` (one static page with a sample per task). ``--balance DIR``
first writes evened-out rows to DIR and audits those; ``--prune DIR`` writes the rows that remain after
the most predictable ones were removed. Exit code 1 with ``--strict`` if there is any warning.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from PIL import Image

from spatialvlm.errors import MarkError, run_command
from spatialvlm.scenes.blacklist import blocked_scenes
from spatialvlm.synthesis.audit import audit, iter_rows, page, prune
from spatialvlm.synthesis.balance import balance
from spatialvlm.synthesis.marks import draw_marks, mark_from_dict
from spatialvlm.synthesis.parts import RowWriter

MAX_SAMPLE_IMAGES = 4


def sample_images(row: dict, scenes: Path) -> dict[str, str]:
    """Images of one row with their marks, as ``data:`` addresses."""
    marks = [mark_from_dict(record) for record in json.loads(row["marks"])]
    found = {}
    for index, path in enumerate(row["images"][:MAX_SAMPLE_IMAGES]):
        if not (scenes / path).is_file():
            continue
        image = Image.open(scenes / path).convert("RGB")
        size = image.size
        image.thumbnail((320, 320))
        try:
            own = [mark for mark in marks if mark.image == index]
            image = draw_marks(image, own, stored_size=size)
        except MarkError as error:
            print(f"{row['id']}: {error}", file=sys.stderr)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=85)
        found[path] = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return found


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", type=Path)
    parser.add_argument("--scenes", type=Path, help="for the sample images")
    parser.add_argument("--out", type=Path, help="folder of the report (default: the rows)")
    parser.add_argument("--balance", type=Path, metavar="DIR")
    parser.add_argument("--prune", type=Path, metavar="DIR")
    parser.add_argument("--strict", action="store_true")
    arguments = parser.parse_args(argv)
    folder = arguments.rows
    if arguments.balance:
        report = balance(folder, arguments.balance)
        before, after = sum(report.before.values()), sum(report.after.values())
        print(f"balanced: {after:,} of {before:,} rows kept in {arguments.balance}")
        folder = arguments.balance
    samples: dict[str, dict] = {}

    def watched() -> Iterator[dict]:
        for row in iter_rows(folder):
            samples.setdefault(row["task"], row)
            yield row

    result = audit(watched(), blocked=blocked_scenes)
    if not result.rows:
        print(f"{folder}: no rows to audit", file=sys.stderr)
        return 2
    if arguments.prune:
        arguments.prune.mkdir(parents=True, exist_ok=True)
        removed = set(prune(iter_rows(folder), result.leaking))
        with RowWriter(arguments.prune / "pruned.parquet") as writer:
            for row in iter_rows(folder):
                if row["id"] not in removed:
                    writer.add([row])
        if (folder / "plan.json").is_file():  # so that the rows that remain can be verified
            shutil.copy(folder / "plan.json", arguments.prune / "plan.json")
        (arguments.prune / "removed.json").write_text(json.dumps(sorted(removed)), encoding="utf-8")
        print(f"pruned: {len(removed):,} rows removed")
        samples.clear()
        folder = arguments.prune
        result = audit(watched(), blocked=blocked_scenes)
    images = {}
    if arguments.scenes:
        for row in samples.values():
            images.update(sample_images(row, arguments.scenes))
    out = arguments.out or folder
    out.mkdir(parents=True, exist_ok=True)
    (out / "audit.json").write_text(json.dumps(result.to_dict(), indent=1), encoding="utf-8")
    (out / "audit.html").write_text(page(result, samples, images), encoding="utf-8")
    for text in result.warnings:
        print(f"warning: {text}")
    print(
        f"{result.rows:,} rows, {len(result.tasks)} tasks, {len(result.warnings)} warnings: {out / 'audit.html'}"
    )
    return 1 if arguments.strict and result.warnings else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
