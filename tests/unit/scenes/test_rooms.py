"""Procedural rooms: furniture matches its boxes, layouts are valid, splits are disjoint."""

import importlib.util
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from spatialvlm.errors import RoomGenerationError, SceneError
from spatialvlm.scenes.boxes import yaw_period_rad
from spatialvlm.scenes.io import load_depth, load_instances, load_rgb, load_scene
from spatialvlm.scenes.rooms.appearance import COLORS, TEXTURE_SEEDS, lab, rng_for
from spatialvlm.scenes.rooms.archetypes import ARCHETYPES, draw_piece
from spatialvlm.scenes.rooms.build import (
    RenderConfig,
    RoomSpec,
    build_room,
    draw_cameras,
    draw_room,
    is_written,
    write_room,
)
from spatialvlm.scenes.rooms.grammar import GRAMMARS
from spatialvlm.scenes.rooms.paths import MAX_STEP_M, MAX_TURN_DEG, eye_clearances
from spatialvlm.scenes.rooms.placement import Placer, Rect, Shell
from spatialvlm.scenes.rooms.splits import split_report
from spatialvlm.scenes.transforms import rz, wrap_deg


@pytest.mark.parametrize("label", ARCHETYPES)
def test_box_is_the_union_of_the_parts(label):
    rng = np.random.default_rng(1)
    archetype = ARCHETYPES[label]
    for split in ("train", "val", "train"):
        piece = draw_piece(label, rng, split)
        vertices = np.concatenate([part.vertices() for part in piece.parts])
        depth, width, height = piece.size
        np.testing.assert_allclose(vertices.min(axis=0), [-depth / 2, -width / 2, 0], atol=1e-9)
        np.testing.assert_allclose(vertices.max(axis=0), [depth / 2, width / 2, height], atol=1e-9)
        for value, interval in zip(
            piece.size,
            (archetype.depth, archetype.width or archetype.depth, archetype.height),
            strict=True,
        ):
            assert interval[0] - 1e-3 <= value <= interval[1] + 1e-3


@pytest.mark.parametrize("label", ARCHETYPES)
def test_symmetry_flag_matches_the_geometry(label):
    archetype = ARCHETYPES[label]
    assert not (archetype.has_front and archetype.symmetry != "none")
    piece = draw_piece(label, np.random.default_rng(2), "train")

    def same_after(angle):
        vertices = np.concatenate([part.vertices() for part in piece.parts])
        turned = vertices @ rz(angle).T
        distance = np.abs(vertices[:, None] - turned[None]).max(axis=2).min(axis=1)
        return bool(distance.max() < 1e-6)

    if archetype.symmetry == "none":
        assert not same_after(np.pi)
    else:
        period = yaw_period_rad(archetype.symmetry, (2, 1), has_front=False) or np.pi / 2
        assert same_after(period)


def test_held_out_sizes_come_from_the_upper_end():
    rng = np.random.default_rng(0)
    for label, archetype in ARCHETYPES.items():
        border = archetype.height[0] + 0.85 * (archetype.height[1] - archetype.height[0])
        assert draw_piece(label, rng, "train").size[2] <= border + 1e-3
        assert draw_piece(label, rng, "test").size[2] >= border - 1e-3


def test_named_colours_are_far_apart():
    names = list(COLORS)
    nearest = min(np.linalg.norm(lab(a) - lab(b)) for i, a in enumerate(names) for b in names[:i])
    assert nearest >= 25


def test_splits_share_no_grammar_and_no_texture():
    assert {g.split for g in GRAMMARS.values()} == {"train", "val", "test"}
    seeds = [seed for group in TEXTURE_SEEDS.values() for seed in group]
    assert len(seeds) == len(set(seeds))
    with pytest.raises(RoomGenerationError, match="galley"):
        draw_room(RoomSpec(0, "train", grammar="galley"))


def test_split_report():
    config = RenderConfig(num_frames=1, width=32, height=32)
    scenes = [
        build_room(RoomSpec(seed, split), config)
        for split in ("train", "val", "test")
        for seed in range(2)
    ]
    scenes.append(build_room(RoomSpec(0, "train", "small"), config))
    facts, shared = split_report(scenes)
    assert shared == []
    assert {split: own.scenes for split, own in facts.items()} == {"train": 3, "val": 2, "test": 2}
    leak = replace(scenes[0], split="val")
    _, shared = split_report([*scenes, leak])
    assert any("share room rooms/train-0000000" in line for line in shared)
    assert any("share grammar" in line for line in shared)
    assert any("val has sizes of the training range" in line for line in shared)
    with pytest.raises(SceneError, match=r"rooms/train-0000000: split 'dev' is not one of train"):
        split_report([replace(scenes[0], split="dev")])


def test_one_split_is_not_disjoint(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location(
        "check_splits", Path(__file__).parents[3] / "tools" / "check_splits.py"
    )
    command = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(command)
    config = RenderConfig(num_frames=1, width=32, height=32)
    assert command.main([str(tmp_path)]) == 2
    write_room(RoomSpec(0, "train"), tmp_path, config)
    assert command.main([str(tmp_path)]) == 2
    assert "found rooms of 1 splits (train)" in capsys.readouterr().err
    write_room(RoomSpec(0, "val"), tmp_path, config)
    assert command.main([str(tmp_path)]) == 0


@pytest.fixture(
    scope="module", params=[("realistic", "train"), ("small", "train"), ("realistic", "test")]
)
def models(request):
    preset, split = request.param
    return [draw_room(RoomSpec(seed, split, preset)) for seed in range(5)]


def test_layouts_are_valid(models):
    for model in models:
        small = model.spec.preset == "small"
        floor = [p for p in model.placed if p.parent is None and p.label not in ("rug", "picture")]
        assert (3 <= len(model.placed) <= 6) if small else (12 <= len(model.placed) <= 25)
        for item in model.placed:
            assert model.shell.contains(item.box.corners[:, :2]).all()
            assert item.box.z_min >= -1e-9
            assert item.box.z_max <= model.shell.ceiling
        for i, a in enumerate(floor):
            for b in floor[:i]:
                gap = np.maximum(
                    np.abs(a.box.to_box_frame(b.box.corners)[:, :2]) - a.box.size[:2] / 2, 0
                )
                assert np.hypot(*gap.T).min() >= 0.049
        for item in model.placed:
            if item.parent is not None:
                parent = model.placed[item.parent]
                local = parent.box.to_box_frame(item.box.corners)
                assert (np.abs(local[:, :2]) <= parent.box.size[:2] / 2 + 1e-9).all()


def test_camera_walks_are_collision_free_and_slow(models):
    config = RenderConfig(num_frames=8, width=64, height=64)
    for model in models:
        cameras = draw_cameras(model, config)
        obstacles = [p for p in model.placed if p.label != "rug"]
        boxes, walls = eye_clearances(cameras, model.shell, obstacles)
        assert boxes >= 0.25
        assert walls >= 0.1
        for a, b in pairwise(cameras):
            assert np.linalg.norm(b.centre - a.centre) <= MAX_STEP_M + 1e-6
            assert abs(wrap_deg(b.heading_deg - a.heading_deg)) <= MAX_TURN_DEG + 1e-6
        assert all(-25 - 1e-6 <= c.pitch_deg <= -5 + 1e-6 for c in cameras)


def test_most_objects_are_seen():
    shares = []
    for seed in range(6):
        scene = build_room(RoomSpec(seed), RenderConfig(width=160, height=160))
        large = [o.index for o in scene.objects if o.size.max() >= 0.2 and o.label != "rug"]
        shares.append(
            np.mean([any(f.vis(i).state == "visible" for f in scene.frames) for i in large])
        )
    assert np.mean(shares) >= 0.8


def test_small_preset_has_distinct_saturated_colours():
    for seed in range(5):
        colors = [p.piece.color_name for p in draw_room(RoomSpec(seed, "train", "small")).placed]
        assert len(set(colors)) == len(colors)
        assert not {"black", "white", "gray", "brown"} & set(colors)


def test_files_are_deterministic_complete_and_resumable(tmp_path):
    spec, config = RoomSpec(7, "val", "small"), RenderConfig(num_frames=3, width=64, height=64)
    assert not is_written(spec, tmp_path / "a", config)
    for name in "ab":
        write_room(spec, tmp_path / name, config)
    files = sorted(
        p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file()
    )
    assert len(files) == 1 + 3 * 3
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert is_written(spec, tmp_path / "a", config)
    assert not is_written(spec, tmp_path / "a", RenderConfig(num_frames=4, width=64, height=64))
    (tmp_path / "b" / spec.name / "scene.json").write_text("{")
    assert not is_written(spec, tmp_path / "b", config)


def test_written_scene_agrees_with_its_images(tmp_path):
    spec, config = RoomSpec(1, "train", "small"), RenderConfig(num_frames=2, width=96, height=96)
    written = write_room(spec, tmp_path, config)
    scene = load_scene(tmp_path / spec.name)
    assert json.dumps(scene.to_dict()) == json.dumps(written.to_dict())
    assert scene.scene_id == "rooms/train-0000001"
    for frame in scene.frames:
        ids, depth = load_instances(scene, frame), load_depth(scene, frame)
        assert load_rgb(scene, frame).shape == (96, 96, 3)
        for vis in frame.visible:
            mask = ids == vis.obj + 1
            assert mask.sum() == vis.px
            if vis.px:
                rows, columns = np.nonzero(mask)
                assert vis.bbox2d == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
                assert vis.depth_med == pytest.approx(np.median(depth[mask]), abs=2e-3)
                # Measured points lie inside the stored box.
                points = frame.camera.back_project(
                    np.stack([columns, rows], axis=1) + 0.5, depth[mask].astype(float)
                )
                assert scene.objects[vis.obj].box.contains(points, 0.02).mean() > 0.99


def test_colour_of_the_object_dominates_its_pixels(tmp_path):
    """The named colour is the nearest named hue of the object's mean colour."""
    spec, config = RoomSpec(2, "train", "small"), RenderConfig(num_frames=8, width=128, height=128)
    write_room(spec, tmp_path, config)
    scene = load_scene(tmp_path / spec.name)
    right = total = 0
    for frame in scene.frames:
        rgb, ids = load_rgb(scene, frame), load_instances(scene, frame)
        for vis in (v for v in frame.visible if v.clean):
            mean = np.median(rgb[ids == vis.obj + 1].astype(float), axis=0)
            hue = {
                name: lab(name)[1:]
                for name in COLORS
                if name not in ("black", "white", "gray", "brown")
            }
            seen = lab(tuple(int(c) for c in mean))[1:]
            nearest = min(hue, key=lambda name: np.linalg.norm(hue[name] - seen))
            right += nearest == scene.objects[vis.obj].color_name
            total += 1
    assert total >= 10
    assert right / total > 0.8


def test_placer_refuses_what_does_not_fit():
    shell = Shell(((0, 0), (3, 0), (3, 3), (0, 3)), (Rect(0, 0, 3, 3),), 2.5)
    placer = Placer(shell, rng_for("test"))
    piece = draw_piece("chair", rng_for("piece"), "train")
    assert placer.add(piece, 1.5, 1.5, 0.3) == 0
    assert placer.add(piece, 1.6, 1.5, 0.0) is None
    assert placer.add(piece, 0.1, 1.5, 0.0) is None
    assert placer.add(piece, 1.5, 0.6, 1.0) == 1
    bed = draw_piece("bed", rng_for("bed"), "train")
    assert placer.free(bed) is None
    assert placer.skipped["bed"] == 1
