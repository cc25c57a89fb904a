"""The copy of standard error that every process leaves in the run folder."""

import io
import sys
from pathlib import Path

import pytest

from spatialvlm.training.rank_log import log_traceback, start_rank_log, stop_rank_log


def test_lines_are_copied_and_the_progress_bar_is_not(tmp_path, monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stderr", terminal)
    start_rank_log(tmp_path, 3, 4)
    sys.stderr.write("a warning\n")
    sys.stderr.write("\rstep 7")
    stop_rank_log()
    assert sys.stderr is terminal
    assert terminal.getvalue() == "a warning\n\rstep 7"
    lines = (tmp_path / "logs" / "rank-00003.log").read_text().splitlines()
    assert "rank 3 of 4" in lines[0]
    assert lines[1:] == ["a warning"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_does_not_end_the_run(tmp_path, monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stderr", terminal)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank-00000.log").symlink_to("/dev/full")
    start_rank_log(tmp_path, 0, 1)
    text = "step 7: loss 1.0\n" * 1000
    sys.stderr.write(text)
    log_traceback()
    stop_rank_log()
    assert sys.stderr is terminal
    assert terminal.getvalue() == text
