"""Benchmark files: JSON lines, JSON, tables and parquet into checked items."""

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from spatialvlm.errors import DataError
from spatialvlm.evaluation.schema import Benchmark, BenchmarkSpec, Item, Row, closest


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def read_jsonl(
    path: Path, *, drop_broken_tail: bool = False
) -> tuple[list[tuple[int, Any]], list[str]]:
    """Read JSON lines with their line numbers.

    Args:
        path: UTF-8 file, one JSON object per line; blank lines are skipped.
        drop_broken_tail: Drop a last line without its newline (a killed writer).

    Returns:
        ``(line number from 1, object)`` pairs and warnings.

    Raises:
        DataError: Not UTF-8, or a broken line.
    """
    data, warnings = path.read_bytes(), []
    if drop_broken_tail and data and not data.endswith(b"\n"):
        data = data[: data.rfind(b"\n") + 1]  # before decoding: a kill also cuts characters
        number = data.count(b"\n") + 1
        warnings.append(f"{path}:{number}: dropped a truncated last line")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 (byte {error.start}); re-encode it: iconv -t UTF-8"
        ) from None
    rows: list[tuple[int, Any]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append((number, json.loads(line)))
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}:{number}, column {error.colno}: not JSON ({error.msg}): {line[:80]!r}"
            ) from None
    return rows, warnings


def _read_table(path: Path, delimiter: str) -> list[Row]:
    csv.field_size_limit(1 << 30)  # base64 images are long cells
    with path.open(encoding="utf-8", newline="") as file:
        return [dict(row) for row in csv.DictReader(file, delimiter=delimiter)]


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows: list[Row] = pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable parquet file: {error}") from error
    return rows


def read_rows(path: Path) -> list[Row]:
    """Rows of a benchmark file (``.jsonl .json .tsv .csv .parquet``) or of all parquet files of a folder.

    Raises:
        DataError: Missing, empty, not UTF-8, broken, or of an unknown kind.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist")
    if path.is_dir():
        rows = [row for part in sorted(path.glob("*.parquet")) for row in _read_parquet(part)]
    elif path.suffix == ".jsonl":
        rows = [row for _, row in read_jsonl(path)[0]]
    elif path.suffix == ".json":
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise DataError(f"{path} is not JSON: {error}") from None
        rows = content.get("data", []) if isinstance(content, dict) else content
    elif path.suffix in (".tsv", ".csv"):
        try:
            rows = _read_table(path, "\t" if path.suffix == ".tsv" else ",")
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{path} cannot be read: {error}") from None
    elif path.suffix == ".parquet":
        rows = _read_parquet(path)
    else:
        raise DataError(f"{path}: unknown file type; use .jsonl, .json, .tsv, .csv or .parquet")
    if not rows:
        raise DataError(f"{path} is empty: no benchmark rows")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{path}: row {number} is {type(row).__name__}, expected an object")
    return rows


def _source_hash(path: Path) -> str:
    if path.is_file():
        return sha256_of(path)
    parts = "".join(sha256_of(part) for part in sorted(path.glob("*.parquet")))
    return hashlib.sha256(parts.encode()).hexdigest()


def _item(spec: BenchmarkSpec, row: Row, number: int, path: Path) -> Item:
    try:
        return spec.parse(row, str(row[spec.id_key]) if spec.id_key else str(number))
    except KeyError as error:
        raise DataError(
            f"{path}: row {number} of {spec.name} has no column {error}; found: {', '.join(map(str, row))}"
            f"{closest(str(error.args[0]), map(str, row))}"
        ) from None
    except (ValueError, TypeError, IndexError, AttributeError) as error:
        raise DataError(
            f"{path}: row {number} is no row of {spec.name}: {error}; fix the row, or is this another benchmark's file?"
        ) from None


def load_items(
    spec: BenchmarkSpec,
    path: str | Path,
    *,
    media_root: str | Path | None = None,
    ids: Collection[str] | None = None,
    strict: bool = False,
) -> Benchmark:
    """Read and validate a benchmark file.

    Args:
        spec: Which benchmark the file holds.
        path: The file (or a folder of parquet files).
        media_root: Folder that media paths are relative to; default: the folder of the file.
        ids: Keep only these ids (a published subset).
        strict: Refuse a file whose item count differs from the published one.

    Raises:
        DataError: Any row that does not fit the benchmark.
    """
    path = Path(path)
    rows = read_rows(path)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    for column in (*spec.columns, *([spec.id_key] if spec.id_key else [])):
        if column not in columns:
            raise DataError(
                f"{path}: benchmark {spec.name} needs column {column!r}; found: {', '.join(columns)}"
                f"{closest(column, columns)}"
            )
    items: Sequence[Item] = [_item(spec, row, number, path) for number, row in enumerate(rows)]
    unscored = sum(item.kind == "unscored" for item in items)
    items = [item for item in items if item.kind != "unscored" and (ids is None or item.id in ids)]
    if spec.select:
        items = spec.select(items)
    if not items:
        raise DataError(f"{path}: no row of {spec.name} can be scored ({unscored} unscored rows)")
    repeated = [key for key, count in Counter(item.key for item in items).items() if count > 1]
    if repeated:
        shown = ", ".join(key[0] for key in repeated[:5])
        raise DataError(f"{path}: {len(repeated)} ids occur more than once: {shown}")
    warnings = []
    if spec.expected_n is not None and len(items) != spec.expected_n:
        message = f"{path}: {len(items)} items, the published {spec.title} has {spec.expected_n}"
        if strict:
            raise DataError(f"{message}. Drop --strict to score it as partial.")
        warnings.append(message)
    root = Path(media_root) if media_root else (path if path.is_dir() else path.parent)
    digest = _source_hash(path)
    return Benchmark(spec, tuple(items), path, digest, root, tuple(warnings), unscored)
