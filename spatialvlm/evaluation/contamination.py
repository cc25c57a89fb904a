"""Do training rows show evaluation scenes, pictures or questions?

Scene ids, rooms and lists come from ``scenes.blacklist``; this module adds pictures (equal files, similar
frames) and text. Matching by scan alone is not enough: the 88 ScanNet scans of VSI-Bench lie in rooms with 119
further scans.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from spatialvlm.errors import DataError
from spatialvlm.evaluation.reading import read_rows
from spatialvlm.evaluation.thumbnails import VIDEO_SUFFIXES, video_pictures
from spatialvlm.scenes.blacklist import (
    Blacklist,
    BlockList,
    find_ids,
    load_list,
    room_of,
    shipped_lists,
)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
TEXT_KEYS = (
    "messages",
    "conversations",
    "question",
    "prompt",
    "text",
    "answer",
    "options",
    "slots",
    "evidence",
)
"""Fields that hold language, not places."""
NGRAM = 13
HASH_BITS = 6
"""Largest Hamming distance of two similar pictures (64-bit DCT hash)."""
CLIP_FRAMES = 3
"""Similar frames that make two clips similar."""


# ------------------------------------------------------------------------------------------- reading one record


def strings(value: Any, *, skip: Sequence[str] = ()) -> Iterator[str]:
    """All strings inside a JSON value, without the fields named in ``skip``."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if key not in skip:
                yield from strings(inner, skip=skip)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from strings(inner, skip=skip)


def media_paths(row: Mapping[str, Any]) -> list[str]:
    """Pictures and videos a record names."""
    found = (text.replace("\\", "/") for text in strings(row, skip=TEXT_KEYS))
    return [text for text in found if text.lower().endswith((*IMAGE_SUFFIXES, *VIDEO_SUFFIXES))]


def question_of(row: Mapping[str, Any]) -> str:
    """The question with its options, in words only."""
    turns = row.get("messages") or row.get("conversations") or ()
    said = [
        str(turn.get("content", turn.get("value", "")))
        for turn in turns
        if isinstance(turn, Mapping) and turn.get("role", turn.get("from")) in ("user", "human")
    ]
    said += [str(row[key]) for key in ("question", "prompt") if isinstance(row.get(key), str)]
    options = row.get("options")
    said += [str(option) for option in options] if isinstance(options, (list, tuple)) else []
    return normalised(" ".join(said))


def normalised(text: str) -> str:
    """Lower-case words without markers and punctuation."""
    return " ".join(re.findall(r"\w+", re.sub(r"<[^<>]{1,20}>", " ", text.lower())))


def ngrams(text: str, size: int = NGRAM) -> set[int]:
    """Hashes of all runs of ``size`` words."""
    words = text.split()
    return {hash(tuple(words[i : i + size])) for i in range(len(words) - size + 1)}


def tail(path: str) -> str:
    """Last two components of a path, the part that survives a move."""
    return "/".join(PurePosixPath(path.lower()).parts[-2:])


# ------------------------------------------------------------------------------------------------- picture hashes


def dct_hash(gray: npt.NDArray[np.floating[Any]]) -> int:
    """64-bit perceptual hash of a ``[32, 32]`` grey picture: signs of low DCT coefficients around their median."""
    from scipy.fft import dctn

    low = dctn(gray, norm="ortho")[:8, :8].ravel()
    bits = low > np.median(low[1:])
    return int(np.packbits(bits).view(">u8")[0])


def picture_hashes(path: Path) -> list[int]:
    """Hash of a picture, or of eight frames of a video.

    Raises:
        DataError: The file cannot be read.
    """
    from PIL import Image

    if path.suffix.lower() in VIDEO_SUFFIXES:
        frames = video_pictures(path, 8)
    else:
        try:
            frames = [Image.open(path).convert("RGB")]
        except (OSError, ValueError) as error:
            raise DataError(f"{path} is no readable picture: {error}") from None
    small = (frame.convert("L").resize((32, 32), Image.Resampling.BOX) for frame in frames)
    return [dct_hash(np.asarray(gray, dtype=float)) for gray in small]


def file_sha(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ------------------------------------------------------------------------------------------------------ benchmarks


@dataclass
class BenchmarkKeys:
    """Everything of one benchmark that a training row must not share."""

    name: str
    blacklist: Blacklist
    tails: set[str] = field(default_factory=set)
    questions: dict[str, set[str]] = field(default_factory=dict)
    """Normalised question -> scenes it is asked about."""
    grams: set[int] = field(default_factory=set)
    shas: dict[str, str] = field(default_factory=dict)
    """SHA-256 -> file."""
    hashes: npt.NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    hash_owner: list[str] = field(default_factory=list)
    missing: set[str] = field(default_factory=set)
    """Media files that the rows name and the root does not hold."""


def benchmark_keys(
    spec: str,
    *,
    root: Path | None = None,
    aliases: Mapping[str, str] | None = None,
    media: bool = False,
) -> BenchmarkKeys:
    """Keys of a benchmark.

    Args:
        spec: ``vsi`` (the shipped list), a list file ``*.txt``, or ``name=FILE`` with the benchmark's rows.
        root: Folder of the benchmark's media.
        aliases: Scene id to room id where the id alone does not tell.
        media: Also hash the media files.

    Raises:
        DataError: An unknown spec or an unreadable file.
    """
    if spec == "vsi":
        return BenchmarkKeys("vsi", Blacklist(shipped_lists(), aliases))
    name, found, file = spec.partition("=")
    if not found:
        listing = Path(spec)
        if listing.suffix != ".txt":
            raise DataError(f"--bench {spec!r} is not 'vsi', a list file *.txt, or NAME=FILE")
        listed = load_list(listing)
        return BenchmarkKeys(listed.name, Blacklist([listed], aliases))
    rows = read_rows(Path(file))
    scenes: set[str] = set()
    keys = BenchmarkKeys(name, Blacklist([], aliases))
    hashes: list[int] = []
    seen: set[str] = set()
    for row in rows:
        own = scene_ids(row)
        scenes |= set(own)
        paths = media_paths(row)
        # "color/0.jpg" of one scene is no picture of another: such paths are compared by their scene.
        keys.tails |= {tail(path) for path in paths if not find_ids(path)}
        question = question_of(row)
        if question:
            keys.questions.setdefault(question, set()).update(own)
            keys.grams |= ngrams(question)
        if media and root is not None:
            for path in paths:
                if path in seen:
                    continue
                seen.add(path)
                if not (root / path).is_file():
                    keys.missing.add(path)
                    continue
                keys.shas[file_sha(root / path)] = path
                found_hashes = picture_hashes(root / path)
                hashes += found_hashes
                keys.hash_owner += [path] * len(found_hashes)
    keys.blacklist = Blacklist([BlockList(name, frozenset(scenes))], aliases)
    keys.hashes = np.array(hashes, dtype=np.uint64)
    return keys


def scene_ids(row: Mapping[str, Any]) -> list[str]:
    """Scene ids a record names outside of its texts."""
    return [found for text in strings(row, skip=TEXT_KEYS) for found in find_ids(text)]


# --------------------------------------------------------------------------------------------------------- matching


@dataclass(frozen=True, slots=True)
class Match:
    """Why a record touches a benchmark."""

    benchmark: str
    level: str
    """``scene``, ``room``, ``image``, ``media_sha256``, ``media_similar``, ``text_same_scene``; ``text`` and
    ``ngram`` are reported but are no hits, because templates repeat legitimately."""
    key: str

    @property
    def hit(self) -> bool:
        """Whether the record must not be trained on."""
        return self.level not in ("text", "ngram")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is known about one training record."""

    matches: tuple[Match, ...]
    sources: tuple[str, ...]
    """Sources of its scene ids."""
    known: bool
    """Whether any source was recognised."""


def check_record(
    row: Mapping[str, Any],
    benchmarks: Sequence[BenchmarkKeys],
    *,
    root: Path | None = None,
    media: bool = False,
) -> Verdict:
    """Compare one training record with benchmarks.

    Args:
        row: The record.
        benchmarks: From :func:`benchmark_keys`.
        root: Folder of the record's media.
        media: Also compare the media files.
    """
    ids = scene_ids(row)
    paths = media_paths(row)
    question = question_of(row)
    shas: dict[str, str] = {}
    similar: dict[str, list[int]] = {}
    if media and root is not None:
        for path in paths:
            if (root / path).is_file():
                shas[path] = file_sha(root / path)
                similar[path] = picture_hashes(root / path)
    matches: list[Match] = []
    for bench in benchmarks:
        touched: set[str] = set()
        for scene_id in dict.fromkeys(ids):
            hit = bench.blacklist.check(scene_id)
            if hit:
                matches.append(Match(bench.name, hit.level, hit.key))
                touched.add(room_of(scene_id, bench.blacklist.aliases))
        matches += [Match(bench.name, "image", tail(p)) for p in paths if tail(p) in bench.tails]
        matches += [
            Match(bench.name, "media_sha256", bench.shas[sha])
            for sha in shas.values()
            if sha in bench.shas
        ]
        for path, own in similar.items():
            matches += _similar(bench, path, own)
        if question in bench.questions:
            rooms = {room_of(s, bench.blacklist.aliases) for s in bench.questions[question]}
            level = "text_same_scene" if rooms & touched else "text"
            matches.append(Match(bench.name, level, question[:80]))
        elif bench.grams and not bench.grams.isdisjoint(ngrams(question)):
            matches.append(Match(bench.name, "ngram", question[:80]))
    sources = tuple(sorted({scene_id.partition("/")[0] for scene_id in ids}))
    named = str(row.get("source") or row.get("data_source") or row.get("dataset") or "")
    return Verdict(
        tuple(dict.fromkeys(matches)),
        sources or ((named,) if named else ()),
        bool(sources or named),
    )


def _similar(bench: BenchmarkKeys, path: str, own: Sequence[int]) -> list[Match]:
    """Similar pictures: one for a picture, three frames of one clip for a video."""
    if not len(bench.hashes):
        return []
    counts: dict[str, int] = {}
    for value in own:
        near = np.bitwise_count(bench.hashes ^ np.uint64(value)) <= HASH_BITS
        for owner in {bench.hash_owner[i] for i in np.flatnonzero(near)}:
            counts[owner] = counts.get(owner, 0) + 1
    needed = CLIP_FRAMES if path.lower().endswith(VIDEO_SUFFIXES) else 1
    return [Match(bench.name, "media_similar", owner) for owner, n in counts.items() if n >= needed]


# ---------------------------------------------------------------------------------------------------- training files


def stream_records(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Records of a training file with their number from 1, without loading a whole JSON-lines or parquet file.

    Raises:
        DataError: Broken, or of an unknown kind.
    """
    if path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    try:
                        yield number, json.loads(line)
                    except json.JSONDecodeError as error:
                        raise DataError(f"{path}:{number} is not JSON: {error.msg}") from None
    elif path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pq.ParquetFile(path)
        number = 0
        for batch in table.iter_batches(batch_size=4096):
            plain = [f.name for f in batch.schema if not pa.types.is_binary(f.type)]
            for row in batch.select(plain).to_pylist():
                number += 1
                yield number, row
    else:
        yield from enumerate(read_rows(path), start=1)


def arkit_rooms(metadata: Path) -> dict[str, str]:
    """ARKitScenes video id to visit id, from the dataset's ``metadata.csv``."""
    import csv

    with metadata.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        f"arkitscenes/{row['video_id']}": f"arkitscenes/visit-{row['visit_id']}"
        for row in rows
        if row.get("visit_id") not in (None, "", "NA")
    }


def rescans(metadata: Path) -> dict[str, str]:
    """3RScan scan id to its reference scan, from the dataset's ``3RScan.json``."""
    rooms: dict[str, str] = {}
    for entry in json.loads(metadata.read_text(encoding="utf-8")):
        for scan in [{"reference": entry["reference"]}, *entry.get("scans", [])]:
            rooms[f"3rscan/{scan['reference']}"] = f"3rscan/{entry['reference']}"
    return rooms


def record_id(row: Mapping[str, Any], number: int) -> str:
    """A record's own id, or its number."""
    return str(row.get("id", number))


def iter_files(paths: Iterable[str | Path]) -> Iterator[Path]:
    """Files, and the data files of folders."""
    for path in map(Path, paths):
        if path.is_dir():
            yield from sorted(
                p for p in path.rglob("*") if p.suffix in (".jsonl", ".json", ".parquet")
            )
        else:
            yield path
