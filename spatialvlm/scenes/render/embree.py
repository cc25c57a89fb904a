"""Depth and face maps of arbitrary triangle meshes by Embree (extra ``scenes``).

A drop-in for the numpy rasteriser: same masks, same depth, any number of triangles.
"""

import numpy as np
import numpy.typing as npt
from jaxtyping import Float

from spatialvlm.errors import BackendUnavailableError
from spatialvlm.scenes.cameras import Camera
from spatialvlm.scenes.render.mesh import Mesh
from spatialvlm.scenes.render.raster import Raster
from spatialvlm.scenes.transforms import Array


class EmbreeCaster:
    """Casts pixel rays into a triangle mesh.

    Args:
        triangles: ``[T, 3, 3]`` world metres.
        faces: ``[T]`` face index of each triangle, as reported in :attr:`Raster.faces`.
        ids: ``[F]`` object index + 1 of each face, 0 for the shell.

    Raises:
        BackendUnavailableError: embreex is not installed.
    """

    def __init__(
        self,
        triangles: Float[np.ndarray, "T 3 3"],
        faces: npt.NDArray[np.int64],
        ids: npt.NDArray[np.uint16],
    ) -> None:
        try:
            from embreex.mesh_construction import TriangleMesh
            from embreex.rtcore_scene import EmbreeScene
        except ImportError as error:
            raise BackendUnavailableError(
                "Embree needs embreex: pip install -e '.[scenes]'"
            ) from error
        self._scene = EmbreeScene()
        self._mesh = TriangleMesh(self._scene, np.ascontiguousarray(triangles, dtype=np.float32))
        self._faces = np.append(faces, -1)
        self._ids = np.append(ids, 0).astype(np.uint16)
        self._normals = np.cross(
            triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]
        )
        self._offsets = np.einsum("ti,ti->t", self._normals, triangles[:, 0])

    @classmethod
    def of_mesh(cls, mesh: Mesh) -> "EmbreeCaster":
        """Caster for the polygon mesh of a room."""
        triangles, faces = mesh.triangles()
        return cls(triangles, faces, mesh.ids)

    def cast(self, camera: Camera) -> Raster:
        """What every pixel centre sees; depth is computed from the hit plane in double precision."""
        height, width = camera.height, camera.width
        v, u = np.mgrid[0:height, 0:width]
        pixels = np.stack([u.ravel() + 0.5, v.ravel() + 0.5], axis=1)
        directions = camera.rays(pixels) @ camera.rotation.T  # z-depth 1 along the optical axis
        origins = np.broadcast_to(camera.centre, directions.shape)
        hit: Array = self._scene.run(
            np.ascontiguousarray(origins, dtype=np.float32), directions.astype(np.float32)
        ).astype(np.int64)
        along = np.einsum("ni,ni->n", self._normals[hit], directions)
        offset = self._offsets[hit] - self._normals[hit] @ camera.centre
        missed = (hit < 0) | (along == 0)
        depth = np.where(missed, 0.0, offset / np.where(along == 0, 1.0, along))
        faces = self._faces[np.where(missed, -1, hit)].astype(np.int32)
        return Raster(
            faces.reshape(height, width),
            depth.astype(np.float32).reshape(height, width),
            self._ids[faces].reshape(height, width),
        )
