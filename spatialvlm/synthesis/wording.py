"""Sentence templates: read, checked, chosen by hash, and filled.

A template file maps task -> key -> paraphrases. A key is ``[variant/]FORM[@unit]``: ``YN``,
``closest/NUM@cm``. ``{a}`` is a slot; ``{label|plural}`` and ``{label|a}`` apply a grammar rule.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from spatialvlm.errors import SynthesisError
from spatialvlm.synthesis.rows import Draws

TEMPLATE_DIR = Path(__file__).parent / "templates"
MIN_PARAPHRASES = 5
MAX_WORDS = 60
UNIT_WORDS = {
    "m": "meters",
    "cm": "centimeters",
    "m2": "square meters",
    "deg": "degrees",
    "count": "",
}
FORMS = ("MCQ", "YN", "NUM", "JSON", "OE")

_SLOT = re.compile(r"\{(\w+)(?:\|(\w+))?\}")
_KEY = re.compile(r"^(?:(?P<variant>[\w-]+)/)?(?P<form>[A-Z]+)(?:@(?P<unit>\w+))?$")
_UNIT_IN_TEXT = {
    "m": re.compile(r"\bmet(?:er|re)s?\b"),
    "cm": re.compile(r"\bcentimet(?:er|re)s?\b"),
    "m2": re.compile(r"\bsquare met(?:er|re)s?\b"),
    "deg": re.compile(r"\bdegrees?\b"),
}
_IRREGULAR = {"shelf": "shelves", "bookshelf": "bookshelves", "person": "people", "knife": "knives"}


@dataclass(frozen=True, slots=True)
class Ref:
    """How a question names one object."""

    obj: int
    phrase: str
    """Definite noun phrase: ``the red chair``, ``the object in the green box``."""
    label: str
    how: str
    """``label``, ``colour``, ``size``, ``nearest``, ``direction``, ``order`` or ``mark``."""
    margin: float | None = None
    """Normalised margin of the phrase's uniqueness; ``None`` when nothing was compared."""

    @property
    def short(self) -> str:
        """The phrase without its article, as it stands in options and terse answers."""
        return self.phrase.removeprefix("the ")


def plural(noun: str) -> str:
    """Plural of a label."""
    head, _, last = noun.rpartition(" ")
    if last in _IRREGULAR:
        last = _IRREGULAR[last]
    elif re.search(r"(s|x|z|ch|sh)$", last):
        last += "es"
    elif re.search(r"[^aeiou]y$", last):
        last = last[:-1] + "ies"
    else:
        last += "s"
    return f"{head} {last}" if head else last


def indefinite(noun: str) -> str:
    """The noun with ``a`` or ``an``."""
    return f"{'an' if noun[:1] in 'aeiou' else 'a'} {noun}"


_GRAMMAR = {"plural": plural, "a": indefinite}


@dataclass(frozen=True, slots=True)
class Template:
    """One compiled paraphrase."""

    id: str
    text: str
    pieces: tuple[tuple[str, str, str], ...]
    """``(literal before, slot, grammar rule)``; the last one has an empty slot."""

    @classmethod
    def compile(cls, identity: str, text: str) -> Template:
        """Split ``text`` at its slots."""
        pieces, end = [], 0
        for match in _SLOT.finditer(text):
            pieces.append((text[end : match.start()], match[1], match[2] or ""))
            end = match.end()
        pieces.append((text[end:], "", ""))
        return cls(identity, text, tuple(pieces))

    @property
    def slots(self) -> set[str]:
        """Names of the slots."""
        return {slot for _, slot, _ in self.pieces if slot}

    def fill(self, values: Mapping[str, Any]) -> tuple[str, dict[int, list[tuple[int, int]]]]:
        """Put values into the slots.

        Args:
            values: A text, a :class:`Ref`, or several of them (``a, b and c``) per slot.

        Returns:
            The text, its first letter in upper case, and where each object is named.
        """
        parts: list[str] = []
        spans: dict[int, list[tuple[int, int]]] = {}
        length = 0
        for literal, slot, rule in self.pieces:
            parts.append(literal)
            length += len(literal)
            if not slot:
                continue
            value = values[slot]
            refs = [] if isinstance(value, str) else [value] if isinstance(value, Ref) else value
            if isinstance(value, str):
                word = _GRAMMAR[rule](value) if rule else value
                parts.append(word)
                length += len(word)
            for position, ref in enumerate(refs):
                if position:
                    glue = " and " if position == len(refs) - 1 else ", "
                    parts.append(glue)
                    length += len(glue)
                parts.append(ref.phrase)
                spans.setdefault(ref.obj, []).append((length, length + len(ref.phrase)))
                length += len(ref.phrase)
        text = "".join(parts)
        return text[:1].upper() + text[1:], spans


@dataclass(frozen=True)
class Wording:
    """How questions are worded; part of the configuration hash."""

    paraphrases: int | None = None
    """Use only the first so many paraphrases, in every split; ``None`` uses all and keeps the last
    one for the val and test splits."""
    hints: bool = True
    """End terse questions with how to answer ("Answer yes or no.")."""
    sentences: float = 0.0
    """Share of rows answered by a sentence instead of the terse form."""
    cot: float = 0.0
    """Share of direction and distance questions over three objects answered with the local map first."""
    colours: bool = False
    """Name objects by colour and label wherever the colour is known ("the red chair")."""
    masks: bool = False
    """Store masks of named objects, so that loaders can draw them (formats with view V3)."""
    marks: float = 0.5
    """Share of questions about marked objects among tasks that may use marks."""
    formats: bool | None = None
    """Let training show questions about images in the instruction formats of InternSpatial, another one in
    every epoch; ``False`` keeps them as written, so that all questions about an image share its prefix;
    ``None`` = only where ``marks`` is above 0."""

    @property
    def varies_formats(self) -> bool:
        """``formats``, resolved."""
        return self.marks > 0 if self.formats is None else self.formats

    @classmethod
    def plain(cls) -> Wording:
        """One short wording per question, for models that learn to read from nothing."""
        return cls(paraphrases=1, hints=False, colours=True, marks=0.0)


class PhraseBook:
    """All templates by task and key.

    Args:
        extra: Further YAML files; their paraphrases are added to the built-in ones.

    Raises:
        SynthesisError: A file breaks a rule of :func:`lint`.
    """

    def __init__(self, extra: Iterable[str | Path] = ()) -> None:
        texts: dict[str, dict[str, list[str]]] = {}
        for path in sorted(TEMPLATE_DIR.glob("*.yaml")):
            texts.update(yaml.safe_load(path.read_text(encoding="utf-8")))
        texts = {task: {key: list(v) for key, v in keys.items()} for task, keys in texts.items()}
        problems: list[str] = []
        for path in map(Path, extra):
            added = _read_templates(path)
            problems += [f"{path}: {text}" for text in lint_slots(added, texts)]
            for task, keys in added.items():
                for key, lines in keys.items():
                    texts.setdefault(task, {}).setdefault(key, []).extend(lines)
        problems += lint(texts)
        if problems:
            raise SynthesisError("templates have problems:\n  " + "\n  ".join(problems))
        self._choices: dict[tuple[str | int | None, ...], list[Template]] = {}
        self.templates = {
            task: {
                key: [
                    Template.compile(f"{task}/{key}/{number:02d}", line)
                    for number, line in enumerate(lines)
                ]
                for key, lines in keys.items()
            }
            for task, keys in texts.items()
        }

    def find(
        self, task: str, form: str, variant: str = "", unit: str | None = None
    ) -> list[Template]:
        """Paraphrases of the most specific key; the variant and the unit may be left out in the file.

        Raises:
            SynthesisError: There is none.
        """
        keys = self.templates.get(task, {})
        suffix = f"@{unit}" if unit else ""
        for key in (f"{variant}/{form}{suffix}", f"{variant}/{form}", f"{form}{suffix}", form):
            if key in keys:
                return keys[key]
        raise SynthesisError(
            f"no template for task {task!r}, form {form}, variant {variant!r}, unit {unit!r}. "
            f"Add key '{form}{suffix}' to a template file (--templates)."
        )

    def choose(
        self,
        draws: Draws,
        wording: Wording,
        split: str,
        task: str,
        form: str,
        variant: str = "",
        unit: str | None = None,
    ) -> Template:
        """One paraphrase by hash; the last of each list is kept for the val and test splits."""
        key = (task, form, variant, unit, split, wording.paraphrases)
        lines = self._choices.get(key)
        if lines is None:
            lines = self.find(task, form, variant, unit)
            if wording.paraphrases is not None:
                lines = lines[: wording.paraphrases]
            elif task != "_reply" and len(lines) > 1:
                lines = lines[:-1] if split == "train" else lines[-1:]
            self._choices[key] = lines
        return draws.choice(lines)


@lru_cache(maxsize=4)
def phrase_book(extra: tuple[str, ...] = ()) -> PhraseBook:
    """The built-in templates and those of further files, read once per process."""
    return PhraseBook(extra)


def _read_templates(path: Path) -> dict[str, dict[str, list[str]]]:
    """Templates of a user's file.

    Raises:
        SynthesisError: Not YAML, or not ``task -> key -> list of texts``.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SynthesisError(f"{path} is not valid YAML: {error}") from error
    fine = isinstance(values, dict) and all(
        isinstance(keys, dict)
        and all(isinstance(v, list) and all(isinstance(x, str) for x in v) for v in keys.values())
        for keys in values.values()
    )
    if not fine:
        raise SynthesisError(
            f"{path}: expected task -> key -> list of texts, as in {TEMPLATE_DIR}."
        )
    return dict(values)


def lint_slots(
    added: Mapping[str, Mapping[str, list[str]]], known: Mapping[str, Mapping[str, list[str]]]
) -> list[str]:
    """Tasks of ``added`` that nobody asks, slots that nobody fills, and slots that every known text has but one lacks."""
    problems = []
    for task, keys in added.items():
        if task not in known:
            near = difflib.get_close_matches(task, list(known), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            problems.append(f"unknown task {task!r}{hint}")
            continue
        for key, lines in keys.items():
            # A key of its own has no model: its slots may be those of any text of the task.
            models = known[task].get(key)
            every = models or [line for texts in known[task].values() for line in texts]
            sets = [Template.compile("", line).slots for line in every]
            allowed = set().union(*sets)
            needed = set.intersection(*sets) if models else set()
            for line in lines:
                slots = Template.compile("", line).slots
                problems += [
                    f"{task}/{key}: unknown slot {{{slot}}}; known: {', '.join(sorted(allowed)) or 'none'}: {line!r}"
                    for slot in sorted(slots - allowed)
                ]
                problems += [
                    f"{task}/{key}: slot {{{slot}}} is missing: {line!r}"
                    for slot in sorted(needed - slots)
                ]
    return problems


def lint(texts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return what is wrong with template files; empty when nothing is.

    Checked: key syntax, number of paraphrases, equal texts, length, grammar rules, unit words against
    the unit of the key, and option letters outside the option block.
    """
    problems: list[str] = []
    for task, keys in texts.items():
        for key, lines in keys.items():
            where = f"{task}/{key}"
            match = _KEY.match(key)
            if match is None or (not task.startswith("_") and match["form"] not in FORMS):
                problems.append(f"{where}: a key is '[variant/]FORM[@unit]', forms {FORMS}")
                continue
            least = 3 if task.startswith("_") else MIN_PARAPHRASES
            if len(lines) < least:
                problems.append(f"{where}: {len(lines)} paraphrases, at least {least} are needed")
            normal = [re.sub(r"\W+", " ", line).strip().lower() for line in lines]
            if len(set(normal)) < len(normal):
                problems.append(f"{where}: two paraphrases are equal")
            for line in lines:
                problems += [f"{where}: {p}: {line!r}" for p in _lint_line(line, match["unit"])]
    return problems


def _lint_line(line: str, unit: str | None) -> list[str]:
    problems = []
    if len(line.split()) > MAX_WORDS:
        problems.append(f"more than {MAX_WORDS} words")
    rules = {rule for _, slot, rule in Template.compile("", line).pieces if slot and rule}
    problems += [f"unknown grammar rule {rule!r}" for rule in sorted(rules - _GRAMMAR.keys())]
    if "{" in _SLOT.sub("", line) or "}" in _SLOT.sub("", line):
        problems.append("a brace outside a slot")
    if re.search(r"(^|\s)\(?[A-H][.)](\s|$)", line):
        problems.append("an option letter outside the option block")
    stated = {name for name, pattern in _UNIT_IN_TEXT.items() if pattern.search(line)}
    if "m2" in stated:
        stated.discard("m")
    if unit in _UNIT_IN_TEXT and stated != {unit}:
        problems.append(f"the key says {unit!r} but the text says {sorted(stated) or 'no unit'}")
    return problems
