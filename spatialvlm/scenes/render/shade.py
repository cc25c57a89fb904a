"""Colour of rasterised pixels: textures, point lights with soft shadows, ambient light, sensor."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from spatialvlm.scenes.cameras import Camera
from spatialvlm.scenes.render.mesh import Mesh
from spatialvlm.scenes.render.raster import Raster, rasterise

Float32 = npt.NDArray[np.float32]
UInt8 = npt.NDArray[np.uint8]

TILE_M = 2.0
"""World size of one texture tile."""
SHADOW_SIZE = 512
SHADOW_FOV_DEG = 152.0
SHADOW_SHARPNESS = 22.0
"""Exponent per metre of the exponential shadow map (Annen et al. 2008); higher = harder edges."""
SHADOW_BIAS = 0.015
AMBIENT_FALLOFF_M = 0.22
"""Height over which contact shadows on the lower ends of walls and furniture fade."""


@dataclass(frozen=True, eq=False)
class TextureBank:
    """Tiling modulation textures with mip levels.

    Args:
        levels: Per mip level ``[num_textures, S, S, 3]`` uint8; 128 leaves the colour unchanged.
    """

    levels: tuple[UInt8, ...]

    @classmethod
    def from_tiles(cls, tiles: UInt8) -> "TextureBank":
        """Add the mip levels to tiles ``[num_textures, S, S, 3]``."""
        levels = [tiles]
        while levels[-1].shape[1] > 8:
            a = levels[-1].astype(np.uint16)
            mean = a[:, ::2, ::2] + a[:, 1::2, ::2] + a[:, ::2, 1::2] + a[:, 1::2, 1::2] + 2
            levels.append((mean // 4).astype(np.uint8))
        return cls(tuple(levels))

    @cached_property
    def flat(self) -> tuple[UInt8, npt.NDArray[np.int64]]:
        """All texels ``[N, 3]``, and where each level starts."""
        parts = [level.reshape(-1, 3) for level in self.levels]
        starts = np.cumsum([0, *(len(part) for part in parts[:-1])])
        return np.concatenate(parts), starts

    def sample(
        self, texture: npt.NDArray[np.int64], u: Float32, v: Float32, texel_m: Float32
    ) -> Float32:
        """Factors ``[N, 3]`` at texture coordinates in metres, from the level of the pixel's size."""
        size = self.levels[0].shape[1]
        texels, starts = self.flat
        detail = np.log2(np.maximum(texel_m * (size / TILE_M), 1.0))
        level = np.minimum((detail + 0.5).astype(np.int64), len(self.levels) - 1)
        scale = size / TILE_M
        side = size >> level
        column = (np.floor(u * scale).astype(np.int64) >> level) & (side - 1)
        row = (np.floor(v * scale).astype(np.int64) >> level) & (side - 1)
        picked = texels[starts[level] + (texture * side + row) * side + column]
        factors: Float32 = picked.astype(np.float32)
        factors *= np.float32(1 / 128)
        return factors


@dataclass(frozen=True, eq=False)
class Light:
    """A point light that shines downwards and sideways from below the ceiling."""

    position: tuple[float, float, float]
    color: tuple[float, float, float]
    """Linear radiance at one metre."""
    shadow: Float32 | None = None
    """``exp(sharpness * distance below the light)`` seen straight down, blurred."""

    def with_shadow(self, mesh: Mesh) -> "Light":
        """The same light with its shadow map."""
        down = Camera(
            np.array(
                [
                    [_SHADOW_FOCAL, 0, SHADOW_SIZE / 2],
                    [0, _SHADOW_FOCAL, SHADOW_SIZE / 2],
                    [0, 0, 1],
                ]
            ),
            np.array(
                [
                    [1.0, 0, 0, self.position[0]],
                    [0, -1, 0, self.position[1]],
                    [0, 0, -1, self.position[2]],
                    [0, 0, 0, 1],
                ]
            ),
            SHADOW_SIZE,
            SHADOW_SIZE,
        )
        depth = rasterise(mesh, down).depth
        depth[depth == 0] = 3.5
        blurred = np.exp(SHADOW_SHARPNESS * np.minimum(depth, 3.5))
        for axis in (0, 1):  # not uniform_filter: its running sum loses the small values
            blurred = ndimage.correlate1d(blurred, [0.25, 0.5, 0.25], axis=axis, mode="nearest")
        return Light(self.position, self.color, blurred)

    def lit(self, dx: Float32, dy: Float32, below: Float32) -> Float32:
        """Share of the light that reaches points at this offset, 0..1."""
        assert self.shadow is not None
        safe = np.maximum(below, 0.02)
        u = dx * (_SHADOW_FOCAL / safe) + (SHADOW_SIZE / 2 - 0.5)
        v = dy * (-_SHADOW_FOCAL / safe) + (SHADOW_SIZE / 2 - 0.5)
        last = SHADOW_SIZE - 2
        inside = (u >= 0) & (v >= 0) & (u < last) & (v < last)
        np.clip(u, 0, last, out=u)
        np.clip(v, 0, last, out=v)
        column, row = u.astype(np.int32), v.astype(np.int32)
        u -= column
        v -= row
        flat, at = self.shadow.ravel(), row * SHADOW_SIZE + column
        upper = flat[at] * (1 - u) + flat[at + 1] * u
        lower = flat[at + SHADOW_SIZE] * (1 - u) + flat[at + SHADOW_SIZE + 1] * u
        stored = upper * (1 - v) + lower * v
        biased = np.minimum(safe * (1 - SHADOW_BIAS) - 0.02, 3.5)
        lit: Float32 = np.minimum(stored * np.exp(-SHADOW_SHARPNESS * biased), 1.0)
        lit[~inside] = 1.0
        return lit


_SHADOW_FOCAL = SHADOW_SIZE / 2 / np.tan(np.radians(SHADOW_FOV_DEG) / 2)


@dataclass(frozen=True, eq=False)
class Lighting:
    """All light of a scene, and the sensor that sees it."""

    lights: tuple[Light, ...]
    ambient: tuple[float, float, float]
    contact: Float32
    """``[X, Y]`` share of blocked surroundings on the floor, 0..1."""
    contact_origin: tuple[float, float]
    contact_cell_m: float
    floor_z: float = 0.0
    exposure: float = 1.0
    noise: float = 0.0
    """Standard deviation of the sensor noise in 8-bit levels."""


def shade(
    raster: Raster,
    mesh: Mesh,
    camera: Camera,
    lighting: Lighting,
    textures: TextureBank,
    noise_seed: int = 0,
) -> UInt8:
    """Colour image ``[H, W, 3]`` of a rasterised view."""
    shape = raster.faces.shape
    face = np.maximum(raster.faces.ravel(), 0)
    depth = raster.depth.ravel()
    x_cam = (np.arange(camera.width) + 0.5 - camera.intrinsics[0, 2]) / camera.intrinsics[0, 0]
    y_cam = (np.arange(camera.height) + 0.5 - camera.intrinsics[1, 2]) / camera.intrinsics[1, 1]
    position = []
    for i in range(3):
        row = (camera.rotation[i, 1] * y_cam + camera.rotation[i, 2]).astype(np.float32)
        direction = (camera.rotation[i, 0] * x_cam).astype(np.float32) + row[:, None]
        position.append(direction.ravel() * depth + np.float32(camera.centre[i]))
    px, py, pz = position

    uv = mesh.uv.astype(np.float32).reshape(-1, 8)
    u = uv[:, 0][face] * px + uv[:, 1][face] * py + uv[:, 2][face] * pz + uv[:, 3][face]
    v = uv[:, 4][face] * px + uv[:, 5][face] * py + uv[:, 6][face] * pz + uv[:, 7][face]
    away = np.einsum("fi,fi->f", mesh.normals, camera.centre - mesh.corners[:, 0]).astype(
        np.float32
    )
    cosine = away[face] / np.maximum(depth, 0.01)
    texel = depth / np.float32(camera.intrinsics[0, 0]) / np.sqrt(np.clip(cosine, 0.05, 1.0))
    color = textures.sample(mesh.textures[face], u, v, texel)
    color *= mesh.colors[face]

    light = _ambient(lighting, mesh, face, px, py, pz)
    for source in lighting.lights:
        sx, sy, sz = (np.float32(value) for value in source.position)
        plane = np.einsum("fi,fi->f", mesh.normals, np.array(source.position) - mesh.corners[:, 0])
        dx, dy, below = px - sx, py - sy, sz - pz
        squared = dx * dx + dy * dy + below * below
        amount = np.maximum(plane, 0.0).astype(np.float32)[face]
        # Inverse square with a soft core, times the cosine of incidence.
        amount /= np.sqrt(squared) * (0.35 + 0.22 * squared)
        amount *= source.lit(dx, dy, below)
        light += amount[:, None] * np.array(source.color, dtype=np.float32)
    light += mesh.emission[face][:, None]
    color *= light
    color *= np.float32(lighting.exposure)
    color[raster.faces.ravel() < 0] = 0.0
    return _develop(color.reshape(*shape, 3), lighting.noise, noise_seed)


def _ambient(
    lighting: Lighting,
    mesh: Mesh,
    face: npt.NDArray[np.int32],
    px: Float32,
    py: Float32,
    pz: Float32,
) -> Float32:
    """Ambient light ``[N, 3]``: more from above, less where things meet the floor."""
    contact, cell = lighting.contact, np.float32(lighting.contact_cell_m)
    column = ((px - np.float32(lighting.contact_origin[0])) / cell).astype(np.int32)
    row = ((py - np.float32(lighting.contact_origin[1])) / cell).astype(np.int32)
    np.clip(column, 0, contact.shape[0] - 1, out=column)
    np.clip(row, 0, contact.shape[1] - 1, out=row)
    height = np.maximum(pz - np.float32(lighting.floor_z), 0.0)
    blocked = contact[column, row] * np.exp(-height / np.float32(AMBIENT_FALLOFF_M))
    # Vertical faces differ a little by direction, so that neighbouring sides stay apart.
    facing = (
        0.90 + 0.10 * mesh.normals[:, 2] + 0.06 * mesh.normals[:, 0] + 0.03 * mesh.normals[:, 1]
    )
    amount = facing.astype(np.float32)[face] * (1 - np.float32(0.7) * blocked)
    ambient: Float32 = amount[:, None] * np.array(lighting.ambient, dtype=np.float32)
    return ambient


_CURVE_STEPS = 4096
_CURVE_MAX = 2.0


def _tone_curve() -> UInt8:
    linear = np.linspace(0, _CURVE_MAX, _CURVE_STEPS)
    shoulder = linear * (1 + linear / 2.2**2) / (1 + 0.45 * linear)
    return np.round(255 * np.clip(shoulder, 0, 1) ** (1 / 2.2)).astype(np.uint8)


_CURVE = _tone_curve()
_NOISE = np.random.Generator(np.random.Philox(key=7)).standard_normal(1 << 20, dtype=np.float32)


def _develop(linear: Float32, noise: float, seed: int) -> UInt8:
    """Tone curve, gamma and sensor noise."""
    np.clip(linear, 0, _CURVE_MAX, out=linear)
    linear *= (_CURVE_STEPS - 1) / _CURVE_MAX
    image = _CURVE[linear.astype(np.int16)]
    if noise <= 0:
        return image
    start = (seed * 7919) % (1 << 19)
    pattern = np.resize(_NOISE[start:], image.shape) * np.float32(noise)
    noisy: UInt8 = np.clip(image + pattern + 0.5, 0, 255).astype(np.uint8)
    return noisy
