"""Write small model directories, random or pretrained, complete enough for every recipe.

    python tools/make_tiny.py data/demo/models                     # three backbones and a geometry encoder, demo size
    python tools/make_tiny.py /tmp/models --size tiny --family qwen3vl
    python tools/make_tiny.py data/demo/models --pretrained        # the shipped Qwen3-VL, which sees rendered rooms

Writes ``tiny_<family>/`` (a Hugging Face directory) and ``tiny_vggt.safetensors``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from spatialvlm.errors import run_command
from spatialvlm.testing import make_checkpoint, make_vggt

FAMILIES = ("qwen2_5vl", "qwen3vl", "internvl3")


def main() -> None:
    """Parse the command line and write the directories."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder that receives the models")
    parser.add_argument("--family", choices=FAMILIES, nargs="*", default=list(FAMILIES))
    parser.add_argument("--size", choices=("tiny", "demo"), default="demo")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--pretrained",
        action="store_true",
        help="the shipped weights for qwen3vl (demo size) in place of random ones",
    )
    args = parser.parse_args()
    if args.pretrained and "qwen3vl" not in args.family:
        parser.error("--pretrained has weights for qwen3vl only; add it to --family")
    for family in args.family:
        pretrained = args.pretrained and family == "qwen3vl"
        folder = make_checkpoint(
            family, args.out / f"tiny_{family}", args.seed, size=args.size, pretrained=pretrained
        )
        megabytes = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6
        print(f"{folder}  {megabytes:.1f} MB")
    print(make_vggt(args.out / "tiny_vggt.safetensors", args.seed, size=args.size))


if __name__ == "__main__":
    sys.exit(run_command(main))
