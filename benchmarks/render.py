"""Speed of the room renderer and of the geometry kernels of the data engine, on one core.

    python benchmarks/render.py --out benchmarks/results/render.json

CPU seconds count, because wall time depends on what else runs on the machine. Measured: furnished rooms at
224² and 448² (with shadows, one and two colour samples per pixel side), shadow maps, building a room, whole
``render_rooms.py`` runs (64 rooms, 8 frames, 336²) with one and two workers and a quarter of it with two colour
samples per pixel side, memory per worker, and box distances, projections, visibility and areas. Two minutes.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from spatialvlm.scenes.areas import alpha_area
from spatialvlm.scenes.boxes import Box
from spatialvlm.scenes.distances import box_distances
from spatialvlm.scenes.rooms.build import (
    RenderConfig,
    RoomSpec,
    draw_cameras,
    draw_room,
    render_view,
)
from spatialvlm.scenes.transforms import rx, rz
from spatialvlm.scenes.visibility import count_rays, frame_visibility, project_box

ROOT = Path(__file__).resolve().parents[1]


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    """Mean CPU time of one call, after one unmeasured call."""
    call()
    start = time.process_time()
    for _ in range(repeats):
        call()
    return 1000 * (time.process_time() - start) / repeats


def rendering(num_rooms: int) -> dict[str, object]:
    """Frames of furnished rooms."""
    found: dict[str, object] = {}
    start = time.process_time()
    models = [draw_room(RoomSpec(seed)) for seed in range(num_rooms)]
    found["first_rooms_ms"] = 1000 * (time.process_time() - start) / num_rooms
    found["build_room_ms"] = milliseconds(lambda: draw_room(RoomSpec(1)), 3)
    found["faces"] = float(np.mean([len(model.mesh) for model in models]))
    found["objects"] = float(np.mean([len(model.placed) for model in models]))
    light = models[0].lighting.lights[0]
    found["shadow_map_ms"] = milliseconds(lambda: light.with_shadow(models[0].mesh), 5)
    for size, ssaa in ((224, 1), (448, 1), (448, 2)):
        config = RenderConfig(num_frames=4, width=size, height=size)
        views = [(model, camera) for model in models for camera in draw_cameras(model, config)]
        render_view(*views[0], ssaa=ssaa)
        start = time.process_time()
        for model, camera in views:
            render_view(model, camera, ssaa=ssaa)
        found[f"frame_{size}_ssaa{ssaa}_ms"] = 1000 * (time.process_time() - start) / len(views)
    return found


def kernels() -> dict[str, float]:
    """Distances, projections, visibility, areas."""
    rng = np.random.default_rng(0)

    def boxes(tilt: float) -> list[Box]:
        return [
            Box(
                rng.uniform(-3, 3, 3),
                rng.uniform(0.1, 2, 3),
                rz(rng.uniform(-3, 3)) @ rx(tilt * rng.uniform(-1, 1)),
            )
            for _ in range(30)
        ]

    upright, tilted = boxes(0.0), boxes(1.0)
    model = draw_room(RoomSpec(0))
    config = RenderConfig(num_frames=2, width=640, height=480)
    picture = render_view(model, draw_cameras(model, config)[0])
    camera, depth, ids = picture.camera, picture.raster.depth, picture.raster.ids
    seen = [(i, item.box) for i, item in enumerate(model.placed) if project_box(item.box, camera)]
    projections = [(i, box, project_box(box, camera)) for i, box in seen]
    room = [item.box for item in model.placed]
    points = rng.uniform(0, 6, (10_000, 2))
    return {
        "distances_30_upright_ms": milliseconds(lambda: box_distances(upright), 20),
        "distances_30_tilted_ms": milliseconds(lambda: box_distances(tilted), 10),
        "projection_ms_per_box": milliseconds(lambda: [project_box(b, camera) for _, b in seen], 20)
        / len(seen),
        "rays_ms_per_box": milliseconds(
            lambda: [count_rays(b, p, camera, depth, ids == i + 1) for i, b, p in projections if p],
            5,
        )
        / len(seen),
        "frame_visibility_ms_per_box": milliseconds(
            lambda: frame_visibility(room, camera, depth, ids), 5
        )
        / len(room),
        "alpha_area_10k_ms": milliseconds(lambda: alpha_area(points), 3),
    }


def whole_run(workers: int, rooms: int, ssaa: int) -> dict[str, float]:
    """Wall time, size and memory of the command."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, str(ROOT / "tools" / "render_rooms.py"), "--num", str(rooms), "--frames", "8",
            "--size", "336", "--ssaa", str(ssaa), "--workers", str(workers), "--no-depth", "--out", folder,
        ]  # fmt: skip
        start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
        wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "cpu_s": cpu,
        "wall_s": wall,
        "megabytes": size / 1e6,
        "peak_mb": after.ru_maxrss / 1024,
    }


def main() -> None:
    """Run everything and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rooms", type=int, default=64, help="rooms of the whole runs")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    result = {
        "machine": {
            "platform": platform.platform(),
            "cores": os.cpu_count(),
            "load": os.getloadavg()[0],
        },
        "rendering": rendering(6),
        "kernels": kernels(),
        "runs": {
            f"{rooms}_rooms_{workers}_workers_ssaa{ssaa}": whole_run(workers, rooms, ssaa)
            for workers, rooms, ssaa in (
                (1, arguments.rooms, 1), (2, arguments.rooms, 1), (2, max(arguments.rooms // 4, 1), 2),
            )
        },
    }  # fmt: skip
    one, two, _ = result["runs"].values()
    result["scaling_efficiency"] = round(one["wall_s"] / two["wall_s"] / 2, 2)
    result["targets_met"] = {
        "frame_448_50_ms": result["rendering"]["frame_448_ssaa1_ms"] <= 50,
        "64_rooms_2_workers_30_s": two["wall_s"] <= 30 * arguments.rooms / 64,
    }
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
