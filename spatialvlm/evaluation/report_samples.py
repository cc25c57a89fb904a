"""Sample questions of the report, with pictures and every run's answer."""

import html
import json
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from spatialvlm.errors import DataError, SpatialVLMError
from spatialvlm.evaluation.charts import number
from spatialvlm.evaluation.prompts import item_media, prompt_text
from spatialvlm.evaluation.registry import load_benchmark
from spatialvlm.evaluation.runs import BenchRun, ItemRow
from spatialvlm.evaluation.schema import Benchmark, Item
from spatialvlm.evaluation.thumbnails import tiles

esc = html.escape


STATES = ("unparsed", "wrong", "right")


def state_of(row: ItemRow) -> str:
    """``unparsed``, ``wrong`` or ``right`` (a score of at least one half)."""
    if row.unparsed:
        return "unparsed"
    return "right" if row.score >= 0.5 else "wrong"


def pick_samples(items: Sequence[ItemRow], count: int, seed: int = 0) -> dict[str, list[ItemRow]]:
    """A seeded choice of at most ``count`` unparsed, wrong and right answers per task.

    Returns:
        Task -> its answers, failures first; the task with the lowest mean score comes first.
    """
    tasks: dict[str, list[ItemRow]] = defaultdict(list)
    for item in items:
        tasks[item.question_type].append(item)
    rng = random.Random(seed)
    chosen: dict[str, list[ItemRow]] = {}
    for name in sorted(tasks, key=lambda t: (sum(i.score for i in tasks[t]) / len(tasks[t]), t)):
        pools: dict[str, list[ItemRow]] = {state: [] for state in STATES}
        for item in tasks[name]:
            pools[state_of(item)].append(item)
        chosen[name] = [x for s in STATES for x in rng.sample(pools[s], min(count, len(pools[s])))]
    return chosen


def _verdict(row: ItemRow) -> str:
    if row.unparsed:
        return '<span class="un">unparsed</span>'
    if row.score >= 0.5:
        return f'<span class="ok">{"right" if row.score == 1 else number(row.score, 1)}</span>'
    return f'<span class="no">{"wrong" if row.score == 0 else number(row.score, 1)}</span>'


def _gold_text(gold: str) -> str:
    """The part of a gold or extracted value that a reader wants to see; a model's own words stay as they are."""
    try:
        value = json.loads(gold)
    except (ValueError, RecursionError):
        return gold
    if isinstance(value, dict):
        return json.dumps(value.get("cell") or value.get("box") or value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else gold


def sample_cards(runs: Sequence[BenchRun], benchmark: Benchmark, count: int, side: int) -> str:
    """Per task: questions with pictures and every run's answer; failures of the last sighted run first.

    Tasks fold; those with the lowest scores come first, the first three are open.
    """
    main = next((run for run in reversed(runs) if not run.blind), runs[-1])
    by_key: dict[tuple[str, str], Item] = {item.key: item for item in benchmark.items}
    tables = {run.label: {(i.id, i.variant): i for i in run.items()} for run in runs}
    texts = {run.label: run.texts() for run in runs}

    def answers(picked: ItemRow) -> str:
        key = picked.id, picked.variant
        lines = f'<tr><td>gold</td><td>{esc(_gold_text(picked.gold))}</td><td class="verdict"></td></tr>'
        for run in runs:
            row = tables[run.label].get(key)
            if row is not None:
                said = texts[run.label].get(key, row.extracted)
                found = _gold_text(row.extracted)
                same = said.strip().rstrip(".").lower() in (found.lower(), row.extracted.lower())
                read = "" if same or not found else f" <small>read as {esc(found)}</small>"
                lines += (
                    f'<tr><td><span class="swatch" style="background:{run.color}"></span>{esc(run.label)}</td>'
                    f"<td>{esc(said[:400]) or '<i>empty</i>'}{read}</td><td class='verdict'>{_verdict(row)}</td></tr>"
                )
        return f'<table class="answers">{lines}</table>'

    parts: list[str] = []
    for task, rows in pick_samples(main.items(), count).items():
        cards = "".join(
            _card(picked, item, benchmark, main.result["protocol"], side, answers(picked))
            for picked in rows
            if (item := by_key.get((picked.id, picked.variant)))
        )
        row = main.result["per_type"][task]
        head = f"{esc(task)} <small>{number(row['value'])} of 100, n {row['n']}</small>"
        opened = " open" if len(parts) < 3 else ""
        parts.append(
            f'<details{opened}><summary>{head}</summary><div class="samples">{cards}</div></details>'
        )
    return "".join(parts)


def _card(
    picked: ItemRow, item: Item, benchmark: Benchmark, protocol: str, side: int, answers: str
) -> str:
    """One question with its pictures, marks and answers."""
    try:
        prompt = prompt_text(item, benchmark.spec, protocol)
        media = item_media(item.row, benchmark.spec)
    except DataError as error:
        prompt, media = f"[{error}]", ()
    marks = benchmark.spec.marks(item.row) if benchmark.spec.marks else []
    prompt = prompt.replace("<image>", "").replace("<video>", "").strip()
    return (
        f'<article class="sample {state_of(picked)}"><div class="head"><span>{esc(picked.question_type)}</span>'
        f"<span>{esc(picked.cluster)}</span></div>"
        f"{tiles(media, benchmark.media_root, side=side, marks=marks)}"
        f"<pre>{esc(prompt[:1500])}</pre>{answers}</article>"
    )


def reload_benchmark(run: BenchRun) -> Benchmark | None:
    """The benchmark's items again, from the file named in the manifest; ``None`` if it is gone."""
    path = run.manifest.get("data_file")
    if not path or not Path(path).exists():
        return None
    try:
        return load_benchmark(
            run.result["benchmark"], path, media_root=run.manifest.get("media_root")
        )
    except SpatialVLMError:
        return None
