"""General visual questions, as a check that nothing was forgotten: RealWorldQA, MMStar, MMMU."""

import re
from collections.abc import Callable
from itertools import count

from spatialvlm.errors import DataError
from spatialvlm.evaluation.benchmarks.multiview import images, inline_options
from spatialvlm.evaluation.extract import (
    ChoiceExtractor,
    lower,
    mmmu_style,
    ranked,
    vlmk_infer,
)
from spatialvlm.evaluation.prompts import ANSWER_LETTER, generic, join_options
from spatialvlm.evaluation.protocols import (
    by_protocol,
    choice_judge,
    judge_choice,
    macro_by_type,
    micro,
)
from spatialvlm.evaluation.schema import (
    BenchmarkSpec,
    Item,
    Judge,
    Media,
    Row,
    Verdict,
    as_list,
    bare_letter,
    choice_item,
    letter_columns,
    lettered,
    present,
)


def _plain(text: str) -> str:
    return lower(text).strip().rstrip(".")


def text_or_choice(extractors: dict[str, ChoiceExtractor]) -> Callable[[str], Judge]:
    """Letters by the protocol's extractor; other golds by equality of the plain text."""

    def for_protocol(protocol: str) -> Judge:
        def judge(item: Item, text: str) -> Verdict:
            if item.kind == "choice":
                return judge_choice(item, text, extractors[protocol])
            answer = _plain(text)
            golds = [_plain(str(gold)) for gold in item.gold]
            return Verdict(answer, float(answer in golds), not answer)

        return judge

    return for_protocol


def _parse_realworldqa(row: Row, item_id: str) -> Item:
    answer = str(row["answer"]).strip()
    _, options = inline_options(str(row.get("question") or ""))
    if answer in tuple("ABCDEF"):
        return choice_item(row, item_id, answer, options, "choice")
    return Item(item_id, "text", (answer,), "text", f"item:{item_id}", row=row)


REALWORLDQA = BenchmarkSpec(
    name="realworldqa",
    title="RealWorldQA",
    columns=("answer",),
    parse=_parse_realworldqa,
    judge=text_or_choice(by_protocol(ranked, easi=vlmk_infer)),
    summarise=micro,
    prompt=lambda item, _: str(item.row["question"]).strip(),
    media=images,
    max_new_tokens=16,
)


def _parse_mmstar(row: Row, item_id: str) -> Item:
    options = letter_columns(row) or inline_options(str(row.get("question") or ""))[1]
    letter = bare_letter(row["answer"])
    return choice_item(row, item_id, letter, options, row["l2_category"], category=row["category"])


MMSTAR = BenchmarkSpec(
    name="mmstar",
    title="MMStar",
    columns=("answer", "category", "l2_category"),
    id_key="index",
    parse=_parse_mmstar,
    judge=choice_judge(by_protocol(ranked, easi=vlmk_infer)),
    summarise=macro_by_type("mean over l2 categories"),
    prompt=lambda item, protocol: (
        generic(str(item.row["question"]), item.options)
        if protocol == "easi"
        else f"{item.row['question']}\n{ANSWER_LETTER}"
    ),
    media=images,
    max_new_tokens=1024,
    expected_n=1500,
)


_NUMBERED = re.compile(r"<image (\d+)>")
"""A picture of MMMU by its number, in questions and options."""


def _parse_mmmu(row: Row, item_id: str) -> Item:
    subject = "_".join(item_id.split("_")[1:-1]) or "all"
    if str(row["question_type"]) == "open":
        golds = tuple(map(str, as_list(row["answer"])))
        return Item(item_id, "text", golds, subject, f"item:{item_id}", row=row)
    return choice_item(row, item_id, bare_letter(row["answer"]), lettered(row["options"]), subject)


def _prompt_mmmu(item: Item, protocol: str) -> str:
    text = str(item.row["question"])
    if item.kind == "text":
        text = f"{text}\nAnswer the question using a single word or phrase."
    elif protocol == "easi":
        text = generic(text, item.options)
    else:
        text = f"{text}\n{join_options(item.options)}\n{ANSWER_LETTER}"
    return _NUMBERED.sub("<image>", text)


def _media_mmmu(row: Row) -> tuple[Media, ...]:
    """Pictures in the order in which question and options name them, then those that nothing names."""
    columns = [n for n in range(1, 10) if present(row.get(f"image_{n}"))]
    pictures = dict(zip(columns or count(1), images(row), strict=False))
    asked = [str(row["question"])]
    if str(row["question_type"]) != "open":
        asked += lettered(row["options"]).values()
    named = [int(number) for text in asked for number in _NUMBERED.findall(text)]
    if absent := sorted(set(named) - set(pictures)):
        raise DataError(
            f"item {row['id']} names <image {absent[0]}>, its pictures are {list(pictures)}. "
            "Check the image columns of the benchmark file."
        )
    rest = [number for number in pictures if number not in named]
    return tuple(pictures[number] for number in [*named, *rest])


MMMU = BenchmarkSpec(
    name="mmmu",
    title="MMMU (validation)",
    columns=("answer", "options", "question_type"),
    id_key="id",
    parse=_parse_mmmu,
    judge=text_or_choice(by_protocol(mmmu_style, easi=vlmk_infer)),
    summarise=micro,
    prompt=_prompt_mmmu,
    media=_media_mmmu,
    max_new_tokens=1024,
    notes=dict.fromkeys(
        ("official", "lmms", "easi"),
        ("open answers by equality of the plain text", "prompt_parity: false"),
    ),
)

SPECS = (REALWORLDQA, MMSTAR, MMMU)
