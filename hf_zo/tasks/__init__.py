"""Prompted tasks: templates, option scoring, generation, metrics and data loading."""

from .data import DataError, load_rows
from .encoding import EncodedRows, encode_rows
from .generation import GenerateToEvaluate
from .metrics import metrics_for
from .scoring import OptionCollator, OptionLabels, option_loss, option_predictions
from .templates import TASKS, Task, get_task

__all__ = [
    "TASKS",
    "DataError",
    "EncodedRows",
    "GenerateToEvaluate",
    "OptionCollator",
    "OptionLabels",
    "Task",
    "encode_rows",
    "get_task",
    "load_rows",
    "metrics_for",
    "option_loss",
    "option_predictions",
]
