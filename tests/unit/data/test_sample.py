"""The shared types agree with each other."""

import pickle

import numpy as np
import pytest

from spatialvlm.data.sample import DRAW_DTYPE, LENGTH_DTYPE, Draw, MediaRef, Sample, Turn, World


def test_draws_and_their_records_have_the_same_fields():
    assert DRAW_DTYPE.names == Draw._fields
    record = np.zeros(1, DRAW_DTYPE)
    record[0] = (7, 1, 5, 2, 3, 0, 4)
    assert Draw(*record[0].item()) == Draw(7, 1, 5, 2, 3, 0, 4)


def test_unmeasured_lengths_are_zero():
    assert not any(np.zeros(1, LENGTH_DTYPE)[0].item())


def test_samples_are_immutable_hashable_parts_and_pickle():
    sample = Sample(
        "s/r#0", "s", "f", (Turn("user", ("a", 0, "b")),), (MediaRef("image", "file", "x"),)
    )
    assert sample.turns[0].text == "ab"
    assert pickle.loads(pickle.dumps(sample)) == sample
    assert hash(sample.media[0]) == hash(MediaRef("image", "file", "x"))
    with pytest.raises(AttributeError):
        sample.uid = "other"


@pytest.mark.parametrize(("rank", "size"), [(1, 1), (-1, 2), (0, 0)])
def test_ranks_lie_inside_the_world(rank, size):
    with pytest.raises(AssertionError):
        World(rank, size)
