"""Lifting: overlapped stages, merging, gravity, and rooms recovered through oracle backends."""

import json
import threading
import time

import numpy as np
import pytest

from spatialvlm.errors import ImporterError, SceneError, SceneSchemaError
from spatialvlm.scenes.distances import box_iou
from spatialvlm.scenes.lifting.lift import choose_keyframes, lift_video
from spatialvlm.scenes.lifting.oracle import Noise, Oracle, View
from spatialvlm.scenes.lifting.pipeline import FeatureStore, PipelineStats, Stage, run_stages
from spatialvlm.scenes.lifting.precomputed import Precomputed
from spatialvlm.scenes.lifting.stages import (
    FloorGravity,
    Observation,
    keep_mask,
    level_rotation,
    merge,
    observe,
)
from spatialvlm.scenes.render.mesh import Mesh
from spatialvlm.scenes.rooms.build import (
    RenderConfig,
    RoomSpec,
    draw_cameras,
    draw_room,
    make_scene,
    render_view,
)
from spatialvlm.scenes.transforms import geodesic_deg, rx, ry


def test_stages_overlap_keep_order_and_bound_their_queues():
    """Two threads are inside different stages at the same time, and no queue exceeds its capacity."""
    inside, together, lock = set(), [], threading.Lock()

    def slow(name):
        def call(items):
            with lock:
                inside.add(name)
                together.append(len(inside))
            time.sleep(0.01)
            with lock:
                inside.discard(name)
            return [item + 1 for item in items]

        return call

    stats = PipelineStats()
    stages = [Stage(name, slow(name), batch_size=2) for name in ("a", "b", "c")]
    assert run_stages(stages, range(12), capacity=2, stats=stats) == list(range(3, 15))
    assert max(together) >= 2
    assert stats.longest_queue <= 2
    assert stats.calls == {"a": 6, "b": 6, "c": 6}


def test_batches_and_the_rest():
    sizes = []

    def call(items):
        sizes.append(len(items))
        return items

    assert run_stages([Stage("only", call, batch_size=4)], range(10)) == list(range(10))
    assert sizes == [4, 4, 2]
    assert run_stages([Stage("only", call)], []) == []


def test_failing_stage_is_named_and_stops_the_run():
    reached = []

    def fail(items):
        if 3 in items:
            raise ValueError("no weights")
        return items

    def after(items):
        reached.extend(items)
        return items

    with pytest.raises(SceneError, match="stage 'depth' failed on item 3: ValueError: no weights"):
        run_stages([Stage("depth", fail), Stage("after", after)], range(1000))
    assert max(reached) <= 2
    with pytest.raises(SceneError, match="returned 0 results for 1 items"):
        run_stages([Stage("depth", lambda items: [])], range(3))


def test_feature_store(tmp_path):
    class Fake:
        id, version = "fake", "1"

    array = np.arange(6, dtype=np.float32)
    for _ in range(2):
        store = FeatureStore(tmp_path)
        key = store.key(Fake, array)
        for _ in range(2):
            np.testing.assert_array_equal(store.get(key, lambda: array * 2), array * 2)
    assert store.misses == 0  # the second run reads the file
    Fake.version = "2"
    assert store.key(Fake, array) != key


def capture(seed, num_frames=24, noise=None):
    width = 256 if num_frames > 20 else 160
    config = RenderConfig(num_frames=num_frames, width=width, height=width * 3 // 4)
    model = draw_room(RoomSpec(seed))
    pictures = [
        render_view(model, c, noise_seed=i) for i, c in enumerate(draw_cameras(model, config))
    ]
    truth = make_scene(model, pictures, config, stored=False)
    views = [View(p.rgb, p.raster.depth, p.raster.ids, p.camera) for p in pictures]
    return (
        model,
        truth,
        Oracle(truth, views, noise or Noise()),
        np.stack([p.rgb for p in pictures]),
        pictures,
    )


def surface_seen(mesh: Mesh, pictures):
    """Share of 400 surface points that some frame sees within 3 cm."""
    triangles, _ = mesh.triangles()
    areas = np.linalg.norm(
        np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]), axis=1
    )
    rng = np.random.default_rng(0)
    chosen = triangles[rng.choice(len(triangles), 400, p=areas / areas.sum())]
    weights = rng.dirichlet((1, 1, 1), 400)
    points = np.einsum("nk,nki->ni", weights, chosen)
    seen = np.zeros(400, dtype=bool)
    for picture in pictures:
        pixels, z = picture.camera.project(points)
        with np.errstate(invalid="ignore"):
            inside = (z > 0) & (pixels >= 0).all(axis=1)
            inside &= (pixels < [picture.camera.width, picture.camera.height]).all(axis=1)
        column, row = pixels[inside].astype(int).T
        seen[inside] |= np.abs(picture.raster.depth[row, column] - z[inside]) < 0.03
    return seen.mean()


def test_rooms_are_recovered_without_noise():
    found, errors = [], []
    for seed in (0, 1, 3):
        model, truth, oracle, images, pictures = capture(seed, num_frames=32)
        stats = PipelineStats()
        scene = lift_video(images, oracle.backends(), scene_id="lifted/room", stats=stats)
        scene.validate()
        assert scene.metric
        assert scene.gravity_aligned
        assert stats.calls == {"depth": 8, "tags": 8, "detect": 8, "segment": 8}
        assert all(o.box_quality == "lifted" for o in scene.objects)
        moved = scene.frames[0].world_from_cam @ np.linalg.inv(truth.frames[0].world_from_cam)
        assert np.degrees(np.arccos(np.clip(moved[2, 2], -1, 1))) < 1.0
        for item in truth.objects:
            if item.size.min() < 0.3:
                continue
            # A front seen in passing has no depth: at least five frames, and most of the surface.
            views = sum(f.vis(item.index).state == "visible" for f in truth.frames)
            if views < 5 or surface_seen(model.mesh.only(item.index + 1), pictures) < 0.6:
                continue
            box = item.box.transformed(moved)
            same = [o.box for o in scene.objects if o.label == item.label]
            best = max(same, key=lambda b: box_iou(b, box), default=None)
            found.append(best is not None and box_iou(best, box) >= 0.5)
            errors.append(np.inf if best is None else np.linalg.norm(best.center - box.center))
    assert len(found) >= 10
    assert np.mean(found) >= 0.9
    assert np.median(errors) <= 0.08


def test_second_run_needs_no_depth_call(tmp_path):
    _, _, oracle, images, _ = capture(1, num_frames=4)
    first = lift_video(images, oracle.backends(), scene_id="lifted/a", store=FeatureStore(tmp_path))
    store = FeatureStore(tmp_path)
    second = lift_video(images, oracle.backends(), scene_id="lifted/a", store=store)
    assert store.misses == 0
    assert first.to_dict() == second.to_dict()


def test_noise_makes_boxes_worse():
    def quality(noise):
        _, truth, oracle, images, _ = capture(1, num_frames=12, noise=noise)
        scene = lift_video(images, oracle.backends(), scene_id="lifted/a")
        moved = scene.frames[0].world_from_cam @ np.linalg.inv(truth.frames[0].world_from_cam)
        best = [
            max(
                (
                    box_iou(o.box, t.box.transformed(moved))
                    for o in scene.objects
                    if o.label == t.label
                ),
                default=0.0,
            )
            for t in truth.objects
        ]
        return np.mean(best)

    exact = quality(Noise())
    assert quality(Noise(depth_rel=0.1)) < exact
    assert quality(Noise(rotation_deg=3.0, translation_m=0.15)) < exact
    assert quality(Noise(depth_scale=1.3)) < exact


def test_precomputed(tmp_path):
    _, truth, _, images, pictures = capture(1, num_frames=6)
    labels = [o.label for o in truth.objects]
    for index, picture in enumerate(pictures):
        present = [i for i in np.unique(picture.raster.ids).tolist() if i > 0]
        np.savez(
            tmp_path / f"{index:06d}.npz",
            depth=picture.raster.depth,
            world_from_cam=picture.camera.world_from_cam,
            intrinsics=picture.camera.intrinsics,
            masks=np.stack([picture.raster.ids == i for i in present]),
            labels=np.array([labels[i - 1] for i in present]),
            scores=np.full(len(present), 0.9),
        )
    (tmp_path / "meta.json").write_text(json.dumps({"metric_depth": True, "metric_poses": False}))
    scene = lift_video(images, Precomputed(tmp_path, images).backends(), scene_id="lifted/p")
    assert not scene.metric
    assert {o.label for o in scene.objects} <= set(labels)
    assert len(scene.objects) >= 3
    data = (tmp_path / "000002.npz").read_bytes()
    (tmp_path / "000002.npz").write_bytes(data[: len(data) // 2])
    with pytest.raises(ImporterError, match=r"000002\.npz"):
        Precomputed(tmp_path, images)
    np.savez(tmp_path / "000002.npz", depth=np.zeros(3))
    with pytest.raises(ImporterError, match="'world_from_cam' is missing"):
        Precomputed(tmp_path, images)


def cloud(center, count=200, seed=0, spread=0.2):
    return np.random.default_rng(seed).uniform(-spread, spread, (count, 3)) + center


def test_merge_joins_overlapping_observations_of_one_label():
    observations = [
        Observation(0, "chair", 0.9, cloud((0, 0, 0))),
        Observation(1, "chair", 0.8, cloud((0.02, 0, 0), seed=0)),
        Observation(1, "table", 0.9, cloud((0, 0, 0), seed=2)),
        Observation(2, "chair", 0.9, cloud((2, 0, 0))),
    ]
    merged = merge(observations)
    assert [(m.label, m.frames) for m in merged] == [
        ("chair", (0, 1)),
        ("table", (1,)),
        ("chair", (2,)),
    ]
    again = merge(observations[::-1])
    assert [(m.label, m.frames) for m in again] == [(m.label, m.frames) for m in merged]


def test_masks_are_filtered_and_edges_dropped():
    mask = np.zeros((20, 20), bool)
    mask[5:15, 5:15] = True
    assert keep_mask(mask, 0.9)
    assert not keep_mask(mask, 0.5)
    assert not keep_mask(np.ones((20, 20), bool), 0.9)
    assert not keep_mask(np.eye(20, dtype=bool), 0.9)
    model = draw_room(RoomSpec(1))
    camera = draw_cameras(model, RenderConfig(num_frames=1, width=20, height=20))[0]
    depth = np.full((20, 20), 2.0)
    depth[5:15, 14] = 3.5  # a mixed column at the edge of the mask
    lifted = observe(0, "chair", 0.9, mask, depth, camera)
    np.testing.assert_allclose(camera.to_cam(lifted.points)[:, 2], 2.0)


def test_gravity_of_a_turned_world():
    rng = np.random.default_rng(0)
    floor = np.c_[rng.uniform(-3, 3, (2000, 2)), rng.normal(0, 0.005, 2000)]
    furniture = rng.uniform((-2, -2, 0), (2, 2, 1.5), (1500, 3))
    points = np.concatenate([floor, furniture])
    turn = rx(0.4) @ ry(-0.2)
    up = FloorGravity().up(points @ turn.T, (turn @ rx(0.15) @ [0, 0, 1.0])[None])
    assert np.degrees(np.arccos(up @ turn @ [0, 0, 1.0])) < 1.0
    assert geodesic_deg(level_rotation(up) @ turn, level_rotation(up) @ turn) == 0.0
    np.testing.assert_allclose(level_rotation(up) @ up, [0, 0, 1], atol=1e-9)
    assert FloorGravity().up(rng.uniform(-1, 1, (50, 3)), np.array([[0, 0, 1.0]])) is None
    assert FloorGravity().up(rng.uniform(-1, 1, (3000, 3)), np.array([[0, 0, 1.0]])) is None


def test_keyframes_are_spread_and_sharp():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (9, 16, 16, 3)).astype(np.uint8)
    images[[0, 1, 4, 5, 6, 8]] = 127  # flat frames
    assert choose_keyframes(images, 3) == [2, 3, 7]
    assert choose_keyframes(images[:2], 5) == [0, 1]


def test_empty_video():
    _, _, oracle, images, _ = capture(1, num_frames=2)
    with pytest.raises(SceneSchemaError, match="no usable frame"):
        lift_video(images[:0], oracle.backends(), scene_id="lifted/none")
