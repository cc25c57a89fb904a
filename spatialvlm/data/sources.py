"""A source: some files of one format below one root, read row by row."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from spatialvlm.data.arrow_rows import ArrowRows, parquet_to_arrow
from spatialvlm.data.containers import Container, JoinedRows, JsonArray, JsonLines, RawRow
from spatialvlm.data.formats import FORMATS, Format, Place, SourceAttrs, detect, read_row
from spatialvlm.data.formats.base import media_path
from spatialvlm.data.formats.scene_qa import referring_error
from spatialvlm.data.hub import fetch, is_hub_root
from spatialvlm.data.media.paths import resolve
from spatialvlm.data.sample import MediaRef, Sample
from spatialvlm.data.tar_rows import TarRows
from spatialvlm.errors import ConfigError, DataError, MediaError

_DETECT_ROWS = 100
_OPEN_FILES = 4
MAX_FILES = 65_535
"""Files of one source; the row table numbers them in 16 bits."""


class Source:
    """Files of one format. Nothing is opened before it is needed; an instance can be pickled to workers.

    Args:
        attrs: What the readers need to know.
        files: Data files or glob patterns, relative to ``root``; a folder stands for the Arrow files of a
            Hugging Face dataset saved in it.
        root: Folder of data files and media, or ``hf://datasets/<owner>/<name>@<revision>``, of which the
            listed files are fetched once.
        format: A name of :data:`~spatialvlm.data.formats.FORMATS`, or ``auto``.
        access: How parquet is read row by row: converted once to memory-mapped Arrow files below
            ``cache_dir``, or by row groups.
        cache_dir: Where converted files go.

    Raises:
        ConfigError: A file is missing, listed twice, or of no known kind.
    """

    def __init__(
        self,
        attrs: SourceAttrs,
        *,
        files: Sequence[str],
        root: str | Path,
        format: str = "auto",
        access: Literal["arrow", "row_group"] = "arrow",
        cache_dir: str | Path = ".cache/index",
    ) -> None:
        self.attrs = attrs
        self.name, self.family = attrs.name, attrs.family
        self.access = access
        self.cache_dir = Path(cache_dir)
        self.revision = ""
        """Commit of a root on the Hub."""
        if is_hub_root(root):
            with locked(self.cache_dir / "hub.lock"):
                root, self.revision = fetch(str(root), files, self.cache_dir)
        self.root = Path(root)
        if format != "auto" and format not in FORMATS:
            raise ConfigError(
                f"source {self.name}: unknown format {format!r}; known: {', '.join(FORMATS)}."
            )
        self.files = _expand(self.name, self.root, files)
        self.notes: list[str] = []
        """What opening the files found that a user should know."""
        self.repeat_time = 1.0
        """``repeat_time`` of a SPAR manifest: multiply ``repeat`` by it; below 1 it is a ``fraction``."""
        self._bases = [attrs.base] * len(self.files)
        manifest = read_manifest(self.name, self.root, self.files)
        if manifest is not None:
            self.files, self._bases, self.repeat_time = manifest
        self.stems = _stems(self.files)
        self._format = format
        self._containers: dict[str, Container] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_containers": {}}

    @property
    def format(self) -> Format:
        """The format, detected from the first rows when it is ``auto``."""
        if self._format == "auto":
            found = [raw.value for raw in islice(self.container(0).scan(), _DETECT_ROWS)]
            rows = [value for value in found if not isinstance(value, DataError)]
            if not rows:
                what = str(found[0]) if found else f"{self.root / self.files[0]} holds no rows."
                raise DataError(f"source {self.name}: {what}", reason="bad_json")
            self._format = detect(rows, f"source {self.name}, {self.files[0]}").name
        fmt = FORMATS[self._format]
        if fmt.shape == "referring":
            raise referring_error(f"source {self.name} ({self.files[0]})")
        return fmt

    def container(self, file: int | str) -> Container:
        """The container of a data file: its number, or a path below the root."""
        name = self.files[file] if isinstance(file, int) else file
        if (
            self.access == "row_group"
        ):  # decoded row groups are large: forget the file used longest ago
            known = self._containers.pop(name, None) or self._open(name)
            self._containers[name] = known
            if len(self._containers) > _OPEN_FILES:
                del self._containers[next(iter(self._containers))]
        elif name not in self._containers:
            self._containers[name] = self._open(name)
        return self._containers[name]

    def scan(
        self, file: int, part: tuple[int, int, int] | None = None
    ) -> Iterator[tuple[RawRow, list[Sample] | DataError]]:
        """Every row of a file with its samples, or the reason why it has none.

        Args:
            file: Number of the file.
            part: One part of :meth:`~spatialvlm.data.containers.JsonLines.ranges`; None = all.
        """
        fmt, attrs = self.format, self._attrs_of(file)
        container = self.container(file)
        rows = container.scan()
        if part is not None:
            assert isinstance(container, JsonLines), f"{container} cannot be scanned in parts"
            rows = container.scan(*part)
        for raw in rows:
            if isinstance(raw.value, DataError):
                yield raw, raw.value
                continue
            try:
                yield raw, read_row(raw.value, fmt, attrs, self.place(file, raw.row))
            except DataError as error:
                yield raw, error

    def read(self, file: int, row: int, offset: int, length: int, epoch: int = 0) -> list[Sample]:
        """Samples of one row at an address from :meth:`scan`.

        Raises:
            DataError: The row is not what it was when it was indexed.
        """
        value = self.container(file).read(row, offset, length)
        return read_row(value, self.format, self._attrs_of(file), self.place(file, row, epoch))

    def _attrs_of(self, file: int) -> SourceAttrs:
        if self._bases[file] == self.attrs.base:
            return self.attrs
        return replace(self.attrs, base=self._bases[file])

    def place(self, file: int, row: int, epoch: int = 0) -> Place:
        """Where a row stands."""
        return Place(self.files[file], self.stems[file], row, epoch)

    def media_bytes(self, ref: MediaRef) -> list[bytes]:
        """Embedded bytes of a medium in a cell or tar member: one entry, or one per frame.

        Raises:
            MediaError: The cell or member is missing or empty, or the shard lies outside the root.
        """
        if ref.path not in self._containers and not resolve(self.root, "", ref.path).is_file():
            raise MediaError(f"{ref.path} is not below {self.root}.", reason="missing")
        try:
            container = self.container(ref.path)
        except ConfigError as error:
            raise MediaError(str(error), reason="bad_cell") from error
        return container.media_bytes(ref)

    def _open(self, name: str) -> Container:
        path = self.root / name
        kind = path.suffix.lower()
        if kind == ".jsonl":
            return JsonLines(path)
        if kind == ".json":
            return self._open_json(path)
        if kind == ".csv":
            return _open_csv(path)
        if kind == ".parquet":
            if self.access == "row_group":
                return ArrowRows(path)
            converted = self._cached(path, "arrow")
            if not converted.is_file():
                with locked(converted.with_suffix(".lock")):
                    if not converted.is_file():
                        parquet_to_arrow(path, converted)
            return ArrowRows(converted)
        if kind == ".arrow":
            return ArrowRows(path)
        if kind == ".tar":
            return TarRows(path, self._cached(path, "npz"))
        raise ConfigError(
            f"source {self.name}: {name} is of no known kind; "
            "known: .jsonl, .json, .csv, .parquet, .arrow, .tar, and saved Hugging Face datasets."
        )

    def _cached(self, path: Path, suffix: str) -> Path:
        """Where what was derived from a file is kept, as long as the file does not change."""
        stat = path.stat()
        key = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
        digest = hashlib.blake2b(key.encode(), digest_size=8).hexdigest()
        return self.cache_dir / "files" / f"{path.stem}-{digest}.{suffix}"

    def _open_json(self, path: Path) -> Container:
        head = _head(path)
        if not head.startswith(b"{"):
            return JsonArray(path)
        whole = _json_object(path)
        if whole is None:
            return JsonLines(path)
        if "annotations" in whole and "questions" not in whole:
            return JoinedRows(path, [])  # its rows are those of the questions' file
        if "questions" not in whole:
            raise ConfigError(
                f"source {self.name}: {path.name} is one JSON object with the keys {sorted(whole)[:8]}, not a "
                "list of rows."
            )
        annotations: list[Any] = []
        for name in self.files:
            other = _json_object(self.root / name) if name.endswith(".json") else None
            annotations += (other or {}).get("annotations", [])
        rows, alone = join_by_id(whole["questions"], annotations, "question_id")
        if alone:
            self.notes.append(
                f"{path.name}: {len(alone)} question_ids have no partner and are left out: {alone[:5]}"
            )
        return JoinedRows(path, rows)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Only one process of the host at a time.

    Raises:
        DataError: The folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise DataError(
            f"cannot write to {path.parent}: {error}. Free space or point data.index_dir elsewhere."
        ) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()


def _json_object(path: Path) -> dict[str, Any] | None:
    """The file as one JSON object, or None when it is a list, or one object per line."""
    if not _head(path).startswith(b"{"):
        return None
    with path.open("rb") as file:
        first = file.readline()
        if file.read(1).strip() and _is_json(first):
            return None
    try:
        whole = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None
    known = isinstance(whole, dict) and not {"conversations", "messages", "turns"} & whole.keys()
    return whole if known else None


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _open_csv(path: Path) -> Container:
    """A table of text; columns are found by name, lists are Python literals."""
    import csv

    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return JoinedRows(path, [dict(row) for row in csv.DictReader(file)])
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is no CSV file in UTF-8: {error}.", reason="schema") from error


def read_manifest(
    source: str, root: Path, files: Sequence[str]
) -> tuple[tuple[str, ...], list[str], float] | None:
    """Data files, media folders, and ``repeat_time`` of a SPAR manifest; None when it is none.

    Raises:
        ConfigError: Entries of different ``repeat_time``, which need a source each.
    """
    if len(files) != 1 or not files[0].endswith(".json") or not (root / files[0]).is_file():
        return None
    whole = _json_object(root / files[0])
    entries = list(whole.values()) if whole else []
    if not entries or not all(isinstance(e, dict) and "annotation" in e for e in entries):
        return None
    folder = Path(files[0]).parent
    repeats = {float(entry.get("repeat_time", 1)) for entry in entries}
    if len(repeats) > 1:
        raise ConfigError(
            f"source {source}: {files[0]} has entries of different repeat_time {sorted(repeats)}; list their "
            "annotation files as sources of their own, with repeat or fraction."
        )
    names = [media_path(".", str(folder / entry["annotation"])) for entry in entries]
    for name in names:
        if not (root / name).is_file():
            raise ConfigError(
                f"source {source}: {files[0]} names {name}, which is not below {root}."
            )
    bases = [media_path(".", str(folder / entry.get("root", "."))) for entry in entries]
    return tuple(names), bases, repeats.pop()


def _expand(source: str, root: Path, patterns: Sequence[str]) -> tuple[str, ...]:
    """Files of the patterns, relative to the root; globs sorted."""
    found: list[str] = []
    for pattern in patterns:
        paths = sorted(root.glob(pattern)) if any(c in pattern for c in "*?[") else [root / pattern]
        if not paths or not paths[0].exists():
            raise ConfigError(f"source {source}: no file {pattern!r} below {root}.")
        for path in paths:
            if path.is_dir():
                found += [
                    str((path / name).relative_to(root)) for name in _saved_dataset(source, path)
                ]
            else:
                found.append(str(Path(path).relative_to(root)))
    if len(set(found)) < len(found):
        twice = next(name for n, name in enumerate(found) if name in found[:n])
        raise ConfigError(
            f"source {source}: {twice} is listed twice; use repeat to draw rows more often."
        )
    if len(found) > MAX_FILES:
        raise ConfigError(
            f"source {source} has {len(found)} files, more than {MAX_FILES}; split it."
        )
    return tuple(found)


def _saved_dataset(source: str, folder: Path) -> list[str]:
    state = folder / "state.json"
    if not state.is_file():
        raise ConfigError(
            f"source {source}: {folder} is a folder without state.json; list its files, or a folder "
            "written by datasets.Dataset.save_to_disk."
        )
    try:
        return [entry["filename"] for entry in json.loads(state.read_bytes())["_data_files"]]
    except (ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            f"source {source}: {state} does not list data files ({error!r}); save the dataset again."
        ) from error


def _stems(files: Sequence[str]) -> tuple[str, ...]:
    """Shortest endings of the paths, without extension, that tell the files apart."""
    bare = [Path(name).with_suffix("").parts for name in files]
    depth = 1
    while len({parts[-depth:] for parts in bare}) < len(bare) and depth < max(map(len, bare)):
        depth += 1
    stems = ["/".join(parts[-depth:]) for parts in bare]
    if len(set(stems)) < len(stems):  # the same name with several extensions
        stems = list(files)
    return tuple(stems)


def check_sources(sources: Sequence[Source]) -> None:
    """Refuse the same name or the same file in two sources.

    Raises:
        ConfigError: Names both sources.
    """
    names: set[str] = set()
    owner: dict[Path, str] = {}
    for source in sources:
        if source.name in names:
            raise ConfigError(f"two sources are named {source.name!r}; names are unique.")
        names.add(source.name)
        for name in source.files:
            path = (source.root / name).resolve()
            if path in owner:
                raise ConfigError(
                    f"{path} is a file of both {owner[path]!r} and {source.name!r}; its rows would be "
                    "drawn twice. To draw rows more often, set repeat."
                )
            owner[path] = source.name


def join_by_id(
    questions: Sequence[Mapping[str, Any]], annotations: Sequence[Mapping[str, Any]], key: str
) -> tuple[list[dict[str, Any]], list[Any]]:
    """Rows of both lists merged by ``key``, in the order of the questions; and the ids without partner."""
    by_id = {item.get(key): item for item in annotations}
    rows = [dict(by_id[q.get(key)]) | dict(q) for q in questions if q.get(key) in by_id]
    asked = {q.get(key) for q in questions}
    return rows, sorted((asked ^ by_id.keys()) - {None}, key=str)
