"""How long it takes to index, open, and order a large source, on generated JSON lines.

    python benchmarks/index.py --rows 1000000 --workers 2 --json out.json

Reports CPU and wall seconds of every part, peak memory of the builder, and the time of one lookup.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import shutil
import tempfile
import time
from multiprocessing import forkserver
from pathlib import Path

import numpy as np

from spatialvlm.data.formats import SourceAttrs
from spatialvlm.data.index_build import build_index
from spatialvlm.data.mixture import Mixture
from spatialvlm.data.sources import Source
from spatialvlm.data.units import SourceRows

ROWS_PER_VIDEO = 47


def write_rows(path: Path, rows: int) -> None:
    """Rows in the shape of VSI-590K, 47 questions a video."""
    with path.open("w") as out:
        for i in range(rows):
            question = f"<image>\nThese are frames of a video.\nHow many chairs like number {i} are in this room?"
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": str(i % 9)}]
            row = {
                "id": i,
                "video": f"walk/scene{i // ROWS_PER_VIDEO:07d}.mp4",
                "conversations": turns,
            }
            out.write(json.dumps(row | {"question_type": "absolute_count"}) + "\n")


class Clock:
    """Wall and CPU seconds of named parts, children included."""

    def __init__(self) -> None:
        self.parts: dict[str, dict[str, float]] = {}

    def measure(self, name, work):
        cpu, wall = _cpu_s(), time.perf_counter()
        result = work()
        self.parts[name] = {
            "wall_s": round(time.perf_counter() - wall, 4),
            "cpu_s": round(_cpu_s() - cpu, 4),
        }
        return result


def _cpu_s() -> float:
    forkserver._forkserver._stop()  # what its processes used is known when it has ended
    own, children = (
        resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="index_benchmark_"))
    clock = Clock()
    try:
        write_rows(folder / "rows.jsonl", args.rows)

        def source() -> Source:
            attrs = SourceAttrs("vsi", "spatial")
            return Source(attrs, files=["rows.jsonl"], root=folder, format="vsi590k")

        def mixture(index) -> Mixture:
            rows = SourceRows(
                "vsi",
                "spatial",
                index.column("prefix_key"),
                index.eligible(),
                content_key=index.content_key,
                cache_dir=index.folder,
            )
            return Mixture([rows], {"spatial": 1}, seed=args.seed, branches=8, epochs=1)

        index = clock.measure(
            "build index", lambda: build_index(source(), folder / "index", workers=args.workers)
        )
        peak_mb = max(
            resource.getrusage(who).ru_maxrss / 1000
            for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        )
        order = clock.measure("first order", lambda: mixture(index))
        index = clock.measure("open index", lambda: build_index(source(), folder / "index"))
        order = clock.measure("open order", lambda: mixture(index))
        far = 10_000_000
        clock.measure("draw 128 at position 10M", lambda: order.draws(far, far + 128))
        many = min(args.rows, 1_000_000)
        clock.measure(f"draw {many} positions", lambda: order.draws(0, many))
        rng = np.random.default_rng(args.seed)
        picked = rng.integers(0, args.rows, 2000)
        clock.measure("read 2000 rows", lambda: [index.sample(int(row)) for row in picked])
        size = (folder / "rows.jsonl").stat().st_size
        report = {
            "rows": args.rows,
            "bytes": size,
            "workers": args.workers,
            "cpu_s_per_million_rows": clock.parts["build index"]["cpu_s"] * 1e6 / args.rows,
            "peak_rss_mb": round(peak_mb),
            "python": platform.python_version(),
            "parts": clock.parts,
        }
    finally:
        shutil.rmtree(folder)
    for name, seconds in clock.parts.items():
        print(f"{name:28} {seconds['wall_s']:9.3f} s wall {seconds['cpu_s']:9.3f} s CPU")
    print(f"peak memory of the largest process: {peak_mb:.0f} MB")
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
