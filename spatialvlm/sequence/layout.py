r"""Where visual, spatial and camera tokens stand in a sequence, for three model families.

A :class:`MediaItem` stands for exactly one placeholder token that a chat template writes
(``<|image_pad|>``, ``<|video_pad|>``, InternVL's ``<IMG_CONTEXT>`` and ``<video>``). Vision start and
end tokens around it that the template writes are ordinary text; everything that the stock processor
inserts in place of the placeholder (repeated pads, Qwen3-VL timestamps, InternVL frame labels and
``<img>`` pairs) is written here.

With ``V_k`` and ``S_k`` the visual and spatial tokens of unit k::

                        interleaved                              sequential
    Qwen2.5-VL video    <vs> V0 S0 V1 S1 <ve>                    <vs> V0 V1 S0 S1 <ve>
    Qwen3-VL video      t0 <vs> V0 S0 <ve> t1 <vs> V1 S1 <ve>    t0 <vs> V0 <ve> t1 <vs> V1 <ve> <vs> S0 S1 <ve>
    images of a group   <vs> V0 S0 <ve> .. <vs> V1 S1 <ve>       <vs> V0 <ve> .. <vs> V1 <ve> <vs> S0 S1 <ve>
    InternVL video      Frame1: <img> V0 S0 </img>\n..           Frame1: <img> V0 </img>\n.. \n<img> S0 S1 </img>
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from spatialvlm.errors import AlignmentError, ConfigError
from spatialvlm.sequence.positions import INSERTIONS, Block, Insertion, mrope_positions, unit_times
from spatialvlm.sequence.sizes import GroupSize, Size, SizePolicy
from spatialvlm.typing import KIND_CAMERA, KIND_IMAGE, KIND_SPATIAL, KIND_TEXT, KIND_VIDEO

if TYPE_CHECKING:
    from spatialvlm.typing import IntArray, UInt8Array

    EncodeText = Callable[[str], IntArray]

Family = Literal["qwen2_5vl", "qwen3vl", "internvl3"]
FAMILIES = ("qwen2_5vl", "qwen3vl", "internvl3")


class MediaItem(NamedTuple):
    """One image or video of a sample.

    Attributes:
        kind: ``image`` or ``video``.
        grid: ``(units, rows, cols)`` of patches before the merger. Units of a video are
            ``ceil(frames / layout.tau)``; InternVL images count their tiles here.
        frame_times_s: Time of every frame in seconds; needed for Qwen3-VL videos.
        second_per_grid_t: Seconds per unit; needed for Qwen2.5-VL videos in real time.
        group: Frames that the geometry encoder sees together share a number; -1 = no geometry.
    """

    kind: Literal["image", "video"]
    grid: tuple[int, int, int]
    frame_times_s: tuple[float, ...] = ()
    second_per_grid_t: float = 1.0
    group: int = -1


class Expanded(NamedTuple):
    """One sample after expansion.

    Attributes:
        input_ids: int64 ``[L]``.
        token_kind: uint8 ``[L]``, the ``KIND_*`` numbers of :mod:`spatialvlm.typing`.
        position_ids: int64 ``[4, L]`` (row 0 counts tokens, rows 1-3 are time, height, width), or
            ``[1, L]`` for InternVL.
    """

    input_ids: "IntArray"
    token_kind: "UInt8Array"
    position_ids: "IntArray"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLayout:
    """Token layout of one run; immutable and picklable.

    Attributes:
        family: ``qwen2_5vl``, ``qwen3vl`` or ``internvl3``.
        image_id: Id repeated for visual tokens of images.
        video_id: Id repeated for visual tokens of videos; InternVL uses ``image_id`` again.
        vision_start_id: ``<|vision_start|>`` or ``<img>``.
        vision_end_id: ``<|vision_end|>`` or ``</img>``.
        spatial_id: Id of the spatial placeholder; ``None`` when no spatial tokens are inserted.
        merge_size: Patches per token along each side.
        tokens_per_second: Positions per second of Qwen2.5-VL videos (2 in the released checkpoints).
        insertion: Where spatial tokens stand; ``none`` switches the geometry branch off.
        camera_token: Add one camera token behind the spatial tokens of every unit.
        frames_as_images: Treat every video frame as an image of its own.
        time: Times of Qwen2.5-VL videos that carry spatial tokens: ``index`` or ``seconds``.
        time_2d: Times of Qwen2.5-VL videos without spatial tokens: ``stock`` (seconds) or ``index``.
        text_after_vision: See :func:`~spatialvlm.sequence.positions.mrope_positions`.
        size: Size policy of the geometry encoder; ``None`` without an encoder.
    """

    family: Family
    image_id: int
    video_id: int
    vision_start_id: int
    vision_end_id: int
    spatial_id: int | None = None
    merge_size: int = 2
    tokens_per_second: float = 2.0
    insertion: Insertion = "none"
    camera_token: bool = False
    frames_as_images: bool = False
    time: Literal["index", "seconds"] = "index"
    time_2d: Literal["stock", "index"] = "stock"
    text_after_vision: Literal["original", "stock"] = "original"
    size: SizePolicy | None = None

    def __post_init__(self) -> None:
        for name, value, valid in (
            ("model family", self.family, FAMILIES),
            ("geometry.insertion", self.insertion, INSERTIONS),
            ("geometry.positions.time", self.time, ("index", "seconds")),
            ("geometry.positions.time_2d", self.time_2d, ("stock", "index")),
            (
                "geometry.positions.text_after_vision",
                self.text_after_vision,
                ("original", "stock"),
            ),
        ):
            if value not in valid:
                raise ConfigError(f"{name}={value!r} is not one of: {', '.join(valid)}")
        if self.inserts_spatial and self.spatial_id is None:
            raise ConfigError(
                f"geometry.insertion={self.insertion} needs the id of the spatial placeholder; "
                "add the token to the tokenizer first, or use in_place"
            )
        if self.camera_token and not self.inserts_spatial:
            raise ConfigError(
                f"geometry.camera_token=true has no place with insertion {self.insertion}; "
                "use interleaved or sequential, or switch the camera token off"
            )

    @property
    def inserts_spatial(self) -> bool:
        """Whether media with geometry get tokens of their own."""
        return self.insertion in ("interleaved", "sequential")

    @property
    def tau(self) -> int:
        """Frames per temporal unit of a video; also the frame slots that fusion merges."""
        return 1 if self.family == "internvl3" or self.frames_as_images else 2

    @property
    def num_position_rows(self) -> int:
        """4 with multimodal rotary positions, 1 for InternVL."""
        return 1 if self.family == "internvl3" else 4

    def count(self, item: MediaItem) -> tuple[int, int]:
        """Visual and spatial (plus camera) tokens of one medium, without text around them."""
        units, rows, cols = self._token_grid(item)
        spatial = rows * cols + self.camera_token if self._has_spatial(item) else 0
        return units * rows * cols, units * spatial

    def geometry_size(self, src_hw: Size, grid_hw: Size) -> Size | None:
        """Size at which the geometry encoder sees a frame; ``None`` without an encoder.

        Args:
            src_hw: Size of the source frame in pixels.
            grid_hw: Patch grid of the medium before the merger.
        """
        return None if self.size is None else self.size.target(src_hw, grid_hw)

    def group_size(self, frames: Sequence[tuple[Size, Size]]) -> GroupSize:
        """Common size of media that the encoder sees together, and the part that each of them fills.

        Args:
            frames: ``(src_hw, grid_hw)`` of every medium of a group, as for :meth:`geometry_size`.
        """
        assert self.size is not None, "a layout without an encoder has no geometry groups"
        return self.size.group([self.size.target(src_hw, grid_hw) for src_hw, grid_hw in frames])

    def expand(
        self, pieces: Sequence["IntArray | MediaItem"], encode_text: "EncodeText"
    ) -> Expanded:
        """Write out one sample.

        Args:
            pieces: Token ids of text and media, in order; a medium replaces its placeholder token.
            encode_text: Tokenizer call without special tokens, for timestamps and frame labels.

        Returns:
            Ids, kinds and positions of the whole sample.

        Raises:
            AlignmentError: A grid cannot be merged, or text around a medium is not what the
                template of this family writes.
        """
        parts = list(self._parts(pieces, encode_text))
        ids: list[IntArray] = []
        kinds: list[UInt8Array] = []
        segments: list[int | tuple[Block, ...]] = []
        block_id = {
            KIND_IMAGE: self.image_id,
            KIND_VIDEO: self.video_id,
            KIND_SPATIAL: self.spatial_id,
            KIND_CAMERA: self.spatial_id,
        }
        for part in parts:
            if isinstance(part, tuple):
                ids += [np.full(block.num_tokens, block_id[block.kind], np.int64) for block in part]
                kinds += [np.full(block.num_tokens, block.kind, np.uint8) for block in part]
                segments.append(part)
            else:
                ids.append(np.asarray(part, np.int64))
                kinds.append(np.full(len(part), KIND_TEXT, np.uint8))
                segments.append(len(part))
        input_ids = np.concatenate([np.zeros(0, np.int64), *ids])
        token_index = np.arange(len(input_ids), dtype=np.int64)[None]
        if self.num_position_rows == 1:
            position_ids = token_index
        else:
            mrope = mrope_positions(segments, self.text_after_vision)
            position_ids = np.concatenate([token_index, mrope])
        return Expanded(input_ids, np.concatenate([np.zeros(0, np.uint8), *kinds]), position_ids)

    def segments(
        self, pieces: Sequence["IntArray | MediaItem"], encode_text: "EncodeText"
    ) -> list[int | tuple[Block, ...]]:
        """Text lengths and vision runs of a sample, for inspection."""
        parts = self._parts(pieces, encode_text)
        return [part if isinstance(part, tuple) else len(part) for part in parts]

    def _parts(
        self, pieces: Sequence["IntArray | MediaItem"], encode_text: "EncodeText"
    ) -> Iterator["IntArray | tuple[Block, ...]"]:
        """Text ids and vision runs in sequence order."""
        last_of_group = {
            piece.group: index for index, piece in enumerate(pieces) if isinstance(piece, MediaItem)
        }
        units_so_far: Counter[int] = Counter()  # of each geometry group
        waiting: dict[int, tuple[Block, ...]] = {}  # sequential spatial blocks of unfinished groups
        due: tuple[Block, ...] = ()  # goes behind the vision end token the template writes next
        for index, piece in enumerate(pieces):
            if not isinstance(piece, MediaItem):
                if due:
                    if len(piece) == 0 or piece[0] != self.vision_end_id:
                        raise AlignmentError(
                            f"text after a medium of {self.family} starts with token "
                            f"{piece[:1].tolist()}, expected the vision end token "
                            f"{self.vision_end_id} of the chat template"
                        )
                    yield piece[:1]
                    yield from self._marked(due)
                    piece, due = piece[1:], ()
                yield piece
                continue
            if due:
                raise AlignmentError(
                    f"two media of {self.family} follow each other without vision end token"
                )
            runs, deferred = self._runs(piece, units_so_far[piece.group])
            units_so_far[piece.group] += piece.grid[0]
            yield from self._wrap(piece, runs, encode_text)
            if not deferred:
                continue
            blocks = waiting.pop(piece.group, ()) + deferred
            if index != last_of_group[piece.group]:
                waiting[piece.group] = blocks
            elif self.family == "internvl3":
                yield encode_text("\n")
                yield from self._marked(blocks)
            elif self.family == "qwen3vl" and not self._is_image(piece):
                yield from self._marked(blocks)  # inside the template's outer pair
            else:
                due = blocks
        if due:
            raise AlignmentError(
                f"a medium of {self.family} ends the text without vision end token"
            )

    def _runs(
        self, item: MediaItem, first_unit: int
    ) -> tuple[list[tuple[Block, ...]], tuple[Block, ...]]:
        """Vision runs of one medium, and spatial blocks that come behind its group."""
        num_units, rows, cols = self._token_grid(item)
        has_spatial = self._has_spatial(item)
        kind = KIND_IMAGE if self._is_image(item) else KIND_VIDEO
        units = range(first_unit, first_unit + num_units)

        def spatial(unit: int, t: int) -> tuple[Block, ...]:
            block = (Block(KIND_SPATIAL, unit, t, rows, cols),)
            return (*block, Block(KIND_CAMERA, unit, t, 0, 0)) if self.camera_token else block

        if self.family == "qwen2_5vl" and kind == KIND_VIDEO:
            insertion: Insertion = self.insertion if has_spatial else "none"
            time = self.time if has_spatial else "index" if self.time_2d == "index" else "seconds"
            step = float(np.float32(self.tokens_per_second) * np.float32(item.second_per_grid_t))
            visual_t, spatial_t = unit_times(num_units, insertion, time, step)
            visual_blocks = [
                (Block(kind, u, t, rows, cols),) for u, t in zip(units, visual_t, strict=True)
            ]
            spatial_blocks = [spatial(u, t) for u, t in zip(units, spatial_t, strict=False)]
            if insertion == "interleaved":
                pairs = zip(visual_blocks, spatial_blocks, strict=True)
                ordered = [block for pair in pairs for block in pair]
            else:
                ordered = visual_blocks + spatial_blocks
            return [tuple(block for blocks in ordered for block in blocks)], ()

        visual = [(Block(kind, unit, 0, rows, cols),) for unit in units]
        if self.family == "internvl3" and kind == KIND_IMAGE and num_units > 1:  # tiles
            return [tuple(block for blocks in visual for block in blocks)], ()
        if not has_spatial:
            return [*visual], ()
        if self.insertion == "interleaved":
            return [(*run, *spatial(run[0].unit, 1)) for run in visual], ()
        return [*visual], tuple(block for unit in units for block in spatial(unit, unit))

    def _wrap(
        self, item: MediaItem, runs: list[tuple[Block, ...]], encode_text: "EncodeText"
    ) -> Iterator["IntArray | tuple[Block, ...]"]:
        """Text that the stock processor writes between and around the runs of one medium."""
        if self.family == "internvl3":
            for index, run in enumerate(runs):
                if item.kind == "video":
                    yield encode_text(f"\nFrame{index + 1}: " if index else "Frame1: ")
                yield from self._marked(run)
        elif self.family == "qwen3vl" and not self._is_image(item):
            for seconds, run in zip(self._unit_seconds(item), runs, strict=True):
                yield encode_text(f"<{seconds:.1f} seconds>")
                yield from self._marked(run)
        else:
            for index, run in enumerate(runs):
                if index:
                    yield np.array([self.vision_end_id, self.vision_start_id])
                yield run

    def _marked(self, run: tuple[Block, ...]) -> Iterator["IntArray | tuple[Block, ...]"]:
        yield np.array([self.vision_start_id])
        yield run
        yield np.array([self.vision_end_id])

    def _unit_seconds(self, item: MediaItem) -> list[float]:
        """Mean of the first and last frame time of every unit; an odd last frame counts twice."""
        times = list(item.frame_times_s)
        times += times[-1:] * (len(times) % self.tau)
        if len(times) != item.grid[0] * self.tau:
            raise AlignmentError(
                f"a video of grid {item.grid} needs the times of {item.grid[0] * self.tau} frames "
                f"(or one less), got {len(item.frame_times_s)}"
            )
        return [(times[i] + times[i + self.tau - 1]) / 2 for i in range(0, len(times), self.tau)]

    def _is_image(self, item: MediaItem) -> bool:
        return item.kind == "image" or (self.frames_as_images and self.family != "internvl3")

    def _has_spatial(self, item: MediaItem) -> bool:
        return self.inserts_spatial and item.group >= 0

    def _token_grid(self, item: MediaItem) -> tuple[int, int, int]:
        units, rows, cols = item.grid
        if units < 1 or rows < 1 or cols < 1 or rows % self.merge_size or cols % self.merge_size:
            raise AlignmentError(
                f"{item.kind} has a patch grid of {item.grid}; rows and columns must be multiples of "
                f"the merge size {self.merge_size}. Resize it to whole merge units first"
            )
        if item.kind == "image" and units > 1:
            if self.family != "internvl3":
                raise AlignmentError(
                    f"an image of {self.family} has one unit, got grid {item.grid}"
                )
            if item.group >= 0 and self.insertion != "none":
                raise AlignmentError(
                    f"an InternVL image with geometry has {units} tiles, expected 1: samples with "
                    "geometry use a single tile whatever data.media.max_tiles says"
                )
        return units, rows // self.merge_size, cols // self.merge_size
