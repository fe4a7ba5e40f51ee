"""Walking a run again: from its start and its losses to its weights, without a forward pass."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .._version import __version__
from ..directions import ExampleDirections, Probe, TensorSpec, space_of
from ..estimators import METHODS, Estimate, Estimator
from ..optimizer import ZOOptimizer
from .file import Step, Trajectory, TrajectoryError, widened
from .start import content_hash, matching, restore_fitted, restore_start, verify_start

_REBUILDABLE = ("torch.optim.", "transformers.optimization", "bitsandbytes.optim.")


def replay(
    model: nn.Module,
    trajectory: Trajectory,
    *,
    until: int | None = None,
    approximate: bool = False,
    on_step: Callable[[int], None] | None = None,
) -> nn.Module:
    """Rebuild the weights of a run in ``model``, in place, from the losses alone.

    Args:
        model: the base model, with its adapter if the run trained one (for ZO-Act with its basis).
        trajectory: the run.
        until: stop before this step; default: all steps.
        approximate: go on where the bits cannot come out the same, with another dtype or kind of device: every step rounds
            differently, so the result is close to the run's weights but not equal to them, and is not verified.
        on_step: called with the number of each step that was walked.

    Returns:
        ``model``.

    Raises:
        TrajectoryError: if the model is not the one that the run started from, or the end differs from the run's.
    """
    header = trajectory.header
    params = matching(model, header, approximate)
    restore_fitted(model, trajectory)
    restore_start(params, trajectory)
    if not approximate:
        verify_start(model, params, trajectory)
    optimizer = optimizer_of(header, params)
    walk(optimizer, trajectory, until, on_step)
    complete = until is None or until >= len(trajectory.steps)
    if complete and not approximate and "final_hash" in header and header["final_hash"] != content_hash(params):
        raise TrajectoryError(
            f"The weights after {len(trajectory.steps)} steps differ from those of the run (content hash). The log is damaged, "
            f"or was written by another version: hf_zo {header['hf_zo']}, torch {header['torch']}; here hf_zo {__version__}, "
            f"torch {torch.__version__}."
        )
    return model


def optimizer_of(header: Mapping[str, Any], params: Mapping[str, torch.Tensor]) -> ZOOptimizer:
    """The optimizer of a run, with its estimator, over ``params``; before the first step."""
    estimator = METHODS[header["method"]](space_of(params), **header["settings"])
    tensors = [params[name] for name, *_ in header["tensors"]]
    groups = [
        {
            **{k: tuple(v) if k == "betas" else v for k, v in group.items() if k != "tensors"},
            "params": [tensors[i] for i in group["tensors"]],
            "lr": 0.0,
        }
        for group in header["groups"]
    ]
    inner = None if header["optimizer"] is None else _optimizer_class(header["optimizer"])(groups)
    return ZOOptimizer(groups, {p: name for name, p in params.items()}, estimator, inner)


def walk(
    optimizer: ZOOptimizer, trajectory: Trajectory, until: int | None = None, on_step: Callable[[int], None] | None = None
) -> None:
    """Run estimator and optimizer over logged losses; the optimizer's state afterwards is the run's.

    Raises:
        TrajectoryError: if a step holds more or fewer losses than its method asks for.
    """
    for number, step in enumerate(trajectory.steps[:until]):
        apply_estimate(optimizer, None if step.skipped else _estimate(optimizer.estimator, number, step), step)
        if on_step is not None:
            on_step(number)


def apply_estimate(optimizer: ZOOptimizer, estimate: Estimate | None, step: Step) -> None:
    """Make the update of a step at its learning rates; none for a step that was skipped."""
    rates = widened(step.learning_rates, len(optimizer.param_groups))
    for group, lr in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = lr
    optimizer.stage(estimate, optimizer.estimator.measured(len(step.losses)))
    optimizer.step()


@torch.no_grad()
def _estimate(estimator: Estimator, number: int, step: Step) -> Estimate:
    """What the method made of the losses of a step."""
    left = list(step.losses)

    def oracle(probes: Sequence[Probe]) -> list[float]:
        if any(isinstance(direction, ExampleDirections) for probe in probes for _, direction in probe.terms):
            taken, left[:] = left[:], []
            if not taken or len(taken) % len(probes):
                raise TrajectoryError(
                    f"Step {number} of the trajectory holds {len(taken)} losses, not one an example and probe."
                )
            return taken
        if len(probes) > len(left):
            raise TrajectoryError(f"Step {number} of the trajectory holds too few losses for its method.")
        taken, left[:] = left[: len(probes)], left[len(probes) :]
        return taken

    estimate = estimator.estimate(number, oracle)
    if left:
        raise TrajectoryError(f"Step {number} of the trajectory holds more losses than its method asks for.")
    return estimate


def projected_gradients(trajectory: Trajectory) -> list[tuple[float, ...]]:
    """The finite-difference responses of every step, computed from the losses; an empty tuple where a step was skipped."""
    estimator, found = _estimator_of(trajectory.header), list[tuple[float, ...]]()
    for number, step in enumerate(trajectory.steps):
        if step.skipped:
            found.append(())
            continue
        estimate = _estimate(estimator, number, step)
        estimator.commit(estimate)
        found.append(estimate.projected_gradients)
    return found


def forward_passes(trajectory: Trajectory) -> int:
    """How many passes its steps took, without those before the first one."""
    estimator = _estimator_of(trajectory.header)
    return sum(estimator.measured(len(step.losses)) for step in trajectory.steps)


def _estimator_of(header: Mapping[str, Any]) -> Estimator:
    """The method of a run, without a model."""
    space = {name: TensorSpec(tuple(shape), torch.device("cpu")) for name, shape, *_ in header["tensors"]}
    return METHODS[header["method"]](space, **header["settings"])


def _optimizer_class(path: str) -> Any:
    """The optimizer of the run, from a module that is known to hold optimizers: a log must not choose what is imported."""
    module, _, name = path.rpartition(".")
    if not path.startswith(_REBUILDABLE):
        raise TrajectoryError(f"The run used the optimizer {path}, which replay does not rebuild; it knows torch.optim's own.")
    return getattr(importlib.import_module(module), name)
