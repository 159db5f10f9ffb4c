"""The options of a run, by TRL's names where they mean what TRL's do; docstrings are the command line's help."""

from .data import DataConfig
from .model import ModelConfig
from .rollout import RolloutConfig
from .run import ONCE, RunConfig, parts_of
from .save import SaveConfig
from .train import TrainConfig

__all__ = ["ONCE", "DataConfig", "ModelConfig", "RolloutConfig", "RunConfig", "SaveConfig", "TrainConfig", "parts_of"]
