"""Worked examples of the position rule, and equality with transformers where the rules agree."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spatialvlm.sequence.layout import MediaItem, TokenLayout
from spatialvlm.sequence.positions import Block, mrope_positions, position_delta, unit_times
from spatialvlm.typing import KIND_CAMERA, KIND_IMAGE, KIND_SPATIAL, KIND_TEXT, KIND_VIDEO

IMAGE, VIDEO, START, END, SPATIAL = 101, 102, 103, 104, 105
TIMESTAMP = np.array([7, 8, 9])


def encode_text(text):
    """Three tokens per timestamp, one per label or newline: the token counts of the examples."""
    return TIMESTAMP if text.endswith("seconds>") else np.array([6])


def layout(family="qwen2_5vl", insertion="interleaved", **kwargs):
    video = IMAGE if family == "internvl3" else VIDEO
    return TokenLayout(
        family=family,
        image_id=IMAGE,
        video_id=video,
        vision_start_id=START,
        vision_end_id=END,
        spatial_id=SPATIAL,
        insertion=insertion,
        **kwargs,
    )


def video(seconds=1.0, units=2, group=0):
    return MediaItem("video", (units, 4, 4), tuple(map(float, range(2 * units))), seconds, group)


def image(group=0):
    return MediaItem("image", (1, 4, 4), group=group)


def text(*ids):
    return np.array(ids)


def triples(lay, pieces):
    """(kind, unit, t, h, w) of every token; unit -1 for text."""
    expanded = lay.expand(pieces, encode_text)
    units = []
    for segment in lay.segments(pieces, encode_text):
        if isinstance(segment, int):
            units += [-1] * segment
        else:
            units += [block.unit for block in segment for _ in range(block.num_tokens)]
    assert expanded.position_ids[0].tolist() == list(range(len(units)))
    axes = expanded.position_ids[1:] if len(expanded.position_ids) == 4 else expanded.position_ids
    return list(zip(expanded.token_kind.tolist(), units, *axes.tolist(), strict=True))


def words(*positions):
    return [(KIND_TEXT, -1, p, p, p) for p in positions]


def grid(kind, unit, t, base):
    return [(kind, unit, t, base + r, base + c) for r in (0, 1) for c in (0, 1)]


def vis(unit, t, base=2, kind=KIND_VIDEO):
    return grid(kind, unit, t, base)


def spa(unit, t, base=2):
    return grid(KIND_SPATIAL, unit, t, base)


def camera(unit, *position):
    return [(KIND_CAMERA, unit, *position)]


Q25 = [text(1, START), video(), text(END, 2)]
Q3 = [text(1), video(), text(2)]
PAIR = [text(START), image(), text(END, START), image(), text(END, 2)]


def seconds(s):
    """The Qwen2.5 example with ``s`` positions per unit (2 positions per second)."""
    return [text(1, START), video(seconds=s / 2), text(END, 2)]


CASES = {
    "E1 qwen2.5 interleaved": (
        layout(),
        Q25,
        words(0, 1) + vis(0, 2) + spa(0, 3) + vis(1, 4) + spa(1, 5) + words(6, 7),
        -12,
    ),
    "E2 qwen2.5 sequential": (
        layout(insertion="sequential"),
        Q25,
        words(0, 1) + vis(0, 2) + vis(1, 3) + spa(0, 4) + spa(1, 5) + words(6, 7),
        -12,
    ),
    "E3 interleaved, 4 per unit": (
        layout(time="seconds"),
        seconds(4),
        words(0, 1) + vis(0, 2) + spa(0, 4) + vis(1, 6) + spa(1, 8) + words(9, 10),
        -9,
    ),
    "E4 sequential, 4 per unit": (
        layout(insertion="sequential", time="seconds"),
        seconds(4),
        words(0, 1) + vis(0, 2) + vis(1, 6) + spa(0, 10) + spa(1, 14) + words(15, 16),
        -3,
    ),
    "E5 interleaved, 1 per unit": (
        layout(time="seconds"),
        seconds(1),
        words(0, 1) + vis(0, 2) + spa(0, 2) + vis(1, 3) + spa(1, 3) + words(4, 5),
        -14,
    ),
    "E6 in place, stock time": (
        layout(insertion="in_place"),
        seconds(4),
        words(0, 1) + vis(0, 2) + vis(1, 6) + words(7, 8),
        -3,
    ),
    "E6 geometry off, stock time": (
        layout(),
        [text(1, START), video(seconds=2, group=-1), text(END, 2)],
        words(0, 1) + vis(0, 2) + vis(1, 6) + words(7, 8),
        -3,
    ),
    "E6 in place, index": (
        layout(insertion="in_place", time_2d="index"),
        seconds(4),
        words(0, 1) + vis(0, 2) + vis(1, 3) + words(4, 5),
        -6,
    ),
    "E7 camera token": (
        layout(camera_token=True),
        Q25,
        words(0, 1)
        + vis(0, 2)
        + spa(0, 3)
        + camera(0, 3, 3, 3)
        + vis(1, 4)
        + spa(1, 5)
        + camera(1, 5, 3, 3)
        + words(6, 7),
        -14,
    ),
    "E8 qwen3 interleaved": (
        layout("qwen3vl"),
        Q3,
        words(0, 1, 2, 3, 4)
        + vis(0, 5, 5)
        + spa(0, 6, 5)
        + words(7, 8, 9, 10, 11)
        + vis(1, 12, 12)
        + spa(1, 13, 12)
        + words(14, 15),
        -12,
    ),
    "E9 qwen3 sequential": (
        layout("qwen3vl", "sequential"),
        Q3,
        words(0, 1, 2, 3, 4)
        + vis(0, 5, 5)
        + words(7, 8, 9, 10, 11)
        + vis(1, 12, 12)
        + words(14, 15)
        + spa(0, 16, 16)
        + spa(1, 17, 16)
        + words(18, 19),
        -10,
    ),
    "E10 qwen3 in place": (
        layout("qwen3vl", "in_place"),
        Q3,
        words(0, 1, 2, 3, 4)
        + vis(0, 5, 5)
        + words(7, 8, 9, 10, 11)
        + vis(1, 12, 12)
        + words(14, 15),
        -4,
    ),
    "E11 two images interleaved": (
        layout(),
        PAIR,
        words(0)
        + vis(0, 1, 1, KIND_IMAGE)
        + spa(0, 2, 1)
        + words(3, 4)
        + vis(1, 5, 5, KIND_IMAGE)
        + spa(1, 6, 5)
        + words(7, 8),
        -12,
    ),
    "E12 two images sequential": (
        layout(insertion="sequential"),
        PAIR,
        words(0)
        + vis(0, 1, 1, KIND_IMAGE)
        + words(3, 4)
        + vis(1, 5, 5, KIND_IMAGE)
        + words(7, 8)
        + spa(0, 9, 9)
        + spa(1, 10, 9)
        + words(11, 12),
        -10,
    ),
}


@pytest.mark.filterwarnings("ignore:.*share a time")
@pytest.mark.parametrize("name", CASES)
def test_worked_example(name):
    lay, pieces, expected, delta = CASES[name]
    assert triples(lay, pieces) == expected
    assert position_delta(lay.expand(pieces, encode_text).position_ids[1:]) == delta


def test_fewer_than_two_positions_per_unit_warns():
    with pytest.warns(UserWarning, match="share a time"):
        unit_times(4, "interleaved", "seconds", 1.5)


INTERNVL = {
    # (expected kind and unit of every token) with one label token `p` per frame
    "interleaved": "p<vvvvssss>p<VVVVSSSS>",
    "sequential": "p<vvvv>p<VVVV>p<ssssSSSS>",
    "in_place": "p<vvvv>p<VVVV>",
}


@pytest.mark.parametrize("insertion", INTERNVL)
def test_internvl_examples_e13_e14_are_one_dimensional(insertion):
    lay = layout("internvl3", insertion)
    actual = triples(lay, [MediaItem("video", (2, 4, 4), group=0)])
    meaning = {
        "v": (KIND_VIDEO, 0),
        "V": (KIND_VIDEO, 1),
        "s": (KIND_SPATIAL, 0),
        "S": (KIND_SPATIAL, 1),
    }
    expected = [meaning.get(letter, (KIND_TEXT, -1)) for letter in INTERNVL[insertion]]
    assert [(kind, unit) for kind, unit, _ in actual] == expected
    assert [position for *_, position in actual] == list(range(len(expected)))


def test_e1_and_e8_in_full_on_all_axes():
    e1 = layout().expand(Q25, encode_text).position_ids
    assert e1[2].tolist() == [0, 1, *[2, 2, 3, 3] * 4, 6, 7]
    assert e1[3].tolist() == [0, 1, *[2, 3, 2, 3] * 4, 6, 7]
    e8 = layout("qwen3vl").expand(Q3, encode_text).position_ids
    assert e8[2].tolist() == [
        *range(5),
        *[5, 5, 6, 6] * 2,
        *range(7, 12),
        *[12, 12, 13, 13] * 2,
        14,
        15,
    ]


def test_spatial_time_alone_moves_next():
    run = (Block(KIND_VIDEO, 0, 0, 1, 1), Block(KIND_SPATIAL, 0, 1, 1, 1))
    assert mrope_positions([2, run, 1])[0].tolist() == [0, 1, 2, 3, 4]


def test_interleaved_and_sequential_share_the_array_but_not_the_blocks():
    one = triples(layout(), Q25)
    two = triples(layout(insertion="sequential"), Q25)
    assert [row[2:] for row in one] == [row[2:] for row in two]
    assert one != two


def test_unit_times_follow_float32_of_transformers():
    # 0.1 is not exact in float32: 2 * float32(1.7) * 5 = 17.000000 or 16.999999 decides the integer.
    visual, _ = unit_times(64, "none", "seconds", float(np.float32(2) * np.float32(1.7)))
    expected = (np.arange(64).astype(np.float32) * (np.float32(2) * np.float32(1.7))).astype(int)
    assert visual == expected.tolist()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.integers(0, 4) | st.lists(st.tuples(*[st.integers(1, 4)] * 3), min_size=1, max_size=3)
    )
)
def test_next_is_behind_everything_before(segments):
    segments = [
        s if isinstance(s, int) else tuple(Block(KIND_VIDEO, 0, t, h, w) for t, h, w in s)
        for s in segments
    ]
    positions = mrope_positions(segments)
    start = 0
    for segment in segments:
        before = positions[:, :start]
        expected = 0 if start == 0 else int(before.max()) + 1
        if isinstance(segment, int):
            stop = start + segment
            assert (positions[:, start:stop] == np.arange(expected, expected + segment)).all()
        else:
            stop = start + sum(block.num_tokens for block in segment)
            assert (positions[1:, start:stop].min(axis=1) == expected).all()
            assert (positions[0, start:stop].min()) == expected + min(b.t for b in segment)
        start = stop
    assert positions.shape == (3, start)


# --- equality with transformers ---------------------------------------------------------------


@pytest.fixture(scope="module")
def stock():
    """(family, pieces) -> positions of transformers' own ``get_rope_index``."""
    torch = pytest.importorskip("torch")
    import transformers
    from packaging.version import parse
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

    def call(family, pieces, per_second=2):
        items = [piece for piece in pieces if isinstance(piece, MediaItem)]
        seconds = [item.second_per_grid_t for item in items if item.kind == "video"]
        if parse(transformers.__version__) < parse("5.18") and any(s % 1 for s in seconds):
            pytest.skip("transformers before 5.18 rounds the seconds between frames down")
        cls = {"qwen2_5vl": Qwen2_5_VLModel, "qwen3vl": Qwen3VLModel}[family]
        model = cls.__new__(cls)
        torch.nn.Module.__init__(model)
        vision = type("Vision", (), {"spatial_merge_size": 2, "tokens_per_second": per_second})
        model.config = type("Config", (), {"vision_config": vision})
        lay = layout(family, "none")
        expanded = lay.expand(pieces, encode_text)
        grids = {}
        for kind in ("image", "video"):
            rows = [item.grid for item in items if item.kind == kind]
            grids[kind] = torch.tensor(rows) if rows else None
        positions, delta = model.get_rope_index(
            torch.from_numpy(expanded.input_ids)[None],
            torch.from_numpy(expanded.token_kind.astype(np.int64))[None],
            image_grid_thw=grids["image"],
            video_grid_thw=grids["video"],
            second_per_grid_ts=torch.tensor(seconds),
        )
        return positions[:, 0].numpy(), int(delta)

    return call


def mixed(family, units, seconds):
    clip = MediaItem("video", (units, 4, 8), tuple(map(float, range(2 * units))), seconds)
    tall = MediaItem("image", (1, 12, 4))
    around = (text(5, START), text(END, 6, 7)) if family == "qwen2_5vl" else (text(5), text(6, 7))
    return [
        text(1, START),
        tall,
        text(END, 2, START),
        image(-1),
        text(END),
        around[0],
        clip,
        around[1],
    ]


@pytest.mark.parametrize(
    ("family", "units", "seconds"),
    [("qwen2_5vl", 2, 1.0), ("qwen2_5vl", 3, 0.7), ("qwen3vl", 5, 1)],
)
def test_equal_to_transformers_while_time_stays_inside_the_grid(stock, family, units, seconds):
    pieces = mixed(family, units, seconds)
    expected, delta = stock(family, pieces)
    actual = layout(family, "none").expand(pieces, encode_text).position_ids[1:]
    assert np.array_equal(actual, expected)
    assert position_delta(actual) == delta


@pytest.mark.parametrize("family", ["qwen2_5vl", "qwen3vl"])
@pytest.mark.parametrize(("units", "seconds"), [(4, 1.0), (9, 2.3)])
def test_stock_knob_reproduces_transformers_always(stock, family, units, seconds):
    pieces = mixed(family, units, seconds)
    lay = layout(family, "none", text_after_vision="stock")
    assert np.array_equal(
        lay.expand(pieces, encode_text).position_ids[1:], stock(family, pieces)[0]
    )


def test_text_behind_a_long_video_differs_from_transformers_by_design(stock):
    """Fails when transformers changes its rule; then the knob and its documentation can go."""
    pieces = [text(1, START), MediaItem("video", (4, 4, 4), second_per_grid_t=1.0), text(END, 2, 3)]
    expected, delta = stock("qwen2_5vl", pieces)
    ours = layout(insertion="none").expand(pieces, encode_text).position_ids[1:]
    assert (
        sorted({*ours[0, 2:18].tolist()}) == sorted({*expected[0, 2:18].tolist()}) == [2, 4, 6, 8]
    )
    assert expected[0, -3:].tolist() == [4, 5, 6]
    assert delta == -12
    assert ours[0, -3:].tolist() == [9, 10, 11]
    assert position_delta(ours) == -9
