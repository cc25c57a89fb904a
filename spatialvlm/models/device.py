"""Where the tensors of a batch live."""

from __future__ import annotations

from typing import cast

import torch

from spatialvlm.typing import Batch

HOST_READ = frozenset({
    "segment_start", "segment_len", "segment_parent", "frame_shapes", "media_kind", "media_grid_thw", "media_group",
    "geometry_shapes", "geometry_content",
})  # fmt: skip
"""Small tensors that the model reads as Python numbers; on a device every one would stop its queue."""


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move the tensors of a batch; what the model reads on the host, and everything else, stays."""
    if device.type == "cpu":
        return batch
    moved = {
        key: value.to(device, non_blocking=True)
        if isinstance(value, torch.Tensor) and key not in HOST_READ
        else value
        for key, value in batch.items()
    }
    return cast("Batch", moved)
