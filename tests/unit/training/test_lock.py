"""One launch per run directory, also across machines and when two start at once."""

import json
import os
import socket
import time

import pytest

from spatialvlm.errors import LaunchError
from spatialvlm.training import lock as module
from spatialvlm.training.lock import FolderLock

ELSEWHERE = {"host": "elsewhere", "pid": 1}
DEAD = {"host": socket.gethostname(), "pid": 2**22 - 7}


def write(folder, holder, *, age_s=0.0):
    (folder / "lock").write_text(json.dumps(holder))
    os.utime(folder / "lock", (time.time() - age_s,) * 2)


def test_a_held_lock_shows_signs_of_life_whatever_its_holder_does(tmp_path):
    lock = FolderLock(tmp_path, beat_s=0.01)
    lock.take()
    os.utime(lock.path, (0, 0))
    for _ in range(2000):
        if lock.path.stat().st_mtime:
            break
        time.sleep(0.005)
    assert lock.path.stat().st_mtime > 0  # the thread touched it
    lock.release()
    assert not lock.path.exists()


def test_a_dead_launch_is_replaced_with_a_message(tmp_path, capsys):
    for holder, age_s in ((DEAD, 0.0), (ELSEWHERE, 601.0)):
        write(tmp_path, holder, age_s=age_s)
        lock = FolderLock(tmp_path)
        lock.take()
        assert lock.holder() == lock.me
        assert f"was held by process {holder['pid']} on {holder['host']}, which is gone: taken over" in capsys.readouterr().err  # fmt: skip
        assert [p.name for p in tmp_path.iterdir()] == ["lock"]
        lock.release()


def test_of_two_that_take_over_at_once_one_gets_it(tmp_path, monkeypatch):
    write(tmp_path, DEAD)
    late = FolderLock(tmp_path)
    alive = module._runs

    def faster(pid):  # between the look at the lock and its replacement
        write(tmp_path, ELSEWHERE)
        return alive(pid)

    monkeypatch.setattr(module, "_runs", faster)
    with pytest.raises(LaunchError, match="in use by process"):
        late.take()
    assert late.holder() == ELSEWHERE
    assert [p.name for p in tmp_path.iterdir()] == ["lock"]
    late.release()
    assert late.holder() == ELSEWHERE  # not ours to remove
