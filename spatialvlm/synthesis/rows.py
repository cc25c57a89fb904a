"""What a task returns and what a generated row looks like (one parquet schema for all tasks)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, NamedTuple, TypeVar

import pyarrow as pa

from spatialvlm.answers import AnswerType

CONTAMINATED = "contaminated"
"""Tag of rows about evaluation scenes, which exist only where somebody asked for them."""
GEN_VERSION = "1"
"""Raised whenever a change of the code changes rows; part of every row id."""

Form = Literal["MCQ", "YN", "NUM", "JSON", "OE", "SENT"]
MediaKind = Literal["none", "images", "video"]
Item = TypeVar("Item")
Args = dict[str, Any]
"""Arguments of one question: object indices, frame ids and a variant; JSON-serialisable."""


class Reason(StrEnum):
    """Why a candidate is not emitted; counted per task in the manifest, documented in docs/tasks.md."""

    description: str

    def __new__(cls, value: str, description: str) -> Reason:
        """Attach the sentence for the documentation."""
        member = str.__new__(cls, value)
        member._value_ = value
        member.description = description
        return member

    NEEDS_METRIC = "needs:metric", "the scene has no metric scale"
    NEEDS_GRAVITY = "needs:gravity", "the scene is not aligned with gravity"
    NEEDS_FRAMES = "needs:frames", "the scene has no frames"
    NEEDS_DEPTH = "needs:depth", "a frame has no depth map"
    NEEDS_INSTANCES = "needs:instances", "a frame has no instance map"
    NEEDS_FRONT = "needs:front", "no object with a front is clean in two frames"
    NEEDS_TIME = "needs:time", "a frame has no timestamp"
    NEEDS_ROOM = "needs:room", "the floor area is unknown"
    NO_BLOCKS = "no_blocks", "the scene is not a stack of cubes"
    NEEDS_VISIBILITY = "needs:visibility", "visibility was not measured (see --allow-unfiltered)"
    TOO_FEW_OBJECTS = "too_few_objects", "fewer objects than the question names"
    TOO_FEW_FRAMES = "too_few_frames", "fewer than two frames for a video question"
    NO_VIEW_PAIR = "no_view_pair", "no two views overlap enough and differ enough"
    NO_CLEAN_OBJECT = "no_clean_object", "no frame shows an object clearly"
    NO_CANDIDATE = (
        "no_candidate",
        "nothing in the scene fits the question, e.g. too few clean objects or no way",
    )
    NOT_CLEAN = "not_clean", "an object is hidden, ambiguous or cut off in its frame"
    NOT_VISIBLE = "not_visible", "an object is never clearly visible in the shown frames"
    AMBIGUOUS = "ambiguous", "an object is neither clearly visible nor clearly hidden"
    KNIFE_EDGE = "knife_edge", "float noise could decide (within 1e-6 of a threshold)"
    OUT_OF_RANGE = "out_of_range", "a value lies outside the range the task asks about"
    MARGIN = "margin", "the deciding quantity is too close to call"
    EXTENT_TIE = "extent_tie", "the volume is larger but the longest extent is not"
    IMAGE_DISAGREES = "image_disagrees", "the order in metres is not the order in the picture"
    TOPS_DISAGREE = "tops_disagree", "the higher centre belongs to the lower top"
    OVERLAP = "overlap", "two objects overlap in height by more than half"
    CAMERA_ROLL = "camera_roll", "the camera is rolled by more than 20 degrees"
    VERTICAL_AXIS = "vertical_axis", "the camera looks straight up or down: no forward direction"
    TILTED = "tilted", "the box is tilted by more than 10 degrees: no height"
    TRUNCATED = "truncated", "the object leaves the image"
    COUNT_CONFLICT = "count_conflict", "stated count and number of boxes differ"
    DUPLICATE_LABEL = "duplicate_label", "the label alone does not name one object"
    REFERRAL = "referral", "no phrase singles the object out"
    DIRECTION_NOT_UNIQUE = "direction_not_unique", "another instance lies on the same side"
    TOO_CLOSE = "too_close", "objects or cameras are too close for a direction or comparison"
    SECTOR = "sector", "a direction is too close to the border of its sector"
    SYMMETRY = "symmetry", "the object has no front or looks the same from several sides"
    NO_ROTATION = "no_rotation", "the turn is below 15 or above 165 degrees"
    NO_OVERLAP = "no_overlap", "the point is not inside the other view"
    OCCLUDED = "occluded", "the point is hidden in the other view or not on the object"
    DISTRACTORS = "distractors", "no set of clearly wrong, distinct options"
    BLOCKED = "blocked", "the way is blocked, too short, too long, or leaves the room"
    TURN = "turn", "a turn is neither left, right nor back"
    TOO_FEW_FACTS = "too_few_facts", "fewer than five checked facts for a caption"
    NO_COLOUR = "no_colour", "the object has no colour name"
    MARK = "mark", "no mark can be drawn (not clean, or no colour left)"
    DUPLICATE = "duplicate", "the same question was made before"
    QUOTA = "quota", "the plan allows no form of this question"
    LCM_TOO_FEW = "lcm_too_few", "fewer than three objects with a label of their own"
    LCM_SEED_FALLBACK = "lcm_seed_fallback", "note: no close triple, the tightest one is the seed"
    LCM_OFF_GRID = "lcm_off_grid", "no anchor pair puts the object on the 10 x 10 grid"
    LCM_FIT_DEGENERATE = "lcm_fit_degenerate", "fitted anchors fall into one cell"


class Reject(Exception):  # noqa: N818 - the ordinary way out of a candidate, not an error
    """Raised inside a task when this question is not asked; the engine counts the reason."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class Margin(NamedTuple):
    """How far the deciding quantity is from flipping the answer."""

    kind: str
    """What was measured, e.g. ``gap_m``, ``ratio``, ``angle_deg``, ``vis``."""
    value: float
    threshold: float
    """The least value at which the question is still asked; positive."""

    @property
    def normalised(self) -> float:
        """``value / threshold``; at least 1 in every emitted row."""
        return self.value / self.threshold


@dataclass(slots=True)
class Derived:
    """An answer and why it holds.

    Args:
        answer: JSON value in base units (metres, square metres, degrees, counts, object indices,
            words); what the text shows is decided by ``phrase``.
        margin: The tightest margin of the decision.
        values: Intermediate numbers for rewards and re-checks.
    """

    answer: Any
    margin: Margin
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Turn:
    """One question with its answer, as text and typed."""

    form: Form
    answer_type: AnswerType
    question: str
    reply: str
    """What the assistant says: the terse text, or a sentence for form SENT."""
    answer: Any
    answer_text: str
    template_id: str
    answer_template_id: str
    unit: str | None = None
    options: tuple[str, ...] = ()
    choice_idx: int | None = None
    spans: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    """Object index -> character ranges of its default rendering inside ``question``."""


class Slot(NamedTuple):
    """What the instruction formats need to know about one named object."""

    fixed: dict[str, Any]
    """``obj label phrase unique size boxes masks``: the same wherever the object is named like this."""
    text: str
    """``fixed`` as JSON, without the closing brace."""
    spans: list[list[int]]
    """``[message, start, end]`` of every place that names the object."""

    def json(self) -> str:
        """Entry of the column ``slots``."""
        return f'{self.text},"spans":{compact_json(self.spans)}}}'


@dataclass(slots=True)
class QA:
    """A complete question about some images, before it becomes a row."""

    turns: list[Turn]
    frames: tuple[int, ...]
    """Frame indices in the order of the markers."""
    media: MediaKind = "images"
    slots: list[Slot] = field(default_factory=list)
    marks: list[dict[str, Any]] = field(default_factory=list)
    formats_ok: list[int] = field(default_factory=lambda: [0])
    system: str | None = None
    tags: tuple[str, ...] = ()
    group: str = ""
    """Ties the rows of one scene that belong together (the triplets of a cognitive map)."""


MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
MARGIN = pa.struct([("kind", pa.string()), ("value", pa.float64()), ("threshold", pa.float64())])

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("messages", pa.list_(MESSAGE)),
        ("media_kind", pa.string()),
        ("images", pa.list_(pa.string())),
        ("frame_ids", pa.list_(pa.string())),
        ("frame_times_s", pa.list_(pa.float64())),
        ("frames_pinned", pa.bool_()),
        ("num_views", pa.int32()),
        ("task", pa.string()),
        ("variant", pa.string()),
        ("form", pa.string()),
        ("family", pa.string()),
        ("capability", pa.string()),
        ("tags", pa.list_(pa.string())),
        ("answer_type", pa.string()),
        ("answer_json", pa.string()),
        ("answer_text", pa.string()),
        ("unit", pa.string()),
        ("options", pa.list_(pa.string())),
        ("choice_idx", pa.int32()),
        ("slots", pa.string()),
        ("marks", pa.string()),
        ("formats_ok", pa.list_(pa.int8())),
        ("template_id", pa.string()),
        ("answer_template_id", pa.string()),
        ("scene_id", pa.string()),
        ("room_id", pa.string()),
        ("source", pa.string()),
        ("split", pa.string()),
        ("license", pa.string()),
        ("group_id", pa.string()),
        ("overlap", pa.float64()),
        ("difficulty", pa.float64()),
        ("margin", MARGIN),
        ("evidence", pa.string()),
        ("gen_version", pa.string()),
        ("config_hash", pa.string()),
    ]
)
"""Columns ``answer_json slots marks evidence`` hold JSON text."""


def _json_writer(*, sort_keys: bool) -> Callable[[Any], str]:
    """``json.dumps`` without blanks for values that never contain themselves.

    ``json`` builds its C encoder again for every call, which takes longer than most of our values; here it is
    built once. Interpreters without it take the public one.
    """
    public = json.JSONEncoder(
        sort_keys=sort_keys, separators=(",", ":"), ensure_ascii=False, check_circular=False
    )
    make = getattr(json.encoder, "c_make_encoder", None)
    if make is None:
        return public.encode
    text = json.encoder.encode_basestring
    encode = make(None, public.default, text, None, ":", ",", sort_keys, False, True)
    return lambda value: "".join(encode(value, 0))


canonical_json = _json_writer(sort_keys=True)
"""JSON text that is equal for equal values: sorted keys, no blanks."""
compact_json = _json_writer(sort_keys=False)
"""JSON text without blanks, keys in their own order."""


def hashed(*parts: object, size: int = 8) -> int:
    """Integer of ``size`` bytes that depends on nothing but ``parts``."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=size).digest(), "big")


def row_id(scene_id: str, task: str, args_json: str, form: str) -> str:
    """Identity of a question: 24 hex digits of (version, scene, task, arguments, form).

    Args:
        scene_id: Scene.
        task: Task id.
        args_json: :func:`canonical_json` of the arguments.
        form: Form of the answer.
    """
    text = "\x1f".join((GEN_VERSION, scene_id, task, args_json, form))
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def rounded(values: Any, places: int = 6) -> Any:
    """Round every float inside nested lists and dicts; numpy scalars become Python numbers."""
    kind = type(values)
    if kind is float:
        return round(values, places) + 0.0
    if kind is str or kind is int or kind is bool:
        return values
    if isinstance(values, float):
        return round(float(values), places) + 0.0
    if kind is dict:
        return {key: rounded(value, places) for key, value in values.items()}
    if kind is list or kind is tuple:
        return [
            round(value, places) + 0.0 if type(value) is float else rounded(value, places)
            for value in values
        ]
    if hasattr(values, "tolist"):
        return rounded(values.tolist(), places)
    return values


_POOL_BYTES = 60
"""Twelve numbers of five bytes per hash."""


class Draws:
    """A short stream of random choices that depends only on the words it was made from.

    Wording, options and forms are drawn from it, so they do not depend on how many rows came before.
    """

    __slots__ = ("_at", "_block", "_key", "_pool")

    def __init__(self, *parts: object) -> None:
        self._key = "\x1f".join(map(str, parts)).encode()
        self._block = 0
        self._pool = b""
        self._at = _POOL_BYTES

    def integer(self, below: int) -> int:
        """Uniform integer in ``[0, below)`` (bias below 2**-24)."""
        at = self._at
        if at == _POOL_BYTES:
            salt = self._block.to_bytes(4, "big")
            self._pool = hashlib.blake2b(self._key, digest_size=_POOL_BYTES, salt=salt).digest()
            self._block += 1
            at = 0
        self._at = at + 5
        return int.from_bytes(self._pool[at : at + 5], "big") % below

    def unit(self) -> float:
        """Uniform number in ``[0, 1)``."""
        return self.integer(1 << 32) / (1 << 32)

    def happens(self, share: float) -> bool:
        """``True`` with probability ``share``; takes one draw even where the outcome is certain."""
        if share <= 0.0 and self._at < _POOL_BYTES:
            self._at += 5
            return False
        return self.unit() < share

    def choice(self, items: Sequence[Item]) -> Item:
        """One item."""
        return items[self.integer(len(items))]

    def shuffled(self, items: Sequence[Item]) -> list[Item]:
        """A permutation (Fisher-Yates)."""
        mixed = list(items)
        for i in range(len(mixed) - 1, 0, -1):
            j = self.integer(i + 1)
            mixed[i], mixed[j] = mixed[j], mixed[i]
        return mixed


MARKERS = {"images": "<image>\n", "video": "<video>\n", "none": ""}
"""What stands at the head of the first question, once per image or once per clip."""


def finish_row(
    scene_columns: Mapping[str, Any],
    task_columns: Mapping[str, Any],
    args: Args,
    derived: Derived | list[Derived],
    qa: QA,
    *,
    args_json: str,
    identity: str,
    images: list[str],
    frame_ids: list[str],
    frame_times: list[float] | None,
    overlap: float | None = None,
) -> dict[str, Any]:
    """Put a question into the columns of :data:`SCHEMA`.

    Args:
        scene_columns: scene_id, room_id, source, split, license, config_hash.
        task_columns: task, family, capability, tags.
        args: Arguments of the question.
        derived: Answer and evidence; a list for a dialogue with several turns.
        qa: Text, typed answer, slots and marks.
        args_json: :func:`canonical_json` of ``args``.
        identity: Row id.
        images: Image paths in marker order, relative to the scenes folder.
        frame_ids: Ids of the same frames.
        frame_times: Times of the same frames in seconds, ``None`` if the scene has none.
        overlap: Intersection over union of the seen surface for a pair of views.
    """
    several = isinstance(derived, list)
    parts = derived if isinstance(derived, list) else [derived]
    tightest = parts[0].margin
    if several:
        tightest = min((part.margin for part in parts), key=lambda margin: margin.normalised)
    first = qa.turns[0]
    marker = MARKERS[qa.media] * (len(images) if qa.media == "images" else 1)
    messages = [{"role": "system", "content": qa.system}] if qa.system else []
    for turn in qa.turns:
        messages.append({"role": "user", "content": marker + turn.question})
        messages.append({"role": "assistant", "content": turn.reply})
        marker = ""
    evidence = [
        f'{{"args":{args_json},"values":{compact_json(rounded(part.values))}}}' for part in parts
    ]
    return {
        "id": identity,
        "messages": messages,
        "media_kind": qa.media,
        "images": images,
        "frame_ids": frame_ids,
        "frame_times_s": frame_times,
        "frames_pinned": True,
        "num_views": len(images),
        "variant": str(args.get("variant", "")),
        "form": first.form,
        "answer_type": first.answer_type,
        "answer_json": compact_json(
            [turn.answer for turn in qa.turns] if several else first.answer
        ),
        "answer_text": "\n".join([turn.answer_text for turn in qa.turns])
        if several
        else first.answer_text,
        "unit": first.unit,
        "options": list(first.options),
        "choice_idx": first.choice_idx,
        "slots": f"[{','.join([slot.json() for slot in qa.slots])}]",
        "marks": compact_json(qa.marks) if qa.marks else "[]",
        "formats_ok": qa.formats_ok,
        "template_id": first.template_id,
        "answer_template_id": first.answer_template_id,
        "group_id": qa.group,
        "overlap": overlap,
        "difficulty": round(min(max(1.0 / tightest.normalised, 0.0), 1.0), 6),
        "margin": {
            "kind": tightest.kind,
            "value": round(tightest.value, 6),
            "threshold": round(tightest.threshold, 6),
        },
        "evidence": f"[{','.join(evidence)}]" if several else evidence[0],
        "gen_version": GEN_VERSION,
        **scene_columns,
        **task_columns,
    }
