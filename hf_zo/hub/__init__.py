"""Sharing a run: model cards made of measured facts, and uploads at the Trainer's moments."""

from .callbacks import ModelCardCallback, PushError, PushToHubCallback
from .model_card import write_card

__all__ = ["ModelCardCallback", "PushError", "PushToHubCallback", "write_card"]
