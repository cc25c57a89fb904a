"""Captions in freer words from a language model, kept only when every checked fact survives.

Nothing is contacted unless a user names an endpoint. A rewritten caption must have the same sentences in any
order: each names the same labels, relations and numbers in the same order as a sentence of the caption made of
facts, so swapping two objects is refused. The words between them are free and not checked. Otherwise the
caption made of facts stays. Rows that changed are tagged, and ``verify_qa.py`` checks them by the same rule
against the caption it derives again.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from spatialvlm.errors import SynthesisError
from spatialvlm.scenes.io import write_atomic
from spatialvlm.scenes.schema import STRUCTURAL_LABELS
from spatialvlm.synthesis.parts import list_scenes, read_scene
from spatialvlm.synthesis.rows import SCHEMA, compact_json
from spatialvlm.synthesis.wording import plural

TASK = "scene_caption"
REWRITTEN = "rewritten"
"""Tag of rows whose caption is not the one made of facts."""
BATCH = 1024
INSTRUCTION = (
    "Rewrite the description below as one fluent paragraph. Keep every number, every object and every "
    "relation exactly as stated, from the same point of view. Keep one sentence per statement, and the order of "
    "objects and numbers within it. Add nothing. Answer with the paragraph only.\n\n"
)
_WORDS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBER = r"\d+(?:\.\d+)?|\b(?:" + "|".join(_WORDS) + r")\b"
_RELATION = (
    r"\b(?:(?:left|right|front)(?: of)?|behind|above|below|not|no|never|without)\b|n['\u2019]t\b"
)
"""With "of" or without: "to the left of the sofa" and "to the sofa's left" say opposite things. A denial counts."""
Sentence = tuple[tuple[str, str], ...]
"""Facts of a sentence in order: kind (labels, numbers, relations) and word."""
Rewriter = Callable[[str], str]
"""Caption in, caption out; :meth:`Endpoint.chat` behind :data:`INSTRUCTION` is one."""


def lost_fact(caption: str, rewritten: str, labels: Iterable[str]) -> str | None:
    """What a rewritten caption changed, in a word; ``None`` when all facts survive.

    Args:
        caption: The text made of facts.
        rewritten: The text to check.
        labels: Labels of the scene; naming one that the caption does not name is a change too.
    """
    pattern = _pattern(labels)
    before, after = _sentences(caption, pattern), _sentences(rewritten, pattern)
    for kind in ("numbers", "labels", "relations"):
        if _of_kind(before, kind) != _of_kind(after, kind):
            return kind
    return None if Counter(before) == Counter(after) else "order"


def _pattern(labels: Iterable[str]) -> tuple[re.Pattern[str], dict[str, str]]:
    """What finds facts in a text, and the label of every singular and plural form.

    Long forms come first, so that "coffee table" is not a table.
    """
    forms = {form: label for label in set(labels) for form in (plural(label), label)}
    longest = sorted(forms, key=lambda form: (-len(form), form))
    names = "|".join(map(re.escape, longest)) or "(?!)"
    return re.compile(
        rf"\b(?P<labels>{names})\b|(?P<numbers>{_NUMBER})|(?P<relations>{_RELATION})"
    ), forms


def _sentences(text: str, pattern: tuple[re.Pattern[str], dict[str, str]]) -> list[Sentence]:
    """Facts of every sentence in the order they are said; sentences without any are left out."""
    find, forms = pattern
    found = []
    for sentence in re.split(r"[.!?;](?=\s|$)", text.lower()):
        facts = []
        for match in find.finditer(sentence):
            kind, word = str(match.lastgroup), match[0]
            if word in _WORDS and kind == "numbers":
                word = str(_WORDS.index(word) + 2)
            facts.append((kind, forms[word] if kind == "labels" else word))
        if facts:
            found.append(tuple(facts))
    return found


def _of_kind(sentences: Iterable[Sentence], kind: str) -> Counter[str]:
    return Counter(word for sentence in sentences for k, word in sentence if k == kind)


def restored(
    row: Mapping[str, Any], fresh: Mapping[str, Any], labels: Iterable[str]
) -> tuple[dict[str, Any], list[str]]:
    """A rewritten row with the text of ``fresh`` put back, and what the rewriting changed."""
    lost = lost_fact(fresh["answer_text"], row["answer_text"], labels)
    problems = [] if lost is None else [f"the rewritten caption changes the {lost}"]
    said = row["messages"][-1]["content"]
    if said != row["answer_text"]:
        problems.append("the reply is not the rewritten caption")
    tags = [tag for tag in row["tags"] if tag != REWRITTEN]
    texts = {name: fresh[name] for name in ("answer_text", "answer_json")}
    messages = [*row["messages"][:-1], fresh["messages"][-1]]
    return {**row, **texts, "tags": tags, "messages": messages}, problems


def rewrite_rows(folder: Path, scenes: Path, out: Path, rewrite: Rewriter) -> dict[str, int]:
    """Copy a folder of rows with its captions rewritten; finished files are not written again.

    Args:
        folder: Rows of one run, with ``plan.json``.
        scenes: The scenes they were made from.
        out: New folder; gets the same files, ``plan.json`` and ``rewrite.json``.
        rewrite: Asks the model.

    Returns:
        Captions rewritten, and kept by reason, over all runs into ``out``.

    Raises:
        SynthesisError: ``folder`` has no rows.
        BackendUnavailableError: The endpoint does not answer; a second run continues.
    """
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise SynthesisError(f"{folder}: no parquet file with rows.")
    out.mkdir(parents=True, exist_ok=True)
    refs = {ref.scene_id: ref for ref in list_scenes(scenes)}
    known: dict[str, list[str]] = {}

    def labels(scene_id: str) -> list[str]:
        if scene_id not in known:
            if scene_id not in refs:
                raise SynthesisError(f"{folder}: scene {scene_id} is not below {scenes}.")
            objects = read_scene(refs[scene_id]).objects
            known[scene_id] = sorted({o.label for o in objects} - STRUCTURAL_LABELS)
        return known[scene_id]

    record = out / "rewrite.json"
    counts = Counter(json.loads(record.read_bytes()) if record.is_file() else {})
    for path in files:
        if (out / path.name).is_file():
            continue
        change = partial(_rewritten, rewrite=rewrite, labels=labels, counts=counts)
        _copy(path, out / path.name, change)
        write_atomic(record, json.dumps(dict(sorted(counts.items())), indent=1).encode())
    plan = folder / "plan.json"
    if plan.is_file():
        write_atomic(out / "plan.json", plan.read_bytes())
    return dict(sorted(counts.items()))


def _rewritten(
    row: dict[str, Any],
    *,
    rewrite: Rewriter,
    labels: Callable[[str], list[str]],
    counts: Counter[str],
) -> dict[str, Any]:
    if row["task"] != TASK or REWRITTEN in row["tags"]:
        return row
    text = " ".join(rewrite(row["answer_text"]).split())
    lost = lost_fact(row["answer_text"], text, labels(row["scene_id"])) if text else "text"
    if lost is not None:
        counts[f"kept: {lost}"] += 1
        return row
    counts["rewritten"] += 1
    messages = [*row["messages"][:-1], {**row["messages"][-1], "content": text}]
    return {
        **row,
        "messages": messages,
        "answer_text": text,
        "answer_json": compact_json(text),
        "tags": [*row["tags"], REWRITTEN],
    }


def _copy(source: Path, target: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Rewrite one file row by row under a temporary name."""
    temporary = target.with_name(f".{target.name}.tmp")
    with pq.ParquetWriter(temporary, SCHEMA, compression="zstd") as writer:
        for rows in _batches(source):
            writer.write_table(pa.Table.from_pylist([change(r) for r in rows], schema=SCHEMA))
    temporary.replace(target)


def _batches(path: Path) -> Iterator[list[dict[str, Any]]]:
    for batch in pq.ParquetFile(path).iter_batches(BATCH):
        yield batch.to_pylist()
