"""One launch per run directory: a lock file that says who holds it and that its holder is alive."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from spatialvlm.errors import LaunchError

STALE_S = 600.0
"""Without a sign of life for this long, the holder on another host counts as dead."""
BEAT_S = 30.0


class FolderLock:
    """``<run.dir>/lock``, touched by a thread while it is held: loading, saves and slow steps take their time.

    Args:
        folder: Run directory.
        beat_s: Seconds between two signs of life.
    """

    def __init__(self, folder: Path, *, beat_s: float = BEAT_S) -> None:
        self.path = folder / "lock"
        self.beat_s = beat_s
        self.me = {"host": socket.gethostname(), "pid": os.getpid()}
        self._released = threading.Event()

    def take(self) -> None:
        """Hold the folder from now on.

        Raises:
            LaunchError: A live launch holds it.
        """
        if not self._create():
            holder = self.holder()
            if holder != self.me:
                self._take_over(holder)
        threading.Thread(target=self._beat, name="lock", daemon=True).start()

    def release(self) -> None:
        """Give the folder free, unless somebody else has taken it over."""
        self._released.set()
        if self.holder() == self.me:
            self.path.unlink(missing_ok=True)

    def holder(self) -> dict[str, Any]:
        """Host and process in the lock file; empty when there is none or it cannot be read."""
        return _read(self.path)

    def _create(self) -> bool:
        try:
            with self.path.open("x", encoding="utf-8") as file:
                json.dump(self.me, file)
        except FileExistsError:
            return False
        return True

    def _take_over(self, holder: dict[str, Any]) -> None:
        """Replace the lock of a dead launch; of two that try at once, one gets it."""
        refusal = LaunchError(
            f"{self.path.parent} is in use by process {holder.get('pid')} on {holder.get('host')}. Wait for it, "
            f"stop it, or choose another run.dir. If it is gone, delete {self.path}."
        )
        if self._alive(holder):
            raise refusal
        old = self.path.with_name(f"lock.{self.me['host']}.{self.me['pid']}")
        try:
            self.path.rename(old)
        except FileNotFoundError:
            raise refusal from None
        if _read(old) != holder:  # another launch was faster: this is its lock
            old.rename(self.path)
            raise refusal
        old.unlink()
        if not self._create():
            raise refusal
        sys.stderr.write(
            f"{self.path.parent} was held by process {holder.get('pid')} on {holder.get('host')}, which is gone: taken over\n"
        )

    def _alive(self, holder: dict[str, Any]) -> bool:
        if holder.get("host") == self.me["host"]:
            return _runs(int(holder.get("pid", -1)))
        with suppress(FileNotFoundError):
            return time.time() - self.path.stat().st_mtime < STALE_S
        return False

    def _beat(self) -> None:
        while not self._released.wait(self.beat_s):
            if self.holder() == self.me:  # else another launch has taken it over
                with suppress(OSError):  # whoever writes there next says what is wrong
                    os.utime(self.path)


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid > 0
