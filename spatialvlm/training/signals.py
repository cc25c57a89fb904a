"""SIGTERM, SIGINT and SIGUSR1 become a flag that all ranks agree on at the next step border.

The flag is up from the moment the run folder is opened: a signal while weights load is answered at step 0.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAME_S = 5.0
"""A scheduler signals every process of a job and the launcher passes the signal on: within this time it is the same."""


class StopFlag:
    """Set by the first signal; one that comes later than ``SAME_S`` after it ends the process at once with code 143."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._since: float | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __bool__(self) -> bool:
        return self.name is not None

    def request(self, reason: str) -> None:
        """Ask for a save and a clean exit at the next step border."""
        self.name = self.name or reason

    def install(self) -> None:
        """Take over the signals of this process (main thread only)."""
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)

    def uninstall(self) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        now = time.monotonic()
        if self._since is None:
            self._since = now
            self.name = signal.Signals(number).name
        elif now - self._since > SAME_S:
            os._exit(143)


def stop_listening() -> None:
    """Give the signals back when a run has them; for the end of a command, whatever it was."""
    owner = getattr(signal.getsignal(SIGNALS[0]), "__self__", None)
    if isinstance(owner, StopFlag):
        owner.uninstall()
