"""Prepared samples of one pack -> :class:`~spatialvlm.typing.Batch`.

Groups become a prefix segment with one branch per sample, single samples a root segment. The media of a
group appear once. Nothing here depends on a model: pixels stay uint8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch

from spatialvlm.data.prefix import segments
from spatialvlm.data.sample import EncodedSample
from spatialvlm.errors import DataError
from spatialvlm.typing import IGNORE_INDEX, KIND_IMAGE, KIND_VIDEO, Batch, ModalityFlags

if TYPE_CHECKING:
    from spatialvlm.typing import UInt8Array

LossWeighting = Literal["token", "sample", "sqrt"]


class MediaPixels(NamedTuple):
    """Pixels of one medium."""

    kind: int
    """1 image, 2 video."""
    grid: tuple[int, int, int]
    frames: UInt8Array
    """``[S, H, W, 3]`` at model size."""
    group: int
    """Geometry group inside the sample; -1 = none."""
    geometry: UInt8Array | None
    """The same frames at the geometry encoder's size, unmarked; None without geometry."""
    key: str
    """Content identity of the geometry frames."""
    content: tuple[int, int] | None = None
    """(height, width) of the image inside letterboxed geometry frames; None = they are not padded."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """One sample of a pack, ready to be laid into it."""

    uid: str
    encoded: EncodedSample
    pixels: tuple[MediaPixels, ...] = ()
    weight: float = 1.0
    source: int = -1
    capability: int = -1


def collate(
    samples: Sequence[Prepared],
    groups: Sequence[Sequence[int]],
    *,
    flags: ModalityFlags,
    position_rows: int,
    loss_weighting: LossWeighting = "token",
    align: int = 1,
    pad_id: int = 0,
) -> Batch:
    """Build the batch of one pack.

    Args:
        samples: The pack's samples; empty for a dummy pack.
        groups: Indices into ``samples``, in sequence order; members of a group share their media.
        flags: What any rank holds in this micro-step.
        position_rows: 4 (Qwen) or 1 (InternVL).
        loss_weighting: Weight of each supervised token: 1, 1/n or 1/sqrt(n) for a sample with n of them,
            times the sample's own weight.
        align: Pad the sequence to a multiple of this with an isolated segment.
        pad_id: Token of padding and of dummy packs.

    Raises:
        DataError: Pixels and token grid of a medium do not match.
    """
    encoded = [sample.encoded for sample in samples]
    parts = segments(groups, encoded)
    pieces: list[_Piece] = []
    media: list[MediaPixels] = []
    shift = 0  # geometry groups used so far
    for index, part in enumerate(parts):
        source = encoded[part.sample]
        is_branch = part.parent >= 0
        is_prefix = any(other.parent == index for other in parts)
        begin = parts[part.parent].length if is_branch else 0
        pieces.append(_cut(source, begin, begin + part.length, -1 if is_prefix else part.sample))
        if not is_branch:
            own = samples[part.sample].pixels
            _check(samples[part.sample])
            media += [m._replace(group=m.group + shift if m.group >= 0 else -1) for m in own]
            shift += max((m.group for m in own), default=-1) + 1
    total = sum(len(piece.ids) for piece in pieces)
    padding = -total % align if total else max(align, 1)
    if padding:
        pieces.append(_padding(padding, position_rows, pad_id))

    starts = np.cumsum([0, *(len(piece.ids) for piece in pieces)])[:-1]
    labels = np.concatenate([piece.labels for piece in pieces])
    owner = np.concatenate([piece.owner for piece in pieces])
    targets = np.flatnonzero(labels != IGNORE_INDEX)
    weights = np.zeros(len(targets), np.float32)
    for i, sample in enumerate(samples):
        weights[owner[targets] == i] = sample.weight * token_weight(
            sample.encoded.num_label_tokens, loss_weighting
        )
    if len(targets):
        logit_index, target_ids, sample_index = targets - 1, labels[targets], owner[targets]
    else:  # one row of weight 0, so that the head runs on every rank
        logit_index = target_ids = sample_index = np.zeros(1, np.int64)
        weights = np.zeros(1, np.float32)

    batch: Batch = {
        "input_ids": _tensor(np.concatenate([piece.ids for piece in pieces]))[None],
        "labels": _tensor(labels)[None],
        "position_ids": _positions(np.concatenate([piece.positions for piece in pieces], axis=1)),
        "token_kind": _tensor(np.concatenate([piece.kind for piece in pieces]))[None],
        "segment_start": _tensor(starts.astype(np.int32)),
        "segment_len": _tensor(np.array([len(piece.ids) for piece in pieces], np.int32)),
        "segment_parent": _tensor(
            np.array([part.parent for part in parts] + [-1] * (len(pieces) - len(parts)), np.int32)
        ),
        "logit_index": _tensor(logit_index.astype(np.int64)),
        "target_ids": _tensor(target_ids.astype(np.int64)),
        "loss_weight": _tensor(weights),
        "sample_index": _tensor(sample_index.astype(np.int64)),
        "source_index": _tensor(np.array([s.source for s in samples] or [-1], np.int64)),
        "capability_index": _tensor(np.array([s.capability for s in samples] or [-1], np.int64)),
        "flags": flags,
        "uids": [sample.uid for sample in samples],
    }
    _add_media(batch, media)
    return batch


def token_weight(num_label_tokens: int, weighting: LossWeighting) -> float:
    """Loss weight of each supervised token of a sample."""
    n = max(num_label_tokens, 1)
    if weighting == "token":
        return 1.0
    return 1.0 / n if weighting == "sample" else float(n) ** -0.5


def denominator(label_tokens: Sequence[int], weighting: LossWeighting) -> float:
    """What the step's loss is divided by, for samples with these numbers of supervised tokens.

    All supervised tokens, all samples, or the sum of their square roots; a sample's own weight acts on
    the numerator only.
    """
    return float(sum((n * token_weight(n, weighting) for n in label_tokens if n), start=0.0))


class _Piece(NamedTuple):
    ids: np.ndarray
    labels: np.ndarray
    kind: np.ndarray
    positions: np.ndarray
    owner: np.ndarray


def _cut(source: EncodedSample, begin: int, end: int, owner: int) -> _Piece:
    labels = source.labels[begin:end].copy()
    assert labels[0] == IGNORE_INDEX, "the first token of a segment has no predictor inside it"
    if owner < 0:
        assert np.all(labels == IGNORE_INDEX), "a shared prefix holds no label"
    return _Piece(
        source.input_ids[begin:end],
        labels,
        source.token_kind[begin:end],
        source.position_ids[:, begin:end],
        np.full(end - begin, owner),
    )


def _padding(length: int, position_rows: int, pad_id: int) -> _Piece:
    ramp = np.broadcast_to(np.arange(length), (position_rows, length))
    return _Piece(
        np.full(length, pad_id), np.full(length, IGNORE_INDEX), np.zeros(length, np.uint8), ramp, np.full(length, -1)
    )  # fmt: skip


def _check(sample: Prepared) -> None:
    for medium, grid in zip(sample.pixels, sample.encoded.grids, strict=True):
        height, width = medium.frames.shape[1:3]
        if (
            medium.grid != grid
            or height % grid[1]
            or width % grid[2]
            or height // grid[1] != width // grid[2]
        ):
            raise DataError(
                f"{sample.uid}: frames of shape {medium.frames.shape} do not match the token grid {grid}; "
                "the index is out of date, rebuild it"
            )


def _add_media(batch: Batch, media: Sequence[MediaPixels]) -> None:
    empty = np.zeros((0, 3), np.int64)
    batch["frames_u8"] = _flat([m.frames for m in media])
    batch["frame_shapes"] = _tensor(
        np.array([m.frames.shape[:3] for m in media], np.int64) if media else empty
    )
    batch["media_kind"] = _tensor(np.array([m.kind for m in media], np.uint8))
    batch["media_grid_thw"] = _tensor(
        np.array([m.grid for m in media], np.int64) if media else empty
    )
    batch["media_group"] = _tensor(np.array([m.group for m in media], np.int64))
    assert all(m.kind in (KIND_IMAGE, KIND_VIDEO) for m in media)
    groups: dict[int, list[MediaPixels]] = {}
    for medium in media:
        if medium.group >= 0:
            groups.setdefault(medium.group, []).append(medium)
    if not groups:
        return
    ordered = [groups[index] for index in sorted(groups)]
    stacks = [[_geometry(m) for m in members] for members in ordered]
    shapes = [(sum(len(x) for x in stack), *stack[0].shape[1:3]) for stack in stacks]
    batch["geometry_shapes"] = _tensor(np.array(shapes, np.int64))
    batch["geometry_keys"] = [
        "+".join(m.key for m in members) if all(m.key for m in members) else ""
        for members in ordered
    ]
    if any(m.content for m in media):
        batch["geometry_content"] = _tensor(
            np.array([m.content or (0, 0) for m in media], np.int64)
        )
    in_order = [m for members in ordered for m in members]
    same = len(in_order) == len(media) and all(
        a is b and a.geometry is a.frames for a, b in zip(in_order, media, strict=True)
    )
    if not same:
        batch["geometry_u8"] = _flat([x for stack in stacks for x in stack])


def _geometry(medium: MediaPixels) -> UInt8Array:
    assert medium.geometry is not None, "a medium with a geometry group has geometry frames"
    return medium.geometry


def _flat(arrays: Sequence[UInt8Array]) -> torch.Tensor:
    if not arrays:
        return torch.zeros(0, dtype=torch.uint8)
    return torch.from_numpy(np.concatenate([array.reshape(-1) for array in arrays]))


def _positions(rows: np.ndarray) -> torch.Tensor:
    """``[4, 1, T]``, or ``[1, T]`` for one row."""
    tensor = _tensor(rows)
    return tensor if len(rows) == 1 else tensor[:, None]


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
