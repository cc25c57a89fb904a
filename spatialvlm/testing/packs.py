"""Random packs in the exact form of the data path, for tests and benchmarks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from spatialvlm.sequence.layout import MediaItem, TokenLayout
from spatialvlm.typing import Batch, ModalityFlags

if TYPE_CHECKING:
    from spatialvlm.sequence.pixels import PixelSpec


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
    import torch

    arrays: dict[str, list[Any]] = defaultdict(list)
    starts: list[int] = []
    lengths: list[int] = []
    parents: list[int] = []
    shapes: list[tuple[int, int, int]] = []
    media_kind: list[int] = []
    grids: list[tuple[int, int, int]] = []
    groups: list[int] = []
    geometry_shapes: list[tuple[int, int, int]] = []
    position, samples, num_groups = 0, 0, 0
    for member in members:
        rng = np.random.default_rng([seed, member.seed])

        def words(
            count: int, rng: np.random.Generator = rng
        ) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
            return rng.integers(256, vocabulary, count)

        pieces: list[np.ndarray[tuple[int], np.dtype[np.int64]] | MediaItem] = [words(2)]
        own_groups: dict[int, list[int]] = {}
        wraps = layout.family != "internvl3"
        for clip in member.clips:
            units, rows, columns = pixels.grid((clip.frames, clip.height, clip.width))
            if clip.kind == "video" and layout.frames_as_images:
                units = clip.frames
            grid = (units, rows, columns)
            times = tuple(index / fps for index in range(clip.frames))
            item = MediaItem(clip.kind, grid, times, layout.tau / fps, clip.group)
            pieces += [np.array([layout.vision_start_id])] if wraps else []
            pieces.append(item)
            pieces += [np.array([layout.vision_end_id])] if wraps else []
            pixels_u8 = rng.integers(
                0, 256, (clip.frames, clip.height, clip.width, 3), dtype=np.uint8
            )
            arrays["frames"].append(pixels_u8)
            shapes.append((clip.frames, clip.height, clip.width))
            media_kind.append(1 if clip.kind == "image" else 2)
            grids.append(grid)
            if clip.group >= 0 and layout.insertion != "none":
                own_groups.setdefault(clip.group, []).append(len(shapes) - 1)
            groups.append(
                num_groups + clip.group if clip.group >= 0 and layout.insertion != "none" else -1
            )
        for members_of_group in own_groups.values():
            count = sum(shapes[index][0] for index in members_of_group)
            if geometry_hw is not None:
                arrays["geometry_frames"].append(
                    rng.integers(0, 256, (count, *geometry_hw, 3), dtype=np.uint8)
                )
                geometry_shapes.append((count, *geometry_hw))
        num_groups += len(own_groups)
        pieces.append(words(member.text))

        prefix = layout.expand(
            pieces, lambda text: np.frombuffer(text.encode(), np.uint8).astype(np.int64)
        )
        tails = [words(length) for length in member.branches]
        tails = tails if member.keep is None else [tails[member.keep]]
        shared = len(prefix.input_ids) if len(tails) > 1 else 0
        follow = (
            1 + prefix.position_ids[1:].max()
            if len(prefix.position_ids) > 1
            else len(prefix.input_ids)
        )
        root = len(starts)
        if shared:
            starts.append(position)
            lengths.append(shared)
            parents.append(-1)
            arrays["ids"].append(prefix.input_ids)
            arrays["kinds"].append(prefix.token_kind)
            arrays["positions"].append(prefix.position_ids)
            position += shared
        for tail in tails:
            count = len(tail)
            steps = np.arange(count)
            rest = np.stack(
                [len(prefix.input_ids) + steps, *[follow + steps] * (len(prefix.position_ids) - 1)]
            )
            own = [] if shared else [prefix]
            length = count + sum(len(part.input_ids) for part in own)
            starts.append(position)
            lengths.append(length)
            parents.append(root if shared else -1)
            arrays["ids"] += [*(part.input_ids for part in own), tail]
            arrays["kinds"] += [*(part.token_kind for part in own), np.zeros(count, np.uint8)]
            arrays["positions"] += [*(part.position_ids for part in own), rest]
            position += length
            if not prompts:
                supervised = np.arange(position - count + count // 2, position)
                arrays["logit_index"].append(supervised - 1)
                arrays["targets"].append(tail[count // 2 :])
                arrays["weights"].append(np.ones(len(supervised), np.float32))
                arrays["sample_index"].append(np.full(len(supervised), samples))
            samples += 1

    def cat(parts: Sequence[Any], axis: int = 0) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts, axis=axis))

    position_ids = cat(arrays["positions"], axis=1)
    batch: Batch = {
        "input_ids": cat(arrays["ids"])[None],
        "token_kind": cat(arrays["kinds"])[None],
        "position_ids": position_ids[:, None] if len(position_ids) > 1 else position_ids,
        "segment_start": torch.tensor(starts, dtype=torch.int32),
        "segment_len": torch.tensor(lengths, dtype=torch.int32),
        "segment_parent": torch.tensor(parents, dtype=torch.int32),
        "source_index": torch.zeros(samples, dtype=torch.int64),
        "capability_index": torch.full((samples,), -1),
        "flags": ModalityFlags(1 in media_kind, 2 in media_kind, num_groups > 0, True),
        "uids": [f"random#{index}" for index in range(samples)],
    }
    if not prompts:
        batch["logit_index"], batch["target_ids"] = (
            cat(arrays["logit_index"]),
            cat(arrays["targets"]),
        )
        batch["loss_weight"], batch["sample_index"] = (
            cat(arrays["weights"]),
            cat(arrays["sample_index"]),
        )
    if shapes:
        batch["frames_u8"] = cat([frame.reshape(-1) for frame in arrays["frames"]])
        batch["frame_shapes"] = torch.tensor(shapes)
        batch["media_kind"] = torch.tensor(media_kind, dtype=torch.uint8)
        batch["media_grid_thw"] = torch.tensor(grids)
        batch["media_group"] = torch.tensor(groups)
    if num_groups:
        batch["geometry_keys"] = [""] * num_groups
    if geometry_shapes:
        batch["geometry_u8"] = cat([frame.reshape(-1) for frame in arrays["geometry_frames"]])
        batch["geometry_shapes"] = torch.tensor(geometry_shapes)
    return batch
