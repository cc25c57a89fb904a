"""Counterfactual pairs: one question about a room and about its twin, with different answers.

A twin shares its room except for one change (an object moved or removed, or everything mirrored). The
arguments of the room's rows are asked again in the twin; where the question survives and the answer
changes, the twin's row joins the pair. Wording and option order are drawn from the room's id for both.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from spatialvlm.scenes.schema import Scene
from spatialvlm.synthesis.generate import RowMaker
from spatialvlm.synthesis.rows import Reject
from spatialvlm.synthesis.tasks import TASKS

TAG = "counterfactual"


def base_of(scene: Scene) -> str | None:
    """Scene id of the room this scene is a twin of, ``None`` for ordinary scenes."""
    twin = scene.extra.get("twin")
    return str(twin["of"]) if twin else None


def counterfactual_rows(
    base_rows: Iterable[Mapping[str, Any]], base: Scene, maker: RowMaker
) -> Iterator[dict[str, Any]]:
    """Rows of the twin that differ from a row of its room in the answer only.

    Args:
        base_rows: Rows of the room.
        base: The room.
        maker: Makes rows of the twin.

    Yields:
        Rows with ``group_id`` = id of the room's row and the tag ``counterfactual``.
    """
    twin = maker.ctx.scene
    place = {item.id: item.index for item in twin.objects}
    ids = [item.id for item in base.objects]
    for row in base_rows:
        if row["media_kind"] == "none" or row["evidence"].startswith("["):
            continue
        args = json.loads(row["evidence"])["args"]
        if any(frame not in maker.ctx.frame_of for frame in args.get("frames", ())):
            continue
        if "objects" in args:
            names = [ids[index] for index in args["objects"]]
            if any(name not in place for name in names):
                continue
            args["objects"] = [place[name] for name in names]
        try:
            other = maker.row(TASKS[row["task"]], args)
        except Reject:
            continue
        same_question = _question(other) == _question(row)
        if same_question and other["answer_text"] != row["answer_text"]:
            yield {**other, "group_id": row["id"], "tags": [*other["tags"], TAG]}


def _question(row: Mapping[str, Any]) -> list[str]:
    return [m["content"] for m in row["messages"] if m["role"] == "user"]
