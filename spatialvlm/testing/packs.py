"""Random packs in the exact form of the data path, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from spatialvlm.data.collate import MediaPixels, Prepared, collate
from spatialvlm.data.sample import EncodedSample
from spatialvlm.sequence.layout import MediaItem, TokenLayout
from spatialvlm.typing import IGNORE_INDEX, KIND_IMAGE, KIND_TEXT, KIND_VIDEO, Batch, ModalityFlags

if TYPE_CHECKING:
    from spatialvlm.sequence.pixels import PixelSpec
    from spatialvlm.typing import IntArray


@dataclass(frozen=True)
class Clip:
    """Random frames of one medium.

    Attributes:
        kind: ``image`` or ``video``.
        frames: Number of frames; 1 for images.
        height: In pixels, already a size the backbone takes.
        width: In pixels.
        group: Geometry group inside the sample, -1 = none.
    """

    kind: Literal["image", "video"] = "image"
    frames: int = 1
    height: int = 64
    width: int = 64
    group: int = -1


@dataclass(frozen=True)
class Member:
    """One sample, or several with a shared prefix.

    Attributes:
        clips: Media, in order.
        text: Text tokens behind the media that are shared.
        branches: Text tokens of every branch; a single one makes an ordinary sample.
        seed: Seed of its tokens and frames.
        keep: Only this branch, for comparing packed with separate samples.
    """

    clips: tuple[Clip, ...] = ()
    text: int = 4
    branches: tuple[int, ...] = (6,)
    seed: int = 0
    keep: int | None = None


def random_pack(
    members: Sequence[Member],
    layout: TokenLayout,
    pixels: PixelSpec,
    *,
    seed: int = 0,
    geometry_hw: tuple[int, int] | None = None,
    prompts: bool = False,
    vocabulary: int = 1000,
    fps: float = 2.0,
) -> Batch:
    """Collate random samples into one pack.

    Args:
        members: Samples and shared-prefix groups, in order.
        layout: Token layout of the model.
        pixels: Pixel spec of the model.
        seed: Added to the seeds of the members.
        geometry_hw: Encoder frame size; ``None`` = the encoder sees ``frames_u8``.
        prompts: No labels (generation).
        vocabulary: Text ids are drawn below this.
        fps: Frames per second of videos, for timestamps.
    """
    samples: list[Prepared] = []
    groups: list[list[int]] = []
    for member in members:
        own = _samples(
            member, layout, pixels, seed, geometry_hw, prompts, vocabulary, fps, len(samples)
        )
        groups.append(list(range(len(samples), len(samples) + len(own))))
        samples += own
    media = [medium for sample in samples for medium in sample.pixels]
    kinds = {medium.kind for medium in media}
    has_geometry = any(medium.group >= 0 for medium in media)
    flags = ModalityFlags(KIND_IMAGE in kinds, KIND_VIDEO in kinds, has_geometry, boundary=True)
    return collate(samples, groups, flags=flags, position_rows=layout.num_position_rows)


def _samples(
    member: Member,
    layout: TokenLayout,
    pixels: PixelSpec,
    seed: int,
    geometry_hw: tuple[int, int] | None,
    prompts: bool,
    vocabulary: int,
    fps: float,
    first: int,
) -> list[Prepared]:
    """The branches of one member as encoded samples that share their media."""
    rng = np.random.default_rng([seed, member.seed])

    def words(count: int) -> IntArray:
        return rng.integers(256, vocabulary, count)

    pieces: list[IntArray | MediaItem] = [words(2)]
    media: list[MediaPixels] = []
    for clip in member.clips:
        shape = (clip.frames, clip.height, clip.width)
        units, rows, columns = pixels.grid(shape)
        if clip.kind == "video" and layout.frames_as_images:
            units = clip.frames
        times = tuple(index / fps for index in range(clip.frames))
        group = clip.group if layout.insertion != "none" else -1
        item = MediaItem(clip.kind, (units, rows, columns), times, layout.tau / fps, group)
        if layout.family == "internvl3":
            pieces.append(item)
        else:
            pieces += [np.array([layout.vision_start_id]), item, np.array([layout.vision_end_id])]
        frames = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
        geometry = None
        if group >= 0:
            size = (clip.frames, *geometry_hw, 3) if geometry_hw else None
            geometry = rng.integers(0, 256, size, dtype=np.uint8) if size else frames
        kind = KIND_IMAGE if clip.kind == "image" else KIND_VIDEO
        media.append(MediaPixels(kind, item.grid, frames, group, geometry, key=""))
    pieces.append(words(member.text))
    tails = [words(length) for length in member.branches]
    tails = tails if member.keep is None else [tails[member.keep]]
    encoded = [
        _encode([*pieces, tail], len(tail), layout, media, prompts, len(tails) > 1)
        for tail in tails
    ]
    return [
        Prepared(f"random#{first + index}", sample, tuple(media), source=0)
        for index, sample in enumerate(encoded)
    ]


def _encode(
    pieces: Sequence[IntArray | MediaItem],
    tail: int,
    layout: TokenLayout,
    media: Sequence[MediaPixels],
    prompts: bool,
    shared: bool,
) -> EncodedSample:
    """Expand one sample; the second half of its last ``tail`` tokens is supervised."""
    expanded = layout.expand(
        pieces, lambda text: np.frombuffer(text.encode(), np.uint8).astype(np.int64)
    )
    labels = np.full_like(expanded.input_ids, IGNORE_INDEX)
    supervised = 0 if prompts else tail - tail // 2
    if supervised:
        labels[-supervised:] = expanded.input_ids[-supervised:]
    visual = int(np.isin(expanded.token_kind, (KIND_IMAGE, KIND_VIDEO)).sum())
    return EncodedSample(
        input_ids=expanded.input_ids,
        labels=labels,
        token_kind=expanded.token_kind,
        position_ids=expanded.position_ids,
        grids=tuple(medium.grid for medium in media),
        prefix_len=len(labels) - tail if shared else 0,
        num_label_tokens=supervised,
        num_patches=sum(int(np.prod(medium.grid)) for medium in media),
        num_visual_tokens=visual,
        num_spatial_tokens=int((expanded.token_kind != KIND_TEXT).sum()) - visual,
        frames=tuple(() for _ in media),
        frame_times_s=tuple(() for _ in media),
    )
