"""Callables that a recipe hands to the data path, which itself knows no scenes and draws nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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


def scene_names(sample: Sample) -> Iterator[str]:
    """Everything of a sample that may name its scene or room: ids, and what its media are or were called."""
    named = [sample.scene_id, sample.room_id]
    named += [sample.meta.get(key) for key in ("scene_name", "scan_id", "video_id")]
    originals = sample.meta.get("media_names")
    named += originals if isinstance(originals, list) else []
    for value in named:
        if value is not None and value != "":
            yield str(value)
    for ref in sample.media:
        if ref.store == "tar" or (ref.store == "frames" and ref.member):
            yield from [f"{ref.path}/{name}" for name in ref.member.split("\n")]
        else:
            yield ref.path
