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


def pick_samples(items: Sequence[ItemRow], count: int, seed: int = 0) -> list[ItemRow]:
    """A seeded choice over tasks: unparsed and wrong answers first, then right ones.

    Two thirds are failures where there are that many.
    """
    rng = random.Random(seed)
    pools: dict[str, dict[str, list[ItemRow]]] = {
        "fail": defaultdict(list),
        "right": defaultdict(list),
    }
    for item in items:
        pools["right" if item.score >= 0.5 and not item.unparsed else "fail"][
            item.question_type
        ].append(item)

    def draw(pool: dict[str, list[ItemRow]], wanted: int) -> list[ItemRow]:
        queues = [rng.sample(part, len(part)) for _, part in sorted(pool.items())]
        for queue in queues:
            queue.sort(key=lambda item: not item.unparsed)
        chosen: list[ItemRow] = []
        while len(chosen) < wanted and any(queues):
            for queue in queues:
                if queue and len(chosen) < wanted:
                    chosen.append(queue.pop(0))
        return chosen

    total_right = sum(map(len, pools["right"].values()))
    failures = draw(pools["fail"], max(count - min(total_right, count // 3), 0))
    right = draw(pools["right"], count - len(failures))
    return sorted(failures, key=lambda item: not item.unparsed) + right


def _verdict(row: ItemRow) -> str:
    if row.unparsed:
        return '<span class="un">unparsed</span>'
    if row.score >= 0.5:
        return f'<span class="ok">{"right" if row.score == 1 else number(row.score, 1)}</span>'
    return f'<span class="no">{"wrong" if row.score == 0 else number(row.score, 1)}</span>'


def _gold_text(gold: str) -> str:
    """The part of a structured gold value that a reader wants to see."""
    if gold.startswith("{"):
        value = json.loads(gold)
        return json.dumps(value.get("cell") or value.get("box") or value)
    if gold.replace(".", "", 1).lstrip("-").isdigit():
        return f"{float(gold):g}"
    return {"true": "yes", "false": "no"}.get(gold, gold)


def sample_cards(runs: Sequence[BenchRun], benchmark: Benchmark, count: int, side: int) -> str:
    """Questions with pictures and every run's answer; failures of the last sighted run first."""
    main = next((run for run in reversed(runs) if not run.blind), runs[-1])
    by_key: dict[tuple[str, str], Item] = {item.key: item for item in benchmark.items}
    tables = {run.label: {(i.id, i.variant): i for i in run.items()} for run in runs}
    texts = {run.label: run.texts() for run in runs}
    cards = []
    for picked in pick_samples(main.items(), count):
        key = picked.id, picked.variant
        item = by_key.get(key)
        if item is None:
            continue
        state = "unparsed" if picked.unparsed else ("right" if picked.score >= 0.5 else "wrong")
        answers = ""
        for run in runs:
            row = tables[run.label].get(key)
            if row is not None:
                said = texts[run.label].get(key, row.extracted)
                answers += (
                    f'<tr><td><span class="swatch" style="background:{run.color}"></span>{esc(run.label)}</td>'
                    f"<td>{esc(said[:400]) or '<i>empty</i>'}</td><td class='verdict'>{_verdict(row)}</td></tr>"
                )
        try:
            prompt = prompt_text(item, benchmark.spec, main.result["protocol"])
            media = item_media(item.row, benchmark.spec)
        except DataError as error:
            prompt, media = f"[{error}]", ()
        marks = benchmark.spec.marks(item.row) if benchmark.spec.marks else []
        prompt = prompt.replace("<image>", "").replace("<video>", "").strip()
        cards.append(
            f'<article class="sample {state}"><div class="head"><span>{esc(picked.question_type)}</span>'
            f"<span>{esc(picked.cluster)}</span></div>"
            f"{tiles(media, benchmark.media_root, side=side, marks=marks)}"
            f"<pre>{esc(prompt[:1500])}</pre>"
            f'<table class="answers"><tr><td>gold</td><td>{esc(_gold_text(picked.gold))}</td><td class="verdict"></td></tr>{answers}</table>'
            "</article>"
        )
    return f'<div class="samples">{"".join(cards)}</div>'


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
