"""Check finished rows against their scenes: every answer is derived again.

Per row: the scene is reloaded, ``derive`` runs on the stored arguments, and the result must agree with
the stored answer, margin, options and text. The text is also written again from the plan that the
run stored, so a change of wording or code shows up as a disagreement. For a share of the rows the answer
is computed once more by an independent implementation (``synthesis.reference``).
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from spatialvlm.answers import (
    LETTERS,
    AnswerType,
    decimals_of,
    format_answer,
    parse_answer,
    same_answer,
)
from spatialvlm.errors import DataError, SynthesisError
from spatialvlm.synthesis.caption_rewrite import REWRITTEN, restored
from spatialvlm.synthesis.context import SceneContext
from spatialvlm.synthesis.executors import Executor, run_parts
from spatialvlm.synthesis.generate import RowMaker, make_context
from spatialvlm.synthesis.parts import SceneRef, image_prefix, list_scenes, read_scene
from spatialvlm.synthesis.plan import SynthesisPlan, TaskPlan
from spatialvlm.synthesis.reference import REFERENCES, disagreement
from spatialvlm.synthesis.rows import CONTAMINATED, SCHEMA, Reject, canonical_json, hashed, row_id
from spatialvlm.synthesis.tasks import TASKS
from spatialvlm.synthesis.twins import TAG
from spatialvlm.synthesis.wording import Wording, phrase_book
from spatialvlm.synthesis.writer import OPTION_GAP

REGENERATED = (
    "messages", "answer_type", "answer_json", "answer_text", "unit", "options", "choice_idx", "form",
    "slots", "marks", "formats_ok", "images", "frame_ids", "media_kind", "tags", "capability", "family",
    "template_id", "room_id", "split", "license", "group_id",
)  # fmt: skip
"""Columns that are compared with a row written afresh."""


@dataclass
class Report:
    """Result of a verification."""

    rows: int = 0
    checked: int = 0
    mismatches: list[dict[str, str]] = field(default_factory=list)
    """``{"id", "task", "problem"}`` per disagreement."""
    by_task: Counter[str] = field(default_factory=Counter)
    by_reference: Counter[str] = field(default_factory=Counter)
    """Rows per task that the second implementation answered as well."""

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "rows": self.rows,
            "checked": self.checked,
            "disagreements": len(self.mismatches),
            "mismatches": self.mismatches[:1000],
            "checked_by_task": dict(sorted(self.by_task.items())),
            "checked_by_second_implementation": dict(sorted(self.by_reference.items())),
        }


def load_plan(folder: Path) -> SynthesisPlan:
    """Plan that a run stored beside its rows.

    Raises:
        SynthesisError: ``plan.json`` is missing.
    """
    path = folder / "plan.json"
    if not path.is_file():
        raise SynthesisError(f"{path} is missing; verify the folder that synthesize.py wrote.")
    values = json.loads(path.read_text(encoding="utf-8"))["plan"]
    known = {item.name for item in dataclasses.fields(SynthesisPlan)}
    values = {key: value for key, value in values.items() if key in known}
    values["wording"] = Wording(**values["wording"])
    values["tasks"] = {
        name: TaskPlan(
            task["count"],
            tuple(task["forms"]) if task["forms"] is not None else None,
            tuple(task["variants"]) if task["variants"] is not None else None,
        )
        for name, task in values["tasks"].items()
    }
    for key in ("allow_split", "templates"):
        values[key] = tuple(values[key])
    return SynthesisPlan(**values)


@dataclass(frozen=True)
class Job:
    """What a worker needs; sent to other processes."""

    scenes: Path
    plan: SynthesisPlan
    refs: Mapping[str, SceneRef]
    sample: float
    blocked: frozenset[str]
    reference: float


def verify(
    folder: Path,
    scenes: Path,
    *,
    sample: float = 1.0,
    reference: float = 0.05,
    executor: Executor = "process",
    workers: int = 1,
    blocked: Iterable[str] = (),
) -> Report:
    """Verify all rows of a folder.

    Args:
        folder: Rows of one run, with ``plan.json``.
        scenes: The scenes they were made from.
        sample: Share of the rows to check, chosen by hash of the row id.
        reference: Share of the checked rows that the second implementation answers, too.
        executor: Where files are checked.
        workers: Processes.
        blocked: Scene ids that must not occur.

    Raises:
        SynthesisError: No rows, or no stored plan.
    """
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise SynthesisError(f"{folder}: no parquet file to verify.")
    refs = {ref.scene_id: ref for ref in list_scenes(scenes)}
    job = Job(scenes, load_plan(folder), refs, sample, frozenset(blocked), reference)
    report = Report()
    for part in run_parts(executor, workers, partial(verify_file, job), files):
        report.rows += part.rows
        report.checked += part.checked
        report.mismatches += part.mismatches
        report.by_task.update(part.by_task)
        report.by_reference.update(part.by_reference)
    report.mismatches.sort(key=lambda item: item["id"])
    return report


def verify_file(job: Job, path: Path) -> Report:
    """Verify one parquet file."""
    report = Report()
    table = pq.read_table(path)
    if not table.schema.equals(SCHEMA):
        report.mismatches.append({"id": "", "task": "", "problem": f"{path}: another schema"})
        return report
    by_scene: dict[str, list[dict[str, Any]]] = defaultdict(list)
    seen: set[str] = set()
    for row in table.to_pylist():
        report.rows += 1
        if row["id"] in seen:
            report.mismatches.append(_mismatch(row, "the id occurs twice"))
        seen.add(row["id"])
        if chosen(row["id"], job.sample, "sample"):
            by_scene[row["scene_id"]].append(row)
    book = phrase_book(job.plan.templates)
    for scene_id, rows in sorted(by_scene.items()):
        if scene_id in job.blocked or scene_id not in job.refs:
            what = "blocked" if scene_id in job.blocked else "not among the scenes"
            report.mismatches += [_mismatch(row, f"scene {scene_id} is {what}") for row in rows]
            continue
        scene = read_scene(job.refs[scene_id])
        context = make_context(scene, job.plan)
        maker = RowMaker(context, job.plan, book, image_prefix(scene, job.scenes))
        for row in rows:
            report.checked += 1
            report.by_task[row["task"]] += 1
            report.mismatches += [_mismatch(row, problem) for problem in check_row(maker, row)]
            if row["task"] in REFERENCES and chosen(row["id"], job.reference, "reference"):
                report.by_reference[row["task"]] += 1
                report.mismatches += [_mismatch(row, p) for p in check_reference(context, row)]
    return report


def chosen(row_id: str, share: float, purpose: str) -> bool:
    """Whether a row belongs to a random share."""
    return share >= 1.0 or hashed(purpose, row_id) < share * 2**64


def check_reference(context: SceneContext, row: Mapping[str, Any]) -> list[str]:
    """Where the second implementation disagrees with the task; empty when it does not."""
    evidence = json.loads(row["evidence"])
    args = (evidence[0] if isinstance(evidence, list) else evidence)["args"]
    try:
        derived = TASKS[row["task"]].derive(context, args)
    except (Reject, LookupError):
        return []  # check_row has said why
    parts = [part.answer for part in derived] if isinstance(derived, list) else derived.answer
    problem = disagreement(context.scene, row["task"], args, parts)
    return [] if problem is None else [f"the answer is {problem}"]


def _mismatch(row: Mapping[str, Any], problem: str) -> dict[str, str]:
    return {"id": str(row["id"]), "task": str(row["task"]), "problem": problem}


def check_row(maker: RowMaker, row: Mapping[str, Any]) -> list[str]:
    """Everything that is wrong with one row; empty when it agrees with its scene."""
    problems = check_text(row)
    task = TASKS.get(row["task"])
    if task is None:
        return [*problems, f"unknown task {row['task']!r}"]
    evidence = json.loads(row["evidence"])
    args = (evidence[0] if isinstance(evidence, list) else evidence)["args"]
    if row["id"] != row_id(row["scene_id"], task.id, canonical_json(args), row["form"]):
        problems.append("the id does not belong to the arguments")
    scene = maker.ctx.scene
    missing = [f for f in args.get("frames", ()) if f not in maker.ctx.frame_of]
    named = [*args.get("objects", ()), *(o for t in args.get("triplets", ()) for o in t)]
    named += [mark for _, mark in args.get("relations", ())]
    missing += [o for o in named if not 0 <= o < len(scene.objects)]
    missing += [f"frame {k}" for k in args.get("at", ()) if not 0 <= k < len(args["frames"])]
    if missing:
        return [*problems, f"the arguments name {missing}, which the scene does not have"]
    if task.id not in maker.plan.tasks:
        return [*problems, f"task {task.id!r} is not part of the stored plan"]
    try:
        fresh = maker.row(task, args)
    except Reject as reject:
        return [*problems, f"is rejected now: {reject.reason} ({reject.detail})"]
    if REWRITTEN in row["tags"]:
        row, changed = restored(row, fresh, maker.ctx.labels)
        problems += changed
    if fresh["evidence"] != row["evidence"] and not _close(fresh["evidence"], row["evidence"]):
        problems.append(f"evidence {row['evidence']} is now {fresh['evidence']}")
    if abs(fresh["margin"]["value"] - row["margin"]["value"]) > 1e-5:
        problems.append(f"margin {row['margin']} is now {fresh['margin']}")
    # The partner of a counterfactual pair, and what is blocked, is known to the run only.
    paired = ("group_id", "tags") if {TAG, CONTAMINATED} & set(row["tags"]) else ()
    problems += [
        f"{column} {row[column]!r} is now {fresh[column]!r}"
        for column in REGENERATED
        if column not in paired and row[column] != fresh[column]
    ]
    return problems


def check_text(row: Mapping[str, Any]) -> list[str]:
    """Checks that need no scene: formats, options, markers, margin."""
    problems = []
    answer_type: AnswerType = row["answer_type"]
    answers = json.loads(row["answer_json"])
    evidence = json.loads(row["evidence"])
    several = isinstance(evidence, list)
    texts = row["answer_text"].split("\n") if several else [row["answer_text"]]
    if several and not len(answers) == len(texts) == len(evidence):
        problems.append(f"{len(evidence)} turns with {len(answers)} answers and {len(texts)} texts")
    for answer, text in zip(answers if several else [answers], texts, strict=False):
        places = decimals_of(text) if answer_type == "number" else None
        try:
            written = format_answer(answer_type, answer, options=row["options"], places=places)
            read = parse_answer(answer_type, text, options=row["options"])
        except DataError as error:
            problems.append(str(error))
            continue
        if written != text:
            problems.append(f"answer {answer!r} is written {written!r}, the row says {text!r}")
        tolerance = 0.005 if answer_type == "json" else 0.0
        if not same_answer(answer_type, read, answer, tolerance=tolerance):
            problems.append(f"answer text {text!r} reads as {read!r}, the row says {answer!r}")
    problems += _check_options(row, answers)
    margin = row["margin"]
    if margin["value"] < margin["threshold"]:
        problems.append(f"margin {margin} is below its threshold")
    first = next(m["content"] for m in row["messages"] if m["role"] == "user")
    marker, count = {
        "images": ("<image>\n", len(row["images"])),
        "video": ("<video>\n", 1),
        "none": ("<image>\n", 0),
    }[row["media_kind"]]
    if not first.startswith(marker * count) or first[len(marker) * count :].startswith("<"):
        problems.append("markers do not match the media")
    return problems


def _check_options(row: Mapping[str, Any], answer: Any) -> list[str]:
    options: Sequence[str] = row["options"]
    if not options:
        return []
    problems = []
    if len({option.lower() for option in options}) < len(options):
        problems.append(f"options {options} are not distinct")
    index = row["choice_idx"]
    if index is None or options[index] != answer or LETTERS[index] != row["answer_text"]:
        problems.append(f"choice {index} of {options} is not the answer {answer!r}")
    if row["unit"] in ("m", "cm", "m2") and not problems:
        values = [float(option) for option in options]
        problems += [
            f"options {value} and {other} are too close"
            for i, value in enumerate(values)
            for other in values[:i]
            if abs(value - other) < OPTION_GAP * max(value, other) - 1e-9
        ]
    return problems


def _close(a: str, b: str) -> bool:
    """Whether two JSON texts agree up to rounding in the sixth decimal."""

    def same(x: Any, y: Any) -> bool:
        if isinstance(x, dict) and isinstance(y, dict):
            return x.keys() == y.keys() and all(same(x[key], y[key]) for key in x)
        if isinstance(x, list) and isinstance(y, list):
            return len(x) == len(y) and all(same(i, j) for i, j in zip(x, y, strict=True))
        if isinstance(x, float) and isinstance(y, int | float):
            return abs(x - y) <= 2e-6
        return bool(x == y)

    return same(json.loads(a), json.loads(b))
