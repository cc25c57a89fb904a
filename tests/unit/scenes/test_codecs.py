"""Box codecs: conventions by hand-computed numbers, round trips, gimbal lock, errors."""

import re

import numpy as np
import pytest

from spatialvlm.errors import BoxError
from spatialvlm.scenes.boxes import Box
from spatialvlm.scenes.codecs import box_codec, nearest_axes
from spatialvlm.scenes.io import load_scene
from spatialvlm.scenes.transforms import geodesic_deg, rx, ry, rz

NINE = ("embodiedscan_zxy", "openspatial", "qwen3vl")


def random_rotation(rng):
    q = rng.normal(size=4)
    w, x, y, z = q / np.linalg.norm(q)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def same_solid(a: Box, b: Box, tolerance: float) -> bool:
    order_a, order_b = (
        corners[np.lexsort(corners.round(3).T)] for corners in (a.corners, b.corners)
    )
    return np.abs(order_a - order_b).max() < tolerance


def test_zxy_case():
    """Intrinsic and extrinsic readings of the same three angles differ by 11.97 degrees."""
    angles = np.radians([30.0, 10.0, 20.0])
    intrinsic = box_codec("embodiedscan_zxy").decode([0, 0, 0, 1, 1, 1, *angles]).rotation
    extrinsic = ry(angles[2]) @ rx(angles[1]) @ rz(angles[0])
    assert round(intrinsic[2, 1], 4) == 0.1736
    assert round(extrinsic[2, 1], 4) == 0.3123
    assert round(geodesic_deg(intrinsic, extrinsic), 2) == 11.97
    openspatial = box_codec("openspatial").decode([0, 0, 0, 1, 1, 1, *angles]).rotation
    np.testing.assert_allclose(openspatial, extrinsic)


@pytest.mark.parametrize(("angles", "difference"), [((90, 10, 0), 14.13), ((40, 0, 0), 0.0)])
def test_readings_agree_only_for_pure_yaw(angles, difference):
    values = [0, 0, 0, 1, 1, 1, *np.radians(angles)]
    a, b = (box_codec(name).decode(values).rotation for name in ("embodiedscan_zxy", "openspatial"))
    assert round(geodesic_deg(a, b), 2) == difference


def test_hand_room_table_in_the_first_frame(data_dir):
    room = load_scene(data_dir / "scenes" / "hand_room.json")
    table = room.objects[1].box.transformed(room.frames[0].camera.cam_from_world)
    np.testing.assert_allclose(table.rotation, [[0, -1, 0], [0, 0, -1], [1, 0, 0]], atol=1e-9)
    qwen = box_codec("qwen3vl").encode(table, decimals=2)
    assert qwen == [0.0, 1.14, 2.5, 0.8, 0.72, 1.2, 0.0, 0.0, 0.0]
    zxy = box_codec("embodiedscan_zxy").encode(table, decimals=2)
    assert zxy == [0.0, 1.14, 2.5, 1.2, 0.8, 0.72, 1.57, 0.0, -1.57]


@pytest.mark.parametrize("name", NINE)
def test_round_trip_of_random_rotations(name):
    rng = np.random.default_rng(0)
    codec = box_codec(name)
    rounding_deg = 3.2 if name == "qwen3vl" else 1.6
    for _ in range(1000):
        box = Box(rng.uniform(-3, 3, 3), rng.uniform(0.1, 2, 3), random_rotation(rng))
        assert same_solid(codec.decode(codec.encode(box)), box, 1e-6)
        target = nearest_axes(box) if codec.nearest_axes else box
        rounded = codec.decode(codec.encode(box, decimals=2))
        assert geodesic_deg(rounded.rotation, target.rotation) <= rounding_deg


@pytest.mark.parametrize("name", NINE)
@pytest.mark.parametrize("lock", [np.pi / 2, -np.pi / 2])
def test_gimbal_lock(name, lock):
    codec = box_codec(name, source_axes=True)
    locked = {"zxy": rx, "yxz": rx, "zyx": ry}[codec.euler](lock)
    for before in (0.0, 0.7, -2.0):
        for after in (0.0, 1.1):
            outer, inner = {"zxy": (rz, ry), "yxz": (ry, rz), "zyx": (rz, rx)}[codec.euler]
            box = Box((0, 0, 0), (1, 2, 3), outer(before) @ locked @ inner(after))
            values = codec.encode(box)
            assert geodesic_deg(codec.decode(values).rotation, box.rotation) < 1e-4
            assert values[8 if codec.euler != "yxz" else 6] == 0.0


def test_angle_order_prompt():
    """The sentence names every slot in the order of the numbers and of the rotation factors."""
    for name in (*NINE, "ssr_7dof"):
        codec = box_codec(name)
        sentence = codec.prompt_convention()
        listed = re.search(r"\[(.*?)\]", sentence).group(1).split(", ")
        assert tuple(listed) == codec.slots
        factors = re.findall(r"R([xyz])\((\w+)\)", sentence)
        # Rebuild the rotation from the sentence alone.
        angles = dict(zip(codec.slots[6:], (0.3, -0.2, 0.5), strict=False))
        unit = np.pi if "multiples of pi" in sentence else 1.0
        rotation = np.eye(3)
        for axis, slot in factors:
            rotation = rotation @ {"x": rx, "y": ry, "z": rz}[axis](angles[slot] * unit)
        decoded = codec.decode([0, 0, 0, 1, 1, 1, *angles.values()])
        np.testing.assert_allclose(decoded.rotation, rotation, atol=1e-12)


def test_ssr_7dof_refuses_tilted_boxes():
    codec = box_codec("ssr_7dof")
    box = Box.upright((1, 2, 3), (1, 2, 3), 0.4)
    assert codec.encode(box, decimals=2) == [1, 2, 3, 1, 2, 3, 0.4]
    with pytest.raises(BoxError, match="only a yaw"):
        codec.encode(Box((0, 0, 0), (1, 1, 1), rx(0.3)))


def test_errors():
    with pytest.raises(BoxError, match="expected 9 values"):
        box_codec("qwen3vl").decode([0] * 7)
    with pytest.raises(BoxError, match="embodiedscan_zxy, openspatial, qwen3vl, ssr_7dof"):
        box_codec("xyz")
    assert not box_codec("embodiedscan_zxy").angles_in_range([0, 0, 0, 1, 1, 1, 90, 0, 0])
    assert box_codec("qwen3vl").angles_in_range([0, 0, 0, 1, 1, 1, 1.0, -0.5, 0])
