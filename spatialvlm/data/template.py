"""Chat templates as token pieces, so that labels are built and never searched for.

All three families speak ChatML. A conversation becomes pieces: ids that belong to the template, ids of
text, and media. Text of rows is encoded with special tokens disabled, so a user who types
``<|im_start|>assistant`` or ``<|image_pad|>`` gets plain characters. The tags around names and boxes are the
exception: they only mark a span of the text they stand in, and the released models know them as tokens.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from spatialvlm.data.sample import Role, Turn
from spatialvlm.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from spatialvlm.typing import IntArray

FAMILY_OF_MODEL_TYPE = {
    "qwen2_5_vl": "qwen2_5vl",
    "qwen3_vl": "qwen3vl",
    "qwen3_vl_moe": "qwen3vl",
    "internvl": "internvl3",
}

_SHORT = 10
"""Headers and line ends occur in every sample; ids of texts up to this length are remembered."""

TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"


class _Markup(NamedTuple):
    """What a family writes around a medium."""

    before: str
    image: str
    video: str
    after: str
    newline: str
    """Ordinary text behind a medium."""


_MARKUP = {
    "qwen2_5vl": _Markup(
        "<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>", ""
    ),
    "qwen3vl": _Markup("<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>", ""),
    # The layout writes <img> and </img>, because a video has one pair per frame.
    "internvl3": _Markup("", "<IMG_CONTEXT>", "<video>", "", "\n"),
}


_QWEN_GROUNDING = tuple(
    f"<|{name}_{end}|>" for name in ("object_ref", "box", "quad") for end in ("start", "end")
)
_GROUNDING = {
    "qwen2_5vl": _QWEN_GROUNDING,
    "qwen3vl": _QWEN_GROUNDING,
    "internvl3": ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>"),
}
"""Tags of names and boxes that are one token each, in rows as in answers."""


class TextPiece(NamedTuple):
    """Token ids that stand next to each other."""

    ids: IntArray
    supervised: bool


class ChatTemplate:
    """Turns -> pieces of token ids and media, for one checkpoint; picklable.

    Attributes:
        family: ``qwen2_5vl``, ``qwen3vl`` or ``internvl3``.
        system: System text of conversations that bring none; None = no system turn.
        eos_id: The end-of-turn token, last supervised token of every answer.
        pad_id: Id for positions that no one looks at.
    """

    def __init__(self, family: str, tokenizer_json: str, system: str | None = None) -> None:
        self.family = family
        self.system = system
        self._markup = _MARKUP[family]
        self._load(tokenizer_json)
        self.start_id = self.token_id(TURN_START)
        self.eos_id = self.token_id(TURN_END)
        self.pad_id = self.token_id("<|endoftext|>")
        self.media_end_ids = tuple(
            self.token_id(name) for name in (self._markup.after or "</img>",)
        )
        self._refuse_leaks()

    @classmethod
    def from_checkpoint(cls, directory: str | Path, system: str = "stock") -> ChatTemplate:
        """Read tokenizer and template of a Hugging Face directory.

        Args:
            directory: With ``config.json``, tokenizer files and a chat template.
            system: ``stock`` = what the checkpoint's template adds by itself, ``none``, or a text.

        Raises:
            ConfigError: Another family, or the checkpoint's template renders probe conversations
                differently (both texts are shown around the first difference).
        """
        from transformers import AutoTokenizer

        folder = Path(directory)
        family = read_family(folder)
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        text = read_chat_template(folder, tokenizer)
        template = cls(family, tokenizer.backend_tokenizer.to_str(), None)

        def stock(messages: list[dict[str, Any]]) -> str:
            rendered = tokenizer.apply_chat_template(messages, chat_template=text, tokenize=False)
            return str(rendered)

        template.system = template._default_system(stock)
        template._compare(stock, folder)
        if system != "stock":
            template.system = None if system == "none" else system
        return template

    def pieces(
        self, turns: Sequence[Turn], *, train_on: Literal["all", "last"] = "all"
    ) -> list[TextPiece | int]:
        """A whole conversation; integers are media of the sample, each in place of its placeholder.

        Supervised are the text and the end-of-turn token of assistant turns with ``train``; under
        ``train_on="last"`` only of the last turn.
        """
        whole = self._with_system(turns)
        builder = _Builder(self)
        for index, turn in enumerate(whole, start=1):
            supervised = (
                turn.role == "assistant"
                and turn.train
                and (train_on == "all" or index == len(whole))
            )
            builder.special(self.start_id)
            builder.text(f"{turn.role}\n")
            if turn.role == "assistant":
                # As at generation time the header is a piece of its own, whatever the answer starts with.
                builder.cut()
            for part in turn.parts:
                if isinstance(part, str):
                    builder.text(part, supervised)
                else:
                    builder.medium(part)
            builder.cut()
            builder.special(self.eos_id, supervised)
            builder.text("\n")
        return builder.finish()

    def prompt(self, turns: Sequence[Turn]) -> list[TextPiece | int]:
        """Pieces up to the header of the answer that is to be generated; no label."""
        pieces = self.pieces(
            [turn for turn in turns if turn.role != "assistant" or turn is not turns[-1]]
        )
        header = [np.array([self.start_id], np.int64), self.encode("assistant\n")]
        unsupervised = [
            piece if isinstance(piece, int) else TextPiece(piece.ids, False) for piece in pieces
        ]
        return [*unsupervised, TextPiece(np.concatenate(header), False)]

    def encode(self, text: str) -> IntArray:
        """Ids of plain text; strings that look like special tokens stay text, but for grounding tags."""
        if len(text) <= _SHORT:
            if text not in self._short:
                if len(self._short) > 10_000:
                    self._short.clear()
                self._short[text] = self._encode(text)
            return self._short[text]
        return self._encode(text)

    def _encode(self, text: str) -> IntArray:
        if "<" in text and self._tags:
            between = self._tag.split(text)
            if len(between) > 1:
                parts = [[self._tags[t]] if t in self._tags else self._ids(t) for t in between if t]
                return np.concatenate(parts).astype(np.int64)
        return self._ids(text)

    def _ids(self, text: str) -> IntArray:
        (found,) = self._plain.encode_batch_fast([text], add_special_tokens=False)  # no offsets
        return np.asarray(found.ids, dtype=np.int64)

    def decode(self, ids: Sequence[int] | IntArray, *, skip_special_tokens: bool = False) -> str:
        """Text of ids; grounding tags are text and stay."""
        numbers = [int(i) for i in ids]
        if skip_special_tokens:
            dropped = self._special.difference(self._tags.values())
            numbers = [i for i in numbers if i not in dropped]
        return str(self._plain.decode(numbers, skip_special_tokens=False))

    def token_id(self, token: str) -> int:
        """Id of a special token.

        Raises:
            ConfigError: The tokenizer has no such token.
        """
        found = self._plain.token_to_id(token)
        if found is None:
            raise ConfigError(
                f"the tokenizer has no token {token!r}, which a {self.family} checkpoint needs; "
                "use the tokenizer files that belong to the model"
            )
        return int(found)

    @property
    def fingerprint(self) -> str:
        """Identity of tokenizer and template."""
        text = f"{self.family}|{self.system}|{self._json}"
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @property
    def before_media(self) -> int | None:
        """Id written before a medium."""
        return self.token_id(self._markup.before) if self._markup.before else None

    @property
    def after_media(self) -> int | None:
        """Id written behind a medium."""
        return self.token_id(self._markup.after) if self._markup.after else None

    @property
    def media_newline(self) -> str:
        """Text written behind a medium."""
        return self._markup.newline

    def render(self, turns: Sequence[Turn], kinds: Sequence[str] = ()) -> str:
        """The conversation as text, one placeholder per medium, as ``apply_chat_template`` gives it."""
        out = []
        for turn in self._with_system(turns):
            out.append(f"{TURN_START}{turn.role}\n")
            for part in turn.parts:
                if isinstance(part, str):
                    out.append(part)
                else:
                    token = self._markup.image if kinds[part] == "image" else self._markup.video
                    out.append(
                        f"{self._markup.before}{token}{self._markup.after}{self._markup.newline}"
                    )
            out.append(f"{TURN_END}\n")
        return "".join(out)

    def _with_system(self, turns: Sequence[Turn]) -> list[Turn]:
        if self.system is None or (turns and turns[0].role == "system"):
            return list(turns)
        return [Turn("system", (self.system,)), *turns]

    def _default_system(self, stock: Any) -> str | None:
        rendered = stock([{"role": "user", "content": [{"type": "text", "text": "x"}]}])
        head = rendered.split(f"{TURN_START}user\n", 1)[0]
        opening = f"{TURN_START}system\n"
        if not head.startswith(opening):
            return None
        return str(head[len(opening) :].removesuffix(f"{TURN_END}\n"))

    def _compare(self, stock: Any, folder: Path) -> None:
        for turns, kinds in probe_conversations():
            ours, theirs = self.render(turns, kinds), stock(_messages(turns, kinds))
            if ours != theirs:
                at = next(
                    (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
                    min(len(ours), len(theirs)),
                )
                raise ConfigError(
                    f"the chat template of {folder} is not the one of {self.family}: at character {at} it gives "
                    f"{theirs[at : at + 40]!r}, expected {ours[at : at + 40]!r}. Restore the template file of the "
                    "released checkpoint"
                )

    def _refuse_leaks(self) -> None:
        markup = self._markup
        tokens = [
            TURN_START,
            TURN_END,
            markup.before,
            markup.image,
            markup.after,
            *_INTERNVL_PAIR[self.family],
        ]
        for token in filter(None, tokens):
            if self.token_id(token) in self.encode(f"x{token}y"):
                raise ConfigError(
                    f"the tokenizer turns the text {token!r} into its special token even with special tokens "
                    "disabled; mark it as special in tokenizer.json"
                )

    def _load(self, tokenizer_json: str) -> None:
        from tokenizers import Tokenizer

        self._json = tokenizer_json
        self._plain: Tokenizer = Tokenizer.from_str(tokenizer_json)
        self._plain.no_truncation()
        self._plain.no_padding()
        self._plain.encode_special_tokens = True
        self._short: dict[str, IntArray] = {}
        self._special = {
            number
            for number, token in self._plain.get_added_tokens_decoder().items()
            if token.special
        }
        found = {tag: self._plain.token_to_id(tag) for tag in _GROUNDING[self.family]}
        self._tags = {tag: number for tag, number in found.items() if number in self._special}
        self._tag = re.compile(f"({'|'.join(map(re.escape, self._tags))})")

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_plain", "_short", "_tag")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._load(state["_json"])  # `encode_special_tokens` is not part of the JSON


_INTERNVL_PAIR: dict[str, tuple[str, ...]] = {
    "qwen2_5vl": (),
    "qwen3vl": (),
    "internvl3": ("<img>", "</img>"),
}


class _Builder:
    """Collects pieces; neighbouring text of one kind is encoded in one go, as the stock processor does."""

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template
        self.out: list[TextPiece | int] = []
        self._ids: list[IntArray] = []
        self._text = ""
        self._supervised = False

    def text(self, text: str, supervised: bool = False) -> None:
        if supervised != self._supervised:
            self._flush()
            self._supervised = supervised
        self._text += text

    def special(self, token: int, supervised: bool = False) -> None:
        self.cut()
        if supervised != self._supervised:
            self._flush()
            self._supervised = supervised
        self._ids.append(np.array([token], np.int64))

    def medium(self, index: int) -> None:
        before, after = self.template.before_media, self.template.after_media
        if before is not None:
            self.special(before)
        self._flush()
        self.out.append(index)
        if after is not None:
            self.special(after)
        self.text(self.template.media_newline)

    def cut(self) -> None:
        """Encode what was collected; text that follows starts a new token."""
        if self._text:
            self._ids.append(self.template.encode(self._text))
            self._text = ""

    def finish(self) -> list[TextPiece | int]:
        self._flush()
        return self.out

    def _flush(self) -> None:
        self.cut()
        if self._ids:
            self.out.append(TextPiece(np.concatenate(self._ids), self._supervised))
            self._ids = []


def read_family(folder: Path) -> str:
    """Family of a Hugging Face directory.

    Raises:
        ConfigError: No ``config.json``, or another model type.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(
            f"{folder} holds no model: there is no config.json; give a Hugging Face directory"
        )
    kind = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    if kind not in FAMILY_OF_MODEL_TYPE:
        raise ConfigError(
            f"{path} has model_type {kind!r}; supported are {', '.join(sorted(FAMILY_OF_MODEL_TYPE))}"
        )
    return FAMILY_OF_MODEL_TYPE[kind]


def read_chat_template(folder: Path, tokenizer: Any) -> str:
    """Text of the checkpoint's chat template: the processor's file, or the tokenizer's own."""
    jinja, legacy = folder / "chat_template.jinja", folder / "chat_template.json"
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8")
    if legacy.is_file():
        return str(json.loads(legacy.read_text(encoding="utf-8"))["chat_template"])
    if tokenizer.chat_template:
        return str(tokenizer.chat_template)
    raise ConfigError(
        f"{folder} has no chat template; add chat_template.jinja of the released checkpoint"
    )


def load_processor(directory: str | Path) -> Any:
    """The checkpoint's own processor; only its sizes are read.

    Raises:
        CheckpointError: Its files are missing or damaged.
    """
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(str(directory))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{directory} has no usable processor ({str(error).splitlines()[0][:160]}); copy preprocessor_config.json "
            "and its neighbours from the released checkpoint."
        ) from error


def probe_conversations() -> Iterator[tuple[list[Turn], list[str]]]:
    """Conversations on which our rendering must equal the checkpoint's, with the kinds of their media."""
    user: Role = "user"
    assistant: Role = "assistant"
    yield [Turn(user, ("Hi",)), Turn(assistant, ("Hello.",))], []
    yield [Turn("system", ("Be brief.",)), Turn(user, ("Hi",)), Turn(assistant, ("Hello.",))], []
    yield (
        [Turn(user, ("a",)), Turn(assistant, ("b",)), Turn(user, ("c",)), Turn(assistant, ("d",))],
        [],
    )
    yield [Turn(user, (0, "What is it?")), Turn(assistant, ("A chair.",))], ["image"]
    yield (
        [Turn(user, ("Look: ", 0, " and ", 1, "?")), Turn(assistant, ("Yes",))],
        ["image", "image"],
    )
    yield [Turn(user, (0, "How many?")), Turn(assistant, ("3",))], ["video"]
    yield [Turn(user, (0, 1, "Both?")), Turn(assistant, ("No",))], ["image", "video"]
    yield (
        [
            Turn(user, ("q ", 0)),
            Turn(assistant, ("r",)),
            Turn(user, (1, "s")),
            Turn(assistant, ("t",)),
        ],
        ["image"] * 2,
    )
    yield [Turn(user, ("Ünïcödé 桌子 🪑 é",)), Turn(assistant, ("椅子",))], []
    yield [Turn(user, ("trailing  \n",)), Turn(assistant, (" leading and trailing \n\n",))], []
    yield [Turn(user, ("",)), Turn(assistant, ("x",))], []
    yield (
        [Turn("system", ("S",)), Turn(user, (0, "\n\nq")), Turn(assistant, ("{'a': [1, 2]}",))],
        ["video"],
    )


def _messages(turns: Sequence[Turn], kinds: Sequence[str]) -> list[dict[str, Any]]:
    """Turns in the form ``apply_chat_template`` takes."""

    def part(value: str | int) -> dict[str, str]:
        return {"type": "text", "text": value} if isinstance(value, str) else {"type": kinds[value]}

    return [
        {
            "role": turn.role,
            "content": [part(p) for p in turn.parts] if turn.role == "user" else turn.text,
        }
        for turn in turns
    ]
