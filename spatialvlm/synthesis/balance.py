"""Second pass over finished rows: even answers out without knowing anything but counts.

Two streaming scans. The first counts buckets; the second keeps a row iff its hash is below
quota / count of its bucket. No state depends on workers, so the result does not either.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from spatialvlm.errors import ConfigError
from spatialvlm.synthesis.parts import write_text
from spatialvlm.synthesis.rows import SCHEMA, hashed
from spatialvlm.synthesis.tasks import TASKS

NUM_BINS = 8
NUMBER_CAP = 2.0
"""A numeric bin holds at most twice the median bin."""
CLASS_CAP = 1.25
"""A class holds at most 1.25 times its uniform share."""
LABEL_SHARE = 0.08
PAIR_SHARE = 0.02
SMALL_VOCABULARY = 25
"""With fewer labels than this, a label (or pair) may hold twice its uniform share."""
ROTATION_BIN_DEG = 15
"""Turns of objects are evened out over bins of this width, both directions alike."""
BATCH = 4096

Bucket = tuple[str, str, str]
"""(task, group, class): classes are evened out inside a group."""
LabelKey = tuple[str, str]
"""(task, label) or (task, both labels of a pair)."""
PAIR = " + "
METRIC_UNITS = ("m", "cm", "m2", "deg")


@dataclass
class BalanceReport:
    """Rows before and after, per task and bucket."""

    before: Counter[Bucket] = field(default_factory=Counter)
    after: Counter[Bucket] = field(default_factory=Counter)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        result: dict[str, Any] = {}
        for task in sorted({bucket[0] for bucket in self.before}):
            result[task] = {
                name: {f"{g}/{c}": n for (t, g, c), n in sorted(counts.items()) if t == task}
                for name, counts in (("before", self.before), ("after", self.after))
            }
        return result


def bucket_of(row: Mapping[str, Any]) -> Bucket:
    """Group and class of a row.

    Measured numbers fall into bins of a log scale, turns of objects into signed bins of 15 degrees; yes/no, counts and cells are their own classes; options
    are classes by what they say, unless they name objects (the labels are capped separately).
    """
    name, variant, kind = row["task"], row["variant"], row["answer_type"]
    answer = json.loads(row["answer_json"])
    if name == "is_rotation":
        return (
            name,
            "angle",
            f"{math.floor(float(answer) / ROTATION_BIN_DEG) * ROTATION_BIN_DEG:+d}",
        )
    if TASKS[name].balance == "number" or row["unit"] in METRIC_UNITS:
        value = _magnitude(kind, answer, row["unit"])
        return name, f"number {variant}", "-" if value is None else f"bin {_log_bin(value):02d}"
    if kind in ("yesno", "number", "coord"):
        return name, kind, canonical(answer)
    if row["unit"] == "count":
        return name, "number", str(answer)
    labels = {slot["label"] for slot in json.loads(row["slots"])}
    if isinstance(answer, str) and not any(label in answer for label in labels):
        return name, variant, answer
    return name, "object", variant


def canonical(answer: Any) -> str:
    """Short text of an answer."""
    return json.dumps(answer, separators=(",", ":"))


def _magnitude(kind: str, answer: Any, unit: str | None) -> float | None:
    if kind == "json":
        return float(math.dist(answer[0]["bbox_3d"][:3], (0, 0, 0)))
    if kind == "box":
        return float((answer[2] - answer[0]) * (answer[3] - answer[1])) / 1e6
    first = answer[0] if isinstance(answer, list) else answer
    try:
        value = abs(float(first))
    except (TypeError, ValueError):
        return None
    return value / 100 if unit == "cm" else value


def _log_bin(value: float) -> int:
    position = (math.log10(max(value, 1e-6)) + 2) / 4
    return min(max(int(position * NUM_BINS * 2), 0), NUM_BINS * 2 - 1)


def quotas(counts: Mapping[Bucket, int]) -> dict[Bucket, float]:
    """Rows a bucket may keep.

    Numeric bins are capped at twice the median bin of their group, classes at 1.25 times the uniform
    share (two classes, as yes and no, at the smaller one).
    """
    groups: dict[tuple[str, str], dict[str, int]] = defaultdict(dict)
    for (task, group, word), count in counts.items():
        groups[task, group][word] = count
    result: dict[Bucket, float] = {}
    for (task, group), classes in groups.items():
        ordered = sorted(classes.values())
        if group.startswith("number "):
            cap = NUMBER_CAP * ordered[len(ordered) // 2]
        elif len(ordered) == 2:
            cap = float(ordered[0])
        else:
            cap = _cap(ordered, CLASS_CAP / len(ordered))
        for word in classes:
            result[task, group, word] = cap
    return result


def _cap(counts: Sequence[int], share: float) -> float:
    """Largest cap at which no class exceeds ``share`` of what is kept (at least 1)."""
    low, high = 0.0, float(max(counts))
    for _ in range(40):
        cap = (low + high) / 2
        kept = sum(min(count, cap) for count in counts)
        if cap <= share * kept:
            low = cap
        else:
            high = cap
    return max(low, 1.0)


def label_shares(counts: Mapping[LabelKey, int]) -> dict[LabelKey, float]:
    """Share of its rows that a label, or a pair of labels, keeps inside its task.

    A label may hold 8 % of what is kept, a pair 2 %; with a small vocabulary twice the uniform share.
    """
    groups: dict[tuple[str, bool], dict[LabelKey, int]] = defaultdict(dict)
    for key, count in counts.items():
        groups[key[0], PAIR in key[1]][key] = count
    result = {}
    for (task, paired), group in groups.items():
        share = PAIR_SHARE if paired else LABEL_SHARE
        if len(groups.get((task, False), group)) < SMALL_VOCABULARY:
            share = 2 / len(group)
        cap = _cap(sorted(group.values()), share)
        result.update({key: min(1.0, cap / count) for key, count in group.items()})
    return result


def balance(folder: Path, out: Path) -> BalanceReport:
    """Write the balanced rows of ``folder`` to ``out``, file by file.

    Args:
        folder: Finished parts.
        out: New folder; gets one file per part, ``plan.json`` and ``balance.json``.

    Raises:
        ConfigError: No rows, or ``out`` holds others, which would be read together with the new ones.
    """
    report = BalanceReport()
    label_counts: Counter[LabelKey] = Counter()
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise ConfigError(f"{folder}: no parquet file to balance.")
    strangers = {path.name for path in out.glob("*.parquet")} - {path.name for path in files}
    if strangers or out.resolve() == folder.resolve():
        what = f"holds other rows ({min(strangers)})" if strangers else "is the folder of the rows"
        raise ConfigError(f"{out} {what}. Balance into a new folder.")
    for row in _rows(files):
        report.before[bucket_of(row)] += 1
        label_counts.update(_label_keys(row))
    limits, shares = quotas(report.before), label_shares(label_counts)
    out.mkdir(parents=True, exist_ok=True)
    for path in files:
        temporary = out / f".{path.name}.tmp"
        with pq.ParquetWriter(temporary, SCHEMA, compression="zstd") as writer:
            for rows in _batches(path):
                kept = []
                for row in rows:
                    bucket = bucket_of(row)
                    share = min(1.0, limits[bucket] / report.before[bucket])
                    share *= min((shares[key] for key in _label_keys(row)), default=1.0)
                    if hashed("balance", row["id"]) < share * 2**64:
                        report.after[bucket] += 1
                        kept.append(row)
                if kept:
                    writer.write_table(pa.Table.from_pylist(kept, schema=SCHEMA))
        temporary.replace(out / path.name)
    plan = folder / "plan.json"
    if plan.is_file():
        write_text(out / "plan.json", plan.read_text(encoding="utf-8"))
    write_text(out / "balance.json", json.dumps(report.to_dict(), indent=1))
    return report


def _label_keys(row: Mapping[str, Any]) -> list[LabelKey]:
    """The first named label of a row, and the pair of the first two."""
    labels = [str(slot["label"]) for slot in json.loads(row["slots"])[:2]]
    keys = [(row["task"], label) for label in labels[:1]]
    return [*keys, (row["task"], PAIR.join(sorted(labels)))] if len(labels) == 2 else keys


def _batches(path: Path) -> Iterator[list[dict[str, Any]]]:
    for batch in pq.ParquetFile(path).iter_batches(BATCH):
        yield batch.to_pylist()


def _rows(files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    for path in files:
        for rows in _batches(path):
            yield from rows
