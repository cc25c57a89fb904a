"""Vertices of a PLY file (ascii or binary), and nothing else of it."""

from pathlib import Path

import numpy as np
from jaxtyping import Float

from spatialvlm.errors import ImporterError

_TYPES = {
    "char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1", "short": "i2", "int16": "i2", "ushort": "u2",
    "uint16": "u2", "int": "i4", "int32": "i4", "uint": "u4", "uint32": "u4", "float": "f4",
    "float32": "f4", "double": "f8", "float64": "f8",
}  # fmt: skip
MAX_HEADER_BYTES = 65_536


def read_vertices(path: str | Path) -> Float[np.ndarray, "N 3"]:
    """Coordinates of all vertices, in the order of the file.

    Raises:
        ImporterError: Not a PLY file with x, y, z as first element, or it ends early.
    """
    path = Path(path)
    data = path.read_bytes()
    end = data.find(b"end_header", 0, MAX_HEADER_BYTES)
    if not data.startswith(b"ply") or end < 0:
        raise ImporterError(f"{path}: not a PLY file.")
    start = data.index(b"\n", end) + 1
    form, count, fields = "", -1, []
    for line in data[:end].decode("ascii", "replace").splitlines():
        words = line.split()
        if words[:1] == ["format"]:
            form = words[1]
        elif words[:2] == ["element", "vertex"]:
            count = int(words[2])
        elif words[:1] == ["element"] and count >= 0:
            break
        elif words[:1] == ["property"] and count >= 0:
            fields.append((words[2], _TYPES.get(words[1], "")))
    names = [name for name, _ in fields]
    if count < 0 or not {"x", "y", "z"} <= set(names) or any(not kind for _, kind in fields):
        raise ImporterError(f"{path}: the first element must be 'vertex' with x, y and z.")
    if form == "ascii":
        lines = data[start:].split(b"\n", count)[:count]
        if len(lines) < count:
            raise ImporterError(
                f"{path}: {len(lines)} of {count} vertices before the end of the file."
            )
        table = np.array([line.split()[: len(fields)] for line in lines], dtype=np.float64)
        return table[:, [names.index(axis) for axis in "xyz"]]
    order = "<" if form == "binary_little_endian" else ">"
    layout = np.dtype([(name, order + kind) for name, kind in fields])
    if len(data) < start + count * layout.itemsize:
        raise ImporterError(
            f"{path}: ends at offset {len(data)}, {count} vertices need {start + count * layout.itemsize}."
        )
    vertices = np.frombuffer(data, dtype=layout, count=count, offset=start)
    return np.stack([vertices[axis].astype(np.float64) for axis in "xyz"], axis=1)
