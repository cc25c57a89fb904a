"""The engine's :class:`~spatialvlm.evaluation.generate.Generator` for our models and data path.

Messages become :class:`~spatialvlm.data.sample.Sample` objects and are encoded by the code that encodes training
rows; the model itself comes in as a function, so that this package never imports ``models``.
"""

import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Literal

from spatialvlm.data.formats.base import Place as RowPlace
from spatialvlm.data.formats.rows import parse_marks
from spatialvlm.data.hooks import DrawMarks
from spatialvlm.data.media.plan import MediaPolicy
from spatialvlm.data.media.store import MediaStore
from spatialvlm.data.prompts import encode_prompt_group
from spatialvlm.data.sample import MediaRef, Sample, Turn
from spatialvlm.data.template import ChatTemplate
from spatialvlm.evaluation.blank import blank_copy
from spatialvlm.evaluation.generate import Completion, GenConfig
from spatialvlm.evaluation.prompts import Messages, frame_indices
from spatialvlm.sequence.layout import TokenLayout

if TYPE_CHECKING:
    from spatialvlm.typing import Batch

Complete = Callable[[list["Batch"], int], list[list[list[int]]]]
"""Packs and the number of new tokens -> token ids per pack and prompt."""


class PackGenerator:
    """Encodes prompt groups as packs and decodes completions.

    Args:
        complete: The model.
        template: Chat template of the checkpoint.
        layout: Token layout of the checkpoint.
        policy: Sizes of media; its number of frames is ``frames``.
        root: Folder of the media.
        frames: Frames of a video that is one file.
        frame_policy: How they are chosen, see :func:`~spatialvlm.evaluation.prompts.frame_indices`.
        geometry: Which media go through the geometry encoder, as in training's sources.
        draw_marks: Hook for rows with marks.
        scratch: Folder for grey pictures of ``media=blank``.
    """

    def __init__(
        self,
        complete: Complete,
        template: ChatTemplate,
        layout: TokenLayout,
        policy: MediaPolicy,
        *,
        root: Path,
        frames: int = 32,
        frame_policy: str = "linspace",
        geometry: Literal["auto", "on", "off"] = "auto",
        draw_marks: DrawMarks | None = None,
        scratch: Path | None = None,
    ) -> None:
        self.complete, self.template, self.layout = complete, template, layout
        self.policy = replace(policy, frames="uniform", num_frames=frames)
        self.root, self.scratch = root, scratch
        self.frames, self.frame_policy = frames, frame_policy
        self.geometry, self.draw_marks = geometry, draw_marks
        self._cells: dict[str, bytes] = {}
        self._local = threading.local()

    @property
    def store(self) -> MediaStore:
        """Media access of this thread; decoded frames are cached per thread.

        Paths were checked against the media root when the messages were built.
        """
        if not hasattr(self._local, "store"):
            self._local.store = MediaStore(
                ".",
                read_bytes=lambda ref: [self._cells[ref.path]],
                allow_absolute=True,
                allow_outside_root=True,
            )
        found: MediaStore = self._local.store
        return found

    def prepare(self, group: Sequence[Messages]) -> "Batch":
        """One pack: a media prefix and its prompts."""
        samples = [self.sample(messages, str(number)) for number, messages in enumerate(group)]
        return encode_prompt_group(
            samples,
            self.store,
            self.policy,
            self.template,
            self.layout,
            draw_marks=self.draw_marks,
        )

    def generate(self, prepared: Sequence["Batch"], config: GenConfig) -> list[list[Completion]]:
        """Complete all prompts greedily."""
        found = self.complete(list(prepared), config.max_new_tokens)
        return [[self._completion(ids, config) for ids in group] for group in found]

    def _completion(self, ids: list[int], config: GenConfig) -> Completion:
        finish = "length" if len(ids) >= config.max_new_tokens else "eos"
        return Completion(self.template.decode(ids, skip_special_tokens=True), len(ids), finish)

    # ------------------------------------------------------------------------------------ messages -> sample

    def sample(self, messages: Messages, uid: str) -> Sample:
        """A sample without an answer."""
        media: list[MediaRef] = []
        turns: list[Turn] = []
        marks: Any = None
        times: list[float] = []
        same_scene = False
        for message in messages:
            parts: list[str | int] = []
            for part in message["content"]:
                if part["type"] == "text":
                    parts.append(part["text"])
                    continue
                parts.append(len(media))
                media.append(self._media(part))
                times = part.get("times_s") or times
            turns.append(Turn(message["role"], tuple(parts)))
            marks = message.get("marks") or marks
            same_scene = same_scene or bool(message.get("same_scene"))
        images = all(ref.kind == "image" for ref in media)
        return Sample(
            uid=uid,
            source="evaluation",
            family="evaluation",
            turns=tuple(turns),
            media=tuple(media),
            same_scene=same_scene and bool(media) and images,
            geometry=self.geometry if media else "auto",
            frames_pinned=True,
            marks=parse_marks(marks, RowPlace("evaluation", uid)) if marks else (),
            meta={"frame_times_s": tuple(times)} if times else {},
        )

    def _media(self, part: Mapping[str, Any]) -> MediaRef:
        kind, source = part["type"], part[part["type"]]
        names = [str(name) for name in part.get("frames") or ()]
        if part.get("blank"):
            assert self.scratch is not None
            source = str(blank_copy(source, names, self.scratch))
        if isinstance(source, bytes):
            key = hashlib.sha256(source).hexdigest()
            self._cells[key] = source
            return MediaRef("image", "cell", key, "0/image/-1")
        path = str(PurePath(source).as_posix())
        if kind == "image":
            return MediaRef("image", "file", path)
        if names:
            frames = tuple(range(len(names)))
            return MediaRef("video", "frames", path, "\n".join(names), frames=frames)
        ref = MediaRef("video", "frames" if Path(path).is_dir() else "file", path)
        count = self.store.header(ref).num_frames
        return ref._replace(frames=tuple(frame_indices(count, self.frames, self.frame_policy)))
