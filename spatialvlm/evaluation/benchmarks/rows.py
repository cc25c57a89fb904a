"""Rows of our own data engine as a benchmark: held-out rooms, per-task scores, macro over tasks."""

import json
import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from spatialvlm.answers import LETTERS
from spatialvlm.errors import DataError
from spatialvlm.evaluation import structured as st
from spatialvlm.evaluation.benchmarks.structured import (
    box_gold,
    judge_box,
    judge_cell,
    judge_rotation,
    summarise_boxes,
    summarise_cells,
)
from spatialvlm.evaluation.extract import easi_match, last_number_plain, lower
from spatialvlm.evaluation.metrics import mra
from spatialvlm.evaluation.protocols import judge_choice, macro_by_type
from spatialvlm.evaluation.schema import (
    BenchmarkSpec,
    Item,
    Media,
    Row,
    Scored,
    Summary,
    Verdict,
    choice_gold,
    cluster_of,
    number_gold,
    present,
)

UNSCORED_TASKS = ("scene_caption", "location_text", "grounding_cam9")
SIGNED_TASKS = ("is_rotation",)
"""Tasks whose degrees have a direction, counter-clockwise from above being positive; other angles are sizes."""
DEGREES = ("deg", "degree", "degrees", "°")


def _json(row: Row, column: str, item_id: str) -> Any:
    value = row.get(column)
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise DataError(f"item {item_id}: column {column} is not JSON: {error}") from None


def _num_replies(row: Row) -> int:
    return sum(message["role"] == "assistant" for message in row["messages"])


def _parse(row: Row, item_id: str) -> Item:
    task, kind = str(row["task"]), str(row["answer_type"])
    cluster = cluster_of(row, ("scene_id",), item_id)
    unscored = (
        task in UNSCORED_TASKS
        or row.get("form") == "SENT"
        or _num_replies(row) > 1
        or (kind == "json" and task != "ssr_grounding7")
    )
    if unscored:
        return Item(item_id, "unscored", None, task, cluster, row=row)
    _check_markers(row, item_id)
    answer = _json(row, "answer_json", item_id)
    options: dict[str, str] = {}
    gold: Any = answer
    if kind == "mcq":
        options = dict(zip(LETTERS, row["options"] or (), strict=False))
        index = int(row["choice_idx"])
        gold = choice_gold(
            LETTERS[index] if 0 <= index < len(LETTERS) else str(index), options, item_id
        )
    elif kind == "number":
        gold = number_gold(answer, item_id)
        if _plain(row.get("unit") or "") in DEGREES:
            kind, gold = "angle", {"deg": gold, "unsigned": task not in SIGNED_TASKS}
    elif kind == "coord":
        values = (_json(row, "evidence", item_id) or {}).get("values", {})
        gold = {"cell": list(answer), "xy": values.get("target_xy")}
    elif kind == "json":
        values = (_json(row, "evidence", item_id) or {}).get("values", {})
        gold = {
            "box": box_gold(answer[0]["bbox_3d"], item_id),
            "front_known": bool(values.get("front_known", False)),
        }
    elif kind not in ("yesno", "text", "list", "box"):
        raise DataError(f"item {item_id}: unknown answer_type {kind!r}")
    return Item(item_id, kind, gold, task, cluster, options, str(row.get("family") or ""), row=row)


def _plain(text: Any) -> str:
    return lower(str(text)).strip().rstrip(".").strip()


def _as_items(text: str) -> list[str]:
    """A JSON list, or parts separated by commas or newlines."""
    text = text.strip()
    if text.startswith("["):
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):  # not JSON, or a number of thousands of digits
            values = None
        if isinstance(values, list):
            return [_plain(value) for value in values]
    return [part for piece in re.split(r"[,\n]", text) if (part := _plain(piece))]


def _judge_number(item: Item, text: str) -> Verdict:
    value = last_number_plain(text)
    if value is None:
        return Verdict(None, 0.0, True)
    score = float(mra(value, item.gold)[0]) if item.gold > 0 else float(value == item.gold)
    return Verdict(value, score, False)


def judge(item: Item, text: str) -> Verdict:
    """Score one answer in [0, 1] by the row's answer type; the same under every protocol."""
    if item.kind == "mcq":
        return judge_choice(item, text, easi_match)
    if item.kind == "yesno":
        found = re.search(r"\b(yes|no)\b", lower(text))
        said = found.group(1) == "yes" if found else None
        return Verdict(said, float(said is not None and said == item.gold), said is None)
    if item.kind == "number":
        return _judge_number(item, text)
    if item.kind == "angle":
        return judge_rotation(item, text)
    if item.kind == "text":
        said_text = _plain(text)
        return Verdict(said_text, float(said_text == _plain(item.gold)), not said_text)
    if item.kind == "list":
        items = _as_items(text)
        return Verdict(items, float(items == [_plain(g) for g in item.gold]), not items)
    if item.kind == "coord":
        return judge_cell(item, text)
    if item.kind == "json":
        return judge_box(item, text)
    groups = st.number_groups(text, 4)
    if not groups:
        return Verdict(None, 0.0, True)
    overlap = st.iou2d(groups[-1], item.gold)
    return Verdict(groups[-1], float(overlap + st.SLACK >= 0.5), False, {"iou2d": overlap})


def _summarise(scored: Sequence[Scored], protocol: str) -> Summary:
    summary = macro_by_type("macro over tasks")(scored, protocol)
    extra: dict[str, Any] = {}
    for task, name, summarise in (
        ("ssr_lcm", "localcogmap", summarise_cells),
        ("ssr_grounding7", "grounding7", summarise_boxes),
    ):
        part = [s for s in scored if s.item.question_type == task]
        if part:
            extra[name] = dict(summarise(part, protocol).extra)
    return Summary(summary.name, summary.headline, extra)


def _prompt(item: Item, protocol: str) -> str:  # noqa: ARG001
    return next(str(m["content"]) for m in item.row["messages"] if m["role"] == "user")


def _system(row: Row) -> str:
    return next((str(m["content"]) for m in row["messages"] if m["role"] == "system"), "")


def _media(row: Row) -> tuple[Media, ...]:
    paths = [str(path) for path in row.get("images") or ()]
    if row.get("media_kind") == "video" and paths:
        folder = str(PurePosixPath(paths[0]).parent)
        names = tuple(PurePosixPath(path).name for path in paths)
        return (Media("video", folder, names, tuple(row.get("frame_times_s") or ())),)
    return tuple(Media("image", path) for path in paths)


def _check_markers(row: Row, item_id: str) -> None:
    marker = "<video>" if row.get("media_kind") == "video" else "<image>"
    asked = [str(m["content"]) for m in row["messages"] if m["role"] == "user"]
    markers, media = sum(text.count(marker) for text in asked), len(_media(row))
    if markers != media:
        raise DataError(
            f"item {item_id} has {markers} {marker} markers and {media} media. Add what is missing, or remove the rest."
        )


def _marks(row: Row) -> list[dict[str, Any]]:
    marks = row.get("marks")
    if not present(marks):
        return []
    return list(json.loads(marks)) if isinstance(marks, str) else list(marks or ())


ROWS = BenchmarkSpec(
    name="spatialvlm_rows",
    title="Held-out rows of the data engine",
    columns=("task", "answer_type", "answer_json", "messages"),
    id_key="id",
    parse=_parse,
    judge=lambda _: judge,
    summarise=_summarise,
    prompt=_prompt,
    media=_media,
    max_new_tokens=64,
    cluster_columns=("scene_id",),
    system=_system,
    marks=_marks,
    same_scene=True,
    verbatim=True,
)

SPECS = (ROWS,)
