"""Fixtures of the parity tests, and the table they leave behind in docs/parity.md."""

import datetime as dt
import os
import platform
import subprocess
from pathlib import Path

import pytest

from spatialvlm.testing.rig import FAMILIES, Rig

ROOT = Path(__file__).resolve().parents[2]
ROWS = pytest.StashKey()
HEAD = """# Parity

Largest differences between this package and its references, measured by `make parity` on small random models in fp32
(random weights everywhere, so that no term is hidden). "exact" means bit for bit; a bound explains itself in the test
of the same name under `tests/parity/`.

"""


@pytest.fixture(scope="session")
def checkpoints(tiny_checkpoint):
    return {family: tiny_checkpoint(family) for family in FAMILIES}


@pytest.fixture
def rig(checkpoints, tiny_vggt):
    def build(family, geometry=None, **kwargs):
        return Rig.load(family, checkpoints[family], vggt=tiny_vggt, geometry=geometry, **kwargs)

    return build


@pytest.fixture
def check(request):
    """Assert ``error <= bound`` and put the row into the table."""

    def write(backbone, feature, error, bound, reference="transformers"):
        row = (backbone, feature, reference, float(error), float(bound))
        request.config.stash.setdefault(ROWS, []).append(row)
        assert error <= bound, f"{backbone}, {feature}: {error} is above {bound}"

    return write


def pytest_sessionfinish(session, exitstatus):
    """Rewrite docs/parity.md, but only from a complete and successful run (`make parity`)."""
    rows = session.config.stash.get(ROWS, [])
    option = session.config.option
    everything = {Path(argument).resolve() for argument in session.config.args} <= {
        ROOT,
        ROOT / "tests",
        ROOT / "tests/parity",
    }
    complete = option.markexpr == "parity" and not option.keyword and everything and exitstatus == 0
    if not rows or not complete or os.environ.get("PYTEST_XDIST_WORKER"):
        return
    import torch
    import transformers

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    lines = [
        f"Measured {dt.date.today().isoformat()} at commit {commit or 'unknown'}: torch {torch.__version__}, "
        f"transformers {transformers.__version__}, {platform.machine()} CPU.",
        "",
        "| backbone | feature | reference | max error | bound |",
        "|---|---|---|---|---|",
    ]
    for backbone, feature, reference, error, bound in sorted(rows):
        shown = ["exact" if value == 0 else f"{value:.1e}" for value in (error, bound)]
        lines.append(f"| {backbone} | {feature} | {reference} | {shown[0]} | {shown[1]} |")
    (ROOT / "docs").mkdir(exist_ok=True)
    (ROOT / "docs" / "parity.md").write_text(HEAD + "\n".join(lines) + "\n", encoding="utf-8")
