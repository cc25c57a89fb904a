"""Token order of every insertion mode, and the stock layout when the branch is off."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spatialvlm.errors import AlignmentError, ConfigError
from spatialvlm.sequence.layout import MediaItem, TokenLayout
from spatialvlm.sequence.sizes import SizePolicy
from spatialvlm.typing import KIND_CAMERA, KIND_IMAGE, KIND_SPATIAL, KIND_TEXT, KIND_VIDEO

IMAGE, VIDEO, START, END, SPATIAL = 101, 102, 103, 104, 105
LETTER = {IMAGE: "i", VIDEO: "v", START: "<", END: ">", SPATIAL: "s"}
VOCABULARY = {}


def encode_text(text):
    """One token per label; ids from 1000 so that :func:`show` can print them."""
    number = VOCABULARY.setdefault(text, 1000 + len(VOCABULARY))
    LETTER[number] = f"[{text}]"
    return np.array([number])


def layout(family="qwen2_5vl", insertion="interleaved", **kwargs):
    return TokenLayout(
        family=family,
        image_id=IMAGE,
        video_id=IMAGE if family == "internvl3" else VIDEO,
        vision_start_id=START,
        vision_end_id=END,
        spatial_id=SPATIAL,
        insertion=insertion,
        **kwargs,
    )


def ids(*values):
    return np.array(values, dtype=np.int64)


def show(lay, pieces):
    """Sequence as text; runs of equal visual tokens as letter and count, camera tokens as ``c``."""
    expanded = lay.expand(pieces, encode_text)
    assert len(expanded.input_ids) == len(expanded.token_kind) == expanded.position_ids.shape[1]
    assert expanded.position_ids.shape[0] == lay.num_position_rows
    out, last, run = "", None, 0
    for token, kind in [*zip(expanded.input_ids, expanded.token_kind, strict=True), (None, None)]:
        if (token, kind) == last:
            run += 1
            continue
        if last is not None:
            name = "c" if last[1] == KIND_CAMERA else LETTER.get(int(last[0]), ".")
            out += name * run if last[1] == KIND_TEXT else f"{name}{run}"
        last, run = (token, kind), 1
    return out


def clip(units=2, group=0, frames=None, tau=2):
    times = tuple(0.5 * i for i in range(frames or units * tau))
    return MediaItem("video", (units, 2, 4), times, 1.0, group)


def photo(group=0, rows=2, cols=4):
    return MediaItem("image", (1, rows, cols), group=group)


def qwen(*media):
    """Media as the Qwen chat templates write them, with text around."""
    pieces = [ids(1)]
    for medium in media:
        pieces += [ids(START), medium, ids(END)]
    return [*pieces, ids(2)]


EXPECTED = {
    ("qwen2_5vl", "none"): (qwen(clip(), photo()), ".<v4><i2>."),
    ("qwen2_5vl", "interleaved"): (qwen(clip(), photo(1)), ".<v2s2v2s2><i2s2>."),
    ("qwen2_5vl", "sequential"): (qwen(clip(), photo(1)), ".<v4s4><i2><s2>."),
    ("qwen2_5vl", "in_place"): (qwen(clip(), photo(1)), ".<v4><i2>."),
    ("qwen3vl", "none"): (
        qwen(clip(), photo()),
        ".<[<0.2 seconds>]<v2>[<1.2 seconds>]<v2>><i2>.",
    ),
    ("qwen3vl", "interleaved"): (
        qwen(clip()),
        ".<[<0.2 seconds>]<v2s2>[<1.2 seconds>]<v2s2>>.",
    ),
    ("qwen3vl", "sequential"): (
        qwen(clip(), photo(1)),
        ".<[<0.2 seconds>]<v2>[<1.2 seconds>]<v2><s4>><i2><s2>.",
    ),
    ("internvl3", "none"): (
        [ids(1), clip(tau=1), ids(2)],
        ".[Frame1: ]<i2>[\nFrame2: ]<i2>.",
    ),
    ("internvl3", "interleaved"): (
        [ids(1), clip(tau=1), ids(2)],
        ".[Frame1: ]<i2s2>[\nFrame2: ]<i2s2>.",
    ),
    ("internvl3", "sequential"): (
        [ids(1), clip(tau=1), ids(2), photo(1), ids(3)],
        ".[Frame1: ]<i2>[\nFrame2: ]<i2>[\n]<s4>.<i2>[\n]<s2>.",
    ),
}


@pytest.mark.parametrize("case", EXPECTED, ids="-".join)
def test_order(case):
    pieces, expected = EXPECTED[case]
    assert show(layout(*case), pieces) == expected


def test_sequential_waits_for_the_last_image_of_the_group():
    pieces = qwen(photo(0), photo(1), photo(0), photo(-1))
    assert show(layout(insertion="sequential"), pieces) == ".<i2><i2><s2><i2><s4><i2>."


def test_geometry_off_is_the_stock_layout():
    on, off = layout(), layout(insertion="none")
    for pieces in (qwen(clip(group=-1), photo(-1)), [ids(1, 2)]):
        for ours, stock in zip(
            on.expand(pieces, encode_text), off.expand(pieces, encode_text), strict=True
        ):
            assert np.array_equal(ours, stock)


def test_camera_token_ends_its_unit():
    assert show(layout(camera_token=True), qwen(clip())) == ".<v2s2c1v2s2c1>."
    lay = layout(insertion="sequential", camera_token=True)
    assert show(lay, qwen(clip(), photo(1))) == ".<v4s2c1s2c1><i2><s2c1>."
    kinds = lay.expand(qwen(clip()), encode_text)
    assert (kinds.input_ids[kinds.token_kind == KIND_CAMERA] == SPATIAL).all()


@pytest.mark.parametrize("family", ["qwen2_5vl", "qwen3vl"])
def test_frames_as_images(family):
    video = clip(units=3)
    assert show(layout(family, frames_as_images=True), qwen(video)) == ".<i2s2><i2s2><i2s2>."
    lay = layout(family, "sequential", frames_as_images=True)
    assert show(lay, qwen(video)) == ".<i2><i2><i2><s6>."
    assert lay.tau == 1
    kinds = lay.expand(qwen(video), encode_text).token_kind
    assert set(kinds) == {KIND_TEXT, KIND_IMAGE, KIND_SPATIAL}


def test_internvl_tiles_are_one_run():
    tiles = MediaItem("image", (3, 2, 4))
    assert show(layout("internvl3"), [ids(1), tiles, ids(2)]) == ".<i6>."


def test_kinds():
    kinds = layout().expand(qwen(clip(1), photo(-1)), encode_text).token_kind
    t, v, i, s = KIND_TEXT, KIND_VIDEO, KIND_IMAGE, KIND_SPATIAL
    assert kinds.tolist() == [t, t, v, v, s, s, t, t, i, i, t, t]


@pytest.mark.parametrize("family", ["qwen2_5vl", "qwen3vl", "internvl3"])
@pytest.mark.parametrize("insertion", ["none", "interleaved", "sequential", "in_place"])
@pytest.mark.parametrize("camera", [False, True])
def test_count_is_what_expand_writes(family, insertion, camera):
    if camera and insertion in ("none", "in_place"):
        return
    lay = layout(family, insertion, camera_token=camera)
    for medium in (clip(tau=lay.tau), photo(), clip(group=-1, tau=lay.tau), photo(0, 6, 2)):
        kinds = lay.expand(qwen(medium), encode_text).token_kind
        visual = int(((kinds == KIND_IMAGE) | (kinds == KIND_VIDEO)).sum())
        spatial = int(((kinds == KIND_SPATIAL) | (kinds == KIND_CAMERA)).sum())
        assert lay.count(medium) == (visual, spatial)


def test_odd_frame_counts_repeat_the_last_time():
    expected = ".<[<0.2 seconds>]<v2>[<1.0 seconds>]<v2>>."
    assert show(layout("qwen3vl", "none"), qwen(clip(frames=3))) == expected
    single = MediaItem("video", (1, 2, 4), (0.0,))
    assert show(layout("qwen3vl", "none"), qwen(single)) == ".<[<0.0 seconds>]<v2>>."


def test_a_layout_can_be_sent_to_a_worker():
    lay = layout(size=SizePolicy(policy="native"))
    again = pickle.loads(pickle.dumps(lay))
    assert again == lay
    assert show(again, qwen(clip())) == show(lay, qwen(clip()))


def test_geometry_size_follows_the_policy():
    assert layout().geometry_size((480, 640), (26, 36)) is None
    assert layout(size=SizePolicy()).geometry_size((480, 640), (26, 36)) == (364, 504)


@st.composite
def conversations(draw):
    """A family and random media of several groups, as its template writes them."""
    family = draw(st.sampled_from(["qwen2_5vl", "qwen3vl", "internvl3"]))
    tau = 1 if family == "internvl3" else 2
    pieces, groups = [ids(1)], 0
    scene = -1
    for _ in range(draw(st.integers(1, 4))):
        rows, cols = draw(st.sampled_from([(2, 2), (2, 4), (4, 2)]))
        if draw(st.booleans()):
            units, group = draw(st.integers(1, 3)), draw(st.sampled_from([-1, groups]))
            medium = MediaItem("video", (units, rows, cols), (0.0,) * units * tau, 1.0, group)
            groups += group >= 0
        else:
            if draw(st.booleans()) and scene < 0:
                scene, groups = groups, groups + 1
            medium = MediaItem("image", (1, rows, cols), group=draw(st.sampled_from([-1, scene])))
        pieces += [medium] if family == "internvl3" else [ids(START), medium, ids(END)]
        pieces.append(ids(*draw(st.lists(st.integers(1, 9), max_size=3))))
    return family, pieces


@settings(max_examples=80, deadline=None)
@given(conversations(), st.sampled_from(["interleaved", "sequential", "in_place"]), st.booleans())
def test_any_conversation(conversation, insertion, camera):
    family, pieces = conversation
    lay = layout(family, insertion, camera_token=camera and insertion != "in_place")
    ours = lay.expand(pieces, encode_text)
    stock = layout(family, "none").expand(pieces, encode_text)
    spatial = ours.token_kind >= KIND_SPATIAL
    # Counts are those announced before decoding.
    media = [piece for piece in pieces if isinstance(piece, MediaItem)]
    assert spatial.sum() == sum(lay.count(item)[1] for item in media)
    # Without spatial tokens (and the markers of sequential runs) the stock sequence remains.
    if insertion == "sequential":
        assert np.array_equal(
            ours.input_ids[np.isin(ours.token_kind, (KIND_IMAGE, KIND_VIDEO))],
            stock.input_ids[np.isin(stock.token_kind, (KIND_IMAGE, KIND_VIDEO))],
        )
    else:
        assert np.array_equal(ours.input_ids[~spatial], stock.input_ids)
        assert np.array_equal(ours.token_kind[~spatial], stock.token_kind)
    # Units of a group appear in order, each behind its visual tokens.
    runs = [s for s in lay.segments(pieces, encode_text) if isinstance(s, tuple)]
    blocks = [block for run in runs for block in run]
    assert sum(block.num_tokens for block in blocks) == (ours.token_kind > 0).sum()
    seen = 0
    for block in blocks:
        seen += 1 if block.kind in (KIND_IMAGE, KIND_VIDEO) else 0
        seen -= 1 if block.kind == KIND_SPATIAL else 0
        assert seen >= 0
    # Positions never run backwards from one run or text to the next.
    if lay.num_position_rows == 4:
        text = ours.position_ids[1, ours.token_kind == KIND_TEXT]
        assert (np.diff(text) > 0).all()


# --- bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("medium", "message"),
    [
        (photo(rows=3), r"patch grid of \(1, 3, 4\).*multiples of the merge size 2"),
        (photo(cols=0), "multiples of"),
        (MediaItem("image", (2, 2, 4)), "an image of qwen2_5vl has one unit"),
    ],
)
def test_grids_that_cannot_be_merged(medium, message):
    with pytest.raises(AlignmentError, match=message):
        layout().count(medium)
    with pytest.raises(AlignmentError, match=message):
        layout().expand(qwen(medium), encode_text)


def test_internvl_geometry_takes_one_tile():
    tiles = MediaItem("image", (3, 2, 4), group=0)
    with pytest.raises(AlignmentError, match=r"3 tiles, expected 1.*max_tiles"):
        layout("internvl3").count(tiles)
    assert layout("internvl3", "none").count(tiles) == (6, 0)


def test_wrong_number_of_frame_times():
    with pytest.raises(AlignmentError, match=r"times of 4 frames \(or one less\), got 2"):
        layout("qwen3vl").expand(qwen(clip(frames=2)), encode_text)


@pytest.mark.parametrize("after", [[ids(7)], [ids()], [], [photo(1)]])
def test_sequential_images_need_the_end_marker_of_the_template(after):
    with pytest.raises(AlignmentError, match="vision end token"):
        layout(insertion="sequential").expand([ids(START), photo(), *after], encode_text)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"family": "llava"}, "qwen2_5vl, qwen3vl, internvl3"),
        ({"insertion": "before"}, "none, interleaved, sequential, in_place"),
        ({"time": "frames"}, "index, seconds"),
        ({"time_2d": "seconds"}, "stock, index"),
        ({"text_after_vision": "new"}, "original, stock"),
        ({"insertion": "in_place", "camera_token": True}, "camera_token=true has no place"),
    ],
)
def test_settings_without_meaning(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        layout(**{"family": "qwen2_5vl", "insertion": "interleaved", **kwargs})


def test_spatial_tokens_need_an_id():
    with pytest.raises(ConfigError, match="needs the id of the spatial placeholder"):
        TokenLayout(
            family="qwen3vl",
            image_id=1,
            video_id=2,
            vision_start_id=3,
            vision_end_id=4,
            insertion="interleaved",
        )
