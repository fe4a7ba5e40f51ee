"""Trajectory: a run as a file. The losses that each step saw, from which the run can be walked again without a forward pass.

Directions come from seeds and estimators are deterministic in the losses, so start + losses + learning rates = the run.
"""

from .file import LOG_NAME, SEALED_NAME, Step, Trajectory, TrajectoryError, TrajectoryLog, narrowed
from .rebuild import apply_estimate, forward_passes, optimizer_of, projected_gradients, replay, walk
from .start import changed_since, content_hash, header_of, matching, restore_start, rule_of, verify_start

__all__ = [
    "LOG_NAME",
    "SEALED_NAME",
    "Step",
    "Trajectory",
    "TrajectoryError",
    "TrajectoryLog",
    "apply_estimate",
    "changed_since",
    "content_hash",
    "forward_passes",
    "header_of",
    "matching",
    "narrowed",
    "optimizer_of",
    "projected_gradients",
    "replay",
    "restore_start",
    "rule_of",
    "verify_start",
    "walk",
]
