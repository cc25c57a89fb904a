"""The hand room: its file equals its generator, and its numbers are the hand-computed ones."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest

from spatialvlm.scenes.io import load_scene

HERE = Path(__file__).parent

# vis_frac in F0, F1, F2
EXPECTED = {
    "sofa": (0.55, 0.87, 0.0),
    "table": (0.90, 0.93, 0.26),
    "chair1": (1.00, 0.77, 0.54),
    "chair2": (0.25, 1.00, 1.00),
    "bookshelf": (0.86, 0.90, 0.0),
    "lamp": (0.81, 0.76, 0.0),
    "plant": (0.0, 0.0, 0.94),
    "toy_box": (0.99, 0.99, 1.00),
    "bin": (0.0, 0.0, 0.0),
}


@pytest.fixture(scope="module")
def room(data_dir):
    return load_scene(data_dir / "scenes" / "hand_room.json")


def test_file_equals_generator(room):
    made = runpy.run_path(str(HERE / "hand_room.py"))["make_hand_room"]()
    assert json.loads(json.dumps(made.to_dict())) == room.to_dict()


@pytest.mark.parametrize("name", EXPECTED)
def test_visibility_is_the_hand_computed_one(room, name):
    item = next(o for o in room.objects if o.id == name)
    measured = [frame.vis(item.index).vis_frac for frame in room.frames]
    np.testing.assert_allclose(measured, EXPECTED[name], atol=0.03)


def test_chair2_is_ambiguous_in_the_first_frame(room):
    states = [frame.vis(3).state for frame in room.frames]
    assert states == ["ambiguous", "visible", "visible"]


def test_clean_objects_shared_by_first_and_last_frame(room):
    shared = [o.id for o in room.objects if all(room.frames[i].vis(o.index).clean for i in (0, 2))]
    assert shared == ["chair1", "toy_box"]


def test_camera_ranges(room):
    def ranges(frame, name):
        item = next(o for o in room.objects if o.id == name)
        points = room.frames[frame].camera.to_cam(item.box.corners)
        return [*points[:, 0].round(2)[[0]], *np.round([points[:, 2].min(), points[:, 2].max()], 2)]

    assert ranges(0, "table")[1:] == [1.9, 3.1]
    assert ranges(0, "chair1")[1:] == [2.25, 2.75]
    assert ranges(1, "sofa")[1:] == [2.36, 4.44]
    assert ranges(1, "chair1")[1:] == [1.55, 2.25]


def test_distance_from_the_camera_centre(room):
    """The camera centre is the translation of world_from_cam, not -R^T t of it."""
    chair1 = room.objects[2].box
    assert round(chair1.distance_to_point(room.frames[0].camera.centre), 3) == 2.446
    assert round(chair1.distance_to_point(room.frames[2].camera.centre), 3) == 2.446
