"""What to generate: tasks with their numbers, and the switches that change rows."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from spatialvlm.errors import ConfigError
from spatialvlm.synthesis.rows import GEN_VERSION, Form, canonical_json
from spatialvlm.synthesis.tasks import TASKS
from spatialvlm.synthesis.wording import Wording, phrase_book

Geometry = Literal["box", "points"]
DEFAULT_COUNT = {"image": 20, "video": 6}
"""Rows per scene and task, by what the question shows."""


@dataclass(frozen=True)
class TaskPlan:
    """How much of one task; ``None`` takes the task's default."""

    count: int | None = None
    """Rows per scene."""
    forms: tuple[Form, ...] | None = None
    variants: tuple[str, ...] | None = None


@dataclass(frozen=True)
class SynthesisPlan:
    """Everything that changes rows except the scenes themselves."""

    tasks: Mapping[str, TaskPlan]
    seed: int = 0
    wording: Wording = field(default_factory=Wording)
    geometry: Geometry = "box"
    """Answers from the annotated boxes, or from boxes around the visible points only."""
    visibility_filter: bool = True
    """``False``: questions may name objects that are hidden behind others."""
    allow_unfiltered: bool = False
    """Use scenes without depth and without instance maps, whose visibility was not measured."""
    allow_split: tuple[str, ...] = ("train",)
    """Splits of imported scenes that may be used; procedural rooms of all splits may."""
    templates: tuple[str, ...] = ()
    """Further template files."""

    def count(self, task: str) -> int:
        """Rows wanted per scene."""
        planned = self.tasks[task].count
        return (
            DEFAULT_COUNT["video" if TASKS[task].views == "v" else "image"]
            if planned is None
            else planned
        )

    @property
    def config_hash(self) -> str:
        """16 hex digits that change whenever rows may change."""
        values = {**dataclasses.asdict(self), "gen_version": GEN_VERSION}
        values["templates"] = [_digest(Path(path).read_bytes()) for path in self.templates]
        return _digest(canonical_json(values).encode())[:16]


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def make_plan(
    tasks: str,
    *,
    per_task: int | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> SynthesisPlan:
    """Build a plan from the command line.

    Args:
        tasks: ``all``, a comma-separated list of task ids, or a YAML file with the keys of
            :class:`SynthesisPlan`.
        per_task: Rows per scene and task; overrides the file.
        overrides: Further fields of :class:`SynthesisPlan` that override the file.

    Raises:
        ConfigError: Unknown task, key or form, or a value of the wrong kind; names the nearest valid word.
        SynthesisError: A template file breaks a rule.
    """
    if tasks.endswith((".yaml", ".yml")):
        values = _read(Path(tasks))
        where = tasks
    else:
        names = (
            list(TASKS) if tasks == "all" else [t.strip() for t in tasks.split(",") if t.strip()]
        )
        values, where = {"tasks": dict.fromkeys(names)}, "--tasks"
    values.update(overrides or {})
    known = {item.name for item in dataclasses.fields(SynthesisPlan)}
    problems = [_unknown(f"{where}", key, known) for key in values if key not in known]
    plans: dict[str, TaskPlan] = {}
    asked = values.get("tasks") or {}
    if not isinstance(asked, dict):
        problems.append(f"{where}: tasks must be 'name: settings' pairs, got {asked!r}")
        asked = {}
    for name, settings in asked.items():
        if name not in TASKS:
            problems.append(_unknown(f"{where}: tasks", name, TASKS))
            continue
        if not isinstance(settings, dict | None):
            problems.append(f"{where}: tasks.{name} must be like {{count: 4}}, got {settings!r}")
            continue
        plan, wrong = _task_plan(f"{where}: tasks.{name}", name, settings or {}, per_task)
        plans[name] = plan
        problems += wrong
    if not plans and not problems:
        problems.append(f"{where}: no task; name at least one, or use 'all'")
    if isinstance(values.get("wording"), dict):
        fields = {item.name for item in dataclasses.fields(Wording)}
        wrong = [
            _unknown(f"{where}: wording", k, fields) for k in values["wording"] if k not in fields
        ]
        problems += wrong + _wrong_wording(f"{where}: wording", values["wording"])
        values["wording"] = Wording() if wrong else Wording(**values["wording"])
    elif not isinstance(values.get("wording", Wording()), Wording):
        problems.append(f"{where}: wording must be keys and values, got {values['wording']!r}")
    if values.get("geometry", "box") not in get_args(Geometry):
        problems.append(f"{where}: geometry must be one of {', '.join(get_args(Geometry))}")
    if type(values.get("seed", 0)) is not int:
        problems.append(f"{where}: seed must be an integer, got {values['seed']!r}")
    for key in ("visibility_filter", "allow_unfiltered"):
        if not isinstance(values.get(key, True), bool):
            problems.append(f"{where}: {key} must be true or false, got {values[key]!r}")
    for key in ("allow_split", "templates"):
        if not _is_words(values.get(key, ())):
            problems.append(f"{where}: {key} must be a list of words, got {values[key]!r}")
            values[key] = ()
    for path in values.get("templates", ()):
        if not Path(path).is_file():
            problems.append(f"{where}: template file {path} does not exist")
    if problems:
        raise ConfigError("the synthesis plan has problems:\n  " + "\n  ".join(problems))
    for key in ("allow_split", "templates"):
        if key in values:
            values[key] = tuple(values[key])
    phrase_book(values.get("templates", ()))  # a bad template ends the command, not every scene
    values["tasks"] = plans
    return SynthesisPlan(**values)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"{path}: no such task file. Give task ids or a YAML file.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected keys and values, found {type(values).__name__}.")
    return values


def _unknown(where: str, word: str, known: Any) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted(known))}"
    return f"{where}: unknown {word!r}{hint}"


def _is_words(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(word, str) for word in value)


def _wrong_wording(where: str, values: Mapping[str, Any]) -> list[str]:
    """What is wrong with the values of :class:`Wording`; unknown keys are not looked at."""
    problems = []
    for key, value in values.items():
        if key in ("sentences", "cot", "marks"):
            if type(value) not in (int, float) or not 0 <= value <= 1:
                problems.append(f"{where}.{key} must be a share from 0 to 1, got {value!r}")
        elif key == "paraphrases":
            if value is not None and (type(value) is not int or value < 1):
                problems.append(f"{where}.{key} must be a positive integer, got {value!r}")
        elif not isinstance(value, bool) and not (key == "formats" and value is None):
            problems.append(f"{where}.{key} must be true or false, got {value!r}")
    return problems


def _task_plan(
    where: str, name: str, settings: Mapping[str, Any], per_task: int | None
) -> tuple[TaskPlan, list[str]]:
    problems = [
        _unknown(where, key, ("count", "forms", "variants"))
        for key in settings
        if key not in ("count", "forms", "variants")
    ]
    count = settings.get("count") if per_task is None else per_task
    if count is not None and (type(count) is not int or count < 0):
        problems.append(f"{where}: count must be a number of rows, got {count!r}")
        count = None
    task = TASKS[name]
    picked: dict[str, tuple[Any, ...] | None] = {}
    for key, allowed in (("forms", task.forms), ("variants", task.variants)):
        chosen = settings.get(key)
        if chosen is not None and not _is_words(chosen):
            problems.append(f"{where}.{key} must be a list of words, got {chosen!r}")
            chosen = None
        picked[key] = None if chosen is None else tuple(chosen)
        problems += [
            _unknown(f"{where}.{key}", str(item), allowed)
            for item in picked[key] or ()
            if item not in allowed
        ]
    return TaskPlan(count, picked["forms"], picked["variants"]), problems
