"""Importing is free of side effects, and light where the house promises it."""

import subprocess
import sys

import pytest


def _modules_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint('\\n'.join(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


@pytest.mark.parametrize(
    "statement",
    ["import spatialvlm", "import spatialvlm.config", "import spatialvlm.scenes", "import spatialvlm.synthesis",
     "import spatialvlm.evaluation", "import spatialvlm.data", "import spatialvlm.answers"],
)  # fmt: skip
def test_light_packages_do_not_load_torch(statement):
    loaded = _modules_after(statement)
    assert not loaded & {
        "torch",
        "transformers",
        "accelerate",
        "deepspeed",
        "wandb",
        "matplotlib",
        "pandas",
    }


def test_importing_sets_no_global_state():
    code = (
        "import os, random, warnings, logging\n"
        "env, state, level = dict(os.environ), random.getstate(), logging.getLogger().level\n"
        "import spatialvlm\n"
        "assert dict(os.environ) == env and random.getstate() == state and logging.getLogger().level == level\n"
        "print('ok')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "ok"
