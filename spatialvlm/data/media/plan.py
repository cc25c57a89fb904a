"""From a header to what the model will see: frames, size, and patch grid, before any decoding."""

from __future__ import annotations

import bisect
from dataclasses import dataclass, replace
from typing import Any, Literal

from spatialvlm.data.media.image import MAX_IMAGE_PIXELS
from spatialvlm.data.media.resize import fit_pixels, fit_video_pixels, tile_grid
from spatialvlm.data.media.video import choose_by_rate, choose_uniform
from spatialvlm.data.sample import MediaRef
from spatialvlm.errors import ConfigError, MediaError


@dataclass(frozen=True, slots=True)
class MediaPolicy:
    """How media become patches: the checkpoint's processor plus the run's budgets.

    ``rule`` is the size rule of the family: ``frame`` (Qwen2.5-VL: a budget per frame), ``clip``
    (Qwen3-VL: a budget per video), ``square`` (InternVL: fixed squares).
    """

    rule: Literal["frame", "clip", "square"]
    patch: int
    merge: int
    temporal: int
    """Frames per temporal patch."""
    image_pixels: tuple[int, int] = (1, 1)
    """Smallest and largest area of an image."""
    video_pixels: tuple[int, int] = (1, 1)
    """The same for a frame (``frame``) or for all frames together (``clip``)."""
    frame_pixels_cap: int | None = None
    """``clip`` only: largest area of one frame."""
    video_total_pixels: int | None = None
    """``frame`` only: largest area of all frames together."""
    tile: int = 0
    """``square`` only: side of a tile."""
    max_tiles: int = 1
    frames: Literal["uniform", "fps"] = "uniform"
    num_frames: int = 32
    fps: float | None = None
    max_frames: int = 512
    max_image_pixels: int = MAX_IMAGE_PIXELS
    frame_dir_fps: float = 1.0

    @property
    def factor(self) -> int:
        """Pixels per LLM token side."""
        return self.patch * self.merge

    @classmethod
    def from_processor(cls, processor: Any) -> MediaPolicy:
        """Read sizes from a loaded Hugging Face processor of one of the three families.

        Raises:
            ConfigError: The processor belongs to another family.
        """
        image, video = processor.image_processor, processor.video_processor
        kind = type(processor).__name__
        if kind.startswith("InternVL"):
            side = int(image.size["height"])
            # the class defaults of the video processor are smaller than the released models' tiles
            side_tokens = round(processor.image_seq_length**0.5)
            return cls("square", patch=side // (2 * side_tokens), merge=2, temporal=1, tile=side)
        if kind.startswith("Qwen"):
            rule: Literal["frame", "clip"] = (
                "clip" if "Qwen3VL" in type(video).__name__ else "frame"
            )
            policy = cls(
                rule,
                patch=int(image.patch_size),
                merge=int(image.merge_size),
                temporal=int(image.temporal_patch_size),
                image_pixels=(int(image.size["shortest_edge"]), int(image.size["longest_edge"])),
                video_pixels=(int(video.size["shortest_edge"]), int(video.size["longest_edge"])),
            )
            if rule == "clip" and getattr(video, "cap_pixels_per_frame", None):
                policy = replace(
                    policy, frame_pixels_cap=int(video.max_video_tokens) * policy.factor**2
                )
            return policy
        raise ConfigError(
            f"processor {kind} is not of a supported family; use a Qwen2.5-VL, Qwen3-VL or InternVL3 checkpoint"
        )

    def with_budget(
        self,
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        video_max_pixels: int | None = None,
        video_total_pixels: int | None = None,
        **sampling: Any,
    ) -> MediaPolicy:
        """Override budgets; ``None`` keeps the checkpoint's.

        Args:
            min_pixels: Smallest image or video frame.
            max_pixels: Largest image or video frame.
            video_max_pixels: Largest video frame; ``None`` = ``max_pixels``.
            video_total_pixels: Largest sum over the frames of a video.
            **sampling: Any of ``frames num_frames fps max_frames max_tiles max_image_pixels
                frame_dir_fps``; values of ``None`` are ignored.
        """
        low, high = self.image_pixels
        image = (min(min_pixels or low, max_pixels or high), max_pixels or high)
        video, cap = self.video_pixels, self.frame_pixels_cap
        frame = video_max_pixels or max_pixels
        if self.rule == "frame":
            low, high = video
            video = (min(min_pixels or low, frame or high), frame or high)
        else:
            cap = frame or cap
            high = video_total_pixels or video[1]
            video = (min(video[0] if min_pixels is None else min_pixels, high), high)
        chosen = {key: value for key, value in sampling.items() if value is not None}
        total = video_total_pixels or self.video_total_pixels
        return replace(
            self,
            image_pixels=image,
            video_pixels=video,
            frame_pixels_cap=cap,
            video_total_pixels=total,
            **chosen,
        )

    def image_size(self, height: int, width: int) -> tuple[int, int]:
        """Size of a still image, (height, width)."""
        if self.rule == "square":
            return self.tile, self.tile
        low, high = self.image_pixels
        return fit_pixels(height, width, factor=self.factor, min_pixels=low, max_pixels=high)

    def video_size(self, num_frames: int, height: int, width: int) -> tuple[int, int]:
        """Size of every frame of a video of ``num_frames`` chosen frames."""
        low, high = self.video_pixels
        if self.rule == "square":
            return self.tile, self.tile
        if self.rule == "frame":
            if self.video_total_pixels is not None:
                high = max(min(high, self.video_total_pixels // num_frames), self.factor**2)
            return fit_pixels(
                height, width, factor=self.factor, min_pixels=min(low, high), max_pixels=high
            )
        if self.frame_pixels_cap is not None:
            share = min(self.frame_pixels_cap, high // num_frames)
            high = max(share, int(low / num_frames * 1.05), self.factor**2) * num_frames
        return fit_video_pixels(
            num_frames,
            height,
            width,
            factor=self.factor,
            temporal_factor=self.temporal,
            min_pixels=min(low, high),
            max_pixels=high,
        )


@dataclass(frozen=True, slots=True)
class MediaHeader:
    """What is known about a medium without decoding it."""

    size: tuple[int, int]
    """(height, width) of the stored image or frames, upright."""
    num_frames: int = 1
    fps: float = 1.0
    seconds: tuple[float, ...] = ()
    """Time of every stored frame of a video, ascending from 0."""
    stamps_s: tuple[float, ...] = ()
    """The times a frame is announced with: index / average rate for files, names for folders."""
    times_assumed: bool = False
    animated: bool = False
    """An image file with several frames, of which the first one is taken."""


@dataclass(frozen=True, slots=True)
class MediaInfo:
    """One medium as the model will see it; enough to lay out tokens and to load pixels."""

    ref: MediaRef
    """With the exact frames of a video filled in."""
    header: MediaHeader
    size: tuple[int, int]
    """(height, width) of every shipped frame."""
    grid: tuple[int, int, int]
    """Patches (t, h, w) before the merger."""
    tiles: tuple[int, int] = (1, 1)
    """Rows and columns of InternVL tiles of an image."""
    times_s: tuple[float, ...] = ()
    """Time of every chosen frame of a video."""
    second_per_grid_t: float = 0.0
    temporal: int = 1
    """Frames per temporal patch."""
    choices: range | None = None
    """Frames a shorter choice may be drawn from; None = the row fixed them."""

    @property
    def num_frames(self) -> int:
        """Frames shipped to the model (tiles and thumbnail of a tiled image)."""
        rows, cols = self.tiles
        if self.ref.kind == "image":
            return rows * cols + (rows * cols > 1)
        return len(self.times_s)

    @property
    def num_patches(self) -> int:
        """ViT patches before the merger."""
        t, h, w = self.grid
        return t * h * w

    def with_frames(self, num_frames: int) -> MediaInfo:
        """The same video with at most ``num_frames`` frames of the same range, at the same size."""
        if self.ref.kind == "image" or len(self.times_s) <= num_frames:
            return self
        choices = self.ref.frames if self.choices is None else self.choices
        assert choices is not None
        frames = tuple(choices[i] for i in choose_uniform(len(choices), num_frames))
        return replace(
            self,
            ref=self.ref._replace(frames=frames),
            **_timing(frames, self.header, self.temporal, self.grid[1:]),
        )


def plan_media(
    ref: MediaRef,
    header: MediaHeader,
    policy: MediaPolicy,
    *,
    allow_tiles: bool = True,
) -> MediaInfo:
    """Choose frames, size and grid.

    Args:
        ref: Where the medium lies; ``frames`` fixes the choice, ``clip_s`` restricts it.
        header: From :meth:`~spatialvlm.data.media.store.MediaStore.header`.
        policy: Size and sampling rules.
        allow_tiles: False for images that also go through the geometry encoder.

    Raises:
        MediaError: ``no_frames`` when the clip holds no frame or a fixed frame does not exist.
    """
    height, width = header.size
    if ref.kind == "image":
        tiles = (1, 1)
        if policy.rule == "square" and policy.max_tiles > 1 and allow_tiles:
            tiles = tile_grid(height, width, policy.tile, policy.max_tiles)
        size = policy.image_size(height, width)
        count = tiles[0] * tiles[1] + (tiles[0] * tiles[1] > 1)
        return MediaInfo(
            ref, header, size, (count, size[0] // policy.patch, size[1] // policy.patch), tiles
        )

    frames, choices = _choose_frames(ref, header, policy)
    size = policy.video_size(len(frames), height, width)
    rows_cols = (size[0] // policy.patch, size[1] // policy.patch)
    return MediaInfo(
        ref._replace(frames=frames),
        header,
        size,
        temporal=policy.temporal,
        choices=choices,
        **_timing(frames, header, policy.temporal, rows_cols),
    )


def _timing(
    frames: tuple[int, ...], header: MediaHeader, temporal: int, rows_cols: tuple[int, int]
) -> dict[str, Any]:
    """Grid and times of the chosen frames."""
    times = tuple(header.stamps_s[i] for i in frames)
    spacing = (
        (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 1.0 / max(header.fps, 1e-6)
    )
    return {
        "grid": (-(-len(frames) // temporal), *rows_cols),
        "times_s": times,
        "second_per_grid_t": temporal * spacing,
    }


def _choose_frames(
    ref: MediaRef, header: MediaHeader, policy: MediaPolicy
) -> tuple[tuple[int, ...], range | None]:
    """Frame indices, and the range they were drawn from."""
    if ref.frames is not None:
        bad = [i for i in ref.frames if not 0 <= i < header.num_frames]
        if bad or not ref.frames:
            raise MediaError(
                f"{ref.path}: frames {bad[:5]} do not exist, the video has {header.num_frames}",
                reason="no_frames",
            )
        return ref.frames, None
    first, stop = 0, header.num_frames
    if ref.clip_s is not None:
        first, stop = (bisect.bisect_left(header.seconds, t) for t in ref.clip_s)
        if first >= stop:
            raise MediaError(
                f"{ref.path}: no frame between {ref.clip_s[0]} s and {ref.clip_s[1]} s; the video lasts "
                f"{header.seconds[-1]:.2f} s",
                reason="no_frames",
            )
    if policy.frames == "fps":
        assert policy.fps is not None
        picked = choose_by_rate(header.seconds[first:stop], policy.fps, policy.max_frames)
    else:
        picked = choose_uniform(stop - first, policy.num_frames)
    return tuple(first + i for i in picked), range(first, stop)
