"""``logs/rank-00003.log``: what one process wrote to standard error, warnings and tracebacks included.

A launcher mixes the output of all ranks on one terminal; after a failure on 64 of them the file of one is readable. When
the disk is full the file ends early and the run goes on.
"""

from __future__ import annotations

import io
import os
import socket
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TextIO


class _Copy(io.TextIOBase):
    """Writes to the terminal and to the file; the progress bar, which redraws one line, is not copied."""

    def __init__(self, terminal: TextIO, file: TextIO) -> None:
        self.terminal = terminal
        self.file = file

    def write(self, text: str) -> int:
        if not self.file.closed and "\r" not in text:
            with suppress(OSError):
                self.file.write(text)
                self.file.flush()
        return self.terminal.write(text)

    def flush(self) -> None:
        self.terminal.flush()

    def isatty(self) -> bool:
        return self.terminal.isatty()

    def fileno(self) -> int:
        return self.terminal.fileno()


def start_rank_log(run_dir: Path, rank: int, size: int) -> None:
    """Copy this process's standard error into the run folder from now on."""
    stop_rank_log()
    folder = run_dir / "logs"
    folder.mkdir(exist_ok=True)
    file = (folder / f"rank-{rank:05d}.log").open("a", encoding="utf-8")
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    file.write(f"--- {stamp} rank {rank} of {size}, {socket.gethostname()} process {os.getpid()}\n")
    sys.stderr = _Copy(sys.stderr, file)


def log_traceback() -> None:
    """Note the exception that is being handled; the interpreter prints it on the terminal later."""
    if isinstance(sys.stderr, _Copy):
        with suppress(OSError):
            traceback.print_exc(file=sys.stderr.file)


def stop_rank_log() -> None:
    """Give standard error back."""
    if isinstance(sys.stderr, _Copy):
        copy, sys.stderr = sys.stderr, sys.stderr.terminal
        with suppress(OSError):
            copy.file.close()
