"""Which size the geometry encoder sees."""

import pytest

from spatialvlm.errors import ConfigError
from spatialvlm.sequence.sizes import SizePolicy

AUTO = SizePolicy()


@pytest.mark.parametrize(
    ("src_hw", "grid_hw", "expected"),
    [
        # Qwen2.5-VL at 364 x 504 (28 px per token) and Qwen3-VL at 416 x 576 (32 px): same grid.
        ((480, 640), (26, 36), (364, 504)),
        # InternVL squeezes 4:3 into 32 x 32: aspect distortion 1.33, so the native size.
        ((480, 640), (32, 32), (392, 518)),
        ((640, 480), (32, 32), (518, 392)),
        # A square image fits the square grid.
        ((500, 500), (32, 32), (448, 448)),
        # 16:9 at 256 tokens per unit.
        ((720, 1280), (24, 42), (336, 588)),
        # Too small or too large a grid, although the aspect is right.
        ((480, 640), (18, 24), (252, 336)),
        ((480, 640), (12, 16), (392, 518)),
        ((480, 640), (36, 48), (392, 518)),
    ],
)
def test_auto(src_hw, grid_hw, expected):
    assert AUTO.target(src_hw, grid_hw) == expected


def test_forced_policies():
    match = SizePolicy(policy="match_grid")
    assert match.target((480, 640), (4, 4)) == (56, 56)
    assert SizePolicy(policy="match_grid", patch_size=16).target((480, 640), (4, 6)) == (64, 96)
    native = SizePolicy(policy="native")
    assert native.target((1080, 1920), (26, 36)) == (294, 518)
    assert native.target((100, 4000), (2, 80)) == (14, 518)
    assert SizePolicy(policy="native", native_long=112).target((90, 120), (8, 8)) == (84, 112)


def test_the_border_of_the_distortion_belongs_to_match_grid():
    assert AUTO.target((300, 330), (30, 30)) == (420, 420)  # exactly 1.10
    assert AUTO.target((300, 331), (30, 30)) == (476, 518)


def test_groups_share_a_size_or_a_canvas():
    near = AUTO.group([(392, 518), (378, 518)])
    assert near.canvas == (392, 518)
    assert near.content == ((392, 518), (392, 518))
    far = AUTO.group([(392, 518), (518, 392), (392, 518)])
    assert far.canvas == (518, 518)
    assert far.content == ((392, 518), (518, 392), (392, 518))


def test_unknown_policy():
    with pytest.raises(ConfigError, match="auto, match_grid, native"):
        SizePolicy(policy="crop")
