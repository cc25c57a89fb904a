"""Export a trained model.

python tools/export.py runs/stage1/final exports/ssr2d                       # plain transformers checkpoint
python tools/export.py runs/stage2/final exports/ssr3d --variant 3d --dtype bf16
python tools/export.py Qwen2.5-VL-7B-Instruct/ exports/merged --adapters runs/lora/final/adapters
python tools/export.py runs/stage1/checkpoints/step-00001000 exports/half    # what final/ would have held
python tools/export.py runs/stage1/final exports/ssr2d --push owner/name     # private unless --public
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from spatialvlm.errors import SpatialVLMError, run_command
from spatialvlm.models.export import DTYPES, export, push_to_hub


def main() -> int:
    """Parse the command line, write the directory, optionally upload it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "source",
        type=Path,
        help="model directory, for example a run's final/, or a run's checkpoint",
    )
    parser.add_argument("target", type=Path, help="new directory")
    parser.add_argument(
        "--variant", choices=("2d", "3d"), default="2d", help="without or with the geometry branch"
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="convert the weights")
    parser.add_argument("--adapters", type=Path, help="LoRA or DoRA adapters to merge")
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload to the hub")
    parser.add_argument("--public", action="store_true", help="make a new hub repository public")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="for a checkpoint of a run that was started with it",
    )
    args = parser.parse_args()
    try:
        if (args.source / "train_state.json").is_file():
            if args.dtype or args.adapters or args.variant != "2d":
                parser.error(
                    "a checkpoint is exported as it is; give the result to this tool again"
                )
            from spatialvlm.training.export_checkpoint import export_checkpoint

            folder = export_checkpoint(
                args.source, args.target, trust_remote_code=args.trust_remote_code
            )
        else:
            if args.trust_remote_code:
                parser.error("--trust-remote-code is for checkpoints")
            folder = export(
                args.source,
                args.target,
                variant=args.variant,
                dtype=args.dtype,
                adapters=args.adapters,
            )
    except SpatialVLMError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    for file in sorted(folder.iterdir()):
        print(f"{file.stat().st_size / 1e6:10.2f} MB  {file}")
    if args.push:
        print(push_to_hub(folder, args.push, private=not args.public))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
