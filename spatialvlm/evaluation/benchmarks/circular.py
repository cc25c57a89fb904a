"""Groups of one question: 3DSRBench (flips and rotations), circular multiple choice, and making variants."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spatialvlm.errors import DataError
from spatialvlm.evaluation.benchmarks.multiview import images, inline_options
from spatialvlm.evaluation.extract import dsr3, vlmk_infer
from spatialvlm.evaluation.metrics import Estimate, correct_rate, group_scores, grouped_estimate
from spatialvlm.evaluation.prompts import generic, item_media
from spatialvlm.evaluation.protocols import BOTH_FAIL, by_protocol, choice_judge
from spatialvlm.evaluation.schema import (
    BenchmarkSpec,
    Item,
    Media,
    Row,
    Scored,
    Summary,
    as_list,
    bare_letter,
    choice_gold,
    letter_columns,
    present,
)

# ------------------------------------------------------------------------------------------------- 3DSRBench

_QID = re.compile(r".{8}(-flip)?(-\d+)?")
MAIN_CATEGORIES = ("height", "location", "orientation", "multi_object")


def dsr_groups(qid: str) -> dict[str, str]:
    """Group of a question id under each reading: vanilla, flip, circular, flip_circular."""
    return {
        "vanilla": qid,
        "flip": qid.replace("-flip", ""),
        "circular": qid[:13] if "-flip" in qid else qid[:8],
        "flip_circular": qid[:8],
    }


def _parse_dsr(row: Row, item_id: str) -> Item:
    if not _QID.fullmatch(item_id):
        raise DataError(
            f"qid {item_id!r} is not eight characters with optional -flip and -number; "
            "is this a 3DSRBench file?"
        )
    options = letter_columns(row, "ABCD") or dict.fromkeys("ABCD", "")
    gold = choice_gold(bare_letter(row["answer"]), options, item_id)
    family = item_id[:8]
    return Item(
        item_id, "choice", gold, str(row["category"]), family, options, group=family, row=row
    )


def dsr_summary(
    qids: Sequence[str], hits: Sequence[float], categories: Sequence[str]
) -> tuple[dict[str, Estimate], dict[str, float]]:
    """3DSRBench scores (arXiv 2412.07825): a group is right only if all its rows are.

    Args:
        qids: Question ids of the rows.
        hits: Row scores, 0 or 1.
        categories: Row categories; their prefix names the main category.

    Returns:
        Estimates for vanilla, flip, circular, flip_circular, and the vanilla accuracy per main category.
    """
    clusters = [qid[:8] for qid in qids]
    estimates = {
        name: grouped_estimate(hits, [dsr_groups(qid)[name] for qid in qids], clusters)
        for name in ("vanilla", "flip", "circular", "flip_circular")
    }
    main = {
        name: correct_rate(part)
        for name in MAIN_CATEGORIES
        if (part := [hit for hit, c in zip(hits, categories, strict=True) if c.startswith(name)])
    }
    return estimates, main


def _summarise_dsr(scored: Sequence[Scored], protocol: str) -> Summary:  # noqa: ARG001
    qids = [s.item.id for s in scored]
    estimates, main = dsr_summary(
        qids, [s.verdict.score for s in scored], [s.item.question_type for s in scored]
    )
    flipped = any("-flip" in qid for qid in qids)
    rotated = any(re.search(r"-\d+$", qid) for qid in qids)
    name = {(True, True): "flip_circular", (True, False): "flip", (False, True): "circular"}.get(
        (flipped, rotated), "vanilla"
    )
    extra: dict[str, Any] = {key: value.value for key, value in estimates.items()}
    extra |= {
        "groups": {key: value.n for key, value in estimates.items() if key != "vanilla"},
        "main_category_vanilla": main,
    }
    return Summary(name, estimates[name], extra)


DSR3 = BenchmarkSpec(
    name="dsr3",
    title="3DSRBench",
    columns=("answer", "category"),
    id_key="qid",
    parse=_parse_dsr,
    judge=choice_judge(by_protocol(vlmk_infer, dsr3, vlmk_infer)),
    summarise=_summarise_dsr,
    prompt=lambda item, _: generic(str(item.row["question"]), item.options),
    media=images,
    max_new_tokens=4096,
    cluster_columns=("qid",),
    notes={"official": (BOTH_FAIL,), "easi": (BOTH_FAIL,)},
    mean_of_items=False,
)

# ------------------------------------------------------------------------------------ circular multiple choice

STEP = 1_000_000
"""Index offset between rotations of one question (VLMEvalKit convention)."""


def _parse_circular(row: Row, item_id: str) -> Item:
    options = letter_columns(row)
    gold = choice_gold(
        bare_letter(row["answer"] if "answer" in row else row["GT"]), options, item_id
    )
    variant = str(row.get("variant") or "")
    group = str(row["g_index"]) if present(row.get("g_index")) else _group_of(item_id)
    return Item(
        item_id, "choice", gold, str(row.get("category") or "all"), f"group:{group}", options,
        group=group, variant=variant, row=row,
    )  # fmt: skip


def _group_of(item_id: str) -> str:
    return str(int(item_id) % STEP) if item_id.isdigit() else item_id


def _is_first(item: Item) -> bool:
    if item.variant:
        return item.variant == "rot0"
    return not item.id.isdigit() or int(item.id) < STEP


def _checked_groups(items: Sequence[Item]) -> Sequence[Item]:
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(item.group, []).append(item)
    for name, members in groups.items():
        if not any(_is_first(item) for item in members):
            raise DataError(f"circular group {name}: rotation 0 is missing; was the file filtered?")
        golds = {item.options[item.gold].strip() for item in members}
        if len(golds) > 1:
            raise DataError(
                f"circular group {name}: the gold option differs between rotations: {sorted(golds)}"
            )
    return items


def circular_summary(
    hits: Sequence[float], groups: Sequence[str], first: Sequence[bool]
) -> dict[str, float | int]:
    """Hard, soft and vanilla accuracy of rotated questions, in percent.

    Args:
        hits: Row scores.
        groups: Group of each row.
        first: Whether the row is the unrotated one.
    """
    _, hard = group_scores(hits, groups)
    members: dict[str, list[float]] = {}
    for hit, group in zip(hits, groups, strict=True):
        members.setdefault(group, []).append(hit)
    return {
        "hard_circular": correct_rate(hard),
        "soft_rows": correct_rate(hits),
        "soft_groups": correct_rate([sum(part) / len(part) for part in members.values()]),
        "vanilla": correct_rate(
            [hit for hit, is_first in zip(hits, first, strict=True) if is_first]
        ),
        "n_groups": len(members),
    }


def _summarise_circular(scored: Sequence[Scored], protocol: str) -> Summary:  # noqa: ARG001
    hits = [s.verdict.score for s in scored]
    groups = [s.item.group for s in scored]
    extra = circular_summary(hits, groups, [_is_first(s.item) for s in scored])
    headline = grouped_estimate(hits, groups, [s.item.cluster for s in scored])
    return Summary("hard circular", headline, extra | _consistency(scored))


def _consistency(scored: Sequence[Scored]) -> dict[str, Any]:
    """How often all rotations pick the same option text, and how often each letter is picked."""
    texts: dict[str, set[str]] = {}
    letters: dict[str, int] = {}
    for s in scored:
        letter = s.verdict.extracted
        texts.setdefault(s.item.group, set()).add(s.item.options.get(letter, "") if letter else "")
        if letter:
            letters[letter] = letters.get(letter, 0) + 1
    same = [float(len(chosen) == 1 and "" not in chosen) for chosen in texts.values()]
    total = max(sum(letters.values()), 1)
    return {
        "consistency": correct_rate(same),
        "letter_share": {x: 100 * n / total for x, n in sorted(letters.items())},
    }


def _media(row: Row) -> tuple[Media, ...]:
    """Pictures as in other files, or the ``media`` of emitted variants."""
    if not present(row.get("media")):
        return images(row)
    return tuple(
        Media(m["kind"], m["path"], tuple(m["frames"]), tuple(m["times_s"]))
        for m in as_list(row["media"])
    )


CIRCULAR = BenchmarkSpec(
    name="circular_mcq",
    title="Circular multiple choice",
    columns=("A", "B"),
    id_key="index",
    parse=_parse_circular,
    judge=choice_judge(by_protocol(vlmk_infer)),
    summarise=_summarise_circular,
    prompt=lambda item, _: generic(
        str(item.row["question"]), item.options, str(item.row.get("hint") or "")
    ),
    media=_media,
    max_new_tokens=4096,
    notes={"official": (BOTH_FAIL,), "easi": (BOTH_FAIL,)},
    select=_checked_groups,
    mean_of_items=False,
)

# --------------------------------------------------------------------------------------------- making variants

_REFERS = re.compile(
    r"\b(all|both|none|any) of (the|these|them)\b|\b(either|neither|both)\b|\b[A-H] (and|or) [A-H]\b",
    re.IGNORECASE,
)
_NUMERIC = re.compile(r"[-+]?\d+(?:\.\d+)?")


@dataclass(frozen=True, slots=True)
class Variants:
    """Rotated copies of multiple-choice items, and what could not be rotated."""

    items: list[Item]
    skipped: dict[str, str]
    """Item id -> reason."""
    ordered: list[str]
    """Ids whose options are numerically ordered (rotation makes the order a cue)."""


def rotate(options: Mapping[str, str], shift: int) -> dict[str, str]:
    """Letters stay, texts move up by ``shift``: option A of rotation 1 is what B was."""
    texts = list(options.values())
    return dict(zip(options, texts[shift:] + texts[:shift], strict=True))


def circular_variants(items: Sequence[Item]) -> Variants:
    """All k rotations of items with k options; the gold follows its text."""
    made: list[Item] = []
    skipped: dict[str, str] = {}
    ordered: list[str] = []
    for item in items:
        if item.kind != "choice":
            continue
        if not all(text.strip() for text in item.options.values()):
            skipped[item.id] = "the row states no texts of its options"
            continue
        texts = list(item.options.values())
        if any(_REFERS.search(text) for text in texts):
            skipped[item.id] = "an option refers to other options"
            continue
        if len({text.strip() for text in texts}) < len(texts):
            skipped[item.id] = "two options have the same text"
            continue
        numbers = [_NUMERIC.match(text.strip()) for text in texts]
        values = [float(found.group()) for found in numbers if found]
        if len(values) == len(texts) and values in (sorted(values), sorted(values, reverse=True)):
            ordered.append(item.id)
        for shift in range(len(texts)):
            options = rotate(item.options, shift)
            letters = list(options)
            gold = letters[(letters.index(item.gold) - shift) % len(letters)]
            made.append(
                replace(item, options=options, gold=gold, variant=f"rot{shift}", group=item.id)
            )
    return Variants(made, skipped, ordered)


def variant_rows(found: Variants, spec: BenchmarkSpec, folder: Path) -> list[dict[str, Any]]:
    """Rows of a ``circular_mcq`` file.

    The options stand in their columns only: a list inside the question would contradict them. Media are named as in
    the benchmark's file; pictures that lie in its cells are written into ``media`` of ``folder``.

    Args:
        found: From :func:`circular_variants`.
        spec: Benchmark of the items.
        folder: Where the file will be, the root of pictures from cells.

    Raises:
        DataError: The benchmark's file lacks the question or its media.
    """
    groups: dict[str, int] = {}
    shown: dict[str, list[dict[str, Any]]] = {}
    original = {item.id: item.options for item in found.items if item.variant == "rot0"}
    rows = []
    for item in found.items:
        group = groups.setdefault(item.id, len(groups))
        if item.id not in shown:
            shown[item.id] = [_medium(m, folder) for m in item_media(item.row, spec)]
        if not present(item.row.get("question")):
            raise DataError(
                f"item {item.id} of {spec.name} has no question; its answers can be scored, but no variants be asked"
            )
        question = str(item.row["question"])
        stem, listed = inline_options(question.replace("Choices:", "Options:"))
        row = {
            "question": stem if listed == original[item.id] else question,
            "media": shown[item.id],
            **item.options,
            "index": group + int(item.variant.removeprefix("rot")) * STEP,
            "g_index": group,
            "source_id": item.id,
            "answer": item.gold,
            "category": item.question_type,
        }
        rows.append(row | ({"hint": item.row["hint"]} if present(item.row.get("hint")) else {}))
    return rows


def _medium(medium: Media, folder: Path) -> dict[str, Any]:
    path = medium.path
    if medium.data is not None:
        path = f"media/{hashlib.sha256(medium.data).hexdigest()[:24]}"
        (folder / "media").mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(medium.data)
    return {
        "kind": medium.kind,
        "path": path,
        "frames": list(medium.frames),
        "times_s": list(medium.times_s),
    }


def mmsi_variants(row: Row) -> list[dict[str, Any]]:
    """The four rows of MMSI's public circular files for one question.

    The texts of A, B, C, D move one place per variant (ABCD, BCDA, CDAB, DABC); with fewer than four options
    letters have gaps.
    """
    stem, options = inline_options(str(row["question"]))
    variants = []
    for shift in range(4):
        placed = {x: options.get("ABCD"[(n + shift) % 4]) for n, x in enumerate("ABCD")}
        listed = ", ".join(f"{x}: {text}" for x, text in placed.items() if text is not None)
        gold = "ABCD"[("ABCD".index(str(row["answer"])) - shift) % 4]
        variants.append(
            {
                **row,
                "index": int(row["index"]) + shift * STEP,
                "question": f"{stem}\nOptions: {listed}",
                "answer": gold,
            }
        )
    return variants


SPECS = (DSR3, CIRCULAR)
