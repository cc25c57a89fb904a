"""Worked examples, computed by hand, on the hand room H or on a few points."""

import math
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from spatialvlm.scenes.boxes import Box
from spatialvlm.scenes.cameras import Camera
from spatialvlm.scenes.schema import Object
from spatialvlm.scenes.transforms import rz
from spatialvlm.synthesis.context import SceneContext
from spatialvlm.synthesis.grounding import labelled, ssr_box, ssr_frame
from spatialvlm.synthesis.referral import appearance_rank, by_proximity, require_direction
from spatialvlm.synthesis.routes import simulate, turn_word
from spatialvlm.synthesis.rows import Reason, Reject
from spatialvlm.synthesis.tasks import TASKS
from spatialvlm.synthesis.tasks.camera import ring_order
from spatialvlm.synthesis.tasks.correspondence import see_point
from spatialvlm.synthesis.tasks.multiview import bearing_around, direction_at, largest, nearest
from spatialvlm.synthesis.tasks.reasoning import surely_not
from spatialvlm.synthesis.tasks.vsi import direction_word, relative_direction

ALL = ("F0", "F1", "F2")
SOFA, TABLE, CHAIR1, CHAIR2, BOOKSHELF, LAMP, PLANT, TOY, BIN = range(9)


def room_depth(room, frame):
    """Exact depth of the boxes and of the room's six walls."""
    from spatialvlm.scenes.render.raycast import cast_boxes

    camera = frame.camera
    depth, _ = cast_boxes([o.box for o in room.objects], camera)
    v, u = np.mgrid[0 : camera.height, 0 : camera.width] + 0.5
    rays = camera.rays(np.stack([u.ravel(), v.ravel()], 1)) @ camera.rotation.T
    low, high = np.array([0, 0, 0]), np.array([6, 4, 2.6])
    with np.errstate(divide="ignore"):
        walls = np.maximum((low - camera.centre) / rays, (high - camera.centre) / rays).min(axis=1)
    walls = walls.reshape(depth.shape)
    return np.where((depth > 0) & (depth < walls), depth, walls)


@pytest.fixture(scope="module")
def deep_room(hand_room, tmp_path_factory):
    """H with depth maps."""
    folder = tmp_path_factory.mktemp("hand")
    frames = []
    for frame in hand_room.frames:
        depth = room_depth(hand_room, frame)
        Image.fromarray((depth * 5000).round().astype(np.uint16)).save(
            folder / f"{frame.frame_id}.png"
        )
        frames.append(replace(frame, depth=f"{frame.frame_id}.png", depth_scale=5000.0))
    return SceneContext(replace(hand_room, frames=frames, root=folder))


def reason_of(function, *args, **kwargs):
    with pytest.raises(Reject) as reject:
        function(*args, **kwargs)
    return reject.value.reason


# Measurement -----------------------------------------------------------------------------------------
def test_sizes(ask):
    assert ask("size_abs", "longest", ["sofa"], ["F1"]) == pytest.approx(2.0)
    assert ask("size_abs", "height", ["sofa"], ["F1"]) == pytest.approx(0.8)
    assert ask("size_abs", "longest", ["sofa"], ["F0"]) == Reason.NOT_CLEAN  # truncated in F0


def test_size_comparison(ask, room):
    assert room.volume[SOFA] == pytest.approx(1.28)
    assert ask("size_rel", "bigger", ["sofa", "table"], ["F1"], named=True) == "sofa"
    assert ask("size_rel", "bigger", ["sofa", "bookshelf"], ["F1"]) == Reason.EXTENT_TIE
    assert ask("is_size", "taller", ["bookshelf", "table"], named=True) == "bookshelf"
    assert ask("is_size", "taller", ["chair1", "table"], named=True) == "chair1"
    assert ask("is_size", "taller", ["chair1", "sofa"], ["F1"]) == Reason.MARGIN


def test_distances(ask):
    assert ask("dist_abs", "closest", ["sofa", "chair1"], ["F1"]) == pytest.approx(1.85, abs=1e-6)
    centers = ask("dist_abs", "centers", ["sofa", "chair1"], ["F1"])
    assert centers == pytest.approx(math.hypot(2.5, 0.05))
    assert ask("dist_abs", "closest", ["table", "toy box"]) == Reason.OUT_OF_RANGE


def test_boxes_in_the_camera_frame(ask):
    one = ask("grounding_cam9", "qwen3vl", labels=["table"])
    assert one == [{"label": "table", "bbox_3d": [0, 1.14, 2.5, 0.8, 0.72, 1.2, 0, 0, 0]}]
    two = ask("grounding_cam9", "embodiedscan_zxy", labels=["table"])
    assert two[0]["bbox_3d"] == [0, 1.14, 2.5, 1.2, 0.8, 0.72, 1.57, 0, -1.57]
    assert ask("grounding_cam9", "qwen3vl", labels=["chair"]) == Reason.AMBIGUOUS


# Depth and camera ------------------------------------------------------------------------------------
def test_depth_choice_and_order(ask):
    three = ["table", "chair1", "lamp"]
    assert ask("depth_choice", "closest", three, rank=0) == 0
    assert ask("depth_choice", "rank", three, rank=1) == 1
    assert ask("depth_choice", "farthest", [*three, "bookshelf"], rank=3) == Reason.MARGIN
    assert ask("depth_order", "", ["lamp", "chair1", "table"], named=True) == [
        "table",
        "chair1",
        "lamp",
    ]


def test_view_pair(deep_room):
    pair = deep_room.pair(0, 2)
    assert pair.yaw_deg == pytest.approx(106.26, abs=0.01)
    assert pair.rotation_deg == pytest.approx(106.26, abs=0.01)
    assert pair.baseline_m == pytest.approx(4.272, abs=1e-3)
    assert pair.iou == pytest.approx(0.28, abs=0.04)
    assert pair.shared == [CHAIR1, TOY]
    assert deep_room.is_usable(0, 2)


def test_camera_to_object_distance(ask, room, deep_room):
    assert room.view(0).distance[CHAIR1] == pytest.approx(2.446, abs=1e-3)
    pair = ["F0", "F2"]
    assert ask("dist_obj_cam", "", ["chair1"], pair, ctx=deep_room) == "equal"
    assert ask("dist_obj_cam", "", ["toy box"], pair, ctx=deep_room) == "view 2"
    # 2.054 against 1.944: neither equal nor clearly different (the pair F0, F1 is judged alone).
    assert room.view(0).distance[TABLE] - room.view(1).distance[TABLE] == pytest.approx(
        0.11, abs=2e-3
    )


def test_camera_motion(ask, deep_room):
    pair = ["F0", "F2"]
    assert ask("cam_motion", "rotation", (), pair, ctx=deep_room) == "left"
    assert ask("cam_motion", "translation", (), pair, ctx=deep_room) == "forward"
    assert ask("cam_motion", "distance", (), pair, ctx=deep_room) == pytest.approx(4.272, abs=1e-3)
    assert ask("cam_motion", "yaw", (), pair, ctx=deep_room) == pytest.approx(106.26, abs=0.01)


def test_swapping_views_swaps_the_answer(ask, deep_room):
    back = ["F2", "F0"]
    assert ask("cam_motion", "rotation", (), back, ctx=deep_room) == "right"
    assert ask("dist_obj_cam", "", ["toy box"], back, ctx=deep_room) == "view 1"


def test_cameras_around_a_centre():
    centre = np.zeros(2)
    cameras = [np.array(p, dtype=float) for p in ((2, 0), (0, -2), (-2, 0), (0, 2))]
    order, margin = ring_order(centre, cameras, [-c / 2 for c in cameras])
    assert [i + 1 for i in order] == [1, 4, 3, 2]
    assert margin.value == pytest.approx(90)
    outwards = [-cameras[0] / 2, *(c / 2 for c in cameras[1:])]
    assert reason_of(ring_order, centre, cameras, outwards) == Reason.SECTOR


def test_roll_of_the_camera_does_not_leak_into_the_turn(hand_room, deep_room):
    frames = list(deep_room.scene.frames)
    roll = np.eye(4)
    roll[:3, :3] = rz(math.radians(10))
    frames[2] = replace(frames[2], world_from_cam=frames[2].world_from_cam @ roll)
    rolled = SceneContext(replace(deep_room.scene, frames=frames))
    assert rolled.pair(0, 2).yaw_deg == pytest.approx(106.26, abs=0.01)
    assert rolled.pair(0, 2).pitch_deg == pytest.approx(0, abs=1e-6)


# Several views ---------------------------------------------------------------------------------------
def test_objects_of_different_views(ask, deep_room):
    pair = ["F0", "F2"]
    assert ask("mv_dist_abs", "closest", ["lamp", "plant"], pair, ctx=deep_room) == pytest.approx(
        5.54, abs=0.01
    )
    assert ask(
        "mv_dist_abs", "closest", ["bookshelf", "plant"], pair, ctx=deep_room
    ) == pytest.approx(5.06, abs=0.01)
    assert (
        ask("mv_dist_abs", "closest", ["chair1", "plant"], pair, ctx=deep_room) == Reason.AMBIGUOUS
    )


def test_closest_and_farthest_to_a_reference(room):
    values = {TABLE: 0.70, LAMP: 1.35, CHAIR2: 2.38}
    assert nearest(values, "closest", 0.15).answer == TABLE
    assert nearest(values, "closest", 0.15).margin.value == pytest.approx(0.65)
    assert nearest(values, "farthest", 0.15).answer == CHAIR2
    assert room.distances[SOFA][TABLE] == pytest.approx(0.70)
    assert room.distances[SOFA][LAMP] == pytest.approx(1.35)


def test_largest_of_several(room):
    result = largest(room, [SOFA, TABLE, CHAIR1], "largest")
    assert result.answer == SOFA
    assert room.volume[SOFA] / room.volume[TABLE] == pytest.approx(1.85, abs=0.01)


def test_position_for_an_observer(room, ask, deep_room):
    assert room.bearing(TOY, LAMP) == pytest.approx(-36.0, abs=0.1)
    result = direction_at(room, TOY, LAMP, PLANT, "left")
    assert result.values["heading_deg"] == pytest.approx(-126.0, abs=0.1)
    assert result.values["angle_deg"] == pytest.approx(-82.9, abs=0.1)
    assert result.answer == "right"
    more = ask(
        "mv_pos",
        "egocentric",
        ["toy box", "lamp", "plant"],
        ["F0", "F2"],
        ctx=deep_room,
        side="left",
    )
    assert more == "right"


def test_correspondence_uses_the_intrinsics_of_its_own_view():
    pose = np.eye(4)
    pose[0, 3] = 0.5
    camera = Camera([[200, 0, 160], [0, 200, 120], [0, 0, 1]], pose, 320, 240)
    view = type("View", (), {"camera": camera})()
    pixel = see_point(np.full((240, 320), 2.0), view, np.array([[0.0, 0.0, 2.0]]))
    assert pixel == pytest.approx([110, 120])
    assert (
        reason_of(see_point, np.full((240, 320), 1.0), view, np.array([[0.0, 0, 2]]))
        == Reason.OCCLUDED
    )


def test_same_object_and_visible_object(ask, deep_room):
    pair = ["F0", "F2"]
    assert ask("corr_obj", "same", ["chair1", "chair2"], pair, ctx=deep_room) is False
    assert ask("corr_obj", "same", ["chair1", "chair1"], pair, ctx=deep_room) is True
    assert ask("corr_obj", "visible", ["lamp"], pair, ctx=deep_room) is False
    assert ask("corr_obj", "visible", ["chair1"], pair, ctx=deep_room) is True


# Routes ----------------------------------------------------------------------------------------------
def boxes_room(room, points, size=0.1):
    """The hand room with small cubes at points instead of its furniture, and a wide floor."""
    objects = [
        Object(i, str(i), f"thing {i}", [*p, 0.05 + size / 2], [size] * 3, np.eye(3))
        for i, p in enumerate(points)
    ]
    polygon = [(-2, -2), (8, -2), (8, 8), (-2, 8)]
    return SceneContext(
        replace(
            room.scene,
            objects=objects,
            frames=[],
            room=replace(room.scene.room, polygon_xy=polygon),
        )
    )


def test_turns_of_routes(room):
    from spatialvlm.synthesis.routes import plan_turns

    square = boxes_room(room, [(0, 0), (0, 3), (3, 3), (3, 0)])
    assert plan_turns(square, [0, 1, 2, 3])[0] == ["right", "right"]
    other = boxes_room(room, [(0, 0), (2, 0), (2, 2), (0, 2), (4, 2.2)])
    assert plan_turns(other, [0, 1, 2, 3])[0] == ["left", "left"]
    assert plan_turns(other, [0, 1, 2, 4])[0] == ["left", "right"]


def test_only_the_right_plan_reaches_the_goal(room):
    from itertools import product

    square = boxes_room(room, [(0, 0), (0, 3), (3, 3), (3, 0)])
    for turns in product(("left", "right", "back"), repeat=2):
        assert simulate(square, [0, 1, 2, 3], turns) == (turns == ("right", "right"))


def test_routes_do_not_cross_furniture(room):
    from spatialvlm.synthesis.routes import leg_length

    assert reason_of(leg_length, room, BIN, LAMP) == Reason.BLOCKED
    assert reason_of(turn_word, 45.0) == Reason.TURN
    assert turn_word(-170.0)[0] == "back"


# VSI -------------------------------------------------------------------------------------------------
def test_counts(ask):
    assert ask("vsi_count", "", (), ALL, label="chair") == 2
    assert ask("vsi_count", "", (), ["F0"], label="chair") == Reason.NOT_VISIBLE
    assert ask("is_count", "", (), ["F1"], label="chair") == 2
    assert ask("is_count", "", (), ["F0"], label="chair") == Reason.AMBIGUOUS


def test_video_measurements(ask):
    assert ask("vsi_obj_size", "", ["sofa"], ALL) == pytest.approx(200)
    assert ask("vsi_room_size", "", (), ALL) == pytest.approx(24.0)
    assert ask("vsi_abs_dist", "", ["sofa", "bookshelf"], ALL) == pytest.approx(math.sqrt(2.81))


def test_relative_distance(ask, room, hand_room):
    labels = ["table", "lamp", "bookshelf", "chair"]
    assert ask("vsi_rel_dist", "4", ["sofa"], ALL, labels=labels) == "table"
    derived = TASKS["vsi_rel_dist"].derive(
        room, {"variant": "4", "frames": list(ALL), "objects": [SOFA], "labels": labels}
    )
    assert derived.margin.value == pytest.approx(0.174, abs=1e-3)
    large = SceneContext(replace(hand_room, room=replace(hand_room.room, area_m2=50.0)))
    assert ask("vsi_rel_dist", "4", ["sofa"], ALL, ctx=large, labels=labels) == Reason.MARGIN


@pytest.mark.parametrize(
    ("a", "b", "c", "angle", "words"),
    [
        (
            TABLE,
            BOOKSHELF,
            LAMP,
            -32.6,
            {"easy": "right", "medium": "right", "hard": "front-right"},
        ),
        (TABLE, SOFA, PLANT, -121.6, {"easy": "right", "medium": "right", "hard": "back-right"}),
    ],
)
def test_relative_direction(room, a, b, c, angle, words):
    for variant, word in words.items():
        derived = relative_direction(room, a, b, c, variant)
        assert derived.answer == word
        assert derived.values["angle_deg"] == pytest.approx(angle, abs=0.1)


def test_relative_direction_is_guarded_on_both_sides(room):
    assert (
        reason_of(relative_direction, room, TABLE, BOOKSHELF, PLANT, "easy") == Reason.OUT_OF_RANGE
    )
    angle = bearing_around(room, SOFA, BIN, room.bearing(SOFA, TABLE))
    assert angle == pytest.approx(93.2, abs=0.1)
    for near in (angle, 87.0):
        assert reason_of(direction_word, near, "hard") == Reason.SECTOR
        assert direction_word(near, "easy")[0] == "left"


class Clock:
    """Stands in for a scene whose first appearances are given."""

    def __init__(self, moments):
        self.moments = moments
        self.by_label = {label: [label] for label in moments}

    def indices(self, frame_ids):
        return frame_ids

    def appearance(self, obj, frames):
        return self.moments[obj]


def test_order_of_appearance():
    moments = {"bed": (0, 0), "desk": (2, 3), "lamp": (5, 6), "bin": (8, 9)}
    args = {"frames": [], "labels": ["bin", "bed", "lamp", "desk"]}
    assert TASKS["vsi_order"].derive(Clock(moments), args).answer == ["bed", "desk", "lamp", "bin"]
    early = {**moments, "desk": (0.5, 3)}
    assert reason_of(TASKS["vsi_order"].derive, Clock(early), args) == Reason.MARGIN


# VSTI ------------------------------------------------------------------------------------------------
def test_camera_questions_about_frames(ask):
    def at(task, objects, *frames, **more):
        return ask(task, "", objects, ALL, at=list(frames), **more)

    assert at("vsti_cam_obj_abs", ["table"], 0) == pytest.approx(2.054, abs=1e-3)
    assert at("vsti_cam_obj_rel", ["table", "toy box", "lamp"], 0, named=True) == "table"
    assert at("vsti_cam_obj_rel", ["table", "bookshelf", "lamp"], 0) == Reason.MARGIN
    assert at("vsti_obj_obj_lr", ["toy box", "sofa"], 1) == "left"
    assert at("vsti_obj_obj_nf", ["table", "bookshelf"], 0) == "near"
    assert at("vsti_obj_obj_ud", ["toy box", "table"], 0) == "up"
    assert at("vsti_cam_disp", [], 0, 2) == pytest.approx(4.272, abs=1e-3)
    assert at("vsti_cam_dir", [], 0, 2) == "forward"
    assert at("vsti_dist_change", ["toy box"], 0, 2) == "closer"
    assert at("vsti_dist_change", ["table"], 0, 1) == Reason.MARGIN


def test_frame_numbers_refer_to_the_frames_of_the_row():
    task = TASKS["vsti_cam_disp"]
    assert task.frame_slots({"frames": list("abcd"), "at": [0, 2]}) == {
        "frame": "frame 1 of 4",
        "other": "frame 3 of 4",
    }


# InternSpatial ---------------------------------------------------------------------------------------
def test_extremes_and_existence(ask):
    assert ask("is_position", "leftmost", ["chair1", "table", "lamp"], named=True) == "chair1"
    assert ask("is_exist", "left", ["sofa"], ["F1"], label="chair") is True
    assert ask("is_exist", "plain", (), ["F0"], label="plant") is False
    assert ask("is_exist", "behind", ["table"], ["F0"], label="chair") in (
        Reason.MARGIN,
        Reason.AMBIGUOUS,
    )


def test_a_rival_must_fail_a_relation_by_its_own_margin(room):
    edges = {("right", CHAIR2, SOFA), ("far", CHAIR2, TABLE)}
    assert surely_not(room, edges, "left", CHAIR2, SOFA)
    assert surely_not(room, edges, "near", CHAIR2, TABLE)
    assert surely_not(room, edges, "on", CHAIR2, TABLE)
    # Neither left nor right by 0.15 m: the description may fit it as well.
    assert not surely_not(room, edges, "left", CHAIR1, SOFA)
    assert not surely_not(room, edges, "near", CHAIR1, TABLE)


def test_rotation_against_the_line_of_sight(ask, room):
    args = {"variant": "", "frames": ["F0", "F1"], "objects": [CHAIR1]}
    derived = TASKS["is_rotation"].derive(room, args)
    assert derived.values["facing_deg"] == pytest.approx([-111.80, -75.96], abs=0.01)
    assert derived.answer == pytest.approx(35.84, abs=0.02)
    assert ask("is_rotation", "", ["table"], ["F0", "F1"]) == Reason.SYMMETRY


def test_proximity(ask):
    assert ask("proximity", "next to", ["table", "chair1"]) == "next to"
    assert ask("proximity", "next to", ["table", "bookshelf"]) == Reason.MARGIN


def test_visible_box(ask):
    assert ask("grounding_2d", "", ["chair1"]) == pytest.approx([222, 645, 364, 944], abs=2)


# Structured ------------------------------------------------------------------------------------------
def test_seven_numbers_of_one_box():
    forward = np.array([0, 0.8, -0.6])
    right = np.array([1.0, 0, 0])
    pose = np.eye(4)
    pose[:3, :3] = np.stack([right, np.cross(forward, right), forward], axis=1)
    pose[:3, 3] = [1, 2, 1.5]
    camera = Camera([[300, 0, 320], [0, 300, 240], [0, 0, 1]], pose, 640, 480)
    chair = Object(
        0,
        "0",
        "chair",
        [3, 5, 0.5],
        [0.5, 0.6, 1.0],
        rz(math.pi / 2),
        has_front=True,
        symmetry="none",
    )
    assert labelled("chair", ssr_box(chair, ssr_frame(camera)))["bbox_3d"] == [
        3,
        -2,
        -1,
        0.5,
        0.6,
        1,
        0,
    ]


def test_boxes_in_the_frame_of_the_first_view(ask):
    def box(name, first, variant="label"):
        frames = {"F0": ["F0", "F1", "F2"], "F1": ["F1", "F2"]}[first]
        return ask("ssr_grounding7", variant, [name], frames)[0]["bbox_3d"]

    assert box("table", "F0") == [2.5, 0, -1.14, 1.2, 0.8, 0.72, 0]
    assert box("table", "F1") == [2.5, 0, -1.14, 1.2, 0.8, 0.72, 0.64]
    assert box("bookshelf", "F0")[-1] == 3.14
    assert box("bookshelf", "F1") == [4.74, 1.68, -0.5, 0.4, 1.2, 2.0, -2.5]
    assert box("chair1", "F1", "attribute") == [1.9, 0.8, -1.05, 0.5, 0.5, 0.9, -0.93]


def test_vertical_cameras_have_no_ground_direction():
    down = Camera.look((0, 0, 2), 30.0, -89.0, hfov_deg=70, width=64, height=64)
    assert reason_of(ssr_frame, down) == Reason.VERTICAL_AXIS
    frame = ssr_frame(down, "camera_up")
    heading = math.degrees(math.atan2(frame[0, 1], frame[0, 0]))
    assert heading == pytest.approx(30.0, abs=1e-6)


def test_local_map_rows(ask):
    assert ask("ssr_lcm", "fixed", ["sofa", "table", "toy box"], ALL) == [5, 3]
    assert ask("ssr_lcm", "fixed", ["sofa", "table", "chair1"], ALL) == Reason.DUPLICATE_LABEL


# Referral --------------------------------------------------------------------------------------------
def test_referral_by_distance_direction_and_order(room):
    named = by_proximity(room, CHAIR1, [CHAIR2], [TABLE])
    assert named.phrase == "the chair nearest to the table"
    assert named.margin == pytest.approx((1.134 - 0.35) / 0.3, abs=0.01)
    where = (room, TABLE, BOOKSHELF, CHAIR1, "left")
    assert reason_of(require_direction, *where) == Reason.DIRECTION_NOT_UNIQUE
    moments = {1: (0, 0), 2: (4, 5), 3: (9, 9)}
    assert appearance_rank(2, moments) == 1
    assert appearance_rank(2, {**moments, 3: (5.5, 9)}) is None


def test_a_box_with_a_diagonal_turn_has_its_corner_where_columns_say():
    box = Box(np.zeros(3), np.array([2.0, 1.0, 1.0]), rz(math.radians(30)))
    assert box.corners[7][:2] == pytest.approx([0.616, 0.933], abs=1e-3)
