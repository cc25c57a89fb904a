"""YAML recipes, validated as a whole before anything is loaded.

OmegaConf reads YAML and ``key=value``, pydantic validates, then both are out of the way: recipes and
``build.py`` files see these frozen objects, everything else takes plain keyword arguments.
"""

from spatialvlm.config.data import (
    DataConfig,
    LoaderConfig,
    MediaConfig,
    PackingConfig,
    SharedPrefixConfig,
    SourceConfig,
    StepConfig,
)
from spatialvlm.config.evaluation import EvalConfig
from spatialvlm.config.geometry import GeometryConfig
from spatialvlm.config.load import dump_yaml, load_config, read_yaml
from spatialvlm.config.recipe import TrainConfig

__all__ = [
    "DataConfig",
    "EvalConfig",
    "GeometryConfig",
    "LoaderConfig",
    "MediaConfig",
    "PackingConfig",
    "SharedPrefixConfig",
    "SourceConfig",
    "StepConfig",
    "TrainConfig",
    "dump_yaml",
    "load_config",
    "read_yaml",
]
