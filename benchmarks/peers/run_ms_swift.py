"""ms-swift's own entry point on a mix; run with the Python of its environment.

    .venv-peers/ms-swift/bin/python benchmarks/peers/run_ms_swift.py FOLDER MIX OUT.jsonl --batch 8 --steps 10

The template's placeholder ids are built in; they are set to those of the small tokenizer, as a plugin would do.
``--set padding_free=true`` shows how ``padding_free`` and packing are refused without flash-attn.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from mix import FRAME_SIDE, FRAMES, read_mixed
from probe import recorder, watch
from stopwatch import arguments, overrides


def main() -> None:
    parser = arguments()
    parser.add_argument("--accumulate", type=int, default=1)
    args = parser.parse_args()
    options = {
        "tuner_type": "full",
        "freeze_vit": False,
        "freeze_aligner": False,
        "model_type": "qwen2_5_vl",
        "template": "qwen2_5_vl",
        "per_device_train_batch_size": args.batch,
        "gradient_accumulation_steps": args.accumulate,
        "max_steps": args.steps,
        "max_length": 8192,
        "use_cpu": True,
        "torch_dtype": "float32",
        "bf16": False,
        "attn_impl": "sdpa",
        "gradient_checkpointing": False,
        "vit_gradient_checkpointing": False,
        "optim": "adamw_torch_fused",
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0.0,
        "train_dataloader_shuffle": False,
        "dataset_shuffle": False,
        "dataloader_num_workers": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "check_model": False,
        "disable_tqdm": True,
    } | overrides(args.set)
    work = Path(tempfile.mkdtemp())
    os.environ |= {
        "MAX_PIXELS": str(FRAME_SIDE**2),
        "VIDEO_MIN_PIXELS": str(FRAME_SIDE**2),  # its default enlarges frames to 128 tokens
        "VIDEO_MAX_PIXELS": str(FRAME_SIDE**2),
        "VIDEO_TOTAL_PIXELS": str(FRAMES * FRAME_SIDE**2),
        "MODELSCOPE_CACHE": str(work / "cache"),
    }
    rows = read_mixed(args.folder / args.mix)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (work / "mix.jsonl").write_text(lines, encoding="utf-8")
    found = recorder(args)
    watch(found)
    set_placeholders(args.folder / "model")
    from swift import sft_main

    where = {
        "model": str(args.model or args.folder / "model"),
        "dataset": str(work / "mix.jsonl"),
        "output_dir": str(work / "run"),
    }
    sft_main(
        [part for key, value in (where | options).items() for part in (f"--{key}", str(value))]
    )
    found.write(args.out, options, ("ms_swift", "accelerate", "datasets", "qwen-vl-utils"))


def set_placeholders(model: Path) -> None:
    """Ids of the tokenizer at hand."""
    from swift.template.templates import qwen

    config = json.loads((model / "config.json").read_text())
    qwen.Qwen2VLTemplate.image_token_id = config["image_token_id"]
    qwen.Qwen2VLTemplate.video_token_id = config["video_token_id"]


if __name__ == "__main__":
    main()
