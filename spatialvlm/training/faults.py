"""Named points at which a test may kill or break this process; inert unless an environment variable asks.

``SPATIALVLM_FAULT="save.rename@4:0:kill"`` kills rank 0 when it passes ``save.rename`` in step 4. The
reliability tests (``benchmarks/kill_harness.py``) are the only users.
"""

from __future__ import annotations

import errno
import os
import signal
import time

_VARIABLE = "SPATIALVLM_FAULT"


def fault_point(name: str, *, step: int, rank: int) -> None:
    """Do what the environment asks for at this point: kill, stop, sleep, or raise "disk full"."""
    wanted = os.environ.get(_VARIABLE)
    if wanted is None:
        return
    where, _, rest = wanted.partition("@")
    at_step, at_rank, action = rest.split(":")
    if where != name or int(at_step) != step or int(at_rank) != rank:
        return
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif action == "sleep":
        time.sleep(3600)
    elif action == "nospace":
        raise OSError(errno.ENOSPC, "No space left on device (injected)")
    else:
        os.kill(os.getpid(), getattr(signal, action))
