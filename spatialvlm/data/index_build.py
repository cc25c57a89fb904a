"""Building the row table of a source: one pass over its files, in several processes when they are large."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spatialvlm.data.containers import JsonLines, RawRow
from spatialvlm.data.faults import INDEX_REASONS
from spatialvlm.data.hooks import SceneCheck
from spatialvlm.data.index import (
    COLUMNS,
    FLAG_BLOCKED,
    FLAG_MARKS,
    FLAG_NO_ID,
    FLAG_VARIABLE,
    SourceIndex,
    media_and_prefix_key,
    stable_hash,
)
from spatialvlm.data.sample import Sample, scene_names
from spatialvlm.data.sources import Source, locked
from spatialvlm.errors import BudgetError, DataError

_VERSION = 3
"""Raised when equal rows would give other columns; part of every key."""
_CHUNK = 1 << 16
_PARALLEL_BYTES = 64 << 20
_FIRST_UIDS = 5


def build_index(
    source: Source,
    index_dir: str | Path,
    *,
    check: SceneCheck | None = None,
    check_key: str = "",
    workers: int = 1,
    max_rejected_fraction: float = 0.01,
    verify_files: bool = False,
) -> SourceIndex:
    """Open the row table of a source; build it when the files or the reader's options changed.

    Args:
        source: The source.
        index_dir: Folder of all tables; one process per host writes a table, the others wait.
        check: Looks up scene and room ids and media paths in the block lists.
        check_key: Identity of the block lists.
        workers: Processes that read large JSON-lines files.
        max_rejected_fraction: More rejected rows than this are an error.
        verify_files: Read the files whole and build again unless they are, byte for byte, those the table
            was verified with; else size, time and both ends of a file tell.

    Raises:
        DataError: All rows were rejected, or the disk is full.
        BudgetError: Too many rows were rejected.
    """
    key, content_key = _keys(source, check_key)
    folder = Path(index_dir) / f"{source.name}-{key}"
    hashes = [_file_hash(source.root / name) for name in source.files] if verify_files else None
    if not _is_current(folder, hashes):
        with locked(folder.with_name(f"{folder.name}.lock")):
            if not _is_current(folder, hashes):
                _build(source, folder, content_key, check, workers)
                if hashes is not None:
                    partial = folder / "hashes.tmp"  # others read without the lock
                    partial.write_text(json.dumps(hashes))
                    partial.replace(folder / "hashes.json")
    index = SourceIndex(source, folder)
    _check_budget(index, max_rejected_fraction)
    return index


def _is_current(folder: Path, hashes: list[str] | None) -> bool:
    """Whether a table is there and, if asked for, was built from files with these hashes."""
    if not (folder / "info.json").is_file():
        return False
    known = folder / "hashes.json"
    return hashes is None or (known.is_file() and json.loads(known.read_bytes()) == hashes)


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _check_budget(index: SourceIndex, limit: float) -> None:
    rejected = {k: v for k, v in index.info["rejected"].items() if k != "excluded"}
    total, rows = sum(rejected.values()), len(index)
    if rows == 0:
        raise DataError(f"source {index.source.name} has no rows: {', '.join(index.source.files)}.")
    if not total:
        return
    details = "; ".join(
        f"{reason} {count} (first: {index.info['first'][reason]})"
        for reason, count in rejected.items()
    )
    where = f"All of them are listed in {index.folder / 'rejected.jsonl'}."
    if total == rows:
        raise DataError(f"source {index.source.name}: every row was rejected: {details}. {where}")
    if total > limit * rows:
        raise BudgetError(
            f"source {index.source.name}: {total} of {rows} rows were rejected, more than "
            f"max_rejected_fraction {limit}: {details}. {where}"
        )


def _keys(source: Source, check_key: str) -> tuple[str, str]:
    """Key of the table on this machine (with file times), and of its content (without)."""
    fmt = source.format
    options = dataclasses.asdict(source.attrs)
    described = {
        "version": _VERSION,
        "format": fmt.name,
        "reader": fmt.version,
        "attrs": options,
        "check": check_key,
        "files": list(source.files),
    }
    content = hashlib.blake2b(json.dumps(described, sort_keys=True).encode(), digest_size=8)
    times = []
    for name in source.files:
        path = source.root / name
        stat = path.stat()
        times.append(stat.st_mtime_ns)
        content.update(str(stat.st_size).encode())
        with path.open("rb") as file:
            content.update(file.read(1 << 16))
            file.seek(max(0, stat.st_size - (1 << 16)))
            content.update(file.read(1 << 16))
    here = f"{content.hexdigest()}{times}{source.root.resolve()}"
    return hashlib.blake2b(here.encode(), digest_size=8).hexdigest(), content.hexdigest()


@dataclasses.dataclass
class _Part:
    """What one scanning process found: column files and counters."""

    columns: Path
    rows: int
    capabilities: list[str]
    rejected: Counter[str]
    first: dict[str, str]
    blocked: Counter[str]
    blocked_first: dict[str, list[str]]
    counts: Counter[str]


def _build(
    source: Source, folder: Path, content_key: str, check: SceneCheck | None, workers: int
) -> None:
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        jobs: list[tuple[int, tuple[int, int, int] | None]] = []
        for number, name in enumerate(source.files):
            container = source.container(number)
            size = (source.root / name).stat().st_size
            if workers > 1 and size >= _PARALLEL_BYTES and isinstance(container, JsonLines):
                jobs += [(number, part) for part in container.ranges(workers)]
            else:
                jobs.append((number, None))
        arguments = [
            (source, file, part, check, partial / f"part-{n}")
            for n, (file, part) in enumerate(jobs)
        ]
        if workers > 1 and len(jobs) > 1:
            with multiprocessing.get_context("forkserver").Pool(min(workers, len(jobs))) as pool:
                parts = pool.starmap(_scan_part, arguments, chunksize=1)
        else:
            parts = [_scan_part(*args) for args in arguments]
        info = _merge(parts, partial)
        info["content_key"], info["revision"] = content_key, source.revision
        info["files"] = [
            ((source.root / name).stat().st_size, (source.root / name).stat().st_mtime_ns)
            for name in source.files
        ]
        (partial / "info.json").write_text(json.dumps(info))
        shutil.rmtree(folder, ignore_errors=True)
        partial.replace(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise DataError(
            f"cannot write the index of source {source.name} to {folder}: {error}. Free space or point "
            "data.index_dir elsewhere; nothing was left behind."
        ) from error


def _scan_part(
    source: Source,
    file: int,
    part: tuple[int, int, int] | None,
    check: SceneCheck | None,
    target: Path,
) -> _Part:
    """Read some rows and write their columns to ``target/<column>``, raw."""
    target.mkdir()
    found = _Part(target, 0, [], Counter(), {}, Counter(), {}, Counter())
    names: dict[str, int] = {}
    checked: dict[str, tuple[str, ...] | None] = {}
    records: list[tuple[Any, ...]] = []
    salt = str(source.root).encode()
    handles = {name: (target / name).open("wb") for name in COLUMNS.names or ()}
    rejected_file = (target / "rejected.jsonl").open("w")

    def flush() -> None:
        block = np.array(records, COLUMNS)
        for name, handle in handles.items():
            handle.write(np.ascontiguousarray(block[name]).tobytes())
        found.rows += len(records)
        records.clear()

    for raw, samples in source.scan(file, part):
        if isinstance(samples, DataError):
            uid = source.place(file, raw.row).uid(source.name)
            reason = samples.reason
            found.rejected[reason] += 1
            found.first.setdefault(reason, f"{uid}, {samples}".rstrip("."))
            event = {"uid": uid, "file": source.files[file], "row": raw.row, "reason": reason}
            rejected_file.write(json.dumps(event | {"message": str(samples)}) + "\n")
            records.append(_rejected_record(raw, file, INDEX_REASONS.index(reason) + 1))
        else:
            for sub, sample in enumerate(samples):
                capability = -1
                if sample.capability is not None:
                    capability = names.setdefault(sample.capability, len(names))
                flags = (FLAG_MARKS if sample.marks else 0) | (
                    FLAG_VARIABLE if sample.formats_ok or "answers" in sample.meta else 0
                )
                if check is not None:
                    flags |= _scene_flags(sample, check, checked, found)
                records.append(_record(raw, file, sub, sample, capability, flags, salt))
        if len(records) >= _CHUNK:
            flush()
    flush()
    for handle in (*handles.values(), rejected_file):
        handle.close()
    found.capabilities = list(names)
    return found


def _record(
    raw: RawRow, file: int, sub: int, sample: Sample, capability: int, flags: int, salt: bytes
) -> tuple[Any, ...]:
    prompt = answer = images = 0
    for turn in sample.turns:
        size = 0
        for part in turn.parts:
            if isinstance(part, str):
                size += len(part)
        if turn.role == "assistant":
            answer += size
        else:
            prompt += size
    for ref in sample.media:
        images += ref.kind == "image"
    scene = sample.scene_id
    media, prefix = media_and_prefix_key(sample, salt)
    return (
        raw.offset,
        media,
        prefix,
        raw.row,
        raw.length,
        prompt,
        answer,
        0 if scene is None else stable_hash(b"", scene) & 0xFFFFFFFF,
        np.nan if sample.difficulty is None else sample.difficulty,
        np.nan if sample.margin is None else sample.margin,
        file,
        sub,
        images,
        capability,
        min(255, len(sample.turns)),
        min(255, len(sample.media) - images),
        flags,
        0,
    )


def _rejected_record(raw: RawRow, file: int, reason: int) -> tuple[Any, ...]:
    nan = np.nan
    return (
        raw.offset,
        0,
        0,
        raw.row,
        raw.length,
        0,
        0,
        0,
        nan,
        nan,
        file,
        0,
        0,
        -1,
        0,
        0,
        0,
        reason,
    )


def _scene_flags(
    sample: Sample,
    check: SceneCheck,
    checked: dict[str, tuple[str, ...] | None],
    found: _Part,
) -> int:
    """Flags of one sample from its scene and room ids and media paths; hits are counted per list."""
    known, hits = False, set[str]()
    for text in scene_names(sample):
        if text not in checked:
            if len(checked) > 100_000:
                checked.clear()
            checked[text] = check(text)
        result = checked[text]
        if result is not None:
            known = True
            hits.update(result)
    for name in sorted(hits):
        found.blocked[name] += 1
        first = found.blocked_first.setdefault(name, [])
        if len(first) < _FIRST_UIDS:
            first.append(sample.uid)
    if not known and sample.media:
        found.counts["no_known_id"] += 1
    return (FLAG_BLOCKED if hits else 0) | (0 if known or not sample.media else FLAG_NO_ID)


def _merge(parts: Sequence[_Part], folder: Path) -> dict[str, Any]:
    """One ``.npy`` per column from the raw pieces, and the summed counters."""
    rows = sum(part.rows for part in parts)
    capabilities = sorted({name for part in parts for name in part.capabilities})
    number = {name: n for n, name in enumerate(capabilities)}
    for name in COLUMNS.names or ():
        kind = COLUMNS[name]
        with (folder / f"{name}.npy").open("wb") as out:
            header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False}
            np.lib.format.write_array_header_1_0(out, header | {"shape": (rows,)})
            for part in parts:
                piece = part.columns / name
                if name == "capability":
                    local = np.array([-1, *(number[c] for c in part.capabilities)], np.int16)
                    out.write(local[np.fromfile(piece, kind) + 1].tobytes())
                else:
                    with piece.open("rb") as source:
                        shutil.copyfileobj(source, out, 1 << 22)
                piece.unlink()
    with (folder / "rejected.jsonl").open("w") as out_text:
        for part in parts:
            out_text.write((part.columns / "rejected.jsonl").read_text())
            shutil.rmtree(part.columns)
    rejected: Counter[str] = Counter()
    blocked: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    first: dict[str, str] = {}
    blocked_first: dict[str, list[str]] = {}
    for part in parts:
        rejected += part.rejected
        blocked += part.blocked
        counts += part.counts
        first = part.first | first
        for name, uids in part.blocked_first.items():
            blocked_first[name] = (blocked_first.get(name, []) + uids)[:_FIRST_UIDS]
    return {
        "rows": rows,
        "capabilities": capabilities,
        "rejected": dict(rejected.most_common()),
        "first": first,
        "blocked": dict(blocked),
        "blocked_first": blocked_first,
        "no_known_id": counts["no_known_id"],
    }
