"""Edge cases every extractor must reproduce, and properties on arbitrary text."""

import random
import signal
from contextlib import contextmanager
from dataclasses import replace

import pytest

from spatialvlm.evaluation import extract as ex
from spatialvlm.evaluation import structured as st
from spatialvlm.evaluation.benchmarks import rows
from spatialvlm.evaluation.benchmarks.global_map import parse_map
from spatialvlm.evaluation.schema import Item

FOUR = {"A": "chair", "B": "bed", "C": "sofa", "D": "table"}

# text: first_token, backtick, mindcube, last_line, leading, ranked, easi, mmmu_style
CHOICES = {
    "a": ("a", None, None, "A", "A", None, "A", None),
    "(A)": ("(A)", "A", "A", "A", "A", "A", "A", "A"),
    " A": ("", "A", "A", "A", "A", "A", "A", "A"),
    "A.\n": ("A.", "A", "A", None, "A", "A", "A", "A"),
    "The answer is B.": ("The", "B", "B", "B", "T", "B", "B", "B"),
    "<think>A or B?</think>\nC": (None, "B", "C", "C", None, "C", "C", None),
    "A chair is left of the bed, so B.": ("A", "B", "B", "A", "A", "A", None, "A"),
    "B\n\nExplanation: A is too far": (None, "B", "B", "A", "B", "B", "A", "A"),
    "A or B": ("A", "B", "A", "A", "A", "A", None, "B"),
    "**C**": (None, "C", "C", "C", None, "C", "C", None),
    "E": ("E", None, "E", None, "E", None, "E", None),
    "I don't know": ("I", None, None, None, "I", None, None, None),
}
EXTRACTORS = (
    ex.backtick_letter,
    ex.mindcube,
    ex.last_line_letter,
    ex.leading_letter,
    ex.ranked,
    ex.easi_match,
    ex.mmmu_style,
)
ALL_CHOICE = (*EXTRACTORS, ex.first_token_letter, ex.backtick_letter_ci, ex.blink_rule, ex.dsr3, ex.space10_set, ex.vlmk_infer)  # fmt: skip

NUMBERS = {
    "3 m": (3, 3, 3),
    "3m": (None, 3, 3),
    "three": (None, 3, 3),
    "1,200": (None, 1, 200),
    "2-3": (None, 2, -3),
    "1e2": (100, 1, 100),
    "<think>5</think>4": (None, 5, 4),
    "3 7": (3, 3, 7),
    "3.5 meters (11.5 feet)": (3.5, 3.5, 11.5),
    ".5": (0.5, 5, 0.5),
    "twenty-one": (None, 21, -1),
    "1_000": (1000, 1, 0),
    "nan": (None, None, None),
    "inf": (None, None, None),
    "two hundred and five": (None, 205, 5),
    "three thousand and one": (None, 3001, 1),
    "[4, 5]": (None, 4, 4),
    "[4, chairs]": (None, 4, None),
}


@pytest.mark.parametrize("text", CHOICES)
def test_choice_edges(text):
    first, *others = CHOICES[text]
    assert [fn(text, FOUR) for fn in EXTRACTORS] == others
    if first is not None:
        # the raw token; a trailing newline is white space that the rule strips last
        assert ex.first_token(text) == first.strip()


@pytest.mark.parametrize(
    ("text", "letter"), [("a", "A"), ("A.", "A"), ("E", None), ("(A)", None), ("I don't", None)]
)
def test_first_token_counts_only_offered_letters(text, letter):
    assert ex.first_token_letter(text, FOUR) == letter


@pytest.mark.parametrize("text", NUMBERS)
def test_number_edges(text):
    found = tuple(
        fn(text) for fn in (ex.float_first_word, ex.first_number_or_words, ex.last_number)
    )
    assert found == NUMBERS[text]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B.", None),
        ("Look: (A) or (B).\n\nSo (B) it is", "B"),
        ("(A) and (B)", None),
        ("(A) fits\n\nyes", "A"),
    ],
)
def test_blink_rule(text, letter):
    assert ex.blink_rule(text, FOUR) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("I see the chair.", "A"),
        ("chair or bed", None),
        ("Failed to obtain answer via API. A", None),
        ("Cannot determine the answer", ex.REFUSED),
        ("the answer is **b, unlike A or C or anything else I have seen so far in it", "B"),
        ("A long text that names only the sofa " * 3, None),
        ("Z", ex.REFUSED),
    ],
)
def test_vlmk_infer(text, letter):
    assert ex.vlmk_infer(text, FOUR) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("<answer>about B</answer>", "A"),
        ("<answer> (B) </answer>", "B"),
        ("答案是C", "C"),
        ("\ufeffB\u200b", "B"),
        ("option A: bed\noption B: sofa\nI take B", "B"),
        ("we weigh A, B\nfinal answer: D or so", "D"),
    ],
)
def test_easi_match(text, letter):
    assert ex.easi_match(text, FOUR) == letter


@pytest.mark.parametrize(
    ("text", "letters"), [("A. D.", "AD"), ("AD", None), ("B", "B"), ("D. then A.", "AD")]
)
def test_space10_set(text, letters):
    assert ex.space10_set(text, FOUR) == letters


def test_backtick_ci_reads_braces():
    assert ex.backtick_letter_ci("{b}", FOUR) == "B"
    assert ex.backtick_letter_ci("``f``", FOUR) == "F"
    assert ex.backtick_letter("{b}", FOUR) is None


def test_optional_prefixes_change_nothing():
    for letter in FOUR:
        for wrap in ("{}", "{}.", "({})", "The answer is {}.", "Answer: {}"):
            text = wrap.format(letter)
            assert ex.easi_match(text, FOUR) == letter
            assert ex.mindcube(text, FOUR) == letter
            assert ex.ranked(text, FOUR) == letter


@contextmanager
def limit(seconds):
    """Fail a call that does not end; linear code needs a thousandth of the bound."""

    def stop(*_):
        raise TimeoutError

    old = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


NASTY = ["*", "<answer>A", "9", " ", "\n", "A", "a.", "(", "[", "[1,", "`", "{", "-", "1e", "one ", "hundred ",
         "answer is ", "<think>", "the answer is *", "option A: ", ".", "\\", "</answer", "選", "1,", "A "]  # fmt: skip


@pytest.mark.parametrize("piece", NASTY)
def test_long_runs_stay_linear(piece):
    text = (piece * 100_000)[:100_000]  # quadratic code needs minutes
    calls = [
        *(lambda fn=fn: fn(text, FOUR) for fn in ALL_CHOICE),
        lambda: ex.float_first_word(text),
        lambda: ex.first_number_or_words(text),
        lambda: ex.last_number(text),
        lambda: ex.last_number_plain(text),
        lambda: st.parse_cell(text),
        lambda: st.parse_box7(text),
        lambda: st.parse_rotation(text),
    ]
    for call in calls:
        with limit(20.0):
            call()


def test_a_bracket_with_endless_digits_is_no_answer():
    """A model that repeats one digit: read in linear time, and no number too long for Python ends the scoring."""
    for digits in (400, 100_000):
        text = "[" + "9" * digits
        gold = {"deg": 0.0, "unsigned": False}
        item = Item("1", "list", ["a"], "t", "s")
        with limit(20.0):
            assert st.parse_cell(text) is None
            assert st.parse_box7(text) is None
            assert parse_map(f'{{"chair": {text}, 1]}}') is None
            assert rows.judge(item, text + "]").score == 0
            assert rows.judge(replace(item, kind="angle", gold=gold), text).score == 0


def test_any_text_is_accepted():
    rng = random.Random(0)
    alphabet = "AaBbZ .:*`<>/()[]{}0123456789-+eE\n\t答案选é￼\x00𝟘" + "answerthink"
    for _ in range(1500):
        text = "".join(rng.choices(alphabet, k=rng.randint(0, 60)))
        for fn in ALL_CHOICE:
            found = fn(text, FOUR)
            assert found is None or isinstance(found, str)
        for number in (
            ex.float_first_word,
            ex.first_number_or_words,
            ex.last_number,
            ex.last_number_plain,
            st.parse_rotation,
        ):
            value = number(text)
            assert value is None or abs(value) < float("inf")
        for group in (st.parse_cell(text), st.parse_box7(text)):
            assert group is None or all(abs(v) < float("inf") for v in group)
