"""Turn a DeepSpeed ZeRO checkpoint of another trainer into a plain model directory.

python tools/import_deepspeed.py runs/other/checkpoint-1000 imported --model Qwen2.5-VL-7B-Instruct/ --dtype bf16

DeepSpeed's files are pickles, and pickles are programs. They are read without executing them: a file that names
anything beyond tensors and three known records is refused, with the names. Config, tokenizer and processor come from
``--model``, the directory that training started from. Optimizer state is not taken over. Checkpoints with adapters
have to be merged by the program that wrote them.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from spatialvlm.errors import CheckpointError, run_command


def main() -> int:
    """Parse the command line, read, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "checkpoint", type=Path, help="folder with the file 'latest', or global_step*"
    )
    parser.add_argument("target", type=Path, help="new model directory")
    parser.add_argument("--model", type=Path, required=True, help="model directory it started from")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of the weights")
    args = parser.parse_args()
    if args.target.exists():
        raise CheckpointError(f"{args.target} exists; choose a new directory.")
    if not args.target.absolute().parent.is_dir():
        raise CheckpointError(f"{args.target.absolute().parent} is no directory; create it first.")
    if not (args.model / "config.json").is_file():
        raise CheckpointError(
            f"--model {args.model} holds no config.json; give the model directory that training started from."
        )

    import torch
    from safetensors.torch import save_file

    from spatialvlm.models.spatial_vlm import SpatialVLM
    from spatialvlm.training.deepspeed_files import STAND_INS, read_weights

    print(
        f"checkpoints are code: every file is searched first, and refused unless its names are among {', '.join(STAND_INS)}",
        file=sys.stderr,
    )
    weights = read_weights(args.checkpoint)
    if adapters := [name for name in weights if "lora_" in name]:
        raise CheckpointError(
            f"{args.checkpoint} holds adapters ({adapters[0]}, ...); merge them with the program that wrote them."
        )
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    with tempfile.TemporaryDirectory(dir=args.target.absolute().parent) as temporary:
        work = Path(temporary)
        for file in args.model.iterdir():
            if file.is_file() and not file.name.endswith((".safetensors", ".index.json", ".py")):
                shutil.copyfile(file, work / file.name)
        plain = {name.removeprefix("module."): value.to(dtype) for name, value in weights.items()}
        save_file(plain, work / "model.safetensors")
        # Loaded by the library, which knows the names of its older versions and reports what is missing.
        model = SpatialVLM.from_pretrained(work, geometry=None, dtype=dtype)
        model.save_pretrained(args.target)
    print(
        f"{args.target}: {len(weights)} tensors, {sum(v.numel() for v in weights.values()):,} parameters"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
