"""What can be answered without looking: priors, positions, templates, and a text-only probe.

A task whose probe (``synthesis.probe``) beats the best constant by more than ten points leaks its
answers through the text. One pass over the rows: counts, and a sample of each task for the probe.
"""

from __future__ import annotations

import heapq
import html
import json
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy import stats

from spatialvlm.errors import SynthesisError
from spatialvlm.synthesis.probe import (
    MIN_PROBE_ROWS,
    Case,
    Row,
    case_of,
    most_predictable,
    number_of,
    probe,
    question_of,
    target_of,
)
from spatialvlm.synthesis.rows import hashed

PROBE_LIMIT = 0.10
MAX_PROBE_ROWS = 20_000
MAX_ANSWERS = 20_000
"""Different answers per task (and per template, per label) that are counted; further ones are only summed."""
CHI2_LEVEL = 0.01
BATCH = 4096


@dataclass
class TaskAudit:
    """Findings about one task."""

    rows: int = 0
    probe: float | None = None
    """Accuracy (MRA for numbers) of the text-only probe; ``None`` with too few rows or rooms."""
    constant: float | None = None
    """The same for the best constant answer."""
    template_leak: float | None = None
    """Accuracy of the best answer per template minus the best constant."""
    answers: dict[str, int] = field(default_factory=dict)
    positions: dict[str, int] = field(default_factory=dict)
    position_p: float | None = None
    """Chi-squared p value of uniform option positions."""
    histogram: dict[str, int] = field(default_factory=dict)
    label_majority: float | None = None
    """Accuracy of the most frequent answer per object label."""
    warnings: list[str] = field(default_factory=list)


@dataclass
class Audit:
    """Findings about a folder of rows."""

    rows: int
    duplicates: int
    sources: dict[str, int]
    licenses: dict[str, int]
    blocked: list[str]
    tasks: dict[str, TaskAudit]

    @property
    def leaking(self) -> list[str]:
        """Tasks whose probe is above its limit."""
        return [name for name, task in self.tasks.items() if _leaks(task)]

    @property
    def warnings(self) -> list[str]:
        """All warnings, each with its task."""
        found = [f"{name}: {text}" for name, task in self.tasks.items() for text in task.warnings]
        if self.duplicates:
            found.append(f"{self.duplicates} rows have an id that occurred before")
        found += [f"blocked scene {scene}" for scene in self.blocked]
        return found

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "rows": self.rows,
            "duplicates": self.duplicates,
            "sources": self.sources,
            "licenses": self.licenses,
            "blocked": self.blocked,
            "warnings": self.warnings,
            "tasks": {name: vars(task) for name, task in sorted(self.tasks.items())},
        }


def iter_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Rows of all files of a folder, a batch in memory at a time.

    Raises:
        SynthesisError: A file is not parquet.
    """
    for path in sorted(folder.glob("*.parquet")):
        try:
            for batch in pq.ParquetFile(path).iter_batches(BATCH):
                yield from batch.to_pylist()
        except pa.ArrowInvalid as error:
            raise SynthesisError(f"{path} is not a readable parquet file: {error}") from error


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """All rows of a (small) folder."""
    return list(iter_rows(folder))


def audit(
    rows: Iterable[Row],
    *,
    blocked: Callable[[list[tuple[str, str]]], list[str]] | None = None,
) -> Audit:
    """Audit rows in one pass; memory grows by eight bytes per row.

    Args:
        rows: Generated rows.
        blocked: Which of (scene id, room id) must not occur, as scene ids; ``None`` allows all.
    """
    tallies: dict[str, _Tally] = {}
    ids = array("Q")
    sources: Counter[str] = Counter()
    licenses: Counter[str] = Counter()
    scenes: set[tuple[str, str]] = set()
    for row in rows:
        ids.append(hashed(row["id"]))
        sources[row["source"]] += 1
        licenses[row["license"]] += 1
        scenes.add((row["scene_id"], row["room_id"]))
        tallies.setdefault(row["task"], _Tally()).add(row)
    return Audit(
        rows=len(ids),
        duplicates=len(ids) - len(np.unique(np.asarray(ids))),
        sources=dict(sources),
        licenses=dict(licenses),
        blocked=[] if blocked is None else blocked(sorted(scenes)),
        tasks={name: tally.finish() for name, tally in sorted(tallies.items())},
    )


class _Tally:
    """Counts of one task, and the rows with the smallest hashes as the sample for its probe."""

    def __init__(self) -> None:
        self.rows = 0
        self.numeric = True
        self.answers: Counter[str] = Counter()
        self.numbers = array("d")
        self.positions: dict[int, Counter[int]] = defaultdict(Counter)
        self.templates: dict[str, dict[str, Counter[str]]] = defaultdict(
            lambda: defaultdict(Counter)
        )
        self.labels: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        self.sample: list[tuple[int, int, Case]] = []

    def add(self, row: Row) -> None:
        """Count a row."""
        self.rows += 1
        target = target_of(row)
        _count(self.answers, target)
        if row["answer_type"] == "number":
            self.numbers.append(number_of(row))
        else:
            self.numeric = False
        if row["choice_idx"] is not None:
            self.positions[len(row["options"])][row["choice_idx"]] += 1
        key, _, _ = row["template_id"].rpartition("/")
        _count(self.templates[key][row["template_id"]], target)
        slots = json.loads(row["slots"])
        if slots:
            _count(self.labels[row["form"], slots[0]["label"]], target)
        rank = -hashed("probe", row["id"])
        if len(self.sample) < MAX_PROBE_ROWS:
            heapq.heappush(self.sample, (rank, -self.rows, case_of(row)))
        elif rank > self.sample[0][0]:
            heapq.heapreplace(self.sample, (rank, -self.rows, case_of(row)))

    def finish(self) -> TaskAudit:
        """Findings about the task."""
        result = TaskAudit(rows=self.rows)
        result.answers = dict(self.answers.most_common(12))
        if self.numeric:
            result.histogram = _histogram(self.numbers)
        self._options(result)
        self._templates(result)
        total = sum(sum(counts.values()) for counts in self.labels.values())
        if total:
            right = sum(counts.most_common(1)[0][1] for counts in self.labels.values())
            result.label_majority = right / total
        cases = [case for _, _, case in sorted(self.sample, key=lambda item: -item[1])]
        result.probe, result.constant = probe(cases)
        if _leaks(result):
            result.warnings.append(
                f"a text-only probe reaches {result.probe:.2f}, the best constant {result.constant:.2f}"
            )
        return result

    def _options(self, result: TaskAudit) -> None:
        """Positions of right options, tested per number of options and pooled."""
        if not self.positions:
            return
        statistic, freedom = 0.0, 0
        for size, counts in sorted(self.positions.items()):
            total = sum(counts.values())
            for index in range(size):
                result.positions[f"{'ABCDEFGH'[index]} of {size}"] = counts[index]
                statistic += (counts[index] - total / size) ** 2 / (total / size)
            freedom += size - 1
        result.position_p = float(stats.chi2.sf(statistic, freedom))
        if result.position_p < CHI2_LEVEL:
            result.warnings.append(
                f"option positions are not uniform (p = {result.position_p:.2g})"
            )

    def _templates(self, result: TaskAudit) -> None:
        """How much knowing the paraphrase (not its key) helps."""
        gains, total = 0.0, 0
        for group in self.templates.values():
            every: Counter[str] = Counter()
            for counts in group.values():
                every.update(counts)
            if every.total() < MIN_PROBE_ROWS:
                continue
            best = every.most_common(1)[0][1]
            known = sum(counts.most_common(1)[0][1] for counts in group.values())
            # Splitting into k groups finds structure in noise; about one standard deviation each.
            noise = sum(np.sqrt(counts.total()) / 2 for counts in group.values())
            gains += max(0.0, known - best - noise)
            total += every.total()
        if not total:
            return
        result.template_leak = gains / total
        if result.template_leak > PROBE_LIMIT:
            result.warnings.append(
                f"the paraphrase gives away {result.template_leak:.0%} of answers"
            )


def _count(counter: Counter[str], word: str) -> None:
    """Count a word; once there are very many words, new ones share an entry."""
    counter[word if word in counter or len(counter) < MAX_ANSWERS else "(further)"] += 1


def _histogram(values: Sequence[float]) -> dict[str, int]:
    counts, edges = np.histogram(np.asarray(values), bins=8)
    return {
        f"{low:.2f}-{high:.2f}": int(n)
        for low, high, n in zip(edges, edges[1:], counts, strict=False)
    }


def prune(
    rows: Iterable[Row], tasks: Iterable[str] | None = None, *, share: float = 0.1, rounds: int = 10
) -> list[str]:
    """Ids of rows to remove until no probe is above its limit.

    Per round and leaking task, the ``share`` of rows that a probe trained on the audit's sample of them predicts best go;
    for numbers those with the smallest relative error.

    Args:
        rows: Generated rows.
        tasks: Tasks to look at (those an audit flagged); ``None`` = all. Their rows are held in memory.
        share: Share of a task that goes per round.
        rounds: Most rounds.

    Returns:
        Removed ids in the order of removal.
    """
    wanted = None if tasks is None else set(tasks)
    by_task: dict[str, list[Case]] = defaultdict(list)
    for row in rows:
        if wanted is None or row["task"] in wanted:
            by_task[row["task"]].append(case_of(row))
    removed: list[str] = []
    for _, cases in sorted(by_task.items()):
        for _ in range(rounds):
            sample = sorted(cases, key=lambda case: hashed("probe", case.id))[:MAX_PROBE_ROWS]
            result = TaskAudit()
            result.probe, result.constant = probe(sample)
            if not _leaks(result):
                break
            gone = most_predictable(cases, share, sample)
            removed += gone
            out = set(gone)
            cases = [case for case in cases if case.id not in out]
    return removed


def _leaks(task: TaskAudit) -> bool:
    return (
        task.probe is not None
        and task.constant is not None
        and task.probe - task.constant > PROBE_LIMIT
    )


def page(result: Audit, samples: Mapping[str, Row], images: Mapping[str, str]) -> str:
    """One static HTML page.

    Args:
        result: The audit.
        samples: Task -> one row to show.
        images: Image path -> ``data:`` address; missing images are left out.
    """
    parts = [_PAGE_HEAD, f"<h1>Audit of {result.rows:,} rows</h1>"]
    if result.warnings:
        items = "".join(f"<li>{html.escape(text)}</li>" for text in result.warnings)
        parts.append(f"<h2>Warnings</h2><ul class=warn>{items}</ul>")
    parts.append("<h2>Tasks</h2><table><tr><th>task<th>rows<th>probe<th>constant<th>per label")
    parts.append("<th>template<th>positions p<th>answers</tr>")
    for name, task in result.tasks.items():
        top = ", ".join(f"{word} {n}" for word, n in list(task.answers.items())[:5])
        cells = [
            name, f"{task.rows:,}", _show(task.probe), _show(task.constant), _show(task.label_majority),
            _show(task.template_leak), _show(task.position_p), top,
        ]  # fmt: skip
        line = "".join(f"<td>{html.escape(cell)}" for cell in cells)
        parts.append(f"<tr{' class=warn' if task.warnings else ''}>{line}</tr>")
    parts.append("</table><h2>Samples</h2>")
    for name, row in samples.items():
        pictures = "".join(f"<img src='{images[p]}'>" for p in row["images"] if p in images)
        reply = next(m["content"] for m in row["messages"] if m["role"] == "assistant")
        parts.append(
            f"<div class=sample><b>{html.escape(name)}</b><br>{pictures}"
            f"<p>{html.escape(question_of(row)).replace(chr(10), '<br>')}</p>"
            f"<p class=answer>{html.escape(reply)}</p>"
            f"<p class=evidence>{html.escape(row['evidence'][:400])}</p></div>"
        )
    return "".join(parts)


def _show(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


_PAGE_HEAD = (
    "<!doctype html><meta charset=utf-8><title>Audit</title><style>body{font:14px sans-serif;margin:2em;"
    "max-width:1100px}table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:3px 8px;"
    "text-align:left}.warn{background:#fee}.sample{border:1px solid #ccc;margin:1em 0;padding:1em}"
    ".answer{color:#060}.evidence{color:#777;font-size:12px;overflow-wrap:anywhere}img{height:160px;"
    "margin-right:4px}</style>"
)
