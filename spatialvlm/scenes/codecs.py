"""Box codecs: lists of numbers that models read and write, and the sentence that explains them.

Each codec states its rotation convention once, in code; the sentence for the prompt is generated from
the same definition, so text and numbers cannot disagree.

    codec = box_codec("qwen3vl")
    values = codec.encode(box)              # nine numbers in the frame of the box
    same_solid = codec.decode(values)
    sentence = codec.prompt_convention()
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations, product
from typing import Literal

import numpy as np
from jaxtyping import Float

from spatialvlm.errors import BoxError
from spatialvlm.scenes.boxes import Box
from spatialvlm.scenes.transforms import Array, geodesic_deg, rx, ry, rz

CodecName = Literal["embodiedscan_zxy", "openspatial", "qwen3vl", "ssr_7dof"]
GIMBAL = 1e-6
"""Cosine below which two of three Euler angles only act together."""


@dataclass(frozen=True)
class BoxCodec:
    """One convention.

    Args:
        name: Name in configurations.
        slots: Meaning of the values in order.
        euler: Order of the elementary rotations as they are multiplied, first factor first.
        angle_slots: For every factor of ``euler``, which slot holds its angle.
        unit_rad: One unit of an angle in radians (``pi`` when angles are written as angle / pi).
        nearest_axes: Relabel the box axes to the rotation closest to the identity before encoding.
    """

    name: CodecName
    slots: tuple[str, ...]
    euler: str
    angle_slots: tuple[int, ...]
    unit_rad: float = 1.0
    nearest_axes: bool = False

    def encode(self, box: Box, *, decimals: int | None = None) -> list[float]:
        """Values of ``box`` in the frame it is given in, unrounded unless ``decimals`` is set.

        Raises:
            BoxError: The codec has only a yaw and the box is tilted.
        """
        if self.nearest_axes:
            box = nearest_axes(box)
        angles = _EULER[self.euler][0](box.rotation)
        if self.euler == "z" and geodesic_deg(rz(angles[0]), box.rotation) > 1.0:
            raise BoxError(
                f"codec {self.name} stores only a yaw, but the box is tilted by {box.tilt_deg:.1f} "
                "degrees. Refit an upright box or drop it."
            )
        values = [*box.center.tolist(), *box.size.tolist(), *[0.0] * len(self.angle_slots)]
        for slot, angle in zip(self.angle_slots, angles, strict=True):
            values[slot] = angle / self.unit_rad
        if decimals is None:
            return values
        return [round(value, decimals) + 0.0 for value in values]

    def decode(self, values: Sequence[float]) -> Box:
        """Box of a list of values.

        Raises:
            BoxError: Another number of values, or not a valid box.
        """
        if len(values) != len(self.slots):
            raise BoxError(
                f"codec {self.name}: expected {len(self.slots)} values "
                f"({', '.join(self.slots)}), got {len(values)}."
            )
        angles = [values[slot] * self.unit_rad for slot in self.angle_slots]
        rotation = _EULER[self.euler][1](angles)
        return Box(np.array(values[:3]), np.array(values[3:6]), rotation)

    def angles_in_range(self, values: Sequence[float]) -> bool:
        """Whether all angles lie within one full turn; otherwise they are probably degrees."""
        return all(
            abs(values[slot]) * self.unit_rad <= 2 * np.pi + 1e-6 for slot in self.angle_slots
        )

    def prompt_convention(self) -> str:
        """The sentence that states what the numbers mean."""
        factors = " · ".join(
            f"R{axis}({self.slots[slot]})"
            for axis, slot in zip(self.euler, self.angle_slots, strict=True)
        )
        unit = "radians" if self.unit_rad == 1.0 else "multiples of pi"
        plural = "angles are" if len(self.euler) > 1 else "angle is"
        return (
            f"A box is [{', '.join(self.slots)}]: centre and full extents in metres; the {plural} in "
            f"{unit} and the box axes are the columns of R = {factors}."
        )


def box_codec(name: str, *, source_axes: bool = False) -> BoxCodec:
    """Codec by name.

    Args:
        name: ``embodiedscan_zxy`` (intrinsic z-x-y, radians), ``openspatial`` (the same slots with the
            factors in the opposite order, as its generator writes them), ``qwen3vl`` (camera frame,
            angle / pi) or ``ssr_7dof`` (yaw only).
        source_axes: Keep the axes of the box in ``qwen3vl`` (for objects with a front).

    Raises:
        BoxError: Unknown name.
    """
    if name not in _CODECS:
        raise BoxError(f"unknown box codec {name!r}; known: {', '.join(_CODECS)}.")
    codec = _CODECS[name]
    if source_axes and codec.nearest_axes:
        return BoxCodec(codec.name, codec.slots, codec.euler, codec.angle_slots, codec.unit_rad)
    return codec


@lru_cache(maxsize=1)
def _relabelings() -> tuple[tuple[tuple[int, ...], Array], ...]:
    """The 24 right-handed relabelings of box axes in lexicographic (permutation, sign) order."""
    found = []
    for order in permutations(range(3)):
        for signs in product((-1.0, 1.0), repeat=3):
            matrix = np.zeros((3, 3))
            matrix[list(order), range(3)] = signs
            if np.linalg.det(matrix) > 0:
                found.append((order, matrix))
    return tuple(found)


def nearest_axes(box: Box) -> Box:
    """The same solid with its axes renamed so that the rotation is as small as possible."""
    best: tuple[float, tuple[int, ...], Array] | None = None
    for order, matrix in _relabelings():
        rotation = box.rotation @ matrix
        angle = round(geodesic_deg(np.eye(3), rotation), 6)
        if best is None or angle < best[0]:
            best = (angle, order, rotation)
    assert best is not None
    return Box(box.center, box.size[list(best[1])], best[2])


def _angles_zxy(r: Float[np.ndarray, "3 3"]) -> list[float]:
    """Angles (a, b, c) of R = Rz(a) Rx(b) Ry(c); c = 0 at gimbal lock."""
    b = float(np.arctan2(r[2, 1], np.hypot(r[2, 0], r[2, 2])))
    if np.cos(b) < GIMBAL:
        return [float(np.arctan2(r[1, 0], r[0, 0])), b, 0.0]
    return [float(np.arctan2(-r[0, 1], r[1, 1])), b, float(np.arctan2(-r[2, 0], r[2, 2]))]


def _angles_yxz(r: Float[np.ndarray, "3 3"]) -> list[float]:
    """Angles (a, b, c) of R = Ry(a) Rx(b) Rz(c); c = 0 at gimbal lock."""
    b = float(np.arctan2(-r[1, 2], np.hypot(r[1, 0], r[1, 1])))
    if np.cos(b) < GIMBAL:
        return [float(np.arctan2(-r[2, 0], r[0, 0])), b, 0.0]
    return [float(np.arctan2(r[0, 2], r[2, 2])), b, float(np.arctan2(r[1, 0], r[1, 1]))]


def _angles_zyx(r: Float[np.ndarray, "3 3"]) -> list[float]:
    """Angles (a, b, c) of R = Rz(a) Ry(b) Rx(c); a = 0 at gimbal lock."""
    b = float(np.arctan2(-r[2, 0], np.hypot(r[0, 0], r[1, 0])))
    if np.cos(b) < GIMBAL:
        return [0.0, b, float(np.arctan2(-r[1, 2], r[1, 1]))]
    return [float(np.arctan2(r[1, 0], r[0, 0])), b, float(np.arctan2(r[2, 1], r[2, 2]))]


def _angles_z(r: Float[np.ndarray, "3 3"]) -> list[float]:
    return [float(np.arctan2(r[1, 0], r[0, 0]))]


_EULER: dict[str, tuple[Callable[[Array], list[float]], Callable[[list[float]], Array]]] = {
    "zxy": (_angles_zxy, lambda a: rz(a[0]) @ rx(a[1]) @ ry(a[2])),
    "yxz": (_angles_yxz, lambda a: ry(a[0]) @ rx(a[1]) @ rz(a[2])),
    "zyx": (_angles_zyx, lambda a: rz(a[0]) @ ry(a[1]) @ rx(a[2])),
    "z": (_angles_z, lambda a: rz(a[0])),
}

_NINE = ("cx", "cy", "cz", "dx", "dy", "dz", "alpha", "beta", "gamma")
_CODECS: dict[str, BoxCodec] = {
    codec.name: codec
    for codec in (
        BoxCodec("embodiedscan_zxy", _NINE, "zxy", (6, 7, 8)),
        # The released OpenSpatial generator (arXiv 2604.07296) multiplies in this order.
        BoxCodec("openspatial", _NINE, "yxz", (8, 7, 6)),
        BoxCodec(
            "qwen3vl",
            ("x", "y", "z", "sx", "sy", "sz", "pitch", "yaw", "roll"),
            "zyx",
            (8, 7, 6),
            np.pi,
            nearest_axes=True,
        ),
        BoxCodec("ssr_7dof", ("xc", "yc", "zc", "l", "w", "h", "yaw"), "z", (6,)),
    )
}
