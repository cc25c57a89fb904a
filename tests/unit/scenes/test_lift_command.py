"""tools/lift.py: stored backends, a real photo through tiny models, generated questions, one-line errors."""

import importlib.util
import json
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from spatialvlm.errors import ConfigError
from spatialvlm.scenes.io import load_instances, load_rgb, load_scene
from spatialvlm.scenes.lifting import hf_backends
from spatialvlm.scenes.lifting.protocols import choose_keyframes
from spatialvlm.scenes.rooms.build import (
    RenderConfig,
    RoomSpec,
    draw_cameras,
    draw_room,
    make_scene,
    render_view,
)
from spatialvlm.synthesis.engine import synthesize
from spatialvlm.synthesis.plan import make_plan

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def command():
    spec = importlib.util.spec_from_file_location("lift", ROOT / "tools" / "lift.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Frames of a room as PNG, and what another program knows about them."""
    folder = tmp_path_factory.mktemp("clip")
    (folder / "frames").mkdir()
    (folder / "features").mkdir()
    model = draw_room(RoomSpec(1))
    config = RenderConfig(num_frames=8, width=160, height=120)
    pictures = [
        render_view(model, c, noise_seed=i) for i, c in enumerate(draw_cameras(model, config))
    ]
    labels = [o.label for o in make_scene(model, pictures, config, stored=False).objects]
    for index, picture in enumerate(pictures):
        Image.fromarray(picture.rgb).save(folder / "frames" / f"{index:03d}.png")
        present = [i for i in np.unique(picture.raster.ids).tolist() if i > 0]
        np.savez(
            folder / "features" / f"{index:06d}.npz",
            depth=picture.raster.depth,
            world_from_cam=picture.camera.world_from_cam,
            intrinsics=picture.camera.intrinsics,
            masks=np.stack([picture.raster.ids == i for i in present]),
            labels=np.array([labels[i - 1] for i in present]),
            scores=np.full(len(present), 0.9),
        )
    (folder / "features" / "meta.json").write_text('{"metric_depth": true, "metric_poses": true}')
    return folder


def test_frames_to_questions(command, clip, tmp_path, capsys):
    arguments = ["--frames-dir", f"{clip}/frames", "--precomputed", f"{clip}/features"]
    out = tmp_path / "scenes"
    assert command.main([*arguments, "--name", "room", "--out", str(out)]) == 0
    assert "lifted/room: 8 frames in metres, level" in capsys.readouterr().out
    scene = load_scene(out / "lifted" / "room")
    assert load_rgb(scene, scene.frames[0]).shape == (120, 160, 3)
    assert load_instances(scene, scene.frames[0]).max() <= len(scene.objects)
    plan = make_plan("left_right,dist_abs,vsi_obj_size,cam_motion", per_task=4)
    summary = synthesize(out, tmp_path / "rows", plan, executor="serial")
    assert summary.rows > 0
    assert summary.failed_scenes == {}


def test_single_image_to_questions(command, clip, tmp_path):
    """Single-view tasks run unchanged; what needs several views, time or a room finds nothing."""
    folder = tmp_path / "one"
    folder.mkdir()
    best = max(range(8), key=lambda i: len(np.load(clip / "features" / f"{i:06d}.npz")["labels"]))
    features = (clip / "features" / f"{best:06d}.npz").read_bytes()
    (folder / "000000.npz").write_bytes(features)
    (folder / "meta.json").write_text((clip / "features" / "meta.json").read_text())
    out = tmp_path / "scenes"
    image = f"{clip}/frames/{best:03d}.png"
    arguments = ["--image", image, "--precomputed", str(folder), "--name", "photo"]
    assert command.main([*arguments, "--out", str(out)]) == 0
    scene = load_scene(out / "lifted" / "photo")
    assert len(scene.frames) == 1
    assert len(scene.objects) >= 3
    synthesize(out, tmp_path / "rows", make_plan("all", per_task=3), executor="serial")
    manifest = json.loads((tmp_path / "rows" / "manifest.json").read_text())
    made = {task for task, counts in manifest["counters"].items() if counts.get("rows")}
    assert {"depth_order", "is_count", "size_abs"} & made
    assert not made & {"mv_dist_abs", "cam_motion", "corr_point", "vsi_room_size", "vsti_cam_disp"}


def test_errors_are_one_line(command, clip, tmp_path, capsys):
    def fails(*arguments):
        assert command.main([*arguments, "--name", "x", "--out", str(tmp_path / "o")]) == 2
        return capsys.readouterr().err

    frames = ["--frames-dir", f"{clip}/frames"]
    assert "--depth or --depth-pro, --detector, --segmenter" in fails(*frames)
    assert "meta.json: missing" in fails(*frames, "--precomputed", str(tmp_path))
    assert "no jpg or png" in fails("--frames-dir", str(tmp_path), "--precomputed", "x")
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    assert "cannot be decoded" in fails("--video", str(tmp_path / "broken.mp4"))
    (tmp_path / "poses.npz").write_bytes(b"")
    neural = ["--depth", "d", "--detector", "d", "--segmenter", "s", "--labels", "chair"]
    gone = fails(*frames, *neural, "--poses", str(tmp_path / "poses.npz"))
    assert "BackendUnavailableError: AutoModelForDepthEstimation from 'd'" in gone


def test_videos_are_sampled_by_time(command, tmp_path, monkeypatch):
    with av.open(str(tmp_path / "clip.mp4"), "w") as video:
        stream = video.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(30):
            image = np.full((48, 64, 3), 8 * index, np.uint8)
            video.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        video.mux(stream.encode(None))
    images, times = command.decode_video(tmp_path / "clip.mp4", 2.0)
    assert times == pytest.approx([0.0, 0.5, 1.0, 1.5, 2.0, 2.5])
    assert images[3].mean() == pytest.approx(8 * 15, abs=6)
    monkeypatch.setattr(command, "MAX_BYTES", 4 * 48 * 64 * 3)
    with pytest.raises(ConfigError, match=r"clip\.mp4 at --fps 2: 5 frames of 64x48 pixels"):
        command.decode_video(tmp_path / "clip.mp4", 2.0)
    for index in range(5):
        Image.fromarray(images[index]).save(tmp_path / f"{index}.png")
    arguments = ["--frames-dir", str(tmp_path), "--name", "x", "--out", "x"]
    with pytest.raises(ConfigError, match="5 frames of 64x48 pixels"):
        command.read_frames(command.parse_arguments(arguments))


def test_times_count_from_the_first_frame(command, tmp_path):
    """Cut clips keep the clock of the long video."""
    with av.open(str(tmp_path / "cut.mkv"), "w") as video:
        stream = video.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(20):
            frame = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")
            frame.pts = 100 + index
            video.mux(stream.encode(frame))
        video.mux(stream.encode(None))
    with av.open(str(tmp_path / "cut.mkv")) as video:
        assert next(video.decode(video=0)).time == pytest.approx(10.0)
    assert command.decode_video(tmp_path / "cut.mkv", 2.0)[1] == pytest.approx([0.0, 0.5, 1.0, 1.5])


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ("--frames-dir f --fps 0", "--fps: needs a number above 0, got '0'"),
        ("--image i --camera 500,500,320", "--camera: needs fx,fy,cx,cy in pixels"),
        ("--image i --camera 0,500,320,240", "fx and fy above 0"),
        ("--video v --captions", "--captions needs --endpoint"),
        ("--video v --depth a --depth-pro b", "--depth has no effect beside --depth-pro"),
        ("--video v --hfov 60", "--hfov is for --image"),
        ("--video v --camera 500,500,320,240", "--camera is for --image"),
        ("--image i --poses p", "--poses is for videos"),
        ("--video v --precomputed f --labels chair", "--labels has no effect beside --precomputed"),
    ],
)
def test_malformed_and_useless_options_are_refused(command, capsys, options, problem):
    with pytest.raises(SystemExit, match="2"):
        command.parse_arguments([*options.split(), "--name", "x", "--out", "x"])
    assert problem in capsys.readouterr().err


def test_real_video_and_real_walk(command, real_dir):
    """A real clip (398x224, 3 fps, 144.7 s) and real frames of a walk: what would be lifted."""
    images, times = command.decode_video(
        real_dir / "qwen3vl_finetune" / "demo" / "videos" / "v_rBMQFpHspmo.mp4", 0.1
    )
    assert images.shape[1:] == (224, 398, 3)
    assert len(times) == 15
    assert np.diff(times) == pytest.approx([10.0] * 14, abs=0.4)
    folder = str(real_dir / "vlm3r_arkit_47334096")
    arguments = command.parse_arguments(["--frames-dir", folder, "--name", "x", "--out", "x"])
    images, times = command.read_frames(arguments)
    assert images.shape == (12, 640, 480, 3)
    chosen = choose_keyframes(images, 4)
    assert len(chosen) == 4
    assert all(3 * i <= index < 3 * (i + 1) for i, index in enumerate(chosen))


@pytest.mark.slow
def test_real_photo_through_tiny_models(command, real_dir, tmp_path, capsys, monkeypatch):
    """A real room photo with its real calibration; the weights are random, so only the path is tested."""
    from tests.unit.scenes.test_hf_backends import (
        save_depth_anything,
        save_grounding_dino,
        save_sam2,
    )

    monkeypatch.setattr(hf_backends, "BOX_THRESHOLD", 0.0)
    monkeypatch.setattr(hf_backends, "TEXT_THRESHOLD", 0.0)
    folder = real_dir / "qwen3vl_spatial_understanding"
    info = json.loads((folder / "cam_infos.json").read_text())["lounge.jpg"]
    save_depth_anything(tmp_path / "depth", "metric")
    save_grounding_dino(tmp_path / "dino")
    save_sam2(tmp_path / "sam2")
    lens = ",".join(str(info[key]) for key in ("fx", "fy", "cx", "cy"))
    arguments = [
        "--image", f"{folder}/lounge.jpg", "--camera", lens, "--labels", "chair, sofa, table",
        "--depth", f"{tmp_path}/depth", "--detector", f"{tmp_path}/dino", "--segmenter", f"{tmp_path}/sam2",
        "--name", "lounge", "--out", f"{tmp_path}/scenes", "--features", f"{tmp_path}/features",
    ]  # fmt: skip
    assert command.main(arguments) == 0
    first = capsys.readouterr().out.partition("lifted/lounge")[2]
    assert first
    scene = load_scene(tmp_path / "scenes" / "lifted" / "lounge")
    assert load_rgb(scene, scene.frames[0]).shape == (530, 730, 3)
    assert scene.frames[0].intrinsics[0, 0] == pytest.approx(info["fx"])
    stored = sorted((tmp_path / "features").iterdir())
    assert command.main(arguments) == 0  # everything comes from the store
    assert capsys.readouterr().out.partition("lifted/lounge")[2] == first
    assert sorted((tmp_path / "features").iterdir()) == stored
