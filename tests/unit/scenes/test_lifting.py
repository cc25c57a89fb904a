"""Lifting: overlapped stages, merging, gravity, and rooms recovered through oracle backends."""

import json
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from spatialvlm.errors import ImporterError, SceneError, SceneSchemaError
from spatialvlm.scenes.distances import box_iou
from spatialvlm.scenes.io import load_depth, load_instances, load_scene
from spatialvlm.scenes.lifting import hf_backends
from spatialvlm.scenes.lifting.agreement import agreement
from spatialvlm.scenes.lifting.features import FeatureStore
from spatialvlm.scenes.lifting.given import StoredPoses
from spatialvlm.scenes.lifting.lift import Lifted, lift_image, lift_video
from spatialvlm.scenes.lifting.oracle import Noise, Oracle, View
from spatialvlm.scenes.lifting.pipeline import PipelineStats, Stage, run_stages
from spatialvlm.scenes.lifting.precomputed import Precomputed
from spatialvlm.scenes.lifting.protocols import best_match, choose_keyframes
from spatialvlm.scenes.lifting.refine import box_pixels
from spatialvlm.scenes.lifting.stages import Observation, keep_mask, mask_points, merge
from spatialvlm.scenes.lifting.store import write_lifted
from spatialvlm.scenes.lifting.world import FloorGravity, level_rotation, pose_scale, scale_factors
from spatialvlm.scenes.render.mesh import Mesh
from spatialvlm.scenes.rooms.build import (
    RenderConfig,
    RoomSpec,
    draw_cameras,
    draw_room,
    make_scene,
    render_view,
)
from spatialvlm.scenes.schema import Frame, Scene
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

    arrays = [np.arange(6, dtype=np.float32), np.ones(3)]
    asked = []

    def compute(missing):
        asked.append(missing)
        return [{"double": arrays[i] * 2} for i in missing]

    for _ in range(2):
        store = FeatureStore(tmp_path)
        keys = [store.key(Fake, array, "depth") for array in arrays]
        for _ in range(2):
            found = store.lookup(keys, compute)
            np.testing.assert_array_equal(found[1]["double"], arrays[1] * 2)
    assert asked == [[0, 1]]  # the second store reads the files
    Fake.version = "2"
    assert store.key(Fake, arrays[0], "depth") != keys[0]
    assert store.key(Fake, arrays[0], "boxes") != store.key(Fake, arrays[0], "depth")
    (tmp_path / f"{keys[0]}.npz").write_bytes(b"torn")
    with pytest.raises(SceneError, match="stored features are damaged"):
        FeatureStore(tmp_path).lookup(keys, compute)
    whole = (tmp_path / f"{keys[1]}.npz").read_bytes()
    (tmp_path / f"{keys[1]}.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SceneError, match=rf"{keys[1]}\.npz: .* Delete the file"):
        FeatureStore(tmp_path).lookup(keys[1:], compute)


def test_a_key_kept_twice_counts_once(tmp_path):
    """Two threads may compute the same key; its size must not push others out of memory."""

    class Fake:
        id, version = "fake", "1"

    store = FeatureStore(memory_bytes=2000)
    first, second = (store.key(Fake, text) for text in ("a", "b"))

    def again(missing):
        store.lookup([first], lambda _: [{"x": np.zeros(100)}])
        return [{"x": np.zeros(100)} for _ in missing]

    store.lookup([first], again)
    store.lookup([second], lambda _: [{"x": np.zeros(100)}])
    store.lookup([first], lambda _: pytest.fail("was dropped too early"))


def test_versions_tell_other_files_and_readings_apart(tmp_path, monkeypatch):
    """Stored results of one pose file, one set of files or one reading of depth never serve another."""
    images = np.zeros((1, 4, 4, 3), np.uint8)
    poses, precomputed = [], []
    masks = {"masks": np.zeros((0, 4, 4), bool), "labels": np.zeros(0, str), "scores": np.zeros(0)}
    (tmp_path / "meta.json").write_text('{"metric_depth": true, "metric_poses": true}')
    for shift in (0.0, 1.0):
        arrays = {"world_from_cam": np.eye(4) + shift, "intrinsics": np.eye(3)}
        np.savez(tmp_path / "poses.npz", world_from_cam=np.eye(4)[None] + shift,
                 intrinsics=np.eye(3), metric=True)  # fmt: skip
        np.savez(tmp_path / "000000.npz", depth=np.ones((4, 4)), **arrays, **masks)
        poses.append(StoredPoses(tmp_path / "poses.npz", images).version)
        precomputed.append(Precomputed(tmp_path, images).version)
    assert len(set(poses)) == len(set(precomputed)) == 2
    assert Precomputed(tmp_path, images).version == precomputed[1]
    monkeypatch.setattr(hf_backends, "_load", lambda *_: (None, None))
    monkeypatch.setattr(hf_backends, "_version", lambda *_: "weights")
    readings = [hf_backends.DepthAnythingDepth("d", metric=m).version for m in (True, False)]
    assert readings == ["weights-metric", "weights-relative"]
    (tmp_path / "meta.json").write_text('{"metric_depth": true}')
    with pytest.raises(ImporterError, match=r"meta\.json: needs 'metric_poses': true or false"):
        Precomputed(tmp_path, images)


def test_feature_store_forgets_the_oldest():
    class Fake:
        id, version = "fake", "1"

    store = FeatureStore(memory_bytes=2000)
    keys = [store.key(Fake, str(i)) for i in range(3)]
    for key in keys:
        store.lookup([key], lambda missing: [{"x": np.zeros(100)} for _ in missing])
    store.lookup(keys[1:], lambda _: pytest.fail("was dropped too early"))
    assert store.misses == 3
    store.lookup(keys[:1], lambda _: [{"x": np.zeros(100)}])
    assert store.misses == 4


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
        scene = lift_video(images, oracle.backends(), scene_id="lifted/room", stats=stats).scene
        scene.validate()
        assert scene.metric
        assert scene.gravity_aligned
        assert set(stats.calls.values()) == {8}
        assert list(stats.calls) == ["depth", "tags", "detect", "segment", "points"]
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


@pytest.fixture(scope="module")
def captured():
    """One room with twelve small frames."""
    return capture(1, num_frames=12)


def test_second_run_calls_no_backend(tmp_path, captured):
    _, _, oracle, images, _ = captured
    oracle.calls = 0
    first = lift_video(images, oracle.backends(), scene_id="lifted/a", store=FeatureStore(tmp_path))
    assert oracle.calls > 0
    oracle.calls = 0
    second = lift_video(
        images, oracle.backends(), scene_id="lifted/a", store=FeatureStore(tmp_path)
    )
    assert oracle.calls == 0
    assert first.scene.to_dict() == second.scene.to_dict()
    plain = lift_video(images, oracle.backends(), scene_id="lifted/a")
    assert plain.scene.to_dict() == first.scene.to_dict()


def test_points_from_processes_are_the_same(captured):
    _, _, oracle, images, _ = captured
    one = lift_video(images, oracle.backends(), scene_id="lifted/a")
    other = lift_video(images, oracle.backends(), scene_id="lifted/a", workers=1)
    assert one.scene.to_dict() == other.scene.to_dict()


def test_agreement_does_not_rise_with_noise():
    """Depth noise of 0, 5 and 10 % never improves the answers by more than two points; pose noise hurts."""
    _, truth, oracle, images, _ = capture(3, num_frames=16)

    def error(**noise):
        oracle.noise = Noise(**noise)
        scene = lift_video(images, oracle.backends(), scene_id="lifted/a").scene
        return agreement(truth, scene).label_error

    exact, little, much = error(), error(depth_rel=0.05), error(depth_rel=0.1)
    assert exact - 0.02 <= little
    assert little - 0.02 <= much
    assert exact < 0.75
    assert error(rotation_deg=6.0, translation_m=0.2) > exact + 0.02


def test_merged_masks_make_larger_boxes(captured):
    _, truth, oracle, images, _ = captured
    noisy = Oracle(truth, oracle._views, Noise(mask_merge=1.0))
    volumes = [
        np.median([o.box.volume for o in lift_video(images, b, scene_id="lifted/a").scene.objects])
        for b in (oracle.backends(), noisy.backends())
    ]
    assert volumes[1] > 1.2 * volumes[0]


def test_poses_without_a_unit_are_scaled_to_the_depth(captured):
    _, _, oracle, images, pictures = captured
    depths = [picture.raster.depth for picture in pictures]
    poses = oracle.poses(images)
    moved = poses.world_from_cam.copy()
    moved[:, :3, 3] *= 0.37
    assert pose_scale(depths, moved, poses.intrinsics) * 0.37 == pytest.approx(1.0, abs=0.02)
    found = scale_factors(depths, moved, poses.intrinsics, metric_depth=False, metric_poses=True)
    assert found == (pytest.approx(0.37, rel=0.02), 1.0, True)
    factor, same, metric = scale_factors(
        depths, moved, poses.intrinsics, metric_depth=False, metric_poses=False
    )
    assert (factor, metric) == (same, False)
    assert np.median(np.stack(depths)) * factor == pytest.approx(2.0)
    noise = np.random.default_rng(0).uniform(0.5, 9, (len(depths), *depths[0].shape))
    with pytest.raises(SceneError, match="agree at no scale"):
        pose_scale(list(noise), moved, poses.intrinsics)


def test_single_image(tmp_path, captured):
    """One frame: boxes in view space, camera at the origin, written and read like any scene."""
    _, truth, oracle, images, _ = captured
    index = max(range(12), key=lambda i: len([v for v in truth.frames[i].visible if v.clean]))
    lifted = lift_image(images[index], oracle.backends(), oracle, scene_id="lifted/photo")
    scene = lifted.scene
    assert scene.metric
    assert len(scene.frames) == 1
    np.testing.assert_allclose(scene.frames[0].camera.centre, 0, atol=1e-9)
    assert scene.gravity_aligned
    assert abs(scene.frames[0].camera.pitch_deg - truth.frames[index].camera.pitch_deg) < 1.5
    assert {o.label for o in scene.objects} <= {o.label for o in truth.objects}
    clean = [v.obj for v in truth.frames[index].visible if v.clean]
    assert len(scene.objects) >= len(clean) / 2
    written = write_lifted(lifted, tmp_path)
    again = load_scene(tmp_path / "lifted" / "photo")
    np.testing.assert_allclose(load_depth(again, again.frames[0]), lifted.depths[0], atol=1e-3)
    np.testing.assert_array_equal(load_instances(again, again.frames[0]), lifted.instances[0])
    assert [v.to_dict() for v in again.frames[0].visible] == [
        v.to_dict() for v in written.frames[0].visible
    ]


def test_refined_masks_are_the_instances(captured):
    _, truth, oracle, images, pictures = captured
    lifted = lift_video(images, oracle.backends(), scene_id="lifted/a")
    scores = []
    for ids, picture in zip(lifted.instances, pictures, strict=True):
        for item in lifted.scene.objects:
            mask = ids == item.index + 1
            if mask.sum() < 100:
                continue
            inside = picture.raster.ids[mask]
            owner = np.bincount(inside[inside > 0]).argmax() if (inside > 0).any() else 0
            same = picture.raster.ids == owner
            right = truth.objects[owner - 1].label == item.label
            scores.append(right * (mask & same).sum() / (mask | same).sum())
    assert len(scores) > 20
    assert np.median(scores) > 0.95


def test_coarse_masks_stay_where_the_segmenter_is_wrong(captured):
    class Blind(Oracle):
        def segment(self, images, boxes):
            masks = super().segment(images, boxes)
            if len(images) == 1:  # refinement asks frame by frame
                return [[type(m)(np.zeros_like(m.pixels), 1.0) for m in found] for found in masks]
            return masks

    _, truth, oracle, images, _ = captured
    blind = Blind(truth, oracle._views)
    scene = lift_video(images, blind.backends(), scene_id="lifted/a").scene
    assert scene.extra["counters"]["coarse_mask"] > 10
    box = truth.objects[0].box
    view = oracle._views[0]
    assert not box_pixels(box, np.zeros_like(view.depth), view.camera).any()


def test_captions_of_objects(captured):
    class Captions:
        id, version = "captions", "1"

        def captions(self, crops, labels):
            assert all(crop.ndim == 3 and crop.size for crop in crops)
            return [f"a {label}" for label in labels]

    _, _, oracle, images, _ = captured
    backends = replace(oracle.backends(), captioner=Captions())
    scene = lift_video(images, backends, scene_id="lifted/a").scene
    assert {o.caption for o in scene.objects} <= {f"a {o.label}" for o in scene.objects} | {None}
    assert any(o.caption for o in scene.objects)


def test_failing_poses_are_named(captured):
    class Lost:
        id, version = "lost", "1"

        def poses(self, images):
            raise ValueError("no motion")

    _, _, oracle, images, _ = captured
    backends = replace(oracle.backends(), pose=Lost())
    with pytest.raises(SceneError, match="lifting stage 'poses' failed: ValueError: no motion"):
        lift_video(images, backends, scene_id="lifted/a")


def test_far_pixels_leave_near_depth_exact(tmp_path):
    """Beyond 65.535 m is unknown; a scene without a unit keeps fine steps around its median."""
    frame = Frame("000000", None, 4, 4, np.array([[4, 0, 2], [0, 4, 2], [0, 0, 1.0]]), np.eye(4))
    depth = np.full((4, 4), 2.345, np.float32)
    depth[0] = (np.inf, np.nan, 1e6, 65.0)
    nothing = (np.zeros((4, 4, 3), np.uint8),), (np.zeros((4, 4), np.uint16),)
    for metric, unit, last in ((True, 1.0, 65.0), (False, 0.1, 0.0)):
        scene = Scene(
            "lifted/far", "lifted/far", "lifted", objects=[], frames=[frame], metric=metric
        )
        written = write_lifted(Lifted(scene, nothing[0], (depth * unit,), nothing[1]), tmp_path)
        stored = load_depth(written, written.frames[0])
        np.testing.assert_allclose(stored[1:], 2.345 * unit, rtol=3e-4)
        np.testing.assert_allclose(stored[0], [0, 0, 0, last], atol=1e-3)


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
    scene = lift_video(images, Precomputed(tmp_path, images).backends(), scene_id="lifted/p").scene
    assert scene.metric  # the depth is; poses are scaled to it
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
    np.testing.assert_allclose(mask_points(mask, depth, camera.intrinsics)[:, 2], 2.0)
    assert mask_points(mask, np.zeros_like(depth), camera.intrinsics) is None


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
    assert choose_keyframes(images[[2, 3]], 5) == [0, 1]
    # A camera at rest gives one frame.
    assert choose_keyframes(np.repeat(images[2:3], 6, axis=0), 3) == [0]


def test_prompts_find_the_box_that_fits_best():
    boxes = [(0, 0, 4, 4), (10, 10, 20, 20)]
    assert best_match((11, 9, 19, 21), boxes) == 1
    assert best_match((50, 50, 60, 60), boxes) == 0


def test_empty_video():
    _, _, oracle, images, _ = capture(1, num_frames=2)
    with pytest.raises(SceneSchemaError, match="no usable frame"):
        lift_video(images[:0], oracle.backends(), scene_id="lifted/none")
