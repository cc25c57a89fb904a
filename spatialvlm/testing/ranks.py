"""Several ranks of a recipe by forking one prepared process, as a launcher would start them.

Importing torch and transformers costs seconds; a forked child starts in milliseconds. The parent must never have
run a backward pass, because autograd's threads do not survive a fork.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path


def free_port() -> int:
    """A TCP port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launcher_environment(strategy: str, size: int, deepspeed_folder: Path) -> dict[str, str]:
    """Environment that ``accelerate launch`` gives to the ranks of one machine, rank numbers excepted."""
    env = {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "DS_ACCELERATOR": "cpu",
    }
    if size > 1 or strategy.startswith("zero"):
        env |= {
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
    if strategy.startswith("zero"):
        env |= {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(deepspeed_folder / f"{strategy}_cpu.json"),
        }
    return env


def fork_ranks(
    body: Callable[[], int],
    env: Mapping[str, str],
    *,
    size: int,
    log: Path,
    timeout_s: float,
    during: Callable[[list[int]], None] | None = None,
) -> list[int]:
    """Run ``body`` in ``size`` forked processes; returns their exit codes (negative = signal).

    When one rank dies, the others are killed, as a launcher does.

    Args:
        body: What a rank does; its result is the exit code.
        env: Environment of the ranks, see :func:`launcher_environment`.
        size: Number of ranks.
        log: Standard output and error of all ranks are appended here.
        timeout_s: All ranks are killed after this long.
        during: Called again and again with the process ids while they run.
    """
    pids: list[int] = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            _child(
                body,
                {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)} if "WORLD_SIZE" in env else env,
                log,
            )
        pids.append(pid)
    codes: dict[int, int] = {}
    deadline = time.monotonic() + timeout_s
    while len(codes) < size:
        for pid in pids:
            if pid not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
        if during is not None and not codes:
            during(pids)
        failed = any(code != 0 for code in codes.values())
        if failed or time.monotonic() > deadline:
            for pid in pids:
                if pid not in codes:
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return [codes[pid] for pid in pids]


def _child(body: Callable[[], int], env: Mapping[str, str], log: Path) -> None:
    code = 1
    try:
        with log.open("ab", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ.update(env)
        code = body()
    except BaseException:  # noqa: BLE001 - the exit code is the only way out of a forked child
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
