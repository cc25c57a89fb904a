"""A hang ends the process also when the disk or the store of the heartbeats hangs with it."""

import threading
from types import SimpleNamespace

import pytest

from spatialvlm.training import watchdog as module
from spatialvlm.training.watchdog import EXIT_HANG, Watchdog


class Ended(BaseException):
    pass


@pytest.fixture
def ended(monkeypatch):
    codes = []

    def leave(code):
        codes.append(code)
        raise Ended

    monkeypatch.setattr(module.os, "_exit", leave)
    return codes


def test_a_hang_with_a_disk_that_cannot_be_written_still_ends(tmp_path, ended, capsys):
    watch = Watchdog(tmp_path / "gone", 0, 1, timeout_s=1, first_timeout_s=1)
    watch.at(7, "save")
    with pytest.raises(Ended):
        watch._give_up()
    assert ended == [EXIT_HANG]
    assert "Rank 0" in capsys.readouterr().err


def test_a_store_that_does_not_answer_is_named(tmp_path, ended, monkeypatch, capsys):
    """The heartbeats are kept by rank 0's process or its launcher; it may be the one that is stopped."""
    never = threading.Event()
    silent = SimpleNamespace(check=lambda _: never.wait() and False)
    monkeypatch.setattr(module, "_store", lambda: silent)
    monkeypatch.setattr(module, "ANSWER_S", 0.05)
    monkeypatch.setenv("MASTER_ADDR", "node7")
    watch = Watchdog(tmp_path, 3, 8, timeout_s=20, first_timeout_s=20)
    watch.at(812, "backward")
    with pytest.raises(Ended):
        watch._give_up()
    message = (tmp_path / "hang-rank3.txt").read_text()
    assert "Rank 3" in message
    assert "in 'backward' of step 812, and the store of rank 0 on node7 does not answer" in message
    assert "test_watchdog.py" in message  # the stacks
    assert ended == [EXIT_HANG]
    never.set()
