"""Worker processes: ordered results, errors passed on, death and hangs explained, bounded memory."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from spatialvlm.data.workers import WorkerPool
from spatialvlm.errors import DataError, WorkerError

ROOT = Path(__file__).resolve().parents[3]


def work(context, task, report):
    kind, value = task
    report(f"sample {value}")
    if kind == "square":
        time.sleep(0.02 * (value % 3))  # finish out of order
        return {"result": np.full(context, value**2)}
    if kind == "fail":
        raise DataError(f"sample {value} is broken", reason="truncated")
    if kind == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "signalled":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(os.getpid(), number)
    if kind == "hang":
        time.sleep(60)
    return Unreadable() if kind == "unreadable" else value


@pytest.fixture
def pool():
    made = []

    def make(num_workers=2, **options):
        made.append(WorkerPool(work, 3, num_workers, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


class Unreadable:
    """Sent by a worker, it cannot be made again on this side."""

    def __reduce__(self):
        return (int, ("no number",))


def test_a_result_that_cannot_be_read_is_told(pool, monkeypatch):
    # pytest turns the death of a thread into a warning
    monkeypatch.setattr("threading.excepthook", lambda _: None)
    workers = pool(1)
    with pytest.raises(WorkerError, match=r"cannot be read \(ValueError: invalid literal"):
        workers.get(workers.submit(("unreadable", 0)))


def test_results_keep_their_order_and_errors_their_type(pool):
    workers = pool()
    tickets = [workers.submit(("square", n)) for n in range(8)]
    assert [workers.get(t)["result"].tolist() for t in tickets] == [[n * n] * 3 for n in range(8)]
    bad, good = workers.submit(("fail", 5)), workers.submit(("square", 2))
    with pytest.raises(DataError, match="sample 5 is broken") as caught:
        workers.get(bad)
    assert caught.value.reason == "truncated"
    assert workers.get(good)["result"][0] == 4  # the pool lives on


def test_a_killed_worker_is_named_with_its_sample(pool):
    workers = pool(1)
    ticket = workers.submit(("die", 41))
    with pytest.raises(WorkerError, match=r"SIGKILL.*sample 41"):
        workers.get(ticket)


def test_signals_that_stop_a_run_do_not_take_its_workers_away(pool):
    """The run still has to fetch its step and save; it ends them itself."""
    workers = pool(1)
    assert workers.get(workers.submit(("signalled", 5))) == 5
    process = workers._workers[0].process
    workers.close()
    assert not process.is_alive()


@pytest.mark.fault
def test_a_program_that_ends_without_closing_them_does_not_wait_for_them():
    code = (
        "from spatialvlm.data.workers import WorkerPool; import tests.unit.data.test_workers as t\n"
        "pool = WorkerPool(t.work, 3, 1); print(pool.get(pool.submit(('other', 4))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "4\n"), done.stderr


def test_a_hanging_worker_is_ended(pool):
    workers = pool(1, timeout_s=0.5)
    ticket = workers.submit(("hang", 7))
    started = time.monotonic()
    with pytest.raises(WorkerError, match=r"timeout_s=0\.5.*sample 7"):
        workers.get(ticket)
    assert time.monotonic() - started < 10


def test_workers_go_on_while_the_caller_computes(pool):
    """Several packs per worker are built without any call from outside, also larger ones than a pipe holds."""
    workers = pool(1)
    workers.context = 1 << 20
    tickets = [workers.submit(("square", n)) for n in range(5)]
    deadline = time.monotonic() + 60
    while len(workers._ready) < 5 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert sorted(workers._ready) == tickets


def test_finished_results_do_not_pile_up(pool):
    """With room for one result only, nothing runs ahead of what is fetched, and nothing deadlocks."""
    workers = pool(1, max_ready_bytes=0)
    tickets = [workers.submit(("square", n)) for n in range(6)]
    for n, ticket in enumerate(tickets):
        assert workers.get(ticket)["result"][0] == n * n
        time.sleep(0.05)
        assert len(workers._ready) <= 1
