"""A hung rank ends the run within the time limit and is named, with the stacks of every thread on disk.

Every rank publishes where it is through the process group's key-value store; a thread per rank compares.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PHASES = ("data", "exchange", "forward", "backward", "optimizer", "log", "save", "eval")
EXIT_HANG = 5
ANSWER_S = 3.0
"""How long the store may take to tell where all ranks are."""


@dataclass(slots=True)
class Heartbeat:
    """Where a rank is; ``beat`` grows whenever it moves."""

    rank: int
    host: str = field(default_factory=socket.gethostname)
    step: int = 0
    micro_step: int = 0
    phase: str = "data"
    uids: tuple[str, ...] = ()
    since: float = field(default_factory=time.time)

    def order(self) -> tuple[int, int, int]:
        """Earlier = further behind."""
        return (self.step, self.micro_step, PHASES.index(self.phase))


def diagnose(beats: Sequence[Heartbeat], timeout_s: float, now: float) -> str:
    """The message of a hang: who is behind, where, on which samples, and what the others wait in."""
    late = min(beats, key=Heartbeat.order)
    waiting: dict[tuple[int, str], int] = {}
    for beat in beats:
        if beat is not late:
            waiting[(beat.step, beat.phase)] = waiting.get((beat.step, beat.phase), 0) + 1
    others = "; ".join(
        f"{n} ranks wait in '{p}' of step {s}" for (s, p), n in sorted(waiting.items())
    )
    uids = ", ".join(late.uids[:8])
    return (
        f"HangError: no progress for {timeout_s:.0f} s. Rank {late.rank} ({late.host}) is in '{late.phase}' of step "
        f"{late.step} since {now - late.since:.0f} s, samples [{uids}]; {others or 'it is the only rank'}. "
        "Stacks: hang-rank*.txt"
    )


def silence(own: Heartbeat, timeout_s: float) -> str:
    """The message of a hang when the store with the heartbeats hangs as well."""
    return (
        f"HangError: no progress for {timeout_s:.0f} s. Rank {own.rank} ({own.host}) waits in '{own.phase}' of step "
        f"{own.step}, and the store of rank 0 on {os.environ.get('MASTER_ADDR', 'localhost')} does not answer: rank 0, "
        "its launcher or that machine is stopped. Stacks: hang-rank*.txt"
    )


class Watchdog:
    """Daemon thread that publishes this rank's place and ends the process when nothing moves.

    Args:
        folder: Where ``hang-rank<r>.txt`` goes.
        rank: This process.
        size: Number of processes.
        timeout_s: Limit after the first step.
        first_timeout_s: Limit before the first step has ended.
        patient_s: Limit while saving or evaluating.
        period_s: Time between looks.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        size: int,
        *,
        timeout_s: float,
        first_timeout_s: float,
        patient_s: float = 3600.0,
        period_s: float = 5.0,
    ) -> None:
        self.folder = folder
        self.size = size
        self.timeout_s = timeout_s
        self.first_timeout_s = first_timeout_s
        self.patient_s = patient_s
        self.period_s = min(period_s, timeout_s / 4)
        self.beat = Heartbeat(rank)
        self._moved = time.monotonic()
        self._first_done = False
        self._stop = threading.Event()

    def start(self) -> None:
        """Begin watching."""
        for target in (self._watch, *([self._publish] if self.size > 1 else [])):
            threading.Thread(target=target, name="watchdog", daemon=True).start()

    def stop(self) -> None:
        """End of the run."""
        self._stop.set()

    def at(self, step: int, phase: str, micro_step: int = 0, uids: Sequence[str] = ()) -> None:
        """The loop is here now."""
        self._first_done = self._first_done or step > self.beat.step
        self.beat = Heartbeat(
            self.beat.rank, self.beat.host, step, micro_step, phase, tuple(uids), time.time()
        )
        self._moved = time.monotonic()

    def limit(self) -> float:
        """Time limit of the current phase."""
        if self.beat.phase in ("save", "eval"):
            return self.patient_s
        return self.timeout_s if self._first_done else max(self.timeout_s, self.first_timeout_s)

    def _watch(self) -> None:
        while not self._stop.wait(self.period_s):
            if time.monotonic() - self._moved > self.limit():
                self._give_up()

    def _publish(self) -> None:
        """A thread of its own: the store lives in another process, which may be the one that is stopped."""
        store = _store()
        while True:
            # Before the first wait: a rank that stops early is then known, and named.
            store.set(f"heartbeat/{self.beat.rank}", json.dumps(asdict(self.beat)))
            if self._stop.wait(self.period_s):
                return

    def _beats_of_all(self) -> list[Heartbeat] | None:
        """Where all ranks are; ``None`` when the store does not answer."""
        beats = [self.beat]
        if self.size == 1:
            return beats

        def read() -> None:
            store = _store()
            for rank in range(self.size):
                if rank != self.beat.rank and store.check([f"heartbeat/{rank}"]):
                    values = json.loads(store.get(f"heartbeat/{rank}").decode())
                    beats.append(Heartbeat(**{**values, "uids": tuple(values["uids"])}))

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        reader.join(ANSWER_S)
        return None if reader.is_alive() else beats

    def _give_up(self) -> None:
        beats = self._beats_of_all()
        if beats is None:
            message = silence(self.beat, self.limit())
        else:
            message = diagnose(beats, self.limit(), time.time())
        sys.stderr.write(message + "\n")
        sys.stderr.flush()
        try:
            with (self.folder / f"hang-rank{self.beat.rank}.txt").open("w") as file:
                file.write(message + "\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        finally:  # a full disk may be what everybody waits for
            os._exit(EXIT_HANG)


def _store() -> Any:
    import torch.distributed as dist

    return dist.distributed_c10d._get_default_store()
