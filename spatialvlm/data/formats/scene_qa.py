"""ScanQA and SQA3D: questions about a scan that name no media; and referring sets without any."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spatialvlm.data.formats.base import Format, Place, Row, SourceAttrs, video_ref
from spatialvlm.data.formats.conversation import build_sample
from spatialvlm.data.sample import Sample
from spatialvlm.errors import ConfigError, DataError

_CONSUMED = frozenset({"question", "situation"})


def read_scanqa(row: Row, attrs: SourceAttrs, place: Place, fmt: Format) -> list[Sample]:
    """One question with its answers -> one sample, or one per answer with ``answers: all``."""
    return _samples(row, _text(row, "question", place), row.get("answers"), attrs, place, fmt)


def read_sqa3d(row: Row, attrs: SourceAttrs, place: Place, fmt: Format) -> list[Sample]:
    """One question joined with its annotation; the situation stands before the question."""
    text = f"{_text(row, 'situation', place)} {_text(row, 'question', place)}"
    answers = row.get("answers")
    if isinstance(answers, list):
        answers = [a.get("answer") if isinstance(a, Mapping) else None for a in answers]
    return _samples(row, text, answers, attrs, place, fmt)


def read_referring(row: Row, attrs: SourceAttrs, place: Place, fmt: Format) -> list[Sample]:
    """Referring sets hold neither boxes nor media, so they cannot be trained on as they are."""
    del row, attrs, fmt
    raise referring_error(str(place))


def referring_error(where: str) -> DataError:
    """What to do with a referring set."""
    return DataError(
        f"{where} refers to objects of a scene but holds neither boxes nor media. Join it with the scenes "
        "first: python tools/convert_data.py FILE --format referring --scenes DIR --to canonical --out DIR"
    )


def _samples(
    row: Row, question: str, answers: Any, attrs: SourceAttrs, place: Place, fmt: Format
) -> list[Sample]:
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) for a in answers):
        raise place.error("no_answer", f"has answers {answers!r:.60}; expected a list of texts.")
    if attrs.media_template is None:
        raise ConfigError(
            f"source {attrs.name}: {fmt.name} rows name a scene and no media; set media_template, for "
            'example "scannet/{scene_id}" (a folder of frames) or "videos/{scene_id}.mp4".'
        )
    scene = _text(row, "scene_id", place)
    media = [video_ref(attrs.base, attrs.media_template.replace("{scene_id}", scene), place)]
    if attrs.answers == "all":
        picked = list(enumerate(answers))
    elif attrs.answers == "cycle":
        picked = [(-1, answers[place.epoch % len(answers)])]
    else:
        picked = [(-1, answers[0])]
    if len(answers) == 1:
        picked = [(-1, answers[0])]
    return [
        build_sample(
            row,
            [("user", [f"\n{question}"], False), ("assistant", [answer], True)],
            [],
            list(media),
            attrs,
            place,
            fmt,
            consumed=_CONSUMED if attrs.answers == "cycle" else _CONSUMED | {"answers"},
            k=k,
        )
        for k, answer in picked
    ]


def _text(row: Row, key: str, place: Place) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value:
        raise place.error("schema", f"has {key} {value!r:.60}; expected text.")
    return value
