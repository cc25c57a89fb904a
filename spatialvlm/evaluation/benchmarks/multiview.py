"""Questions over several pictures of one place: MMSI, MindCube, ViewSpatial, All-Angles, ERQA."""

import itertools
import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from spatialvlm.evaluation.extract import (
    backtick_letter,
    backtick_letter_ci,
    easi_match,
    last_line_letter,
    mindcube,
    ranked,
    vlmk_infer,
)
from spatialvlm.evaluation.metrics import correct_rate
from spatialvlm.evaluation.prompts import ANSWER_LETTER, generic
from spatialvlm.evaluation.protocols import (
    BOTH_FAIL,
    by_protocol,
    choice_judge,
    mean_over,
    micro,
    rates,
)
from spatialvlm.evaluation.schema import (
    BenchmarkSpec,
    Item,
    Media,
    Row,
    Scored,
    Summary,
    as_list,
    bare_letter,
    choice_item,
    letter_columns,
    lettered,
    present,
)

_PLAIN = dict.fromkeys("ABCD", "")
_INLINE = re.compile(r"(?:^|(?<=[\s,;]))([A-F])[:.)]\s+")


def images(row: Row) -> tuple[Media, ...]:
    """Pictures of a row: paths, or ``{bytes, path}`` cells, in ``image_path``, ``images`` or ``image``."""
    for column in ("image_path", "images", "image"):
        found = as_list(row.get(column))
        if found:
            return tuple(as_image(cell) for cell in found)
    numbered = [row[f"image_{n}"] for n in range(1, 10) if present(row.get(f"image_{n}"))]
    return tuple(as_image(cell) for cell in numbered)


def _folder(row: Row) -> str:
    """Folder of the first picture: one scene; empty without pictures."""
    pictures = images(row)
    return str(PurePosixPath(pictures[0].path).parent) if pictures else ""


def as_image(cell: object) -> Media:
    """One picture cell."""
    if isinstance(cell, dict):
        return Media("image", str(cell.get("path") or ""), data=cell.get("bytes"))
    if isinstance(cell, bytes):
        return Media("image", "", data=cell)
    return Media("image", str(cell))


def inline_options(question: str) -> tuple[str, dict[str, str]]:
    """Split "... Options: A: left, B: right" into the question and its options.

    Without a readable list the options are A to D without texts.
    """
    stem, found, listed = question.partition("Options:")
    if not found:
        marks = list(_INLINE.finditer(question))
        stem, listed = (
            (question[: marks[0].start()], question[marks[0].start() :])
            if marks
            else (question, "")
        )
    marks = list(_INLINE.finditer(listed))
    options: dict[str, str] = {}
    for mark, after in itertools.zip_longest(marks, marks[1:]):
        text = listed[mark.end() : after.start() if after else len(listed)]
        options.setdefault(mark.group(1), text.strip().rstrip(",").strip())
    return stem.strip(), options if len(options) > 1 else dict(_PLAIN)


# ------------------------------------------------------------------------------------------------------ MMSI

_BACKTICKS = f"{ANSWER_LETTER}. Enclose the option's letter within ``."


def _parse_mmsi(row: Row, item_id: str) -> Item:
    _, options = inline_options(str(row.get("question") or ""))
    kind = re.sub(r"(Cam|Obj|Reg)\.-", r"\1.–", str(row["question_type"]))
    return choice_item(row, item_id, bare_letter(row["answer"]), options, kind)


def _prompt_mmsi(item: Item, protocol: str) -> str:
    question = str(item.row["question"])
    if protocol == "lmms":
        return question.strip()
    if protocol == "easi":
        stem, options = inline_options(question)
        listed = "".join(f"{x}: {text}, " for x, text in options.items())
        return f"{stem}\nOptions: {listed}\n{_BACKTICKS}"
    return f"{question}\n{_BACKTICKS}"


MMSI = BenchmarkSpec(
    name="mmsi",
    title="MMSI-Bench",
    columns=("answer", "question_type"),
    id_key="id",
    parse=_parse_mmsi,
    judge=choice_judge(by_protocol(backtick_letter, backtick_letter_ci, easi_match)),
    summarise=micro,
    prompt=_prompt_mmsi,
    media=images,
    max_new_tokens=2048,
    expected_n=1000,
    same_scene=True,
)

# -------------------------------------------------------------------------------------------------- MindCube

SETTINGS = ("around", "rotation", "translation", "among")
_MINDCUBE_SHORT = (
    "Look at the views of one scene and answer with the letter of the correct option.\n\n"
)


def mindcube_setting(item_id: str) -> str:
    """The first setting named in the id, else ``other``."""
    folded = item_id.lower()
    return next((setting for setting in SETTINGS if setting in folded), "other")


def mindcube_type_lmms(item_id: str) -> str:
    """lmms-eval's type: the id's part before its first underscore."""
    prefix = item_id.lower().partition("_")[0]
    return {"aroundnew": "around"}.get(prefix, prefix)


def _parse_mindcube(row: Row, item_id: str) -> Item:
    _, options = inline_options(str(row.get("question") or ""))
    gold = bare_letter(row["gt_answer"])
    if gold == "E" and "E" not in options:
        options = {**options, "E": ""}
    kind = mindcube_setting(item_id)
    return choice_item(row, item_id, gold, options, kind, cluster=_folder(row))


def _summarise_mindcube(scored: Sequence[Scored], protocol: str) -> Summary:
    by_setting = {
        name: {"accuracy": correct_rate(hits), "n": len(hits)}
        for name in (*SETTINGS, "other")
        if (hits := [s.verdict.score for s in scored if s.item.question_type == name])
    }
    short = any("question" in s.item.row and not _given_prompt(s.item) for s in scored)
    parity = ("prompt_parity: false, the file has no input_prompt",) if short else ()
    if protocol == "official":
        path = lambda item: None if item.question_type == "translation" else ()  # noqa: E731
        extra: dict[str, Any] = {"settings": by_setting}
        headline = mean_over(scored, path)
        return Summary("micro without translation", headline, extra, deviations=parity)
    by_prefix = rates(scored, lambda item: mindcube_type_lmms(item.id))
    extra = {"settings": by_setting, "id_prefix": by_prefix}
    return Summary("micro", mean_over(scored), extra, deviations=parity)


def _given_prompt(item: Item) -> str:
    """The whole prompt as the file states it, if it does."""
    prompt = item.row.get("input_prompt")
    return str(prompt) if present(prompt) else ""


def _prompt_mindcube(item: Item, protocol: str) -> str:  # noqa: ARG001
    return _given_prompt(item) or f"{_MINDCUBE_SHORT}{item.row['question']}"


def _mindcube(name: str, title: str, expected_n: int) -> BenchmarkSpec:
    return BenchmarkSpec(
        name=name,
        title=title,
        columns=("gt_answer",),
        id_key="id",
        parse=_parse_mindcube,
        judge=choice_judge(by_protocol(mindcube, easi=easi_match)),
        summarise=_summarise_mindcube,
        prompt=_prompt_mindcube,
        media=images,
        max_new_tokens=4096,
        cluster_columns=("images",),
        expected_n=expected_n,
        same_scene=True,
    )


MINDCUBE = _mindcube("mindcube", "MindCube", 21154)
MINDCUBE_TINY = _mindcube("mindcube_tiny", "MindCube-Tiny", 1050)

# ----------------------------------------------------------------------------------------------- ViewSpatial


def _parse_viewspatial(row: Row, item_id: str) -> Item:
    choices = row["choices"]
    lines = as_list(choices)
    if len(lines) == 1:
        lines = [line for line in str(lines[0]).split("\n") if line.strip()]
    pictures = images(row)
    parts = PurePosixPath(pictures[0].path).parts if pictures else ()
    return choice_item(
        row,
        item_id,
        bare_letter(row["answer"]),
        lettered(lines),
        row["question_type"],
        cluster=parts[2] if len(parts) > 2 else "",
    )


def _prompt_viewspatial(item: Item, protocol: str) -> str:
    question, choices = item.row["question"], item.row["choices"]
    if not isinstance(choices, str):
        choices = "\n".join(map(str, choices))
    tail = "\nReply only to the corresponding option.\nAnswer:"
    if protocol == "official":
        return f"{question}{choices}{tail}"
    return f"Question: {question}\nChoices: {choices}{tail}"


VIEWSPATIAL = BenchmarkSpec(
    name="viewspatial",
    title="ViewSpatial-Bench",
    columns=("answer", "choices", "question_type"),
    parse=_parse_viewspatial,
    judge=choice_judge(by_protocol(last_line_letter, easi=easi_match)),
    summarise=micro,
    prompt=_prompt_viewspatial,
    media=images,
    max_new_tokens=100,
    cluster_columns=("image_path",),
    expected_n=5712,
    same_scene=True,
)

# ------------------------------------------------------------------------------------------ All-Angles, ERQA


def _parse_all_angles(row: Row, item_id: str) -> Item:
    letter, options = bare_letter(row["answer"]), letter_columns(row)
    return choice_item(row, item_id, letter, options, row["category"], cluster=_folder(row))


ALL_ANGLES = BenchmarkSpec(
    name="all_angles",
    title="All-Angles-Bench",
    columns=("answer", "category", "A", "B"),
    id_key="index",
    parse=_parse_all_angles,
    judge=choice_judge(by_protocol(vlmk_infer)),
    summarise=micro,
    prompt=lambda item, _: generic(
        item.row["question"], item.options, str(item.row.get("hint") or "")
    ),
    media=images,
    max_new_tokens=4096,
    cluster_columns=("image",),
    expected_n=2132,
    same_scene=True,
    notes={
        "official": (BOTH_FAIL,),
        "lmms": ("lmms-eval has no task: the official rules",),
        "easi": (BOTH_FAIL,),
    },
)


def _parse_erqa(row: Row, item_id: str) -> Item:
    _, options = inline_options(str(row.get("question") or "").replace("Choices:", "Options:"))
    return choice_item(row, item_id, bare_letter(row["answer"]), options, row["question_type"])


def _prompt_erqa(item: Item, protocol: str) -> str:
    """The question with ``<image>`` at the row's character offsets; bad offsets put pictures first."""
    question = str(item.row["question"])
    offsets = [int(at) for at in as_list(item.row.get("visual_indices"))]
    count = len(images(item.row))
    if protocol == "lmms" or len(offsets) != count or not any(offsets):
        return question
    text, done = "", 0
    for at in sorted(offsets):
        text += question[done:at] + "<image>"
        done = at
    return text + question[done:]


ERQA = BenchmarkSpec(
    name="erqa",
    title="ERQA",
    columns=("answer", "question_type"),
    id_key="question_id",
    parse=_parse_erqa,
    judge=choice_judge(by_protocol(ranked, easi=easi_match)),
    summarise=micro,
    prompt=_prompt_erqa,
    media=images,
    max_new_tokens=1024,
)

SPECS = (MMSI, MINDCUBE, MINDCUBE_TINY, VIEWSPATIAL, ALL_ANGLES, ERQA)
