"""Runtimes measure losses at probes. They know nothing of methods."""

from .torch import Restore, TorchRuntime

__all__ = ["Restore", "TorchRuntime"]
