"""Samples -> files of another format: canonical rows, chat messages, WebDataset shards, Arrow.

Output is written shard by shard under temporary names, with names that depend on the input alone, so an
interrupted conversion continues. What cannot be expressed in the target format is listed, never dropped
in silence.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from spatialvlm.data.formats import SourceAttrs, sample_to_json
from spatialvlm.data.formats.conversation import has_marker
from spatialvlm.data.media.paths import resolve
from spatialvlm.data.media.video import list_frames
from spatialvlm.data.sample import MediaRef, Sample, scene_names
from spatialvlm.data.sources import Source
from spatialvlm.errors import DataError, MediaError

Target = Literal["canonical", "messages", "webdataset", "arrow"]
SUFFIX: dict[Target, str] = {
    "canonical": ".jsonl", "messages": ".jsonl", "webdataset": ".tar", "arrow": ".arrow",
}  # fmt: skip
MARKER = {"image": "<image>", "video": "<video>"}
_MAGIC = (
    (b"\x89PNG", ".png"), (b"\xff\xd8", ".jpg"), (b"RIFF", ".webp"), (b"GIF8", ".gif"),
    (b"BM", ".bmp"), (b"\x1a\x45\xdf\xa3", ".mkv"),
)  # fmt: skip
_CHECKED_ROWS = 1000

Item = tuple[str, "Sample | DataError"]
"""Uid, and the sample or the reason why there is none."""


class Converter:
    """Writes samples as shards of one target format.

    Args:
        out: Folder of the result.
        to: Target format.
        root: Folder that the samples' media paths start from.
        read_bytes: Embedded bytes of cells and tar members.
        shard_rows: Samples per shard.
        key: Identity of input and options; a folder of another conversion is refused.

    Raises:
        DataError: ``out`` holds another conversion.
    """

    def __init__(
        self,
        out: str | Path,
        to: Target,
        *,
        root: str | Path,
        read_bytes: Callable[[MediaRef], list[bytes]],
        shard_rows: int = 10_000,
        key: str = "",
    ) -> None:
        self.out, self.to, self.root = Path(out), to, Path(root)
        self.read_bytes, self.shard_rows = read_bytes, shard_rows
        self.not_converted: Counter[str] = Counter()
        self.written = 0
        self.out.mkdir(parents=True, exist_ok=True)
        state = self.out / "conversion.json"
        mine = {"key": key, "to": to, "shard_rows": shard_rows}
        if state.is_file() and json.loads(state.read_text()) != mine:
            raise DataError(
                f"{self.out} holds another conversion; empty it or give another folder."
            )
        state.write_text(json.dumps(mine))

    def run(self, name: str, items: Iterable[Item]) -> list[Path]:
        """Write ``<name>-00000.<suffix>``, ``<name>-00001...``; shards that exist are kept.

        Returns:
            All shards, in order. Rows that were not converted are in ``<name>.not_converted.jsonl``.
        """
        shards: list[Path] = []
        stream = iter(items)
        with _atomic(self.out / f"{name}.not_converted.jsonl") as path, path.open("w") as refused:
            while chunk := list(islice(stream, self.shard_rows)):
                shard = self.out / f"{name}-{len(shards):05d}{SUFFIX[self.to]}"
                rows = list(self._rows(chunk, refused))
                if not shard.exists():
                    with _atomic(shard) as partial:
                        _WRITERS[self.to](partial, rows)
                self.written += len(rows)
                shards.append(shard)
        return shards

    def _rows(self, chunk: Sequence[Item], refused: Any) -> Iterator[dict[str, Any]]:
        for uid, sample in chunk:
            error = sample if isinstance(sample, DataError) else None
            if not isinstance(sample, DataError):
                try:
                    yield self._row(sample)
                except DataError as reason:
                    error = reason
            if error is not None:
                self.not_converted[error.reason] += 1
                event = {"uid": uid, "reason": error.reason, "message": str(error)}
                refused.write(json.dumps(event) + "\n")

    def _row(self, sample: Sample) -> dict[str, Any]:
        if self.to == "canonical":
            return sample_to_json(sample)
        row = message_row(sample)
        if any(self._renames(ref) for ref in sample.media):
            row["media_names"] = list(dict.fromkeys(scene_names(sample)))
        kinds = {ref.kind for ref in sample.media}
        frames = [self._split(ref) for ref in sample.media]
        if self.to == "messages":
            paths = [self._path(sample, n) for n in range(len(sample.media))]
            for kind, key in (("image", "images"), ("video", "videos")):
                found = [p for p, ref in zip(paths, sample.media, strict=True) if ref.kind == kind]
                if found:
                    row[key] = found
            return row
        if any(len(f) > 1 for f in frames) and (len(frames) > 1 or kinds == {"image"}):
            raise DataError(
                f"{sample.uid} mixes a video of separate frames with other media, which {self.to} rows "
                "cannot tell apart.",
                reason="format",
            )
        media = [
            _named(data, ref)
            for ref, parts in zip(sample.media, frames, strict=True)
            for data in parts
        ]
        if kinds == {"video"} and len(frames[0]) > 1:
            row["type"], row["frames"] = "video", True
        row["media"] = media
        row["kinds"] = [
            r.kind for r, parts in zip(sample.media, frames, strict=True) for _ in parts
        ]
        return row

    def _renames(self, ref: MediaRef) -> bool:
        """Whether a medium gets a new name; its old one may tell which scene it shows."""
        return self.to in ("webdataset", "arrow") or ref.store in ("cell", "tar")

    def _split(self, ref: MediaRef) -> list[bytes]:
        """Encoded bytes of a medium: one entry, or one per frame; nothing for targets that keep paths."""
        if self.to == "messages":
            return []
        if ref.store in ("cell", "tar"):
            return self.read_bytes(ref)
        path = resolve(self.root, "", ref.path)
        names = [""]
        if ref.store == "frames":
            names = ref.member.split("\n") if ref.member else list_frames(path)
        return [_read(resolve(self.root, ref.path, name) if name else path) for name in names]

    def _path(self, sample: Sample, number: int) -> str | list[str]:
        ref = sample.media[number]
        if ref.store == "file":
            return ref.path
        if ref.store == "frames":
            names = ref.member.split("\n") if ref.member else []
            return [f"{ref.path}/{name}" for name in names] or ref.path
        stem = _file_name(sample.uid)
        paths = []
        for k, data in enumerate(self.read_bytes(ref)):
            path = self.out / "media" / f"{stem}.{number}.{k}{_suffix(data)}"
            if not path.exists():
                path.parent.mkdir(exist_ok=True)
                with _atomic(path) as partial:
                    partial.write_bytes(data)
            paths.append(os.path.relpath(path, self.root))
        return paths if len(paths) > 1 else paths[0]


def message_row(sample: Sample) -> dict[str, Any]:
    """One ``messages`` row without its media.

    Raises:
        DataError: ``mark`` for marks, ``format`` for anything else that such rows cannot carry.
    """
    if sample.marks:
        raise DataError(f"{sample.uid} has marks, which only canonical rows carry.", reason="mark")
    messages = []
    for turn in sample.turns:
        for part in turn.parts:
            if isinstance(part, str) and has_marker(part):
                raise DataError(
                    f"{sample.uid} has a media marker inside its text.", reason="format"
                )
        content = "".join(
            part if isinstance(part, str) else MARKER[sample.media[part].kind]
            for part in turn.parts
        )
        message: dict[str, Any] = {"role": turn.role, "content": content}
        if turn.role == "assistant" and not turn.train:
            message["weight"] = 0
        messages.append(message)
    row: dict[str, Any] = {"id": sample.uid, "messages": messages}
    clips = {ref.clip_s for ref in sample.media}
    if len(clips) > 1:
        raise DataError(
            f"{sample.uid} has several clips, which a row cannot carry.", reason="format"
        )
    for clip in clips:
        if clip is not None:
            row["video_start"], row["video_end"] = clip
    fields = {
        "scene_id": sample.scene_id,
        "room_id": sample.room_id,
        "question_type": sample.capability,
        "difficulty": sample.difficulty,
    }
    return row | {key: value for key, value in fields.items() if value is not None}


def check_round_trip(
    shards: Sequence[Path],
    expected: Iterable[Sample],
    attrs: SourceAttrs,
    *,
    root: Path,
    to: Target,
) -> int:
    """Read written shards again and compare with the first samples.

    Args:
        shards: Result of :meth:`Converter.run`.
        expected: The converted samples, in order.
        attrs: Settings that make the media paths of the shards relative to ``root``.
        root: Folder that holds shards and media.
        to: Target format.

    Returns:
        How many samples were compared, at most 1000.

    Raises:
        DataError: A sample came back different.
    """
    source = Source(
        attrs,
        files=[os.path.relpath(shard, root) for shard in shards],
        root=root,
        format="canonical" if to == "canonical" else "messages",
    )
    found = (result for n in range(len(shards)) for _, result in source.scan(n))
    count = 0
    for sample, result in zip(islice(expected, _CHECKED_ROWS), found, strict=False):
        same = not isinstance(result, DataError) and len(result) == 1
        if isinstance(result, DataError) or not same or _essence(result[0]) != _essence(sample):
            raise DataError(f"{sample.uid} came back different from {to}: {result}")
        count += 1
    return count


def _essence(sample: Sample) -> list[Any]:
    turns = [(t.role, t.text, t.role == "assistant" and t.train) for t in sample.turns]
    places = [[p if isinstance(p, int) else None for p in t.parts] for t in sample.turns]
    return [turns, places, [ref.kind for ref in sample.media]]


def _named(data: bytes, ref: MediaRef) -> tuple[bytes, str]:
    """Bytes with the extension of their content."""
    if not data:
        raise MediaError(f"{ref.path} is empty.", reason="not_an_image")
    return data, _suffix(data)


def _suffix(data: bytes) -> str:
    return next((end for head, end in _MAGIC if data.startswith(head)), ".mp4")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise MediaError(f"{path} cannot be read: {error.strerror}.", reason="missing") from error


def _file_name(uid: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in uid)


def _write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w") as out:
        for row in rows:
            out.write(json.dumps(row, default=str) + "\n")


def _write_tar(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with tarfile.open(path, "w") as tar:

        def add(name: str, data: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))

        for number, row in enumerate(rows):
            key = f"{number:06d}_{_file_name(row['id'])}"
            media = row.pop("media")
            row.pop("kinds")
            if row.pop("frames", False):
                row["video"] = True
                row.pop("type")
            add(f"{key}.json", json.dumps(row).encode())
            for k, (data, end) in enumerate(media):
                add(f"{key}.{k}{end}", data)


def _write_arrow(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    import pyarrow as pa

    cell = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    message = pa.struct([("role", pa.string()), ("content", pa.string()), ("weight", pa.int8())])
    texts = ("id", "type", "scene_id", "room_id", "question_type")
    numbers = ("difficulty", "video_start", "video_end")
    schema = pa.schema(
        [(name, pa.string()) for name in texts]
        + [(name, pa.float64()) for name in numbers]
        + [("messages", pa.list_(message)), ("images", cell), ("videos", cell)]
        + [("media_names", pa.list_(pa.string()))]
    )
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as out:
        for start in range(0, len(rows), 64):
            batch = []
            for row in rows[start : start + 64]:
                cells = [
                    {"bytes": data, "path": f"{k}{end}"}
                    for k, (data, end) in enumerate(row["media"])
                ]
                row["images"] = [
                    c for c, k in zip(cells, row["kinds"], strict=True) if k == "image"
                ]
                row["videos"] = [
                    c for c, k in zip(cells, row["kinds"], strict=True) if k == "video"
                ]
                if row.pop("frames", False):
                    row["images"], row["videos"] = row["videos"], []
                batch.append({name: row.get(name) for name in schema.names})
            out.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))


_WRITERS: dict[Target, Callable[[Path, Sequence[dict[str, Any]]], None]] = {
    "canonical": _write_jsonl,
    "messages": _write_jsonl,
    "webdataset": _write_tar,
    "arrow": _write_arrow,
}


class _atomic:  # noqa: N801 - a context manager that reads like a function
    """A temporary path that takes its place when the block ends without an error."""

    def __init__(self, path: Path) -> None:
        self.path, self.partial = path, path.with_name(path.name + ".partial")

    def __enter__(self) -> Path:
        return self.partial

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.partial.replace(self.path)
        else:
            self.partial.unlink(missing_ok=True)
