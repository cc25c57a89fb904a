"""Colours, textures and lights of procedural rooms, all drawn from a seed."""

from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt
from numpy.random import Generator, Philox
from scipy import ndimage

from spatialvlm.scenes.render.shade import TextureBank
from spatialvlm.scenes.transforms import Array

Split = Literal["train", "val", "test"]

# sRGB. Any two differ by at least 25 in CIE76 delta E (tested).
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (208, 30, 38),
    "orange": (244, 128, 20),
    "yellow": (250, 215, 50),
    "green": (40, 150, 60),
    "cyan": (60, 205, 210),
    "blue": (35, 75, 200),
    "purple": (125, 50, 165),
    "pink": (245, 140, 190),
    "brown": (125, 78, 42),
    "black": (32, 32, 35),
    "gray": (135, 138, 142),
    "white": (243, 243, 240),
}
SATURATED = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")

TEXTURES = (
    "plain",
    "wood",
    "planks",
    "tiles",
    "carpet",
    "fabric",
    "plaster",
    "stripes",
    "books",
    "painting",
    "leaves",
    "metal",
    "cardboard",
    "rug",
    "marble",
    "bricks",
)
TEXTURE_INDEX = {name: index for index, name in enumerate(TEXTURES)}
TILE_PX = 512
TEXTURE_SEEDS: dict[str, tuple[int, ...]] = {"train": (11, 12), "val": (21,), "test": (31,)}
"""Texture banks per split; a bank never occurs in two splits."""


def rng_for(*key: object) -> Generator:
    """Random generator that depends on nothing but ``key``."""
    import hashlib

    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()
    return Generator(Philox(key=int.from_bytes(digest, "little")))


def linear(color: str | tuple[int, int, int]) -> tuple[float, float, float]:
    """SRGB 0..255 to linear reflectance."""
    rgb = np.asarray(COLORS[color] if isinstance(color, str) else color) / 255
    r, g, b = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4).tolist()
    return r, g, b


def lab(color: str | tuple[int, int, int]) -> Array:
    """CIE L*a*b* (D65) of an sRGB colour."""
    matrix = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    xyz = matrix @ np.array(linear(color)) / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def jittered(color: str, rng: Generator, amount: float = 0.06) -> tuple[float, float, float]:
    """Linear colour close to a named one."""
    r, g, b = np.clip(np.array(linear(color)) * rng.uniform(1 - amount, 1 + amount, 3), 0.004, 0.95)
    return float(r), float(g), float(b)


def _noise(rng: Generator, cells: tuple[int, int], size: int = TILE_PX) -> Array:
    """Tiling value noise ``[size, size]`` in -1..1 with ``cells`` (rows, columns) grid cells."""
    grid = rng.uniform(-1, 1, cells)
    for axis, count in enumerate(cells):
        at = np.arange(size) * count / size
        low, share = at.astype(int), at % 1
        share = share[:, None] if axis == 0 else share
        grid = (
            np.take(grid, low, axis) * (1 - share) + np.take(grid, (low + 1) % count, axis) * share
        )
    return grid


def _fractal(rng: Generator, rows: int, columns: int, octaves: int = 4) -> Array:
    total = np.zeros((TILE_PX, TILE_PX))
    for octave in range(octaves):
        scale = 2**octave
        cells = (min(rows * scale, TILE_PX), min(columns * scale, TILE_PX))
        total += _noise(rng, cells) * 0.5**octave
    return total


def _cells(rows: int, columns: int, shift: float = 0.0) -> tuple[Array, Array, Array, Array]:
    """Index of the brick at every pixel and the distance (in pixels) to its edges."""
    y, x = np.mgrid[0:TILE_PX, 0:TILE_PX].astype(float)
    height, width = TILE_PX / rows, TILE_PX / columns
    row = (y // height).astype(int)
    moved = (x + shift * width * (row % max(1, round(1 / shift)) if shift else 0)) % TILE_PX
    column = (moved // width).astype(int)
    edge_y = np.minimum(y % height, height - y % height)
    edge_x = np.minimum(moved % width, width - moved % width)
    return row, column, edge_x, edge_y


@lru_cache(maxsize=4)
def texture_bank(seed: int) -> TextureBank:
    """All textures of :data:`TEXTURES`, drawn from ``seed``."""
    rng = rng_for("textures", seed)
    grain = 1 + 0.10 * _fractal(rng, 96, 3) + 0.05 * _fractal(rng, 12, 2)
    fine = 1 + 0.10 * rng.uniform(-1, 1, (TILE_PX, TILE_PX))
    tiles: dict[str, Array] = {"plain": np.ones((TILE_PX, TILE_PX)), "wood": grain}

    row, column, edge_x, edge_y = _cells(16, 2, shift=0.38)
    tone = rng.uniform(0.78, 1.12, (16, 4))
    planks = tone[row, column] * (1 + 0.6 * (np.roll(grain, 37, axis=1) - 1))
    tiles["planks"] = np.where((edge_y < 0.8) | (edge_x < 0.8), 0.5 * planks, planks)

    row, column, edge_x, edge_y = _cells(6, 6)
    squares = rng.uniform(0.93, 1.05, (6, 6))[row, column] * (1 + 0.04 * _fractal(rng, 8, 8))
    tiles["tiles"] = np.where((edge_x < 1.3) | (edge_y < 1.3), 0.68, squares)

    tiles["carpet"] = fine * (1 + 0.10 * _fractal(rng, 10, 10))
    y, x = np.mgrid[0:TILE_PX, 0:TILE_PX]
    weave = 1 + 0.07 * np.sign(np.sin(x * np.pi / 2 + 0.3)) * np.sign(np.sin(y * np.pi / 2 + 0.3))
    tiles["fabric"] = weave * (1 + 0.06 * _fractal(rng, 6, 6)) * (1 + 0.3 * (fine - 1))
    tiles["plaster"] = 1 + 0.025 * _fractal(rng, 12, 12) + 0.012 * _fractal(rng, 128, 128, 2)
    tiles["stripes"] = np.where((x // 32) % 2 == 0, 1.0, 0.90) * (1 + 0.02 * _fractal(rng, 16, 16))
    tiles["metal"] = 1 + 0.05 * _fractal(rng, 2, 128, 3)
    tiles["cardboard"] = (1 + 0.05 * _fractal(rng, 24, 6)) * np.where(y % 12 < 1, 0.95, 1.0)
    veins = np.abs(_fractal(rng, 3, 3, 5))
    tiles["marble"] = 1 - 0.28 * np.exp(-veins / 0.05) + 0.03 * _fractal(rng, 8, 8)
    row, column, edge_x, edge_y = _cells(24, 8, shift=0.5)
    bricks = rng.uniform(0.82, 1.08, (24, 9))[row, column] * (1 + 0.08 * _fractal(rng, 40, 40))
    tiles["bricks"] = np.where((edge_x < 1.5) | (edge_y < 1.5), 0.62, bricks)
    leaves = _fractal(rng, 20, 20, 3)
    tiles["leaves"] = np.clip(1 + 0.65 * leaves, 0.3, 1.9)
    ring = np.abs(((x % 256) - 128) / 128), np.abs(((y % 256) - 128) / 128)
    tiles["rug"] = np.where((ring[0] + ring[1]) % 0.5 < 0.25, 1.12, 0.72) * fine

    stack = np.empty((len(TEXTURES), TILE_PX, TILE_PX, 3), dtype=np.uint8)
    for index, name in enumerate(TEXTURES):
        tile = (
            {"books": _books, "painting": _painting}[name](rng)
            if name not in tiles
            else tiles[name]
        )
        factors = tile if tile.ndim == 3 else tile[..., None]
        stack[index] = np.clip(np.round(factors * 128), 0, 255)
    return TextureBank.from_tiles(stack)


def _books(rng: Generator) -> Array:
    """Rows of book spines along u; they multiply a light base colour."""
    names = [name for name in COLORS if name != "white"]
    strip = np.zeros((TILE_PX, 3))
    at = 0
    while at < TILE_PX:
        width = int(rng.integers(6, 13))
        color = np.array(COLORS[names[int(rng.integers(len(names)))]]) / 255
        strip[at : at + width] = (0.25 + 0.75 * color) * rng.uniform(0.5, 0.95)
        strip[at : at + 1] *= 0.35
        at += width
    image = np.repeat(strip[None], TILE_PX, axis=0)
    image[(np.arange(TILE_PX) % 76 > 52) & (np.arange(TILE_PX) % 76 < 58)] *= 1.35
    return image


def _painting(rng: Generator) -> Array:
    """Abstract canvas: bands of colour with soft borders."""
    image = np.ones((TILE_PX, TILE_PX, 3))
    for index in range(6):
        mask = np.clip(3.0 * _fractal(rng, 5, 5, 3) - 0.6 * (index % 3), 0, 1)[..., None]
        color = np.array(linear(SATURATED[int(rng.integers(len(SATURATED)))])) * 1.4 + 0.05
        image = image * (1 - mask) + color * mask
    return image


def contact_map(
    blocked: npt.NDArray[np.bool_], cell_m: float, reach_m: float = 0.13
) -> npt.NDArray[np.float32]:
    """Share of blocked surroundings of every floor cell: walls and furniture, blurred."""
    smooth: npt.NDArray[np.float32] = ndimage.gaussian_filter(
        blocked.astype(np.float32), reach_m / cell_m, mode="nearest"
    )
    return smooth
