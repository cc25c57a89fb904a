"""How much of what is asked about a scene stays right when the scene is lifted instead of known."""

from dataclasses import dataclass

import numpy as np

from spatialvlm.scenes.schema import Scene
from spatialvlm.scenes.transforms import Array

MARGIN_M = 0.15
"""Pairs closer than this along the asked axis are not asked about."""


@dataclass(frozen=True)
class Agreement:
    """Shares of equal answers, 0..1, and the median relative error of distances."""

    found: float
    """Objects with a label of their own that the lifted scene has too."""
    left_right: float
    front_behind: float
    distance_error: float
    pairs: int

    @property
    def label_error(self) -> float:
        """Share of the exact answers that are wrong or missing in the lifted scene."""
        return 1.0 - self.found**2 * (self.left_right + self.front_behind) / 2


def agreement(truth: Scene, lifted: Scene) -> Agreement:
    """Compare all pairs of objects with unique labels, in all frames.

    Args:
        truth: Scene with exact boxes; its frames are those of ``lifted``, in the same order.
        lifted: The same room from images; its world may be turned and moved.
    """
    exact, found = _unique(truth), _unique(lifted)
    shared = sorted(set(exact) & set(found))
    sides: dict[int, list[bool]] = {0: [], 1: []}
    errors = []
    for i, a in enumerate(shared):
        for b in shared[:i]:
            true_offset, offset = exact[a] - exact[b], found[a] - found[b]
            length = np.linalg.norm(true_offset)
            errors.append(abs(np.linalg.norm(offset) - length) / length)
            for true_frame, frame in zip(truth.frames, lifted.frames, strict=True):
                expected = true_frame.camera.level_frame("y")[:3, :3] @ true_offset
                got = frame.camera.level_frame("y")[:3, :3] @ offset
                for axis, same in sides.items():
                    if abs(expected[axis]) > MARGIN_M:
                        same.append(bool(np.sign(got[axis]) == np.sign(expected[axis])))
    return Agreement(
        found=len(shared) / max(1, len(exact)),
        left_right=float(np.mean(sides[0])) if sides[0] else 0.0,
        front_behind=float(np.mean(sides[1])) if sides[1] else 0.0,
        distance_error=float(np.median(errors)) if errors else float("nan"),
        pairs=len(errors),
    )


def _unique(scene: Scene) -> dict[str, Array]:
    labels = [item.label for item in scene.objects]
    return {item.label: item.center for item in scene.objects if labels.count(item.label) == 1}
