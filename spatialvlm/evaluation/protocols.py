"""Judges and summaries that several benchmarks share.

A judge reads one answer and scores it. Which extractor a judge uses depends on the protocol: ``official`` is
the benchmark authors' scorer, ``lmms`` the behaviour of lmms-eval 0.7.3, ``easi`` that of EASI and VLMEvalKit.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from spatialvlm.errors import DataError
from spatialvlm.evaluation.extract import REFUSED, ChoiceExtractor, NumberExtractor
from spatialvlm.evaluation.metrics import Estimate, correct_rate, estimate, mra
from spatialvlm.evaluation.schema import PROTOCOLS, Item, Judge, Scored, Summary, Verdict

T = TypeVar("T")

JUDGE_FREE = (
    "steps that ask a judge model are replaced by the offline rule; undecided answers are unparsed"
)
BOTH_FAIL = (
    "an unreadable answer is wrong, also where upstream compares two failed extractions as equal"
)


def by_protocol(official: T, lmms: T | None = None, easi: T | None = None) -> dict[str, T]:
    """One value per protocol; ``lmms`` and ``easi`` default to ``official``."""
    given = (official, lmms, easi)
    return {
        name: official if value is None else value
        for name, value in zip(PROTOCOLS, given, strict=True)
    }


def judge_choice(item: Item, text: str, extractor: ChoiceExtractor) -> Verdict:
    """Compare the extracted letter (or letters) with the gold."""
    letter = extractor(text, item.options)
    unparsed = letter is None or letter == REFUSED
    return Verdict(letter, float(not unparsed and letter == item.gold), unparsed)


def judge_number(item: Item, text: str, extractor: NumberExtractor, *, signed: bool) -> Verdict:
    """Mean relative accuracy of the extracted number.

    Raises:
        DataError: The gold is not positive and the protocol divides by it.
    """
    if signed and item.gold <= 0:
        raise DataError(
            f"item {item.id}: gold {item.gold} is not positive (MRA undefined); "
            "check the benchmark file, or score with --protocol easi"
        )
    value = extractor(text)
    if value is None:
        return Verdict(None, 0.0, True)
    score = float(mra(value, item.gold, signed=signed)[0])
    return Verdict(value, score, False)


def strictly(item: Item, verdict: Verdict, *, signed: bool) -> Verdict:
    """The same verdict with ``<`` in place of ``<=`` in the mean relative accuracy of a number."""
    if item.kind != "number" or verdict.unparsed or (signed and item.gold <= 0):
        return verdict
    score = float(mra(verdict.extracted, item.gold, strict=True, signed=signed)[0])
    return replace(verdict, score=score)


def choice_judge(extractors: Mapping[str, ChoiceExtractor]) -> Callable[[str], Judge]:
    """Judge for benchmarks with options only."""

    def for_protocol(protocol: str) -> Judge:
        return lambda item, text: judge_choice(item, text, extractors[protocol])

    return for_protocol


def mixed_judge(
    choices: Mapping[str, ChoiceExtractor], numbers: Mapping[str, NumberExtractor]
) -> Callable[[str], Judge]:
    """Judge for benchmarks with options and numbers (the VSI family)."""

    def for_protocol(protocol: str) -> Judge:
        def judge(item: Item, text: str) -> Verdict:
            if item.kind == "choice":
                return judge_choice(item, text, choices[protocol])
            return judge_number(item, text, numbers[protocol], signed=protocol != "easi")

        return judge

    return for_protocol


def mean_over(
    scored: Sequence[Scored], path: Callable[[Item], tuple[str, ...] | None] = lambda _: ()
) -> Estimate:
    """Nested unweighted mean of the item scores; ``path`` names each item's cell."""
    return estimate(
        [s.verdict.score for s in scored],
        [s.item.cluster for s in scored],
        [path(s.item) for s in scored],
    )


def rates(
    scored: Sequence[Scored], by: Callable[[Item], str], names: Sequence[str] | None = None
) -> dict[str, float]:
    """Accuracy in percent of every group of items; ``names`` fixes which groups, in which order."""
    groups: dict[str, list[float]] = {}
    for s in scored:
        groups.setdefault(by(s.item), []).append(s.verdict.score)
    return {name: correct_rate(groups[name]) for name in names or sorted(groups) if name in groups}


def micro(scored: Sequence[Scored], protocol: str) -> Summary:  # noqa: ARG001
    """Plain accuracy over items."""
    return Summary("micro", mean_over(scored))


def macro_by_type(
    name: str, expected: Sequence[str] = (), by: Callable[[Item], str] = lambda i: i.question_type
) -> Callable[[Sequence[Scored], str], Summary]:
    """Unweighted mean over question types; expected types that are absent make the result partial."""

    def summarise(scored: Sequence[Scored], protocol: str) -> Summary:  # noqa: ARG001
        have = {by(s.item) for s in scored}
        missing = tuple(sorted(set(expected) - have))
        return Summary(name, mean_over(scored, lambda item: (by(item),)), missing=missing)

    return summarise
