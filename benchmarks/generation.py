"""Generation with and without a shared visual prefix: several questions about one clip.

    python benchmarks/generation.py                         # small random Qwen3-VL on a CPU
    python benchmarks/generation.py --checkpoint DIR --device cuda --dtype bf16 --frames 32 --size 448

Both arms give the same text; only the work differs. Writes one JSON object to ``--out``.
"""

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from spatialvlm.data.media.plan import MediaPolicy
from spatialvlm.data.template import ChatTemplate, load_processor
from spatialvlm.evaluation.generate import GenConfig
from spatialvlm.evaluation.model_generator import PackGenerator
from spatialvlm.models.build import build_layout, build_model
from spatialvlm.models.generation import generate
from spatialvlm.testing import make_checkpoint


def clip(folder: Path, frames: int, size: int) -> list[str]:
    """Frames of smooth noise as files."""
    from PIL import Image

    rng = np.random.default_rng(0)
    names = []
    for number in range(frames):
        small = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        names.append(f"{number:03d}.png")
        Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC).save(
            folder / names[-1]
        )
    return names


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", help="model directory; default: a small random Qwen3-VL")
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--size", type=int, default=128, help="side of a frame in pixels")
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = args.checkpoint or make_checkpoint("qwen3vl", folder / "model", size="demo")
        names = clip(folder, args.frames, args.size)
        layout = build_layout(checkpoint)
        dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
        model = build_model(checkpoint, dtype=dtype, device=args.device).eval()
        generator = PackGenerator(
            lambda packs, count: generate(model, packs, count, stop_ids=[2**31 - 1]),
            ChatTemplate.from_checkpoint(checkpoint),
            layout,
            MediaPolicy.from_processor(load_processor(checkpoint)).with_budget(temporal=layout.tau),
            root=folder,
            frames=args.frames,
        )
        video = {"type": "video", "video": str(folder), "frames": names}
        questions = [
            [
                {
                    "role": "user",
                    "content": [video, {"type": "text", "text": f"\nWhich object is number {n}?"}],
                }
            ]
            for n in range(args.questions)
        ]
        packs = {
            "shared": [generator.prepare(questions)],
            "separate": [generator.prepare([question]) for question in questions],
        }
        config = GenConfig(args.new_tokens)
        texts, seconds = {}, {}
        for arm, prepared in packs.items():
            best = float("inf")
            for _ in range(args.repeats + 1):  # the first run warms up
                start = time.perf_counter()
                found = generator.generate(prepared, config)
                if args.device.startswith("cuda"):
                    torch.cuda.synchronize()
                best = min(best, time.perf_counter() - start)
            seconds[arm] = best
            texts[arm] = [completion.text for group in found for completion in group]
    tokens = {
        arm: sum(pack["input_ids"].shape[1] for pack in prepared) for arm, prepared in packs.items()
    }
    result = {
        "checkpoint": args.checkpoint or "random Qwen3-VL, demo size",
        "device": torch.cuda.get_device_name()
        if args.device.startswith("cuda")
        else platform.machine(),
        "threads": torch.get_num_threads(),
        "dtype": args.dtype,
        "frames": args.frames,
        "size_px": args.size,
        "questions": args.questions,
        "new_tokens": args.new_tokens,
        "prompt_tokens": tokens,
        "seconds": {arm: round(value, 4) for arm, value in seconds.items()},
        "questions_per_s": {
            arm: round(args.questions / value, 2) for arm, value in seconds.items()
        },
        "speed_up": round(seconds["separate"] / seconds["shared"], 2),
        "same_text": texts["shared"] == texts["separate"],
    }
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
