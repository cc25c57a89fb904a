"""Importers of raw scans: ScanNet, ScanNet++, ARKitScenes, Hypersim, each on files in its own layout.

One small world (two boxes on a floor, two cameras) is written in every format; what comes back must be
that world, whatever the axes, units and pixel conventions of the format.
"""

import json
import struct
import zlib
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

from spatialvlm.errors import ImporterError, SceneSchemaError
from spatialvlm.scenes.boxes import Box
from spatialvlm.scenes.cameras import Camera
from spatialvlm.scenes.importers import arkitscenes, hypersim, scannet, scannetpp
from spatialvlm.scenes.importers.common import ImportOptions, ImportReport, rebase
from spatialvlm.scenes.ply import read_vertices
from spatialvlm.scenes.importers.sens import SensReader
from spatialvlm.scenes.io import load_depth, load_instances, load_rgb, load_scene, save_scene
from spatialvlm.scenes.render.raycast import cast_boxes
from spatialvlm.scenes.transforms import invert_rigid, rigid, rz

BOXES = [
    Box.upright((2.5, 0.4, 0.45), (0.9, 0.6, 0.9), 0.3),
    Box.upright((2.2, -0.9, 0.3), (0.8, 0.5, 0.6), -0.5),
]
FLOOR = Box.upright((0, 0, -0.05), (12, 12, 0.1))
LABELS = ("chair", "table")
WIDTH, HEIGHT = 64, 48


@dataclass
class View:
    camera: Camera
    depth: np.ndarray
    ids: np.ndarray


def views():
    made = []
    for heading in (0.0, -25.0):
        camera = Camera.look(
            (0.2, 0.1, 1.4), heading, -20.0, hfov_deg=80, width=WIDTH, height=HEIGHT
        )
        depth, ids = cast_boxes([*BOXES, FLOOR], camera)
        ids[ids == 3] = 0
        made.append(View(camera, np.where(depth > 0, depth, 6.0), ids))
    return made


def picture(path, color=120):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((HEIGHT, WIDTH, 3), color, np.uint8)).save(path)


def check_world(scene, tmp_path, size_tolerance=1e-5):
    """The imported scene is the small world, in memory and after a round trip through its file."""
    save_scene(rebase(scene, tmp_path / "imported"), tmp_path / "imported")
    scene = load_scene(tmp_path / "imported")
    assert [o.label for o in scene.objects] == list(LABELS)
    for item, box in zip(scene.objects, BOXES, strict=True):
        np.testing.assert_allclose(item.center, box.center, atol=size_tolerance)
        nearest = np.abs(item.box.corners[:, None] - box.corners[None]).max(axis=2).min(axis=1)
        assert nearest.max() < 2 * size_tolerance
    for frame, view in zip(scene.frames, views(), strict=True):
        np.testing.assert_allclose(
            frame.camera.world_from_cam, view.camera.world_from_cam, atol=1e-4
        )
        np.testing.assert_allclose(frame.camera.intrinsics, view.camera.intrinsics, atol=1e-3)
        assert load_rgb(scene, frame).shape == (HEIGHT, WIDTH, 3)
        if frame.depth is not None:
            np.testing.assert_allclose(load_depth(scene, frame), view.depth, atol=2e-3)
        if frame.instance_map is not None:
            np.testing.assert_array_equal(load_instances(scene, frame), view.ids)
        for vis in frame.visible:
            assert vis.in_frustum_frac < 0.3 or vis.vis_frac > 0.2
    assert {v.obj for v in scene.frames[0].visible if v.state == "visible"} == {0, 1}


ALIGN = rigid(rz(0.7), (1.0, -2.0, 0.3))


def write_ply(path, vertices, binary=True):
    header = f"ply\nformat {'binary_little_endian' if binary else 'ascii'} 1.0\nelement vertex {len(vertices)}\n"
    header += (
        "property float x\nproperty float y\nproperty float z\nproperty uchar red\nend_header\n"
    )
    if binary:
        table = np.zeros(
            len(vertices), dtype=[("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("red", "u1")]
        )
        for i, axis in enumerate("xyz"):
            table[axis] = vertices[:, i]
        body = table.tobytes()
    else:
        body = "".join(f"{x} {y} {z} 7\n" for x, y, z in vertices).encode()
    path.write_bytes(header.encode() + body)


def write_scannet(root, *, exported=False, poses=None):
    """A scan in raw (not axis-aligned) coordinates."""
    name = "scene9000_01"
    folder = root / "scans" / name
    folder.mkdir(parents=True)
    numbers = " ".join(str(v) for v in ALIGN.ravel())
    (folder / f"{name}.txt").write_text(
        f"colorHeight = {HEIGHT}\naxisAlignment = {numbers}\nsceneType = Office\n"
    )
    rng = np.random.default_rng(0)
    points, segments = [], []
    for index, box in enumerate([*BOXES, FLOOR]):
        cloud = rng.uniform(-0.5, 0.5, (1500, 3))
        cloud[np.arange(1500), rng.integers(0, 3, 1500)] = rng.choice([-0.5, 0.5], 1500)
        if box is FLOOR:
            axis = np.linspace(-0.5, 0.5, 80)
            cloud = np.c_[np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2), np.full(6400, 0.5)]
        points.append(
            np.concatenate([(cloud * box.size) @ box.rotation.T + box.center, box.corners])
        )
        segments += [10 * index] * len(points[-1])
    raw = np.concatenate(points) @ ALIGN[:3, :3] - ALIGN[:3, 3] @ ALIGN[:3, :3]
    write_ply(folder / f"{name}_vh_clean_2.ply", raw)
    (folder / f"{name}_vh_clean_2.0.010000.segs.json").write_text(
        json.dumps({"segIndices": segments})
    )
    groups = [
        {"objectId": 3 + i, "label": label, "segments": [10 * i]} for i, label in enumerate(LABELS)
    ]
    (folder / f"{name}.aggregation.json").write_text(json.dumps({"segGroups": groups}))
    k = np.eye(4)
    k[:3, :3] = views()[0].camera.intrinsics
    k[:2, 2] -= 0.5
    raw_poses = (
        [invert_rigid(ALIGN) @ v.camera.world_from_cam for v in views()] if poses is None else poses
    )
    if exported:
        for sub in ("pose", "depth", "intrinsic", "instance-filt"):
            (folder / sub).mkdir()
        np.savetxt(folder / "intrinsic" / "intrinsic_color.txt", k)
        for index, (view, pose) in enumerate(zip(views(), raw_poses, strict=True)):
            picture(folder / "color" / f"{index}.jpg")
            np.savetxt(folder / "pose" / f"{index}.txt", pose)
            Image.fromarray((view.depth * 1000).round().astype(np.uint16)).save(
                folder / "depth" / f"{index}.png"
            )
            native = np.where(view.ids > 0, view.ids + 3, 0).astype(np.uint8)  # objectId + 1
            Image.fromarray(native).save(folder / "instance-filt" / f"{index}.png")
        return folder
    picture(root / "one.jpg")
    jpeg = (root / "one.jpg").read_bytes()
    identity = np.eye(4, dtype="<f4").tobytes()
    data = (
        struct.pack("<IQ", 4, 5)
        + b"FAKE!"
        + k.astype("<f4").tobytes()
        + identity
        + k.astype("<f4").tobytes()
    )
    data += identity + struct.pack("<2i4IfQ", 2, 1, WIDTH, HEIGHT, WIDTH, HEIGHT, 1000.0, 2)
    for index, (view, pose) in enumerate(zip(views(), raw_poses, strict=True)):
        blob = zlib.compress((view.depth * 1000).round().astype("<u2").tobytes())
        data += np.asarray(pose).astype("<f4").tobytes()
        data += struct.pack("<4Q", 500_000 * (index + 1), 0, len(jpeg), len(blob)) + jpeg + blob
    (folder / f"{name}.sens").write_bytes(data)
    return folder


@pytest.mark.parametrize("exported", [False, True])
def test_scannet(tmp_path, exported):
    write_scannet(tmp_path / "raw", exported=exported)
    report = ImportReport()
    options = ImportOptions(media=tmp_path / "media")
    (scene,) = scannet.iter_scenes(tmp_path / "raw", options, report)
    assert (scene.scene_id, scene.room_id) == ("scannet/scene9000_01", "scannet/scene9000")
    assert scene.frames[0].time_s == (None if exported else 0.5)
    assert (scene.frames[0].instance_map is not None) is exported
    # Segment clouds of 1,500 points with the exact corners: percentiles trim half a percent of height.
    check_world(scene, tmp_path, size_tolerance=0.01)
    assert scene.room.area_m2 == pytest.approx(144, rel=0.02)


def test_scannet_lost_frames_and_damage(tmp_path):
    lost = [np.full((4, 4), -np.inf)] * 2
    folder = write_scannet(tmp_path / "lost", poses=lost)
    report = ImportReport()
    with pytest.raises(SceneSchemaError, match="no usable frame"):
        list(scannet.iter_scenes(tmp_path / "lost", ImportOptions(media=tmp_path / "m"), report))
    assert report.counters["bad_pose"] == 2
    sens = folder / "scene9000_01.sens"
    data = sens.read_bytes()
    sens.write_bytes(data[:-10])
    with (
        SensReader(sens) as reader,
        pytest.raises(ImporterError, match=rf"offset {len(data) - 10}, 10 bytes"),
    ):
        list(reader)
    sens.write_bytes(struct.pack("<I", 3) + data[4:])
    with pytest.raises(ImporterError, match="version 3"):
        SensReader(sens)
    (folder / "scene9000_01.aggregation.json").unlink()
    with pytest.raises(ImporterError, match=r"aggregation\.json: missing"):
        list(scannet.iter_scenes(tmp_path / "lost", ImportOptions(), ImportReport()))


def test_ply(tmp_path):
    vertices = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    for binary in (True, False):
        write_ply(tmp_path / "a.ply", vertices, binary)
        np.testing.assert_allclose(read_vertices(tmp_path / "a.ply"), vertices, atol=1e-6)
        data = (tmp_path / "a.ply").read_bytes()
        (tmp_path / "a.ply").write_bytes(data[: len(data) // 2])
        with pytest.raises(ImporterError, match=r"a\.ply"):
            read_vertices(tmp_path / "a.ply")
    (tmp_path / "a.ply").write_bytes(b"solid")
    with pytest.raises(ImporterError, match="not a PLY"):
        read_vertices(tmp_path / "a.ply")


def scannetpp_annotation(folder):
    """Boxes whose second axis is the vertical one, axes as rows."""
    groups = []
    for index, (box, label) in enumerate(zip(BOXES, LABELS, strict=True)):
        order = [0, 2, 1]
        axes = box.rotation[:, order].copy()
        axes[:, 2] *= -1
        groups.append(
            {
                "objectId": index + 1,
                "label": label,
                "obb": {
                    "centroid": box.center.tolist(),
                    "axesLengths": box.size[order].tolist(),
                    "normalizedAxes": axes.T.ravel().tolist(),
                },
            }
        )
    (folder / "scans").mkdir(parents=True)
    (folder / "scans" / "segments_anno.json").write_text(json.dumps({"segGroups": groups}))


def write_scannetpp_iphone(root, depth_form):
    folder = root / "data" / "0a1b2c3d4e"
    scannetpp_annotation(folder)
    entries, blobs = {}, []
    for index, view in enumerate(views()):
        name = f"frame_{index:06d}"
        picture(folder / "iphone" / "rgb" / f"{name}.jpg")
        entries[name] = {
            "timestamp": 0.1 * (index + 1),
            "pose": np.eye(4).tolist(),
            "aligned_pose": view.camera.world_from_cam.tolist(),
            "intrinsic": view.camera.intrinsics.tolist(),
        }
        # The depth camera has 192 x 256 pixels of the same view: nearest repeat of the small image.
        depth = view.depth[np.arange(192) // 4][:, np.arange(256) // 4]
        blobs.append(depth)
    (folder / "iphone" / "pose_intrinsic_imu.json").write_text(json.dumps(entries))
    path = folder / "iphone" / "depth.bin"
    deflate = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    if depth_form == "whole":
        raw = np.stack(blobs).astype("<f4").tobytes()
        path.write_bytes(deflate.compress(raw) + deflate.flush())
    else:
        lz4 = pytest.importorskip("lz4.block", reason="needs the extra 'scenes'")
        data = b""
        for depth in blobs:
            block = lz4.compress((depth * 1000).round().astype("<u2").tobytes(), store_size=False)
            data += struct.pack("<I", len(block)) + block
        path.write_bytes(data)
    return folder


@pytest.mark.parametrize("depth_form", ["whole", "lz4"])
def test_scannetpp_iphone(tmp_path, depth_form):
    folder = write_scannetpp_iphone(tmp_path / "raw", depth_form)
    (scene,) = scannetpp.iter_scenes(
        tmp_path / "raw", ImportOptions(media=tmp_path / "m"), ImportReport()
    )
    assert scene.scene_id == "scannetpp/0a1b2c3d4e"
    check_world(scene, tmp_path)
    if depth_form == "lz4":
        data = (folder / "iphone" / "depth.bin").read_bytes()
        (folder / "iphone" / "depth.bin").write_bytes(data[:-5])
        with pytest.raises(ImporterError, match="frame 1 ends early"):
            list(
                scannetpp.iter_scenes(
                    tmp_path / "raw", ImportOptions(media=tmp_path / "m"), ImportReport()
                )
            )


def test_scannetpp_dslr_axes(tmp_path):
    folder = tmp_path / "raw" / "0a1b2c3d4e"
    scannetpp_annotation(folder)
    k = views()[0].camera.intrinsics
    content = {
        "fl_x": k[0, 0],
        "fl_y": k[1, 1],
        "cx": k[0, 2],
        "cy": k[1, 2],
        "w": WIDTH,
        "h": HEIGHT,
        "frames": [],
    }
    for index, view in enumerate(views()):
        opengl = view.camera.world_from_cam @ np.diag([1.0, -1, -1, 1])
        content["frames"].append(
            {"file_path": f"DSC{index:05d}.JPG", "transform_matrix": opengl.tolist()}
        )
        picture(folder / "dslr" / "undistorted_images" / f"DSC{index:05d}.JPG")
    content["frames"].append({**content["frames"][0], "file_path": "DSC9.JPG", "is_bad": True})
    (folder / "dslr" / "nerfstudio").mkdir(parents=True)
    (folder / "dslr" / "nerfstudio" / "transforms_undistorted.json").write_text(json.dumps(content))
    report = ImportReport()
    (scene,) = scannetpp.iter_scenes(tmp_path / "raw", ImportOptions(), report)
    assert report.counters["bad_frame"] == 1
    assert all(frame.extra["unfiltered"] for frame in scene.frames)
    check_world(scene, tmp_path)


def rotation_vector(rotation):
    """Axis-angle of a rotation by its eigenvector (independent of the importer's formula)."""
    angle = np.arccos((np.trace(rotation) - 1) / 2)
    values, vectors = np.linalg.eig(rotation)
    axis = np.real(vectors[:, np.argmin(np.abs(values - 1))])
    sign = np.sign(
        axis
        @ [
            rotation[2, 1] - rotation[1, 2],
            rotation[0, 2] - rotation[2, 0],
            rotation[1, 0] - rotation[0, 1],
        ]
    )
    return axis * angle * sign


def write_arkit(root):
    video = "40000002"
    folder = root / "Training" / video
    frames = folder / f"{video}_frames"
    (frames / "lowres_wide_intrinsics").mkdir(parents=True)
    (frames / "lowres_depth").mkdir()
    data = []
    for index, (box, label) in enumerate(zip(BOXES, LABELS, strict=True)):
        obb = {
            "centroid": box.center.tolist(),
            "axesLengths": box.size.tolist(),
            "normalizedAxes": box.rotation.T.ravel().tolist(),
        }
        data.append({"uid": f"u{index}", "label": label, "segments": {"obbAligned": obb}})
    (folder / f"{video}_3dod_annotation.json").write_text(json.dumps({"data": data}))
    lines = []
    for index, view in enumerate(views()):
        stamp = 100.0 + index / 2
        cam_from_world = view.camera.cam_from_world
        numbers = [stamp + 0.004, *rotation_vector(cam_from_world[:3, :3]), *cam_from_world[:3, 3]]
        lines.append(" ".join(f"{v:.9f}" for v in numbers))
        picture(frames / "lowres_wide" / f"{video}_{stamp:.3f}.png")
        k = view.camera.intrinsics
        text = f"{WIDTH} {HEIGHT} {k[0, 0]} {k[1, 1]} {k[0, 2] - 0.5} {k[1, 2] - 0.5}"
        (frames / "lowres_wide_intrinsics" / f"{video}_{stamp + 0.001:.3f}.pincam").write_text(text)
        depth = (view.depth * 1000).round().astype(np.uint16)
        Image.fromarray(depth).save(frames / "lowres_depth" / f"{video}_{stamp:.3f}.png")
    picture(frames / "lowres_wide" / f"{video}_105.000.png")  # no pose within 0.1 s
    (frames / "lowres_wide.traj").write_text("\n".join(lines) + "\n")
    (root / "metadata.csv").write_text(
        f"video_id,visit_id,fold,sky_direction\n{video},420001,Training,Left\n"
    )
    return frames


def test_arkitscenes(tmp_path):
    frames = write_arkit(tmp_path / "raw")
    report = ImportReport()
    (scene,) = arkitscenes.iter_scenes(tmp_path / "raw", ImportOptions(), report)
    assert (scene.scene_id, scene.room_id) == ("arkitscenes/40000002", "arkitscenes/420001")
    assert (scene.split, scene.frames[1].time_s) == ("train", 100.5)
    assert report.counters["no_pose_near_frame"] == 1
    check_world(scene, tmp_path)
    options = ImportOptions(upright=True, media=tmp_path / "m")
    (turned,) = arkitscenes.iter_scenes(tmp_path / "raw", options, ImportReport())
    assert (turned.frames[0].width, turned.frames[0].height) == (HEIGHT, WIDTH)
    before, after = (s.frames[0].vis(0) for s in (scene, turned))
    assert after.vis_frac == pytest.approx(before.vis_frac, abs=0.05)
    (frames / "lowres_wide.traj").write_text("1 2 3\n")
    with pytest.raises(ImporterError, match="3 numbers a line"):
        list(arkitscenes.iter_scenes(tmp_path / "raw", ImportOptions(), ImportReport()))


def write_hypersim(root, scale=0.0254):
    h5py = pytest.importorskip("h5py", reason="needs the extra 'scenes'")

    def write(path, values):
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(path, "w") as file:
            file.create_dataset("dataset", data=values)

    folder = root / "ai_900_001"
    detail = folder / "_detail"
    detail.mkdir(parents=True)
    (detail / "metadata_scene.csv").write_text(
        f"parameter_name,parameter_value\nmeters_per_asset_unit,{scale}\n"
    )
    # Instance 0 does not occur in any picture.
    dummy = Box.upright((9, 9, 9), (1, 1, 1))
    every = [dummy, *BOXES]
    for part, values in (
        ("extents", [b.size / scale for b in every]),
        ("orientations", [b.rotation for b in every]),
        ("positions", [b.center / scale for b in every]),
    ):
        write(detail / "mesh" / hypersim.BOX_FILE.format(part), np.array(values))
    flip = np.diag([1.0, -1.0, -1.0])
    cameras = [v.camera for v in views()]
    write(
        detail / "cam_00" / "camera_keyframe_positions.hdf5",
        np.array([c.centre / scale for c in cameras]),
    )
    write(
        detail / "cam_00" / "camera_keyframe_orientations.hdf5",
        np.array([c.rotation @ flip for c in cameras]),
    )
    for index, view in enumerate(views()):
        k = view.camera.intrinsics
        v, u = np.mgrid[0:HEIGHT, 0:WIDTH] + 0.5
        ray = view.depth * np.sqrt(
            ((u - k[0, 2]) / k[0, 0]) ** 2 + ((v - k[1, 2]) / k[1, 1]) ** 2 + 1
        )
        stem = f"frame.{index:04d}"
        write(
            folder / "images/scene_cam_00_final_hdf5" / f"{stem}.color.hdf5",
            np.full((HEIGHT, WIDTH, 3), 0.4, np.float16),
        )
        geometry = folder / "images/scene_cam_00_geometry_hdf5"
        write(geometry / f"{stem}.depth_meters.hdf5", ray.astype(np.float32))
        instances = np.where(view.ids > 0, view.ids.astype(int), -1).astype(np.int16)
        write(geometry / f"{stem}.semantic_instance.hdf5", instances)
        classes = np.array([2, 5, 7], np.int16)[view.ids]
        write(geometry / f"{stem}.semantic.hdf5", classes)
    focal = views()[0].camera.intrinsics
    table = f"scene_name,M_proj_00,M_proj_11\nai_900_001,{focal[0, 0] * 2 / (WIDTH - 1)},{focal[1, 1] * 2 / (HEIGHT - 1)}\n"
    (root / "metadata_camera_parameters.csv").write_text(table)
    return folder


def test_hypersim(tmp_path):
    folder = write_hypersim(tmp_path / "raw")
    options = ImportOptions(media=tmp_path / "m")
    (scene,) = hypersim.iter_scenes(tmp_path / "raw", options, ImportReport())
    assert (scene.scene_id, scene.room_id) == ("hypersim/ai_900_001/cam_00", "hypersim/ai_900_001")
    check_world(scene, tmp_path)
    assert 195 <= load_rgb(scene, scene.frames[0]).mean() <= 210  # 0.8 of 255
    next(folder.glob("images/*final*/*.hdf5")).write_bytes(b"broken")
    with pytest.raises(ImporterError, match=r"color\.hdf5"):
        list(hypersim.iter_scenes(tmp_path / "raw", options, ImportReport()))
