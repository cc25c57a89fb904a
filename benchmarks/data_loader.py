"""The data path without a model: media speed, packing quality, resume.

    python benchmarks/data_loader.py media --json benchmarks/results/data_media.json
    python benchmarks/data_loader.py plan --json benchmarks/results/data_plan.json
    python benchmarks/data_loader.py rows --json benchmarks/results/data_rows.json
    python benchmarks/data_loader.py wait --json benchmarks/results/data_wait.json
    python benchmarks/data_loader.py resume

``media``: images per second and core from JPEG bytes to what is sent to the model, against the stock Hugging Face
processor, and bytes sent; the values after normalisation are compared. ``plan``: 1,000 steps of a 1:1 mix of the shape
of the reference mix (spatial 1-4 images and short answers, general half text-only half one image). ``rows``: everything that
``tools/plan_data.py`` does with new rows (index, lengths, order, plan), in CPU seconds per million rows. ``wait``: share of
a training step of a tiny model that waits for one worker. ``resume``: seconds to the first batch at step 0 and at a late
step. One thread.
"""

import argparse
import io
import json
import resource
import tempfile
import time
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["media", "plan", "rows", "wait", "resume"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=1, help="processes that measure rows")
    parser.add_argument("--world", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    parts = {
        "media": lambda: media(args.images),
        "plan": lambda: plan(args.steps, args.world),
        "rows": lambda: rows(args.rows, args.workers),
        "wait": wait,
        "resume": resume,
    }
    result = parts[args.part]()
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n")


def jpegs(sizes: list[tuple[int, int]], count: int) -> list[bytes]:
    """Photograph-like JPEGs: smooth noise with some detail."""
    rng = np.random.default_rng(0)
    out = []
    for number in range(count):
        height, width = sizes[number % len(sizes)]
        coarse = Image.fromarray(
            rng.integers(0, 255, (height // 16, width // 16, 3), dtype=np.uint8)
        )
        picture = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(
            np.int16
        )
        picture = picture + rng.integers(-12, 12, picture.shape, dtype=np.int16)
        buffer = io.BytesIO()
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        out.append(buffer.getvalue())
    return out


def media(num_images: int) -> dict[str, Any]:
    """Ours against the stock processor, on JPEGs of two sizes."""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    from spatialvlm.data.media.image import decode_image
    from spatialvlm.data.media.resize import fit_pixels, resize
    from spatialvlm.sequence.pixels import PixelSpec, prepare

    low, high = 4 * 28 * 28, 256 * 28 * 28
    processor = Qwen2VLImageProcessor(size={"shortest_edge": low, "longest_edge": high})
    spec = PixelSpec("patches", tuple(processor.image_mean), tuple(processor.image_std), 14)

    def ours(data: bytes) -> np.ndarray:
        source = decode_image(data)
        size = fit_pixels(*source.shape[:2], factor=28, min_pixels=low, max_pixels=high)
        return resize(source[None], size)

    def theirs(data: bytes) -> Any:
        return processor(images=[Image.open(io.BytesIO(data)).convert("RGB")], return_tensors="pt")[
            "pixel_values"
        ]

    out = {}
    for name, sizes in [
        ("450x340", [(340, 450)]),
        ("480-730", [(480, 640), (530, 730), (640, 480)]),
    ]:
        data = jpegs(sizes, num_images)
        first, stock = ours(data[0]), theirs(data[0])
        values = prepare(torch.from_numpy(first.reshape(-1)), [first.shape[:3]], [1], spec)
        times: dict[str, list[float]] = {"ours": [], "processor": []}
        for _ in range(3):
            for label, run in (("processor", theirs), ("ours", ours)):
                start = time.process_time()
                for item in data:
                    run(item)
                times[label].append(time.process_time() - start)
        speed = {label: len(data) / min(values) for label, values in times.items()}
        out[name] = {
            "images_per_s": speed["ours"],
            "processor_images_per_s": speed["processor"],
            "ratio": speed["ours"] / speed["processor"],
            "bytes": first.nbytes,
            "processor_bytes": stock.numel() * stock.element_size(),
            "max_difference_after_normalisation": float((values - stock).abs().max()),
        }
    return out


def reference_lengths(rng: np.random.Generator, count: int) -> np.ndarray:
    """Sizes of the reference mix: even positions spatial in runs on one medium, odd ones general."""
    from spatialvlm.data.sample import LENGTH_DTYPE

    out = np.zeros(count, LENGTH_DTYPE)
    spatial = np.arange(count) % 2 == 0
    run = (np.arange(count) // 2) // 4  # four questions per medium
    images = np.where(spatial, 1 + run % 4, rng.integers(0, 2, count))
    visual = images * (80 + 13 * (run % 9) * spatial + rng.integers(0, 120, count) * ~spatial)
    out["images"] = images
    out["visual_tokens"] = visual
    out["patches"] = 4 * visual
    out["patch_pairs"] = np.where(images > 0, (4 * visual) ** 2 // np.maximum(images, 1), 0)
    out["label_tokens"] = np.where(
        spatial, rng.integers(2, 12, count), rng.integers(40, 300, count)
    )
    text = np.where(spatial, rng.integers(30, 80, count), rng.integers(80, 600, count))
    out["tokens"] = visual + text + out["label_tokens"]
    out["prefix_tokens"] = np.where(spatial, visual + 6, 0)
    out["group_key"] = np.where(spatial, run + 1, 0)
    out["media_key"] = np.where(images > 0, np.where(spatial, run + 1, 10**9 + np.arange(count)), 0)
    return out


def plan(steps: int, world: int) -> dict[str, Any]:
    """Packing of many steps."""
    from spatialvlm.data.plan import PackingArgs, plan_step
    from spatialvlm.data.sample import DRAW_DTYPE
    from spatialvlm.data.summary import PlanSummary
    from spatialvlm.typing import CostCoefficients

    # FLOPs of Qwen2.5-VL-3B with everything trained: 6 x 3.1e9 per token, 6 x 6.7e8 / 4 per patch, ...
    cost = CostCoefficients(1.86e10, 12 * 36 * 2048, 6 * 151936 * 2048, 4.0e9, 12 * 4 * 1280)
    rng = np.random.default_rng(0)
    batch = 128
    packing = PackingArgs(max_tokens=16_384)
    summary = PlanSummary(world)
    seconds = []
    for step in range(steps):
        sizes = reference_lengths(rng, batch)
        draws = np.zeros(batch, DRAW_DTYPE)
        draws["position"] = step * batch + np.arange(batch)
        start = time.process_time()
        planned = plan_step(draws, sizes, cost, world, packing, step=step)
        seconds.append(time.process_time() - start)
        summary.add(planned, draws, sizes, cost)
    out = summary.as_dict(packing.max_tokens)
    out["world"] = world
    out["seconds_per_step"] = float(np.median(seconds))
    out["seconds_p95_over_p50"] = float(np.quantile(seconds, 0.95) / np.median(seconds))
    return out


def toy_config(root: Path, sources: list[dict[str, Any]], **changes: Any) -> Any:
    """The sections of a recipe that the data path reads."""
    from types import SimpleNamespace

    from spatialvlm.config.data import (
        DataConfig,
        LoaderConfig,
        PackingConfig,
        SharedPrefixConfig,
        StepConfig,
    )

    families = {source["family"]: 1.0 for source in sources}
    data = {"sources": sources, "families": families, "index_dir": str(root / "index")}
    return SimpleNamespace(
        data=DataConfig(**data | changes.get("data", {})),
        step=StepConfig(**changes.get("step", {})),
        packing=PackingConfig(**changes.get("packing", {})),
        shared_prefix=SharedPrefixConfig(min_media_per_step=1),
        loader=LoaderConfig(num_workers=changes.get("num_workers", 0)),
        geometry=None,
        run=SimpleNamespace(dir=str(root)),
    )


def write_mix(root: Path, num_rows: int) -> list[dict[str, Any]]:
    """A 1:1 mix: eight short questions per photograph; text of 60 to 500 words, or a photograph each."""
    rng = np.random.default_rng(0)
    words = np.array(
        [
            "the",
            "a",
            "of",
            "room",
            "chair",
            "table",
            "left",
            "right",
            "behind",
            "near",
            "blue",
            "wooden",
            "how",
            "many",
            "is",
            "it",
        ]
    )
    (root / "photos").mkdir()
    data = jpegs([(480, 640)], 1)[0]
    (root / "photos" / "0.jpg").write_bytes(data)

    def talk(question: str, answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    def say(count: int) -> str:
        return " ".join(words[rng.integers(0, len(words), count)])

    half = num_rows // 2
    with (root / "spatial.jsonl").open("w") as out:
        for number in range(half):
            photo = f"photos/{number // 8}.jpg"
            if number and number % 8 == 0:
                (root / photo).hardlink_to(root / "photos" / "0.jpg")
            row = {"messages": talk(f"<image>\n{say(12)}?", say(3)), "images": [photo]}
            out.write(json.dumps(row) + "\n")
    with (root / "general.jsonl").open("w") as out:
        for number in range(num_rows - half):
            row = {"messages": talk(say(30), say(int(rng.integers(30, 470))))}
            if number % 2:
                question = f"<image>\n{say(15)}?"
                row = {
                    "messages": talk(question, say(40)),
                    "images": [f"photos/{number % (1 + half // 8)}.jpg"],
                }
            out.write(json.dumps(row) + "\n")
    return [
        {"name": name, "family": name, "files": [f"{name}.jsonl"], "root": str(root)}
        for name in ("spatial", "general")
    ]


def cpu_s() -> float:
    """CPU seconds of this process and of those it started."""
    forkserver._forkserver._stop()  # what its processes used is known when it has ended
    parts = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in parts)


def rows(num_rows: int, workers: int) -> dict[str, Any]:
    """From files to the plan of every step."""
    from spatialvlm.data.build import build_data
    from spatialvlm.data.sample import World
    from spatialvlm.models.build import build_layout
    from spatialvlm.testing import make_checkpoint
    from spatialvlm.typing import CostCoefficients

    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        folder = make_checkpoint("qwen3vl", root / "model")
        config = toy_config(root, write_mix(root, num_rows), data={"lengths": "exact"})
        cost = CostCoefficients(1.0, 0.0, 0.0, 0.0, 0.0)
        start, wall = cpu_s(), time.perf_counter()
        loader = build_data(
            config, folder, build_layout(folder), cost, World(0, 8), workers=workers
        )
        measured = cpu_s()
        tokens = [int(records["tokens"].sum()) for records in loader.lengths.records]
        for _ in loader.plans():
            pass
        end = cpu_s()
        return {
            "rows": num_rows,
            "workers": workers,
            "tokens": sum(tokens),
            "index_and_lengths_cpu_s": measured - start,
            "plan_cpu_s": end - measured,
            "cpu_s_per_million_rows": (end - start) * 1e6 / num_rows,
            "wall_s": time.perf_counter() - wall,
        }


def wait() -> dict[str, Any]:
    """Share of a step that the training process waits for one worker, with one pack per step and with several."""
    return {
        "one_pack": wait_share(max_tokens=16_384),
        "several_packs": wait_share(max_tokens=1_536),
    }


def wait_share(max_tokens: int) -> dict[str, Any]:
    """The same for packs of at most ``max_tokens``."""
    from spatialvlm.data.build import build_data
    from spatialvlm.data.sample import World
    from spatialvlm.models.build import build_layout, build_model
    from spatialvlm.testing import make_checkpoint
    from spatialvlm.typing import CostCoefficients

    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        folder = make_checkpoint("qwen3vl", root / "model")
        step = {"global_batch_size": 32}
        packing = {"max_tokens": max_tokens}
        config = toy_config(root, write_mix(root, 4000), step=step, packing=packing, num_workers=1)
        cost = CostCoefficients(1.0, 0.0, 0.0, 0.0, 0.0)
        loader = build_data(config, folder, build_layout(folder), cost, World())
        model = build_model(folder, attention="tree_sdpa")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        waited, total, packs = [], [], []
        start = time.perf_counter()
        steps = iter(loader)
        for batches in steps:
            for batch in batches.batches:
                (model(batch).loss_sum / batches.denominator_local).backward()
            optimizer.step()
            optimizer.zero_grad()
            end = time.perf_counter()
            waited.append(batches.wait_s)
            total.append(end - start)
            packs.append(len(batches.batches))
            start = end
            if len(total) == 15:
                steps.close()
        first, steady = 3, slice(3, None)  # the first steps start the worker
        return {
            "steps": len(total) - first,
            "samples_per_step": step["global_batch_size"],
            "packs_per_step": float(np.mean(packs[steady])),
            "step_s": float(np.median(total[steady])),
            "wait_share": sum(waited[steady]) / sum(total[steady]),
        }


def resume() -> dict[str, Any]:
    """Seconds from a ready loader to its first batch, at the start and far into the run."""
    from spatialvlm.data.build import build_data
    from spatialvlm.data.sample import World
    from spatialvlm.models.build import build_layout
    from spatialvlm.testing import make_checkpoint
    from spatialvlm.typing import CostCoefficients

    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        folder = make_checkpoint("qwen3vl", root / "model")
        talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
        (root / "rows.jsonl").write_text((json.dumps({"messages": talk}) + "\n") * 2000)
        source = {"name": "s", "family": "f", "files": ["rows.jsonl"], "root": name}
        config = toy_config(root, [source], data={"length": {"samples": 10**9}})
        cost = CostCoefficients(1.0, 0.0, 0.0, 0.0, 0.0)
        out = {}
        for step in (0, 100_000, 7_000_000):
            start = time.process_time()
            loader = build_data(config, folder, build_layout(folder), cost, World())
            if step:
                state = loader.state_dict() | {"position": step * 128, "step": step}
                loader = build_data(
                    config, folder, build_layout(folder), cost, World(), state=state
                )
                start += (time.process_time() - start) / 2
            next(iter(loader))
            out[f"first_batch_at_step_{step}_s"] = time.process_time() - start
    return out


if __name__ == "__main__":
    main()
