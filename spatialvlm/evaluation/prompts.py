"""From an item to the messages a model sees; the same function for evaluation, training and audits.

Messages are a list of ``{"role", "content"}``; content is a list of parts ``{"type": "text", "text"}``,
``{"type": "image", "image": path}`` or ``{"type": "video", "video": path, "frames": [...]}``. A user message
may carry ``marks``, drawn into its pictures when they are loaded, and ``same_scene`` (its pictures show one scene).
"""

import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np

from spatialvlm.errors import ConfigError, DataError
from spatialvlm.evaluation.schema import Benchmark, BenchmarkSpec, Item, Media, closest

Messages = list[dict[str, Any]]
MediaMode = Literal["real", "drop", "blank", "shuffle"]
MEDIA_MODES: tuple[MediaMode, ...] = ("real", "drop", "blank", "shuffle")

ANSWER_LETTER = "Answer with the option's letter from the given choices directly"
_MARKER = re.compile(r"<image>|<video>")


def join_options(options: Mapping[str, str], form: str = "{x}. {text}", glue: str = "\n") -> str:
    """Options with their letters, "A. chair" by default."""
    return glue.join(form.format(x=x, text=text) for x, text in options.items())


def generic(question: str, options: Mapping[str, str], hint: str = "") -> str:
    """VLMEvalKit's prompt for multiple choice."""
    head = f"Hint: {hint}\n" if hint else ""
    return (
        f"{head}Question: {question}\nOptions:\n{join_options(options)}\n"
        "Please select the correct answer from the options above. \n"
    )


def site_text(question: str, options: Mapping[str, str]) -> str:
    """SITE-Bench's text for pictures."""
    listed = join_options(options, "{x}: {text}")
    return (
        f"Question: {question}\nOptions:\n{listed}\n"
        "Give me the answer letter directly. The best answer is:"
    )


def frame_indices(num_frames: int, count: int, policy: str = "linspace") -> list[int]:
    """Frames of a clip that the model sees; frame 0 is always one of them.

    Args:
        num_frames: Frames of the clip, at least 1.
        count: Frames wanted.
        policy: ``linspace`` = ``numpy.linspace(0, T-1, min(n, T), dtype=int)``; ``uniform_tail`` appends
            the last frame if it is absent.
    """
    if num_frames < 1:
        raise DataError("a clip with zero frames cannot be sampled; check the video file")
    chosen = [int(i) for i in np.linspace(0, num_frames - 1, min(count, num_frames), dtype=int)]
    if policy == "uniform_tail" and chosen[-1] != num_frames - 1:
        chosen.append(num_frames - 1)
    return chosen


def safe_path(root: Path, path: str, *, allow_absolute: bool = False) -> Path:
    """Join a media path to its root.

    Raises:
        DataError: The path is absolute without permission, or leaves the root.
    """
    parts = PurePosixPath(path.replace("\\", "/"))
    if ".." in parts.parts or (parts.is_absolute() and not allow_absolute):
        raise DataError(
            f"media path {path!r} leaves its root {root}; fix the row, or accept absolute paths with "
            "--allow-absolute-media (recipe: evaluation.allow_absolute_media=true)"
        )
    return root / parts


def media_parts(
    media: Sequence[Media], root: Path, *, allow_absolute: bool = False
) -> list[dict[str, Any]]:
    """Message parts of the media of one item."""
    parts: list[dict[str, Any]] = []
    for medium in media:
        source: Any = medium.data
        if source is None:
            source = str(safe_path(root, medium.path, allow_absolute=allow_absolute))
        part: dict[str, Any] = {"type": medium.kind, medium.kind: source}
        if medium.frames:
            part["frames"] = list(medium.frames)
        if medium.times_s:
            part["times_s"] = list(medium.times_s)
        parts.append(part)
    return parts


def interleave(
    text: str, parts: Sequence[dict[str, Any]], *, verbatim: bool = False
) -> list[dict[str, Any]]:
    """Put media where ``<image>`` markers are.

    Without markers all media come first. With markers the text pieces are stripped (unless ``verbatim``), and
    surplus media go before the trailing text. Surplus markers are removed.
    """
    if not _MARKER.search(text):
        return [*parts, {"type": "text", "text": text}]
    left = list(parts)
    pieces = [piece if verbatim else piece.strip() for piece in _MARKER.split(text)]
    content: list[dict[str, Any]] = []
    for number, piece in enumerate(pieces):
        last = number == len(pieces) - 1
        if last:
            content += left
            left = []
        if piece:
            content.append({"type": "text", "text": piece})
        if not last and left:
            content.append(left.pop(0))
    return content


def prompt_text(item: Item, spec: BenchmarkSpec, protocol: str) -> str:
    """Prompt text of an item; ``<image>`` marks where a picture goes.

    Raises:
        DataError: The benchmark file lacks a column that prompts need.
    """
    try:
        return spec.prompt(item, protocol)
    except KeyError as error:
        raise DataError(
            f"item {item.id}: prompts of {spec.name} need column {error}; the file has "
            f"{', '.join(map(str, item.row))}. It can be scored but not asked."
        ) from None


def item_media(row: Mapping[str, Any], spec: BenchmarkSpec) -> tuple[Media, ...]:
    """Media of a row.

    Raises:
        DataError: The benchmark file lacks a column that names media.
    """
    try:
        return spec.media(row)
    except KeyError as error:
        raise DataError(
            f"media of {spec.name} need column {error}; the file has {', '.join(row)}"
        ) from None


def build_messages(
    item: Item,
    spec: BenchmarkSpec,
    protocol: str = "official",
    media: str = "real",
    *,
    root: Path = Path(),
    donor: Item | None = None,
    allow_absolute: bool = False,
) -> Messages:
    """Messages of one item under a protocol.

    Args:
        item: The question.
        spec: Its benchmark.
        protocol: Whose prompt text.
        media: ``real``; ``drop`` removes media and markers; ``blank`` marks every medium to be replaced by a
            mid-grey picture of its size; ``shuffle`` shows the media of ``donor``.
        root: Folder of the media paths.
        donor: Item that lends its media under ``shuffle``; see :func:`derangement`.
        allow_absolute: Accept absolute media paths.
    """
    if media not in MEDIA_MODES:
        raise ConfigError(
            f"media mode {media!r} is not one of: {', '.join(MEDIA_MODES)}{closest(media, MEDIA_MODES)}"
        )
    text = prompt_text(item, spec, protocol)
    parts: list[dict[str, Any]] = []
    if media == "drop":
        bare = _MARKER.sub("", text)
        text = bare if bare == text else bare.strip()
    else:
        if media == "shuffle" and donor is None:
            raise ConfigError(f"item {item.id}: media=shuffle needs a donor; see derangement")
        row = donor.row if media == "shuffle" and donor is not None else item.row
        parts = media_parts(item_media(row, spec), root, allow_absolute=allow_absolute)
        if media == "blank":
            parts = [{**part, "blank": True} for part in parts]
    user: dict[str, Any] = {
        "role": "user",
        "content": interleave(text, parts, verbatim=spec.verbatim),
    }
    if spec.marks and media == "real" and (marks := spec.marks(item.row)):
        user["marks"] = marks
    if spec.same_scene and len(parts):
        user["same_scene"] = True
    messages: Messages = [user]
    if spec.system and (system := spec.system(item.row)):
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    return messages


def derangement(benchmark: Benchmark, seed: int = 0) -> dict[tuple[str, str], Item]:
    """For ``media=shuffle``: an item of the same question type and another cluster for every item.

    A type with a single cluster borrows from the other types.

    Raises:
        ConfigError: All items are about one scene.
    """
    rng = random.Random(seed)
    by_type: dict[str, list[Item]] = {}
    for item in benchmark.items:
        by_type.setdefault(item.question_type, []).append(item)
    donors: dict[tuple[str, str], Item] = {}
    for _, items in sorted(by_type.items()):
        for item in items:
            others = [other for other in items if other.cluster != item.cluster]
            others = others or [o for o in benchmark.items if o.cluster != item.cluster]
            if not others:
                raise ConfigError(
                    f"media=shuffle: all items of {benchmark.spec.name} show {item.cluster}, there is no other scene; "
                    "use media=blank or drop"
                )
            donors[item.key] = rng.choice(others)
    return donors
