"""Global cognitive maps: the usual rival of LocalCogMap, all objects of a room on one 10 x 10 grid.

File rows are ``{id, scene, gt_map, prediction}`` with ``gt_map`` = object name -> list of cells. An answer is JSON of
the same form, a Python dictionary (the form VSI-Bench's cognitive-map prompt asks for, arXiv 2412.14171), or lines
``name: (x, y), (x, y)``; alone or between ``<map>`` and ``</map>``. One cell may stand for a list of one. Errors are
distances in cells, so reports draw them in the histogram of LocalCogMap.
"""

import ast
import json
import math
import re
from collections.abc import Sequence
from typing import Any

from spatialvlm.errors import DataError
from spatialvlm.evaluation import structured as st
from spatialvlm.evaluation.benchmarks.multiview import images
from spatialvlm.evaluation.metrics import Estimate, estimate
from spatialvlm.evaluation.schema import (
    BenchmarkSpec,
    Item,
    Row,
    Scored,
    Summary,
    Verdict,
    cluster_of,
)

Cells = list[tuple[float, float]]


def _cells(value: Any) -> Cells | None:
    """One ``[x, y]`` or a list of them; ``None`` for anything else."""
    if not isinstance(value, list | tuple):
        return None
    pairs = [value] if value and not isinstance(value[0], list | tuple) else value
    cells: Cells = []
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            return None
        if not all(type(v) in (int, float) and abs(v) < math.inf for v in pair):
            return None
        try:
            cells.append((float(pair[0]), float(pair[1])))
        except OverflowError:  # a whole number of hundreds of digits
            return None
    return cells


_LINE = re.compile(
    r"^[ \t*•-]*['\"]?([^\W\d_][^:()\[\]'\"\n]*)['\"]?[ \t]*:[ \t]*([\[(].*)$", re.MULTILINE
)
_PAIR = re.compile(r"[\[(]\s*(-?\d+(?:\.\d+)?)\s*,\s*(-?\d+(?:\.\d+)?)\s*[\])]")


def _read(body: str) -> Any:
    """The dictionary in a text, else the one its lines spell; ``None`` for neither."""
    literal = body[body.find("{") : body.rfind("}") + 1]
    for read in (json.loads, ast.literal_eval):
        try:
            return read(literal)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    found: dict[str, list[list[float]]] = {}
    for name, cells in _LINE.findall(body):
        pairs = [[float(x), float(y)] for x, y in _PAIR.findall(cells)]
        if pairs:
            found.setdefault(name, []).extend(pairs)
    return found


def parse_map(text: str) -> dict[str, Cells] | None:
    """Cells by lower-case object name, ``None`` if the answer holds no readable map."""
    text = text.rpartition("</think>")[2]
    tagged = re.search(r"<map>(.*?)</map>", text, re.DOTALL)
    content = _read(tagged.group(1) if tagged else text)
    if not isinstance(content, dict) or not content:
        return None
    found: dict[str, Cells] = {}
    for name, value in content.items():
        cells = _cells(value)
        if cells is None or not isinstance(name, str):
            return None
        found.setdefault(name.strip().lower(), []).extend(cells)
    return found


def _parse(row: Row, item_id: str) -> Item:
    gold = parse_map(row["gt_map"] if isinstance(row["gt_map"], str) else json.dumps(row["gt_map"]))
    inside = gold is not None and all(
        0 <= v <= 9 for cells in gold.values() for c in cells for v in c
    )
    if gold is None or not inside or not all(gold.values()):
        raise DataError(
            f"item {item_id}: gold map {row['gt_map']} is not {{name: [[x, y], ...]}} in 0...9"
        )
    return Item(item_id, "map", gold, "globalmap", cluster_of(row, ("scene",), item_id), row=row)


def judge(item: Item, text: str) -> Verdict:
    """Match the cells of every category at minimum total distance; the score is the share of gold cells hit exactly."""
    said = parse_map(text)
    gold: dict[str, Cells] = item.gold
    num = sum(map(len, gold.values()))
    if said is None:
        return Verdict(None, 0.0, True, {"num_gold": num})
    errors: list[float] = []
    missing = extra = 0
    for name in gold | said:
        matched, lost, added = st.assign_cells(said.get(name, []), gold.get(name, []))
        errors += matched
        missing, extra = missing + lost, extra + added
    details = {"errors": errors, "missing": missing, "extra": extra, "num_gold": num}
    return Verdict(said, sum(e <= st.SLACK for e in errors) / num, False, details)


def summarise(scored: Sequence[Scored], protocol: str) -> Summary:  # noqa: ARG001
    """Mean error over matched cells, and how many cells are missing (unreadable maps: all) or too many."""
    maps = [s for s in scored if not s.verdict.unparsed]
    errors = [e for s in maps for e in s.verdict.details["errors"]]
    clusters = [s.item.cluster for s in maps for _ in s.verdict.details["errors"]]
    num = sum(s.verdict.details["num_gold"] for s in scored)
    found = estimate(errors, clusters)
    se = None if found.se is None else found.se / 100
    head = Estimate(found.value / 100, se, found.n, found.clusters)
    extra = {
        "mean_error": st.mean_or_none(errors),
        "missing_rate": 100 * (num - len(errors)) / num,
        "extra_rate": 100 * sum(s.verdict.details["extra"] for s in maps) / num,
        "histogram": st.histogram(errors, st.CELL_EDGES),
    }
    return Summary("mean cell error of matched objects", head, extra)


def _prompt(item: Item, protocol: str) -> str:  # noqa: ARG001
    return str(item.row["question"])


GLOBALMAP = BenchmarkSpec(
    name="globalmap",
    title="Global cognitive maps",
    columns=("gt_map",),
    id_key="id",
    parse=_parse,
    judge=lambda _: judge,
    summarise=summarise,
    prompt=_prompt,
    media=images,
    max_new_tokens=1024,
    cluster_columns=("scene",),
    lower_is_better=True,
    mean_of_items=False,
)

SPECS = (GLOBALMAP,)
