"""Functions of the lmms-eval task files: prompts and scorers are those of this package."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from spatialvlm.evaluation.metrics import estimate
from spatialvlm.evaluation.prompts import build_messages
from spatialvlm.evaluation.registry import find_spec
from spatialvlm.evaluation.schema import Item

Doc = Mapping[str, Any]


def _item(name: str, doc: Doc) -> Item:
    spec = find_spec(name)
    return spec.parse(doc, str(doc.get(spec.id_key or "id", "0")))


def _functions(name: str) -> tuple[Callable[..., Any], ...]:
    spec = find_spec(name)

    def messages(doc: Doc, **_: Any) -> list[dict[str, Any]]:
        root = Path(str(doc.get("media_root", "")))
        found = build_messages(_item(name, doc), spec, "lmms", root=root, allow_absolute=True)
        for message in found:
            for part in message["content"]:
                if part["type"] != "text":
                    part["url"] = part.pop(part["type"])
        return found

    def text(doc: Doc, **_: Any) -> str:
        return spec.prompt(_item(name, doc), "lmms")

    def visual(doc: Doc, **_: Any) -> list[Any]:
        return [part["url"] for m in messages(doc) for part in m["content"] if "url" in part]

    def process(doc: Doc, results: Sequence[str]) -> dict[str, Any]:
        item = _item(name, doc)
        verdict = spec.judge("lmms")(item, results[0])
        answer = {"type": item.question_type, "score": verdict.score, "cluster": item.cluster}
        return {"score": answer | {"pair": str(doc.get("pair_id") or "")}}

    return messages, text, visual, process


def macro(results: Sequence[Mapping[str, Any]]) -> float:
    """Mean over question types, in percent; a pair of questions is as good as its worse answer."""
    pairs: dict[str, Mapping[str, Any]] = {}
    units = [r for r in results if not r["pair"]]
    for r in sorted((r for r in results if r["pair"]), key=lambda r: -float(r["score"])):
        pairs[r["pair"]] = r
    units += pairs.values()
    scores, clusters = [r["score"] for r in units], [r["cluster"] for r in units]
    return estimate(scores, clusters, [(r["type"],) for r in units]).value


def micro(results: Sequence[Mapping[str, Any]]) -> float:
    """Mean over items, in percent."""
    return estimate([r["score"] for r in results], [r["cluster"] for r in results]).value


def single_only(docs: Any) -> Any:
    """Questions of SpaCE-10 with one correct letter."""
    return docs.filter(lambda doc: len(str(doc["answer"]).strip()) == 1)


def double_only(docs: Any) -> Any:
    """Questions of SpaCE-10 with two correct letters."""
    return docs.filter(lambda doc: len(str(doc["answer"]).strip()) == 2)


def scored_only(docs: Any) -> Any:
    """Rows of the data engine that have a score; captions and talks of several turns are not asked."""
    return docs.filter(lambda doc: _item("spatialvlm_rows", doc).kind != "unscored")


vsti_messages, vsti_text, vsti_visual, vsti_process = _functions("vsti_bench")
space10_messages, space10_text, space10_visual, space10_process = _functions("space10")
angles_messages, angles_text, angles_visual, angles_process = _functions("all_angles")
rows_messages, rows_text, rows_visual, rows_process = _functions("spatialvlm_rows")
intern_messages, intern_text, intern_visual, intern_process = _functions("internspatial")
