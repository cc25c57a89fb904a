"""Read finished runs back from their folders: results, items with answers, training metrics."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spatialvlm.errors import DataError
from spatialvlm.evaluation.charts import PALETTE
from spatialvlm.evaluation.reading import read_jsonl
from spatialvlm.evaluation.registry import BENCHMARKS, find_spec
from spatialvlm.evaluation.schema import Item, Scored, Verdict
from spatialvlm.evaluation.scoring import PairedResult, check_same_questions, paired


@dataclass(frozen=True, slots=True)
class ItemRow:
    """One line of ``per_item.csv``."""

    id: str
    variant: str
    cluster: str
    question_type: str
    category: str
    gold: str
    extracted: str
    score: float
    unparsed: bool
    finish: str
    group: str


@dataclass(frozen=True)
class BenchRun:
    """One benchmark of one run."""

    label: str
    """Name of the run in tables."""
    color: str
    folder: Path
    result: dict[str, Any]
    manifest: dict[str, Any]

    @property
    def blind(self) -> bool:
        """Whether the model saw no real media."""
        return str(self.manifest.get("media", "real")) != "real"

    def items(self) -> list[ItemRow]:
        """Per-item scores."""
        with (self.folder / "per_item.csv").open(encoding="utf-8", newline="") as file:
            return [
                ItemRow(
                    row["id"],
                    row["variant"],
                    row["cluster"],
                    row["question_type"],
                    row["category"],
                    row["gold"],
                    row["extracted"],
                    float(row["score"]),
                    row["unparsed"] == "1",
                    row["finish"],
                    row["group"],
                )
                for row in csv.DictReader(file)
            ]

    def texts(self) -> dict[tuple[str, str], str]:
        """Raw answers by id and variant."""
        path = self.folder / "predictions.jsonl"
        if not path.is_file():
            return {}
        rows, _ = read_jsonl(path)
        return {(str(r["id"]), str(r.get("variant") or "")): str(r["prediction"]) for _, r in rows}


def _read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def read_runs(folders: Sequence[str | Path]) -> dict[str, list[BenchRun]]:
    """Benchmarks of several run folders, ``{benchmark: [one entry per run]}`` in the given order.

    A folder that itself holds ``result.json`` is a single benchmark.

    Raises:
        DataError: A folder has no result.
    """
    found: dict[str, list[BenchRun]] = {}
    for number, folder in enumerate(map(Path, folders)):
        parts = [folder] if (folder / "result.json").is_file() else sorted(folder.glob("*/"))
        parts = [part for part in parts if (part / "result.json").is_file()]
        if not parts:
            raise DataError(
                f"{folder} holds no result.json; run recipes/evaluate.py or `score --out` first"
            )
        for part in parts:
            result = _read_json(part / "result.json")
            manifest_path = part / "manifest.json"
            manifest = _read_json(manifest_path) if manifest_path.is_file() else {}
            label = folder.name.removeprefix("eval_") or str(folder)
            color = PALETTE[number % len(PALETTE)]
            found.setdefault(result["benchmark"], []).append(
                BenchRun(label, color, part, result, manifest)
            )
    return found


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """Logged steps of a training run; of a step that was replayed, the last attempt counts.

    Raises:
        DataError: No ``metrics.jsonl``.
    """
    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        raise DataError(f"{path} does not exist; give the folder of a training run")
    steps: dict[int, dict[str, Any]] = {}
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # a line cut off by a kill
        if isinstance(row.get("step"), int):
            known = steps.get(row["step"], {})
            same = known.get("attempt") == row.get("attempt")
            steps[row["step"]] = {**known, **row} if same else row
    return [steps[step] for step in sorted(steps)]


def paired_runs(a: BenchRun, b: BenchRun, *, allow_partial: bool = False) -> PairedResult:
    """Difference a - b of the headline on common items, clustered by scene.

    Raises:
        DataError: Different items without ``allow_partial``, other rows under the same numbers, nothing in common.
    """
    spec = find_spec(a.result["benchmark"])
    hashes = a.result["data_sha256"], b.result["data_sha256"]
    check_same_questions(spec, b.result["benchmark"], *hashes)
    left, right = ([_scored(row) for row in run.items()] for run in (a, b))
    return paired(spec, a.result["protocol"], left, right, allow_partial=allow_partial)


def _scored(row: ItemRow) -> Scored:
    item = Item(
        row.id, "", row.gold, row.question_type, row.cluster,
        category=row.category, group=row.group, variant=row.variant,
    )  # fmt: skip
    return Scored(item, Verdict(row.extracted, row.score, row.unparsed))


def headline_weights(run: BenchRun) -> dict[str, float] | None:
    """Weight of every item in the headline, ``None`` where the headline is no mean of item scores."""
    spec = BENCHMARKS.get(run.result["benchmark"])
    if spec is None or not spec.mean_of_items:
        return None
    items = [_scored(row).item for row in run.items()]
    cells: dict[tuple[str, str], list[Item]] = {}
    for item in items:
        cells.setdefault((item.question_type, item.category), []).append(item)
    weights: dict[str, float] = {}
    for members in cells.values():
        inside = {item.key for item in members}
        marked = [Scored(item, Verdict(None, float(item.key in inside), True)) for item in items]
        share = spec.summarise(marked, run.result["protocol"]).headline.value / 100
        weights |= {item.id: share / len(members) for item in members}
    return weights
