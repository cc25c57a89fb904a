"""Vertices and triangles of a PLY file (ascii or binary), and nothing else of it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from jaxtyping import Float

from spatialvlm.errors import ImporterError

_TYPES = {
    "char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1", "short": "i2", "int16": "i2", "ushort": "u2",
    "uint16": "u2", "int": "i4", "int32": "i4", "uint": "u4", "uint32": "u4", "float": "f4",
    "float32": "f4", "double": "f8", "float64": "f8",
}  # fmt: skip
MAX_HEADER_BYTES = 65_536


@dataclass(frozen=True)
class _Header:
    """What the head of the file says about vertices and faces."""

    form: str
    start: int
    """Where the data begins."""
    num_vertices: int
    vertex: list[tuple[str, str]]
    """Name and numpy type of the properties of a vertex."""
    num_faces: int
    face: list[tuple[str, str, str]]
    """Name, type of the count (empty for plain numbers) and type of the properties of a face."""


def read_vertices(path: str | Path) -> Float[np.ndarray, "N 3"]:
    """Coordinates of all vertices, in the order of the file.

    Raises:
        ImporterError: Not a PLY file with x, y, z as first element, or it ends early.
    """
    path = Path(path)
    data = path.read_bytes()
    return _vertices(path, data, _header(path, data))


def read_mesh(path: str | Path) -> tuple[Float[np.ndarray, "N 3"], npt.NDArray[np.int64]]:
    """Vertices, and triangles ``[T, 3]`` as indices into them.

    Raises:
        ImporterError: Not a triangle mesh, or it ends early.
    """
    path = Path(path)
    data = path.read_bytes()
    header = _header(path, data)
    vertices = _vertices(path, data, header)
    lists = [item for item in header.face if item[1]]
    if header.num_faces <= 0 or not lists or header.face[0] != lists[0]:
        raise ImporterError(f"{path}: has no faces; a mesh is needed here, not a point cloud.")
    if header.form == "ascii":
        lines = data[header.start :].split(b"\n")[header.num_vertices :][: header.num_faces]
        rows = [line.split() for line in lines]
        if len(rows) < header.num_faces or any(row[:1] != [b"3"] for row in rows):
            raise ImporterError(f"{path}: the faces are not all triangles, or some are missing.")
        triangles = np.array([row[1:4] for row in rows], dtype=np.int64)
    else:
        triangles = _binary_triangles(path, data, header)
    if triangles.size and (triangles.min() < 0 or triangles.max() >= len(vertices)):
        raise ImporterError(
            f"{path}: a face names vertex {triangles.max()} of {len(vertices)}; the file is damaged."
        )
    return vertices, triangles


def _header(path: Path, data: bytes) -> _Header:
    end = data.find(b"end_header", 0, MAX_HEADER_BYTES)
    if not data.startswith(b"ply") or end < 0:
        raise ImporterError(f"{path}: not a PLY file.")
    form, element, counts = "", "", {"vertex": -1, "face": 0}
    vertex: list[tuple[str, str]] = []
    face: list[tuple[str, str, str]] = []
    order: list[str] = []
    for line in data[:end].decode("ascii", "replace").splitlines():
        words = line.split()
        if words[:1] == ["format"]:
            form = words[1]
        elif words[:1] == ["element"]:
            element = words[1]
            order.append(element)
            counts[element] = int(words[2])
        elif words[:2] == ["property", "list"] and element == "face":
            face.append((words[4], _TYPES.get(words[2], ""), _TYPES.get(words[3], "")))
        elif words[:1] == ["property"] and element == "face":
            face.append((words[2], "", _TYPES.get(words[1], "")))
        elif words[:1] == ["property"] and element == "vertex":
            vertex.append((words[2], _TYPES.get(words[1], "")))
    names = {name for name, _ in vertex}
    known = all(kind for _, kind in vertex)
    if order[:1] != ["vertex"] or not {"x", "y", "z"} <= names or not known:
        raise ImporterError(f"{path}: the first element must be 'vertex' with x, y and z.")
    num_faces = counts["face"] if order[1:2] == ["face"] else 0
    start = data.index(b"\n", end) + 1
    return _Header(form, start, counts["vertex"], vertex, num_faces, face)


def _vertices(path: Path, data: bytes, header: _Header) -> Float[np.ndarray, "N 3"]:
    names, count = [name for name, _ in header.vertex], header.num_vertices
    if header.form == "ascii":
        lines = data[header.start :].split(b"\n", count)[:count]
        if len(lines) < count:
            raise ImporterError(
                f"{path}: {len(lines)} of {count} vertices before the end of the file."
            )
        table = np.array([line.split()[: len(names)] for line in lines], dtype=np.float64)
        return table[:, [names.index(axis) for axis in "xyz"]]
    layout = _vertex_layout(header)
    if len(data) < header.start + count * layout.itemsize:
        raise ImporterError(
            f"{path}: ends at offset {len(data)}, {count} vertices need "
            f"{header.start + count * layout.itemsize}."
        )
    vertices = np.frombuffer(data, dtype=layout, count=count, offset=header.start)
    return np.stack([vertices[axis].astype(np.float64) for axis in "xyz"], axis=1)


def _order(header: _Header) -> str:
    return "<" if header.form == "binary_little_endian" else ">"


def _vertex_layout(header: _Header) -> np.dtype[np.void]:
    return np.dtype([(name, _order(header) + kind) for name, kind in header.vertex])


def _binary_triangles(path: Path, data: bytes, header: _Header) -> npt.NDArray[np.int64]:
    """Faces of fixed size: every list of vertices has three entries."""
    order = _order(header)
    fields: list[tuple[str, str] | tuple[str, str, int]] = []
    for name, counter, kind in header.face:
        if counter:
            fields += [(f"{name} count", order + counter), (name, order + kind, 3)]
        else:
            fields.append((name, order + kind))
    layout = np.dtype(fields)
    start = header.start + header.num_vertices * _vertex_layout(header).itemsize
    if len(data) < start + header.num_faces * layout.itemsize:
        raise ImporterError(
            f"{path}: ends at offset {len(data)}, {header.num_faces} triangles need "
            f"{start + header.num_faces * layout.itemsize}."
        )
    faces = np.frombuffer(data, dtype=layout, count=header.num_faces, offset=start)
    name = header.face[0][0]
    if (faces[f"{name} count"] != 3).any():
        raise ImporterError(f"{path}: the faces are not all triangles.")
    return faces[name].astype(np.int64)
