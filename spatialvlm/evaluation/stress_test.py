"""Test-set stress test (arXiv 2511.04655): fine-tune a model on the text of a benchmark, fold by fold.

What a model can learn about held-out questions from the questions and answers of the other folds, without any
picture, is a shortcut of the benchmark. One fresh low-rank adapter per fold, trained by our own stage-1 recipe.
"""

import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import Int

from spatialvlm.errors import EvaluationError
from spatialvlm.evaluation.extract import last_number_plain
from spatialvlm.evaluation.metrics import mra
from spatialvlm.evaluation.prompts import ANSWER_LETTER, Messages, join_options
from spatialvlm.evaluation.schema import Item
from spatialvlm.evaluation.shortcuts import Diagnosis

RECIPE = {
    "stage": 1,
    "precision": "fp32",
    "lora": {"parts": ["language_model"], "r": 8, "alpha": 16.0, "dropout": 0.1},
    "optim": {"lr": 2.0e-4},
    "schedule": {"warmup_ratio": 0.1},
    "step": {"global_batch_size": 4},
    "packing": {"max_tokens": 1024},
    "shared_prefix": {"enabled": False},
    "log": {"progress": "none"},
}
"""r 8, alpha 16, dropout 0.1, one epoch, batch 4, 2e-4 cosine with 10 % warm-up, at most 1,024 tokens."""


class Reader(Protocol):
    """A loaded model that reads text."""

    def letters(self, messages: Messages, letters: Sequence[str]) -> Mapping[str, float]:
        """Logarithm of the probability of each letter as the first token of the answer."""

    def number(self, messages: Messages) -> str:
        """At most ten generated tokens."""


def text_prompt(item: Item) -> str:
    """Question and options without media."""
    head = f"Answer the following question: {str(item.row.get('question', '')).replace('<image>', '').strip()}"
    if item.options:
        return f"{head} Options:\n{join_options(item.options)}\n{ANSWER_LETTER}."
    return f"{head}\nAnswer with just a number."


def gold_text(item: Item) -> str:
    """What the model is taught to say."""
    return str(item.gold) if item.options else f"{item.gold:g}"


def messages_of(item: Item) -> Messages:
    """The prompt as messages."""
    return [{"role": "user", "content": [{"type": "text", "text": text_prompt(item)}]}]


def write_fold(
    items: Sequence[Item],
    fold: Int[np.ndarray, " n"],
    held: int,
    folder: Path,
    model: str,
    backbone: str,
    seed: int,
) -> Path:
    """Training rows of all other folds and the recipe that trains on them."""
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    with (data / "train.jsonl").open("w", encoding="utf-8") as file:
        for item, own in zip(items, fold, strict=True):
            if own != held:
                turns = [
                    {"role": "user", "content": text_prompt(item)},
                    {"role": "assistant", "content": gold_text(item)},
                ]
                file.write(
                    json.dumps({"id": item.id, "messages": turns}, ensure_ascii=False) + "\n"
                )
    recipe = {
        **RECIPE,
        "run": {"dir": str(folder / "run"), "seed": seed},
        "model": {"backbone": backbone, "init_from": model},
        "data": {
            "length": {"epochs": 1.0},
            "families": {"spatial": 1.0},
            "index_dir": str(folder / "index"),
            "sources": [
                {
                    "name": "text",
                    "family": "spatial",
                    "format": "messages",
                    "files": ["train.jsonl"],
                    "root": str(data),
                }
            ],
        },
        "checkpoint": {"every": 100000},
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")  # JSON is YAML
    return path


def read_item(reader: Reader, item: Item) -> tuple[float, str]:
    """Score of an item in [0, 1] (P(gold) among the letters, or mean relative accuracy) and what was read."""
    if item.options:
        logs = reader.letters(messages_of(item), list(item.options))
        top = max(logs.values())
        weights = {x: math.exp(value - top) for x, value in logs.items()}
        best = max(weights, key=lambda x: weights[x])
        return weights[item.gold] / sum(weights.values()), best
    text = reader.number(messages_of(item))
    value = last_number_plain(text)
    if value is None:
        return 0.0, text
    score = float(mra(value, item.gold)[0]) if item.gold > 0 else float(value == item.gold)
    return score, text


def run_stress_test(
    items: Sequence[Item],
    fold: Int[np.ndarray, " n"],
    model: Path,
    backbone: str,
    out: Path,
    load: Callable[[Path], Reader],
    *,
    launcher: Sequence[str] = (sys.executable,),
    overrides: Sequence[str] = (),
    seed: int = 42,
) -> list[Diagnosis]:
    """Train once per fold and read its held-out items before and after.

    Args:
        items: Choice and number items.
        fold: Fold of every item.
        model: Directory of the model to fine-tune.
        backbone: Name of its dimensions (``configs/backbones``).
        out: One folder per fold; a fold that has a finished model is not trained again.
        load: Model directory -> reader.
        launcher: What starts the training recipe.
        overrides: ``key=value`` for the recipe.
        seed: Of the training.

    Raises:
        EvaluationError: A training failed.
    """
    base = load(model)
    before = [read_item(base, item)[0] for item in items]
    del base
    found: dict[int, Diagnosis] = {}
    for held in range(int(fold.max()) + 1):
        folder = out / f"fold{held}"
        recipe = write_fold(items, fold, held, folder, str(model), backbone, seed)
        final = folder / "run" / "final"
        if not (final / "config.json").is_file():
            command = [*launcher, "recipes/stage1.py", str(recipe), *overrides]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise EvaluationError(
                    f"training of fold {held} failed ({' '.join(command)}):\n{done.stderr[-2000:]}"
                )
        reader = load(final)
        for i, item in enumerate(items):
            if fold[i] == held:
                score, said = read_item(reader, item)
                right = float(said == item.gold) if item.options else score
                found[i] = Diagnosis(item, score, said, right, held, before[i])
    return [found[i] for i in range(len(items))]
