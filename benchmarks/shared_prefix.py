"""Shared-prefix training against separate samples: time, parts, gradients.

    python benchmarks/shared_prefix.py --json benchmarks/results/shared_prefix.json
    python benchmarks/shared_prefix.py --k 8 --prefix 1000 --family qwen3vl internvl3
    python benchmarks/shared_prefix.py --mix --json benchmarks/results/shared_prefix_mix.json
    python benchmarks/shared_prefix.py --device cuda --attention tree_flex --dtype bfloat16 --prefix 250 1000 4000

K questions of about --branch tokens ask about the same video of P visual tokens. Measured is forward plus backward of all
parameters, vision encoder included: once as one pack with a shared prefix, once as K packs; K separate samples are K times the
median of all separate samples, which are equally long. "limit" is the ratio of predicted FLOPs, "of limit" how much of it
arrived. The default takes three minutes on an idle core. ``--mix`` trains on files instead: clips with 8 questions each, 1:1 with general rows (half text-only of 60-500 words, half with
one image), from reading to gradients, once with shared prefixes and once with ``compute: separate`` on the same samples;
"r2_of_predicted_cost" says how well the predicted FLOPs of all these packs, by which ranks are levelled, tell their seconds.
CPU seconds (``process_time``) on a CPU, wall seconds on a GPU;
A and B alternate. Gradients of both are compared.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spatialvlm.data.collate import MediaPixels, Prepared, collate
from spatialvlm.data.encode import encode
from spatialvlm.data.media.plan import MediaHeader, MediaPolicy, plan_media
from spatialvlm.data.sample import MediaRef, Sample, Turn
from spatialvlm.data.template import ChatTemplate, load_processor
from spatialvlm.models.build import build_layout, build_model, cost_coefficients
from spatialvlm.testing import make_checkpoint
from spatialvlm.typing import KIND_VIDEO, Batch, ModalityFlags


@dataclass
class Kit:
    """Model and the means to make batches for it."""

    model: Any
    template: ChatTemplate
    policy: MediaPolicy
    layout: Any
    device: torch.device


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    families = ["qwen2_5vl", "qwen3vl", "internvl3"]
    parser.add_argument("--family", nargs="+", choices=families, default=families[:1])
    parser.add_argument("--k", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--prefix", type=int, nargs="+", default=[250, 1000, 4000])
    parser.add_argument(
        "--branch", type=int, default=50, help="tokens per question with its answer"
    )
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--attention", default="tree_sdpa")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--mix", action="store_true", help="a whole 1:1 mix from files on disk instead"
    )
    args = parser.parse_args()
    torch.set_num_threads(1 if args.device == "cpu" else torch.get_num_threads())
    if args.mix:
        result = mix(make_kit(args.family[0], args))
        print(json.dumps(result, indent=2))
        if args.json:
            args.json.write_text(json.dumps(result, indent=2) + "\n")
        return
    results = []
    print(f"{'family':10} {'K':>3} {'P':>5} {'separate s':>11} {'shared s':>9} {'speed-up':>8} {'limit':>6} {'of limit':>8} "
          f"{'vision':>7} {'language':>8} {'gradient':>9}")  # fmt: skip
    for family in args.family:
        kit = make_kit(family, args)
        for prefix in args.prefix:
            for row in compare(kit, sorted(args.k), prefix, args.branch, args.repeats):
                results.append({"family": family, **row})
                print(f"{family:10} {row['k']:3} {row['prefix_tokens']:5} {row['separate_s']:11.3f} {row['shared_s']:9.3f} "
                      f"{row['speedup']:7.2f}x {row['limit']:5.2f}x {100 * row['of_limit']:7.1f}% "
                      f"{row['vision_speedup']:6.2f}x {row['language_speedup']:7.2f}x {row['gradient_difference']:9.1e}",
                      flush=True)  # fmt: skip
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        machine = {
            "machine": platform.processor() or platform.machine(),
            "torch": torch.__version__,
        }
        if args.device != "cpu":
            machine["device"] = torch.cuda.get_device_name()
        options = {
            key: str(value) if isinstance(value, Path) else value
            for key, value in vars(args).items()
        }
        args.json.write_text(
            json.dumps({"options": options, **machine, "rows": results}, indent=2) + "\n"
        )


def make_kit(family: str, args: argparse.Namespace) -> Kit:
    """A random model of the demo size: real classes, few layers."""
    folder = Path(tempfile.mkdtemp()) / family
    make_checkpoint(family, folder, size="demo")
    device = torch.device(args.device)
    model = build_model(
        folder, attention=args.attention, dtype=getattr(torch, args.dtype), device=device
    )
    model.train()
    policy = MediaPolicy.from_processor(load_processor(folder))
    side = 8 * policy.factor
    if policy.rule != "square":
        policy = policy.with_budget(
            min_pixels=side * side, max_pixels=side * side, video_total_pixels=1 << 40
        )
    return Kit(model, ChatTemplate.from_checkpoint(folder), policy, build_layout(folder), device)


def compare(
    kit: Kit, ks: list[int], prefix: int, branch: int, repeats: int
) -> list[dict[str, Any]]:
    """Time and gradients of both ways; shared packs are timed between the separate samples."""
    samples = make_samples(kit, max(ks), prefix, branch)
    separate = [pack(kit, [sample], [(0,)]) for sample in samples]
    shared = {k: pack(kit, samples[:k], [tuple(range(k))]) for k in ks}
    differences: dict[int, float] = {}
    alone: list[Seconds] = []
    together: dict[int, list[Seconds]] = {k: [] for k in ks}
    step(kit, separate[0])  # warms up
    for repeat in range(repeats):
        expected = torch.zeros(())
        kit.model.zero_grad(set_to_none=True)
        for number, batch in enumerate(separate, 1):
            alone.append(step(kit, batch))
            if number not in together:
                continue
            if not repeat:
                expected = expected + gradient(kit)
            kit.model.zero_grad(set_to_none=True)
            together[number].append(step(kit, shared[number]))
            if not repeat:
                differences[number] = float((gradient(kit) - expected).norm() / expected.norm())
            kit.model.zero_grad(set_to_none=True)
    encoded = samples[0].encoded
    branch_tokens = len(encoded.input_ids) - encoded.prefix_len
    rows = []
    for k in ks:
        a, b = middle(alone).times(k), middle(together[k])
        limit = flops(kit, separate[:k]) / flops(kit, [shared[k]])
        rows.append({
            "k": k,
            "prefix_tokens": encoded.prefix_len,
            "branch_tokens": branch_tokens,
            "separate_s": a.total,
            "shared_s": b.total,
            "speedup": a.total / b.total,
            "limit": limit,
            "of_limit": a.total / b.total / limit,
            "token_limit": k * len(encoded.input_ids) / int(shared[k]["input_ids"].numel()),
            "vision_separate_s": a.vision,
            "vision_shared_s": b.vision,
            "vision_speedup": a.vision / b.vision,
            "language_separate_s": a.language,
            "language_shared_s": b.language,
            "language_speedup": a.language / b.language,
            "gradient_difference": differences[k],
        })  # fmt: skip
    return rows


def make_samples(kit: Kit, k: int, prefix: int, branch: int) -> list[Prepared]:
    """K questions about one random video of about ``prefix`` tokens."""
    rng = np.random.default_rng(0)
    square = kit.policy.rule == "square"
    side = kit.policy.tile if square else 8 * kit.policy.factor
    units = max(round(prefix / (side // kit.policy.factor) ** 2), 1)
    frames = units * kit.policy.temporal
    times = tuple(float(i) for i in range(frames))
    ref = MediaRef("video", "file", "v", frames=tuple(range(frames)))
    info = plan_media(ref, MediaHeader((side, side), frames, 1.0, times, times), kit.policy)
    pixels = rng.integers(0, 255, (frames, *info.size, 3), dtype=np.uint8)
    medium = MediaPixels(KIND_VIDEO, info.grid, pixels, -1, None, "")
    out = []
    for question in range(k):
        words = "where is the red box and what is left of it "
        turns = (
            Turn("user", (0, f"{question} {words * 9}"[: 3 * branch])),
            Turn("assistant", ("behind the chair, near it",)),
        )
        sample = Sample(f"q{question}", "s", "f", turns, (ref,))
        out.append(
            Prepared(sample.uid, encode(sample, [info], kit.template, kit.layout), (medium,))
        )
    return out


def pack(kit: Kit, samples: list[Prepared], groups: list[tuple[int, ...]]) -> Batch:
    """One batch on the device."""
    flags = ModalityFlags(False, True, False, True)
    batch = collate(samples, groups, flags=flags, position_rows=kit.layout.num_position_rows)
    moved = {
        key: v.to(kit.device) if isinstance(v, torch.Tensor) else v for key, v in batch.items()
    }
    return Batch(**moved)  # type: ignore[typeddict-item]


def clock(device: torch.device) -> float:
    """CPU seconds of this process, or wall seconds once the GPU is idle."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


@dataclass(frozen=True)
class Seconds:
    """Forward and backward of one pack: all of it, and the vision encoder with its projector."""

    total: float
    vision: float

    @property
    def language(self) -> float:
        """The rest."""
        return self.total - self.vision

    def times(self, count: int) -> "Seconds":
        """As many packs of this size."""
        return Seconds(count * self.total, count * self.vision)


def middle(found: list[Seconds]) -> Seconds:
    """Medians."""
    return Seconds(
        statistics.median(s.total for s in found), statistics.median(s.vision for s in found)
    )


def step(kit: Kit, batch: Batch) -> Seconds:
    """Forward and backward; gradients add up. The vision part ends and begins again where its tokens leave and return."""
    see = kit.model._see
    marks = {}

    def timed(batch: Batch) -> Any:
        begin = clock(kit.device)
        seen = see(batch)
        marks["forward"] = clock(kit.device) - begin
        seen.tokens.register_hook(lambda _: marks.update(back=clock(kit.device)))
        return seen

    kit.model._see = timed
    try:
        start = clock(kit.device)
        kit.model(batch).loss_sum.backward()
        end = clock(kit.device)
    finally:
        del kit.model._see
    return Seconds(end - start, marks["forward"] + end - marks["back"])


def gradient(kit: Kit) -> torch.Tensor:
    """All gradients as one vector."""
    parts = [p.grad.double().flatten().cpu() for p in kit.model.parameters() if p.grad is not None]
    return torch.cat(parts)


def flops(kit: Kit, batches: list[Batch]) -> float:
    """Predicted training FLOPs."""
    from spatialvlm.training.metrics import pack_size

    cost = cost_coefficients(kit.model)
    return sum(pack_size(batch).flops(cost) for batch in batches)


def train(kit: Kit, batches: list[Batch]) -> list[float]:
    """Gradients of one step; seconds of every pack."""
    kit.model.zero_grad(set_to_none=True)
    seconds = []
    for batch in batches:
        start = clock(kit.device)
        kit.model(batch).loss_sum.backward()
        seconds.append(clock(kit.device) - start)
    return seconds


def write_mix(root: Path) -> None:
    """``spatial.jsonl``: 16 clips with 8 questions each; ``general.jsonl``: captions and text in turn."""
    from PIL import Image

    rng = np.random.default_rng(0)

    def picture(path: Path) -> None:
        small = rng.integers(0, 255, (15, 20, 3), dtype=np.uint8)
        Image.fromarray(small).resize((320, 240), Image.Resampling.BICUBIC).save(path, quality=85)

    def row(question: str, answer: str, **media: Any) -> str:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return json.dumps({"messages": turns, **media}) + "\n"

    spatial, general = [], []
    for clip in range(16):
        folder = root / f"clip{clip}"
        folder.mkdir()
        for frame in range(16):
            picture(folder / f"{frame:02d}.jpg")
        for question in range(8):
            text = f"<video>Where is object {question} when you stand beside the door of room {clip}, left or right?"
            spatial.append(row(text, "left of it", videos=[folder.name]))
    for number in range(128):
        words = "the chair stands near a table in the room and " * 60
        if number % 2:
            picture(root / f"g{number}.jpg")
            general.append(
                row(
                    "<image>Describe the picture.",
                    words[: int(rng.integers(80, 300))],
                    images=[f"g{number}.jpg"],
                )
            )
        else:
            general.append(
                row(words[: int(rng.integers(150, 1200))], words[: int(rng.integers(150, 1200))])
            )
    (root / "spatial.jsonl").write_text("".join(spatial))
    (root / "general.jsonl").write_text("".join(general))


def mix(kit: Kit) -> dict[str, Any]:
    """Samples per CPU second of the whole path, data included."""
    from types import SimpleNamespace

    from spatialvlm.config.data import (
        DataConfig,
        LoaderConfig,
        PackingConfig,
        SharedPrefixConfig,
        StepConfig,
    )
    from spatialvlm.data.build import build_data
    from spatialvlm.data.sample import World

    root = Path(tempfile.mkdtemp())
    write_mix(root)
    out: dict[str, Any] = {}
    measured: list[float] = []
    predicted: list[float] = []
    for families in ({"spatial": 1.0, "general": 1.0}, {"spatial": 1.0}):
        seconds, samples, tokens = {}, 0, {}
        for compute in ("separate", "shared"):
            config = SimpleNamespace(
                data=DataConfig(
                    sources=[
                        {
                            "name": name,
                            "family": name,
                            "files": [f"{name}.jsonl"],
                            "root": str(root),
                        }
                        for name in families
                    ],
                    families=families,
                    index_dir=str(root / "index"),
                    media={"num_frames": 16, "max_pixels": 12 * kit.policy.factor**2},
                ),
                step=StepConfig(global_batch_size=32),
                packing=PackingConfig(max_tokens=2048),
                shared_prefix=SharedPrefixConfig(compute=compute),
                loader=LoaderConfig(num_workers=0),
                geometry=None,
                run=SimpleNamespace(dir=str(root)),
            )
            folder = kit.model.source
            loader = build_data(config, folder, kit.layout, cost_coefficients(kit.model), World())
            steps = iter(loader)
            train(kit, next(steps).batches)  # warm-up
            start, samples, tokens[compute] = time.process_time(), 0, 0
            for found in steps:
                measured += train(kit, found.batches)
                predicted += [flops(kit, [batch]) for batch in found.batches]
                samples += sum(len(batch["uids"]) for batch in found.batches)
                tokens[compute] += sum(int(batch["input_ids"].numel()) for batch in found.batches)
            seconds[compute] = time.process_time() - start
        out["+".join(families)] = {
            "samples": samples,
            "tokens": tokens,
            "samples_per_s": {key: samples / value for key, value in seconds.items()},
            "speedup": seconds["separate"] / seconds["shared"],
        }
    out["packs"] = len(measured)
    out["r2_of_predicted_cost"] = float(np.corrcoef(predicted, measured)[0, 1] ** 2)
    return out


if __name__ == "__main__":
    main()
