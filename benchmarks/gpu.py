"""One training step at real size with random weights: what each feature costs or brings, on one GPU.

    python benchmarks/gpu.py --json benchmarks/results/gpu.json                  # all rows, Qwen2.5-VL-3B, bf16
    python benchmarks/gpu.py --backbone qwen2_5vl_7b --lora 64 --rows base geometry
    python benchmarks/gpu.py --device cpu --backbone tiny_qwen3vl --scale tiny --steps 2 --warmup 1   # does it run?

Mixes: ``video`` = 32 frames with 8 questions, ``image`` = 16 single images with one question each. Every row changes one
thing of ``base`` (tree_flash, shared prefix, packing, head on supervised rows, no recomputation of the vision encoder).
AdamW keeps bf16 states here; engines with fp32 masters need more memory. Peak includes parameters and optimizer.
Also printed: the isolation probe, and the largest difference of tree_flash and tree_flex to a dense mask.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from spatialvlm.config.geometry import GeometryConfig
from spatialvlm.models.attention import TREE_ATTENTION, Tree, tree_mask
from spatialvlm.models.backbones import adapter_of
from spatialvlm.models.branch import GeometryBranch, build_fusion, meta_encoder
from spatialvlm.models.cost import cost_coefficients
from spatialvlm.models.device import to_device
from spatialvlm.models.isolation import probe_isolation
from spatialvlm.models.kernels import use_liger
from spatialvlm.models.lora import adapter_tensors, add_adapters
from spatialvlm.models.spatial_vlm import SpatialVLM
from spatialvlm.sequence.layout import TokenLayout
from spatialvlm.testing import make_vggt
from spatialvlm.testing.packs import Clip, Member, random_pack
from spatialvlm.training.memory import checkpoint_blocks, compile_blocks
from spatialvlm.training.metrics import measure_gemm, peak_flops

BACKBONES = Path(__file__).resolve().parents[1] / "configs" / "backbones"


@dataclass(frozen=True)
class Setup:
    """One row."""

    attention: str = "tree_flash"
    shared: bool = True
    packed: bool = True
    all_rows: bool = False
    compile: bool = False
    liger: bool = False
    geometry: str | None = None
    checkpoint_text: bool = True
    checkpoint_vision: bool = False
    note: str = field(default="", compare=False)


BASE = Setup()
ROWS = {
    "base": BASE,
    "no packing": replace(BASE, packed=False, shared=False),
    "no shared prefix": replace(BASE, shared=False),
    "head on all rows": replace(BASE, all_rows=True),
    "compile": replace(BASE, compile=True),
    "liger": replace(BASE, liger=True),
    "geometry": replace(BASE, geometry="interleaved"),
    "geometry in place": replace(BASE, geometry="in_place"),
    "recompute all": replace(BASE, checkpoint_vision=True),
    "recompute nothing": replace(BASE, checkpoint_text=False),
    "tree_flex": replace(BASE, attention="tree_flex"),
    "tree_sdpa": replace(BASE, attention="tree_sdpa"),
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default="qwen2_5vl_3b")
    parser.add_argument("--mix", nargs="*", choices=("video", "image"), default=["video", "image"])
    parser.add_argument("--rows", nargs="*", choices=tuple(ROWS), default=list(ROWS))
    parser.add_argument(
        "--lora", type=int, help="rank of adapters on the language model; everything else is frozen"
    )
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument(
        "--scale", choices=("full", "tiny"), default="full", help="frame sizes and counts"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "benchmarks/gpu.py: skipped, no CUDA device (use --device cpu --scale tiny to try the script)"
        )
    gemm = measure_gemm(device)
    found: list[dict[str, Any]] = []
    if device.type == "cuda":
        for name, error in kernel_errors(device).items():
            print(f"{name}: largest difference to a dense mask {error:.1e} (bf16)")
    print(
        f"{'mix':6} {'row':18} {'step s':>8} {'tokens/s':>9} {'questions/s':>11} {'MFU':>6} {'of GEMM':>7} {'peak GiB':>8}"
    )
    for mix in args.mix:
        for name in args.rows:
            setup = ROWS[name]
            if device.type == "cpu" and setup.attention != "tree_sdpa":
                setup = replace(setup, attention="tree_sdpa")
            try:
                row = measure(setup, mix, args, device, gemm)
            except torch.OutOfMemoryError:
                row = {"error": "out of memory"}
            except Exception as error:  # noqa: BLE001  (a row that cannot run is a result, not the end)
                row = {"error": f"{type(error).__name__}: {error}"[:200]}
            row |= {"mix": mix, "row": name, "backbone": args.backbone}
            found.append(row)
            if "error" in row:
                print(f"{mix:6} {name:18} {row['error']}")
            else:
                print(f"{mix:6} {name:18} {row['step_s']:8.3f} {row['tokens_s']:9.0f} {row['questions_s']:11.2f} "
                      f"{100 * (row['mfu'] or 0):5.1f}% {100 * row['mfu_gemm']:6.1f}% {row['peak_gib']:8.2f}", flush=True)  # fmt: skip
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(
            json.dumps(environment(device, args, gemm) | {"rows": found}, indent=1),
            encoding="utf-8",
        )


def build(
    setup: Setup, args: argparse.Namespace, device: torch.device
) -> tuple[SpatialVLM, TokenLayout]:
    """A model of real size with random weights, on the device."""
    from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

    values = json.loads((BACKBONES / f"{args.backbone}.json").read_text())
    family = adapter_of(values["model_type"])
    config = CONFIG_MAPPING[values["model_type"]].from_dict(values)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        backbone = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    adapter = family(backbone, family.pixel_spec(config, {}))
    adapter.configure(attention=setup.attention)
    fusion = branch = None
    inserts = setup.geometry not in (None, "in_place")
    vocabulary = int(values["text_config"]["vocab_size"])
    if setup.geometry is not None:
        sizes: dict[str, Any] = {}
        if args.scale == "tiny":
            file = make_vggt(Path(tempfile.mkdtemp()) / "tiny.safetensors")
            sizes = {"source": str(file), "layers": (1,)}
        section = GeometryConfig(insertion=setup.geometry, **sizes).model_dump(mode="json")  # type: ignore[arg-type]
        encoder = meta_encoder(section).to_empty(device=device)
        with torch.no_grad():
            for parameter in encoder.parameters():
                parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.02)
        fusion = build_fusion(adapter, section, feature_dim=encoder.feature_dim)
        branch = GeometryBranch(encoder, section, vocabulary if inserts else None, lru_items=0)
    model = SpatialVLM(adapter, fusion=fusion, geometry=branch)
    if args.lora:
        model.requires_grad_(False)
        add_adapters(model, ["language_model"], rank=args.lora, alpha=2.0 * args.lora, dtype=dtype)
        for parameter in adapter_tensors(model).values():
            parameter.requires_grad_(True)
        model.to(device)
    if setup.liger:
        use_liger(adapter.language_model)
    if setup.checkpoint_text:
        checkpoint_blocks(adapter.text_layers, preserve_rng=False)
    if setup.checkpoint_vision:
        checkpoint_blocks(adapter.vision_blocks, preserve_rng=False)
    if setup.compile:
        compile_blocks([*adapter.text_layers, *adapter.vision_blocks])
    image = values["image_token_id"]
    layout = TokenLayout(
        family=family.family,  # type: ignore[arg-type]
        image_id=image,
        video_id=values.get("video_token_id", image),
        vision_start_id=values.get("vision_start_token_id", image - 2),
        vision_end_id=values.get("vision_end_token_id", image - 1),
        spatial_id=vocabulary if inserts else None,
        insertion=setup.geometry or "none",  # type: ignore[arg-type]
    )
    return model, layout


def members(mix: str, args: argparse.Namespace, unit: int, shared: bool) -> list[Member]:
    """Samples of one step; without sharing every question brings its own copy of the media."""
    frames, rows, columns, images = (32, 13, 18, 16) if args.scale == "full" else (3, 2, 3, 2)
    if mix == "video":
        group = Member(
            (Clip("video", frames, rows * unit, columns * unit, group=0),),
            text=20,
            branches=(60,) * 8,
        )
        return [group] if shared else [replace(group, keep=index) for index in range(8)]
    clip = Clip("image", 1, rows * unit, columns * unit)
    return [Member((clip,), text=20, branches=(60,), seed=index) for index in range(images)]


def measure(
    setup: Setup, mix: str, args: argparse.Namespace, device: torch.device, gemm: float
) -> dict[str, Any]:
    """Median step of one row."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    model, layout = build(setup, args, device)
    probe = probe_isolation(model)
    model.train()
    pixels = model.adapter.pixels
    samples = members(mix, args, pixels.patch * pixels.merge, setup.shared)
    rows, columns = (26, 36) if args.scale == "full" else (4, 6)
    plans = [samples] if setup.packed else [[member] for member in samples]
    geometry_hw = (14 * rows, 14 * columns) if setup.geometry else None
    packs = [
        to_device(random_pack(plan, layout, pixels, geometry_hw=geometry_hw), device)
        for plan in plans
    ]
    if setup.all_rows:
        packs = [with_all_rows(pack) for pack in packs]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=cuda)

    def step() -> float:
        total = 0.0
        for pack in packs:
            output = model(pack)
            output.loss_sum.backward()
            total += output.loss_sum.detach()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(total)  # waits for the device

    for _ in range(args.warmup):
        step()
    times = []
    for _ in range(args.steps):
        start = time.perf_counter()
        loss = step()
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times)
    tokens = sum(pack["input_ids"].numel() for pack in packs)
    questions = sum(len(pack["uids"]) for pack in packs)
    flops = sum(pack_flops(model, pack) for pack in packs)
    peak = peak_flops(device)
    return {
        "step_s": seconds,
        "quartiles_s": statistics.quantiles(times, n=4) if len(times) > 1 else times,
        "tokens_s": tokens / seconds,
        "questions_s": questions / seconds,
        "tokens": tokens,
        "tflop": flops / 1e12,
        "mfu": flops / seconds / peak if peak else None,
        "mfu_gemm": flops / seconds / gemm,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0,
        "loss": loss,
        "probe": probe,
    }


def with_all_rows(pack: Any) -> Any:
    """Logits of every position, as a head without row selection computes them."""
    count = pack["input_ids"].numel() - 1
    index = torch.arange(count, device=pack["input_ids"].device)
    weight = torch.zeros(count, device=index.device)
    weight[pack["logit_index"]] = pack["loss_weight"]
    sample = torch.zeros(count, dtype=torch.int64, device=index.device)
    return pack | {
        "logit_index": index, "target_ids": pack["input_ids"][0, 1:], "loss_weight": weight, "sample_index": sample,
    }  # fmt: skip


def pack_flops(model: SpatialVLM, pack: Any) -> float:
    """Model FLOPs of one pack, forward and backward, without recomputation."""
    cost = cost_coefficients(model)
    tree = Tree.from_tensors(pack["segment_start"], pack["segment_len"], pack["segment_parent"])
    prefix = [0 if up < 0 else tree.length[up] for up in tree.parent]
    pairs = sum(n * p + n * (n + 1) / 2 for n, p in zip(tree.length, prefix, strict=True))
    total = cost.per_token * tree.total + cost.per_pair * pairs
    total += cost.per_head_row * float((pack["loss_weight"] > 0).sum())
    for units, rows, columns in pack["media_grid_thw"].tolist():
        total += (
            cost.per_patch * units * rows * columns
            + cost.per_patch_pair * units * (rows * columns) ** 2
        )
    for frames, height, width in (
        pack["geometry_shapes"].tolist() if "geometry_shapes" in pack else []
    ):
        size = height // 14 * (width // 14) + 5
        total += (
            cost.geometry_per_token * frames * size
            + cost.geometry_per_frame_pair * frames * size**2
        )
        total += cost.geometry_per_global_pair * (frames * size) ** 2
    return total


def kernel_errors(device: torch.device) -> dict[str, float]:
    """Largest relative difference of output and gradients between our kernels and a dense mask."""
    tree = Tree([0, 900, 960, 1024, 1500], [900, 60, 64, 476, 33], [-1, 0, 0, -1, 3])
    layer = torch.nn.Module()
    layer.num_key_value_groups, layer.layer_idx = 7, 0
    torch.manual_seed(0)
    shapes = [(1, 28, tree.total, 128), (1, 4, tree.total, 128), (1, 4, tree.total, 128)]
    qkv = [torch.randn(s, device=device, dtype=torch.bfloat16, requires_grad=True) for s in shapes]

    def run(function: Any) -> list[torch.Tensor]:
        output, _ = function(layer, *qkv, None, tree=tree)
        weight = torch.arange(output.numel(), device=device).view_as(output) % 7 - 3.0
        return [output, *torch.autograd.grad((output.float() * weight).sum(), qkv)]

    expected = run(tree_mask)
    errors = {}
    for name in ("tree_sdpa", "tree_flash", "tree_flex"):
        pairs = zip(run(TREE_ATTENTION[name]), expected, strict=True)
        errors[name] = max(
            float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs
        )
    return errors


def environment(device: torch.device, args: argparse.Namespace, gemm: float) -> dict[str, Any]:
    """What a reader needs to repeat the run."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "command": "python benchmarks/gpu.py "
        + " ".join(f"--{k} {v}" for k, v in vars(args).items() if v is not None),
        "commit": commit.stdout.strip(),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor(),
        "torch": torch.__version__,
        "gemm_tflops": gemm / 1e12,
    }


if __name__ == "__main__":
    main()
