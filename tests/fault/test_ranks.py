"""Two processes: a hung rank is named and ends the run in time; a signal to any rank saves on all."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("rank_worker.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    done = subprocess.run(
        [sys.executable, str(WORKER), str(folder)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "ranks.json").read_text())


@pytest.mark.fault
def test_a_stopped_rank_ends_the_run_and_is_named(found):
    codes, seconds, dump = found["hung1"]
    assert codes == [5, -9]
    assert "HangError: no progress for 6 s. Rank 1" in dump
    assert "1 ranks wait in 'exchange' of step 3" in dump
    assert "loop.py" in dump  # the stacks
    assert seconds < 36  # the collectives would give up after 6 + 30 s


@pytest.mark.fault
def test_a_stopped_rank_0_takes_the_heartbeats_with_it_and_is_named(found):
    codes, seconds, dump = found["hung0"]
    assert codes == [-9, 5]
    assert "Rank 1" in dump
    assert "the store of rank 0 on 127.0.0.1 does not answer" in dump
    assert seconds < 36


@pytest.mark.fault
def test_a_broken_sample_on_one_rank_ends_both_with_its_name(found):
    codes, log = found["broken"]
    assert codes == [3, 3]
    assert "tolerates no broken sample" in log


@pytest.mark.fault
@pytest.mark.parametrize(
    ("name", "step", "reason"),
    [
        ("term", 3, "asked to stop on another rank"),
        ("usr1", 3, "SIGUSR1"),
        ("term_in_save", 4, "asked to stop on another rank"),
    ],
)
def test_a_signal_to_one_rank_saves_on_all_and_costs_nothing(found, name, step, reason):
    codes, state, stopped, why, folders, same = found[name]
    assert codes == [0, 0]
    assert (state, stopped, why) == ("preempted", step, reason)
    assert folders[-1] == f"step-{step:08d}"
    assert same  # the run that goes on ends bit for bit as if it had never stopped
