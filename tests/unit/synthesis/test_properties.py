"""What must not change answers, and what must flip them."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from spatialvlm.scenes.transforms import rigid, rz
from spatialvlm.synthesis.context import SceneContext
from spatialvlm.synthesis.generate import generate_scene
from spatialvlm.synthesis.plan import make_plan
from spatialvlm.synthesis.rows import Reject
from spatialvlm.synthesis.tasks import TASKS

SIDES = {"left": "right", "right": "left"}


def moved(room, yaw_deg, shift):
    """The same room elsewhere in the world."""
    new_from_old = rigid(rz(math.radians(yaw_deg)), shift)
    turn = new_from_old[:3, :3]
    objects = [replace(o, center=turn @ o.center + shift, R=turn @ o.R) for o in room.objects]
    frames = [replace(f, world_from_cam=new_from_old @ f.world_from_cam) for f in room.frames]
    polygon = [tuple((turn @ [x, y, 0] + shift)[:2]) for x, y in room.room.polygon_xy]
    return replace(
        room, objects=objects, frames=frames,
        room=replace(room.room, polygon_xy=polygon, floor_z=room.room.floor_z + shift[2]),
    )  # fmt: skip


def mirrored(room):
    """The room in a mirror, x -> -x; the pictures are flipped as well."""
    flip = np.diag([-1.0, 1.0, 1.0])
    objects = [
        replace(o, center=flip @ o.center, R=flip @ o.R @ np.diag([1.0, -1.0, 1.0]))
        for o in room.objects
    ]
    frames = []
    for frame in room.frames:
        pose = np.eye(4)
        pose[:3, :3] = flip @ frame.world_from_cam[:3, :3] @ flip
        pose[:3, 3] = flip @ frame.world_from_cam[:3, 3]
        intrinsics = frame.intrinsics.copy()
        intrinsics[0, 2] = frame.width - intrinsics[0, 2]
        visible = [
            replace(
                v,
                bbox2d=(
                    frame.width - v.bbox2d[2],
                    v.bbox2d[1],
                    frame.width - v.bbox2d[0],
                    v.bbox2d[3],
                ),
                centroid_px=(frame.width - v.centroid_px[0], v.centroid_px[1]),
            )
            for v in frame.visible
        ]
        frames.append(replace(frame, world_from_cam=pose, intrinsics=intrinsics, visible=visible))
    polygon = [(-x, y) for x, y in reversed(room.room.polygon_xy)]
    return replace(
        room, objects=objects, frames=frames, room=replace(room.room, polygon_xy=polygon)
    )


def answers(ctx, task, seed=0, limit=60):
    """Arguments that are accepted, with their answers."""
    rng = np.random.default_rng(seed)
    found = []
    try:
        for args in TASKS[task].propose(ctx, rng):
            try:
                derived = TASKS[task].derive(ctx, args)
            except Reject:
                continue
            found.append((args, derived))
            if len(found) == limit:
                break
    except Reject:
        pass
    return found


def test_moving_the_world_changes_no_question_and_no_answer(hand_room):
    plan = make_plan("all", per_task=8)
    before, counted = generate_scene(hand_room, plan)
    for yaw, shift in ((37.0, [3.0, -8.0, 0.5]), (-141.0, [-20.0, 0.3, -1.0])):
        after, again = generate_scene(moved(hand_room, yaw, np.array(shift)), plan)
        assert [row["id"] for row in after] == [row["id"] for row in before]
        for one, two in zip(before, after, strict=True):
            assert one["messages"] == two["messages"], one["task"]
            assert one["answer_json"] == two["answer_json"]
        assert again == counted
    assert len({row["task"] for row in before}) >= 35


@pytest.mark.parametrize(
    "task", ["left_right", "vsti_obj_obj_lr", "vsi_rel_dir", "ssr_lcm", "is_rotation"]
)
def test_a_mirror_flips_sides_and_turns(hand_room, task):
    room, mirror = SceneContext(hand_room), SceneContext(mirrored(hand_room))
    found = answers(room, task)
    assert len(found) >= 3
    for args, derived in found:
        other = TASKS[task].derive(mirror, args)
        if task == "left_right":
            assert {derived.answer, other.answer} == set(args["objects"])
        elif task == "ssr_lcm" and args["variant"] == "fixed":
            x, y = derived.values["target_xy"]
            assert other.values["target_xy"] == pytest.approx([10 - x, y])
        elif task == "is_rotation":
            assert other.answer == pytest.approx(-derived.answer)
        elif task in ("vsti_obj_obj_lr", "vsi_rel_dir"):
            word = derived.answer
            for one, two in SIDES.items():
                if one in word:
                    word = word.replace(one, two)
                    break
            assert other.answer == word


@pytest.mark.parametrize(
    "task",
    [
        "front_behind",
        "depth_order",
        "high_low",
        "size_rel",
        "vsi_rel_dist",
        "dist_abs",
        "proximity",
    ],
)
def test_a_mirror_changes_nothing_else(hand_room, task):
    room, mirror = SceneContext(hand_room), SceneContext(mirrored(hand_room))
    found = answers(room, task)
    assert len(found) >= 3
    for args, derived in found:
        other = TASKS[task].derive(mirror, args)
        assert other.answer == (
            pytest.approx(derived.answer) if task == "dist_abs" else derived.answer
        )


@pytest.mark.parametrize(
    "task", ["vsi_rel_dist", "dist_abs", "left_right", "front_behind", "depth_choice"]
)
def test_small_shifts_of_boxes_never_flip_an_accepted_answer(hand_room, task):
    """Every centre moves by less than a quarter of the least gap."""
    room = SceneContext(hand_room)
    found = [
        (args, d)
        for args, d in answers(room, task)
        if d.margin.kind in ("gap_m", "vis", "image_shift")
    ]
    rng = np.random.default_rng(3)
    flipped = 0
    for _ in range(5):
        steps = rng.uniform(-1, 1, size=(9, 3)) * 0.15 / 4 / math.sqrt(3)
        objects = [
            replace(o, center=o.center + step)
            for o, step in zip(hand_room.objects, steps, strict=True)
        ]
        shaken = SceneContext(replace(hand_room, objects=objects))
        for args, derived in found:
            try:
                other = TASKS[task].derive(shaken, args)
            except Reject:
                continue
            same = (
                abs(other.answer - derived.answer) < 0.1
                if task == "dist_abs"
                else other.answer == derived.answer
            )
            flipped += not same
    assert found
    assert flipped == 0


def test_units_agree(hand_room):
    rows, _ = generate_scene(
        hand_room, make_plan("dist_abs,size_abs,vsi_abs_dist,vsi_obj_size", per_task=20)
    )
    seen = set()
    for row in rows:
        unit = row["unit"]
        seen.add(unit)
        question = next(m["content"] for m in row["messages"] if m["role"] == "user")
        assert ("centimeters" in question) == (unit == "cm")
        if row["task"] == "dist_abs" and row["form"] == "NUM":
            metres = json.loads(row["evidence"])["values"]["distance_m"]
            value = json.loads(row["answer_json"])
            assert value == pytest.approx(
                metres * (100 if unit == "cm" else 1), abs=0.5 if unit == "cm" else 0.005
            )
    assert seen == {"m", "cm"}


def test_other_object_order_gives_the_same_answers(hand_room):
    """Renumbering the objects changes indices, not answers."""
    order = [8, 3, 1, 0, 7, 5, 2, 6, 4]
    place = {old: new for new, old in enumerate(order)}
    objects = [
        replace(
            hand_room.objects[old], index=new,
            support_parent=None if hand_room.objects[old].support_parent is None else place[hand_room.objects[old].support_parent],
        )
        for new, old in enumerate(order)
    ]  # fmt: skip
    frames = [
        replace(f, visible=[replace(v, obj=place[v.obj]) for v in f.visible])
        for f in hand_room.frames
    ]
    room, other = (
        SceneContext(hand_room),
        SceneContext(replace(hand_room, objects=objects, frames=frames)),
    )
    for task in ("left_right", "front_behind", "size_rel", "is_position"):
        for args, derived in answers(room, task):
            again = TASKS[task].derive(
                other, {**args, "objects": [place[o] for o in args["objects"]]}
            )
            assert again.answer == place[derived.answer]


def test_every_discrete_answer_has_its_margin(hand_room):
    rows, _ = generate_scene(hand_room, make_plan("all", per_task=10))
    for row in rows:
        assert row["margin"]["value"] >= row["margin"]["threshold"] > 0, row["task"]
        assert 0 <= row["difficulty"] <= 1
