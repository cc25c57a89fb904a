"""Benchmarks of structured answers (our own schema) and InternSpatial-Bench.

SSR (arXiv 2603.00409, Figure 8) reports LocalCogMap cell errors and box errors as histograms; the summaries here
hold the same quantities. Each file row is ``{id, scene, <gold>, ...}``.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from spatialvlm.errors import DataError
from spatialvlm.evaluation import structured as st
from spatialvlm.evaluation.benchmarks.multiview import images
from spatialvlm.evaluation.extract import easi_match
from spatialvlm.evaluation.metrics import Estimate, correct_rate, estimate, mra
from spatialvlm.evaluation.prompts import ANSWER_LETTER, join_options
from spatialvlm.evaluation.protocols import judge_choice, macro_by_type, rates
from spatialvlm.evaluation.schema import (
    BenchmarkSpec,
    Item,
    Judge,
    Row,
    Scored,
    Summary,
    Verdict,
    as_list,
    bare_letter,
    choice_item,
    cluster_of,
    lettered,
    number_gold,
    one_of,
    present,
)


def _details(scored: Sequence[Scored], key: str) -> list[float]:
    return [s.verdict.details[key] for s in scored if not s.verdict.unparsed]


def _raw_estimate(values: Sequence[float], scored: Sequence[Scored]) -> Estimate:
    """Mean of raw values (not percent) over the readable answers."""
    clusters = [s.item.cluster for s in scored if not s.verdict.unparsed]
    found = estimate(values, clusters)
    return Estimate(
        found.value / 100, None if found.se is None else found.se / 100, found.n, found.clusters
    )


def _same(judge: Judge) -> Callable[[str], Judge]:
    return lambda _: judge


def _prompt(item: Item, protocol: str) -> str:  # noqa: ARG001
    return str(item.row["question"])


# ----------------------------------------------------------------------------------------------- LocalCogMap


def _parse_cell(row: Row, item_id: str) -> Item:
    cell = as_list(row["gt_cell"])
    if len(cell) != 2 or not all(isinstance(v, (int, float)) and 0 <= v <= 9 for v in cell):
        raise DataError(f"item {item_id}: gold cell {cell} is not two numbers in 0...9")
    gold = {"cell": cell, "xy": row["gt_xy"] if present(row.get("gt_xy")) else None}
    return Item(item_id, "cell", gold, "localcogmap", cluster_of(row, ("scene",), item_id), row=row)


def judge_cell(item: Item, text: str) -> Verdict:
    """Euclidean distance in cells; the score is the exact cell."""
    cell = st.parse_cell(text)
    if cell is None:
        return Verdict(None, 0.0, True)
    (x, y), xy = item.gold["cell"], item.gold["xy"]
    details = {
        "error": math.dist(cell, (x, y)),
        "chebyshev": max(abs(cell[0] - x), abs(cell[1] - y)),
        "error_continuous": math.dist(cell, xy) if xy else None,
    }
    return Verdict(cell, float(details["error"] <= st.SLACK), False, details)


def summarise_cells(scored: Sequence[Scored], protocol: str) -> Summary:  # noqa: ARG001
    """Mean cell error over readable answers, and its companions."""
    errors = _details(scored, "error")
    continuous = [e for e in _details(scored, "error_continuous") if e is not None]
    n, lost = len(scored), len(scored) - len(errors)
    within = [d <= 1 + st.SLACK for d in _details(scored, "chebyshev")]
    extra = {
        "mean_error": st.mean_or_none(errors),
        "median_error": st.median_or_none(errors),
        "mean_error_penalised": (math.fsum(errors) + st.CELL_MISS * lost) / n,
        "mean_error_continuous": st.mean_or_none(continuous),
        "exact_rate": 100 * sum(e <= st.SLACK for e in errors) / n,
        "within1_rate": 100 * sum(within) / n,
        "histogram": st.histogram(errors, st.CELL_EDGES),
        "histogram_edges": [str(edge) for edge in st.CELL_EDGES],
    }
    return Summary("mean cell error", _raw_estimate(errors, scored), extra)


LOCALCOGMAP = BenchmarkSpec(
    name="localcogmap",
    title="LocalCogMap",
    columns=("gt_cell",),
    id_key="id",
    parse=_parse_cell,
    judge=_same(judge_cell),
    summarise=summarise_cells,
    prompt=_prompt,
    media=images,
    max_new_tokens=64,
    cluster_columns=("scene",),
    lower_is_better=True,
    mean_of_items=False,
)

# --------------------------------------------------------------------------------------------- 7-DoF grounding


def box_gold(box: Any, item_id: str) -> list[float]:
    """Check a gold box.

    Raises:
        DataError: Not seven finite numbers with positive sizes.
    """
    values = [float(v) if isinstance(v, (int, float)) else math.nan for v in as_list(box)]
    if len(values) != 7 or not all(map(math.isfinite, values)) or min(values[3:6]) <= 0:
        raise DataError(
            f"item {item_id}: gold box {box} is not [xc, yc, zc, l, w, h, yaw] with positive sizes"
        )
    return values


def _parse_box(row: Row, item_id: str) -> Item:
    gold = {
        "box": box_gold(row["gt_box"], item_id),
        "front_known": bool(row.get("front_known", False)),
    }
    cluster = cluster_of(row, ("scene",), item_id)
    return Item(item_id, "box7", gold, "grounding7dof", cluster, row=row)


def judge_box(item: Item, text: str, threshold: float = 0.25) -> Verdict:
    """All box errors; the score is IoU at least ``threshold``."""
    box = st.parse_box7(text)
    if box is None:
        return Verdict(None, 0.0, True)
    errors = st.box_errors(box, item.gold["box"], front_known=item.gold["front_known"])
    return Verdict(box, float(errors["iou3d"] + st.SLACK >= threshold), False, errors)


def summarise_boxes(scored: Sequence[Scored], protocol: str) -> Summary:  # noqa: ARG001
    """IoU (headline), centre, size and yaw errors; unreadable boxes have IoU 0 and no errors."""
    ious = [0.0 if s.verdict.unparsed else s.verdict.details["iou3d"] for s in scored]
    centres, yaws = _details(scored, "center_error"), _details(scored, "yaw_error_deg")
    headline = estimate(ious, [s.item.cluster for s in scored])
    extra = {
        "mean_iou3d": headline.value / 100,
        "acc_iou25": correct_rate([float(v + st.SLACK >= 0.25) for v in ious]),
        "acc_iou50": correct_rate([float(v + st.SLACK >= 0.5) for v in ious]),
        "mean_center_error": st.mean_or_none(centres),
        "median_center_error": st.median_or_none(centres),
        "mean_bev_error": st.mean_or_none(_details(scored, "bev_error")),
        "mean_size_error": st.mean_or_none(_details(scored, "size_error")),
        "mean_yaw_error_deg": st.mean_or_none(yaws),
        "median_yaw_error_deg": st.median_or_none(yaws),
        "center_histogram": st.histogram(centres, st.CENTER_EDGES),
        "yaw_histogram": st.histogram(yaws, st.YAW_EDGES),
    }
    return Summary("mean 3D IoU", headline, extra)


GROUNDING = BenchmarkSpec(
    name="grounding7dof",
    title="7-DoF grounding",
    columns=("gt_box",),
    id_key="id",
    parse=_parse_box,
    judge=_same(judge_box),
    summarise=summarise_boxes,
    prompt=_prompt,
    media=images,
    max_new_tokens=512,
    cluster_columns=("scene",),
    mean_of_items=False,
)

# --------------------------------------------------------------------------------------------------- counting


def _parse_count(row: Row, item_id: str) -> Item:
    gold = number_gold(row["gt"], item_id)
    if gold < 0:
        raise DataError(f"item {item_id}: gold count {gold} is negative")
    return Item(item_id, "count", gold, "counting", cluster_of(row, ("scene",), item_id), row=row)


def judge_count(item: Item, text: str) -> Verdict:
    """Score 1 - relative error, not clipped below 0."""
    value = st.parse_count(text)
    error = st.count_error(value, item.gold)
    return Verdict(value, 1 - error, value is None, {"rel_error": error})


def summarise_counts(scored: Sequence[Scored], protocol: str) -> Summary:  # noqa: ARG001
    """InternSpatial's counting score, unclipped (headline) and clipped."""
    errors = np.array([s.verdict.details["rel_error"] for s in scored])
    pairs = [(s.verdict.extracted, s.item.gold) for s in scored]
    relative = [float(mra(p, g)[0]) for p, g in pairs if p is not None and g > 0]
    headline = estimate(1 - errors, [s.item.cluster for s in scored])
    extra = {
        "score_unclipped": headline.value,
        "score_clipped": 100 * float(np.maximum(0, 1 - errors).mean()),
        "mean_rel_error": float(errors.mean()),
        "exact": correct_rate([float(p == g) for p, g in pairs]),
        "mra": 100 * math.fsum(relative) / len(pairs),
    }
    return Summary("100 - 100 x mean relative error", headline, extra)


COUNTING = BenchmarkSpec(
    name="counting",
    title="Counting",
    columns=("gt",),
    id_key="id",
    parse=_parse_count,
    judge=_same(judge_count),
    summarise=summarise_counts,
    prompt=_prompt,
    media=images,
    max_new_tokens=64,
    cluster_columns=("scene",),
    mean_of_items=False,
)

# --------------------------------------------------------------------------------------------------- rotation


def _parse_rotation(row: Row, item_id: str) -> Item:
    gold = {"deg": number_gold(row["gt_deg"], item_id), "unsigned": bool(row.get("unsigned"))}
    return Item(item_id, "angle", gold, "rotation", cluster_of(row, ("scene",), item_id), row=row)


def judge_rotation(item: Item, text: str) -> Verdict:
    """Angle error in degrees; the score is an error of at most 15 degrees."""
    value = st.parse_rotation(text)
    if value is None:
        return Verdict(None, 0.0, True)
    error = st.rotation_error(value, item.gold["deg"], unsigned=item.gold["unsigned"])
    return Verdict(value, float(error <= 15 + st.SLACK), False, {"error_deg": error})


def summarise_rotations(scored: Sequence[Scored], protocol: str) -> Summary:  # noqa: ARG001
    """Accuracy within 15 degrees (headline) and 30, mean and median error."""
    errors = _details(scored, "error_deg")
    headline = estimate([s.verdict.score for s in scored], [s.item.cluster for s in scored])
    extra = {
        "acc_15": headline.value,
        "acc_30": 100 * sum(e <= 30 + st.SLACK for e in errors) / len(scored),
        "mean_error_deg": st.mean_or_none(errors),
        "median_error_deg": st.median_or_none(errors),
    }
    return Summary("accuracy within 15°", headline, extra)


ROTATION = BenchmarkSpec(
    name="rotation",
    title="Rotation",
    columns=("gt_deg",),
    id_key="id",
    parse=_parse_rotation,
    judge=_same(judge_rotation),
    summarise=summarise_rotations,
    prompt=_prompt,
    media=images,
    max_new_tokens=64,
    cluster_columns=("scene",),
)

# ---------------------------------------------------------------------------------------- InternSpatial-Bench

INTERN_CATEGORIES = ("position", "size", "rotation", "counting", "existence")


def _parse_intern(row: Row, item_id: str) -> Item:
    kind = one_of(str(row["category"]), INTERN_CATEGORIES, "category", item_id)
    cluster = cluster_of(row, ("image",), item_id)
    if kind == "counting":
        return Item(item_id, "count", number_gold(row["answer"], item_id), kind, cluster, row=row)
    if present(row.get("options")):
        letter, options = bare_letter(row["answer"]), lettered(row["options"])
        return choice_item(row, item_id, letter, options, kind, cluster=cluster)
    if present(row.get("judge")):
        float(str(row["judge"]))  # refused here, not after an hour of answering
    return Item(item_id, "judged", str(row["answer"]), kind, cluster, row=row)


def _judge_intern(item: Item, text: str) -> Verdict:
    if item.kind == "count":
        return judge_count(item, text)
    if item.kind == "choice":
        return judge_choice(item, text, easi_match)
    judged = item.row.get("judge")
    if not present(judged):
        same = text.strip().rstrip(".").lower() == item.gold.strip().rstrip(".").lower()
        return Verdict(text.strip(), float(same), not text.strip())
    return Verdict(text.strip(), float(float(str(judged)) > 0), not text.strip())


def _summarise_intern(scored: Sequence[Scored], protocol: str) -> Summary:
    """Mean of the five categories; both questions of an existence pair must be right.

    The paper does not say whether a count's score is clipped at 0: the headline's is not, the other mean is beside it.
    """
    pairs: dict[str, list[Scored]] = {}
    units: list[Scored] = []
    for s in scored:
        pair = s.item.row.get("pair_id")
        if s.item.question_type == "existence" and present(pair):
            pairs.setdefault(str(pair), []).append(s)
        else:
            units.append(s)
    for members in pairs.values():
        worst = min(members, key=lambda s: s.verdict.score)
        units.append(worst)
    mean = macro_by_type("mean of 5 categories", INTERN_CATEGORIES)
    clipped = [
        replace(s, verdict=replace(s.verdict, score=max(0.0, s.verdict.score))) for s in units
    ]
    extra = {
        "categories": rates(units, lambda item: item.question_type, INTERN_CATEGORIES),
        "mean_with_clipped_counting": mean(clipped, protocol).headline.value,
    }
    return replace(mean(units, protocol), extra=extra)


def _prompt_intern(item: Item, protocol: str) -> str:  # noqa: ARG001
    question = str(item.row["question"])
    if item.kind != "choice":
        return question
    return f"{question}\n{join_options(item.options)}\n{ANSWER_LETTER}."


INTERNSPATIAL = BenchmarkSpec(
    name="internspatial",
    title="InternSpatial-Bench",
    columns=("category", "answer"),
    id_key="id",
    parse=_parse_intern,
    judge=_same(_judge_intern),
    summarise=_summarise_intern,
    prompt=_prompt_intern,
    media=images,
    max_new_tokens=256,
    cluster_columns=("image",),
    expected_n=6008,
    notes=dict.fromkeys(
        ("official", "lmms", "easi"), ("no public file or prompt: project schema",)
    ),
    mean_of_items=False,
)

SPECS = (LOCALCOGMAP, GROUNDING, COUNTING, ROTATION, INTERNSPATIAL)
