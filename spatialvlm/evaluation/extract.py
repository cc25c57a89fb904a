"""From a model's text to an answer: letters, sets of letters, numbers.

Every extractor is a total function: any string in, a value or ``None`` out, never an exception, in time
linear in the length of the text. The names say which public scorer a rule reproduces; the rules differ on
purpose, because published scores were made with them. All case rules concern ASCII letters only.

Choice extractors share one signature, ``(text, options) -> letter | None``, where ``options`` maps the offered
letters to their texts in order. Number extractors are ``(text) -> float | None``.
"""

import ast
import math
import re
from collections.abc import Callable, Mapping

Options = Mapping[str, str]
ChoiceExtractor = Callable[[str, Options], str | None]
NumberExtractor = Callable[[str], float | None]

REFUSED = "Z"
"""Letter of an explicit refusal (VLMEvalKit convention); never equal to a gold letter, counted unparsed."""

_LOWER = str.maketrans({chr(65 + i): chr(97 + i) for i in range(26)})
_UPPER = str.maketrans({chr(97 + i): chr(65 + i) for i in range(26)})


def lower(text: str) -> str:
    """Lower-case the ASCII letters; the length never changes."""
    return text.translate(_LOWER)


def upper(text: str) -> str:
    """Upper-case the ASCII letters; the length never changes."""
    return text.translate(_UPPER)


def strip_think(text: str) -> str:
    """Drop everything through the last ``</think>``."""
    return text.rpartition("</think>")[2]


def _last(pattern: str, text: str) -> str | None:
    letters = re.findall(pattern, text)
    return str(letters[-1]) if letters else None


def _first(pattern: str, text: str) -> str | None:
    found = re.search(pattern, text)
    return found.group(1) if found else None


# --------------------------------------------------------------------------------------- choices, short rules


def first_token(text: str) -> str:
    """Text up to the first space character, without trailing full stops and white space around it."""
    return text.split(" ", 1)[0].rstrip(".").strip()


def first_token_letter(text: str, options: Options) -> str | None:
    """VSI-Bench and VSTI-Bench, official and lmms-eval: the first token if it is one offered letter."""
    letter = upper(first_token(text))
    return letter if letter in options else None


def last_line_letter(text: str, options: Options) -> str | None:  # noqa: ARG001
    """ViewSpatial: the first stand-alone A-D of the last line, any case ("a chair" reads as A)."""
    letter = _first(r"\b([A-Da-d])\b", text.rpartition("\n")[2])
    return upper(letter) if letter else None


def _unquote(text: str) -> str:
    for pattern in (r"``([^`]*)``", r"`([^`]*)`"):
        inner = _first(pattern, text)
        text = text if inner is None else inner
    return text


def backtick_letter(text: str, options: Options) -> str | None:  # noqa: ARG001
    """MMSI official: inside the back-ticks if there are any, a stand-alone A-D not followed by a word."""
    return _first(r"\b([A-D])\b(?!\s[a-zA-Z])", _unquote(text))


def backtick_letter_ci(text: str, options: Options) -> str | None:  # noqa: ARG001
    """MMSI in lmms-eval: as :func:`backtick_letter` with a ``{...}`` step, A-F, any case."""
    text = _unquote(text)
    start = text.find("{")
    end = text.find("}", start)
    if start >= 0 and end >= 0:
        text = text[start + 1 : end]
    letter = _first(r"\b([A-Fa-f])\b(?!\s[a-zA-Z])", text)
    return upper(letter) if letter else None


def mindcube(text: str, options: Options) -> str | None:  # noqa: ARG001
    """MindCube: "X." anywhere, then the ``<Answer>`` block, then phrases, then the last lines; upper case."""
    letter = _last(r"([A-E])\.", text)
    if letter:
        return letter
    block = text.partition("<Answer>")[2].partition("<")[0]
    for pattern in (r"[Mm]y answer is ([A-E])", r"[Tt]he answer is ([A-E])", r"\b([A-E])\b"):
        if letter := _last(pattern, block):
            return letter
    for pattern in (
        r"(?:\A|(?<=\n))(?:Answer: )?([A-E])(?=[.\s]|\Z)",
        r"[*\"]([A-E])[*\"]",
        r"\bAnswer:?\s*([A-E])\b",
        r"[Mm]y answer is ([A-E])",
        r"answer is ([A-E])",
    ):
        if letter := _last(pattern, text):
            return letter
    for line in reversed(text.split("\n")):
        if letter := _first(r"\b([A-E])\b", line):
            return letter
    return None


def mmmu_style(text: str, options: Options) -> str | None:
    """SITE and MMMU: the strongest way in which any offered letter occurs; ties go to the latest " X "."""
    padded = f" {text.strip()} "
    classes: tuple[tuple[str, ...], ...] = (
        ("({})",),
        (" {} ",),
        ("{}.",),
        ("{}:", ":{}", ": {}"),
    )
    for forms in classes:
        hits = [x for x in options if any(form.format(x) in padded for form in forms)]
        if hits:
            return max(hits, key=lambda x: padded.rfind(f" {x} "))  # max keeps the first of equals
    return None


def blink_rule(text: str, options: Options) -> str | None:
    """BLINK official without its judge: the text is the letter, or one "(X)" token stands out."""
    bare = re.fullmatch(r"\(?([A-E])\)?", text)
    if bare and (text == bare.group(1) or text == f"({bare.group(1)})"):
        return bare.group(1)
    for part in (text.split("\n\n")[-1], text):
        tokens = set(part.split())
        hits = [x for x in options if f"({x})" in tokens]
        if len(hits) == 1:
            return hits[0]
    return None


def leading_letter(text: str, options: Options) -> str | None:  # noqa: ARG001
    """BLINK, CV-Bench and EmbSpatial in lmms-eval: the first letter of the text ("The answer" reads as T)."""
    found = re.match(r"\(?\s*([A-Za-z])", text.strip())
    return upper(found.group(1)) if found else None


def dsr3(text: str, options: Options) -> str | None:  # noqa: ARG001
    """3DSRBench in lmms-eval: a list of patterns, the first that hits."""
    text = text.strip()
    for pattern in (
        r"\A([A-D])[.\s)]",
        r"\A([A-D])\Z",
        r"[Aa]nswer[:\s]+([A-D])",
        r"[Tt]he answer is[:\s]+([A-D])",
        r"[Mm]y answer is[:\s]+([A-D])",
        r"\(([A-D])\)",
        r"([A-D])\.",
        r"\b([A-D])\b",
    ):
        if letter := _first(pattern, text):
            return letter
    return None


def space10_set(text: str, options: Options) -> str | None:  # noqa: ARG001
    """SpaCE-10: a single character as it is, else the sorted set of letters written "X."."""
    if len(text) == 1:
        return text
    return "".join(sorted(set(re.findall(r"([A-F])\.", text)))) or None


# ---------------------------------------------------------------------------------------- choices, long rules

_SUBJECTS = (
    "the answer", "answer", "the correct answer", "correct answer", "the best answer", "best answer",
    "the correct option", "correct option", "the best option", "best option", "the choice", "choice",
    "the correct choice", "correct choice", "my answer", "my choice",
)  # fmt: skip
_PHRASES = (
    *(f"{subject} is" for subject in _SUBJECTS),
    "i choose", "i select", "i pick", "옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは",
)  # fmt: skip


def ranked(text: str, options: Options) -> str | None:  # noqa: ARG001
    """ERQA, RealWorldQA, MMStar: every occurrence of A-D gets a priority, the best one wins.

    At the start of the text 10, at its end 9, after an answer phrase 7, "(X)" 6, "X." 5, "X:" 4, "X)" 3,
    "X " 2; ties go to the later position. Substrings count, so "PIZZA." yields A.
    """
    text = text.strip()
    for char in ",.!?;:'\"":
        text = text.strip(char)
    padded = f" {text} "
    core = padded.strip()
    folded = lower(padded)
    starts = [at + len(phrase) for phrase in _PHRASES if (at := folded.find(phrase)) >= 0]

    best: tuple[int, int] | None = None
    winner = None
    for x in "ABCD":
        found = [
            (priority, padded.rfind(form.format(x)))
            for form, priority in (("({})", 6), ("{}.", 5), ("{}:", 4), ("{})", 3), ("{} ", 2))
        ]
        found += [(7, padded.find(x, start)) for start in starts]
        candidates = [(priority, at) for priority, at in found if at >= 0]
        if core.startswith(x) and not core[1:2].isalpha():
            candidates.append((10, 0))
        if core.endswith(x) and not core[-2:-1].isalpha():
            candidates.append((9, len(core) - 1))
        for candidate in candidates:
            if best is None or candidate > best:
                best, winner = candidate, x
    if winner:
        return winner
    positions = {x: core.rfind(x) for x in "ABCD"}
    last = max(positions, key=lambda x: positions[x])
    return last if positions[last] >= 0 else None


_API_FAILURE = "Failed to obtain answer via API"
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_PUNCTUATION = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))


def vlmk_infer(text: str, options: Options) -> str | None:
    """VLMEvalKit's inference without a judge: one letter token near the end, a phrase, or one option text."""
    if _API_FAILURE in text:
        return None
    if any(refusal in text for refusal in _REFUSALS):
        return REFUSED
    tokens = text.translate(_PUNCTUATION).split()
    hits = [x for x in options if x in tokens]
    if len(hits) == 1 and tokens.index(hits[0]) >= len(tokens) - 4:
        return hits[0]
    if not hits and REFUSED in tokens:
        return REFUSED
    phrase = re.search(r"(?:correct )?answer is \**([A-Da-d])", text, re.IGNORECASE)
    if phrase and upper(phrase.group(1)) in options:
        return upper(phrase.group(1))
    if len(text) > 2 * sum(len(option) for option in options.values()):
        return None
    named = [x for x, option in options.items() if option.lower() in text.lower()]
    return named[0] if len(named) == 1 else None


_INVISIBLE = re.compile("[\u200b-\u200d\ufeff]")
_TAG = re.compile(r"<answer[^<>]*>\s*([A-Ja-j])", re.IGNORECASE)
_BEFORE_ANSWER = re.compile(r"(?<![A-Za-z])([A-Fa-f])[\s)\]】）]*</answer>", re.IGNORECASE)
_BEFORE_THINK = re.compile(r"(?<![A-Za-z])([A-Fa-f])[\s)\]】）]*</think>", re.IGNORECASE)
_LINE_LETTER = re.compile(r"[\s*_`>(\[【（#-]*([A-Fa-f])[\s*_`.．:：)\]】）、]*\Z")
_LINE_START = re.compile(r"\s*([A-Fa-f])[.．:：)\]】、-]\s")
_OPTION_LINE = re.compile(r"[*\s_>-]*option\s*[A-J]\s*[:：]", re.IGNORECASE)
_ALONE = re.compile(r"(?<![A-Za-z])([A-F])(?=\Z|\s|[.．,，:：;；)\]】）}、!！?？。*`\"'<])")
_FINAL = re.compile(
    r"(?:final answer|the answer is|answer(?: is)?|correct answer|答案|最终答案|结论|所以|因此|我选择?|选择|选)"
    r"\s*(?:[:：>＝=]\s*)?(?:[(\[【（]\s*)?([A-F])\b",
    re.IGNORECASE,
)


def _scan_lines(text: str) -> str | None:
    """The last six lines, bottom up: a line that is, or starts with, or holds exactly one letter."""
    for line in reversed(text.split("\n")[-6:]):
        if not line.strip() or _OPTION_LINE.match(line):
            continue
        if found := _LINE_LETTER.match(line) or _LINE_START.match(line):
            return upper(found.group(1))
        letters = set(_ALONE.findall(line))
        if len(letters) == 1:
            return str(letters.pop())
    return None


def after_think(text: str) -> str:
    """Text after the last ``</think>``, else after the last ``<think>``, else all of it."""
    for tag in ("</think>", "<think>"):
        if tag in text:
            return text.rpartition(tag)[2]
    return text


def easi_match(text: str, options: Options) -> str | None:  # noqa: ARG001
    """EASI: tags first, then the last lines, then answer phrases, then the only stand-alone letter A-F."""
    text = _INVISIBLE.sub("", text.strip())
    closing = lower(text).rfind("</answer>")
    for found in _TAG.finditer(text):
        if found.end() <= closing:
            return upper(found.group(1))
    tail = text[-800:]
    for pattern in (_BEFORE_ANSWER, _BEFORE_THINK):
        if hit := pattern.search(tail):
            return upper(hit.group(1))
    for part in (after_think(text), tail):
        if letter := _scan_lines(part):
            return letter
    if hit := _FINAL.search(text):
        return upper(hit.group(1))
    lines = [line for line in text.split("\n") if not _OPTION_LINE.match(line)]
    letters = set(re.findall(r"\b([A-F])\b", "\n".join(lines)))
    return letters.pop() if len(letters) == 1 else None


# --------------------------------------------------------------------------------------------------- numbers

_UNITS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
    "twenty",
]
_WORDS = {word: value for value, word in enumerate(_UNITS)}
_TENS = ["thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_WORDS |= {word: 10 * value for value, word in enumerate(_TENS, start=3)}
_SCALES = {"hundred": 100, "thousand": 1000}
_NUMBER = r"[-+]?(?:\d*\.\d+|\d+)(?:[eE][-+]?\d+)?"


def _finite(text: str) -> float | None:
    """``float(text)`` if that is a finite number."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def float_first_word(text: str) -> float | None:
    """VSI-Bench official: Python's ``float`` of the first token."""
    return _finite(first_token(text))


def _word_value(words: list[str]) -> int:
    """Value of a run of number words: "two hundred and five" is 205, "three thousand one" is 3001."""
    total = current = 0
    for word in words:
        if word == "hundred":
            current = max(current, 1) * 100
        elif word == "thousand":
            total, current = total + max(current, 1) * 1000, 0
        elif word != "and":
            current += _WORDS[word]
    return total + current


_NUMBER_WORD = "|".join(sorted([*_WORDS, *_SCALES], key=len, reverse=True))
_RUN = re.compile(rf"\b(?:{_NUMBER_WORD})\b(?:[\s-]+(?:and\s+)?(?:{_NUMBER_WORD})\b)*")


def first_number_or_words(text: str) -> float | None:
    """VSI-Bench in lmms-eval: the first numeral or run of English number words, whichever starts first."""
    text = lower(text)
    numeral = re.search(r"-?\d+(?:\.\d+)?", text)
    run = _RUN.search(text)
    if run and (numeral is None or run.start() < numeral.start()):
        value = _word_value(re.findall("[a-z]+", run.group()))
        return float(value) if value < 10**18 else None  # "hundred hundred hundred ..."
    return _finite(numeral.group()) if numeral else None


def last_number(text: str) -> float | None:
    """EASI: a literal list's first element; an ``<answer>`` number; else the last number after the thinking."""
    text = text.strip()
    if text.startswith("[") and text.endswith("]"):
        try:
            values = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return None
        if not isinstance(values, list) or not values:
            return None
        text = str(values[0])
    text = re.sub(
        rf"\b(?:{'|'.join(_UNITS)})\b",
        lambda found: str(_WORDS[lower(found.group())]),
        text,
        flags=re.IGNORECASE,
    )
    tagged = re.search(rf"<answer>\s*({_NUMBER})[^0-9]*</answer>", text, re.IGNORECASE)
    if tagged:
        return _finite(tagged.group(1))
    numbers = re.findall(_NUMBER, after_think(text))
    return _finite(numbers[-1]) if numbers else None


def last_number_plain(text: str) -> float | None:
    """Counting in InternSpatial-Bench: the last plain numeral; words and thousands separators are not read."""
    numbers = re.findall(r"-?\d+(?:\.\d+)?", text)
    return _finite(numbers[-1]) if numbers else None
