"""Lifting: what overlapped stages and shared features save, and how noise turns into wrong answers.

    python benchmarks/lifting.py --out benchmarks/results/lifting.json --plot benchmarks/results/lifting.svg

Speed: four stages of 20 ms for 50 items one after the other and overlapped (wall seconds); segmenting and
refining the masks of the same frames with SAM 2 (the real class, random weights, a small encoder) with and
without shared image embeddings, and lifting the same video twice with a feature store (CPU seconds).

Noise: rooms are lifted through oracle backends. For every pair of objects with unique labels, three answers are
compared with the exact ones: which is left of the other, which is in front (both from every frame, only where
the exact margin is 0.15 m), and how far apart their centres are. The label error counts an answer as wrong when
it differs or when one of the objects was not found.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

from spatialvlm.scenes.lifting.agreement import Agreement, agreement
from spatialvlm.scenes.lifting.features import FeatureStore
from spatialvlm.scenes.lifting.lift import lift_video
from spatialvlm.scenes.lifting.oracle import Noise, Oracle, View
from spatialvlm.scenes.lifting.pipeline import Stage, run_stages
from spatialvlm.scenes.lifting.protocols import Detection
from spatialvlm.scenes.rooms.build import (
    RenderConfig,
    RoomSpec,
    draw_cameras,
    draw_room,
    make_scene,
    render_view,
)
from spatialvlm.scenes.schema import Scene

LEVELS = {
    "depth": [Noise(depth_rel=value) for value in (0.0, 0.05, 0.10, 0.20)],
    "pose": [Noise(rotation_deg=30 * v, translation_m=v) for v in (0.0, 0.05, 0.10, 0.20)],
}
SAM_FRAMES = 4


def cpu_seconds(call: Callable[[], object]) -> float:
    """CPU time of one call."""
    start = time.process_time()
    call()
    return time.process_time() - start


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
    serial = time.perf_counter() - start
    return {"overlapped_s": overlapped, "serial_s": serial, "speed_up": serial / overlapped}


def save_sam2(path: Path) -> None:
    """A SAM 2 checkpoint with random weights: small, but most of its time goes into the image encoder."""
    from transformers import (
        Sam2Config,
        Sam2HieraDetConfig,
        Sam2ImageProcessor,
        Sam2MaskDecoderConfig,
        Sam2Model,
        Sam2Processor,
        Sam2PromptEncoderConfig,
        Sam2VisionConfig,
    )

    hiera = Sam2HieraDetConfig(
        hidden_size=48, num_attention_heads=1, image_size=[512, 512], blocks_per_stage=[1, 2, 5, 1],
        embed_dim_per_stage=[48, 96, 192, 384], num_attention_heads_per_stage=[1, 2, 4, 8],
        window_size_per_stage=[8, 4, 14, 7], window_positional_embedding_background_size=[7, 7],
        global_attention_blocks=[5],
    )  # fmt: skip
    vision = Sam2VisionConfig(
        backbone_config=hiera, backbone_channel_list=[384, 192, 96, 48],
        backbone_feature_sizes=[[128, 128], [64, 64], [32, 32]], fpn_hidden_size=128,
    )  # fmt: skip
    config = Sam2Config(
        vision_config=vision,
        prompt_encoder_config=Sam2PromptEncoderConfig(hidden_size=128, image_size=512),
        mask_decoder_config=Sam2MaskDecoderConfig(
            hidden_size=128, mlp_dim=512, iou_head_hidden_dim=128
        ),
    )
    Sam2Model(config).save_pretrained(path)
    size = {"height": 512, "width": 512}
    processor = Sam2ImageProcessor(size=size, mask_size={"height": 128, "width": 128})
    Sam2Processor(processor, target_size=512).save_pretrained(path)


def sharing() -> dict[str, float]:
    """CPU seconds of two rounds of masks (segment, refine) on the same frames."""
    from spatialvlm.scenes.lifting.hf_backends import Sam2Segmenter

    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (SAM_FRAMES, 240, 320, 3)).astype(np.uint8)
    boxes = [[Detection("a", (20, 30, 120, 160), 1.0)] for _ in images]
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        save_sam2(Path(folder))
        for name, store in (("alone_s", None), ("shared_s", FeatureStore())):
            segmenter = Sam2Segmenter(folder, store=store)
            segmenter.segment(images[:1, ::-1].copy(), boxes[:1])  # warm up on another picture

            def rounds(segmenter: Sam2Segmenter = segmenter) -> None:
                for _ in range(2):
                    segmenter.segment(images, boxes)

            found[name] = cpu_seconds(rounds)
    return {**found, "speed_up": found["alone_s"] / found["shared_s"]}


def rerun(scene: Scene, views: list[View]) -> dict[str, float]:
    """Backend calls and CPU seconds of lifting one video, and of lifting it again from the store."""
    oracle = Oracle(scene, views)
    images = np.stack([view.image for view in views])
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("first", "second"):
            oracle.calls = 0
            store = FeatureStore(Path(folder))
            found[f"{name}_s"] = cpu_seconds(
                lambda store=store: lift_video(
                    images, oracle.backends(), scene_id="lifted/x", store=store
                )
            )
            found[f"{name}_calls"] = oracle.calls
    return found


def capture(seed: int, config: RenderConfig) -> tuple[Scene, list[View]]:
    """A room and what an oracle knows of its frames."""
    model = draw_room(RoomSpec(seed))
    pictures = [
        render_view(model, c, noise_seed=i) for i, c in enumerate(draw_cameras(model, config))
    ]
    views = [View(p.rgb, p.raster.depth, p.raster.ids, p.camera) for p in pictures]
    return make_scene(model, pictures, config, stored=False), views


def curve(rooms: list[tuple[Scene, list[View]]]) -> dict[str, list[dict[str, float]]]:
    """Mean agreement over rooms for every noise level."""
    curves: dict[str, list[dict[str, float]]] = {}
    for kind, levels in LEVELS.items():
        curves[kind] = []
        for noise in levels:
            results: list[Agreement] = []
            for truth, views in rooms:
                images = np.stack([view.image for view in views])
                oracle = Oracle(truth, views, noise)
                lifted = lift_video(images, oracle.backends(), scene_id="lifted/x").scene
                results.append(agreement(truth, lifted))
            point = {"level": noise.depth_rel if kind == "depth" else noise.translation_m}
            for name in asdict(results[0]):
                point[name] = float(np.nanmean([getattr(r, name) for r in results]))
            point["label_error"] = float(np.mean([r.label_error for r in results]))
            curves[kind].append(point)
            print(kind, {key: round(value, 3) for key, value in point.items()}, flush=True)
    return curves


COLORS = {
    "label_error": "#d62728",
    "found": "#2ca02c",
    "left_right": "#1f77b4",
    "front_behind": "#9467bd",
}
NAMES = {
    "label_error": "wrong or missing answers",
    "found": "objects found",
    "left_right": "left / right equal",
    "front_behind": "front / behind equal",
}
TITLES = {
    "depth": "relative depth noise",
    "pose": "pose noise per frame: metres (and 30 degrees per metre)",
}


def plot(curves: dict[str, list[dict[str, float]]]) -> str:
    """Two line charts as SVG: shares over the noise level."""
    parts = []
    for column, (kind, points) in enumerate(curves.items()):
        left, top, width, height = 52 + 380 * column, 36, 300, 210
        highest = max(p["level"] for p in points)
        parts.append(f"<text x='{left}' y='22' font-size='13'>{TITLES[kind]}</text>")
        for share in (0.0, 0.25, 0.5, 0.75, 1.0):
            y = top + height * (1 - share)
            parts.append(f"<line x1='{left}' x2='{left + width}' y1='{y}' y2='{y}' stroke='#ddd'/>")
            parts.append(
                f"<text x='{left - 6}' y='{y + 4}' font-size='11' text-anchor='end'>{share:.0%}</text>"
            )
        for name, color in COLORS.items():
            at = [
                (left + width * p["level"] / highest, top + height * (1 - p[name])) for p in points
            ]
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
            parts.append(
                f"<polyline points='{line}' fill='none' stroke='{color}' stroke-width='2'/>"
            )
            parts += [f"<circle cx='{x:.1f}' cy='{y:.1f}' r='3' fill='{color}'/>" for x, y in at]
        for p in points:
            x = left + width * p["level"] / highest
            parts.append(
                f"<text x='{x:.0f}' y='{top + height + 17}' font-size='11' text-anchor='middle'>"
                f"{p['level']:g}</text>"
            )
    for row, (name, color) in enumerate(COLORS.items()):
        x = 52 + 180 * row
        parts.append(f"<rect x='{x}' y='278' width='12' height='12' fill='{color}'/>")
        parts.append(f"<text x='{x + 18}' y='288' font-size='12'>{NAMES[name]}</text>")
    return (
        "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 770 302' font-family='sans-serif'>"
        f"<rect width='770' height='302' fill='#fff'/>{''.join(parts)}</svg>"
    )


def main() -> None:
    """Run everything and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rooms", type=int, default=4)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    config = RenderConfig(num_frames=arguments.frames, width=192, height=144)
    rooms = [capture(seed, config) for seed in range(arguments.rooms)]
    result = {
        "overlap": overlap(),
        "sharing": sharing(),
        "rerun": rerun(*rooms[0]),
        "rooms": arguments.rooms,
        "frames": arguments.frames,
    }
    print(json.dumps(result), flush=True)
    result["noise"] = curve(rooms)
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.plot:
        arguments.plot.write_text(plot(result["noise"]) + "\n")


if __name__ == "__main__":
    main()
