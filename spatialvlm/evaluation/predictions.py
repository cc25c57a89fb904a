"""Prediction files: read, check, merge shards, join with a benchmark."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from spatialvlm.errors import ConfigError, DataError
from spatialvlm.evaluation.reading import read_jsonl
from spatialvlm.evaluation.schema import Item, closest

Key = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Prediction:
    """One line of a prediction file."""

    id: str
    text: str
    variant: str = ""
    extracted: str | None = None
    """Answer of an external judge; used only on request."""
    finish: str = ""
    """``eos`` or ``length``."""
    error: str = ""
    """Why the item could not be answered (unreadable media)."""
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        """What it is joined by."""
        return self.id, self.variant

    def to_row(self) -> dict[str, Any]:
        """The line it was read from, without empty fields."""
        optional = {
            "variant": self.variant,
            "extracted": self.extracted,
            "finish": self.finish,
            "error": self.error,
        }
        row = {"id": self.id, "prediction": self.text, **self.extra}
        return row | {key: value for key, value in optional.items() if value not in ("", None)}


_KNOWN = ("id", "prediction", "variant", "extracted", "finish", "error")


def _from_row(row: Any, place: str) -> Prediction:
    if not isinstance(row, dict):
        raise DataError(f"{place}: expected an object, found {type(row).__name__}")
    if "id" not in row or not isinstance(row["id"], (str, int)):
        raise DataError(f"{place}: 'id' must be a string or an integer, found {row.get('id')!r}")
    text = row.get("prediction")
    if not isinstance(text, str):
        raise DataError(
            f"{place}: 'prediction' must be a string, found {type(text).__name__}; "
            'write "" for an empty answer'
        )
    extracted = row.get("extracted")
    if not isinstance(extracted, str | None):
        raise DataError(
            f"{place}: 'extracted' must be a string or null, found {type(extracted).__name__}"
        )
    return Prediction(
        id=str(row["id"]),
        text=text,
        variant=str(row.get("variant") or ""),
        extracted=extracted,
        finish=str(row.get("finish") or ""),
        error=str(row.get("error") or ""),
        extra={key: value for key, value in row.items() if key not in _KNOWN},
    )


def _lmms_row(row: Any, place: str) -> dict[str, Any]:
    """A line of lmms-eval's ``*_samples_*.jsonl``."""
    try:
        answer = row[
            "filtered_resps"
        ]  # a string, or lists around it, depending on the task's filters
        while not isinstance(answer, str):
            answer = answer[0]
        return {"id": row["doc_id"], "prediction": answer}
    except (KeyError, IndexError, TypeError):
        raise DataError(
            f"{place}: not an lmms-eval sample (needs 'doc_id' and 'filtered_resps')"
        ) from None


def read_manifest(folder: Path) -> dict[str, Any]:
    """How the answers of a folder were made; ``{}`` without a ``manifest.json``.

    Raises:
        DataError: The file holds something else.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{path} is no manifest ({error}). Answer again with run.overwrite=true, or remove it to score the "
            "predictions without knowing how they were made."
        ) from error


def read_predictions(
    paths: str | Path | Sequence[str | Path], *, style: str = "jsonl", resuming: bool = False
) -> tuple[dict[Key, Prediction], list[str]]:
    """Read one or several prediction files (shards of one run).

    Args:
        paths: Files; their order does not matter.
        style: ``jsonl`` (ours) or ``lmms`` (lmms-eval's sample log).
        resuming: A truncated last line (a killed writer) only warns; an answer replaces an earlier failure, and the
            answer to a prompt that has changed.

    Returns:
        Predictions by ``(id, variant)`` in file order, and warnings.

    Raises:
        DataError: Empty, broken, or the same id with different answers.
    """
    if style not in ("jsonl", "lmms"):
        raise ConfigError(
            f"prediction format {style!r} is not one of: jsonl, lmms{closest(style, ['jsonl', 'lmms'])}"
        )
    if isinstance(paths, (str, Path)):
        paths = [paths]
    found: dict[Key, tuple[Prediction, str]] = {}
    warnings: list[str] = []
    for path in map(Path, paths):
        if not path.is_file():
            raise DataError(f"predictions {path} do not exist")
        rows, notes = read_jsonl(path, drop_broken_tail=resuming)
        warnings += notes
        if not rows and not resuming:
            raise DataError(f"predictions {path} are empty")
        for number, row in rows:
            place = f"{path}:{number}"
            prediction = _from_row(_lmms_row(row, place) if style == "lmms" else row, place)
            before = found.get(prediction.key)
            if before is None or (resuming and _outdated(before[0], prediction)):
                found[prediction.key] = (prediction, place)
            elif resuming and _outdated(prediction, before[0]):
                continue
            elif before[0].text != prediction.text or not (resuming or len(paths) > 1):
                raise DataError(
                    f"id {prediction.id!r} has two predictions: {before[1]} and {place}. "
                    "Remove one of the lines."
                )
    return {key: value[0] for key, value in found.items()}, warnings


def _outdated(old: Prediction, new: Prediction) -> bool:
    """Whether an item was asked again for a reason: its media failed, or its prompt is another one now."""
    if old.error or new.error:
        return bool(old.error)
    return old.extra.get("prompt_sha") != new.extra.get("prompt_sha")


def by_row_number(
    items: Sequence[Item], predictions: Mapping[Key, Prediction]
) -> dict[Key, Prediction]:
    """Give answers of lmms-eval, which are numbered by row, the ids of these rows.

    Args:
        items: All rows of the file that are asked, in its order; no sub-set of them.
        predictions: Answers whose id is a row number from 0.

    Raises:
        DataError: A number beyond the last row.
    """
    found = {}
    for prediction in predictions.values():
        if not prediction.id.isdecimal() or int(prediction.id) >= len(items):
            raise DataError(
                f"the sample log answers row {prediction.id}, the benchmark file has {len(items)} items: "
                "wrong split or benchmark?"
            )
        item = items[int(prediction.id)]
        found[item.key] = replace(prediction, id=item.id, variant=item.variant)
    return found


def join(
    items: Sequence[Item], predictions: Mapping[Key, Prediction], *, allow_partial: bool = False
) -> list[tuple[Item, Prediction]]:
    """Pair items with their predictions by id and variant.

    Raises:
        DataError: Unknown ids, or missing ones without ``allow_partial``.
    """
    known = {item.key for item in items}
    unknown = [key for key in predictions if key not in known]
    if unknown and not allow_partial:
        raise DataError(
            f"{len(unknown)} prediction ids are not in the benchmark, e.g. {_shown(unknown)}: "
            "wrong split or benchmark? --allow-partial ignores them."
        )
    missing = [item.key for item in items if item.key not in predictions]
    if missing and not allow_partial:
        raise DataError(
            f"{len(missing)} of {len(items)} items have no prediction, e.g. {_shown(missing)}; "
            "finish the run, or score what is there: python -m spatialvlm.evaluation score --allow-partial"
        )
    pairs = [(item, predictions[item.key]) for item in items if item.key in predictions]
    if not pairs:
        raise DataError(
            "no prediction belongs to an item of the benchmark: wrong split or benchmark?"
        )
    return pairs


def _shown(keys: Iterable[Key]) -> str:
    return ", ".join("/".join(part for part in key if part) for key in list(keys)[:5])


def write_predictions(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write prediction rows under a temporary name and rename."""
    partial = path.with_name(path.name + ".tmp")
    with partial.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    partial.replace(path)
