"""Ranks that hold different modalities neither hang nor train on wrong gradients (2 processes, all engines)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fault.modality_worker import VARIANTS, WITHOUT_DUMMY

WORKER = Path(__file__).with_name("modality_worker.py")
CASES = [(v, s) for v, (_, _, strategies) in VARIANTS.items() for s in strategies]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("modalities")
    done = subprocess.run(
        [sys.executable, str(WORKER), str(folder)],
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads((folder / "modalities.json").read_text())
    answer["log"] = (folder / "ranks.log").read_text()
    return answer


@pytest.mark.fault
@pytest.mark.parametrize(("variant", "strategy"), CASES, ids=lambda v: str(v))
def test_every_pair_of_modalities_gives_the_gradients_of_one_process(found, variant, strategy):
    assert found["exits"][f"{variant}/{strategy}-2"] == [0, 0], found["log"][-3000:]
    expected = found["results"][f"{variant}/ddp-1"]
    measured = found["results"][f"{variant}/{strategy}-2"]
    for pair, (loss, norms), (right_loss, right) in zip(
        VARIANTS[variant][1], measured, expected, strict=True
    ):
        assert loss == pytest.approx(right_loss, rel=1e-5), pair
        assert norms.keys() == right.keys()
        for part, value in right.items():
            assert norms[part] == pytest.approx(value, rel=1e-5, abs=1e-7), (pair, part)


@pytest.mark.fault
@pytest.mark.parametrize("strategy", WITHOUT_DUMMY)
def test_without_the_dummy_pass_ranks_fail_or_hang(found, strategy):
    """The pairs above do exercise the problem: take the dummy pass away and they do not finish."""
    assert found["exits"][f"without dummy/{strategy}"] != [0, 0]
