"""The batch of a pack, field by field on a hand-made example."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from spatialvlm.data.collate import MediaPixels, Prepared, collate, denominator
from spatialvlm.data.sample import EncodedSample
from spatialvlm.errors import DataError
from spatialvlm.typing import ModalityFlags

FLAGS = ModalityFlags(True, False, False, True)


def text(ids, supervised):
    ids = np.array(ids)
    labels = np.full(len(ids), -100)
    labels[list(supervised)] = ids[list(supervised)]
    return EncodedSample(
        ids, labels, np.zeros(len(ids), np.uint8), np.arange(len(ids))[None].repeat(4, 0), (), 0, len(supervised),
        0, 0, 0, (), (),
    )  # fmt: skip


def with_image(branch, supervised=(-1,)):
    """``[1, image, 2]`` and a branch."""
    ids = np.array([1, 99, 2, *branch])
    encoded = text(ids, [i % len(ids) for i in supervised])
    kind = np.zeros(len(ids), np.uint8)
    kind[1] = 1
    return replace(
        encoded,
        token_kind=kind,
        grids=((1, 2, 2),),
        prefix_len=3,
        frames=((),),
        num_visual_tokens=1,
    )


def picture(value=0, group=-1, geometry=None, key="k"):
    frames = np.full((1, 8, 8, 3), value, np.uint8)
    return MediaPixels(
        1, (1, 2, 2), frames, group, frames if isinstance(geometry, str) else geometry, key
    )


def make(samples, groups, **options):
    return collate(samples, groups, flags=FLAGS, position_rows=4, **options)


def test_a_pack_with_a_group_and_a_single():
    samples = [
        Prepared("a", with_image([3, 4, 5], (-1,)), (picture(1),), source=0, capability=2),
        Prepared("b", with_image([6, 7], (-1,)), (picture(1),), source=0),
        Prepared("c", text([8, 9, 10, 11], [2, 3]), weight=0.5, source=1),
    ]
    batch = make(samples, [(0, 1), (2,)])
    assert batch["input_ids"].tolist() == [[1, 99, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]]
    assert batch["position_ids"][0, 0].tolist() == [0, 1, 2, 3, 4, 5, 3, 4, 0, 1, 2, 3]
    assert batch["segment_start"].tolist() == [0, 3, 6, 8]
    assert batch["segment_len"].tolist() == [3, 3, 2, 4]
    assert batch["segment_parent"].tolist() == [-1, 0, 0, -1]
    assert batch["labels"][0].tolist() == [-100] * 5 + [5, -100, 7, -100, -100, 10, 11]
    assert batch["logit_index"].tolist() == [4, 6, 9, 10]
    assert batch["target_ids"].tolist() == [5, 7, 10, 11]
    assert batch["loss_weight"].tolist() == [1, 1, 0.5, 0.5]
    assert batch["sample_index"].tolist() == [0, 1, 2, 2]
    assert batch["source_index"].tolist() == [0, 0, 1]
    assert batch["capability_index"].tolist() == [2, -1, -1]
    assert batch["frame_shapes"].tolist() == [[1, 8, 8]]
    assert batch["media_grid_thw"].tolist() == [[1, 2, 2]]
    assert batch["media_kind"].tolist() == [1]
    assert batch["media_group"].tolist() == [-1]
    assert batch["frames_u8"].numel() == 192
    assert "geometry_shapes" not in batch
    assert batch["uids"] == ["a", "b", "c"]


def test_geometry_groups_are_numbered_over_the_pack():
    big = np.full((1, 14, 14, 3), 7, np.uint8)
    samples = [
        Prepared("a", with_image([3, 4]), (picture(1, 0, big, "x"),)),
        Prepared("b", with_image([3, 4]), (picture(2),)),
        Prepared("c", with_image([3, 4]), (picture(3, 0, big + 1, "z"),)),
    ]
    batch = make(samples, [(0,), (1,), (2,)])
    assert batch["media_group"].tolist() == [0, -1, 1]
    assert batch["geometry_shapes"].tolist() == [[1, 14, 14], [1, 14, 14]]
    assert batch["geometry_u8"].view(2, -1)[:, 0].tolist() == [7, 8]
    assert batch["geometry_keys"] == ["x", "z"]


def test_equal_geometry_frames_are_not_sent_twice():
    samples = [Prepared("a", with_image([3, 4]), (picture(1, 0, "same"),))]
    batch = make(samples, [(0,)])
    assert "geometry_u8" not in batch
    assert batch["geometry_shapes"].tolist() == [[1, 8, 8]]


def test_a_pack_without_labels_has_one_row_of_weight_zero():
    batch = make([Prepared("a", text([1, 2], []))], [(0,)])
    assert batch["logit_index"].shape == (1,)
    assert batch["loss_weight"].tolist() == [0.0]


def test_dummy_pack():
    batch = make([], [], pad_id=5)
    assert batch["input_ids"].tolist() == [[5]]
    assert batch["segment_len"].tolist() == [1]
    assert batch["position_ids"].shape == (4, 1, 1)
    assert batch["uids"] == []
    assert batch["frames_u8"].shape == (0,)
    assert batch["media_grid_thw"].shape == (0, 3)


def test_one_position_row():
    sample = text([1, 2, 3], [2])
    flat = replace(sample, position_ids=sample.position_ids[:1])
    batch = collate([Prepared("a", flat)], [(0,)], flags=FLAGS, position_rows=1)
    assert batch["position_ids"].tolist() == [[0, 1, 2]]


def test_weights_and_denominators():
    samples = [
        Prepared("a", text([1, 2, 3, 4, 5], [1, 2, 3, 4])),
        Prepared("b", text([1, 2], [1]), weight=3.0),
    ]
    for weighting, weights, total in [
        ("token", [1, 1, 1, 1, 3], 5), ("sample", [0.25] * 4 + [3], 2), ("sqrt", [0.5] * 4 + [3], 3),
    ]:  # fmt: skip
        batch = make(samples, [(0,), (1,)], loss_weighting=weighting)
        assert batch["loss_weight"].tolist() == weights
        assert denominator([4, 1], weighting) == total


def test_pixels_that_do_not_fit_the_tokens():
    wrong = picture()._replace(grid=(1, 2, 4))
    with pytest.raises(DataError, match=r"a: frames .* do not match"):
        make([Prepared("a", with_image([3, 4]), (wrong,))], [(0,)])


def test_no_attention_mask():
    assert "attention_mask" not in make([Prepared("a", text([1, 2], [1]))], [(0,)])


def test_tensors_own_their_memory():
    encoded = text([1, 2, 3], [2])
    batch = make([Prepared("a", encoded)], [(0,)])
    batch["input_ids"].fill_(0)
    assert encoded.input_ids.tolist() == [1, 2, 3]
    assert all(value.is_contiguous() for value in batch.values() if isinstance(value, torch.Tensor))
