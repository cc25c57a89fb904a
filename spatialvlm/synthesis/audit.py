"""What can be answered without looking: priors, positions, templates, and a text-only probe.

The probe is a ridge classifier on hashed words of the question and its options, trained on some rooms
and tested on others. A task whose probe beats the best constant by more than ten points leaks its
answers through the text.
"""

from __future__ import annotations

import html
import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy import stats

from spatialvlm.errors import SynthesisError
from spatialvlm.scenes.transforms import Array
from spatialvlm.synthesis.rows import hashed

PROBE_LIMIT = 0.10
NUM_FEATURES = 512
FOLDS = 5
MIN_PROBE_ROWS = 60
MAX_CLASSES = 40
MAX_PROBE_ROWS = 20_000
RIDGE = 10.0
CHI2_LEVEL = 0.01
MRA_THRESHOLDS = np.arange(0.5, 1.0, 0.05)

Row = Mapping[str, Any]


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


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """All rows of a folder, without messages of the system and without masks."""
    rows: list[dict[str, Any]] = []
    for path in sorted(folder.glob("*.parquet")):
        try:
            rows += pq.read_table(path).to_pylist()
        except pa.ArrowInvalid as error:
            raise SynthesisError(f"{path} is not a readable parquet file: {error}") from error
    return rows


def audit(rows: Sequence[Row], *, blocked: Sequence[str] = ()) -> Audit:
    """Audit rows.

    Args:
        rows: Generated rows.
        blocked: Scene ids that must not occur.
    """
    by_task: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_task[row["task"]].append(row)
    ids = Counter(row["id"] for row in rows)
    scenes = {row["scene_id"] for row in rows}
    return Audit(
        rows=len(rows),
        duplicates=sum(count - 1 for count in ids.values()),
        sources=dict(Counter(row["source"] for row in rows)),
        licenses=dict(Counter(row["license"] for row in rows)),
        blocked=sorted(scenes & set(blocked)),
        tasks={name: audit_task(group) for name, group in sorted(by_task.items())},
    )


def target_of(row: Row) -> str:
    """What a text-only model would have to guess: the letter of an option, or the short answer."""
    if row["answer_type"] == "mcq":
        return str(row["answer_text"])
    return str(row["answer_text"])[:60]


def question_of(row: Row) -> str:
    """Question of the first turn without markers."""
    first = next(m["content"] for m in row["messages"] if m["role"] == "user")
    return re.sub(r"^(?:<image>\n|<video>\n)+", "", first)


def audit_task(rows: Sequence[Row]) -> TaskAudit:
    """Audit the rows of one task."""
    result = TaskAudit(rows=len(rows))
    result.answers = dict(Counter(target_of(row) for row in rows).most_common(12))
    _audit_options(rows, result)
    numeric = all(row["answer_type"] == "number" for row in rows)
    if numeric:
        result.histogram = _histogram([_number(row) for row in rows])
    _audit_template(rows, result)
    _audit_labels(rows, result)
    _probe(rows, result, numeric=numeric)
    if result.probe is not None and result.constant is not None:
        gain = result.probe - result.constant
        if gain > PROBE_LIMIT:
            result.warnings.append(
                f"a text-only probe reaches {result.probe:.2f}, the best constant {result.constant:.2f}"
            )
    return result


def _number(row: Row) -> float:
    answers = json.loads(row["answer_json"])
    value = answers[0] if isinstance(answers, list) else answers
    return float(value) / (100.0 if row["unit"] == "cm" else 1.0)


def _histogram(values: Sequence[float]) -> dict[str, int]:
    counts, edges = np.histogram(values, bins=8)
    return {
        f"{low:.2f}-{high:.2f}": int(n)
        for low, high, n in zip(edges, edges[1:], counts, strict=False)
    }


def _audit_options(rows: Sequence[Row], result: TaskAudit) -> None:
    """Positions of right options, tested per number of options and pooled."""
    by_size: dict[int, Counter[int]] = defaultdict(Counter)
    for row in rows:
        if row["choice_idx"] is not None:
            by_size[len(row["options"])][row["choice_idx"]] += 1
    if not by_size:
        return
    statistic, freedom = 0.0, 0
    for size, counts in sorted(by_size.items()):
        total = sum(counts.values())
        for index in range(size):
            name = f"{'ABCDEFGH'[index]} of {size}"
            result.positions[name] = counts[index]
            statistic += (counts[index] - total / size) ** 2 / (total / size)
        freedom += size - 1
    result.position_p = float(stats.chi2.sf(statistic, freedom))
    if result.position_p < CHI2_LEVEL:
        result.warnings.append(f"option positions are not uniform (p = {result.position_p:.2g})")


def _audit_template(rows: Sequence[Row], result: TaskAudit) -> None:
    """How much knowing the paraphrase (not its key) helps."""
    by_key: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_key[row["template_id"].rpartition("/")[0]].append(row)
    gains, total = 0.0, 0
    for group in by_key.values():
        if len(group) < MIN_PROBE_ROWS:
            continue
        best = Counter(target_of(row) for row in group).most_common(1)[0][1]
        by_template: dict[str, Counter[str]] = defaultdict(Counter)
        for row in group:
            by_template[row["template_id"]][target_of(row)] += 1
        known = sum(counts.most_common(1)[0][1] for counts in by_template.values())
        # Splitting into k groups finds structure in noise; about one standard deviation each.
        noise = sum(np.sqrt(sum(counts.values())) / 2 for counts in by_template.values())
        gains += max(0.0, known - best - noise)
        total += len(group)
    if total:
        result.template_leak = gains / total
        if result.template_leak > PROBE_LIMIT:
            result.warnings.append(
                f"the paraphrase gives away {result.template_leak:.0%} of answers"
            )


def _audit_labels(rows: Sequence[Row], result: TaskAudit) -> None:
    by_label: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for row in rows:
        slots = json.loads(row["slots"])
        if slots:
            by_label[row["form"], slots[0]["label"]][target_of(row)] += 1
    total = sum(sum(counts.values()) for counts in by_label.values())
    if total:
        right = sum(counts.most_common(1)[0][1] for counts in by_label.values())
        result.label_majority = right / total


def features(row: Row) -> list[int]:
    """Hashed words and word pairs of the question, and whether an option repeats words of it."""
    words = re.findall(r"[a-z0-9]+", question_of(row).lower())
    grams = [*words, *(f"{a} {b}" for a, b in pairwise(words))]
    grams += [f"option {i} {text.lower()}" for i, text in enumerate(row["options"])]
    return [hashed("gram", gram, size=4) % NUM_FEATURES for gram in grams]


def _probe(rows: Sequence[Row], result: TaskAudit, *, numeric: bool) -> None:
    """Cross-validated ridge probe, rooms kept together."""
    if len(rows) > MAX_PROBE_ROWS:
        rows = sorted(rows, key=lambda row: hashed("probe", row["id"]))[:MAX_PROBE_ROWS]
    rooms = sorted({row["room_id"] for row in rows})
    if len(rows) < MIN_PROBE_ROWS or len(rooms) < FOLDS:
        return
    fold_of = {room: hashed("fold", room) % FOLDS for room in rooms}
    folds = np.array([fold_of[row["room_id"]] for row in rows])
    matrix = np.zeros((len(rows), NUM_FEATURES + 1))
    matrix[:, -1] = 1.0
    for i, row in enumerate(rows):
        for column in features(row):
            matrix[i, column] = 1.0
    if numeric:
        values = np.array([_number(row) for row in rows])
        guess, constant = _probe_numbers(matrix, values, folds)
        result.probe, result.constant = guess, constant
        return
    targets = [target_of(row) for row in rows]
    classes = [word for word, _ in Counter(targets).most_common(MAX_CLASSES)]
    index = {word: i for i, word in enumerate(classes)}
    labels = np.array([index.get(word, -1) for word in targets])
    result.probe = _probe_classes(matrix, labels, folds, len(classes))
    result.constant = best_constant(rows)


def best_constant(rows: Sequence[Row]) -> float:
    """Accuracy of the best constant per kind of question, or of chance where that is higher.

    Kinds are told apart by form, number of options and unit, which everybody sees. A question that names
    the objects to choose from can be answered by any of them.
    """
    groups: dict[tuple[str, int, str | None], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["form"], len(row["options"]), row["unit"]].append(row)
    right = 0.0
    for group in groups.values():
        common = Counter(target_of(row) for row in group).most_common(1)[0][1]
        right += max(float(common), sum(chance(row) for row in group))
    return right / len(rows)


def chance(row: Row) -> float:
    """Probability of a right guess among what the question offers; 0 for open questions."""
    if row["options"]:
        return 1.0 / len(row["options"])
    if row["answer_type"] == "yesno":
        return 0.5
    slots = json.loads(row["slots"])
    named = [slot for slot in slots if any(span[0] % 2 == 0 for span in slot["spans"])]
    offered = any(any(span[0] % 2 for span in slot["spans"]) for slot in slots)
    return 1.0 / len(named) if offered and len(named) > 1 else 0.0


def _ridge(matrix: Array, targets: Array) -> Array:
    gram = matrix.T @ matrix + RIDGE * np.eye(matrix.shape[1])
    weights: Array = np.linalg.solve(gram, matrix.T @ targets)
    return weights


def _probe_classes(matrix: Array, labels: Array, folds: Array, count: int) -> float:
    """Accuracy of the probe on rooms it was not trained on."""
    right = total = 0
    for fold in np.unique(folds):
        test = folds == fold
        train = ~test & (labels >= 0)
        if not train.any():
            continue
        onehot = np.eye(count)[labels[train]]
        guess = (matrix[test] @ _ridge(matrix[train], onehot)).argmax(axis=1)
        right += int((guess == labels[test]).sum())
        total += int(test.sum())
    return right / total


def _probe_numbers(matrix: Array, values: Array, folds: Array) -> tuple[float, float]:
    guesses, fixed = np.zeros_like(values), np.zeros_like(values)
    logs = np.log(np.maximum(np.abs(values), 1e-3))
    for fold in np.unique(folds):
        test = folds == fold
        mean = logs[~test].mean() if (~test).any() else 0.0
        weights = _ridge(matrix[~test], logs[~test] - mean)
        guesses[test] = np.exp(matrix[test] @ weights + mean)
        fixed[test] = np.median(np.abs(values[~test])) if (~test).any() else 1.0
    return _mra(guesses, np.abs(values)), _mra(fixed, np.abs(values))


def _mra(guess: Array, truth: Array) -> float:
    """Mean relative accuracy as in VSI-Bench."""
    error = np.abs(guess - truth) / np.maximum(truth, 1e-6)
    return float((error[:, None] <= 1 - MRA_THRESHOLDS[None] + 1e-9).mean())


def prune(rows: Sequence[Row], *, share: float = 0.1, rounds: int = 10) -> list[str]:
    """Ids of rows to remove until no probe is above its limit.

    Per round and flagged task, the ``share`` of rows that a probe trained on all rows predicts best go.

    Returns:
        Removed ids in the order of removal.
    """
    removed: list[str] = []
    gone: set[str] = set()
    for _ in range(rounds):
        left = [row for row in rows if row["id"] not in gone]
        flagged = [name for name, task in audit(left).tasks.items() if _leaks(task)]
        if not flagged:
            break
        for name in flagged:
            group = [row for row in left if row["task"] == name and row["answer_type"] != "number"]
            for row in _most_predictable(group, share):
                gone.add(row["id"])
                removed.append(row["id"])
    return removed


def _leaks(task: TaskAudit) -> bool:
    return (
        task.probe is not None
        and task.constant is not None
        and task.probe - task.constant > PROBE_LIMIT
    )


def _most_predictable(rows: Sequence[Row], share: float) -> list[Row]:
    if not rows:
        return []
    matrix = np.zeros((len(rows), NUM_FEATURES + 1))
    matrix[:, -1] = 1.0
    for i, row in enumerate(rows):
        for column in features(row):
            matrix[i, column] = 1.0
    targets = [target_of(row) for row in rows]
    classes = sorted(set(targets))
    labels = np.array([classes.index(word) for word in targets])
    score = matrix @ _ridge(matrix, np.eye(len(classes))[labels])
    own = score[np.arange(len(rows)), labels]
    order = np.argsort(-own, kind="stable")[: max(1, int(share * len(rows)))]
    return [rows[i] for i in order.tolist()]


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
