"""Shared prefixes: the worked example, what may group, and what keys tell apart."""

from dataclasses import replace

import numpy as np

from spatialvlm.data.prefix import common_prefix, group_key, num_pairs, segments
from spatialvlm.data.sample import EncodedSample, Segment


def sample(branch, *, prefix=8, image=4, first=0):
    """``first`` + text, ``<vs>``, 4 visual, ``<ve>`` = 8 tokens, then a branch of text; last token supervised."""
    length = prefix + branch
    ids = np.arange(length) + first
    kind = np.zeros(length, np.uint8)
    kind[prefix - 1 - image : prefix - 1] = 1
    mrope = np.concatenate([[0, 1, 2], [3, 3, 4, 4], [5], np.arange(6, 6 + branch)])
    labels = np.full(length, -100)
    labels[-1] = ids[-1]
    positions = np.stack([np.arange(length), mrope, mrope, mrope])
    return EncodedSample(
        ids, labels, kind, positions, grids=((1, 4, 4),), prefix_len=prefix, num_label_tokens=1, num_patches=16,
        num_visual_tokens=4, num_spatial_tokens=0, frames=((),), frame_times_s=((),),
    )  # fmt: skip


def test_worked_example():
    """Branches of 5 and 3 behind a prefix of 8: 16 tokens, 36 + 55 + 30 = 121 pairs, positions go on."""
    members = [sample(5), sample(3)]
    assert common_prefix(members) == 8
    parts = segments([(0, 1)], members)
    assert parts == [Segment(0, 8, -1, 0), Segment(8, 5, 0, 0), Segment(13, 3, 0, 1)]
    assert num_pairs(parts) == 121
    assert num_pairs(segments([(0,), (1,)], members)) == 157
    for member, end in zip(members, (10, 8), strict=True):
        assert member.position_ids[1, 8:].tolist() == list(range(6, end + 1))
        assert member.position_ids[0, 8] == 8


def test_what_does_not_group():
    a = sample(5)
    ids = a.input_ids.copy()
    ids[0] += 1
    positions = a.position_ids.copy()
    positions[1, 4] += 1
    kind = a.token_kind.copy()
    kind[4] = 3
    for other in (
        replace(a, input_ids=ids),
        replace(a, position_ids=positions),
        replace(a, token_kind=kind),
        replace(a, frames=((0, 2),)),
        replace(a, grids=((1, 2, 8),)),
        replace(a, prefix_len=0),
    ):
        assert common_prefix([a, other]) == 0
    assert common_prefix([a]) == 0


def test_group_keys():
    a = sample(5)
    key = group_key(a, 1, (0,))
    assert key == group_key(sample(3), 1, (0,))
    assert key not in (
        group_key(a, 2, (0,)),
        group_key(a, 1, (-1,)),
        group_key(sample(5, first=1), 1, (0,)),
    )
    assert group_key(replace(a, prefix_len=0), 1, (0,)) == 0


def test_groups_and_singles_in_one_pack():
    members = [sample(2), sample(4), sample(3), sample(1)]
    parts = segments([(2,), (0, 1), (3,)], members)
    assert [(p.length, p.parent, p.sample) for p in parts] == [
        (11, -1, 2), (8, -1, 0), (2, 1, 0), (4, 1, 1), (9, -1, 3),
    ]  # fmt: skip
    assert [p.start for p in parts] == [0, 11, 19, 21, 25]
