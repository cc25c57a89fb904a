"""Pictures and short clips: BLINK, CV-Bench, EmbSpatial-Bench, SITE-Bench, SpaCE-10."""

from collections.abc import Sequence

from spatialvlm.errors import DataError
from spatialvlm.evaluation.benchmarks.multiview import images
from spatialvlm.evaluation.extract import (
    blink_rule,
    easi_match,
    leading_letter,
    mmmu_style,
    space10_set,
    vlmk_infer,
)
from spatialvlm.evaluation.metrics import caa, correct_rate
from spatialvlm.evaluation.prompts import generic, join_options, site_text
from spatialvlm.evaluation.protocols import (
    BOTH_FAIL,
    JUDGE_FREE,
    by_protocol,
    choice_judge,
    macro_by_type,
    mean_over,
    micro,
    rates,
)
from spatialvlm.evaluation.schema import (
    LETTERS,
    BenchmarkSpec,
    Item,
    Media,
    Row,
    Scored,
    Summary,
    as_list,
    bare_letter,
    choice_gold,
    choice_item,
    cluster_of,
    letter_columns,
    lettered,
    one_of,
    present,
)

_NOTE = (
    "Note: You only need to respond with A, B, … without providing any additional information.\n"
)


def _choices(row: Row) -> dict[str, str]:
    """Options of a row; without the column every letter is accepted."""
    return lettered(row["choices"]) if present(row.get("choices")) else dict.fromkeys("ABCDEF", "")


# ----------------------------------------------------------------------------------------------------- BLINK

BLINK_TASKS = (
    "Art_Style", "Counting", "Forensic_Detection", "Functional_Correspondence", "IQ_Test", "Jigsaw",
    "Multi-view_Reasoning", "Object_Localization", "Relative_Depth", "Relative_Reflectance",
    "Semantic_Correspondence", "Spatial_Relation", "Visual_Correspondence", "Visual_Similarity",
)  # fmt: skip


def _parse_blink(row: Row, item_id: str) -> Item:
    task = item_id.removeprefix("val_").rpartition("_")[0] or str(row.get("sub_task") or "")
    return choice_item(row, item_id, bare_letter(row["answer"]), _choices(row), task)


def _summarise_blink(scored: Sequence[Scored], protocol: str) -> Summary:
    if protocol == "easi":
        return micro(scored, protocol)
    return macro_by_type("macro of 14 sub-tasks", BLINK_TASKS)(scored, protocol)


def _noted(item: Item, protocol: str, gap: str = "") -> str:
    prompt = str(item.row["prompt"])
    if protocol == "official":
        return prompt
    if protocol == "lmms":
        return f"{_NOTE}{gap}{prompt}"
    return generic(str(item.row.get("question") or prompt), item.options)


BLINK = BenchmarkSpec(
    name="blink",
    title="BLINK (val)",
    columns=("answer",),
    id_key="idx",
    parse=_parse_blink,
    judge=choice_judge(by_protocol(blink_rule, leading_letter, vlmk_infer)),
    summarise=_summarise_blink,
    prompt=_noted,
    media=images,
    max_new_tokens=1024,
    expected_n=1901,
    notes={"official": (JUDGE_FREE,), "easi": (BOTH_FAIL,)},
)

# -------------------------------------------------------------------------------------------------- CV-Bench

_CV_PATH = {"ADE20K": ("2D", "ADE20K"), "COCO": ("2D", "COCO"), "Omni3D": ("3D", "Omni3D")}


def _parse_cv(row: Row, item_id: str) -> Item:
    source = one_of(str(row["source"]), _CV_PATH, "source", item_id)
    letter, options = bare_letter(row["answer"]), _choices(row)
    return choice_item(row, item_id, letter, options, row["task"], category=source)


def _summarise_cv(scored: Sequence[Scored], protocol: str) -> Summary:  # noqa: ARG001
    source = rates(scored, lambda item: item.category, tuple(_CV_PATH))
    headline = mean_over(scored, lambda item: _CV_PATH[item.category])
    missing = tuple(sorted(set(_CV_PATH) - set(source)))
    extra = {"source": source, "acc_3d": source.get("Omni3D")}
    return Summary("½((ADE20K + COCO)/2 + Omni3D)", headline, extra, missing)


CV_BENCH = BenchmarkSpec(
    name="cv_bench",
    title="CV-Bench",
    columns=("answer", "source", "type", "task"),
    id_key="idx",
    parse=_parse_cv,
    judge=choice_judge(by_protocol(vlmk_infer, leading_letter, vlmk_infer)),
    summarise=_summarise_cv,
    prompt=lambda item, protocol: _noted(item, protocol, "\n"),
    media=images,
    max_new_tokens=1024,
    expected_n=2638,
    notes={"official": (BOTH_FAIL,), "easi": (BOTH_FAIL,)},
)

# ------------------------------------------------------------------------------------------------ EmbSpatial


def _parse_emb(row: Row, item_id: str) -> Item:
    index = int(row["answer"])
    return choice_item(
        row,
        item_id,
        LETTERS[index] if 0 <= index < len(LETTERS) else str(index),
        lettered(row["answer_options"]),
        row["relation"],
        cluster=cluster_of(row, ("data_source", "scene_id"), item_id),
        category=row["data_source"],
    )


def _summarise_emb(scored: Sequence[Scored], protocol: str) -> Summary:  # noqa: ARG001
    return Summary(
        "micro", mean_over(scored), {"source": rates(scored, lambda item: item.category)}
    )


def _prompt_emb(item: Item, protocol: str) -> str:
    question = str(item.row["question"])
    if protocol == "lmms":
        note = "Note: You only need to respond with A, B, C, D without providing any additional information."
        return f"{note}\n{question}\n{join_options(item.options, '{x}) {text}')}"
    return site_text(question, item.options)


EMBSPATIAL = BenchmarkSpec(
    name="embspatial",
    title="EmbSpatial-Bench",
    columns=("answer", "answer_options", "relation", "data_source"),
    id_key="question_id",
    parse=_parse_emb,
    judge=choice_judge(by_protocol(easi_match, leading_letter)),
    summarise=_summarise_emb,
    prompt=_prompt_emb,
    media=images,
    max_new_tokens=1024,
    cluster_columns=("data_source", "scene_id"),
    expected_n=3640,
    notes={"official": ("no_official_prompt: EASI's text and extractor",)},
)

# ------------------------------------------------------------------------------------------------- SITE-Bench


def parse_site(row: Row, item_id: str, default_options: int | None = None) -> Item:
    """A row of SITE-Bench; chance-adjusted accuracy needs the number of its options.

    Args:
        row: Of the file.
        item_id: Id.
        default_options: Assume this many options where they do not parse; ``None`` = an error.

    Raises:
        DataError: Options that do not parse, or a gold letter that is not offered.
    """
    options = lettered(row["options"])
    if len(options) < 2 and default_options is not None:
        options = dict.fromkeys(LETTERS[:default_options], "")
    if len(options) < 2:
        raise DataError(
            f"item {item_id}: options {row['options']!r} do not parse to at least two; chance-adjusted "
            "accuracy needs their number; fix the row, or pass --caa-default-options 4 as EASI assumes"
        )
    visual = as_list(row.get("visual"))
    return choice_item(
        row,
        item_id,
        bare_letter(row["answer"]),
        options,
        str(row["category"]).lower(),
        cluster=str(visual[0]) if visual else "",
        category=row["dataset"],
    )


def _summarise_site(scored: Sequence[Scored], protocol: str) -> Summary:  # noqa: ARG001
    def adjusted(part: Sequence[Scored]) -> dict[str, float]:
        scores = [s.verdict.score for s in part]
        value = caa(scores, [len(s.item.options) for s in part], range(len(part))).value
        return {"acc": correct_rate(scores), "caa": value, "n": len(part)}

    headline = caa(
        [s.verdict.score for s in scored],
        [len(s.item.options) for s in scored],
        [s.item.cluster for s in scored],
    )
    names = sorted({s.item.question_type for s in scored})
    per_category = {
        name: adjusted([s for s in scored if s.item.question_type == name]) for name in names
    }
    return Summary("CAA pooled", headline, {"overall": adjusted(scored), "category": per_category})


_VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm")


def _site_media(row: Row) -> tuple[Media, ...]:
    paths = [str(path) for path in as_list(row.get("visual"))]
    return tuple(
        Media("video" if path.lower().endswith(_VIDEOS) else "image", path) for path in paths
    )


def _prompt_site(item: Item, protocol: str) -> str:  # noqa: ARG001
    text = site_text(str(item.row["question"]), item.options)
    media = _site_media(item.row)
    if any(medium.kind == "video" for medium in media):
        head = (
            "Select the best answer to the following multiple-choice question based on the video. "
            "Respond with only the letter of the correct option.\n"
        )
        return head + text.replace("<image>", "")
    return text if "<image>" in text else "<image>" * len(media) + "\n" + text


SITE = BenchmarkSpec(
    name="site",
    title="SITE-Bench",
    columns=("options", "answer", "category", "dataset"),
    parse=parse_site,
    judge=choice_judge(by_protocol(mmmu_style, easi=easi_match)),
    summarise=_summarise_site,
    prompt=_prompt_site,
    media=_site_media,
    max_new_tokens=1024,
    cluster_columns=("visual",),
    notes=dict.fromkeys(
        ("official", "lmms"), ("unreadable answers are wrong, upstream guesses without a seed",)
    ),
    mean_of_items=False,
)

# --------------------------------------------------------------------------------------------------- SpaCE-10


def _parse_space10(row: Row, item_id: str) -> Item:
    options = letter_columns(row, "ABCDEF") or dict.fromkeys("ABCDEF", "")
    letters = sorted(set(str(row["answer"]).strip().upper()))
    for letter in letters:
        choice_gold(letter, options, item_id)
    if not 1 <= len(letters) <= 2:
        raise DataError(f"item {item_id}: gold {row['answer']!r} must be one or two letters")
    kind = "single" if len(letters) == 1 else "double"
    return Item(
        item_id, "set", "".join(letters), kind, f"item:{item_id}", options,
        str(row.get("category") or ""), row=row,
    )  # fmt: skip


def _summarise_space10(scored: Sequence[Scored], protocol: str) -> Summary:  # noqa: ARG001
    extra = rates(scored, lambda item: item.question_type, ("single", "double"))
    return Summary("accuracy over all", mean_over(scored), extra)


def _prompt_space10(item: Item, protocol: str) -> str:  # noqa: ARG001
    last = (
        "You need to choose two options."
        if item.question_type == "double"
        else "You only need to output one choice, not multiple choices."
    )
    return (
        f"{item.row['question']} There are several options:\n{join_options(item.options)}\n\n"
        f"Please use the letters provided as the answer. {last}"
    )


SPACE10 = BenchmarkSpec(
    name="space10",
    title="SpaCE-10",
    columns=("answer",),
    id_key="index",
    parse=_parse_space10,
    judge=choice_judge(by_protocol(space10_set)),
    summarise=_summarise_space10,
    prompt=_prompt_space10,
    media=images,
    max_new_tokens=256,
    notes={
        "official": (JUDGE_FREE,),
        "lmms": ("lmms-eval has no task: the official rules",),
        "easi": ("EASI has no task: the official rules",),
    },
)

SPECS = (BLINK, CV_BENCH, EMBSPATIAL, SITE, SPACE10)
