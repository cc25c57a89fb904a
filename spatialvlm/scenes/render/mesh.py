"""Meshes of convex planar polygons: boxes, tapered boxes and prisms, with colour and texture frame."""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from jaxtyping import Float

from spatialvlm.scenes.transforms import Array

MAX_CORNERS = 16
"""Most corners of one face; prisms have at most this many sides."""


@dataclass(frozen=True)
class Surface:
    """How a face looks."""

    color: tuple[float, float, float]
    """Linear reflectance, 0..1."""
    texture: int = 0
    """Index of the modulation texture; 0 is plain."""
    emission: float = 0.0
    """Light given off, in multiples of the colour."""


@dataclass(frozen=True, eq=False)
class Mesh:
    """Faces with outward normals.

    Args:
        corners: ``[F, 16, 3]`` world metres, counter-clockwise seen from outside; rows are padded by
            repeating the last corner.
        normals: ``[F, 3]`` unit length.
        ids: ``[F]`` object index + 1, 0 for the shell.
        colors: ``[F, 3]`` linear reflectance.
        textures: ``[F]`` texture index.
        emission: ``[F]``.
        uv: ``[F, 2, 4]``: texture coordinate in metres = ``uv @ (x, y, z, 1)``.
    """

    corners: Array
    normals: Array
    ids: npt.NDArray[np.uint16]
    colors: npt.NDArray[np.float32]
    textures: npt.NDArray[np.int64]
    emission: npt.NDArray[np.float32]
    uv: Array

    def __len__(self) -> int:
        return len(self.ids)

    def only(self, object_id: int) -> "Mesh":
        """The faces of one object."""
        keep = self.ids == object_id
        return Mesh(
            self.corners[keep],
            self.normals[keep],
            self.ids[keep],
            self.colors[keep],
            self.textures[keep],
            self.emission[keep],
            self.uv[keep],
        )

    def triangles(self) -> tuple[Float[np.ndarray, "T 3 3"], npt.NDArray[np.int64]]:
        """Fan triangulation and the face every triangle comes from."""
        triangles, faces = [], []
        for face, corners in enumerate(self.corners):
            distinct = 1 + int(np.argmax((corners == corners[-1]).all(axis=1)))
            for i in range(1, distinct - 1):
                triangles.append(corners[[0, i, i + 1]])
                faces.append(face)
        return np.array(triangles), np.array(faces)


@dataclass
class MeshBuilder:
    """Collects faces. Shapes are given in a local frame placed in the world by ``rotation, origin``."""

    corners: list[Array] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    surfaces: list[Surface] = field(default_factory=list)
    axes: list[Array] = field(default_factory=list)
    """Texture u axis of every face, a world direction."""
    origins: list[Array] = field(default_factory=list)

    def add_polygon(
        self,
        corners: npt.ArrayLike,
        surface: Surface,
        object_id: int = 0,
        *,
        u_axis: npt.ArrayLike,
        origin: npt.ArrayLike = (0.0, 0.0, 0.0),
    ) -> None:
        """One face in world coordinates, counter-clockwise seen from outside."""
        points = np.asarray(corners, dtype=np.float64)
        assert 3 <= len(points) <= MAX_CORNERS
        padding = np.repeat(points[-1:], MAX_CORNERS - len(points), axis=0)
        self.corners.append(np.concatenate([points, padding]))
        self.ids.append(object_id)
        self.surfaces.append(surface)
        self.axes.append(np.asarray(u_axis, dtype=np.float64))
        self.origins.append(np.asarray(origin, dtype=np.float64))

    def add_box(
        self,
        low: npt.ArrayLike,
        high: npt.ArrayLike,
        surface: Surface,
        object_id: int = 0,
        *,
        rotation: Array | None = None,
        origin: npt.ArrayLike = (0.0, 0.0, 0.0),
        taper: float = 0.0,
        top: Surface | None = None,
    ) -> None:
        """Axis-aligned box of the local frame; ``taper`` metres are taken off each side at the top."""
        rotation = np.eye(3) if rotation is None else rotation
        origin = np.asarray(origin, dtype=np.float64)
        low, high = np.asarray(low, dtype=np.float64), np.asarray(high, dtype=np.float64)
        bits = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)])
        local = np.where(bits, high, low)
        local[bits[:, 2] == 1, :2] += np.where(bits[bits[:, 2] == 1, :2], -taper, taper)
        world = local @ rotation.T + origin
        size = high - low
        for loop, axis in _BOX_FACES:
            in_plane = [i for i in range(3) if i != axis]
            longer = in_plane[0] if size[in_plane[0]] >= size[in_plane[1]] else in_plane[1]
            chosen = top if top is not None and loop == _BOX_FACES[-1][0] else surface
            self.add_polygon(
                world[list(loop)], chosen, object_id, u_axis=rotation[:, longer], origin=origin
            )

    def add_prism(
        self,
        center_xy: tuple[float, float],
        radius: float,
        z: tuple[float, float],
        surface: Surface,
        object_id: int = 0,
        *,
        sides: int = 12,
        top_radius: float | None = None,
        rotation: Array | None = None,
        origin: npt.ArrayLike = (0.0, 0.0, 0.0),
        top: Surface | None = None,
    ) -> None:
        """Upright regular prism or frustum (a cone when ``top_radius`` is 0) of the local frame."""
        rotation = np.eye(3) if rotation is None else rotation
        origin = np.asarray(origin, dtype=np.float64)
        top_radius = radius if top_radius is None else top_radius
        angles = 2 * np.pi * np.arange(sides) / sides
        circle = np.stack([np.cos(angles), np.sin(angles), np.zeros(sides)], axis=1)
        center = np.array([*center_xy, 0.0])
        lower = (center + radius * circle + [0, 0, z[0]]) @ rotation.T + origin
        upper = (center + top_radius * circle + [0, 0, z[1]]) @ rotation.T + origin
        for i in range(sides):
            j = (i + 1) % sides
            if top_radius == 0:
                loop = [lower[i], lower[j], upper[i]]
            elif radius == 0:
                loop = [lower[i], upper[j], upper[i]]
            else:
                loop = [lower[i], lower[j], upper[j], upper[i]]
            tangent = circle[j] - circle[i]
            self.add_polygon(
                loop,
                surface,
                object_id,
                u_axis=rotation @ tangent / np.linalg.norm(tangent),
                origin=origin,
            )
        if radius > 0:
            self.add_polygon(lower[::-1], surface, object_id, u_axis=rotation[:, 0], origin=origin)
        if top_radius > 0:
            self.add_polygon(upper, top or surface, object_id, u_axis=rotation[:, 0], origin=origin)

    def build(self) -> Mesh:
        """Finish the mesh; normals come from the winding (Newell's formula)."""
        corners = np.array(self.corners)
        following = np.roll(corners, -1, axis=1)
        normals = np.cross(corners, following).sum(axis=1)
        normals /= np.linalg.norm(normals, axis=1, keepdims=True)
        u_axes = np.array(self.axes)
        v_axes = np.cross(normals, u_axes)
        origins = np.array(self.origins)
        uv = np.stack(
            [
                np.concatenate([axis, -np.einsum("fi,fi->f", axis, origins)[:, None]], axis=1)
                for axis in (u_axes, v_axes)
            ],
            axis=1,
        )
        return Mesh(
            corners,
            normals,
            np.array(self.ids, dtype=np.uint16),
            np.array([s.color for s in self.surfaces], dtype=np.float32),
            np.array([s.texture for s in self.surfaces]),
            np.array([s.emission for s in self.surfaces], dtype=np.float32),
            uv,
        )


# Corner loops (index 4x + 2y + z) counter-clockwise from outside, and the axis of the normal.
_BOX_FACES = (
    ((0, 1, 3, 2), 0),
    ((4, 6, 7, 5), 0),
    ((0, 4, 5, 1), 1),
    ((2, 3, 7, 6), 1),
    ((0, 2, 6, 4), 2),
    ((1, 5, 7, 3), 2),
)
