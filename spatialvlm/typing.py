"""Types that cross package borders, and the legend of every shape annotation.

Letters: ``B`` batch, ``S`` frames, ``N`` spatial tokens per frame, ``T`` sequence length, ``D`` hidden
size, ``C`` channels, ``H W`` pixels, ``h w`` patch grid, ``V`` vocabulary, ``K`` answer options,
``M`` supervised positions, ``G`` geometry groups.

``data`` fills a :class:`Batch`, ``models`` reads it; neither imports the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    IntArray = npt.NDArray[np.int64]
    UInt8Array = npt.NDArray[np.uint8]
    FloatArray = npt.NDArray[np.float64]

# Values of ``token_kind``; the only place that numbers them.
KIND_TEXT, KIND_IMAGE, KIND_VIDEO, KIND_SPATIAL, KIND_CAMERA = range(5)

IGNORE_INDEX = -100
"""Label of a position that is not supervised (Hugging Face convention)."""


class ModalityFlags(NamedTuple):
    """What any rank holds in one micro-step; equal on all ranks."""

    image: bool
    video: bool
    geometry: bool
    boundary: bool
    """Last micro-step of the optimizer step."""


class Batch(TypedDict, total=False):
    """One pack: a flattened sequence of isolated samples and shared-prefix groups (batch size 1).

    There is no ``attention_mask``: isolation is stated by the segments. Query ``q`` may see key ``k``
    iff ``k <= q`` and (``seg(q) == seg(k)`` or ``parent(seg(q)) == seg(k)``).
    Media are listed in the order in which their tokens occur in the sequence.
    """

    input_ids: Tensor
    """int64 ``[1, T]``."""
    labels: Tensor
    """int64 ``[1, T]``, Hugging Face alignment; -100 where unsupervised and at each segment start."""
    position_ids: Tensor
    """int64 ``[4, 1, T]`` (row 0 = index inside the sample, rows 1-3 = M-RoPE) or ``[1, T]`` (1-D)."""
    token_kind: Tensor
    """uint8 ``[1, T]``: 0 text, 1 image, 2 video, 3 spatial, 4 camera."""
    segment_start: Tensor
    """int32 ``[num_segments]``, ascending; segments tile the sequence."""
    segment_len: Tensor
    """int32 ``[num_segments]``."""
    segment_parent: Tensor
    """int32 ``[num_segments]``: index of the prefix segment, -1 for a root."""
    logit_index: Tensor
    """int64 ``[M]``: positions whose next token is supervised. ``M >= 1``."""
    target_ids: Tensor
    """int64 ``[M]``."""
    loss_weight: Tensor
    """float32 ``[M]``; a pack without labels carries one row of weight 0."""
    sample_index: Tensor
    """int64 ``[M]``: which sample of the pack a supervised position belongs to."""
    source_index: Tensor
    """int64 ``[num_samples]``: index into the sources in the order of ``data.sources``, -1 = none."""
    capability_index: Tensor
    """int64 ``[num_samples]``: index into the sorted capability names, -1 = none."""
    frames_u8: Tensor
    """uint8, flat: every medium's frames ``[S, H, W, 3]`` at model resolution, concatenated."""
    frame_shapes: Tensor
    """int64 ``[num_media, 3]``: (S, H, W) of every medium."""
    media_kind: Tensor
    """uint8 ``[num_media]``: 1 image, 2 video."""
    media_grid_thw: Tensor
    """int64 ``[num_media, 3]``: patch grid before the merger, in sequence order of images and videos
    together (``image_grid_thw`` and ``video_grid_thw`` are its rows by ``media_kind``)."""
    media_group: Tensor
    """int64 ``[num_media]``: geometry group of the medium, ascending from 0; -1 = no geometry."""
    geometry_u8: Tensor
    """uint8, flat: every group's frames ``[S, H, W, 3]`` at the encoder's size. Absent when equal to
    ``frames_u8``."""
    geometry_shapes: Tensor
    """int64 ``[G, 3]``: (S, H, W) of every geometry group. Absent without geometry."""
    geometry_content: Tensor
    """int64 ``[num_media, 2]``: (height, width), from the top left, that a medium fills of its group's
    frames; (0, 0) = all. Absent when no frame is padded."""
    geometry_keys: list[str]
    """One content identity per group; equal keys are encoded once. Empty string = unknown."""
    flags: ModalityFlags
    uids: list[str]


class LossOutput(NamedTuple):
    """What one forward of :class:`~spatialvlm.models.spatial_vlm.SpatialVLM` returns; all on device."""

    loss_sum: Tensor
    """Scalar float32: sum of ``loss_weight * cross entropy``; divide by the step's denominator."""
    sample_loss: Tensor
    """float32 ``[num_samples]``, detached: the same sum per sample of the pack."""
    sample_weight: Tensor
    """float32 ``[num_samples]``: sum of the loss weights per sample."""
    sample_wrong: Tensor
    """float32 ``[num_samples]``: supervised positions (weight > 0) of the sample whose arg-max is another token."""
    num_correct: Tensor
    """Scalar int64: supervised positions whose arg-max is the target (weight > 0 only)."""
    num_supervised: Tensor
    """Scalar int64: supervised positions with weight > 0."""
    geometry_norm_ratio: Tensor
    """float32 ``[2]``, detached: sum over fused patches of ``|s'|/|v|``, and their count."""


@dataclass(frozen=True, slots=True)
class CostCoefficients:
    """FLOPs of one training step as a function of a pack's sizes.

    All terms already include the backward factor of what trains and of recomputation.
    """

    per_token: float
    per_pair: float
    """Per (query, key) pair the attention rule allows."""
    per_head_row: float
    per_patch: float
    """Linear layers of the vision encoder and projector, per patch before the merger."""
    per_patch_pair: float
    """Full-attention pairs inside one frame (or temporal unit) of the vision encoder."""
    geometry_per_token: float = 0.0
    geometry_per_frame_pair: float = 0.0
    geometry_per_global_pair: float = 0.0


@dataclass(frozen=True, slots=True)
class MarkSpec:
    """A mark that is drawn into an image when a row is loaded."""

    image: int
    """Index of the stored image (or frame) inside the row, from 0."""
    kind: Literal["box", "mask", "point", "id"]
    color: str
    name: str = ""
    """How the text calls it, unique inside a row ("the red box")."""
    label: str = ""
    """Text drawn beside the mark; empty = none."""
    obj: int = -1
    """Object index in the scene, -1 = none."""
    xy: tuple[float, float] | None = None
    bbox: tuple[float, float, float, float] | None = None
    """``[x0, y0, x1, y1)``."""
    rle: Any = None
    """COCO uncompressed run lengths ``{"size": [h, w], "counts": [...]}``."""
    units: Literal["px", "norm1000"] = "px"
    """Pixels of the stored image, or thousandths of its width and height."""
    style: Literal["default", "openspatial", "spar"] = "default"


JsonDict = dict[str, Any]
