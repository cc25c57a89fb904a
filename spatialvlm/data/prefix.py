"""Shared-prefix groups: several questions about the same media behind one copy of the media.

The prefix of a sample ends with the end marker of its last medium. Samples group only when everything up
to there is equal; each question and answer is then a branch that sees the prefix and itself. Gradients
of the branches add up in the prefix by autograd. Message trees of this form are used by Molmo2 (arXiv
2601.10611) for its own models.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from spatialvlm.data.media.plan import MediaInfo
from spatialvlm.data.sample import EncodedSample, Sample, Segment
from spatialvlm.typing import IGNORE_INDEX, KIND_TEXT


def media_key(root: str, sample: Sample, media: Sequence[MediaInfo]) -> int:
    """Identity of the pixels of a sample: files, frames, sizes, marks; 0 = no media."""
    if not media:
        return 0
    what = [
        (
            info.ref.kind,
            info.ref.store,
            info.ref.path,
            info.ref.member,
            info.ref.frames,
            info.size,
            info.tiles,
        )
        for info in media
    ]
    return _hash(repr((root, what, sample.marks)).encode())


def group_key(encoded: EncodedSample, media_id: int, geometry_groups: Sequence[int]) -> int:
    """Key that is equal only for samples with the same prefix tokens, pixels and geometry; 0 = never.

    Media tokens and positions follow from the text around the media, their grids and frames, so only
    the text is hashed; :func:`common_prefix` compares everything when a pack is built.
    """
    end = encoded.prefix_len
    if end == 0:
        return 0
    text = encoded.input_ids[:end][encoded.token_kind[:end] == KIND_TEXT]
    what = repr((media_id, end, tuple(geometry_groups), encoded.grids))
    return _hash(text.tobytes() + what.encode())


def common_prefix(members: Sequence[EncodedSample]) -> int:
    """Tokens the members can share: all up to the end of the last medium, or 0 when anything differs.

    Every branch keeps at least one unsupervised token, so the predictor of each target lies in its own
    branch.
    """
    first = members[0]
    end = min(member.prefix_len for member in members)
    if (
        len(members) == 1
        or end == 0
        or any(member.prefix_len != first.prefix_len for member in members)
    ):
        return 0
    for member in members[1:]:
        if not (
            member.grids == first.grids
            and member.frames == first.frames
            and np.array_equal(member.input_ids[:end], first.input_ids[:end])
            and np.array_equal(member.token_kind[:end], first.token_kind[:end])
            and np.array_equal(member.position_ids[:, :end], first.position_ids[:, :end])
        ):
            return 0
    assert all(np.all(member.labels[: end + 1] == IGNORE_INDEX) for member in members)
    return end


def segments(groups: Sequence[Sequence[int]], encoded: Sequence[EncodedSample]) -> list[Segment]:
    """Segments of a pack: per group either one root, or a prefix followed by its branches.

    Args:
        groups: Indices into ``encoded``, in sequence order.
        encoded: The samples of the pack.
    """
    out: list[Segment] = []
    start = 0
    for group in groups:
        shared = common_prefix([encoded[i] for i in group])
        parent = -1
        if shared:
            parent = len(out)
            out.append(Segment(start, shared, -1, group[0]))
            start += shared
        for i in group:
            length = len(encoded[i].input_ids) - shared
            out.append(Segment(start, length, parent, i))
            start += length
    return out


def num_pairs(parts: Sequence[Segment]) -> int:
    """(query, key) pairs the attention rule allows."""
    total = 0
    for part in parts:
        before = parts[part.parent].length if part.parent >= 0 else 0
        total += part.length * before + part.length * (part.length + 1) // 2
    return total


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") or 1
