"""The training config: frozen dataclasses (``sections.py``), read from YAML with dotted overrides (``reading.py``)."""

from samed3d.config.reading import config_of, load_config, to_dict
from samed3d.config.sections import (
    ClickConfig,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    ValidationConfig,
)

__all__ = [
    "ClickConfig",
    "DataConfig",
    "LossConfig",
    "ModelConfig",
    "OptimConfig",
    "RunConfig",
    "TrainConfig",
    "ValidationConfig",
    "config_of",
    "load_config",
    "to_dict",
]
