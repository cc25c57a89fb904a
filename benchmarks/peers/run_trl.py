"""TRL's ``SFTTrainer`` on a mix; run with the Python of TRL's environment.

    .venv-peers/trl/bin/python benchmarks/peers/run_trl.py FOLDER MIX OUT.jsonl --batch 8 --accumulate 1 --steps 10

Rows are ``messages`` with ``assistant_only_loss`` and TRL's own training template of Qwen2.5-VL: prompt/completion rows pad both
halves and are slower. TRL takes no videos, so of a clip it gets every second frame as an image, which makes as
many visual tokens. Packing and ``padding_free`` are refused for images (``--set padding_free=true`` shows the message).
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import trl
from datasets import Dataset, Features, Image, List, Value
from mix import read_mixed
from probe import recorder, watch
from stopwatch import arguments, overrides


def main() -> None:
    parser = arguments()
    parser.add_argument("--accumulate", type=int, default=1)
    args = parser.parse_args()
    options = {
        "per_device_train_batch_size": args.batch,
        "gradient_accumulation_steps": args.accumulate,
        "max_steps": args.steps,
        "use_cpu": True,
        "bf16": False,
        "max_length": None,
        "gradient_checkpointing": False,
        "assistant_only_loss": True,
        "optim": "adamw_torch_fused",
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    } | overrides(args.set)
    template = Path(trl.__file__).parent / "chat_templates" / "qwen2_5_vl_training.jinja"
    found = recorder(args)
    watch(found)
    trainer = trl.SFTTrainer(
        model=str(args.model or args.folder / "model"),
        args=trl.SFTConfig(
            model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
            chat_template_path=str(template),
            **({"output_dir": tempfile.mkdtemp()} | options),
        ),
        train_dataset=dataset(args.folder / args.mix),
    )
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    found.write(args.out, options, ("trl", "accelerate", "datasets"))


def dataset(folder: Path) -> Dataset:
    rows = []
    for row in read_mixed(folder):
        turns = [
            {**turn, "content": turn["content"].replace("<image>", "").replace("<video>", "")}
            for turn in row["messages"]
        ]
        frames = [frame for clip in row["videos"] for frame in clip[::2]]
        rows.append({"messages": turns, "images": row["images"] + frames})
    turn = {"role": Value("string"), "content": Value("string")}
    data = Dataset.from_list(
        rows, features=Features({"messages": List(turn), "images": List(Image())})
    )
    return data if any(row["images"] for row in rows) else data.remove_columns("images")


if __name__ == "__main__":
    main()
