"""Counterfactual twins, turntables and block stacks."""

from dataclasses import replace

import numpy as np
import pytest

from spatialvlm.scenes.rooms.blocks import CUBE_M
from spatialvlm.scenes.rooms.build import RenderConfig, RoomSpec, build_room, draw_model, draw_room
from spatialvlm.scenes.transforms import wrap_deg

CONFIG = RenderConfig(num_frames=4, width=96, height=96)


def find_twin(change):
    for seed in range(12):
        spec = RoomSpec(seed, "train", "small", twin=1)
        twin = draw_model(spec, CONFIG)
        if twin.extra["twin"]["change"] == change:
            return draw_room(replace(spec, twin=0)), twin
    raise AssertionError(change)


@pytest.mark.parametrize("change", ["moved", "removed"])
def test_twin_changes_one_object(change):
    base, twin = find_twin(change)
    scene = build_room(twin.spec, CONFIG)
    base_scene = build_room(base.spec, CONFIG)
    assert scene.scene_id == f"{base_scene.scene_id}-t1"
    assert scene.room_id == base_scene.room_id == base_scene.scene_id
    name = twin.extra["twin"]["object"]
    before = {o.id: o for o in base_scene.objects}
    after = {o.id: o for o in scene.objects}
    assert set(before) - set(after) == ({name} if change == "removed" else set())
    for key, item in after.items():
        moved = np.linalg.norm(item.center - before[key].center)
        assert (moved > 0.5) == (key == name)
        assert item.color_name == before[key].color_name
    for a, b in zip(scene.frames, base_scene.frames, strict=True):
        np.testing.assert_array_equal(a.world_from_cam, b.world_from_cam)
    # Surfaces of what stayed are the same too.
    kept = next(i for i, p in enumerate(base.placed) if p.name != name)
    kept_twin = next(i for i, p in enumerate(twin.placed) if p.name == base.placed[kept].name)
    np.testing.assert_array_equal(
        base.mesh.only(kept + 1).colors, twin.mesh.only(kept_twin + 1).colors
    )


def test_mirrored_twin_is_a_reflection():
    base, twin = find_twin("mirrored")
    width = max(r.x1 for r in base.shell.rects)
    assert twin.shell.area == pytest.approx(base.shell.area)
    for a, b in zip(base.placed, twin.placed, strict=True):
        mirrored = a.box.corners * [-1, 1, 1] + [width, 0, 0]
        distance = np.abs(mirrored[:, None] - b.box.corners[None]).max(axis=2).min(axis=1)
        assert distance.max() < 1e-9
    for a, b in zip(base.shell.openings, twin.shell.openings, strict=True):
        first, second = base.shell.walls[a.wall], twin.shell.walls[b.wall]
        point = np.array(first.start) + first.along * a.center_m
        other = np.array(second.start) + second.along * b.center_m
        np.testing.assert_allclose(other, [width - point[0], point[1]], atol=1e-9)
    left = build_room(base.spec, CONFIG)
    right = build_room(twin.spec, CONFIG)
    for a, b in zip(left.frames, right.frames, strict=True):
        assert wrap_deg(a.camera.heading_deg + b.camera.heading_deg - 180) == pytest.approx(
            0, abs=1e-6
        )
        for vis in a.visible:
            assert b.vis(vis.obj).vis_frac == pytest.approx(vis.vis_frac, abs=0.06)


def test_turntable_looks_at_one_piece_from_all_sides():
    scene = build_room(RoomSpec(2, preset="turntable"), CONFIG)
    assert scene.scene_id == "rooms/train-turn-0000002"
    (item,) = scene.objects
    assert (item.has_front, item.symmetry) == (True, "none")
    assert len(scene.frames) == 48
    for index, frame in enumerate(scene.frames):
        offset = frame.camera.centre - item.center
        azimuth = np.degrees(np.arctan2(offset[1], offset[0]))
        assert wrap_deg(azimuth - 15 * (index % 24)) == pytest.approx(0, abs=1e-6)
        assert frame.vis(0).clean


def test_block_stack():
    scene = build_room(RoomSpec(1, preset="blocks"), CONFIG)
    heights = np.array(scene.extra["blocks"]["heights"])
    assert len(scene.objects) == heights.sum()
    origin = scene.extra["blocks"]["origin"]
    tops = np.zeros_like(heights)
    for item in scene.objects:
        x, y = ((item.center[:2] - origin) / CUBE_M).astype(int)
        tops[x, y] = max(tops[x, y], round(item.box.z_max / CUBE_M))
        for other in scene.objects[: item.index]:
            touching = np.abs(other.center - item.center).sum() < 1.01 * CUBE_M
            assert not (touching and other.color_name == item.color_name)
    np.testing.assert_array_equal(tops, heights)
    for frame in scene.frames:
        shares = np.array(frame.extra["cell_visible"])
        assert shares.shape == heights.shape
        highest = np.unravel_index(heights.argmax(), heights.shape)
        assert shares[highest] > 0.9
