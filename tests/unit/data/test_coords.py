"""Box numbers in text: every notation, every pair of conventions, and boxes outside their image."""

import pytest

from spatialvlm.data.formats.coords import ImageSizes, rewrite_coords
from spatialvlm.data.sample import MediaRef, Sample, Turn
from spatialvlm.errors import DataError

SIZE = ImageSizes(stored=(400, 800), resized=(200, 500))


def sample(text, coords, media=1):
    turns = (Turn("user", (*range(media), "Where? [5, 6]")), Turn("assistant", (text,)))
    refs = tuple(MediaRef("image", "file", f"{i}.jpg") for i in range(media))
    return Sample("s/a#0", "s", "spatial", turns, refs, coords=coords)


def rewritten(text, coords, target, sizes=(SIZE,)):
    result, count = rewrite_coords(sample(text, coords, len(sizes)), sizes, target)
    return result.turns[1].text, count


@pytest.mark.parametrize(
    ("coords", "target", "expected"),
    [
        ("abs_source", "norm1000", "[100, 500, 1000, 1000]"),
        ("abs_source", "abs_resized", "[50, 100, 500, 200]"),
        ("abs_source", "norm1", "[0.100, 0.500, 1.000, 1.000]"),
    ],
)
def test_conventions(coords, target, expected):
    text, count = rewritten('{"bbox_2d": [80, 200, 800, 400], "label": "chair 3"}', coords, target)
    assert text == f'{{"bbox_2d": {expected}, "label": "chair 3"}}'
    assert count == 1


def test_notations():
    assert rewritten(
        "<box>[[0.5, 0.5, 1, 1], [0, 0, 0.25, 0.1]]</box> and 7", "norm1", "norm1000"
    ) == (
        "<box>[[500, 500, 1000, 1000], [0, 0, 250, 100]]</box> and 7",
        1,
    )
    assert rewritten(
        "<|box_start|>(500,500),(1000,1000)<|box_end|>", "norm1000", "abs_resized"
    ) == (
        "<|box_start|>(250,100),(500,200)<|box_end|>",
        1,
    )
    assert (
        rewritten("{'point_2d': [500, 250]}", "norm1000", "abs_source")[0]
        == "{'point_2d': [400, 100]}"
    )


def test_unchanged():
    for coords in ("none", "norm1000"):
        before = sample('"bbox_2d": [1, 2, 3, 4]', coords)
        assert rewrite_coords(before, [SIZE], "norm1000") == (before, 0)
    before = sample("No box [1, 2, 3, 4].", "abs_source")
    assert rewrite_coords(before, [SIZE], "norm1000") == (before, 0)


def test_boxes_outside_are_refused_and_a_little_over_is_clipped():
    assert (
        rewritten('"bbox_2d": [-1, 0, 810, 404]', "abs_source", "norm1000")[0]
        == '"bbox_2d": [0, 0, 1000, 1000]'
    )
    with pytest.raises(DataError, match="coordinate 900 lies outside its image") as caught:
        rewritten('"bbox_2d": [0, 0, 900, 400]', "abs_source", "norm1000")
    assert caught.value.reason == "coord_range"


def test_pixels_need_one_size():
    sizes = (SIZE, ImageSizes((300, 300), (100, 100)))
    with pytest.raises(DataError, match=r"different sizes \[300, 800\]"):
        rewritten('"bbox_2d": [0, 0, 9, 4]', "abs_source", "norm1000", sizes)
    assert rewritten('"bbox_2d": [0, 0, 1, 0.5]', "norm1", "norm1000", sizes)[1] == 1
