"""What every framework trains on: one small Qwen2.5-VL with random weights, and three mixes of files.

    python benchmarks/peers/mix.py FOLDER

``images``  spatial : general 1:1; spatial rows have 1-4 images and answers of 1-8 words; of the general rows half are text of
            60-500 words, half have one image and an answer of 30-150 words.
``video``   the same with clips of 32 frames in place of the images, eight questions about each.
``text``    conversations of 2-8 questions and 200-1,400 words, no pictures; both halves alike.

All pictures fit the processor's budget, frames exactly, so that nobody resizes a frame and every framework sees as many
visual tokens. ``spatial.jsonl`` and ``general.jsonl`` are read by this project, ``mixed.jsonl`` (the same rows, spatial and general
in turn) by the others, each of which gets it in its own format from its own script. Equal arguments give equal files.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from PIL import Image

FRAMES, FRAME_SIDE, QUESTIONS = 32, 224, 8
WORDS = ["the", "chair", "stands", "near", "a", "table", "in", "room", "and", "window", "is", "left", "of", "red", "lamp", "behind", "blue", "box", "under", "white", "shelf", "on", "green", "door", "with", "small", "sofa", "bed", "between", "two", "large", "plants", "it", "far", "from", "closest", "to", "camera", "wall", "floor", "three", "right", "above", "how", "many"]  # fmt: skip

Row = dict[str, Any]
"""An OpenAI ``messages`` row; ``images`` are files, ``videos`` folders of frames."""


def text(rng: Generator, low: int, high: int) -> str:
    """Between ``low`` and ``high`` words."""
    return " ".join(rng.choice(WORDS, int(rng.integers(low, high + 1))))


def row(question: str, answer: str, **media: list[str]) -> Row:
    """One question with its answer; media come first."""
    marks = "<image>" * len(media.get("images", ())) + "<video>" * len(media.get("videos", ()))
    turns = [
        {"role": "user", "content": marks + question},
        {"role": "assistant", "content": answer},
    ]
    return {"messages": turns, **media}


def spatial_rows(mix: str, num: int, rng: Generator) -> Iterator[Row]:
    """Short questions about several images, or eight about each clip."""
    for number in range(num):
        question, answer = text(rng, 15, 40), text(rng, 1, 8)
        if mix == "video":
            yield row(question, answer, videos=[f"clips/{number // QUESTIONS:03d}"])
        else:
            files = [f"spatial/{number:04d}_{i}.jpg" for i in range(int(rng.integers(1, 5)))]
            yield row(question, answer, images=files)


def conversations(num: int, rng: Generator) -> Iterator[Row]:
    """Long text; a third of the words are the user's."""
    for _ in range(num):
        turns = int(rng.integers(2, 9))
        words = int(rng.integers(200, 1401)) // turns
        asked = [text(rng, words // 3, words // 3) for _ in range(turns)]
        pairs = [row(question, text(rng, words * 2 // 3, words * 2 // 3)) for question in asked]
        yield {"messages": [turn for pair in pairs for turn in pair["messages"]]}


def general_rows(num: int, rng: Generator) -> Iterator[Row]:
    """Text and captions in turn."""
    for number in range(num):
        if number % 2:
            yield row(text(rng, 5, 20), text(rng, 30, 150), images=[f"general/{number:04d}.jpg"])
        else:
            words = int(rng.integers(60, 501))
            asked = words * 3 // 5
            yield row(text(rng, asked, asked), text(rng, words - asked, words - asked))


def draw(path: Path, size: tuple[int, int], rng: Generator) -> None:
    """A smooth random picture, ``size`` = (height, width)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC)
    picture.save(path, quality=90)


def write_mix(folder: Path, mix: str, num: int, seed: int = 0) -> None:
    """Write rows and pictures.

    Args:
        folder: Gets ``spatial.jsonl``, ``general.jsonl``, ``mixed.jsonl`` and the pictures beside them.
        mix: ``images``, ``video``, or ``text``.
        num: Rows of each half.
        seed: Of words, sizes, and pictures.
    """
    rng = np.random.default_rng(seed)
    if mix == "text":
        spatial, general = list(conversations(num, rng)), list(conversations(num, rng))
    else:
        spatial, general = list(spatial_rows(mix, num, rng)), list(general_rows(num, rng))
    write_rows(folder, spatial, general, rng)


def write_rows(folder: Path, spatial: list[Row], general: list[Row], rng: Generator) -> None:
    """Write two equally long lists of rows, one after the other in turn for the peers, and draw their pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    for entry in (*spatial, *general):
        for name in entry.get("images", ()):
            height, width = (int(side) for side in rng.integers(224, 641, 2))
            draw(folder / name, (height, width), rng)
        for name in entry.get("videos", ()):
            for frame in range(0 if (folder / name).exists() else FRAMES):
                draw(folder / name / f"{frame:02d}.jpg", (FRAME_SIDE, FRAME_SIDE), rng)
    turns = [entry for pair in zip(spatial, general, strict=True) for entry in pair]
    for name, rows in (("spatial", spatial), ("general", general), ("mixed", turns)):
        lines = "".join(json.dumps(entry) + "\n" for entry in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def read_mixed(folder: Path) -> list[Row]:
    """Rows of ``mixed.jsonl`` with absolute image files, and clips as lists of frame files."""
    rows = [json.loads(line) for line in (folder / "mixed.jsonl").read_text().splitlines()]
    for entry in rows:
        entry["images"] = [str(folder / name) for name in entry.get("images", ())]
        entry["videos"] = [
            [str(frame) for frame in sorted((folder / name).iterdir())]
            for name in entry.get("videos", ())
        ]
    return rows


def write_model(folder: Path, *, text_width: int = 256, text_layers: int = 4, vision_width: int = 256,
                vision_layers: int = 4, rows: int = 2048) -> Path:  # fmt: skip
    """A Qwen2.5-VL with random weights; the default has 8 M parameters.

    Args:
        folder: Hugging Face directory to write.
        text_width: Width of the language model.
        text_layers: Its layers.
        vision_width: Width of the vision encoder.
        vision_layers: Its layers; every second has full attention.
        rows: Rows of the embedding table and of the head.
    """
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from spatialvlm.testing import make_checkpoint

    make_checkpoint("qwen2_5vl", folder, size="demo")
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["text_config"] |= {
        "hidden_size": text_width, "intermediate_size": text_width * 5 // 2, "num_hidden_layers": text_layers,
        "num_attention_heads": text_width // 32, "num_key_value_heads": text_width // 64, "vocab_size": rows,
    }  # fmt: skip
    config["vision_config"] |= {
        "hidden_size": vision_width, "intermediate_size": vision_width * 2, "depth": vision_layers,
        "num_heads": vision_width // 32, "out_hidden_size": text_width,
        "fullatt_block_indexes": list(range(1, vision_layers, 2)),
    }  # fmt: skip
    file.write_text(json.dumps(config, indent=2), encoding="utf-8")
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(
        AutoConfig.from_pretrained(folder), dtype=torch.float32
    )
    model.save_pretrained(folder)
    file.write_text(json.dumps(config, indent=2), encoding="utf-8")
    return folder


if __name__ == "__main__":
    target = Path(sys.argv[1])
    write_model(target / "model")
    for kind, count in (("images", 48), ("video", 32), ("text", 24)):
        write_mix(target / kind, kind, count)
