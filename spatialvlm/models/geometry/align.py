"""From encoder features to the token order of a vision tower; pure functions.

*Merge-unit order* is (unit, row / m, column / m, m, m): the patches that become one language token
stand next to each other. It is the order of the patches of Qwen2.5-VL and Qwen3-VL in front of their
merger, and of InternVL's pixel shuffle at ratio 0.5.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn import functional as F

from spatialvlm.errors import AlignmentError
from spatialvlm.sequence.sizes import Size

TemporalMerge = Literal["concat", "mean", "first"]
TEMPORAL_MERGES = ("concat", "mean", "first")


def to_merge_units(
    x: Shaped[Tensor, "T gh gw ..."], merge_size: int = 2
) -> Shaped[Tensor, "N ..."]:
    """Raster order to merge-unit order.

    Raises:
        AlignmentError: The grid is not a multiple of the merge size.
    """
    units, rows, cols, *channels = x.shape
    if rows % merge_size or cols % merge_size:
        raise AlignmentError(
            f"a grid of {rows}x{cols} patches cannot be merged {merge_size}x{merge_size}"
        )
    x = x.reshape(units, rows // merge_size, merge_size, cols // merge_size, merge_size, *channels)
    return x.transpose(2, 3).flatten(0, 4)


def from_window_order(
    hidden: Float[Tensor, "N D"], window_index: Tensor, merge_size: int = 2
) -> Float[Tensor, "N D"]:
    """Undo the window permutation of Qwen2.5-VL's ``last_hidden_state``.

    The tower works on merge units permuted by ``window_index`` and only restores the order of its
    pooled output. Adding features to the permuted states raises no error and hits wrong patches.

    Args:
        hidden: States in window order.
        window_index: First result of ``transformers.vision_utils.get_vision_window_index`` for the
            same grids.
        merge_size: Patches per token along each side.

    Returns:
        States in merge-unit order.
    """
    units = hidden.view(-1, merge_size**2, hidden.shape[-1])
    return units[torch.argsort(window_index.to(hidden.device))].flatten(0, 1)


def resample(
    features: Float[Tensor, "S g h C"], grid_hw: Size, content: Size | None = None
) -> Float[Tensor, "S gh gw C"]:
    """Crop padding away and resample features to the patch grid of the vision tower.

    Bilinear in float32, antialiased when it shrinks; the identity when the grids are equal.

    Args:
        features: Patch features of frames of one size.
        grid_hw: Rows and columns of the vision tower.
        content: Rows and columns, from the top left, that hold image content; ``None`` = all.
    """
    if content is not None:
        features = features[:, : content[0], : content[1]]
    rows, cols = features.shape[1:3]
    if (rows, cols) == grid_hw:
        return features
    resized = F.interpolate(
        features.permute(0, 3, 1, 2).float(),
        size=grid_hw,
        mode="bilinear",
        align_corners=False,
        antialias=grid_hw[0] < rows or grid_hw[1] < cols,
    )
    return resized.permute(0, 2, 3, 1).to(features.dtype)


def frame_slots(frames: Float[Tensor, "S ..."], tau: int) -> Float[Tensor, "T tau ..."]:
    """Group frames into temporal units; missing frames of the last unit repeat the last frame.

    A still image in a model with two frames per unit therefore fills both slots with itself, as the
    processors repeat its pixels.
    """
    missing = -len(frames) % tau
    if missing:
        frames = torch.cat([frames, frames[-1:].expand(missing, *frames.shape[1:])])
    return frames.reshape(-1, tau, *frames.shape[1:])


def merge_time(slots: Float[Tensor, "N tau C"], mode: TemporalMerge) -> Float[Tensor, "N D"]:
    """Merge the frames of a unit: side by side, averaged, or only the first."""
    if mode == "concat":
        return slots.flatten(1)
    return slots.mean(dim=1) if mode == "mean" else slots[:, 0]


def frames_of_media(
    num_frames: Sequence[int],
    media_grid: Sequence[tuple[int, int, int]],
    media_group: Sequence[int],
    tau: int,
) -> list[slice | None]:
    """Which frames of its geometry group belong to each medium.

    A group is either one video (all frames are its own) or several images (one frame each).

    Args:
        num_frames: Frames of every group.
        media_grid: ``(T, gh, gw)`` of every medium.
        media_group: Group of every medium, -1 = no geometry.
        tau: Frames per unit.

    Raises:
        AlignmentError: A group is missing, or its frames do not make up the units of its media.
    """
    members: dict[int, list[int]] = {}
    for medium, group in enumerate(media_group):
        if group >= 0:
            members.setdefault(group, []).append(medium)
    if sorted(members) != list(range(len(num_frames))):
        raise AlignmentError(
            f"geometry features exist for {len(num_frames)} groups, but the media name groups "
            f"{sorted(members)}"
        )
    frames: list[slice | None] = [None] * len(media_group)
    for group, media in members.items():
        count = num_frames[group]
        shares = [count] if len(media) == 1 else [1] * len(media)
        units = [-(-share // tau) for share in shares]
        expected = [media_grid[medium][0] for medium in media]
        if sum(shares) != count or units != expected:
            raise AlignmentError(
                f"geometry group {group} has {count} encoder frames for {len(media)} media of "
                f"{expected} units with {tau} frames per unit; the encoder and the vision tower must "
                "see the same frames"
            )
        start = 0
        for medium, share in zip(media, shares, strict=True):
            frames[medium] = slice(start, start + share)
            start += share
    return frames
