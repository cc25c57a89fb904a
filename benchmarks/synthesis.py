"""Questions per second of one core, by task: geometry, wording and row assembly, no files.

    python benchmarks/synthesis.py --scenes data/demo/rooms/train --out benchmarks/results/synthesis.json

The scene context (boxes, distances, views) is built once per scene and counted in ``context_s``; the rate
of a task counts every row it emits over the CPU time of all its candidates, rejected ones included. Also
measured: the full mix, verification, writing parquet, memory, and 1 against 2 worker processes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from spatialvlm.scenes.io import iter_scenes
from spatialvlm.synthesis.engine import synthesize
from spatialvlm.synthesis.generate import RowMaker, make_context, task_rows
from spatialvlm.synthesis.parts import write_rows
from spatialvlm.synthesis.plan import TaskPlan, make_plan
from spatialvlm.synthesis.tasks import TASKS
from spatialvlm.synthesis.wording import phrase_book

SIMPLE = ("dist_abs", "vsi_rel_dist", "vsi_rel_dir", "ssr_lcm")


def measure_tasks(folder: Path, per_task: int) -> dict[str, object]:
    """Rows per second of each task over all scenes of a folder."""
    plan = make_plan("all", per_task=per_task)
    seconds: Counter[str] = Counter()
    rows: Counter[str] = Counter()
    context_s = 0.0
    kept = []
    scenes = list(iter_scenes(folder))
    for scene in scenes:
        start = time.process_time()
        ctx = make_context(scene, plan)
        for index in range(ctx.num_frames):
            ctx.view(index)
        _ = ctx.distances, ctx.covisibility
        context_s += time.process_time() - start
        maker = RowMaker(ctx, plan, phrase_book())
        for name, task in TASKS.items():
            start = time.process_time()
            made = list(task_rows(maker, task, Counter()))
            seconds[name] += time.process_time() - start
            rows[name] += len(made)
            kept += made
    start = time.process_time()
    with tempfile.TemporaryDirectory() as temporary:
        write_rows(Path(temporary) / "rows.parquet", kept)
        size = (Path(temporary) / "rows.parquet").stat().st_size
    write_s = time.process_time() - start
    rates = {name: round(rows[name] / seconds[name]) for name in TASKS if rows[name]}
    total = sum(rows.values())
    return {
        "scenes": len(scenes),
        "rows": total,
        "rows_per_s": dict(sorted(rates.items(), key=lambda item: -item[1])),
        "simple_rows_per_s": round(
            sum(rows[t] for t in SIMPLE) / max(sum(seconds[t] for t in SIMPLE), 1e-9)
        ),
        "mix_rows_per_s": round(total / (sum(seconds.values()) + context_s)),
        "context_s_per_scene": round(context_s / len(scenes), 4),
        "write_rows_per_s": round(total / write_s),
        "bytes_per_row": round(size / total),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def measure_scaling(folder: Path, per_task: int) -> dict[str, float]:
    """Seconds of a whole run with one and with two processes (start-up included)."""
    plan = dataclasses.replace(
        make_plan("all", per_task=per_task), tasks={name: TaskPlan(per_task) for name in TASKS}
    )
    result = {}
    for workers in (1, 2):
        with tempfile.TemporaryDirectory() as temporary:
            start = time.perf_counter()
            synthesize(folder, Path(temporary), plan, executor="process", workers=workers)
            result[f"workers_{workers}_s"] = round(time.perf_counter() - start, 2)
    return result


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenes", type=Path, required=True)
    parser.add_argument("--per-task", type=int, default=100, help="rows per scene and task")
    parser.add_argument("--scaling", action="store_true", help="also compare 1 and 2 processes")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    arguments = parser.parse_args(argv)
    result = measure_tasks(arguments.scenes, arguments.per_task)
    if arguments.scaling:
        result["scaling"] = measure_scaling(arguments.scenes, arguments.per_task)
    mix, simple = result["mix_rows_per_s"], result["simple_rows_per_s"]
    result["extrapolated_core_hours"] = {
        "OpenSpatial 3M rows, full mix": round(3e6 / mix / 3600, 2),
        "InternSpatial 12M rows, full mix": round(12e6 / mix / 3600, 2),
        "12M rows, simple tasks": round(12e6 / simple / 3600, 2),
    }
    result["machine"] = (
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    )
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
