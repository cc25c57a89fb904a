"""Quarantine, budgets, and the rule that replaces a broken unit."""

import json

import numpy as np
import pytest

from spatialvlm.data.faults import Quarantine, fits_plan, replacement, unit_tokens
from spatialvlm.data.mixture import Mixture
from spatialvlm.data.sample import LENGTH_DTYPE, MediaRef, Sample, Turn
from spatialvlm.data.units import SourceRows
from spatialvlm.errors import BudgetError, MediaError


def sample(source="a", number=0):
    turns = (Turn("user", ("?",)), Turn("assistant", ("!",)))
    return Sample(f"{source}/rows#{number}", source, "spatial", turns)


def broken(reason="truncated"):
    return MediaError("x.jpg ends early.", reason=reason)


def test_events_are_written_and_counted(tmp_path):
    quarantine = Quarantine(tmp_path / "quarantine.jsonl", ["a", "b"], rank=3)
    ref = MediaRef("image", "tar", "s.tar", "x.jpg")
    quarantine.add(
        sample(), broken(), step=7, file="rows.jsonl", row=0, media=ref, replaced_by="a/rows#1"
    )
    quarantine.add(sample("b", 2), broken("missing"), step=8)
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert lines[0] == {
        "uid": "a/rows#0", "source": "a", "file": "rows.jsonl", "row": 0, "media": "s.tar:x.jpg",
        "reason": "truncated", "message": "x.jpg ends early.", "step": 7, "rank": 3,
        "replaced_by": "a/rows#1",
    }  # fmt: skip
    assert lines[1]["replaced_by"] is None
    assert quarantine.counts == {("a", "truncated"): 1, ("b", "missing"): 1}
    assert quarantine.faults().tolist() == [1, 1]


def test_a_file_that_cannot_be_written_hides_no_event(tmp_path, caplog):
    quarantine = Quarantine(tmp_path, ["a"])  # a folder
    quarantine.add(sample(), broken(), step=7)
    assert quarantine.faults().tolist() == [1]
    assert "cannot write" in caplog.text
    assert '"uid": "a/rows#0"' in caplog.text


def test_a_source_without_tolerance_stops_at_the_first_fault(tmp_path):
    quarantine = Quarantine(tmp_path / "q.jsonl", ["a"], limits={"a": 0})
    with pytest.raises(
        MediaError, match=r"a/rows#0: x\.jpg ends early\. Source a tolerates no"
    ) as caught:
        quarantine.add(sample(), broken(), step=0)
    assert caught.value.reason == "truncated"
    assert (tmp_path / "q.jsonl").read_text().count("\n") == 1


@pytest.mark.parametrize(
    ("faults", "draws", "fails"),
    [
        ([19, 0], [1000, 0], False),
        ([20, 0], [1000, 0], True),
        ([20, 0], [20_000, 0], False),
        ([21, 0], [20_000, 0], True),
        ([2, 0], [10, 0], True),
        ([1, 0], [4, 0], False),
        ([19, 0], [99, 0], False),
        ([20, 0], [99, 0], True),
        ([0, 25], [50_000, 250], True),
        ([0, 24], [50_000, 250], False),
    ],
)
def test_budgets(tmp_path, faults, draws, fails):
    quarantine = Quarantine(tmp_path / "q.jsonl", ["a", "b"], limits={"b": 0.099})
    quarantine.add(sample("a", 5), broken(), step=0)
    if not fails:
        quarantine.check(np.array(faults), np.array(draws))
        return
    with pytest.raises(BudgetError) as caught:
        quarantine.check(np.array(faults), np.array(draws))
    assert f"{max(faults)} of {max(draws) if faults[0] else draws[1]} drawn" in str(caught.value)
    assert "a truncated 1 (a/rows#5)" in str(caught.value)


def lengths(tokens, prefix=0, key=0, **fields):
    out = np.zeros(len(tokens), LENGTH_DTYPE)
    out["tokens"], out["prefix_tokens"], out["group_key"] = tokens, prefix, key
    for name, value in fields.items():
        out[name] = value
    return out


def test_unit_tokens_count_a_shared_prefix_once():
    assert unit_tokens(lengths([110, 120], prefix=100, key=7)) == 130
    assert unit_tokens(lengths([110, 120], prefix=100)) == 230
    assert unit_tokens(lengths([110], prefix=100, key=7)) == 110


def test_only_units_that_fit_the_plan_replace():
    planned = lengths([110, 120], prefix=100, key=7, images=1)
    assert fits_plan(planned, lengths([110, 120], prefix=100, key=9, images=1))
    assert not fits_plan(planned, lengths([110, 121], prefix=100, key=9, images=1))
    assert not fits_plan(planned, lengths([50, 50]))
    assert not fits_plan(planned, lengths([50, 50], images=1, geometry_tokens=4))
    assert not fits_plan(planned, lengths([50, 0], images=1))


def test_the_next_usable_unit_of_the_lane_in_file_order_replaces():
    keys = np.repeat(np.arange(1, 301, dtype=np.uint64), 2)
    rows = SourceRows("a", "spatial", keys, np.ones(600, bool))
    order = Mixture([rows], {"spatial": 1}, branches=2, samples=600)
    draw = order.at(17)
    tried = []

    def usable(candidate):
        tried.append(candidate.tolist())
        return len(tried) == 3

    unit, found = replacement(order, draw, usable)
    assert unit == (draw.unit + 3) % 300
    assert found.tolist() == [2 * unit, 2 * unit + 1]
    tried.clear()
    assert replacement(order, draw, lambda candidate: bool(tried.append(candidate))) is None
    assert len(tried) == 256
