"""The row table of a source: where every sample is, which rows share media, what is not eligible.

One pass over the files writes a few columns (64 bytes a row) that are memory-mapped afterwards. The
table's key is the files' content, the reader, and its options; the mixture is no part of it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import multiprocessing
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spatialvlm.data.containers import ArrowRows, JsonLines, RawRow
from spatialvlm.data.faults import INDEX_REASONS
from spatialvlm.data.hooks import SceneCheck
from spatialvlm.data.sample import Sample
from spatialvlm.data.sources import Source, locked
from spatialvlm.errors import BudgetError, DataError

if TYPE_CHECKING:
    import numpy.typing as npt

    from spatialvlm.typing import IntArray

_VERSION = 2
_CHUNK = 1 << 16
_PARALLEL_BYTES = 64 << 20
_FIRST_UIDS = 5

COLUMNS = np.dtype(
    [
        ("offset", np.int64),
        ("media_key", np.uint64),
        ("prefix_key", np.uint64),
        ("row", np.uint32),
        ("length", np.uint32),
        ("prompt_chars", np.uint32),
        ("answer_chars", np.uint32),
        ("scene_key", np.uint32),
        ("difficulty", np.float32),
        ("margin", np.float32),
        ("file", np.uint16),
        ("sub", np.uint16),
        ("images", np.uint16),
        ("capability", np.int16),
        ("turns", np.uint8),
        ("videos", np.uint8),
        ("flags", np.uint8),
        ("reason", np.uint8),
    ]
)
"""One record per sample; a rejected row has one record with its reason."""

FLAG_MARKS, FLAG_VARIABLE, FLAG_BLOCKED, FLAG_NO_ID = 1, 2, 4, 8
"""Has marks to draw; its text depends on the epoch; names a blocked scene; names no known scene."""


def media_key(sample: Sample, salt: bytes = b"") -> int:
    """Identity of the ordered media list; 0 without media."""
    return media_and_prefix_key(sample, salt)[0]


def prefix_key(sample: Sample, salt: bytes = b"") -> int:
    """Equal for rows of one source that may share their media prefix; 0 = never.

    Covers the system text, the first user turn up to its last medium, the media, marks, and the geometry
    flag. Rows without media, or with media after the first answer, get 0. Whether rows really share is
    decided from their tokens and pixels when a step is planned; this key only brings them together.
    """
    return media_and_prefix_key(sample, salt)[1]


def media_and_prefix_key(sample: Sample, salt: bytes = b"") -> tuple[int, int]:
    """:func:`media_key` and :func:`prefix_key` at once."""
    if not sample.media:
        return 0, 0
    media = "\0".join(
        [
            f"{r.kind}\0{r.store}\0{r.path}\0{r.member}\0{r.clip_s or ''}\0{r.frames or ''}"
            for r in sample.media
        ]
    )
    system = ""
    for turn in sample.turns:
        if turn.role == "user":
            break
        system = turn.text
    parts, last = turn.parts, len(sample.media) - 1
    media_hash = _hash(salt, media)
    if last not in parts:
        return media_hash, 0
    until = len(parts) - 1 - parts[::-1].index(last)
    text = "\0".join([p if isinstance(p, str) else f"\1{p}" for p in parts[: until + 1]])
    marks = str(sample.marks) if sample.marks else ""
    flags = f"{sample.geometry}{sample.same_scene}{sample.frames_pinned}"
    return media_hash, _hash(salt, f"{system}\0{text}\0{marks}\0{flags}\0{media}")


@functools.lru_cache(maxsize=1024)
def _hash(salt: bytes, text: str) -> int:
    """64 bits of blake2b, never 0. Neighbouring rows often share their media, hence the cache."""
    data = salt + text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") or 1


class SourceIndex:
    """A source with its row table.

    Args:
        source: The source.
        folder: Folder that :func:`build_index` wrote.
    """

    def __init__(self, source: Source, folder: Path) -> None:
        self.source = source
        self.folder = folder
        self.info: dict[str, Any] = json.loads((folder / "info.json").read_text())
        self.capabilities: tuple[str, ...] = tuple(self.info["capabilities"])
        self._columns: dict[str, npt.NDArray[Any]] = {}
        self._checked: set[int] = set()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_columns": {}}

    def __len__(self) -> int:
        return int(self.info["rows"])

    @property
    def content_key(self) -> str:
        """Hash of the files' content and the reader; equal on every machine."""
        return str(self.info["content_key"])

    def column(self, name: str) -> npt.NDArray[Any]:
        """One memory-mapped column ``[rows]`` of :data:`COLUMNS`."""
        if name not in self._columns:
            self._columns[name] = np.load(self.folder / f"{name}.npy", mmap_mode="r")
        return self._columns[name]

    def row_groups(self) -> IntArray | None:
        """int64 ``[rows]``: the row group a row is decoded with; None when rows are read one by one."""
        if self.source.access != "row_group":
            return None
        file, row = np.asarray(self.column("file"), np.int64), np.asarray(self.column("row"))
        groups = np.zeros(len(self), np.int64)
        first = 0
        for number in range(len(self.source.files)):
            container = self.source.container(number)
            if not isinstance(container, ArrowRows):
                return None
            mine = file == number
            groups[mine] = first + np.searchsorted(container.group_starts, row[mine], side="right")
            first += len(container.group_starts)
        return groups

    def eligible(self, *, drop_blocked: bool = False) -> npt.NDArray[np.bool_]:
        """Bool ``[rows]``: rows that may be drawn."""
        good = self.column("reason") == 0
        if drop_blocked:
            good &= (self.column("flags") & FLAG_BLOCKED) == 0
        return np.asarray(good)

    def uid(self, row: int) -> str:
        """The uid without reading the row; exact unless one row became several samples."""
        stem = self.source.stems[int(self.column("file")[row])]
        return f"{self.source.name}/{stem}#{int(self.column('row')[row])}"

    def sample(self, row: int, epoch: int = 0) -> Sample:
        """The sample of a row of the table.

        Args:
            row: Number in the table.
            epoch: Pass over the source, for ``answers: cycle``.

        Raises:
            DataError: The row was rejected, or its file changed since it was indexed.
        """
        file = int(self.column("file")[row])
        self._check_unchanged(file, row)
        samples = self.source.read(
            file,
            int(self.column("row")[row]),
            int(self.column("offset")[row]),
            int(self.column("length")[row]),
            epoch,
        )
        return samples[int(self.column("sub")[row])]

    def rejected(self) -> dict[str, int]:
        """Rejected rows per reason."""
        return dict(self.info["rejected"])

    def _check_unchanged(self, file: int, row: int) -> None:
        if file in self._checked:
            return
        path = self.source.root / self.source.files[file]
        size, _ = self.info["files"][file]
        if path.stat().st_size != size:
            raise DataError(
                f"{self.uid(row)}: {path} has {path.stat().st_size} bytes and had {size} when it was "
                "indexed. Restore the file or start a new run, which indexes it again."
            )
        self._checked.add(file)


def build_index(
    source: Source,
    index_dir: str | Path,
    *,
    check: SceneCheck | None = None,
    check_key: str = "",
    workers: int = 1,
    max_rejected_fraction: float = 0.01,
) -> SourceIndex:
    """Open the row table of a source; build it when the files or the reader's options changed.

    Args:
        source: The source.
        index_dir: Folder of all tables; one process per host writes a table, the others wait.
        check: Looks up scene and room ids and media paths in the block lists.
        check_key: Identity of the block lists.
        workers: Processes that read large JSON-lines files.
        max_rejected_fraction: More rejected rows than this are an error.

    Raises:
        DataError: All rows were rejected, or the disk is full.
        BudgetError: Too many rows were rejected.
    """
    key, content_key = _keys(source, check_key)
    folder = Path(index_dir) / f"{source.name}-{key}"
    if not (folder / "info.json").is_file():
        with locked(folder.with_suffix(".lock")):
            if not (folder / "info.json").is_file():
                _build(source, folder, content_key, check, workers)
    index = SourceIndex(source, folder)
    _check_budget(index, max_rejected_fraction)
    return index


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

    columns: list[Path]
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
    partial = folder.with_suffix(".partial")
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
    found = _Part([], 0, [], Counter(), {}, Counter(), {}, Counter())
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
            found.first.setdefault(reason, uid)
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
    found.columns = [target]
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
        0 if scene is None else _hash(b"", scene) & 0xFFFFFFFF,
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
    texts = [sample.scene_id, sample.room_id, sample.meta.get("scene_name")]
    texts += [
        f"{ref.path}/{ref.member}" if ref.store == "tar" else ref.path for ref in sample.media
    ]
    known, hits = False, set[str]()
    for text in texts:
        if not isinstance(text, str) or not text:
            continue
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
                piece = part.columns[0] / name
                if name == "capability":
                    local = np.array([-1, *(number[c] for c in part.capabilities)], np.int16)
                    out.write(local[np.fromfile(piece, kind) + 1].tobytes())
                else:
                    with piece.open("rb") as source:
                        shutil.copyfileobj(source, out, 1 << 22)
                piece.unlink()
    with (folder / "rejected.jsonl").open("w") as out_text:
        for part in parts:
            out_text.write((part.columns[0] / "rejected.jsonl").read_text())
            shutil.rmtree(part.columns[0])
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
