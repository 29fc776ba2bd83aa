"""What a training run is told: frozen dataclasses, read from YAML, changed by dotted overrides.

The keys are in ``config/sections.py``, the reading in ``config/reading.py``.
"""

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
