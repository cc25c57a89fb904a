"""Lifting: what overlapped stages save, and how depth and pose noise turn into wrong answers.

    python benchmarks/lifting.py --out benchmarks/results/lifting.json --plot benchmarks/results/lifting.svg

Rooms are lifted through oracle backends with noise. For every pair of objects with unique labels that were
found, three answers are compared with the exact ones: which is left of the other, which is in front (both
from every frame, only where the exact margin is 0.15 m), and how far apart their centres are.
"""

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from spatialvlm.scenes.lifting.lift import lift_video
from spatialvlm.scenes.lifting.oracle import Noise, Oracle, View
from spatialvlm.scenes.lifting.pipeline import Stage, run_stages
from spatialvlm.scenes.rooms.build import (
    RenderConfig,
    RoomSpec,
    draw_cameras,
    draw_room,
    make_scene,
    render_view,
)
from spatialvlm.scenes.schema import Scene

MARGIN_M = 0.15
LEVELS = {
    "depth": [Noise(depth_rel=value) for value in (0.0, 0.05, 0.10, 0.20)],
    "pose": [Noise(rotation_deg=30 * v, translation_m=v) for v in (0.0, 0.05, 0.10, 0.20)],
}


def overlap() -> dict[str, float]:
    """Four stages of 20 ms for 50 items, overlapped and one after the other; wall seconds."""

    def wait(items: list[int]) -> list[int]:
        time.sleep(0.02 * len(items))
        return items

    stages = [Stage(str(index), wait) for index in range(4)]
    start = time.perf_counter()
    run_stages(stages, range(50))
    overlapped = time.perf_counter() - start
    start = time.perf_counter()
    for item in range(50):
        for stage in stages:
            stage.call([item])
    return {"overlapped_s": overlapped, "serial_s": time.perf_counter() - start}


def agreement(truth: Scene, lifted: Scene) -> dict[str, list[float]]:
    """Answers on the lifted scene against those on the true one."""

    def unique(scene: Scene) -> dict[str, np.ndarray]:
        labels = [o.label for o in scene.objects]
        return {o.label: o.center for o in scene.objects if labels.count(o.label) == 1}

    exact, found = unique(truth), unique(lifted)
    shared = sorted(set(exact) & set(found))
    result: dict[str, list[float]] = {"left_right": [], "front_behind": [], "distance_error": []}
    result["found"] = [len(shared) / max(1, len(exact))]
    for i, a in enumerate(shared):
        for b in shared[:i]:
            true_distance = np.linalg.norm(exact[a] - exact[b])
            distance = np.linalg.norm(found[a] - found[b])
            result["distance_error"].append(abs(distance - true_distance) / true_distance)
            for true_frame, frame in zip(truth.frames, lifted.frames, strict=True):
                true_ab = true_frame.camera.level_frame("y")[:3, :3] @ (exact[a] - exact[b])
                ab = frame.camera.level_frame("y")[:3, :3] @ (found[a] - found[b])
                for name, axis in (("left_right", 0), ("front_behind", 1)):
                    if abs(true_ab[axis]) > MARGIN_M:
                        result[name].append(float(np.sign(ab[axis]) == np.sign(true_ab[axis])))
    return result


def curve(rooms: int, frames: int) -> dict[str, list[dict[str, float]]]:
    """Mean agreement for every noise level."""
    config = RenderConfig(num_frames=frames, width=192, height=144)
    captured = []
    for seed in range(rooms):
        model = draw_room(RoomSpec(seed))
        pictures = [
            render_view(model, c, noise_seed=i) for i, c in enumerate(draw_cameras(model, config))
        ]
        views = [View(p.rgb, p.raster.depth, p.raster.ids, p.camera) for p in pictures]
        captured.append((make_scene(model, pictures, config, stored=False), views))
    curves: dict[str, list[dict[str, float]]] = {}
    for kind, levels in LEVELS.items():
        curves[kind] = []
        for noise in levels:
            collected: dict[str, list[float]] = {}
            for truth, views in captured:
                oracle = Oracle(truth, views, noise)
                images = np.stack([view.image for view in views])
                lifted = lift_video(images, oracle.backends(), scene_id="lifted/room")
                for name, values in agreement(truth, lifted).items():
                    collected.setdefault(name, []).extend(values)
            level = noise.depth_rel if kind == "depth" else noise.translation_m
            point = {"level": level, "pairs": float(len(collected["distance_error"]))}
            point["found"] = float(np.mean(collected["found"]))
            point["left_right"] = float(np.mean(collected["left_right"] or [0]))
            point["front_behind"] = float(np.mean(collected["front_behind"] or [0]))
            point["distance_error"] = float(np.median(collected["distance_error"] or [np.nan]))
            curves[kind].append(point)
            print(kind, {key: round(value, 3) for key, value in point.items()}, flush=True)
    return curves


def plot(curves: dict[str, list[dict[str, float]]]) -> str:
    """Two small line charts as SVG: share of equal answers over the noise level."""
    colors = {"left_right": "#1f77b4", "front_behind": "#d62728", "found": "#2ca02c"}
    titles = {"depth": "relative depth noise", "pose": "pose noise (m, and 30 degrees per m)"}
    parts = []
    for column, (kind, points) in enumerate(curves.items()):
        left, top, width, height = 50 + 340 * column, 30, 270, 200
        highest = max(p["level"] for p in points)
        parts.append(f"<text x='{left}' y='20' font-size='13'>{titles[kind]}</text>")
        for share in (0.0, 0.5, 1.0):
            y = top + height * (1 - share)
            parts.append(f"<line x1='{left}' x2='{left + width}' y1='{y}' y2='{y}' stroke='#ddd'/>")
            parts.append(f"<text x='{left - 30}' y='{y + 4}' font-size='11'>{share:.0%}</text>")
        for name, color in colors.items():
            line = " ".join(
                f"{left + width * p['level'] / highest:.1f},{top + height * (1 - p[name]):.1f}"
                for p in points
            )
            parts.append(
                f"<polyline points='{line}' fill='none' stroke='{color}' stroke-width='2'/>"
            )
        for p in points:
            x = left + width * p["level"] / highest
            parts.append(
                f"<text x='{x - 10:.0f}' y='{top + height + 16}' font-size='11'>{p['level']:g}</text>"
            )
    for row, (name, color) in enumerate(colors.items()):
        parts.append(
            f"<text x='{60 + 130 * row}' y='275' font-size='12' fill='{color}'>{name.replace('_', ' / ')}</text>"
        )
    return (
        "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 700 285' font-family='sans-serif'>"
        f"<rect width='700' height='285' fill='#fff'/>{''.join(parts)}</svg>"
    )


def main() -> None:
    """Run both and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rooms", type=int, default=8)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    result = {
        "overlap": overlap(),
        "rooms": arguments.rooms,
        "frames": arguments.frames,
        "noise": curve(arguments.rooms, arguments.frames),
    }
    print(json.dumps(result["overlap"]))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.plot:
        arguments.plot.write_text(plot(result["noise"]) + "\n")


if __name__ == "__main__":
    main()
