"""VSI-Bench (arXiv 2412.14171), its debiased subset (arXiv 2511.04655), and VSTI-Bench (arXiv 2505.20279)."""

from collections.abc import Sequence
from dataclasses import replace

from spatialvlm.errors import DataError
from spatialvlm.evaluation.extract import (
    easi_match,
    first_number_or_words,
    first_token_letter,
    float_first_word,
    last_number,
)
from spatialvlm.evaluation.metrics import Estimate
from spatialvlm.evaluation.prompts import ANSWER_LETTER, join_options
from spatialvlm.evaluation.protocols import by_protocol, mean_over, mixed_judge, strictly
from spatialvlm.evaluation.schema import (
    BenchmarkSpec,
    Item,
    Media,
    Row,
    Scored,
    Summary,
    as_list,
    choice_item,
    cluster_of,
    lettered,
    number_gold,
    one_of,
)

NUMBERS = (
    "object_abs_distance",
    "object_counting",
    "object_size_estimation",
    "room_size_estimation",
)
CHOICES = (
    "object_rel_direction_easy",
    "object_rel_direction_medium",
    "object_rel_direction_hard",
    "object_rel_distance",
    "route_planning",
    "obj_appearance_order",
)
DIRECTION = "object_rel_direction"

VSTI_NUMBERS = ("camera_obj_abs_dist", "camera_displacement", "camera_obj_dist_change")
VSTI_CHOICES = (
    *(f"obj_obj_relative_pos_{axis}" for axis in ("nf", "ud", "lr")),
    *(f"camera_obj_rel_dist_v{n}" for n in (1, 2, 3)),
    "camera_movement_direction",
)
DEBIASED_N = 2362

_CHOICE = by_protocol(first_token_letter, easi=easi_match)
_NUMBER = by_protocol(float_first_word, first_number_or_words, last_number)


def _parse(row: Row, item_id: str) -> Item:
    kind = one_of(str(row["question_type"]), (*NUMBERS, *CHOICES), "question_type", item_id)
    cluster = cluster_of(row, ("dataset", "scene_name"), item_id)
    if kind in NUMBERS:
        gold = number_gold(row["ground_truth"], item_id)
        return Item(item_id, "number", gold, kind, cluster, row=row)
    letter, options = str(row["ground_truth"]).strip(), lettered(row["options"])
    return choice_item(row, item_id, letter, options, kind, cluster=cluster)


def _parse_vsti(row: Row, item_id: str) -> Item:
    kind = one_of(
        str(row["question_type"]), (*VSTI_NUMBERS, *VSTI_CHOICES), "question_type", item_id
    )
    cluster = cluster_of(row, ("video_path",), item_id)
    if kind in VSTI_NUMBERS:
        gold = number_gold(row["ground_truth"], item_id)
        return Item(item_id, "number", gold, kind, cluster, row=row)
    letter, options = str(row["mc_answer"]).strip(), lettered(row["options"])
    return choice_item(row, item_id, letter, options, kind, cluster=cluster)


def vsi_path(question_type: str) -> tuple[str, ...]:
    """Cell of a VSI type: the three direction levels share one of the eight entries."""
    if question_type.startswith(DIRECTION):
        return DIRECTION, question_type
    return (question_type,)


def _summarise(scored: Sequence[Scored], protocol: str) -> Summary:
    headline = mean_over(scored, lambda item: vsi_path(item.question_type))
    entries: dict[str, float] = {}
    for entry in sorted({vsi_path(s.item.question_type)[0] for s in scored}):
        inside = [s for s in scored if vsi_path(s.item.question_type)[0] == entry]
        entries[entry] = mean_over(inside, lambda item: vsi_path(item.question_type)[1:]).value
    missing = sorted({*NUMBERS, *CHOICES} - {s.item.question_type for s in scored})
    signed = protocol != "easi"
    strict = mean_over(
        [replace(s, verdict=strictly(s.item, s.verdict, signed=signed)) for s in scored],
        lambda item: vsi_path(item.question_type),
    )
    extra = {"entries": entries, "overall_strict_mra": strict.value}
    return Summary("macro of 8", headline, extra, tuple(missing))


def _summarise_vsti(scored: Sequence[Scored], protocol: str) -> Summary:  # noqa: ARG001
    headline = mean_over(scored, lambda item: (item.question_type,))
    missing = sorted({*VSTI_NUMBERS, *VSTI_CHOICES} - {s.item.question_type for s in scored})
    grouped: Estimate = mean_over(scored, lambda item: _vsti_group(item.question_type))
    return Summary("mean of 10 types", headline, {"grouped5": grouped.value}, tuple(missing))


def _vsti_group(question_type: str) -> tuple[str, ...] | None:
    """The five entries of the paper's table; the distance change is not one of them."""
    for prefix in ("obj_obj_relative_pos", "camera_obj_rel_dist"):
        if question_type.startswith(prefix):
            return prefix, question_type
    return None if question_type == "camera_obj_dist_change" else (question_type,)


def _debiased(items: Sequence[Item]) -> Sequence[Item]:
    flags = [item.row.get("pruned") for item in items]
    if all(flag is None for flag in flags):
        if len(items) == DEBIASED_N:
            return items
        raise DataError(
            f"VSI-Debiased: {len(items)} items without a 'pruned' column; use the file of config "
            f"'debiased' ({DEBIASED_N} items) or pass --ids FILE with the published id list"
        )
    kept = [
        item
        for item, flag in zip(items, flags, strict=True)
        if str(flag).lower() not in ("true", "1")
    ]
    if len(kept) != DEBIASED_N:
        raise DataError(
            f"VSI-Debiased: {len(kept)} of {len(items)} items are kept by 'pruned', expected {DEBIASED_N}"
        )
    return kept


def _prompt(item: Item, protocol: str) -> str:
    question = item.row["question"]
    if item.kind == "number":
        last = (
            "Answer briefly and directly in one float number."
            if protocol == "easi"
            else "Please answer the question using a single word or phrase."
        )
        return f"These are frames of a video.\n{question}\n{last}"
    written = as_list(item.row["options"])
    listed = "\n".join(map(str, written)) or join_options(item.options)
    head = "" if protocol == "easi" else "Options:\n"
    return f"These are frames of a video.\n{question}\n{head}{listed}\n{ANSWER_LETTER}."


def _video(row: Row) -> tuple[Media, ...]:
    path = row.get("video_path") or f"{row['dataset']}/{row['scene_name']}.mp4"
    return (Media("video", str(path)),)


VSI = BenchmarkSpec(
    name="vsi_bench",
    title="VSI-Bench",
    columns=("question_type", "ground_truth", "options"),
    id_key="id",
    parse=_parse,
    judge=mixed_judge(_CHOICE, _NUMBER),
    summarise=_summarise,
    prompt=_prompt,
    media=_video,
    max_new_tokens=16,
    cluster_columns=("dataset", "scene_name"),
    expected_n=5130,
)
DEBIASED = BenchmarkSpec(
    name="vsi_debiased",
    title="VSI-Bench-Debiased",
    columns=VSI.columns,
    id_key="id",
    parse=_parse,
    judge=VSI.judge,
    summarise=_summarise,
    prompt=_prompt,
    media=_video,
    max_new_tokens=16,
    cluster_columns=VSI.cluster_columns,
    expected_n=DEBIASED_N,
    select=_debiased,
)
VSTI = BenchmarkSpec(
    name="vsti_bench",
    title="VSTI-Bench",
    columns=("question_type", "ground_truth", "mc_answer", "options"),
    parse=_parse_vsti,
    judge=VSI.judge,
    summarise=_summarise_vsti,
    prompt=_prompt,
    media=_video,
    max_new_tokens=16,
    cluster_columns=("video_path",),
    notes={
        "lmms": ("lmms-eval has no task: the official rules",),
        "easi": ("EASI has no task: its VSI-Bench rules",),
    },
)

SPECS = (VSI, DEBIASED, VSTI)
