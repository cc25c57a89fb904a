"""What a benchmark is: schema, items, verdicts, and checks of single cells.

A benchmark is one :class:`BenchmarkSpec`: which columns its files have, how a row becomes an :class:`Item`,
how an answer is judged under each protocol, and how item scores become the headline number.
"""

import ast
import difflib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from spatialvlm.errors import DataError
from spatialvlm.evaluation.metrics import Estimate

Protocol = Literal["official", "lmms", "easi"]
PROTOCOLS: tuple[Protocol, ...] = ("official", "lmms", "easi")

Row = Mapping[str, Any]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, slots=True)
class Media:
    """One picture, video, or frame list of a question."""

    kind: Literal["image", "video"]
    path: str
    """Relative to the media root; for ``frames`` the folder they are in."""
    frames: tuple[str, ...] = ()
    """File names of a clip that is stored as pictures, in time order; empty = one file."""
    times_s: tuple[float, ...] = ()
    """Seconds of these frames, where the row states them."""
    data: bytes | None = field(default=None, repr=False)
    """Encoded picture when the benchmark file itself holds it."""


@dataclass(frozen=True, slots=True)
class Item:
    """One question."""

    id: str
    kind: str
    """``choice``, ``number``, or a kind of one benchmark family; selects nothing by itself."""
    gold: Any
    question_type: str
    cluster: str
    """Independent unit for standard errors, usually the scene."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Offered letters with their texts, in order."""
    category: str = ""
    group: str = ""
    variant: str = ""
    row: Row = field(default_factory=dict, repr=False)

    @property
    def key(self) -> tuple[str, str]:
        """What predictions are joined by."""
        return self.id, self.variant


@dataclass(frozen=True, slots=True)
class Verdict:
    """How one answer was read and scored."""

    extracted: Any
    score: float
    """In [0, 1] (counting: also negative, the error is not clipped)."""
    unparsed: bool
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Scored:
    """An item with the verdict on its answer."""

    item: Item
    verdict: Verdict
    finish: str = ""
    failed: bool = False


@dataclass(frozen=True, slots=True)
class Summary:
    """Headline of a benchmark and what belongs beside it."""

    name: str
    """What the headline is, e.g. "macro of 8"."""
    headline: Estimate
    extra: Mapping[str, Any] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    """Types that the headline needs and the file lacks; not empty = partial."""
    deviations: tuple[str, ...] = ()
    """Departures that depend on the file, beside those of :attr:`BenchmarkSpec.notes`."""


Judge = Callable[[Item, str], Verdict]


@dataclass(frozen=True)
class BenchmarkSpec:
    """One benchmark: schema, prompts, judges, aggregation."""

    name: str
    title: str
    columns: tuple[str, ...]
    """Columns that scoring needs."""
    parse: Callable[[Row, str], Item]
    """Row and id -> item; raises ``DataError`` on a bad row."""
    judge: Callable[[str], Judge]
    """Protocol -> judge."""
    summarise: Callable[[Sequence[Scored], str], Summary]
    """Scored items and protocol -> headline."""
    prompt: Callable[[Item, str], str]
    """Item and protocol -> prompt text; ``<image>`` marks where a picture goes."""
    media: Callable[[Row], tuple[Media, ...]]
    max_new_tokens: int
    id_key: str | None = None
    """Column with the id; ``None`` = the row index."""
    cluster_columns: tuple[str, ...] = ()
    """Columns that make the cluster; absent -> the item is its own cluster."""
    expected_n: int | None = None
    notes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Protocol -> departures from the upstream scorer."""
    select: Callable[[Sequence[Item]], Sequence[Item]] | None = None
    """Keeps the items of a sub-set, e.g. the debiased split."""
    system: Callable[[Row], str] | None = None
    """System turn of a row, if the benchmark has one."""
    marks: Callable[[Row], list[dict[str, Any]]] | None = None
    """Marks to draw into a row's pictures."""
    same_scene: bool = False
    """Pictures of a row show one scene (they form one group for the geometry encoder)."""
    verbatim: bool = False
    """White space around media markers is part of the prompt (our own rows are trained that way)."""
    mean_of_items: bool = True
    """The headline is a weighted mean of item scores, so the same rule on differences is the difference of headlines."""
    lower_is_better: bool = False
    """The headline is an error, not a percentage."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Conventions that were switched on, see :mod:`spatialvlm.evaluation.conventions`."""


@dataclass(frozen=True)
class Benchmark:
    """A benchmark with the items of a local file."""

    spec: BenchmarkSpec
    items: tuple[Item, ...]
    path: Path
    sha256: str
    media_root: Path
    warnings: tuple[str, ...] = ()
    unscored: int = 0
    """Rows of the file that have no offline score (captions, several turns); they are not items."""

    @property
    def clustered(self) -> bool:
        """Whether clusters are scenes rather than items."""
        return len({item.cluster for item in self.items}) < len(self.items)


# ---------------------------------------------------------------------------------------------- row helpers


def present(value: Any) -> bool:
    """Whether a cell holds something: not null, empty, NaN, or the string "nan"."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return False
    return not (isinstance(value, str) and value.strip().lower() in ("", "nan"))


def as_list(value: Any) -> list[Any]:
    """A list column: a list as it is, a JSON or Python literal read, another value as its only element."""
    if not isinstance(value, str):
        if value is None:
            return []
        return list(value) if isinstance(value, (list, tuple)) else [value]
    if value.strip().startswith("["):
        for read in (json.loads, ast.literal_eval):
            try:
                return list(read(value))
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
    return [value] if present(value) else []


def bare_letter(value: Any) -> str:
    """The letter of "(A)", "A", or "A. right"."""
    return str(value).strip().lstrip("(").strip()[:1].upper()


def letter_columns(row: Row, letters: str = "ABCDEFGHIJ") -> dict[str, str]:
    """Options that stand in one column per letter; missing cells mean "no such option"."""
    return {x: str(row[x]) for x in letters if present(row.get(x))}


def lettered(options: Any) -> dict[str, str]:
    """Options in a list: a leading letter ("A. chair", "(A) chair") is read, a bare list gets A, B, ..."""
    texts = [str(option) for option in as_list(options)]
    own = [_own_letter(text) for text in texts]
    if texts and all(own):
        letters = [pair[0] for pair in own if pair]
        if len(set(letters)) == len(letters):
            return {pair[0]: pair[1] for pair in own if pair}
        return {}  # duplicate letters: refused by `choice_gold`
    return dict(zip(LETTERS, texts, strict=False))


def _own_letter(text: str) -> tuple[str, str] | None:
    body = text.strip()
    if body[:1] == "(" and body[2:3] == ")" and body[1:2] in LETTERS:
        return body[1], body[3:].strip()
    if body[:1] and body[0] in LETTERS and body[1:2] in (".", ":", ")"):
        return body[0], body[2:].strip()
    return None


def choice_gold(letter: str, options: Mapping[str, str], item_id: str) -> str:
    """Check that a gold letter is one of the offered ones.

    Raises:
        DataError: No options, duplicate letters, or a gold letter that is not offered.
    """
    if letter not in options:
        raise DataError(
            f"item {item_id}: gold {letter!r} is not among the offered options {dict(options)}. "
            "Options must have distinct letters; check the benchmark file."
        )
    return letter


def choice_item(
    row: Row,
    item_id: str,
    letter: str,
    options: Mapping[str, str],
    question_type: object,
    *,
    cluster: str = "",
    category: object = "",
) -> Item:
    """A question with options whose gold letter is checked; without a cluster the item is its own.

    Raises:
        DataError: See :func:`choice_gold`.
    """
    gold = choice_gold(letter, options, item_id)
    cluster = cluster or f"item:{item_id}"
    return Item(
        item_id, "choice", gold, str(question_type), cluster, options, str(category), row=row
    )


def number_gold(value: Any, item_id: str) -> float:
    """Check that a gold number is finite.

    Raises:
        DataError: Not a finite number.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"item {item_id}: gold {value!r} is not a finite number (MRA undefined)")
    return number


def one_of(value: str, allowed: Iterable[str], what: str, item_id: str) -> str:
    """Check a category value.

    Raises:
        DataError: ``value`` is not allowed.
    """
    names = sorted(allowed)
    if value not in names:
        raise DataError(f"item {item_id}: unknown {what} {value!r}; allowed: {', '.join(names)}")
    return value


def cluster_of(row: Row, columns: Sequence[str], item_id: str) -> str:
    """Cluster name from columns; the item itself when one of them is absent."""
    if columns and all(present(row.get(column)) for column in columns):
        return "/".join(str(row[column]) for column in columns)
    return f"item:{item_id}"


def closest(value: str, allowed: Iterable[str]) -> str:
    """A hint "did you mean ...?" or an empty string."""
    match = difflib.get_close_matches(value, list(allowed), n=1)
    return f"; did you mean {match[0]!r}?" if match else ""
