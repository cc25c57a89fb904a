"""Every YAML of the repository loads with its schema, and opens with its header block."""

from pathlib import Path

import pytest
import yaml

from spatialvlm.config import EvalConfig, TrainConfig, load_config

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
SCHEMAS = {"stage1": TrainConfig, "stage2": TrainConfig, "tiny": TrainConfig, "eval": EvalConfig}
RECIPES = sorted(path for folder in SCHEMAS for path in (CONFIGS / folder).rglob("*.yaml"))
ALL_YAML = sorted(
    path
    for folder in ("configs", "spatialvlm", "tests")
    for path in [*(ROOT / folder).rglob("*.yaml"), *(ROOT / folder).rglob("*.yml")]
)
NEEDED = {
    EvalConfig: ["model.init_from=some/model", "run.dir=runs/x"],
    TrainConfig: ["run.dir=runs/x"],
}
HEADER = ("# Purpose", "# Command", "# Hardware", "# Expected")


class TaggedLoader(yaml.SafeLoader):
    """Reads ``!function`` of lmms-eval task files as plain text."""


TaggedLoader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def _id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_there_are_recipes():
    assert len(RECIPES) >= 6


@pytest.mark.parametrize("path", RECIPES, ids=_id)
def test_recipe_loads(path):
    schema = SCHEMAS[path.relative_to(CONFIGS).parts[0]]
    config = load_config(path, NEEDED[schema], schema)
    if isinstance(config, TrainConfig):
        stage = 2 if "stage2" in str(path.relative_to(CONFIGS)) else 1
        assert config.stage == stage


@pytest.mark.parametrize("path", RECIPES, ids=_id)
def test_recipe_header(path):
    head = path.read_text().splitlines()[:12]
    for key in HEADER:
        assert any(line.startswith(key) for line in head), f"{key} is missing in the first lines"


@pytest.mark.parametrize("path", ALL_YAML, ids=_id)
def test_yaml_parses(path):
    assert yaml.load(path.read_text(), Loader=TaggedLoader) is not None
