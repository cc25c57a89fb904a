"""A draw -> sizes for the plan, and later -> tokens and pixels for the pack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from spatialvlm.data.collate import MediaPixels, Prepared
from spatialvlm.data.encode import Fitted, HeadCache, OverlongPolicy, fit, geometry_groups
from spatialvlm.data.formats.coords import ImageSizes, rewrite_coords
from spatialvlm.data.hooks import DrawMarks, ExpandFormat
from spatialvlm.data.index import FLAG_MARKS
from spatialvlm.data.media.plan import MediaInfo, MediaPolicy, plan_media
from spatialvlm.data.media.resize import resize, split_tiles
from spatialvlm.data.media.store import MediaStore
from spatialvlm.data.prefix import group_key, media_key
from spatialvlm.data.sample import (
    LENGTH_DTYPE,
    NOTES,
    CoordConvention,
    Draw,
    EncodedSample,
    Sample,
)
from spatialvlm.data.template import ChatTemplate
from spatialvlm.errors import MarkError
from spatialvlm.sequence.layout import TokenLayout
from spatialvlm.sequence.sizes import GroupSize
from spatialvlm.typing import KIND_IMAGE, KIND_VIDEO, MarkSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt

    from spatialvlm.data.index import SourceIndex
    from spatialvlm.typing import UInt8Array

GEOMETRY_EXTRA_TOKENS = 5
"""Camera and register tokens of VGGT per frame, for the cost model."""


class SourceMedia(NamedTuple):
    """Media access and size rules of one source."""

    store: MediaStore
    policy: MediaPolicy


@dataclass(frozen=True)
class SampleEncoder:
    """Everything between a draw and its tensors; picklable, one copy per worker.

    Attributes:
        indices: Row tables, in the order of the mixture's sources.
        media: One entry per source.
        template: Of the checkpoint.
        layout: Of the run.
        overlong: What happens to long samples.
        train_on: Which assistant turns are supervised.
        capabilities: Capability name -> number written into batches.
        draw_marks: Draws marks into a frame; None = rows with marks are an error.
        expand_format: Realises an instruction format; None = as written.
        coords: Convention that box numbers in the text are rewritten into; None = as written.
        heads: Laid-out beginnings that neighbouring rows share.
    """

    indices: Sequence[SourceIndex]
    media: Sequence[SourceMedia]
    template: ChatTemplate
    layout: TokenLayout
    overlong: OverlongPolicy
    train_on: Literal["all", "last"] = "all"
    capabilities: Mapping[str, int] | None = None
    draw_marks: DrawMarks | None = None
    expand_format: ExpandFormat | None = None
    coords: CoordConvention | None = None
    heads: HeadCache = field(default_factory=HeadCache, repr=False)

    def require_marks(self) -> None:
        """Marks can be drawn if there are any.

        Raises:
            MarkError: Names the first row with marks when there is no hook.
        """
        for index in self.indices if self.draw_marks is None else ():
            marked = np.flatnonzero((index.column("flags") & FLAG_MARKS) * index.eligible())
            if len(marked):
                raise MarkError(
                    f"{len(marked)} rows of source {index.source.name} have marks to draw, first {index.uid(int(marked[0]))}, "
                    "but no draw_marks hook is registered; without them their questions have no referent. Pass draw_marks to "
                    "build_data"
                )

    def sample(self, source: int, row: int, epoch: int = 0) -> Sample:
        """The conversation of a row, in the wording of this epoch.

        Raises:
            DataError: The row cannot be read.
        """
        sample = self.indices[source].sample(row, epoch)
        if sample.formats_ok and self.expand_format is not None:
            return self.expand_format(sample, epoch)
        return sample

    def fitted(self, source: int, row: int, epoch: int = 0) -> tuple[Sample, Fitted]:
        """A row in its final wording, and its tokens, from headers only.

        Raises:
            DataError: A medium is missing or refused, or the sample is too long.
        """
        sample = self.sample(source, row, epoch)
        infos = self.infos(source, sample)
        num_boxes = 0
        if self.coords is not None:
            sizes = [ImageSizes(info.header.size, info.size) for info in infos]
            sample, num_boxes = rewrite_coords(sample, sizes, self.coords)
        fitted = fit(
            sample,
            infos,
            self.template,
            self.layout,
            self.overlong,
            train_on=self.train_on,
            heads=self.heads,
        )
        return sample, fitted._replace(boxes_rewritten=num_boxes)

    def infos(self, source: int, sample: Sample) -> list[MediaInfo]:
        """Planned frames, sizes and grids of a sample's media."""
        store, policy = self.media[source]
        return plan_sample_media(sample, store, policy, self.layout)

    def measure(self, source: int, row: int, epoch: int = 0) -> npt.NDArray[np.void]:
        """Sizes of one row, a record of ``LENGTH_DTYPE``."""
        sample, fitted = self.fitted(source, row, epoch)
        return self._record(source, sample, fitted)

    def prepare(self, draw: Draw, *, pixels: bool = True) -> Prepared:
        """Tokens and pixels of a draw.

        Args:
            draw: One draw of a pack.
            pixels: False for members of a group after the first: their media are the first one's.

        Raises:
            DataError: The sample cannot be read; nothing is replaced here.
        """
        sample, fitted = self.fitted(draw.source, draw.row, draw.epoch)
        frames: tuple[MediaPixels, ...] = ()
        if pixels:
            frames = load_pixels(
                sample, fitted.media, self.media[draw.source].store, self.layout, self.draw_marks
            )
        capability = -1
        if self.capabilities and sample.capability is not None:
            capability = self.capabilities.get(sample.capability, -1)
        return Prepared(sample.uid, fitted.encoded, frames, sample.weight, draw.source, capability)

    def _record(self, source: int, sample: Sample, fitted: Fitted) -> npt.NDArray[np.void]:
        encoded, infos = fitted.encoded, fitted.media
        groups = geometry_groups(sample, self.layout)
        root = str(self.media[source].store.root)
        media_id = media_key(root, sample, infos)
        record = np.zeros((), LENGTH_DTYPE)
        record["tokens"] = len(encoded.input_ids)
        record["label_tokens"] = encoded.num_label_tokens
        record["visual_tokens"] = encoded.num_visual_tokens
        record["spatial_tokens"] = encoded.num_spatial_tokens
        record["prefix_tokens"] = encoded.prefix_len
        record["patches"] = encoded.num_patches
        record["patch_pairs"] = sum(t * (h * w) ** 2 for t, h, w in encoded.grids)
        record["frames"] = sum(info.num_frames for info in infos)
        record["images"] = sum(info.ref.kind == "image" for info in infos)
        record["videos"] = len(infos) - record["images"]
        for frames, (height, width) in _geometry_shapes(infos, groups, self.layout):
            patch = self.layout.size.patch_size if self.layout.size is not None else 1
            per_frame = (height // patch) * (width // patch) + GEOMETRY_EXTRA_TOKENS
            record["geometry_tokens"] += frames * per_frame
            record["geometry_frame_pairs"] += frames * per_frame**2
            record["geometry_global_pairs"] += (frames * per_frame) ** 2
        record["group_key"] = group_key(encoded, media_id, groups)
        record["media_key"] = media_id
        record["tokens_removed"] = fitted.tokens_removed
        record["notes"] = _notes(sample, fitted)
        return record


def _notes(sample: Sample, fitted: Fitted) -> int:
    """Bits of ``NOTES``."""
    found: set[str] = set()
    if fitted.outcome != "kept":
        found.add(fitted.outcome)
    for info in fitted.media:
        if info.header.animated:
            found.add("animated_image")
        if info.header.times_assumed:
            found.add("frame_times_assumed")
    for turn in sample.turns:
        if turn.role == "assistant" and str(turn.parts[0])[:1].isspace():
            found.add("boundary_merge")
    if fitted.boxes_rewritten:
        found.add("coords_rewritten")
    return sum([1 << NOTES.index(name) for name in found])


def plan_sample_media(
    sample: Sample, store: MediaStore, policy: MediaPolicy, layout: TokenLayout
) -> list[MediaInfo]:
    """Headers, frames, sizes and grids of a sample's media.

    Raises:
        MediaError: A medium is missing, broken, or refused.
    """
    times = sample.meta.get("frame_times_s")
    infos = []
    for ref, group in zip(sample.media, geometry_groups(sample, layout), strict=True):
        known = tuple(times) if times and ref.store == "frames" else None
        header = store.header(ref, known)
        infos.append(plan_media(ref, header, policy, allow_tiles=group < 0 and not sample.marks))
    return infos


def load_pixels(
    sample: Sample,
    infos: Sequence[MediaInfo],
    store: MediaStore,
    layout: TokenLayout,
    draw_marks: DrawMarks | None = None,
) -> tuple[MediaPixels, ...]:
    """Decode, resize and mark the media of a sample.

    Marks are drawn on the model's frames only; the geometry encoder sees the same decoded frames without
    them, all frames of a group at one size.

    Raises:
        MediaError: A frame cannot be decoded.
        MarkError: The sample has marks and there is no hook.
    """
    if sample.marks and draw_marks is None:
        raise MarkError(
            f"{sample.uid} has {len(sample.marks)} marks to draw, but no draw_marks hook is registered; without "
            "them its question has no referent"
        )
    groups = geometry_groups(sample, layout)
    sizes = _group_sizes(infos, groups, layout)
    contents = {group: iter(size.content) for group, size in sizes.items()}
    out = []
    for index, (info, group) in enumerate(zip(infos, groups, strict=True)):
        source = store.load(info.ref)
        rows, cols = info.tiles
        if rows * cols > 1:
            frames = split_tiles(source, rows, cols, info.size[0])
        else:
            frames = resize(source, info.size)
        geometry, content, key = None, None, ""
        if group >= 0:
            canvas, own = sizes[group].canvas, next(contents[group])
            same = own == canvas == info.size
            geometry = frames if same else _letterbox(resize(source, own), canvas)
            content = None if own == canvas else own
            key = _geometry_key(store, info, canvas, own)
        if sample.marks:
            assert draw_marks is not None
            frames = _marked(frames, index, info, sample, draw_marks)
        is_image = info.ref.kind == "image" or (
            layout.frames_as_images and layout.family != "internvl3"
        )
        out.append(
            MediaPixels(
                kind=KIND_IMAGE if is_image else KIND_VIDEO,
                grid=info.grid,
                frames=frames,
                group=group,
                geometry=geometry,
                key=key,
                content=content,
            )
        )
    return tuple(out)


def check_length(uid: str, planned: int, encoded: EncodedSample) -> None:
    """A sample must have the length it was planned with.

    Raises:
        DataError: Both lengths, and what to do.
    """
    from spatialvlm.errors import DataError

    if len(encoded.input_ids) != planned:
        raise DataError(
            f"{uid} has {len(encoded.input_ids)} tokens but was planned with {planned}; its media or text changed "
            "since the lengths were measured. Rebuild the index (delete its folder below data.index_dir)"
        )


def _marked(
    frames: UInt8Array, index: int, info: MediaInfo, sample: Sample, draw_marks: DrawMarks
) -> UInt8Array:
    """Frames with their marks; ``MarkSpec.image`` counts images of the row, or stored frames of a video."""
    from PIL import Image

    numbers: Sequence[int] = [index] if info.ref.kind == "image" else (info.ref.frames or ())
    height, width = info.header.size
    out = frames
    for at, number in enumerate(numbers):
        own: list[MarkSpec] = [mark for mark in sample.marks if mark.image == number]
        if own:
            if out is frames:
                out = frames.copy()
            drawn = draw_marks(Image.fromarray(frames[at]), own, stored_size=(width, height))
            out[at] = np.asarray(drawn)
    return out


def _letterbox(frames: UInt8Array, canvas: tuple[int, int]) -> UInt8Array:
    """Pad uint8 ``[S, H, W, 3]`` with white at the bottom and right to ``[S, *canvas, 3]``."""
    height, width = frames.shape[1:3]
    if (height, width) == canvas:
        return frames
    padding = ((0, 0), (0, canvas[0] - height), (0, canvas[1] - width), (0, 0))
    return np.pad(frames, padding, constant_values=255)


def _group_sizes(
    infos: Sequence[MediaInfo], groups: Sequence[int], layout: TokenLayout
) -> dict[int, GroupSize]:
    """Encoder canvas of every geometry group, and the part of it that each of its media fills."""
    members: dict[int, list[tuple[tuple[int, int], tuple[int, int]]]] = {}
    for info, group in zip(infos, groups, strict=True):
        if group >= 0:
            members.setdefault(group, []).append((info.header.size, info.grid[1:]))
    return {group: layout.group_size(sizes) for group, sizes in members.items()}


def _geometry_shapes(
    infos: Sequence[MediaInfo], groups: Sequence[int], layout: TokenLayout
) -> list[tuple[int, tuple[int, int]]]:
    """Frames and size of every geometry group."""
    return [
        (sum(i.num_frames for i, g in zip(infos, groups, strict=True) if g == group), size.canvas)
        for group, size in _group_sizes(infos, groups, layout).items()
    ]


def _geometry_key(
    store: MediaStore, info: MediaInfo, canvas: tuple[int, int], content: tuple[int, int]
) -> str:
    ref, root = info.ref, str(Path(store.root).resolve())
    return repr((root, ref.store, ref.path, ref.member, ref.frames, canvas, content))
