"""Pictures of rooms by Blender's Cycles (optional package ``bpy``): path-traced light for the same meshes.

Only the colour comes from here; depth, instance maps and visibility always come from the rasteriser, which sees
the same faces through the same cameras. Blender keeps one scene per process, so one renderer is in use at a time.
"""

import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from spatialvlm.errors import BackendUnavailableError
from spatialvlm.scenes.cameras import Camera
from spatialvlm.scenes.render.mesh import Mesh
from spatialvlm.scenes.render.shade import TILE_M, Lighting, TextureBank
from spatialvlm.scenes.transforms import Array

SAMPLES = 64
BOUNCES = 6
LIGHT_RADIUS_M = 0.10
APART_M = 2e-4
# A point light of P watt gives a matt surface the radiance P / (4 pi^2 d^2); ours is 1 / (0.22 d^2) far away. Light
# that bounces adds about as much again, which our ambient term stands for.
WATT_PER_UNIT = 4 * np.pi**2 / 0.22 * 0.45
BLENDER_FROM_OPENCV = np.diag([1.0, -1.0, -1.0, 1.0])


class CyclesRenderer:
    """Renders one mesh from any camera.

    Args:
        mesh: Faces with colours, textures and emission.
        lighting: Point lights and exposure; ambient light and contact shadows are left to the path tracer.
        textures: Modulation textures of the mesh.
        samples: Paths per pixel; the result is denoised.

    Raises:
        BackendUnavailableError: bpy is not installed.
    """

    def __init__(
        self, mesh: Mesh, lighting: Lighting, textures: TextureBank, *, samples: int = SAMPLES
    ) -> None:
        try:
            with _quiet():
                bpy = import_module("bpy")
        except ImportError as error:
            raise BackendUnavailableError(
                "Cycles needs Blender as a module: pip install bpy (each release fits one Python version)."
            ) from error
        self._bpy = bpy
        with _quiet():
            bpy.ops.wm.read_factory_settings(use_empty=True)
        scene = bpy.context.scene
        scene.render.engine = "CYCLES"
        scene.cycles.samples = samples
        scene.cycles.max_bounces = BOUNCES
        scene.cycles.use_denoising = samples > 1
        scene.cycles.seed = 0
        scene.render.dither_intensity = 0.0
        scene.render.image_settings.file_format = "PNG"
        scene.render.image_settings.color_mode = "RGB"
        scene.view_settings.view_transform = "Standard"
        scene.view_settings.exposure = float(np.log2(lighting.exposure))
        self._scene = scene
        self._tiles = [self._image(index, tile) for index, tile in enumerate(textures.levels[0])]
        self._materials: dict[tuple[Any, ...], Any] = {}
        corners = _apart(mesh)
        self._objects = [
            self._object(mesh, corners, int(object_id)) for object_id in np.unique(mesh.ids)
        ]
        self._ids = np.unique(mesh.ids)
        for index, light in enumerate(lighting.lights):
            self._light(index, light.position, light.color)
        lens = bpy.data.cameras.new("camera")
        self._camera = bpy.data.objects.new("camera", lens)
        scene.collection.objects.link(self._camera)
        scene.camera = self._camera

    def rgb(self, camera: Camera) -> npt.NDArray[np.uint8]:
        """Colour image ``[H, W, 3]``."""
        return self._render(camera)

    def ids(self, camera: Camera) -> npt.NDArray[np.uint16]:
        """Which object each pixel centre sees, by Cycles: a check of meshes and cameras, not for use."""
        bpy, scene = self._bpy, self._scene
        kept = [[slot.material for slot in item.material_slots] for item in self._objects]
        settings = (scene.cycles.samples, scene.cycles.use_denoising, scene.cycles.filter_width)
        for number, item in enumerate(self._objects):
            flat = bpy.data.materials.new(f"id {number}")
            flat.use_nodes = True
            flat.node_tree.nodes.clear()
            glow = flat.node_tree.nodes.new("ShaderNodeEmission")
            output = flat.node_tree.nodes.new("ShaderNodeOutputMaterial")
            high, low = divmod(number + 1, 16)  # steps of 16 levels survive the way into the PNG
            glow.inputs["Color"].default_value = ((16 * low + 8) / 255, (16 * high + 8) / 255, 0, 1)
            flat.node_tree.links.new(glow.outputs[0], output.inputs["Surface"])
            for slot in item.material_slots:
                slot.material = flat
        scene.cycles.samples, scene.cycles.use_denoising = 1, False
        scene.cycles.filter_width = 0.01
        look, exposure = scene.view_settings, scene.view_settings.exposure
        look.view_transform, look.exposure = "Raw", 0.0
        shown = self._render(camera) // 16
        look.view_transform, look.exposure = "Standard", exposure
        scene.cycles.samples, scene.cycles.use_denoising, scene.cycles.filter_width = settings
        for item, materials in zip(self._objects, kept, strict=True):
            for slot, material in zip(item.material_slots, materials, strict=True):
                slot.material = material
        known = np.append(0, self._ids).astype(np.uint16)
        found: npt.NDArray[np.uint16] = known[shown[..., 0] + 16 * shown[..., 1]]
        return found

    def _render(self, camera: Camera) -> npt.NDArray[np.uint8]:
        scene, lens = self._scene, self._camera.data
        fx, fy = camera.intrinsics[0, 0], camera.intrinsics[1, 1]
        cx, cy = camera.intrinsics[0, 2], camera.intrinsics[1, 2]
        scene.render.resolution_x, scene.render.resolution_y = camera.width, camera.height
        scene.render.pixel_aspect_x, scene.render.pixel_aspect_y = 1.0, float(fx / fy)
        lens.sensor_fit = "HORIZONTAL"
        lens.lens = float(fx / camera.width * lens.sensor_width)
        lens.shift_x = float((camera.width / 2 - cx) / camera.width)
        lens.shift_y = float((cy - camera.height / 2) / camera.width * fx / fy)
        lens.clip_start = 0.03
        self._camera.matrix_world = _matrix(camera.world_from_cam @ BLENDER_FROM_OPENCV)
        with tempfile.TemporaryDirectory() as folder:
            scene.render.filepath = str(Path(folder) / "frame.png")
            with _quiet():
                self._bpy.ops.render.render(write_still=True)
            with Image.open(scene.render.filepath) as image:
                return np.asarray(image.convert("RGB"))

    def _image(self, index: int, tile: npt.NDArray[np.uint8]) -> Any:
        """A modulation texture; Blender counts rows from below."""
        height, width = tile.shape[:2]
        image = self._bpy.data.images.new(f"texture {index}", width, height, is_data=True)
        pixels = np.ones((height, width, 4), dtype=np.float32)
        pixels[..., :3] = tile / np.float32(255)
        image.pixels.foreach_set(pixels.ravel())
        image.pack()
        return image

    def _object(self, mesh: Mesh, all_corners: Array, object_id: int) -> Any:
        """One Blender object of all faces of an instance."""
        bpy = self._bpy
        chosen = np.flatnonzero(mesh.ids == object_id)
        vertices: list[tuple[float, ...]] = []
        faces: list[list[int]] = []
        texture_at: list[npt.NDArray[np.float64]] = []
        slots: list[tuple[Any, ...]] = []
        face_slots = []
        for face in chosen:
            corners = all_corners[face]
            corners = corners[: 1 + int(np.argmax((corners == corners[-1]).all(axis=1)))]
            faces.append(list(range(len(vertices), len(vertices) + len(corners))))
            vertices += [tuple(corner) for corner in corners.tolist()]
            at = np.c_[corners, np.ones(len(corners))] @ mesh.uv[face].T / TILE_M
            texture_at.append(at)
            look = (
                *mesh.colors[face].tolist(), int(mesh.textures[face]), float(mesh.emission[face]),
            )  # fmt: skip
            if look not in slots:
                slots.append(look)
            face_slots.append(slots.index(look))
        data = bpy.data.meshes.new(f"object {object_id}")
        data.from_pydata(vertices, [], faces)
        layer = data.uv_layers.new(name="texture")
        layer.data.foreach_set("uv", np.concatenate(texture_at).astype(np.float32).ravel())
        for look in slots:
            data.materials.append(self._material(look))
        data.polygons.foreach_set("material_index", face_slots)
        data.update()
        item = bpy.data.objects.new(data.name, data)
        self._scene.collection.objects.link(item)
        return item

    def _material(self, look: tuple[Any, ...]) -> Any:
        """Matt surface: colour times texture (128 of 255 leaves the colour unchanged)."""
        if look in self._materials:
            return self._materials[look]
        *color, texture, emission = look
        material = self._bpy.data.materials.new(f"surface {len(self._materials)}")
        material.use_nodes = True
        tree = material.node_tree
        shader = next(node for node in tree.nodes if node.type == "BSDF_PRINCIPLED")
        shader.inputs["Roughness"].default_value = 0.9
        shader.inputs["Specular IOR Level"].default_value = 0.2
        picture = tree.nodes.new("ShaderNodeTexImage")
        picture.image = self._tiles[texture]
        scaled = tree.nodes.new("ShaderNodeVectorMath")
        scaled.operation = "MULTIPLY"
        scaled.inputs[1].default_value = [255 / 128 * value for value in color]
        tree.links.new(picture.outputs["Color"], scaled.inputs[0])
        tree.links.new(scaled.outputs[0], shader.inputs["Base Color"])
        if emission:
            tree.links.new(scaled.outputs[0], shader.inputs["Emission Color"])
            shader.inputs["Emission Strength"].default_value = float(emission)
        self._materials[look] = material
        return material

    def _light(
        self, index: int, position: tuple[float, float, float], color: tuple[float, float, float]
    ) -> None:
        strength = max(color)
        lamp = self._bpy.data.lights.new(f"light {index}", "POINT")
        lamp.energy = float(WATT_PER_UNIT * strength)
        lamp.color = [value / strength for value in color]
        lamp.shadow_soft_size = LIGHT_RADIUS_M
        item = self._bpy.data.objects.new(lamp.name, lamp)
        item.location = position
        self._scene.collection.objects.link(item)


def _apart(mesh: Mesh) -> Array:
    """Corners with coplanar faces moved apart by a fraction of a millimetre, later ones to the back.

    The two floors of an L-shaped room overlap; the rasteriser shows the first, a path tracer lets them shade
    each other black.
    """
    offsets = np.einsum("fi,fi->f", mesh.normals, mesh.corners[:, 0])
    planes = np.concatenate([mesh.normals, offsets[:, None]], axis=1).round(4) + 0.0
    seen: Counter[bytes] = Counter()
    back = np.zeros(len(planes))
    for face, plane in enumerate(planes):
        back[face] = APART_M * seen[plane.tobytes()]
        seen[plane.tobytes()] += 1
    moved: Array = mesh.corners - (mesh.normals * back[:, None])[:, None]
    return moved


def _matrix(matrix: npt.NDArray[np.float64]) -> Any:
    return import_module("mathutils").Matrix(matrix.tolist())


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Blender's progress lines, which it writes past Python, off the terminal."""
    kept = [os.dup(stream) for stream in (1, 2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for stream in (1, 2):
            os.dup2(nowhere, stream)
        yield
    finally:
        os.close(nowhere)
        for stream, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, stream)
            os.close(copy)
