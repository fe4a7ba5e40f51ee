"""Fine-tune Hugging Face models with forward passes only."""

from ._version import __version__
from .functional import EstimatorState, estimate_gradient
from .hub import ModelCardCallback, PushToHubCallback
from .trainer import NonFiniteLossError, ZOTrainer, ZOTrainerMixin
from .training_args import ZOTrainingArguments
from .trajectory import Trajectory, TrajectoryError, replay

__all__ = [
    "EstimatorState",
    "ModelCardCallback",
    "NonFiniteLossError",
    "PushToHubCallback",
    "Trajectory",
    "TrajectoryError",
    "ZOTrainer",
    "ZOTrainerMixin",
    "ZOTrainingArguments",
    "__version__",
    "estimate_gradient",
    "replay",
]
