"""Random access to the rows of one file: JSON lines, a JSON array, rows in memory.

A container lists where its rows are (:meth:`Container.scan`) and reads one of them again by that address
(:meth:`Container.read`). No file is ever loaded whole. Bytes of embedded media never enter a row: a true
value stands in their place, and :meth:`Container.media_bytes` fetches them when they are decoded.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from spatialvlm.data.sample import MediaRef
from spatialvlm.errors import DataError, MediaError

if TYPE_CHECKING:
    pass

_BLOCK = 1 << 20
_decode_start = json.JSONDecoder().raw_decode
"""``json.loads`` without its search for white space and for text behind the value."""


class RawRow(NamedTuple):
    """One row and its address."""

    row: int
    """Number inside the file, from 0; of JSON lines, the line number less one."""
    offset: int
    length: int
    value: Any
    """The parsed row, or the :class:`DataError` that it is."""


class Container:
    """Rows of one file."""

    path: Path

    def scan(self) -> Iterator[RawRow]:
        """All rows in file order."""
        raise NotImplementedError

    def read(self, row: int, offset: int, length: int) -> Any:
        """One row at an address that :meth:`scan` gave.

        Raises:
            DataError: ``bad_json``.
        """
        raise NotImplementedError

    def media_bytes(self, ref: MediaRef) -> list[bytes]:
        """Embedded bytes of one medium: one entry, or one per frame.

        Raises:
            MediaError: ``bad_cell`` or ``missing``.
        """
        raise MediaError(
            f"{self.path} holds no media, asked for {ref.member!r}.", reason="bad_cell"
        )


def parse_json(data: bytes, path: Path, line: Callable[[], int]) -> Any:
    """Parse one row, or say where it is broken."""
    try:
        text = data.decode().rstrip()  # a line break would move the error one line down
        if text.startswith("{"):
            value, end = _decode_start(text)
            if end == len(text):
                return value
        return json.loads(text)
    except json.JSONDecodeError as error:
        around = error.doc[max(0, error.pos - 40) : error.pos + 40]
        raise DataError(
            f"{path.name}:{line() + error.lineno - 1} column {error.colno}: {error.msg}, near {around!r}.",
            reason="bad_json",
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path.name}:{line()}: {type(error).__name__}: {str(error)[:80]}.", reason="bad_json"
        ) from error


def value_or_error(parse: Callable[[], Any]) -> Any:
    """The parsed row, or the error that stands in its place."""
    try:
        return parse()
    except DataError as error:
        return error


class JsonLines(Container):
    """One JSON value per line; blank lines are skipped."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def scan(self, start: int = 0, stop: int | None = None, row: int = 0) -> Iterator[RawRow]:
        """All rows, or those whose line starts in ``[start, stop)`` bytes, ``row`` being the first."""
        with self.path.open("rb") as file:
            file.seek(start)
            offset = start
            if offset == 0 and file.read(3) != b"\xef\xbb\xbf":
                file.seek(0)
            offset = file.tell()
            for number, line in enumerate(file, start=row):
                if stop is not None and offset >= stop:
                    return
                if not line.isspace():
                    try:
                        value = self._parse(line, number)
                    except DataError as error:
                        value = error
                    yield RawRow(number, offset, len(line), value)
                offset += len(line)

    def read(self, row: int, offset: int, length: int) -> Any:
        """One row at the address that :meth:`scan` gave."""
        file = os.open(self.path, os.O_RDONLY)  # buffered files cost more than the row
        try:
            return self._parse(os.pread(file, length, offset), row)
        finally:
            os.close(file)

    def ranges(self, parts: int) -> list[tuple[int, int, int]]:
        """The file cut at line starts: (start byte, stop byte, first line number) per part."""
        size = self.path.stat().st_size
        cuts, rows = [0], [0]
        lines = position = 0
        with self.path.open("rb") as file:
            while block := file.read(16 * _BLOCK):
                target = size * len(cuts) // parts
                while len(cuts) < parts and position <= target < position + len(block):
                    line_end = block.find(b"\n", target - position)
                    if line_end < 0:
                        break
                    cuts.append(position + line_end + 1)
                    rows.append(lines + block.count(b"\n", 0, line_end + 1))
                    target = size * len(cuts) // parts
                lines += block.count(b"\n")
                position += len(block)
        return list(zip(cuts, [*cuts[1:], size], rows, strict=True))

    def _parse(self, data: bytes, row: int) -> Any:
        return parse_json(data, self.path, lambda: row + 1)


class JsonArray(Container):
    """A JSON array; its elements' byte ranges are found by brackets and strings, block by block."""

    _TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|["\[\]{},]', re.DOTALL)

    def __init__(self, path: Path) -> None:
        self.path = path

    def scan(self) -> Iterator[RawRow]:
        """All rows in file order."""
        for number, (offset, data) in enumerate(self._elements()):
            value = value_or_error(partial(self._parse, data, offset))
            yield RawRow(number, offset, len(data), value)

    def read(self, row: int, offset: int, length: int) -> Any:
        """One row at the address that :meth:`scan` gave."""
        del row
        with self.path.open("rb") as file:
            file.seek(offset)
            return self._parse(file.read(length), offset)

    def _elements(self) -> Iterator[tuple[int, bytes]]:
        """Byte offset and bytes of every element, without the white space around it."""
        depth, base, begin = 0, 0, 0
        buffer, position, ended = b"", 0, False
        with self.path.open("rb") as file:
            while not ended:
                block = file.read(_BLOCK)
                buffer += block
                for token in self._TOKEN.finditer(buffer, position):
                    char = buffer[token.start()]
                    if char == 0x22 and token.end() - token.start() == 1:
                        break  # a string that the next block ends
                    position = token.end()
                    if char in b"[{":
                        depth += 1
                        if depth == 1:
                            begin = position
                    elif char in b"]}":
                        depth -= 1
                    if (depth == 1 and char == 0x2C) or depth == 0:
                        element = buffer[begin : token.start()].lstrip()
                        if element:
                            yield base + token.start() - len(element), element.rstrip()
                        begin = position
                    if depth == 0:
                        ended = True
                        break
                if not block and not ended:
                    raise DataError(
                        f"{self.path} ends inside the row at line {self._line(base + begin)}: the array "
                        "is cut off or a quote is missing, so later rows cannot be found. Repair the file.",
                        reason="bad_json",
                    )
                buffer, base, position, begin = buffer[begin:], base + begin, position - begin, 0
            rest = (buffer + file.read(_BLOCK)).strip()
            if rest:
                raise DataError(
                    f"{self.path} goes on after its array, near line {self._line(base)}: {rest[:40]!r}. "
                    "Join the arrays or split the file.",
                    reason="bad_json",
                )

    def _parse(self, data: bytes, offset: int) -> Any:
        return parse_json(data, self.path, partial(self._line, offset))

    def _line(self, offset: int) -> int:
        count, left = 1, offset
        with self.path.open("rb") as file:
            while left and (block := file.read(min(_BLOCK, left))):
                count += block.count(b"\n")
                left -= len(block)
        return count


class JoinedRows(Container):
    """Rows held in memory, for small sets whose rows are joined from several files."""

    def __init__(self, path: Path, rows: list[dict[str, Any]]) -> None:
        self.path = path
        self._rows = rows

    def scan(self) -> Iterator[RawRow]:
        """All rows in file order."""
        for number, value in enumerate(self._rows):
            yield RawRow(number, number, 0, value)

    def read(self, row: int, offset: int, length: int) -> Any:
        """One row at the address that :meth:`scan` gave."""
        del offset, length
        return self._rows[row]
