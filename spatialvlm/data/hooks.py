"""Callables that a recipe hands to the data path, which itself knows no scenes and draws nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from spatialvlm.data.sample import Sample
from spatialvlm.typing import MarkSpec

if TYPE_CHECKING:
    from PIL import Image


class DrawMarks(Protocol):
    """Draws marks into a frame at model resolution; the text never changes with it."""

    def __call__(
        self,
        image: Image.Image,
        marks: Sequence[MarkSpec],
        *,
        stored_size: tuple[int, int] | None = None,
    ) -> Image.Image:
        """A copy of ``image`` with the marks.

        Args:
            image: RGB frame as the model sees it.
            marks: Marks of this frame.
            stored_size: (width, height) of the stored frame that pixel coordinates refer to.

        Raises:
            MarkError: A mark lies outside the image.
        """


ExpandFormat = Callable[[Sample, int], Sample]
"""(sample, epoch) -> the sample in one of its ``formats_ok``."""

SceneCheck = Callable[[str], "tuple[str, ...] | None"]
"""Text -> names of the block lists it hits; None when it names no known scene or room."""
