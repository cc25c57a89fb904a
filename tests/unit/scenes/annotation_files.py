"""Small files in the layouts of EmbodiedScan, VSI-Bench / VLM-3R and VLA-3D."""

import json
import pickle

import numpy as np
from PIL import Image

from spatialvlm.scenes.boxes import Box
from spatialvlm.scenes.cameras import Camera
from spatialvlm.scenes.importers import embodiedscan, vla3d
from spatialvlm.scenes.render.raycast import cast_boxes
from spatialvlm.scenes.transforms import rigid, rx, rz
from spatialvlm.scenes.visibility import project_box


def write_embodiedscan(root, *, sample="scannet/scene9000_00", instances=None, **image_changes):
    """One scene of two frames with depth, in the released pickle layout (numpy arrays inside)."""
    align = rigid(rz(0.3), (0.5, -0.2, 0.1))
    boxes = [
        Box.upright((2.5, 0.3, 0.4), (0.8, 0.5, 0.8), 0.4),
        Box((2.0, -0.8, 1.0), (0.4, 0.4, 0.5), rx(0.05)),
    ]
    images = []
    for index, heading in enumerate((0.0, -20.0)):
        camera = Camera.look((0, 0, 1.4), heading, -15.0, hfov_deg=80, width=64, height=48)
        depth, _ = cast_boxes(boxes, camera)
        folder = root / sample.split("/")[0] / "posed_images"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((48, 64, 3), 90, np.uint8)).save(folder / f"{index:05d}.jpg")
        stored = np.where(depth > 0, depth, 6.0) * (
            4000 if sample.startswith("matterport") else 1000
        )
        Image.fromarray(stored.round().astype(np.uint16)).save(folder / f"{index:05d}.png")
        k4 = np.eye(4)
        k4[:3, :3] = camera.intrinsics
        images.append(
            {
                "img_path": f"{sample.split('/')[0]}/posed_images/{index:05d}.jpg",
                "depth_path": f"{sample.split('/')[0]}/posed_images/{index:05d}.png",
                "cam2global": np.linalg.inv(align) @ camera.world_from_cam,
                "visible_instance_ids": [0, 1],
                **({"cam2img": k4} if sample.startswith("matterport") else {}),
                **image_changes,
            }
        )
    content = {
        "metainfo": {"categories": {"chair": 1, "trash can": 2}, "dataset": "embodiedscan"},
        "data_list": [
            {
                "sample_idx": sample,
                "axis_align_matrix": align,
                "images": images,
                "instances": [
                    {
                        "bbox_3d": embodiedscan.box_values(box),
                        "bbox_label_3d": i + 1,
                        "bbox_id": 10 + i,
                    }
                    for i, box in enumerate(boxes)
                ]
                if instances is None
                else instances,
                **({} if sample.startswith("matterport") else {"cam2img": k4}),
            }
        ],
    }
    with (root / "embodiedscan_infos_train.pkl").open("wb") as file:
        pickle.dump(content, file, protocol=4)
    return boxes


def vsi_entry(rotation, lengths=(2.0, 1.0, 1.0), center=(0.0, 0.0, 0.5), **changes):
    lengths, center = np.array(lengths), np.array(center)
    reach = np.abs(rotation) @ lengths / 2
    return {
        "centroid": center.tolist(),
        "axesLengths": lengths.tolist(),
        "normalizedAxes": rotation.T.ravel().tolist(),  # rows are axes
        "min": (center - reach).tolist(),
        "max": (center + reach).tolist(),
        **changes,
    }


def write_vsi(root, boxes, **changes):
    entry = {"dataset": "scannet", "room_size": 20.5, "room_center": [0, 0, 0],
             "object_counts": {label: len(items) for label, items in boxes.items()}, "object_bbox": boxes,
             **changes}  # fmt: skip
    (root / "scannet_meta_info_val.json").write_text(json.dumps({"scene9000_00": entry}))


HEADER = list(vla3d.COLUMNS)


def write_vla(root, rows, header=HEADER, statements=None):
    folder = root / "ARKitScenes" / "40000001"
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        ",".join(header),
        *[",".join(str(row.get(name, "_")) for name in header) for row in rows],
    ]
    (folder / "40000001_object_result.csv").write_text("\n".join(lines) + "\n")
    if statements is not None:
        (folder / "40000001_referential_statements.json").write_text(
            json.dumps({"scene_name": "40000001", "regions": {"0": statements}})
        )


def vla_row(**changes):
    row = {"object_id": 0, "region_id": 0, "raw_label": "couch", "object_bbox_cx": 1, "object_bbox_cy": 2,
           "object_bbox_cz": 0.5, "object_bbox_xlength": 2, "object_bbox_ylength": 0.9,
           "object_bbox_zlength": 0.8, "object_bbox_heading": 0.5}  # fmt: skip
    return {**row, **changes}


def write_vlm3r(root, *, shift=0.0):
    """Two files as VLM-3R keeps them: boxes with instance ids, and the frames that see them.

    ``shift`` metres move the cameras away from where the 2D boxes were drawn.
    """
    box = Box.upright((2.5, 0.3, 0.4), (0.8, 0.5, 0.8), 0.4)
    camera = Camera.look((0, 0, 1.4), 0.0, -15.0, hfov_deg=80, width=64, height=48)
    depth, _ = cast_boxes([box], camera)
    for folder in ("color/train/scene9000_00", "depth/train/scene9000_00"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    frames = []
    for index in range(3):
        color = f"color/train/scene9000_00/{index:06d}.jpg"
        stored = f"depth/train/scene9000_00/{index:06d}.png"
        if index < 2:  # the third picture is listed but was never extracted
            Image.fromarray(np.full((48, 64, 3), 90, np.uint8)).save(root / color)
        millimetres = (np.where(depth > 0, depth, 6.0) * 1000).round().astype(np.uint16)
        Image.fromarray(millimetres).save(root / stored)
        pose = camera.world_from_cam.copy()
        pose[:3, 3] += pose[:3, 0] * shift
        x0, y0, x1, y1 = project_box(box, camera).bbox
        frames.append(
            {
                "frame_id": index,
                "file_path_color": color,
                "file_path_depth": stored,
                "camera_pose_camera_to_world": pose.tolist(),
                "bboxes_2d": [
                    {"instance_id": 7, "bbox_2d": [int(x0), int(y0), int(x1), int(y1)]},
                    {"instance_id": 99, "bbox_2d": [0, 0, 3, 3]},
                ],
            }
        )
    k = camera.intrinsics
    lens = {"fx": k[0, 0], "fy": k[1, 1], "cx": k[0, 2] - 0.5, "cy": k[1, 2] - 0.5}
    listed = {"camera_intrinsics": lens, "frames": frames, "img_width": 64, "img_height": 48}
    (root / "scannet_frame_metadata_train.json").write_text(json.dumps({"scene9000_00": listed}))
    entry = vsi_entry(box.rotation, box.size, box.center, instance_id=7)
    meta = {
        "dataset": "scannet",
        "object_counts": {"chair": 1},
        "object_bboxes": {"chair": [entry]},
        "room_size": 12.0,
    }
    (root / "scannet_metadata_train.json").write_text(json.dumps({"scene9000_00": meta}))
    return box, camera
