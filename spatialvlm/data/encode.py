"""One sample -> token ids, labels, kinds and positions, from headers only; and what to do when it is too long."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from spatialvlm.data.media.plan import MediaInfo
from spatialvlm.data.sample import EncodedSample, Sample
from spatialvlm.data.template import ChatTemplate, TextPiece
from spatialvlm.errors import DataError
from spatialvlm.sequence.layout import Expanded, MediaItem, TokenLayout
from spatialvlm.typing import (
    IGNORE_INDEX,
    KIND_CAMERA,
    KIND_IMAGE,
    KIND_SPATIAL,
    KIND_TEXT,
    KIND_VIDEO,
)

if TYPE_CHECKING:
    from spatialvlm.typing import IntArray

_SUPERVISED = np.int64(1 << 40)
"""Added to supervised ids while the layout moves them around; no vocabulary is that large."""


@dataclass(frozen=True, slots=True)
class OverlongPolicy:
    """What happens to samples above ``max_length`` tokens.

    ``reject``: the row is not eligible. ``drop_frames``: videos are re-sampled to the largest even number
    of frames, at least ``min_frames``, that fits. ``truncate_text_turns``: trailing question-answer pairs
    without media are left out.
    """

    max_length: int
    policy: Literal["reject", "drop_frames", "truncate_text_turns"] = "reject"
    min_frames: int = 8


class Fitted(NamedTuple):
    """A sample that fits."""

    encoded: EncodedSample
    media: tuple[MediaInfo, ...]
    """With the frames that were kept."""
    outcome: Literal["kept", "frames_dropped", "turns_dropped"]
    tokens_removed: int
    boxes_rewritten: int = 0


def geometry_groups(sample: Sample, layout: TokenLayout) -> tuple[int, ...]:
    """Geometry group of every medium, -1 = none.

    Frames of a video form one group, images of one scene another. ``auto`` encodes videos and images of
    one scene seen from several places; a single image tells a multi-view encoder nothing new.

    Raises:
        DataError: ``geometry: on`` for a sample without media.
    """
    if sample.geometry == "on" and not sample.media:
        raise DataError(
            f"{sample.uid} asks for geometry but has no media; set geometry: auto for its source"
        )
    if layout.size is None or layout.insertion == "none" or sample.geometry == "off":
        return (-1,) * len(sample.media)
    num_images = sum(ref.kind == "image" for ref in sample.media)
    groups: list[int] = []
    scene = -1
    for ref in sample.media:
        together = ref.kind == "image" and sample.same_scene and num_images > 1
        if sample.geometry == "auto" and ref.kind == "image" and not together:
            groups.append(-1)
        elif together and scene >= 0:
            groups.append(scene)
        else:
            groups.append(max(groups, default=-1) + 1)
            scene = groups[-1] if together else scene
    return tuple(groups)


def encode(
    sample: Sample,
    media: Sequence[MediaInfo],
    template: ChatTemplate,
    layout: TokenLayout,
    *,
    train_on: Literal["all", "last"] = "all",
    heads: HeadCache | None = None,
) -> EncodedSample:
    """Lay out one sample, whatever its length.

    Args:
        sample: With turns in their final wording.
        media: One entry per ``sample.media``.
        template: Of the checkpoint.
        layout: Of the run.
        train_on: Which assistant turns are supervised.
        heads: Remembers beginnings that several samples share.

    Raises:
        DataError: A media token would be supervised, or nothing would be.
    """
    return _assemble(
        sample, media, template.pieces(sample.turns, train_on=train_on), template, layout, heads
    )


def encode_prompt(
    sample: Sample, media: Sequence[MediaInfo], template: ChatTemplate, layout: TokenLayout
) -> EncodedSample:
    """The same up to the header of the last answer, without labels."""
    return _assemble(sample, media, template.prompt(sample.turns), template, layout, None)


def fit(
    sample: Sample,
    media: Sequence[MediaInfo],
    template: ChatTemplate,
    layout: TokenLayout,
    policy: OverlongPolicy,
    *,
    train_on: Literal["all", "last"] = "all",
    heads: HeadCache | None = None,
) -> Fitted:
    """Encode, and apply the policy when the sample is too long.

    Raises:
        DataError: Reason ``overlong`` when the policy finds nothing to remove.
    """
    encoded = encode(sample, media, template, layout, train_on=train_on, heads=heads)
    length = len(encoded.input_ids)
    if length <= policy.max_length:
        return Fitted(encoded, tuple(media), "kept", 0)
    if policy.policy == "drop_frames" and not sample.frames_pinned:
        most = max((len(info.times_s) for info in media), default=0)
        for count in range((most - 1) // 2 * 2, policy.min_frames - 1, -2):
            fewer = tuple(info.with_frames(count) for info in media)
            shorter = encode(sample, fewer, template, layout, train_on=train_on)
            if len(shorter.input_ids) <= policy.max_length:
                return Fitted(shorter, fewer, "frames_dropped", length - len(shorter.input_ids))
    if policy.policy == "truncate_text_turns":
        turns = sample.turns
        while len(turns) > 3 and not any(isinstance(part, int) for part in turns[-2].parts):
            turns = turns[:-2]
            cut = sample._replace(turns=turns)
            shorter = encode(cut, media, template, layout, train_on=train_on)
            if len(shorter.input_ids) <= policy.max_length:
                return Fitted(
                    shorter, tuple(media), "turns_dropped", length - len(shorter.input_ids)
                )
    raise DataError(
        f"{sample.uid} has {length} tokens ({encoded.num_visual_tokens} visual, {encoded.num_spatial_tokens} spatial), "
        f"more than packing.max_length={policy.max_length}"
        + ("; its frames are pinned, so none was dropped" if sample.frames_pinned else "")
        + ". Raise packing.max_length, lower the pixel budget of its source, or choose another data.overlong",
        reason="overlong",
    )


class _Head(NamedTuple):
    """The beginning of a sample, up to the end of its last medium."""

    expanded: Expanded
    """Its positions have one column more, for the text token that follows."""
    labels: IntArray
    num_visual: int
    num_spatial: int


class HeadCache:
    """Laid-out beginnings of samples, up to the end of their last medium.

    Questions about the same media stand next to each other in files and in groups and share their
    beginning, so laying it out once saves most of the work.
    """

    def __init__(self, size: int = 64) -> None:
        self.size = size
        self._heads: dict[Any, _Head] = {}

    def get(self, key: Any, expand: Callable[[], _Head]) -> _Head:
        """The head of a key, computed on a miss."""
        if key not in self._heads:
            if len(self._heads) >= self.size:
                self._heads.pop(next(iter(self._heads)))
            self._heads[key] = expand()
        return self._heads[key]


def _assemble(
    sample: Sample,
    media: Sequence[MediaInfo],
    pieces: Sequence[TextPiece | int],
    template: ChatTemplate,
    layout: TokenLayout,
    heads: HeadCache | None,
) -> EncodedSample:
    assert len(media) == len(sample.media), (
        f"{sample.uid}: {len(media)} headers for {len(sample.media)} media"
    )
    groups = geometry_groups(sample, layout)
    items = [
        MediaItem(info.ref.kind, info.grid, info.times_s, info.second_per_grid_t, group)
        for info, group in zip(media, groups, strict=True)
    ]
    head, tail = _split_head(pieces, template.media_end_ids)
    if head:
        key = tuple(
            items[p] if isinstance(p, int) else (p.ids.tobytes(), p.supervised) for p in head
        )
        known = (heads or HeadCache(1)).get(
            key, lambda: _expand_head(head, items, template, layout, sample.uid)
        )
    else:
        known = _no_head(layout.num_position_rows)
    ids = np.concatenate([known.expanded.input_ids, *[piece.ids for piece in tail]])
    first, length = len(known.expanded.input_ids), len(ids)
    kind = np.zeros(length, np.uint8)
    kind[:first] = known.expanded.token_kind
    # the head's last position is the one of the token behind it; text goes on from there in all rows
    begin = known.expanded.position_ids[:, -1:]
    positions = np.empty((len(begin), length), np.int64)
    positions[:, :first] = known.expanded.position_ids[:, :-1]
    positions[:, first:] = begin + np.arange(length - first)
    labels = np.full(length, IGNORE_INDEX, np.int64)
    labels[:first] = known.labels
    at = first
    for piece in tail:
        if piece.supervised:
            labels[at : at + len(piece.ids)] = piece.ids
        at += len(piece.ids)
    supervised = np.flatnonzero(labels != IGNORE_INDEX)
    answer = int(supervised[0]) if len(supervised) else length
    return EncodedSample(
        input_ids=ids,
        labels=labels,
        token_kind=kind,
        position_ids=positions,
        grids=tuple([info.grid for info in media]),
        # the predictor of the first answer token has to lie in the branch
        prefix_len=min(first, answer - 1) if first <= answer else 0,
        num_label_tokens=len(supervised),
        num_patches=sum([info.num_patches for info in media]),
        num_visual_tokens=known.num_visual,
        num_spatial_tokens=known.num_spatial,
        frames=tuple([info.ref.frames or () for info in media]),
        frame_times_s=tuple([info.times_s for info in media]),
    )


def _split_head(
    pieces: Sequence[TextPiece | int], end_ids: tuple[int, ...]
) -> tuple[list[TextPiece | int], list[TextPiece]]:
    """Pieces up to the end marker of the last medium, and the text behind it."""
    last = max((n for n, piece in enumerate(pieces) if isinstance(piece, int)), default=-1)
    tail = [piece for piece in pieces[last + 1 :] if isinstance(piece, TextPiece)]
    if last < 0:
        return [], tail
    markers = 0
    while markers < len(tail[0].ids) and tail[0].ids[markers] in end_ids:
        markers += 1
    head = list(pieces[: last + 1])
    if markers:
        head.append(TextPiece(tail[0].ids[:markers], supervised=False))
        tail[0] = TextPiece(tail[0].ids[markers:], tail[0].supervised)
    return head, tail


def _expand_head(
    head: Sequence[TextPiece | int],
    items: Sequence[MediaItem],
    template: ChatTemplate,
    layout: TokenLayout,
    uid: str,
) -> _Head:
    """Lay out a head.

    Raises:
        DataError: A media token would be supervised, or visual tokens and media do not fit together.
    """
    tagged = [
        items[piece] if isinstance(piece, int) else piece.ids + _SUPERVISED * piece.supervised
        for piece in head
    ]
    ids, kind, positions = layout.expand([*tagged, np.array([template.pad_id])], template.encode)
    ids, kind = ids[:-1], kind[:-1]
    supervised = ids >= _SUPERVISED
    if np.any(kind[supervised] != KIND_TEXT):
        raise DataError(f"{uid}: a media token would be supervised")
    ids = np.where(supervised, ids - _SUPERVISED, ids)
    counts = np.bincount(kind, minlength=KIND_CAMERA + 1)
    visual = int(counts[KIND_IMAGE] + counts[KIND_VIDEO])
    expected = sum([layout.count(item)[0] for item in items])
    if visual != expected:
        raise DataError(
            f"{uid}: {visual} visual tokens in the sequence, but its media give {expected}"
        )
    return _Head(
        Expanded(ids, kind, positions),
        np.where(supervised, ids, IGNORE_INDEX),
        visual,
        int(counts[KIND_SPATIAL] + counts[KIND_CAMERA]),
    )


@functools.lru_cache(maxsize=2)
def _no_head(position_rows: int) -> _Head:
    """The head of a sample without media."""
    nothing = np.zeros(0, np.int64)
    expanded = Expanded(nothing, np.zeros(0, np.uint8), np.zeros((position_rows, 1), np.int64))
    return _Head(expanded, nothing, 0, 0)
