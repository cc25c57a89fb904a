"""General visual questions, as a check that nothing was forgotten: RealWorldQA, MMStar, MMMU."""

from collections.abc import Callable

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
    Row,
    Verdict,
    as_list,
    bare_letter,
    choice_item,
    letter_columns,
    lettered,
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


def _parse_mmmu(row: Row, item_id: str) -> Item:
    subject = "_".join(item_id.split("_")[1:-1]) or "all"
    if str(row["question_type"]) == "open":
        golds = tuple(map(str, as_list(row["answer"])))
        return Item(item_id, "text", golds, subject, f"item:{item_id}", row=row)
    return choice_item(row, item_id, bare_letter(row["answer"]), lettered(row["options"]), subject)


def _prompt_mmmu(item: Item, protocol: str) -> str:
    text = str(item.row["question"])
    for number in range(1, 10):
        text = text.replace(f"<image {number}>", "<image>")
    if item.kind == "text":
        return f"{text}\nAnswer the question using a single word or phrase."
    if protocol == "easi":
        return generic(text, item.options)
    return f"{text}\n{join_options(item.options)}\n{ANSWER_LETTER}"


MMMU = BenchmarkSpec(
    name="mmmu",
    title="MMMU (validation)",
    columns=("answer", "options", "question_type"),
    id_key="id",
    parse=_parse_mmmu,
    judge=text_or_choice(by_protocol(mmmu_style, easi=vlmk_infer)),
    summarise=micro,
    prompt=_prompt_mmmu,
    media=images,
    max_new_tokens=1024,
    notes=dict.fromkeys(
        ("official", "lmms", "easi"),
        ("open answers by equality of the plain text", "prompt_parity: false"),
    ),
)

SPECS = (REALWORLDQA, MMSTAR, MMMU)
