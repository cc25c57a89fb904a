"""Our models inside lmms-eval 0.7, as the model type ``spatialvlm``.

    python -m spatialvlm.evaluation.lmms_adapter --check
    python -m lmms_eval --model spatialvlm --model_args checkpoint=runs/stage2/final --tasks vsibench

lmms-eval is optional and is imported only when :data:`MANIFEST` or :class:`SpatialVLMChat` is asked for, both of which
are made on first access. It only logs a failing entry point and then says that the model is unknown; ``--check``
prints the real error.
"""

import io
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from spatialvlm.errors import ConfigError
from spatialvlm.evaluation.asks import Ask, batches, group_asks
from spatialvlm.evaluation.generate import Completion, GenConfig, Generator
from spatialvlm.evaluation.prompts import Messages
from spatialvlm.evaluation.schema import Item

NAME = "spatialvlm"
CLASS_PATH = "spatialvlm.evaluation.lmms_adapter.SpatialVLMChat"
NUM_ARGS = 6
"""``(context, doc_to_messages, generation kwargs, doc_id, task, split)`` in 0.7.3; its guide shows five."""


def require_lmms() -> Any:
    """The lmms_eval package.

    Raises:
        ConfigError: It is not installed, or cannot be imported.
    """
    try:
        import lmms_eval
    except ImportError as error:
        raise ConfigError(
            f'lmms-eval cannot be imported ({error}): pip install -e ".[lmms]"'
        ) from None
    return lmms_eval


def convert_messages(messages: Sequence[Mapping[str, Any]]) -> Messages:
    """lmms-eval's chat messages as ours: pictures become PNG bytes or paths, videos paths.

    Raises:
        ConfigError: A part we cannot show (sound, decoded video frames).
    """
    found: Messages = []
    for message in messages:
        parts: list[dict[str, Any]] = []
        content = message["content"]
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            kind = part["type"]
            source = part.get("url", part.get(kind))
            if kind == "text":
                parts.append({"type": "text", "text": part["text"]})
            elif kind == "image":
                parts.append({"type": "image", "image": _picture(source)})
            elif kind == "video" and isinstance(source, (str, Path)):
                parts.append({"type": "video", "video": str(Path(source).resolve())})
            else:
                raise ConfigError(
                    f"lmms-eval message part {kind!r} of type {type(source).__name__} is not supported"
                )
        found.append({"role": message["role"], "content": parts})
    return found


def _picture(source: Any) -> str | bytes:
    if isinstance(source, (str, Path)):
        return str(Path(source).resolve())
    buffer = io.BytesIO()
    source.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def cut(text: str, until: str | Sequence[str] | None) -> str:
    """Text before the first stop string (lmms-eval adds "two newlines" on its own)."""
    for stop in [until] if isinstance(until, str) else until or ():
        if stop:
            text = text.split(stop, 1)[0]
    return text


def run_requests(
    requests: Sequence[Any],
    task_dict: Mapping[str, Any],
    generator: Generator,
    batch_size: int,
) -> list[str]:
    """Answer lmms-eval requests; results in request order, questions on the same media together.

    Raises:
        ConfigError: Requests of another lmms-eval version, or sampling.
    """
    asks: list[Ask] = []
    settings: dict[str, tuple[int, Any]] = {}
    for number, request in enumerate(requests):
        if len(request.args) != NUM_ARGS:
            from importlib.metadata import version

            raise ConfigError(
                f"lmms-eval {version('lmms-eval')} passes {len(request.args)} request arguments, this adapter knows {NUM_ARGS}; "
                "install lmms-eval>=0.7.3,<0.8"
            )
        _, to_messages, options, doc_id, task, split = request.args
        if options.get("do_sample"):
            raise ConfigError(f"task {task} asks for sampling; this adapter decodes greedily")
        messages = convert_messages(to_messages(task_dict[task][split][doc_id]))
        item = Item(str(number), "request", None, str(task), str(number))
        asks.append(Ask(item, messages, ""))
        settings[item.id] = int(options.get("max_new_tokens", 64)), options.get("until")
    answers: dict[str, str] = {}
    for limit in sorted({limit for limit, _ in settings.values()}):
        part = [ask for ask in asks if settings[ask.item.id][0] == limit]
        for batch in batches(group_asks(part), batch_size):
            prepared = [generator.prepare([ask.messages for ask in group]) for group in batch]
            found: list[list[Completion]] = generator.generate(prepared, GenConfig(limit))
            for group, completions in zip(batch, found, strict=True):
                for ask, completion in zip(group, completions, strict=True):
                    answers[ask.item.id] = cut(completion.text, settings[ask.item.id][1])
    return [answers[str(number)] for number in range(len(requests))]


@cache
def _chat_class() -> type:
    require_lmms()
    from lmms_eval.api.model import lmms

    class SpatialVLMChat(lmms):  # type: ignore[misc]
        """A checkpoint of ours as an lmms-eval chat model; one process (use recipes/evaluate.py for more).

        Args:
            checkpoint: Model directory or hub id.
            batch_size: Prompts generated together.
            device: ``cuda`` or ``cpu``; default: a GPU where there is one.
            dtype: ``bf16`` or ``fp32``.
            frames: Frames per video.
            frame_policy: ``linspace`` or ``uniform_tail``.
            max_pixels: Largest picture after resizing.
            generator: Replaces the model, for tests.
        """

        is_simple = False

        def __init__(
            self,
            checkpoint: str = "",
            batch_size: int = 8,
            device: str | None = None,
            dtype: str = "bf16",
            frames: int = 32,
            frame_policy: str = "linspace",
            max_pixels: int | None = None,
            generator: Callable[[], Generator] | None = None,
            **unknown: Any,
        ) -> None:
            super().__init__()
            unknown.pop("max_batch_size", None)  # lmms-eval always passes it
            if unknown:
                raise ConfigError(f"unknown --model_args: {', '.join(sorted(unknown))}")
            self.batch_size_per_gpu = int(batch_size)
            if generator is not None:
                self.generator = generator()
                return
            from spatialvlm.evaluation.subject import Subject

            if dtype not in ("bf16", "fp32"):
                raise ConfigError(f"dtype={dtype!r} is not one of: bf16, fp32")
            import torch

            device = device or ("cuda" if torch.cuda.is_available() else "cpu")
            pixels = int(max_pixels) if max_pixels else None
            subject = Subject(checkpoint, device=device, dtype=dtype, max_pixels=pixels)  # type: ignore[arg-type]
            self.generator = subject.generator(
                Path(), frames=int(frames), frame_policy=frame_policy
            )

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            """Answers in request order."""
            from PIL import ImageFile

            # Some lmms-eval tasks switch this on for the whole process; our loader refuses cut-off pictures.
            before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
            try:
                return self._answer(requests)
            finally:
                ImageFile.LOAD_TRUNCATED_IMAGES = before

        def _answer(self, requests: Sequence[Any]) -> list[str]:
            return run_requests(requests, self.task_dict, self.generator, self.batch_size_per_gpu)

        def loglikelihood(self, requests: Sequence[Any]) -> Any:
            """Not supported: the tasks this adapter is for generate text."""
            raise NotImplementedError(
                "spatialvlm answers by generation; choose generate_until tasks"
            )

        def generate_until_multi_round(self, requests: Sequence[Any]) -> Any:
            """Not supported: one question per request."""
            raise NotImplementedError("spatialvlm answers one round; choose single-round tasks")

    return SpatialVLMChat


@cache
def _manifest() -> Any:
    require_lmms()
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=NAME, chat_class_path=CLASS_PATH)


def __getattr__(name: str) -> Any:
    if name == "MANIFEST":
        return _manifest()
    if name == "SpatialVLMChat":
        return _chat_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def check() -> str:
    """Import lmms-eval, resolve the entry point and the class.

    Raises:
        ConfigError: What fails, with the real reason.
    """
    require_lmms()
    from importlib.metadata import entry_points, version

    found = [entry for entry in entry_points(group="lmms_eval.models") if entry.name == NAME]
    if not found:
        raise ConfigError(
            "the entry point lmms_eval.models:spatialvlm is not installed; pip install -e . again"
        )
    manifest = found[0].load()
    return f"lmms-eval {version('lmms-eval')}: model {manifest.model_id!r} -> {_chat_class().__qualname__}"


def main() -> int:
    """``--check``."""
    try:
        sys.stdout.write(check() + "\n")
    except ConfigError as error:
        sys.stderr.write(f"ConfigError: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
