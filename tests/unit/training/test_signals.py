"""What a process does with the first, a repeated and a second signal."""

import os
import signal

import pytest

from spatialvlm.training import signals as module
from spatialvlm.training.signals import StopFlag


@pytest.fixture
def flag():
    flag = StopFlag()
    flag.install()
    yield flag
    flag.uninstall()


def test_a_signal_that_a_launcher_passes_on_is_the_same_one_a_later_one_ends(flag, monkeypatch):
    """Schedulers signal all processes of a job, so a rank hears from the scheduler and from its launcher."""
    left = []
    now = [100.0]
    monkeypatch.setattr(module.os, "_exit", left.append)
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    assert not flag
    flag.request("run.stop_after_steps")
    os.kill(os.getpid(), signal.SIGUSR1)
    assert flag.name == "SIGUSR1"
    now[0] += 4.0
    os.kill(os.getpid(), signal.SIGTERM)
    assert (flag.name, left) == ("SIGUSR1", [])
    now[0] += 2.0
    os.kill(os.getpid(), signal.SIGTERM)
    assert left == [143]
