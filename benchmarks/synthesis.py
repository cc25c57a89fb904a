"""Questions per second of one core, by task: geometry, wording and row assembly, no files.

    python benchmarks/synthesis.py --out benchmarks/results/synthesis.json

Renders sixteen furnished rooms first unless ``--scenes`` names a folder. CPU seconds count, because wall time
depends on what else runs on the machine. The scene context (boxes, distances, views) is built once per scene
and counted in ``context_s``; the rate of a task counts every question it emits (each turn of a dialogue is one)
over the CPU time of all its candidates, rejected ones included. Also measured: the full mix, writing parquet, verification, memory per worker, one against
two worker processes, and what the two published data sets would cost at these rates. About a minute.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from spatialvlm.scenes.io import iter_scenes
from spatialvlm.scenes.rooms.build import RenderConfig, RoomSpec, write_room
from spatialvlm.synthesis.engine import synthesize
from spatialvlm.synthesis.generate import RowMaker, make_context, task_rows
from spatialvlm.synthesis.parts import RowWriter
from spatialvlm.synthesis.plan import SynthesisPlan, TaskPlan, make_plan
from spatialvlm.synthesis.tasks import TASKS
from spatialvlm.synthesis.verify import verify
from spatialvlm.synthesis.wording import phrase_book

SIMPLE = ("dist_abs", "vsi_rel_dist", "vsi_rel_dir", "ssr_lcm")
TARGETS = {"simple_qa_per_s": 20_000, "mix_qa_per_s": 3_000}


def measure_tasks(folder: Path, plan: SynthesisPlan) -> dict[str, object]:
    """Rows per second of each task over all scenes of a folder; rows go to a file as in a worker."""
    seconds: Counter[str] = Counter()
    rows: Counter[str] = Counter()
    turns: Counter[str] = Counter()
    context_s = write_s = 0.0
    scenes = list(iter_scenes(folder))
    with tempfile.TemporaryDirectory() as temporary:
        target = Path(temporary) / "rows.parquet"
        with RowWriter(target) as writer:
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
                    done = time.process_time()
                    writer.add(made)
                    write_s += time.process_time() - done
                    seconds[name] += done - start
                    rows[name] += len(made)
                    turns[name] += sum(_questions(row) for row in made)
            start = time.process_time()
        write_s += time.process_time() - start
        size = target.stat().st_size
    rates = {name: round(turns[name] / seconds[name]) for name in TASKS if rows[name]}
    total = sum(rows.values())
    return {
        "scenes": len(scenes),
        "objects_per_scene": round(sum(len(scene.objects) for scene in scenes) / len(scenes), 1),
        "rows": total,
        "questions": sum(turns.values()),
        "qa_per_s": dict(sorted(rates.items(), key=lambda item: -item[1])),
        "simple_qa_per_s": round(sum(turns[t] for t in SIMPLE) / sum(seconds[t] for t in SIMPLE)),
        "simple_rows_per_s": round(sum(rows[t] for t in SIMPLE) / sum(seconds[t] for t in SIMPLE)),
        "mix_qa_per_s": round(sum(turns.values()) / (sum(seconds.values()) + context_s)),
        "mix_rows_per_s": round(total / (sum(seconds.values()) + context_s)),
        "context_s_per_scene": round(context_s / len(scenes), 4),
        "write_rows_per_s": round(total / write_s),
        "bytes_per_row": round(size / total),
    }


def _questions(row: dict[str, object]) -> int:
    return sum(message["role"] == "assistant" for message in row["messages"])


def measure_scaling(folder: Path, plan: SynthesisPlan) -> dict[str, float]:
    """Whole runs with one and two processes (start-up included), memory of a worker, verification."""
    result: dict[str, float] = {}
    busy = {}
    with tempfile.TemporaryDirectory() as temporary:
        for workers in (1, 2):
            out = Path(temporary) / str(workers)
            start = time.perf_counter()
            synthesize(folder, out, plan, executor="process", workers=workers)
            result[f"workers_{workers}_wall_s"] = round(time.perf_counter() - start, 2)
            parts = [json.loads(path.read_text()) for path in sorted(out.glob("part-*.json"))]
            busy[workers] = sum(part["seconds"] for part in parts)
        result["efficiency"] = round(result["workers_1_wall_s"] / result["workers_2_wall_s"] / 2, 2)
        # How much longer the same parts take while another worker runs.
        result["efficiency_without_start"] = round(busy[1] / busy[2], 2)
        result["worker_peak_mb"] = max(part["peak_rss_mb"] for part in parts)
        start = time.process_time()
        report = verify(out, folder, sample=0.2, executor="serial")
        result["verify_rows_per_s"] = round(report.checked / (time.process_time() - start))
        result["verify_disagreements"] = len(report.mismatches)
    return result


def render(folder: Path, rooms: int) -> None:
    """Furnished rooms with depth, twelve frames each."""
    config = RenderConfig(num_frames=12, width=224, height=224, ssaa=1)
    for seed in range(40, 40 + rooms):
        write_room(RoomSpec(seed), folder, config)


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenes", type=Path, help="folder of scenes; rendered when left out")
    parser.add_argument("--rooms", type=int, default=16, help="rooms to render")
    parser.add_argument("--per-task", type=int, default=100, help="rows per scene and task")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    arguments = parser.parse_args(argv)
    plan = dataclasses.replace(
        make_plan("all", per_task=arguments.per_task),
        tasks={name: TaskPlan(arguments.per_task) for name in TASKS},
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.scenes or Path(temporary)
        if arguments.scenes is None:
            render(folder, arguments.rooms)
        result = measure_tasks(folder, plan)
        result["scaling"] = measure_scaling(folder, plan)
    mix, simple = result["mix_rows_per_s"], result["simple_rows_per_s"]
    result["extrapolated_core_hours"] = {
        "OpenSpatial 3M rows, full mix": round(3e6 / mix / 3600, 2),
        "InternSpatial 12M rows, full mix": round(12e6 / mix / 3600, 2),
        "12M rows, simple tasks": round(12e6 / simple / 3600, 2),
    }
    gigabytes = result["bytes_per_row"] / 1e9
    result["extrapolated_gigabytes"] = {
        "OpenSpatial 3M rows": round(3e6 * gigabytes, 2),
        "InternSpatial 12M rows": round(12e6 * gigabytes, 2),
    }
    result["targets_met"] = {name: result[name] >= least for name, least in TARGETS.items()}
    result["machine"] = {
        "platform": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "load": round(os.getloadavg()[0], 1),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
