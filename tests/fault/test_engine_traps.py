"""Gradients that are wrong without a word: the naive form shows the defect, our engines do not have it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fault.trap_worker import TRAPS

WORKER = Path(__file__).with_name("trap_worker.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("traps")
    command = [sys.executable, str(WORKER), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "traps.json").read_text())


def worst(norms, reference) -> float:
    return max(
        abs(step[part] - right[part]) / max(right[part], 1e-6)
        for step, right in zip(norms, reference, strict=True)
        for part in right
    )


@pytest.mark.fault
@pytest.mark.parametrize("name", sorted(TRAPS))
def test_engines_are_right_where_the_naive_form_is_wrong(found, name):
    reference = found[f"{name}/reference"]["norms"]
    ours, naive = found[f"{name}/ours"], found[f"{name}/naive"]
    assert ours["exits"] == [0, 0]
    assert worst(ours["norms"], reference) < 1e-5
    # When this fails, the library has been fixed and the rule may be relaxed.
    assert naive["exits"] != [0, 0] or worst(naive["norms"], reference) > 1e-2
