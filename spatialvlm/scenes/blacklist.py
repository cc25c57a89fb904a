"""Evaluation scenes that must not be trained on: lists, id patterns, room rules.

Blocking a scan blocks its **room**: ``scene0251_00`` also blocks the re-scan ``scene0251_01``.

    for hit in find_hits(paths_of_a_dataset):
        print(hit.value, hit.scene_id, hit.list_name)
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from spatialvlm.errors import ContaminationError, SceneError

LISTS_FOLDER = Path(__file__).parent / "blocklists"

_EDGE = r"(?<![0-9A-Za-z])"
_END = r"(?![0-9A-Za-z])"
PATTERNS: dict[str, str] = {
    "scannet": r"scene\d{4}_\d{2}(?!\d)",
    "3rscan": rf"{_EDGE}[0-9a-f]{{8}}-[0-9a-f]{{4}}-[0-9a-f]{{4}}-[0-9a-f]{{4}}-[0-9a-f]{{12}}{_END}",
    "hypersim": r"ai_\d{3}_\d{3}(?!\d)",
    "coco": rf"(?<!\d)\d{{12}}{_END}",
    "egoexo4d": (
        r"(?:cmu|fair|georgiatech|iiith|indiana|minnesota|nus|sfu|uniandes|unc|upenn|utokyo)"
        r"_[a-z]+(?:_?[a-z]+)*_?\d+(?:_\d+)+"
    ),
    # ARKitScenes and CA-1M video ids lie between 40 and 49 million.
    "arkitscenes": rf"{_EDGE}4\d{{7}}{_END}",
    "scannetpp": rf"{_EDGE}(?=[0-9a-f]*[a-f])(?=[0-9a-f]*\d)[0-9a-f]{{10}}{_END}",
    "matterport3d": rf"{_EDGE}(?=\w*\d)(?=\w*[a-z])(?=\w*[A-Z])[0-9A-Za-z]{{11}}{_END}",
}
"""How scene ids of each source look inside paths and fields."""
_SCANNER = re.compile("|".join(f"(?P<s{i}>{p})" for i, p in enumerate(PATTERNS.values())))
_SOURCES = tuple(PATTERNS)
_PREFIXES = re.compile(
    r"(?:scannet_?(?:pp|\+\+|v2)?|arkit_?scenes?|3rscan|matterport(?:3d)?|hypersim|ca1m)[_-]",
    re.IGNORECASE,
)
"""Names of datasets glued to an id (``arkitscenes_41069025``)."""


@dataclass(frozen=True)
class BlockList:
    """Scene ids of one evaluation set."""

    name: str
    scene_ids: frozenset[str]
    """``<source>/<native id>``."""


@dataclass(frozen=True)
class Hit:
    """A value that names a blocked scene or another scan of its room."""

    value: str
    scene_id: str
    """The id found in the value."""
    list_name: str
    level: Literal["scene", "room"]
    key: str
    """The blocked scene id, or the room id."""


def find_ids(text: str) -> list[str]:
    """Scene ids ``<source>/<native id>`` named anywhere in a path or field, in order of appearance.

    Prefixes such as ``scannet_`` and Windows separators do not matter.
    """
    found = []
    for match in _SCANNER.finditer(_PREFIXES.sub("/", text)):
        source = _SOURCES[int(str(match.lastgroup)[1:])]
        found.append(f"{source}/{match.group()}")
    return found


def room_of(scene_id: str, aliases: Mapping[str, str] | None = None) -> str:
    """Room id of a scene id.

    Args:
        scene_id: ``<source>/<native id>``.
        aliases: Scene id to room id where the id alone does not tell (ARKitScenes visit, 3RScan
            reference scan); a scene without an entry is its own room.
    """
    if aliases is not None and scene_id in aliases:
        return aliases[scene_id]
    source, _, native = scene_id.partition("/")
    if source == "scannet":
        return f"scannet/{native.split('_')[0]}"
    if source == "matterport3d":
        return f"matterport3d/{native.split('/')[0]}"
    if source == "rooms":
        return re.sub(r"-t\d+$", "", scene_id)
    return scene_id


def load_list(path: str | Path) -> BlockList:
    """Read a list file: header lines ``# key: value``, then one ``<source>/<native id>`` per line.

    Raises:
        SceneError: A line is not a scene id, or the ids do not match the ``sha256`` of the header.
    """
    path = Path(path)
    header: dict[str, str] = {}
    ids = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.startswith("#"):
            key, _, value = line[1:].partition(":")
            header[key.strip()] = value.strip()
        elif line.strip():
            if "/" not in line:
                raise SceneError(f"{path}:{number}: {line!r} is not '<source>/<native id>'.")
            ids.append(line.strip())
    digest = hashlib.sha256("".join(f"{name}\n" for name in ids).encode()).hexdigest()
    if header.get("sha256", digest) != digest:
        raise SceneError(
            f"{path}: the ids have sha256 {digest}, the header says {header['sha256']}. "
            "The list was edited or cut off; update the header or restore the file."
        )
    return BlockList(header.get("name", path.stem), frozenset(ids))


@lru_cache(maxsize=1)
def shipped_lists() -> tuple[BlockList, ...]:
    """Lists that come with the package: the 288 scenes of VSI-Bench."""
    return tuple(load_list(path) for path in sorted(LISTS_FOLDER.glob("*.txt")))


class Blacklist:
    """Several lists and their rooms, ready for look-ups.

    Args:
        lists: Which lists; the shipped ones when ``None``.
        aliases: See :func:`room_of`.
    """

    def __init__(
        self, lists: Sequence[BlockList] | None = None, aliases: Mapping[str, str] | None = None
    ) -> None:
        self.aliases = aliases
        self.scenes: dict[str, str] = {}
        self.rooms: dict[str, str] = {}
        for block_list in shipped_lists() if lists is None else lists:
            for scene_id in sorted(block_list.scene_ids):
                self.scenes.setdefault(scene_id, block_list.name)
                self.rooms.setdefault(room_of(scene_id, aliases), block_list.name)

    def check(self, scene_id: str, value: str = "") -> Hit | None:
        """Hit of one scene id, or ``None``. Matching by room includes other scans of the room."""
        value = value or scene_id
        if scene_id in self.scenes:
            return Hit(value, scene_id, self.scenes[scene_id], "scene", scene_id)
        room = room_of(scene_id, self.aliases)
        if room in self.rooms:
            return Hit(value, scene_id, self.rooms[room], "room", room)
        return None

    def hits(self, text: str) -> list[Hit]:
        """All hits inside a path or field."""
        found = (self.check(scene_id, text) for scene_id in find_ids(text))
        return [hit for hit in found if hit is not None]


def find_hits(
    values: Iterable[str],
    lists: Sequence[BlockList] | None = None,
    aliases: Mapping[str, str] | None = None,
) -> list[Hit]:
    """Values (paths, ids, any text) that name a blocked scene or another scan of its room.

    Args:
        values: Looked at one by one, in order.
        lists: Which lists; the shipped ones when ``None``.
        aliases: See :func:`room_of`.
    """
    blacklist = Blacklist(lists, aliases)
    return [hit for value in values for hit in blacklist.hits(value)]


def blocked_scenes(
    scenes: Iterable[tuple[str, str]], lists: Sequence[BlockList] | None = None
) -> list[str]:
    """Ids of the scenes that are blocked, lie in a blocked room, or name a blocked scan (``lifted/scene0011_00``).

    Args:
        scenes: Scene id and room id as stored. The room ids also tell which scans show a blocked scene's room
            where the scene id alone does not (visits of ARKitScenes).
        lists: Which lists; the shipped ones when ``None``.
    """
    rooms = dict(scenes)
    plain, stored = Blacklist(lists), Blacklist(lists, {s: r for s, r in rooms.items() if r})
    return [
        scene
        for scene, room in rooms.items()
        if plain.check(scene) or stored.check(scene) or plain.hits(f"{scene} {room}")
    ]


def require_clean(values: Iterable[str], what: str) -> None:
    """Refuse values that name evaluation scenes of the shipped lists.

    Raises:
        ContaminationError: Names the first hits.
    """
    hits = find_hits(values)
    if hits:
        shown = ", ".join(f"{hit.scene_id} ({hit.list_name}, {hit.level})" for hit in hits[:5])
        raise ContaminationError(
            f"{what}: {len(hits)} values name evaluation scenes: {shown}. Remove these rows."
        )
