"""The types of the data path: what readers return, what the order draws, what a step is made of.

Everything here is immutable and free of torch, so that it can be pickled to workers, hashed, and
compared. Words: a *row* is one entry of a file, a *sample* one conversation, a *draw* one sample at one
place of the order, a *position* the index of a draw, a *unit* rows on the same media that are drawn
together, a *lane* all units of one size of one source.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from spatialvlm.typing import MarkSpec, ModalityFlags

if TYPE_CHECKING:
    import numpy.typing as npt

    from spatialvlm.typing import IntArray, UInt8Array

    DrawArray = npt.NDArray[np.void]
    """``[n]`` records of :data:`DRAW_DTYPE`."""
    LengthArray = npt.NDArray[np.void]
    """``[n]`` records of :data:`LENGTH_DTYPE`."""

Role = Literal["system", "user", "assistant"]
CoordConvention = Literal["abs_source", "abs_resized", "norm1000", "norm1", "none"]
"""Meaning of box numbers in a source's text: pixels of the stored image, pixels after the model's
resize, thousandths, fractions, or no boxes."""


@dataclass(frozen=True, slots=True)
class World:
    """Place of this process among the data-parallel ranks."""

    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.size, f"rank {self.rank} of {self.size}"


class MediaRef(NamedTuple):
    """Where one image or video lies. Nothing is opened."""

    kind: Literal["image", "video"]
    store: Literal["file", "frames", "tar", "cell"]
    """One file, a directory of frames, a tar member, or bytes inside an Arrow or parquet cell."""
    path: str
    """Relative to the source root, ``/``-separated; for ``tar`` and ``cell`` the shard's path."""
    member: str = ""
    """Tar member name; ``"row/field/item"`` of a cell (the row counted inside the shard, item -1 for a
    field that is not a list); or frame file names, one per line ("" = all, in natural order)."""
    frames: tuple[int, ...] | None = None
    """Exact frame indices; None until sampled."""
    clip_s: tuple[float, float] | None = None
    """Seconds, half-open."""


class Turn(NamedTuple):
    """One message; ``parts`` are text or indices into ``Sample.media``, in the order the model sees."""

    role: Role
    parts: tuple[str | int, ...]
    train: bool = True
    """Assistant only: False keeps the turn as context."""

    @property
    def text(self) -> str:
        """The turn's text without its media."""
        return "".join(part for part in self.parts if isinstance(part, str))


class Sample(NamedTuple):
    """One conversation with its media, in the same form whatever file it came from."""

    uid: str
    """``<source>/<file stem>#<row>[.<k>]``, unique in a mixture; the row's own id is ``meta["id"]``."""
    source: str
    family: str
    turns: tuple[Turn, ...]
    """Optional system turn, then user and assistant alternating, assistant last."""
    media: tuple[MediaRef, ...] = ()
    """In the order of their markers."""
    capability: str | None = None
    same_scene: bool = False
    """The images show one scene and form one geometry group."""
    geometry: Literal["auto", "on", "off"] = "auto"
    frames_pinned: bool = False
    """The choice of frames defines the answer: never re-sampled, never dropped."""
    coords: CoordConvention = "none"
    marks: tuple[MarkSpec, ...] = ()
    formats_ok: tuple[int, ...] = ()
    """Instruction formats the expansion hook may realise; empty = as written."""
    scene_id: str | None = None
    room_id: str | None = None
    difficulty: float | None = None
    margin: float | None = None
    weight: float = 1.0
    """Multiplies the sample's loss."""
    meta: Mapping[str, Any] = {}
    """Everything else of the row, as JSON values."""


@dataclass(frozen=True, slots=True)
class EncodedSample:
    """Token ids, labels, and positions of one sample; the pixels are not part of it."""

    input_ids: IntArray
    """int64 ``[L]``."""
    labels: IntArray
    """int64 ``[L]``: the token itself where it is supervised, else -100."""
    token_kind: UInt8Array
    """uint8 ``[L]``: 0 text, 1 image, 2 video, 3 spatial, 4 camera."""
    position_ids: IntArray
    """int64 ``[4, L]`` (Qwen) or ``[1, L]`` (InternVL), starting at 0."""
    grids: tuple[tuple[int, int, int], ...]
    """Patch grid (t, h, w) of every medium before the merger."""
    prefix_len: int
    """Tokens shared inside the sample's group; 0 = none."""
    num_label_tokens: int
    num_patches: int
    num_visual_tokens: int
    num_spatial_tokens: int
    frames: tuple[tuple[int, ...], ...]
    """Chosen frame indices per medium; empty for an image."""
    frame_times_s: tuple[tuple[float, ...], ...]


class Draw(NamedTuple):
    """One sample at one place of the order."""

    position: int
    source: int
    """Index into the mixture's sources."""
    row: int
    """Index into the source's row table."""
    epoch: int
    """How often the lane has been read before, from 0."""
    unit: int
    """Number of the unit inside its lane, in file order."""
    branch: int
    """Number of the row inside its unit."""
    lane: int
    """Index into the mixture's lanes."""


DRAW_DTYPE = np.dtype(
    [
        ("position", np.int64),
        ("source", np.int32),
        ("row", np.int64),
        ("epoch", np.int32),
        ("unit", np.int64),
        ("branch", np.int32),
        ("lane", np.int32),
    ]
)
"""The fields of :class:`Draw`, in its order; ``Draw(*array[i].item())`` converts."""

LENGTH_DTYPE = np.dtype(
    [
        ("tokens", np.int32),  # all LLM tokens: text, visual, spatial, camera; 0 = not measured
        ("label_tokens", np.int32),
        ("visual_tokens", np.int32),
        ("spatial_tokens", np.int32),  # spatial and camera tokens
        ("prefix_tokens", np.int32),  # tokens up to the end of the last medium of a groupable row
        ("patches", np.int32),  # ViT patches before the merger
        ("patch_pairs", np.int64),  # sum over frames or temporal units of (patches in it) squared
        ("frames", np.int32),
        ("images", np.int16),
        ("videos", np.int16),
        ("geometry_tokens", np.int32),  # tokens inside the geometry encoder, over all groups
        ("geometry_frame_pairs", np.int64),
        ("geometry_global_pairs", np.int64),
        ("group_key", np.uint64),  # rows group only with equal keys; 0 = never
        ("media_key", np.uint64),  # identity of the ordered media list; 0 = no media
        ("tokens_removed", np.int32),  # by the over-long policy
        ("notes", np.uint8),  # one bit per entry of NOTES
    ]
)
"""Sizes of one sample, known from headers and token counts before anything is decoded."""

NOTES = (
    "frames_dropped",
    "turns_dropped",
    "animated_image",
    "frame_times_assumed",
    "boundary_merge",
    "coords_rewritten",
)
"""What was done to a sample that its source should know; counted per source.

``boundary_merge``: an answer starts with white space, which a tokenizer may merge with the line break
before it when it encodes the whole text in one go, as here and at generation time it does not.
"""


def count_notes(notes: npt.NDArray[np.uint8]) -> dict[str, int]:
    """Samples per entry of ``NOTES``, without zeros."""
    counts = {name: int(np.sum((notes >> bit) & 1)) for bit, name in enumerate(NOTES)}
    return {name: count for name, count in counts.items() if count}


def scene_names(sample: Sample) -> Iterator[str]:
    """Everything of a sample that may name its scene or room: ids, and what its media are or were called."""
    named = [sample.scene_id, sample.room_id]
    named += [sample.meta.get(key) for key in ("scene_name", "scan_id", "video_id")]
    originals = sample.meta.get("media_names")
    named += originals if isinstance(originals, list) else []
    for value in named:
        if value is not None and value != "":
            yield str(value)
    for ref in sample.media:
        if ref.store == "tar" or (ref.store == "frames" and ref.member):
            yield from [f"{ref.path}/{name}" for name in ref.member.split("\n")]
        else:
            yield ref.path


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens of one pack that sees itself and its parent."""

    start: int
    length: int
    parent: int
    """Index of the prefix segment in the pack; -1 = root."""
    sample: int
    """Index of the sample in the pack; of a prefix, its first branch's."""


@dataclass(frozen=True, slots=True)
class PackPlan:
    """The draws of one flattened sequence."""

    draws: tuple[Draw, ...]
    """Empty for a dummy pack."""
    groups: tuple[tuple[int, ...], ...]
    """Indices into ``draws``; every draw in exactly one group; a group of one is a single sample."""
    tokens: int
    cost: float
    """Predicted FLOPs."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One optimizer step, equal on every rank."""

    step: int
    positions: range
    packs: tuple[tuple[PackPlan, ...], ...]
    """``[micro_step][rank]``."""
    flags: tuple[ModalityFlags, ...]
    """Per micro-step, over all ranks."""


@dataclass(frozen=True, slots=True)
class Shares:
    """Realised composition of a range of positions, in absolute counts."""

    samples: Mapping[str, int]
    """Keys ``family/<name>``, ``source/<name>``, ``capability/<name>``."""
    tokens: Mapping[str, int] | None = None
    """None while lengths are not measured; likewise the next two."""
    label_tokens: Mapping[str, int] | None = None
    patches: Mapping[str, int] | None = None
    epochs: Mapping[str, float] | None = None
    """Passes over every source up to the end of the range, by source name."""
    notes: Mapping[str, int] | None = None
    """Samples per ``<source>/<entry of NOTES>``; ``few_media`` = 1 when the range holds too few distinct media."""
