"""What is asked: prompts of items, grouped by their media, cut into batches of similar length.

Items that ask about the same media form a group, which is never split over processes, so that its visual prefix is
encoded once.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from spatialvlm.evaluation.predictions import Key
from spatialvlm.evaluation.prompts import Messages, build_messages, derangement
from spatialvlm.evaluation.schema import Benchmark, Item


def limited(items: Sequence[Item], limit: int | None, seed: int = 0) -> list[Item]:
    """At most ``limit`` items, an equal number per question type as far as they last, in file order.

    Items of a group (rotations and flips of one question) come all or not at all, because a part of a group is easier;
    one group comes in any case.
    """
    if limit is None or limit >= len(items):
        return list(items)
    groups: dict[tuple[str, str], list[Item]] = defaultdict(list)
    for item in items:
        groups[item.question_type, item.group or item.id].append(item)

    def order(key: tuple[str, str]) -> str:
        return hashlib.sha256(f"{seed}|{'|'.join(key)}".encode()).hexdigest()

    by_type: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for key in sorted(groups, key=order):
        by_type[key[0]].append(key)
    chosen: set[Key] = set()
    for depth in range(max(map(len, by_type.values()))):
        for _, queue in sorted(by_type.items()):
            members = groups[queue[depth]] if depth < len(queue) else []
            if not chosen or len(chosen) + len(members) <= limit:
                chosen |= {item.key for item in members}
    return [item for item in items if item.key in chosen]


@dataclass(frozen=True, slots=True)
class Ask:
    """One prompt."""

    item: Item
    messages: Messages
    sha: str
    """SHA-256 of the messages."""


def _sha(value: Any) -> str:
    return hashlib.sha256(
        json.dumps(value, sort_keys=True, default=_bytes_name).encode()
    ).hexdigest()


def _bytes_name(value: Any) -> str:
    data = value if isinstance(value, bytes) else repr(value).encode()
    return hashlib.sha256(data).hexdigest()


def media_key(messages: Messages) -> str:
    """Identity of everything that precedes the question: media, marks and system text."""
    parts = [part for m in messages for part in m["content"] if part["type"] != "text"]
    system = [m["content"] for m in messages if m["role"] == "system"]
    return _sha([parts, [m.get("marks") for m in messages], system])


def make_asks(
    benchmark: Benchmark,
    items: Sequence[Item],
    *,
    protocol: str,
    media: str = "real",
    seed: int = 0,
    allow_absolute: bool = False,
) -> list[Ask]:
    """Prompts of all items."""
    donors = derangement(benchmark, seed) if media == "shuffle" else {}
    asks = []
    for item in items:
        messages = build_messages(
            item,
            benchmark.spec,
            protocol,
            media,
            root=benchmark.media_root,
            donor=donors.get(item.key),
            allow_absolute=allow_absolute,
        )
        asks.append(Ask(item, messages, _sha(messages)))
    return asks


def estimated_length(messages: Messages) -> int:
    """Rough number of tokens: 256 per picture or frame (16 frames where unknown) and 4 characters per token."""
    total = 0
    for message in messages:
        for part in message["content"]:
            if part["type"] == "text":
                total += len(part["text"]) // 4
            elif part["type"] == "image":
                total += 256
            else:
                total += 256 * (len(part.get("frames") or ()) or 16)
    return total


def group_asks(asks: Sequence[Ask]) -> list[list[Ask]]:
    """Groups of prompts on the same media, longest first; ties keep file order."""
    groups: dict[str, list[Ask]] = defaultdict(list)
    for ask in asks:
        has_media = any(p["type"] != "text" for m in ask.messages for p in m["content"])
        groups[media_key(ask.messages) if has_media else f"text:{len(groups)}"].append(ask)
    return sorted(groups.values(), key=lambda group: -estimated_length(group[0].messages))


def batches(
    groups: Sequence[Sequence[Ask]], size: int, *, shared_prefix: bool = True
) -> Iterator[list[list[Ask]]]:
    """Batches of at most ``size`` prompts; a larger group is cut, a batch holds groups of similar length.

    Args:
        groups: Sorted by length.
        size: Prompts per batch.
        shared_prefix: ``False`` makes every prompt its own group (the visual prefix is encoded per prompt).
    """
    batch: list[list[Ask]] = []
    room = size
    for group in groups:
        step = size if shared_prefix else 1
        for start in range(0, len(group), step):
            piece = list(group[start : start + step])
            if len(piece) > room:
                yield batch
                batch, room = [], size
            batch.append(piece)
            room -= len(piece)
    if batch:
        yield batch
