"""Skips, empty steps and spikes as a state machine."""

import pytest

from spatialvlm.errors import DataError, NonFiniteError
from spatialvlm.training.guard import Guard


def test_five_skips_in_a_row_end_the_run():
    guard = Guard()
    for step in range(812, 816):
        guard.update(step, applied=False)
    with pytest.raises(NonFiniteError, match=r"steps 812-816 \(5 in a row\)"):
        guard.update(816, applied=False)


def test_a_good_step_resets_the_row_but_not_the_share():
    guard = Guard(max_skipped_in_row=3, max_skipped_fraction=0.01, window=200)
    for step in range(2):
        guard.update(2 * step, applied=False)
        guard.update(2 * step + 1, applied=True)
    with pytest.raises(NonFiniteError, match="3 of the last 5 steps"):
        guard.update(4, applied=False)


def test_empty_steps_are_not_skips():
    guard = Guard(max_empty_in_row=3)
    for step in range(2):
        guard.update(step, applied=False, empty=True)
    assert guard.skipped_in_row == 0
    with pytest.raises(DataError, match="no supervised token"):
        guard.update(2, applied=False, empty=True)


def test_spikes_are_recorded_at_most_every_ten_steps():
    guard = Guard()
    for step in range(30):
        assert guard.spikes(step, 1.0 + 0.01 * (step % 3), {"projector": 0.5}) == []
    assert guard.spikes(30, 9.0, {"projector": 5.0}) == ["loss", "grad_norm/projector"]
    assert guard.spikes(35, 9.0, {"projector": 0.5}) == []
    assert guard.spikes(40, 9.0, {"projector": 0.5}) == ["loss"]


def test_state_round_trip():
    guard = Guard()
    for step in range(25):
        guard.update(step, applied=step % 7 > 0)
        guard.spikes(step, float(step), {"lora": 1.0})
    again = Guard()
    again.load_state_dict(guard.state_dict())
    assert again == guard
