"""LLaMA-Factory's own entry point on a mix; run with the Python of its environment.

    .venv-peers/llamafactory/bin/python benchmarks/peers/run_llamafactory.py FOLDER MIX OUT.jsonl --batch 8 --steps 10

``--set neat_packing=true cutoff_len=2048`` packs, 2,048 tokens each.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from mix import FRAME_SIDE, read_mixed
from probe import recorder, watch
from stopwatch import arguments, overrides


def main() -> None:
    parser = arguments()
    parser.add_argument("--accumulate", type=int, default=1)
    args = parser.parse_args()
    options = {
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "freeze_vision_tower": False,
        "freeze_multi_modal_projector": False,
        "template": "qwen2_vl",
        "cutoff_len": 8192,
        "per_device_train_batch_size": args.batch,
        "gradient_accumulation_steps": args.accumulate,
        "max_steps": args.steps,
        "use_cpu": True,
        "bf16": False,
        "infer_dtype": "float32",
        "flash_attn": "sdpa",
        "disable_gradient_checkpointing": True,
        "image_max_pixels": FRAME_SIDE**2,
        "video_max_pixels": FRAME_SIDE**2,
        "optim": "adamw_torch_fused",
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "disable_shuffling": True,
        "dataloader_num_workers": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    } | overrides(args.set)
    work = Path(tempfile.mkdtemp())
    write_dataset(args.folder / args.mix, work)
    found = recorder(args)
    watch(found)
    from llamafactory.train.tuner import run_exp

    where = {
        "model_name_or_path": str(args.model or args.folder / "model"),
        "dataset_dir": str(work),
        "dataset": "mix",
        "output_dir": str(work / "run"),
    }
    run_exp(where | options)
    found.write(args.out, options, ("llamafactory", "accelerate", "datasets"))


def write_dataset(folder: Path, work: Path) -> None:
    """Rows in the OpenAI layout of its ``dataset_info.json``."""
    (work / "mix.json").write_text(json.dumps(read_mixed(folder)), encoding="utf-8")
    tags = {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
    }
    columns = {"messages": "messages", "images": "images", "videos": "videos"}
    info = {
        "mix": {"file_name": "mix.json", "formatting": "sharegpt", "columns": columns, "tags": tags}
    }
    (work / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")


if __name__ == "__main__":
    main()
