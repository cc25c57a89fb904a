"""One small world (two boxes on a floor, two cameras) written in the layout of every raw dataset."""

import json
import struct
import zlib
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

from spatialvlm.scenes.boxes import Box
from spatialvlm.scenes.cameras import Camera
from spatialvlm.scenes.importers import hypersim
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


def write_mesh(path, vertices, triangles, binary=True):
    """PLY mesh with a property after the list of corners, as scan meshes have them."""
    head = f"ply\nformat {'binary_little_endian' if binary else 'ascii'} 1.0\nelement vertex {len(vertices)}\n"
    head += "property float x\nproperty float y\nproperty float z\n"
    head += f"element face {len(triangles)}\nproperty list uchar int vertex_indices\nproperty uchar red\nend_header\n"
    if binary:
        faces = np.zeros(len(triangles), dtype=[("n", "u1"), ("v", "<i4", 3), ("red", "u1")])
        faces["n"], faces["v"] = 3, triangles
        body = np.asarray(vertices).astype("<f4").tobytes() + faces.tobytes()
    else:
        rows = [" ".join(map(str, v)) for v in np.asarray(vertices).tolist()]
        rows += [f"3 {a} {b} {c} 7" for a, b, c in np.asarray(triangles).tolist()]
        body = ("\n".join(rows) + "\n").encode()
    path.write_bytes(head.encode() + body)


def box_triangles(boxes):
    """Corners and two triangles per side of all boxes."""
    sides = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    triangles = [
        [8 * i + a, 8 * i + b, 8 * i + c]
        for i in range(len(boxes))
        for s in sides
        for a, b, c in ((s[0], s[1], s[2]), (s[0], s[2], s[3]))
    ]
    return np.concatenate([box.corners for box in boxes]), np.array(triangles)


def write_scannetpp_dslr(root, *, bad_frame=False):
    """DSLR pictures with nerfstudio transforms; no depth."""
    folder = root / "0a1b2c3d4e"
    scannetpp_annotation(folder)
    k = views()[0].camera.intrinsics
    content = {
        "fl_x": k[0, 0], "fl_y": k[1, 1], "cx": k[0, 2], "cy": k[1, 2], "w": WIDTH, "h": HEIGHT, "frames": [],
    }  # fmt: skip
    for index, view in enumerate(views()):
        opengl = view.camera.world_from_cam @ np.diag([1.0, -1, -1, 1])
        content["frames"].append(
            {"file_path": f"DSC{index:05d}.JPG", "transform_matrix": opengl.tolist()}
        )
        picture(folder / "dslr" / "undistorted_images" / f"DSC{index:05d}.JPG")
    if bad_frame:
        content["frames"].append({**content["frames"][0], "file_path": "DSC9.JPG", "is_bad": True})
    (folder / "dslr" / "nerfstudio").mkdir(parents=True)
    (folder / "dslr" / "nerfstudio" / "transforms_undistorted.json").write_text(json.dumps(content))
    return folder


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
