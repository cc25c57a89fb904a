"""Answer a benchmark with a model: grouped by media, sharded over processes, resumable after a kill.

The model hides behind :class:`Generator`; this file knows neither torch nor tokenizers. Items that ask about
the same media form a group, which is never split over processes, so that its visual prefix is encoded once.
Every answered item is one line of ``predictions.rank<r>.jsonl``, flushed per batch; the lines hold nothing
that depends on speed or on the number of processes, so the merged file is the same however it was made.
"""

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

from spatialvlm.errors import BudgetError, ConfigError, DataError, EvaluationError, OutOfMemoryError
from spatialvlm.evaluation.asks import Ask, batches, group_asks
from spatialvlm.evaluation.predictions import (
    Key,
    read_manifest,
    read_predictions,
    write_predictions,
)
from spatialvlm.evaluation.prompts import Messages
from spatialvlm.evaluation.reading import read_jsonl
from spatialvlm.evaluation.schema import Benchmark

MAX_HALVINGS = 4


@dataclass(frozen=True, slots=True)
class GenConfig:
    """Decoding; always greedy, without stop strings."""

    max_new_tokens: int


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer."""

    text: str
    num_new_tokens: int = 0
    finish: str = "eos"
    """``eos`` or ``length``."""


class Generator(Protocol):
    """What the engine needs from a model. A group holds prompts that share all of their media."""

    def prepare(self, group: Sequence[Messages]) -> Any:
        """Decode and encode one group; called in worker threads.

        Raises:
            DataError: Media are missing or broken.
        """

    def generate(self, prepared: Sequence[Any], config: GenConfig) -> list[list[Completion]]:
        """Answer the prompts of several prepared groups, in order."""


@dataclass(frozen=True, slots=True)
class Place:
    """Process of a distributed run."""

    rank: int = 0
    world: int = 1


# ---------------------------------------------------------------------------------------------------- manifest


def check_manifest(folder: Path, manifest: Mapping[str, Any], *, overwrite: bool = False) -> None:
    """Refuse to continue answers that were made with other settings; write the manifest.

    Raises:
        ConfigError: Names the differing keys with both values.
    """
    path = folder / "manifest.json"
    if path.is_file():
        before = {} if overwrite else read_manifest(folder)
        ignored = {"world_size", "git_commit", "package_version", "batch_size"}
        now = json.loads(json.dumps(manifest, default=str))
        differing = [
            f"{key}: {before.get(key)!r} before, {now.get(key)!r} now"
            for key in sorted({*before, *now} - ignored)
            if before.get(key) != now.get(key)
        ]
        if differing and not overwrite:
            raise ConfigError(
                f"{folder} holds answers made with other settings:\n  "
                + "\n  ".join(differing)
                + "\nUse another run.dir or run.overwrite=true."
            )
        if differing or overwrite:
            for shard in folder.glob("predictions*.jsonl"):
                shard.unlink()
    for shard in folder.glob("predictions.rank*.jsonl"):
        _repair_tail(shard)  # now, before other processes read it
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(manifest, indent=1, default=str) + "\n", encoding="utf-8")
    partial.replace(path)


def finished(folder: Path) -> dict[Key, str]:
    """Prompt hash of every item that is already answered, from the files of any number of processes."""
    shards = sorted(folder.glob("predictions*.jsonl"))
    if not shards:
        return {}
    done, _ = read_predictions(shards, resuming=True)
    return {key: str(p.extra.get("prompt_sha", "")) for key, p in done.items() if not p.error}


def _repair_tail(path: Path) -> None:
    """Cut a line that a killed writer left without its newline."""
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        path.write_bytes(data[: data.rfind(b"\n") + 1])


# ------------------------------------------------------------------------------------------------------ running


class Progress:
    """Items, items/s, new tokens/s and ETA: a bar on a terminal, a line every 30 s elsewhere."""

    def __init__(
        self, name: str, total: int, folder: Path, *, quiet: bool, stream: TextIO | None = None
    ):
        from tqdm import tqdm

        stream = stream or sys.stderr
        self.name, self.total, self.folder, self.stream = name, total, folder, stream
        self.quiet = quiet
        self.start = self.last = time.monotonic()
        self.first = self._count()
        self.tokens = self.unparsed = 0
        on_terminal = stream.isatty() and not quiet
        self.bar = (
            tqdm(total=total, initial=self.first, desc=name, file=stream) if on_terminal else None
        )

    def _count(self) -> int:
        return sum(p.read_bytes().count(b"\n") for p in self.folder.glob("predictions.rank*.jsonl"))

    def update(self, completions: Sequence[Completion], unparsed: int) -> None:
        """Count the completions of this process; the items of all processes are read from their files."""
        self.tokens += sum(c.num_new_tokens for c in completions)
        self.unparsed += unparsed
        now = time.monotonic()
        if self.quiet or (self.bar is None and now - self.last < 30):
            return
        self.last = now
        done, seconds = self._count(), max(now - self.start, 1e-9)
        rate = (done - self.first) / seconds
        if self.bar is not None:
            self.bar.n = min(done, self.total)
            self.bar.set_postfix_str(f"{self.tokens / seconds:.0f} tok/s, {self.unparsed} unparsed")
            return
        eta = (self.total - done) / rate if rate > 0 else float("inf")
        print(
            f"{self.name}: {done}/{self.total} items, {rate:.1f}/s, {self.tokens / seconds:.0f} tokens/s, "
            f"ETA {eta:.0f} s, {self.unparsed} unparsed",
            file=self.stream,
        )

    def close(self) -> None:
        """Finish the bar."""
        if self.bar is not None:
            self.bar.n = min(self._count(), self.total)
            self.bar.close()


def answer(
    benchmark: Benchmark,
    asks: Sequence[Ask],
    generator: Generator,
    folder: Path,
    *,
    protocol: str = "official",
    place: Place = Place(),
    max_new_tokens: int | None = None,
    batch_size: int = 8,
    adapt_batch: bool = False,
    shared_prefix: bool = True,
    num_workers: int = 2,
    prefetch: int = 2,
    max_failures: float = 0.005,
    quiet: bool = False,
) -> int:
    """Answer this process's share of the prompts.

    Args:
        benchmark: Where the items come from.
        asks: All prompts; every process passes the same list.
        generator: The model.
        folder: Receives ``predictions.rank<r>.jsonl``; answers found there are not asked again.
        protocol: Whose rules decide what counts as unparsed in the progress line.
        place: This process.
        max_new_tokens: ``None`` = the benchmark's.
        batch_size: Prompts generated together.
        adapt_batch: Halve the batch when memory runs out, at most four times, for the rest of the benchmark.
        shared_prefix: Encode the media of a group once.
        num_workers: Decoding threads.
        prefetch: Batches decoded ahead.
        max_failures: Share of all items whose media may be unreadable; :func:`merge` counts all processes.
        quiet: No progress.

    Returns:
        Number of items answered now.

    Raises:
        BudgetError: Too many unreadable items; the message lists them.
        OutOfMemoryError: Also with the smallest batch.
    """
    done = finished(folder)
    config = GenConfig(max_new_tokens or benchmark.spec.max_new_tokens)
    judge = benchmark.spec.judge(protocol)
    mine = group_asks(asks)[place.rank :: place.world]
    groups = [
        left for group in mine if (left := [a for a in group if done.get(a.item.key) != a.sha])
    ]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"predictions.rank{place.rank}.jsonl"
    if path.is_file():
        _repair_tail(path)
    failures: list[str] = []
    answered = 0
    progress = Progress(benchmark.spec.name, len(asks), folder, quiet=quiet or place.rank > 0)
    size, smallest = batch_size, batch_size >> MAX_HALVINGS if adapt_batch else batch_size
    with path.open("a", encoding="utf-8") as file, ThreadPoolExecutor(max(num_workers, 1)) as pool:
        pending = list(batches(groups, batch_size, shared_prefix=shared_prefix))
        for batch in _decoded_ahead(generator, pending, pool, prefetch):
            ready: list[tuple[list[Ask], Any]] = []
            for group, future in batch:
                prepared, error = _prepared(generator, group, future)
                if error:
                    failures += [f"{ask.item.id}: {error}" for ask in group]
                    _write(file, [(ask, Completion("", 0, "error"), error) for ask in group])
                else:
                    ready.append((group, prepared))
            _check_budget(failures, len(asks), max_failures, benchmark.spec.name)
            found, size = _generate(generator, ready, config, size, smallest)
            _write(file, [(ask, completion, "") for ask, completion in found])
            answered += len(found)
            unreadable = sum(judge(ask.item, c.text).unparsed for ask, c in found)
            progress.update([completion for _, completion in found], unreadable)
    progress.close()
    return answered


def _decoded_ahead(
    generator: Generator,
    pending: Sequence[list[list[Ask]]],
    pool: ThreadPoolExecutor,
    prefetch: int,
) -> Iterator[list[tuple[list[Ask], "Future[Any]"]]]:
    """Batches in order, each group with its decoding; that of ``prefetch`` later batches is under way."""
    futures: dict[int, list[Future[Any]]] = {}
    for number, batch in enumerate(pending):
        for later in range(number, min(number + 1 + prefetch, len(pending))):
            if later not in futures:
                futures[later] = [
                    pool.submit(generator.prepare, [ask.messages for ask in group])
                    for group in pending[later]
                ]
        yield list(zip(batch, futures.pop(number), strict=True))


def _check_budget(failures: Sequence[str], total: int, max_failures: float, name: str) -> None:
    budget = int(max_failures * total)
    if len(failures) > budget:
        raise BudgetError(
            f"{len(failures)} of {total} items of {name} cannot be read (allowed: "
            f"{budget}, evaluation.max_failures={max_failures}):\n  " + "\n  ".join(failures[:20])
        )


def _prepared(generator: Generator, group: list[Ask], future: "Future[Any]") -> tuple[Any, str]:
    """Result of a decoding thread; a failure is retried once."""
    try:
        return future.result(), ""
    except DataError:
        try:
            return generator.prepare([ask.messages for ask in group]), ""
        except DataError as error:
            return None, str(error)


def _generate(
    generator: Generator,
    ready: Sequence[tuple[list[Ask], Any]],
    config: GenConfig,
    size: int,
    smallest: int,
) -> tuple[list[tuple[Ask, Completion]], int]:
    """Answer prepared groups, at most ``size`` prompts at a time; where memory runs out, with half as many.

    Returns:
        The answers, and the number of prompts that fits, for the batches to come.
    """
    prepared = {tuple(ask.item.key for ask in group): value for group, value in ready}
    left: list[list[Ask]] = [group for group, _ in ready]
    found: list[tuple[Ask, Completion]] = []
    while left:
        pieces = next(batches(left, size))
        asks = [ask for piece in pieces for ask in piece]
        answers: list[list[Completion]] | None = None
        try:
            inputs = [
                prepared[key]
                if (key := tuple(ask.item.key for ask in piece)) in prepared
                else generator.prepare([ask.messages for ask in piece])  # part of a group
                for piece in pieces
            ]
            answers = generator.generate(inputs, config)
        except OutOfMemoryError:
            if len(asks) <= max(smallest, 1):
                raise
        if answers is None:  # outside of `except`, which keeps the frames and their tensors alive
            while size >= len(asks):
                size = max(size // 2, 1)
            print(  # noqa: T201
                f"out of memory with {len(asks)} prompts; {size} together from now on",
                file=sys.stderr,
            )
            continue
        completions = [completion for answer in answers for completion in answer]
        found += zip(asks, completions, strict=True)
        done = {ask.item.key for ask in asks}
        left = [rest for group in left if (rest := [a for a in group if a.item.key not in done])]
    return found, size


def _row(ask: Ask, completion: Completion, error: str) -> dict[str, Any]:
    row: dict[str, Any] = {"id": ask.item.id, "prediction": completion.text}
    if ask.item.variant:
        row["variant"] = ask.item.variant
    row |= {k: v for k, v in asdict(completion).items() if k != "text"}
    row["prompt_sha"] = ask.sha
    if error:
        row["error"] = error
    return row


def _write(file: TextIO, rows: Sequence[tuple[Ask, Completion, str]]) -> None:
    for ask, completion, error in rows:
        file.write(json.dumps(_row(ask, completion, error), ensure_ascii=False) + "\n")
    file.flush()


def merge(folder: Path, asks: Sequence[Ask], *, max_failures: float = 0.005) -> Path:
    """Merge the files of all processes into ``predictions.jsonl`` in item order and remove them.

    Args:
        folder: Where the processes wrote.
        asks: All prompts.
        max_failures: Share of all items whose media may be unreadable, counted over the processes.

    Raises:
        EvaluationError: An item has no answer.
        BudgetError: Too many unreadable items; the message lists them.
    """
    shards = sorted(folder.glob("predictions*.jsonl"))
    shas = {ask.item.key: ask.sha for ask in asks}
    answers: dict[Key, dict[str, Any]] = {}
    for shard in shards:
        for _, row in read_jsonl(shard, drop_broken_tail=True)[0]:
            key = str(row["id"]), str(row.get("variant") or "")
            current = shas.get(key) == row.get("prompt_sha")
            if current and (key not in answers or answers[key].get("error")):
                answers[key] = row
    missing = [ask.item.id for ask in asks if ask.item.key not in answers]
    if missing:
        raise EvaluationError(
            f"{len(missing)} items were not answered, e.g. {missing[:5]}; start the run again"
        )
    failures = [f"{row['id']}: {row['error']}" for row in answers.values() if row.get("error")]
    _check_budget(failures, len(asks), max_failures, folder.name)
    path = folder / "predictions.jsonl"
    write_predictions(path, (answers[ask.item.key] for ask in asks))
    for shard in shards:
        if shard != path:
            shard.unlink()
    return path
