"""Fine-tune Hugging Face models with forward passes only."""

from ._version import __version__
from .functional import estimate_gradient
from .trainer import NonFiniteLossError, ZOTrainer, ZOTrainerMixin
from .training_args import ZOTrainingArguments

__all__ = [
    "NonFiniteLossError",
    "ZOTrainer",
    "ZOTrainerMixin",
    "ZOTrainingArguments",
    "__version__",
    "estimate_gradient",
]
