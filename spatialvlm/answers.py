"""Typed answers: how each kind of answer is written, read back, and compared.

The module is pure and has no project imports except the errors, so that the data engine, the loader
and the evaluation share one definition.

========  ==============================================  =====================
type      value (JSON)                                    terse text
========  ==============================================  =====================
mcq       the option's text                               its letter, ``B``
yesno     ``true`` or ``false``                           ``Yes``
number    number in the row's unit                        ``1.85``
text      string                                          the string
list      list of strings                                 ``table, chair, lamp``
coord     ``[x, y]`` integers (a cell of a grid)          ``[7, 3]``
box       ``[x0, y0, x1, y1]`` in thousandths             ``[222, 645, 364, 944]``
json      list of ``{"label", "bbox_3d"}``                compact JSON, 2 decimals
========  ==============================================  =====================
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from decimal import ROUND_HALF_UP, Decimal
from typing import Any, Literal, get_args

from spatialvlm.errors import DataError

AnswerType = Literal["mcq", "yesno", "number", "text", "json", "coord", "list", "box"]
ANSWER_TYPES: tuple[AnswerType, ...] = get_args(AnswerType)

LETTERS = "ABCDEFGH"

_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")
_FENCE = re.compile(r"^```(?:json)?\s*(.*?)\s*```$", re.DOTALL)
_POWERS = [10.0**places for places in range(7)]
_QUANTA = [Decimal(1).scaleb(-places) for places in range(7)]


def number_text(value: float, places: int) -> str:
    """Write a number with a fixed number of decimals, rounding half up.

    The value is first rounded to six decimals so that ``0.125`` computed as ``0.12499999999`` is
    written like the exact number. A negative zero loses its sign.

    Args:
        value: A finite number.
        places: Decimals to write, 0 to 6.
    """
    value = round(float(value), 6)
    scaled = abs(value) * _POWERS[places]
    if 0.5 < scaled < 1e9 and abs(scaled % 1.0 - 0.5) > 1e-3:
        return f"{value:.{places}f}"  # no tie anywhere near: the quick way rounds the same
    quantised = Decimal(repr(value)).quantize(_QUANTA[places], ROUND_HALF_UP)
    return str(abs(quantised) if quantised == 0 else quantised)


def round_half_up(value: float, places: int) -> float | int:
    """Return ``value`` as it is printed by :func:`number_text`; an ``int`` for ``places == 0``."""
    return printed_value(number_text(value, places))


def printed_value(text: str) -> float | int:
    """The number that :func:`number_text` wrote: an ``int`` without a decimal point."""
    return float(text) if "." in text else int(text)


def decimals_of(text: str) -> int:
    """Return how many decimals a printed number has: 2 for ``"1.85"``, 0 for ``"200"``."""
    return len(text.partition(".")[2])


def boxes_json(boxes: Sequence[dict[str, Any]]) -> str:
    """Write labelled 3D boxes as compact JSON with two decimals.

    Args:
        boxes: ``{"label": str, "bbox_3d": [number, ...]}`` in the order to print.
    """
    items = []
    for box in boxes:
        numbers = ", ".join(number_text(value, 2) for value in box["bbox_3d"])
        items.append(f'{{"label": {json.dumps(box["label"])}, "bbox_3d": [{numbers}]}}')
    return f"[{', '.join(items)}]"


def format_answer(
    answer_type: AnswerType,
    answer: Any,
    *,
    options: Sequence[str] = (),
    places: int | None = None,
) -> str:
    """Write an answer in its terse form.

    Args:
        answer_type: Kind of the answer; see the table of this module.
        answer: The typed value.
        options: Bare option texts of an ``mcq`` answer.
        places: Decimals of a ``number``; ``None`` writes an integer as such and a float with two.

    Raises:
        DataError: The value does not fit its type.
    """
    try:
        if answer_type == "mcq":
            return LETTERS[list(options).index(answer)]
        if answer_type == "yesno":
            return {True: "Yes", False: "No"}[answer]
        if answer_type == "number":
            if places is None:
                places = 0 if isinstance(answer, int) else 2
            return number_text(answer, places)
        if answer_type == "text":
            return str(answer)
        if answer_type == "list":
            return ", ".join(answer)
        if answer_type in ("coord", "box"):
            return f"[{', '.join(str(int(value)) for value in answer)}]"
        if answer_type == "json":
            return boxes_json(answer)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise DataError(
            f"answer {answer!r} cannot be written as {answer_type!r} (options {list(options)}): "
            f"{error}. Fix the task that made it.",
            reason="answer",
        ) from error
    raise DataError(
        f"unknown answer type {answer_type!r}; known: {', '.join(ANSWER_TYPES)}", reason="answer"
    )


def parse_answer(answer_type: AnswerType, text: str, *, options: Sequence[str] = ()) -> Any:
    """Read a terse answer back; the inverse of :func:`format_answer`.

    Case, surrounding blanks and a final full stop do not matter. For model output with free text
    around the answer the extractors of ``spatialvlm.evaluation`` are made.

    Raises:
        DataError: The text is not an answer of this type.
    """
    text = text.strip()
    try:
        if answer_type == "mcq":
            letter = text.rstrip(".").split(".")[0].strip().upper()
            index = LETTERS.index(letter) if len(letter) == 1 else -1
            if not 0 <= index < len(options):
                raise ValueError(f"no option has the letter {letter!r}")
            return options[index]
        if answer_type == "yesno":
            return {"yes": True, "no": False}[text.rstrip(".").lower()]
        if answer_type == "number":
            match = _NUMBER.match(text)
            if match is None:
                raise ValueError("no number at the start")
            return float(match[0]) if "." in match[0] else int(match[0])
        if answer_type == "text":
            return text
        if answer_type == "list":
            return [item.strip() for item in text.rstrip(".").split(",")]
        if answer_type in ("coord", "box"):
            values = json.loads(text)
            if len(values) != (2 if answer_type == "coord" else 4):
                raise ValueError(f"{len(values)} values")
            return [int(value) for value in values]
        if answer_type == "json":
            fence = _FENCE.match(text)
            boxes = json.loads(fence[1] if fence else text)
            return [
                {"label": str(box["label"]), "bbox_3d": [float(v) for v in box["bbox_3d"]]}
                for box in boxes
            ]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{text!r} is not a terse {answer_type!r} answer: {error}", reason="answer"
        ) from error
    raise DataError(
        f"unknown answer type {answer_type!r}; known: {', '.join(ANSWER_TYPES)}", reason="answer"
    )


def same_answer(answer_type: AnswerType, a: Any, b: Any, *, tolerance: float = 0.0) -> bool:
    """Compare two typed answers.

    Args:
        answer_type: Kind of both answers.
        a: One value.
        b: The other value.
        tolerance: Largest difference of two numbers (also inside ``json`` boxes) that counts as
            equal; a slack of 1e-9 is always granted.
    """
    slack = tolerance + 1e-9
    if answer_type == "number":
        return abs(float(a) - float(b)) <= slack
    if answer_type in ("text", "mcq"):
        return _plain(a) == _plain(b)
    if answer_type == "list":
        return [_plain(item) for item in a] == [_plain(item) for item in b]
    if answer_type == "json":
        return len(a) == len(b) and all(
            _plain(box_a["label"]) == _plain(box_b["label"])
            and len(box_a["bbox_3d"]) == len(box_b["bbox_3d"])
            and all(
                abs(x - y) <= slack for x, y in zip(box_a["bbox_3d"], box_b["bbox_3d"], strict=True)
            )
            for box_a, box_b in zip(a, b, strict=True)
        )
    if answer_type in ("coord", "box"):
        return list(a) == list(b)
    return bool(a == b)


def _plain(text: str) -> str:
    """Lower case without surrounding blanks and a final full stop."""
    return text.strip().rstrip(".").strip().lower()
