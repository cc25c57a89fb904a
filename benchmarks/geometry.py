"""Time and memory of the geometry branch at 1, 8 and 32 frames, with random weights.

    python benchmarks/geometry.py                       # mid-size aggregator, CPU, under two minutes
    python benchmarks/geometry.py --size full           # VGGT-1B and Qwen2.5-VL-7B sizes; without a GPU only memory
    python benchmarks/geometry.py --json benchmarks/results/geometry_cpu.json

Encoder: uint8 frames to one layer of features. Fusion: features to spatial tokens, forward and backward. Peak is the
largest sum of activations; on the CPU it is counted on fake tensors. TFLOP counts matrix products, two per
multiply-add.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import time
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from spatialvlm.models.geometry.base import GeometryFeatures
from spatialvlm.models.geometry.fusion import GeometryFusion
from spatialvlm.models.geometry.vggt import Aggregator, Vggt, VggtConfig
from spatialvlm.testing.memory import PeakMemory

SIZES = {
    # aggregator, height and width, width of the vision tower and of the language model
    "mid": (VggtConfig(16, 14, 256, 8, 4, 8, 4, 1024), (168, 224), (256, 512)),
    "full": (VggtConfig(), (364, 504), (1280, 3584)),
}
FRAMES = (1, 8, 32)
TAU = 2


class Merger(nn.Module):
    """Projector of the shape of Qwen2.5-VL's."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim)
        self.width = 4 * dim
        self.mlp = nn.Sequential(nn.Linear(4 * dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.norm(x).view(-1, self.width))


def tera_flop(config: VggtConfig, frames: int, height: int, width: int, pairs: int) -> float:
    """Matrix products of the encoder, exactly."""
    c, patches = config.embed_dim, (height // 14) * (width // 14)
    tokens = patches + 1 + config.num_register_tokens
    linear = 24 * c**2 * frames * tokens
    per_frame = 4 * c * frames * tokens**2
    stem = 2 * 3 * 14**2 * c * frames * patches
    vit = config.vit_depth * (linear + per_frame) + stem
    aggregator = pairs * (2 * linear + per_frame + 4 * c * (frames * tokens) ** 2)
    return (vit + aggregator) / 1e12


def build_encoder(config: VggtConfig, device: str, precision: str) -> Vggt:
    """Random weights of the usual scale."""
    with torch.device("meta"):
        aggregator = Aggregator(config, config.depth - 1)
    aggregator.to_empty(device=device)
    for module in aggregator.modules():
        for parameter in module.parameters(recurse=False):
            nn.init.normal_(parameter, std=0.02)
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
        if isinstance(module, nn.Linear) and precision == "bf16":
            module.bfloat16()
    return Vggt(aggregator, (config.depth - 2,))


def seconds(work, device: str, repeats: int) -> float:
    """Median after one warm-up: wall time on a GPU, CPU time of the process otherwise (cores may be shared)."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    times = []
    for _ in range(repeats + 1):
        _wait(device)
        start = clock()
        work()
        _wait(device)
        times.append(clock() - start)
    return sorted(times[1:])[repeats // 2]


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_gb(work, device: str, fake) -> float:
    """Peak of activations: from the allocator on a GPU, from fake tensors on a CPU."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 1e9
    return fake() / 1e9


def fake_encoder_peak(config: VggtConfig, shape: tuple[int, ...], precision: str) -> int:
    """Bytes of activations of the encoder; nothing is computed."""
    with FakeTensorMode(), torch.no_grad():
        encoder = Vggt(Aggregator(config, config.depth - 1), (config.depth - 2,))
        for module in encoder.modules():
            if isinstance(module, nn.Linear) and precision == "bf16":
                module.weight = nn.Parameter(module.weight.bfloat16(), requires_grad=False)
                module.bias = nn.Parameter(module.bias.bfloat16(), requires_grad=False)
        video = torch.empty(shape, dtype=torch.uint8)
        with PeakMemory([video, *encoder.parameters()]) as memory:
            encoder([video])
    return memory.peak


def plan(size: str, precision: str) -> list[dict[str, float]]:
    """Work and memory of the encoder without running it."""
    config, (height, width), _ = SIZES[size]
    pairs = config.depth - 1
    rows = []
    for frames in FRAMES:
        peak = fake_encoder_peak(config, (frames, 3, height, width), precision)
        work = tera_flop(config, frames, height, width, pairs)
        rows.append({"frames": frames, "tflop": round(work, 3), "peak_gb": round(peak / 1e9, 3)})
        print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    return rows


def measure(size: str, device: str, precision: str, repeats: int) -> list[dict[str, float]]:
    """One row per number of frames."""
    config, (height, width), (vision_dim, text_dim) = SIZES[size]
    pairs = config.depth - 1
    torch.manual_seed(0)
    encoder = build_encoder(config, device, precision)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    projector = Merger(vision_dim, text_dim).to(device, dtype)
    fusion = GeometryFusion(
        projector,
        flatten_units=False,
        vision_dim=vision_dim,
        text_dim=text_dim,
        feature_dim=encoder.feature_dim,
        tau=TAU,
    )
    rows = []
    for frames in FRAMES:
        video = torch.randint(0, 256, (frames, 3, height, width), dtype=torch.uint8, device=device)
        grid = (-(-frames // TAU), height // 14, width // 14)
        vision = torch.randn(grid[0] * grid[1] * grid[2], vision_dim, device=device, dtype=dtype)
        vision.requires_grad_()
        tokens = projector(vision).detach()
        features: list[GeometryFeatures] = []

        def encode(video=video, features=features) -> None:
            features[:] = encoder([video])

        def fuse(vision=vision, tokens=tokens, grid=grid, features=features) -> None:
            out = fusion(vision, tokens, features, [grid], [0], projector)
            out.spatial_tokens.float().square().mean().backward()

        def fake(shape=tuple(video.shape)) -> int:
            return fake_encoder_peak(config, shape, precision)

        encode_s = seconds(encode, device, repeats)
        fuse_s = seconds(fuse, device, repeats)
        work = tera_flop(config, frames, height, width, pairs)
        rows.append(
            {
                "frames": frames,
                "encoder_s": round(encode_s, 4),
                "fusion_s": round(fuse_s, 4),
                "tflop": round(work, 3),
                "tflop_per_s": round(work / encode_s, 3),
                "peak_gb": round(peak_gb(encode, device, fake), 3),
                "features_mb": round(features[0].layers[pairs - 1].nbytes / 1e6, 2),
            }
        )
        print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    return rows


def hardware(device: str) -> str:
    """Name of the device that was measured."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    names = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="mid")
    parser.add_argument(
        "--precision", choices=("bf16", "fp32"), help="default: bf16 on a GPU, fp32 on a CPU"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = args.precision or ("bf16" if device == "cuda" else "fp32")
    config, size, dims = SIZES[args.size]
    print(f"{args.size} aggregator {config}, frames of {size}, {device}, {precision}")
    computes = device == "cuda" or args.size != "full"
    rows = (
        measure(args.size, device, precision, args.repeats)
        if computes
        else plan(args.size, precision)
    )
    if args.json:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip()
        result = {
            "what": "geometry branch, random weights, exit after the layer before the last",
            "size": args.size,
            "frame": list(size),
            "dims": {
                "embed": config.embed_dim,
                "depth": config.depth,
                "vision": dims[0],
                "text": dims[1],
            },
            "precision": precision,
            "clock": "wall" if device == "cuda" else "CPU seconds",
            "hardware": hardware(device) if computes else "none: counted on fake tensors",
            "torch": torch.__version__,
            "commit": commit,
            "rows": rows,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
