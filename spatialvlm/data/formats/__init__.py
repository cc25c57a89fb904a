"""Readers: one pure function per dataset format, row -> list of samples.

:data:`FORMATS` lists them from the most to the least specific; :func:`detect` picks one by the keys of
a few rows; :func:`read_row` applies it. A new format is one function and one entry.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from spatialvlm.data.formats.base import Format, Place, Row, SourceAttrs
from spatialvlm.data.formats.canonical import read_canonical, sample_to_json
from spatialvlm.data.formats.conversation import read_conversation
from spatialvlm.data.formats.fields import cell_names
from spatialvlm.data.formats.rows import read_rows
from spatialvlm.data.formats.scene_qa import read_referring, read_scanqa, read_sqa3d
from spatialvlm.data.formats.spar import is_spar, read_spar
from spatialvlm.data.sample import Sample
from spatialvlm.errors import ConfigError

__all__ = ["FORMATS", "Format", "Place", "SourceAttrs", "detect", "read_row", "sample_to_json"]


def _has(row: Row, *keys: str) -> bool:
    return all(row.get(key) is not None for key in keys)


def _talk(row: Row) -> bool:
    return isinstance(row.get("conversations"), list)


def _is_cell(value: Any) -> bool:
    return isinstance(value, Mapping) and "bytes" in value


def _embedded(row: Row) -> int:
    if not (_talk(row) and isinstance(row.get("images"), list) and "meta_info" in row):
        return 0
    return 2 if any(_is_cell(v) for v in row["images"]) else 1 if not row["images"] else 0


def _onevision(row: Row) -> int:
    if not _talk(row) or "image" not in row:
        return 0
    return 2 if _is_cell(row["image"]) else 1 if row["image"] is None else 0


def _scanqa(row: Row) -> int:
    return 2 * (_has(row, "answers", "scene_id", "question") and "situation" not in row)


def _referring(row: Row) -> int:
    spoken = _has(row, "utterance", "stimulus_id") or _has(row, "ann_id", "description")
    return 2 * (spoken and not _talk(row))


def _qwen(row: Row) -> int:
    if not _talk(row):
        return 0
    return 2 if _has(row, "image") or _has(row, "video") else 0


FORMATS: dict[str, Format] = {
    fmt.name: fmt
    for fmt in (
        Format(
            "spatialvlm_rows",
            "rows",
            lambda row: 2 * _has(row, "gen_version", "messages"),
            read_rows,
            exact=True,
        ),
        Format("canonical", "canonical", lambda row: 2 * _has(row, "uid", "turns"), read_canonical),
        Format("spar", "conversation", is_spar, read_spar, same_scene=True),
        Format(
            "sqa3d",
            "question",
            lambda row: 2 * _has(row, "situation", "question", "answers"),
            read_sqa3d,
        ),
        Format("scanqa", "question", _scanqa, read_scanqa),
        Format("referring", "referring", _referring, read_referring),
        Format(
            "vlm3r",
            "conversation",
            lambda row: 2 * (_talk(row) and _has(row, "scene_name", "video")),
            read_conversation,
        ),
        Format(
            "vsi590k",
            "conversation",
            lambda row: (
                2
                * (
                    _talk(row)
                    and _has(row, "question_type")
                    and (_has(row, "video") or _has(row, "image"))
                )
            ),
            read_conversation,
        ),
        Format("embedded", "conversation", _embedded, read_conversation),
        Format("llava_onevision", "conversation", _onevision, read_conversation),
        Format(
            "llava_video",
            "conversation",
            lambda row: 2 * (_talk(row) and _has(row, "video", "data_source")),
            read_conversation,
        ),
        Format(
            "vica",
            "conversation",
            lambda row: 2 * (_talk(row) and _has(row, "video") and not _has(row, "id")),
            read_conversation,
        ),
        Format(
            "sensenova",
            "conversation",
            lambda row: 2 * (_talk(row) and _has(row, "image", "id")),
            read_conversation,
        ),
        Format("qwen_finetune", "conversation", _qwen, read_conversation, coords="abs_source"),
        Format(
            "messages",
            "conversation",
            lambda row: (
                2 * (isinstance(row.get("messages"), list) and not _has(row, "gen_version"))
            ),
            read_conversation,
        ),
        Format("sharegpt", "conversation", lambda row: 2 * _talk(row), read_conversation),
    )
}
"""Every format, most specific first."""


def read_row(
    row: Any, fmt: Format, source: SourceAttrs, place: Place | None = None
) -> list[Sample]:
    """Samples of one row.

    Args:
        row: An object, or a list of objects (Qwen's packed rows), each of which is a row of its own.
        fmt: The format, from :data:`FORMATS`.
        source: Settings of the source.
        place: Where the row stands; part of uids and messages.

    Raises:
        DataError: With one of the index-time reasons.
    """
    place = place or Place()
    if isinstance(row, list) and row:
        return [
            sample
            for number, item in enumerate(row)
            for sample in read_row(item, fmt, source, place._replace(sub=number))
        ]
    if not isinstance(row, dict):
        raise place.error("schema", f"is {type(row).__name__}, not an object.")
    samples = fmt.read(row, source, place, fmt)
    for sample in samples:
        if source.exclude_prefixes:
            _check_excluded(row, sample, source, place)
        _check_unicode(sample, place)
    return samples


def _check_excluded(row: Row, sample: Sample, source: SourceAttrs, place: Place) -> None:
    """Refuse a row whose media, folders or scene start with one of ``exclude_prefixes``."""
    names = [row.get("scene_name"), row.get("scene_id"), row.get("data_source")]
    for path in (*[ref.path for ref in sample.media], *cell_names(row)):
        names += path.split("/")
    for name in names:
        if isinstance(name, str) and name.startswith(source.exclude_prefixes):
            raise place.error(
                "excluded", f"is left out: {name!r} starts with a prefix of exclude_prefixes."
            )


def _check_unicode(sample: Sample, place: Place) -> None:
    """Refuse half surrogate pairs: JSON can write them, tokenizers and file systems cannot take them."""
    texts = [part for turn in sample.turns for part in turn.parts if isinstance(part, str)]
    for ref in sample.media:
        texts += [ref.path, ref.member]
    for text in texts:
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise place.error(
                    "schema", f"has half a surrogate pair in {text[:60]!r}."
                ) from error


def detect(rows: Iterable[Any], where: str) -> Format:
    """The most specific format that all rows share.

    Args:
        rows: A few rows, usually the first hundred.
        where: Name of the source, for messages.

    Raises:
        ConfigError: No format fits, the rows disagree, or formats of different shape fit.
    """
    level = dict.fromkeys(FORMATS, 2)
    sure = set[str]()
    first: tuple[int, Row, list[str]] | None = None
    for number, row in enumerate(_flat(rows)):
        fits = {name: fmt.match(row) for name, fmt in FORMATS.items()}
        sure |= {name for name, value in fits.items() if value == 2}
        names = [name for name, value in fits.items() if value]
        level = {name: min(value, fits[name]) for name, value in level.items()}
        first = first or (number, row, names)
        if not any(level.values()):
            keys = sorted(map(str, row))[:16]
            if not first[2] or not names:
                raise ConfigError(
                    f"{where}: row {number} fits no format; its keys are {keys}. "
                    f"Set format to one of: {', '.join(FORMATS)}."
                )
            raise ConfigError(
                f"{where}: rows disagree: row 0 fits {', '.join(first[2])}; row {number} fits "
                f"{', '.join(names)}. Split the file or set format."
            )
    found = [fmt for name, fmt in FORMATS.items() if level[name] and name in sure]
    if not found:
        raise ConfigError(
            f"{where}: the first rows are no JSON objects, so the format cannot be detected; set format."
        )
    shapes = {fmt.shape for fmt in found}
    if len(shapes) > 1:
        raise ConfigError(
            f"{where}: rows fit formats of different shape: {', '.join(f.name for f in found)}; set format."
        )
    return found[0]


def _flat(rows: Iterable[Any]) -> Iterable[Row]:
    for row in rows:
        if isinstance(row, list):
            yield from _flat(row)
        elif isinstance(row, Mapping):
            yield row
