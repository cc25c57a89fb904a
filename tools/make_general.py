"""Draw the general (not spatial) half of the demo mixture: colours, shapes, counts, words, tables, text.

    python tools/make_general.py --out data/demo/general --num 2000 --split train --size 128

Writes ``OUT/SPLIT.jsonl`` (OpenAI ``messages`` rows) and ``OUT/images/SPLIT/*.png``. Several rows share
one image. Train and held-out rows differ in words, fonts, and layouts. Equal arguments give equal
files.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.random import Generator, Philox
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from spatialvlm.errors import run_command

SPLITS = ("train", "val", "test")
COLOURS = {
    "red": (208, 30, 38),
    "orange": (244, 128, 20),
    "yellow": (250, 215, 50),
    "green": (40, 150, 60),
    "blue": (35, 75, 200),
    "purple": (125, 50, 165),
    "black": (32, 32, 35),
}
SHAPES = ("circle", "square", "triangle", "star")
WORDS = {
    name: tuple(words.split())
    for name, words in {
        "train": "sun map tea cup dog cat hat pen bus key ice egg arm leg box toy car bag log net jam "
        "nut owl fox pig hen bee ant cow ram elm oak ivy bay sea lake hill road park farm",
        "held_out": "sky tap bed bug jar lid mug pan rug van web yak pear moon tree ship",
    }.items()
}
NAMES = {
    "train": ("Ann", "Bob", "Eva", "Ian", "Kim", "Leo", "Mia", "Tom"),
    "held_out": ("Amy", "Ben", "Joe", "Zoe"),
}
ITEMS = {"train": ("pens", "cups", "eggs", "keys"), "held_out": ("hats", "maps")}
OPPOSITES = {
    "train": (("hot", "cold"), ("big", "small"), ("old", "new"), ("wet", "dry"), ("up", "down")),
    "held_out": (("day", "night"), ("yes", "no")),
}

Row = tuple[str, str, str]
"""(task, question, answer)."""


def pick(rng: Generator, items: object) -> object:
    """One item."""
    pool = list(items)  # type: ignore[call-overload]
    return pool[int(rng.integers(len(pool)))]


def lists_of(split: str) -> str:
    """Which word lists a split uses."""
    return "train" if split == "train" else "held_out"


def font(split: str, size: int, rng: Generator) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Train text is outlined at several sizes; held-out text is a bitmap font."""
    if split == "train":
        return ImageFont.load_default(size=int(rng.integers(size // 6, size // 4)))
    return ImageFont.load_default_imagefont()


def background(rng: Generator, size: int) -> Image.Image:
    """A light, slightly graded ground."""
    base = rng.integers(205, 246, size=3)
    ramp = np.linspace(0, int(rng.integers(0, 14)), size)[:, None, None]
    pixels = np.clip(base + ramp * np.ones((size, size, 3)), 0, 255).astype(np.uint8)
    return Image.fromarray(pixels)


def draw_shape(
    pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, colour: tuple[int, int, int]
) -> None:
    """Draw one shape around (x, y)."""
    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    elif shape == "square":
        pen.rectangle((x - r * 0.88, y - r * 0.88, x + r * 0.88, y + r * 0.88), fill=colour)
    else:
        points = 3 if shape == "triangle" else 10
        angles = -np.pi / 2 + np.arange(points) * 2 * np.pi / points
        radii = np.where(np.arange(points) % 2, 0.42, 1.0) if shape == "star" else np.ones(points)
        pen.polygon(
            [
                (x + r * k * np.cos(a), y + r * k * np.sin(a))
                for a, k in zip(angles, radii, strict=True)
            ],
            fill=colour,
        )


def shape_scene(rng: Generator, split: str, size: int) -> tuple[Image.Image, list[Row]]:
    """One to five shapes; questions about colour, kind and number.

    Train shapes stand on a 3x3 grid with some jitter, held-out shapes on a ring.
    """
    image = background(rng, size)
    pen = ImageDraw.Draw(image)
    count = int(rng.integers(1, 6))
    if split == "train":
        cells = rng.permutation(9)[:count]
        places = [((c % 3 + 0.5) / 3, (c // 3 + 0.5) / 3) for c in cells.tolist()]
        places = [(x + rng.uniform(-0.04, 0.04), y + rng.uniform(-0.04, 0.04)) for x, y in places]
    else:
        start = rng.uniform(0, 2 * np.pi)
        angles = start + np.arange(count) * 2 * np.pi / count
        places = [(0.5 + 0.3 * np.cos(a), 0.5 + 0.3 * np.sin(a)) for a in angles]
    colours = [str(c) for c in rng.permutation(list(COLOURS))[:count]]
    # Two kinds at most, so that counting one kind is not always "1".
    kinds = [str(k) for k in rng.permutation(SHAPES)[:2]]
    shapes = [str(pick(rng, kinds)) for _ in range(count)]
    for (x, y), colour, shape in zip(places, colours, shapes, strict=True):
        draw_shape(pen, shape, x * size, y * size, size * rng.uniform(0.09, 0.13), COLOURS[colour])
    rows: list[Row] = [("general_count", "How many shapes are there?", str(count))]
    for colour, shape in zip(colours, shapes, strict=True):
        rows.append(("general_shape", f"What shape is {colour}?", shape))
        if shapes.count(shape) == 1:
            rows.append(("general_colour", f"What color is the {shape}?", colour))
    kind = kinds[0]
    rows.append(("general_count", f"How many {kind}s are there?", str(shapes.count(kind))))
    return image, rows


def word_scene(rng: Generator, split: str, size: int) -> tuple[Image.Image, list[Row]]:
    """One word to read, in colour."""
    image = background(rng, size)
    word = str(pick(rng, WORDS[lists_of(split)]))
    colour = str(pick(rng, [name for name in COLOURS if name != "yellow"]))
    canvas = Image.new("L", (size, size), 0)
    pen = ImageDraw.Draw(canvas)
    face = font(split, size, rng)
    left, top, right, bottom = pen.textbbox((0, 0), word, font=face)
    pen.text((-left, -top), word, fill=255, font=face)
    glyphs = canvas.crop((0, 0, max(1, int(right - left)), max(1, int(bottom - top))))
    if split != "train":
        scale = rng.uniform(2.2, 3.0)
        glyphs = glyphs.resize((int(glyphs.width * scale), int(glyphs.height * scale)))
    glyphs = glyphs.crop((0, 0, min(glyphs.width, size - 8), min(glyphs.height, size - 8)))
    x = int(rng.integers(4, max(5, size - glyphs.width - 3)))
    y = int(rng.integers(4, max(5, size - glyphs.height - 3)))
    image.paste(Image.new("RGB", glyphs.size, COLOURS[colour]), (x, y), glyphs)
    return image, [
        ("general_read", "What word is written?", word),
        ("general_read", "Read the text.", word),
        ("general_colour", "What color is the text?", colour),
    ]


def table_scene(rng: Generator, split: str, size: int) -> tuple[Image.Image, list[Row]]:
    """A table of names and numbers to look up; held-out tables have rules and no header."""
    image = background(rng, size)
    pen = ImageDraw.Draw(image)
    kind = lists_of(split)
    names = [str(name) for name in rng.permutation(NAMES[kind])[:3]]
    numbers = [int(n) for n in rng.permutation(9)[:3] + 1]
    item = str(pick(rng, ITEMS[kind]))
    face = ImageFont.load_default(size=size // 7)
    lines = [(name, str(number)) for name, number in zip(names, numbers, strict=True)]
    if split == "train":
        lines.insert(0, ("name", item))
    height = size / (len(lines) + 0.5)
    for i, (left, right) in enumerate(lines):
        y = (i + 0.25) * height
        pen.text((size * 0.08, y), left, fill=(20, 20, 20), font=face)
        pen.text((size * 0.6, y), right, fill=(20, 20, 20), font=face)
        if split != "train":
            pen.line((4, y + height * 0.8, size - 4, y + height * 0.8), fill=(120, 120, 120))
    ask = (
        f"How many {item} does {{}} have?" if split == "train" else "What number stands beside {}?"
    )
    return image, [("general_table", ask.format(n), v) for n, v in lines if v.isdigit()]


def text_rows(rng: Generator, split: str) -> list[Row]:
    """Questions without an image."""
    kind = lists_of(split)
    a, b = (int(value) for value in rng.integers(0, 10, size=2))
    word = str(pick(rng, WORDS[kind]))
    one, two = pick(rng, OPPOSITES[kind])  # type: ignore[misc]
    rows: list[Row] = [
        ("general_text", f"What is {a} plus {b}?", str(a + b)),
        ("general_text", f"Which is larger, {a} or {b}?", str(max(a, b))),
        ("general_text", f"What is the first letter of {word}?", word[0]),
        ("general_text", f"Spell {word}.", " ".join(word)),
        ("general_text", f"What is the opposite of {one}?", str(two)),
    ]
    return [rows[int(rng.integers(len(rows)))]]


SCENES: tuple[Callable[[Generator, str, int], tuple[Image.Image, list[Row]]], ...] = (
    shape_scene,
    shape_scene,
    word_scene,
    table_scene,
)


def make_general(
    out: Path,
    num: int,
    split: str,
    size: int,
    seed: int = 0,
    per_image: int = 4,
    text: float = 0.15,
) -> Path:
    """Write ``num`` rows.

    Args:
        out: Folder.
        num: Rows.
        split: One of :data:`SPLITS`; selects words, fonts and layouts.
        size: Side of the square images in pixels.
        seed: Everything depends on it.
        per_image: Most questions about one image.
        text: Share of rows without an image.

    Returns:
        The JSONL file.
    """
    folder = out / "images" / split
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, object]] = []
    group = 0
    bar = tqdm(total=num, unit="row", desc=f"general {split}")
    while len(rows) < num:
        key = (seed * 3 + SPLITS.index(split)) * 1_000_003 + group
        rng = Generator(Philox(key=key))
        images: list[str] = []
        if rng.random() < text * per_image / (1 + text * (per_image - 1)):
            made = text_rows(rng, split)
        else:
            image, made = SCENES[int(rng.integers(len(SCENES)))](rng, split, size)
            images = [f"images/{split}/{group:06d}.png"]
            image.save(out / images[0])
            made = [made[i] for i in rng.permutation(len(made))[:per_image].tolist()]
        before = len(rows)
        for number, (task, question, answer) in enumerate(made[: num - len(rows)]):
            marker = "<image>\n" * len(images)
            rows.append(
                {
                    "id": f"general-{split}-{group:06d}-{number}",
                    "task": task,
                    "messages": [
                        {"role": "user", "content": f"{marker}{question}"},
                        {"role": "assistant", "content": answer},
                    ],
                    "images": images,
                }
            )
        bar.update(len(rows) - before)
        group += 1
    bar.close()
    target = out / f"{split}.jsonl"
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    temporary.replace(target)
    return target


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num", type=int, default=2000, help="rows")
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--size", type=int, default=128, help="side of the images in pixels")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    if arguments.num < 1 or arguments.size < 48:
        parser.error("--num must be at least 1 and --size at least 48")
    path = make_general(
        arguments.out, arguments.num, arguments.split, arguments.size, arguments.seed
    )
    print(f"{arguments.num} rows in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
