"""The hand room: nine boxes in a 6 m x 4 m room seen by three level cameras.

Run as a script to write ``tests/data/scenes/hand_room.json``.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from spatialvlm.scenes.cameras import Camera
from spatialvlm.scenes.io import save_scene
from spatialvlm.scenes.render.raycast import cast_boxes
from spatialvlm.scenes.schema import Frame, Object, Room, Scene
from spatialvlm.scenes.transforms import rz
from spatialvlm.scenes.visibility import frame_visibility

# label, id, center, size, yaw in degrees, has_front, symmetry, parent
OBJECTS = [
    ("sofa", "sofa", (3.0, 0.5, 0.40), (0.8, 2.0, 0.8), 90, True, "none", None),
    ("table", "table", (3.0, 2.0, 0.36), (1.2, 0.8, 0.72), 0, False, "c2", None),
    ("chair", "chair1", (3.0, 3.0, 0.45), (0.5, 0.5, 0.9), -90, True, "none", None),
    ("chair", "chair2", (4.6, 3.5, 0.40), (0.5, 0.5, 0.8), 180, True, "none", None),
    ("bookshelf", "bookshelf", (5.8, 2.0, 1.00), (0.4, 1.2, 2.0), 180, True, "none", None),
    ("lamp", "lamp", (5.5, 0.4, 0.80), (0.3, 0.3, 1.6), 0, False, "inf", None),
    ("plant", "plant", (0.4, 3.6, 0.50), (0.4, 0.4, 1.0), 0, False, "inf", None),
    ("toy box", "toy_box", (3.3, 2.0, 0.82), (0.2, 0.2, 0.2), 0, False, "c4", 1),
    ("bin", "bin", (1.2, 0.4, 0.20), (0.3, 0.3, 0.4), 0, False, "inf", None),
]
COLORS = ["red", "brown", "blue", "green", "white", "yellow", "green", "orange", "black"]
# id, centre on the ground, forward on the ground, time
CAMERAS = [
    ("F0", (0.5, 2.0), (1.0, 0.0)),
    ("F1", (1.0, 3.5), (0.8, -0.6)),
    ("F2", (4.6, 0.8), (-0.28, 0.96)),
]


def make_hand_room() -> Scene:
    """Scene record without media; visibility is measured on exactly cast depth."""
    objects = [
        Object(
            index=index,
            id=name,
            label=label,
            raw_label=label,
            label_source="hand",
            center=np.array(center),
            size=np.array(size),
            R=rz(np.radians(yaw)),
            has_front=front,
            symmetry=symmetry,
            color_name=COLORS[index],
            support_parent=parent,
            box_quality="exact",
        )
        for index, (label, name, center, size, yaw, front, symmetry, parent) in enumerate(OBJECTS)
    ]
    boxes = [item.box for item in objects]
    frames = []
    for index, (name, (x, y), (fx, fy)) in enumerate(CAMERAS):
        heading = np.degrees(np.arctan2(fy, fx))
        camera = Camera.look((x, y, 1.5), heading, hfov_deg=90.0, width=640, height=480)
        depth, ids = cast_boxes(boxes, camera)
        # Rays that miss every box end on the room; any far value says "nothing in front".
        visible = frame_visibility(boxes, camera, np.where(depth > 0, depth, 50.0), ids)
        frame = Frame(
            frame_id=name,
            rgb=None,
            width=640,
            height=480,
            intrinsics=camera.intrinsics,
            world_from_cam=camera.world_from_cam,
            time_s=float(index),
        )
        frames.append(replace(frame, visible=visible))
    return Scene(
        scene_id="rooms/hand-H",
        room_id="rooms/hand-H",
        source="rooms",
        objects=objects,
        frames=frames,
        license="Apache-2.0",
        room=Room(
            polygon_xy=[(0.0, 0.0), (6.0, 0.0), (6.0, 4.0), (0.0, 4.0)],
            floor_z=0.0,
            ceil_z=2.6,
            area_m2=24.0,
            area_method="polygon",
        ),
    )


if __name__ == "__main__":
    save_scene(make_hand_room(), Path(__file__).parents[2] / "data/scenes/hand_room.json")
