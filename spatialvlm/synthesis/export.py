"""Write generated rows in formats of other trainers: ShareGPT, messages, WebDataset.

What is lazy in our own loader can be fixed here: marks are drawn into copies of the images, and one
instruction format is realised in the text.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq
from PIL import Image

from spatialvlm.errors import ConfigError, ContaminationError, DataError, MediaError
from spatialvlm.synthesis.formats import Dialect, expand_slots, replace_names, text_and_view
from spatialvlm.synthesis.marks import draw_marks, mark_from_dict
from spatialvlm.synthesis.rows import CONTAMINATED, Draws
from spatialvlm.typing import MarkSpec

ExportKind = Literal["sharegpt", "messages", "webdataset"]
SHARD_BYTES = 2**30
_ROLES = {"system": "system", "user": "human", "assistant": "gpt"}
_MARKER = {"images": "<image>", "video": "<video>"}


def export_rows(
    folder: Path,
    scenes: Path,
    out: Path,
    kind: ExportKind,
    *,
    format_id: int | None = None,
    dialect: Dialect = "internvl",
    render_marks: bool = False,
    licenses: Sequence[str] = (),
    allow_contaminated: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Export all rows of a folder.

    Args:
        folder: Generated parts.
        scenes: Folder the image paths are relative to.
        out: New folder.
        kind: ``sharegpt`` (``conversations``), ``messages``, or ``webdataset`` (tar shards with the images).
        format_id: Show rows that allow it in this instruction format; others as written.
        dialect: How that format writes boxes.
        render_marks: Draw marks into copies below ``out/images``; without it rows with marks are refused.
        licenses: Only these licences; empty = all.
        allow_contaminated: Export rows about evaluation scenes as well.
        shard_bytes: Largest tar shard.

    Returns:
        Manifest: rows, skipped rows by reason, licences that remain.

    Raises:
        ConfigError: Rows with marks would lose them.
        ContaminationError: A row is about an evaluation scene.
        MediaError: An image is missing; no row is ever replaced by another.
        DataError: There is no such format.
    """
    if format_id is not None:
        text_and_view(format_id)
    out.mkdir(parents=True, exist_ok=True)
    counts: Counter[str] = Counter()
    kept: Counter[str] = Counter()
    as_written: Counter[str] = Counter()

    def rows() -> Iterator[tuple[dict[str, Any], list[MarkSpec]]]:
        for row in read_parts(folder):
            if licenses and row["license"] not in licenses:
                counts[f"license {row['license']}"] += 1
                continue
            if CONTAMINATED in row["tags"] and not allow_contaminated:
                raise ContaminationError(
                    f"row {row['id']} is about the evaluation scene {row['scene_id']}. Pass "
                    "--allow-contaminated again if the export is not for training."
                )
            kept[row["license"]] += 1
            as_written["rows"] += format_id is not None and format_id not in row["formats_ok"]
            yield realise(row, format_id, dialect)

    if kind == "webdataset":
        written = _write_tars(rows(), scenes, out, render_marks, shard_bytes)
    else:
        convert = _sharegpt if kind == "sharegpt" else _messages
        written = _write_jsonl(rows(), scenes, out, render_marks, convert)
    manifest = {
        "kind": kind,
        "rows": written,
        "skipped": dict(sorted(counts.items())),
        "licenses": dict(sorted(kept.items())),
        "format_id": format_id,
        "rows_without_that_format": as_written["rows"],
        "marks": "drawn" if render_marks else "none",
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    return manifest


def read_parts(folder: Path) -> Iterator[dict[str, Any]]:
    """Rows of all parquet files of a folder in order.

    Raises:
        ConfigError: There is none.
    """
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise ConfigError(f"{folder}: no parquet file to export.")
    for path in files:
        for batch in pq.ParquetFile(path).iter_batches(1024):
            yield from batch.to_pylist()


def realise(
    row: dict[str, Any], format_id: int | None, dialect: Dialect
) -> tuple[dict[str, Any], list[MarkSpec]]:
    """Text and marks of a row in one instruction format, or as written."""
    marks = [mark_from_dict(record) for record in json.loads(row["marks"])]
    slots = json.loads(row["slots"])
    if format_id is None or format_id not in row["formats_ok"] or not slots:
        return row, marks
    expansion = expand_slots(slots, format_id, dialect, Draws("export", row["id"]))
    messages = [dict(message) for message in row["messages"]]
    for index, message in enumerate(messages):
        places = [
            (number, start, end)
            for number, slot in enumerate(slots)
            for at, start, end in slot["spans"]
            if at == index
        ]
        shift = len(message["content"]) - len(_without_markers(message["content"]))
        message["content"] = replace_names(message["content"], places, expansion, shift)
    return {**row, "messages": messages}, list(expansion.marks)


def _without_markers(text: str) -> str:
    while text.startswith(("<image>\n", "<video>\n")):
        text = text.partition("\n")[2]
    return text


def _check_markers(row: Mapping[str, Any]) -> None:
    text = "".join(message["content"] for message in row["messages"])
    wanted = (
        len(row["images"]) if row["media_kind"] == "images" else int(row["media_kind"] == "video")
    )
    marker = _MARKER.get(row["media_kind"], "<image>")
    if text.count(marker) != wanted:
        raise DataError(
            f"row {row['id']} has {text.count(marker)} {marker} markers and {wanted} media; "
            "generate it again.",
            reason="marker_count",
        )


def _sharegpt(row: Mapping[str, Any], images: Sequence[str]) -> dict[str, Any]:
    turns = [{"from": _ROLES[m["role"]], "value": m["content"]} for m in row["messages"]]
    return {"id": row["id"], "conversations": turns, **_media(row, images)}


def _messages(row: Mapping[str, Any], images: Sequence[str]) -> dict[str, Any]:
    return {"id": row["id"], "messages": row["messages"], **_media(row, images)}


def _media(row: Mapping[str, Any], images: Sequence[str]) -> dict[str, Any]:
    if row["media_kind"] == "video":
        return {"video": [list(images)]}
    return {"image": list(images)} if images else {}


def _write_jsonl(
    rows: Iterator[tuple[dict[str, Any], list[MarkSpec]]],
    scenes: Path,
    out: Path,
    render_marks: bool,
    convert: Callable[[Mapping[str, Any], Sequence[str]], dict[str, Any]],
) -> int:
    """Write one line per row; image paths are relative to the scenes folder, drawn copies to ``out``."""
    written = 0
    temporary = out / ".rows.jsonl.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        for row, marks in rows:
            _check_markers(row)
            images = list(row["images"])
            if marks:
                _require_drawing(row, render_marks)
                for index in sorted({mark.image for mark in marks}):
                    name = f"images/{row['id']}.{index}.jpg"
                    (out / "images").mkdir(exist_ok=True)
                    (out / name).write_bytes(_image_bytes(row, index, scenes, marks))
                    images[index] = name
            for path in images:
                if not (scenes / path).is_file() and not (out / path).is_file():
                    raise MediaError(f"row {row['id']}: image {path} is missing below {scenes}.")
            file.write(json.dumps(convert(row, images), ensure_ascii=False) + "\n")
            written += 1
    temporary.replace(out / "rows.jsonl")
    return written


def _require_drawing(row: Mapping[str, Any], render_marks: bool) -> None:
    if not render_marks:
        raise ConfigError(
            f"row {row['id']} talks about marks that this export would not show. Pass --render-marks."
        )


def _image_bytes(
    row: Mapping[str, Any], index: int, scenes: Path, marks: Sequence[MarkSpec]
) -> bytes:
    path: Path = scenes / row["images"][index]
    own = [mark for mark in marks if mark.image == index]
    if not path.is_file():
        raise MediaError(
            f"row {row['id']}: image {row['images'][index]} is missing below {scenes}."
        )
    if not own and path.suffix.lower() in (".jpg", ".jpeg"):
        return path.read_bytes()
    with Image.open(path) as image:
        drawn = draw_marks(image, own)
    buffer = io.BytesIO()
    drawn.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def _write_tars(
    rows: Iterator[tuple[dict[str, Any], list[MarkSpec]]],
    scenes: Path,
    out: Path,
    render_marks: bool,
    shard_bytes: int,
) -> int:
    """Tar shards: ``{id}.json`` and ``{id}.N.jpg``; members have no times or owners."""
    written, shard, size = 0, 0, 0
    archive: tarfile.TarFile | None = None
    try:
        for row, marks in rows:
            _check_markers(row)
            if marks:
                _require_drawing(row, render_marks)
            names = [f"{row['id']}.{i}.jpg" for i in range(len(row["images"]))]
            members = [(name, _image_bytes(row, i, scenes, marks)) for i, name in enumerate(names)]
            members.insert(0, (f"{row['id']}.json", json.dumps(_messages(row, names)).encode()))
            total = sum(len(data) + 1024 for _, data in members)
            if archive is None or size + total > shard_bytes:
                if archive is not None:
                    archive.close()
                archive = tarfile.open(out / f"shard-{shard:05d}.tar", "w")  # noqa: SIM115
                shard, size = shard + 1, 0
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
            size += total
            written += 1
    finally:
        if archive is not None:
            archive.close()
    return written
