"""Write the page about all tasks: what each asks, and one example with its picture.

    python tools/render_rooms.py --rooms 6 --frames 16 --size 320 --seed 40 --out data/docs/rooms
    python tools/render_rooms.py --rooms 1 --frames 12 --size 320 --seed 1010 --out data/docs/rooms
    python tools/render_rooms.py --rooms 3 --preset blocks --size 256 --seed 1 --out data/docs/rooms
    python tools/document_tasks.py --scenes data/docs/rooms --out docs

Writes ``OUT/tasks.md`` and ``OUT/images/tasks/<task>.jpg``. The examples are generated and verified here.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from PIL import Image

from spatialvlm.errors import run_command
from spatialvlm.scenes.io import iter_scenes
from spatialvlm.synthesis.generate import RowMaker, generate_scene, make_context
from spatialvlm.synthesis.marks import draw_marks, mark_from_dict
from spatialvlm.synthesis.plan import make_plan
from spatialvlm.synthesis.probe import question_of
from spatialvlm.synthesis.rows import Reason
from spatialvlm.synthesis.tasks import TASKS, Task
from spatialvlm.synthesis.verify import check_row
from spatialvlm.synthesis.wording import phrase_book

MAX_IMAGES = 4
WIDTH = 640

HEAD = """# Tasks

Every question of the data engine is computed from 3D annotations: `derive()` decides from geometry alone,
rejects what is too close to call, and stores its margin and evidence in the row. The same function runs
again in `tools/verify_qa.py`.

Families are those of OpenSpatial (arXiv 2604.07296): SM spatial measurement, SR spatial relationship, CP camera
perception, MC multi-view consistency, SAR scene-aware reasoning. Capabilities are those of EASI: MM metric measurement,
MR mental reconstruction, SR spatial relations, PT perspective-taking, DA deformation and assembly, CR comprehensive
reasoning. The SSR column is that paper's group (2603.00409), the dimension SenseNova-SI's (2511.13719). Forms: YN yes or
no, MCQ multiple choice, NUM number, OE open.

This page is written by a command, see the head of `tools/document_tasks.py`.

## How rows are made

| step | command | what to know |
|---|---|---|
| make | `tools/synthesize.py --scenes S --out Q --tasks all` | the same files for any executor (`serial`, `process`, `ray`), number of workers and `--shard`; killed or stopped (SIGTERM), the same command continues; a scene that fails or needs more than `--scene-timeout` is tried once more in its own process, then listed in `manifest.json`, and tried again by the next run |
| check | `tools/verify_qa.py Q --scenes S` | every answer is derived again; `--reference` sets for which share a second, independent implementation computes it, too |
| look for shortcuts | `tools/audit_qa.py Q --scenes S` | priors, option positions, template leaks and a text-only probe per task, in one pass; `--prune` removes what the probe predicts best |
| even out | `tools/synthesize.py ... --balance B` | answers, numbers, labels and pairs of labels are capped by hash |
| look | `tools/view_scene.py SCENE --rows Q` | a page with boxes, floor plan, camera path and all questions with their evidence |

Switches of OpenSpatial's ablations, one key of the task file each: `geometry: points` (answers from the visible
points instead of the boxes), `visibility_filter: false` (hidden objects may be asked about), `tasks` (subsets leave the
rows of the other tasks as they are); shares of the data are `data.fraction` of a recipe.

## All tasks

| task | family | capability | SSR | dimension | views | forms |
|---|---|---|---|---|---|---|
"""


def first_sentences(obj: object) -> str:
    """Docstring up to its sections, on one line."""
    text = inspect.getdoc(obj) or ""
    lines = []
    for line in text.splitlines():
        if line.startswith(("Args:", "Returns:", "Raises:")):
            break
        lines.append(line.strip())
    return " ".join(lines).strip()


def picture(row: dict[str, Any], scenes: Path, target: Path) -> None:
    """Frames of a row beside each other, with their marks."""
    marks = [mark_from_dict(record) for record in json.loads(row["marks"])]
    paths = list(row["images"])
    if len(paths) > MAX_IMAGES:
        last = len(paths) - 1
        paths = [paths[round(i * last / (MAX_IMAGES - 1))] for i in range(MAX_IMAGES)]
    tiles = []
    for path in paths:
        with Image.open(scenes / path) as opened:
            own = [mark for mark in marks if mark.image == row["images"].index(path)]
            tiles.append(draw_marks(opened, own))
    width = min(320, WIDTH // len(tiles))
    tiles = [tile.resize((width, round(tile.height * width / tile.width))) for tile in tiles]
    canvas = Image.new(
        "RGB", (sum(t.width for t in tiles) + 4 * (len(tiles) - 1), tiles[0].height), "white"
    )
    x = 0
    for tile in tiles:
        canvas.paste(tile, (x, 0))
        x += tile.width + 4
    canvas.save(target, "JPEG", quality=78)


def section(task: Task, row: dict[str, Any] | None) -> str:
    """Text about one task."""
    lines = [f"## {task.id}", "", first_sentences(type(task)), ""]
    lines += [f"- **answer**: {first_sentences(type(task).derive)}"]
    lines += [f"- **arguments**: {first_sentences(type(task).propose)}"]
    if task.variants != ("",):
        lines.append(f"- **variants**: {', '.join(f'`{variant}`' for variant in task.variants)}")
    if task.needs:
        lines.append(f"- **needs**: {', '.join(sorted(task.needs))}")
    if row is None:
        return "\n".join(
            [*lines, "", "No example: the documented rooms do not meet its needs.", ""]
        )
    media = "video" if row["media_kind"] == "video" else f"{len(row['images'])} image(s)"
    reply = next(m["content"] for m in row["messages"] if m["role"] == "assistant")
    values = (
        json.loads(row["evidence"])[0]
        if row["evidence"].startswith("[")
        else json.loads(row["evidence"])
    )["values"]
    values.pop("facts", None)
    margin = row["margin"]
    quoted = "\n> ".join(question_of(row).splitlines())
    lines += [
        "", f"![{task.id}](images/tasks/{task.id}.jpg)", "", f"> {quoted}", "", f"**{reply}**", "",
        f"{media}, margin `{margin['kind']}` {margin['value']:.3g} (at least {margin['threshold']:.3g}), "
        f"evidence `{json.dumps(values)[:300]}`", "",
    ]  # fmt: skip
    return "\n".join(lines)


def examples(scenes: Path, seed: int) -> dict[str, dict[str, Any]]:
    """One verified row per task: few images, clear margin.

    Raises:
        SystemExit: A row does not verify.
    """
    plan = make_plan("all", per_task=6, overrides={"seed": seed})
    best: dict[str, tuple[tuple[float, ...], dict[str, Any]]] = {}
    for scene in iter_scenes(scenes):
        prefix = Path(os.path.relpath(scene.root, scenes)).as_posix()
        rows, _ = generate_scene(scene, plan, image_prefix=prefix)
        maker = RowMaker(make_context(scene, plan), plan, phrase_book(), prefix)
        for row in rows:
            problems = check_row(maker, row)
            if problems:
                raise SystemExit(f"{row['id']} {row['task']}: {problems}")
            taken = sum(1 for _, other in best.values() if other["images"] == row["images"])
            rank = (
                taken,
                len(row["images"]) if row["media_kind"] == "images" else 0,
                row["difficulty"],
            )
            if row["task"] not in best or rank < best[row["task"]][0]:
                best[row["task"]] = (rank, row)
    return {name: row for name, (_, row) in best.items()}


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenes", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    rows = examples(arguments.scenes, arguments.seed)
    folder = arguments.out / "images" / "tasks"
    folder.mkdir(parents=True, exist_ok=True)
    parts = [HEAD]
    for task in TASKS.values():
        cells = (
            task.family,
            task.capability,
            task.group,
            task.dimension,
            task.views,
            ", ".join(task.forms),
        )
        parts.append(f"| [{task.id}](#{task.id}) | {' | '.join(cells)} |\n")
    parts.append("\n")
    for task in TASKS.values():
        row = rows.get(task.id)
        if row is not None:
            picture(row, arguments.scenes, folder / f"{task.id}.jpg")
        parts.append(section(task, row) + "\n")
    parts.append(
        "## Reasons of rejection\n\nCounted per task in `manifest.json`.\n\n| reason | meaning |\n|---|---|\n"
    )
    parts += [f"| `{reason}` | {reason.description} |\n" for reason in Reason]
    (arguments.out / "tasks.md").write_text("".join(parts).rstrip() + "\n", encoding="utf-8")
    print(f"{len(rows)} of {len(TASKS)} tasks with an example in {arguments.out / 'tasks.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
