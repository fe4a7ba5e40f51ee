"""`estimate_gradient`: one zeroth-order gradient estimate in plain PyTorch, without a Trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .directions import space_of
from .estimators import METHODS, hyperparameters
from .runtimes import TorchRuntime


@dataclass
class EstimatorState:
    """State of a stateful method between calls of `estimate_gradient`; start with an empty one."""

    value: dict[str, Any] = field(default_factory=dict)


def estimate_gradient(
    loss_fn: Callable[[], float | torch.Tensor],
    params: Mapping[str, torch.Tensor],
    *,
    method: str = "mezo",
    seed: int = 0,
    step: int = 0,
    eps: float = 1e-3,
    state: EstimatorState | None = None,
    **settings: Any,
) -> dict[str, torch.Tensor]:
    """Estimate the gradient of ``loss_fn`` with respect to ``params`` from loss values alone.

    Args:
        loss_fn: reads the tensors in place and returns the loss as a number or scalar tensor.
        params: tensors by name; the name is part of the noise key, so renaming a tensor changes its direction.
        method: a key of `hf_zo.estimators.METHODS`.
        seed: run seed.
        step: step number; the same seed and step give the same directions.
        eps: smoothing radius.
        state: carries a stateful method from call to call: an `EstimatorState`, empty at first, whose ``value`` is replaced
            by the state after this step.
        **settings: the method's hyperparameters by the names of `ZOTrainingArguments` without their prefix
            (``num_directions``, ``direction``, ``clip``, …).

    Returns:
        One fp32 tensor per parameter (fp64 for fp64 parameters). The parameters are bitwise what they were.

    Raises:
        TypeError: for a hyperparameter the method does not have.
        ValueError: for an unknown method, a value outside its domain, or one tensor under two names.
        FloatingPointError: if a loss is not finite.
    """
    known = set(hyperparameters(method)) - {"per_example"}  # which takes the losses of examples
    unknown = set(settings) - known
    if unknown:
        raise TypeError(
            f"method {method!r} has no hyperparameter {', '.join(sorted(unknown))} here; it has {', '.join(sorted(known))}."
        )
    names: dict[int, str] = {}
    for name, p in params.items():
        if names.setdefault(p.data_ptr(), name) != name and p.numel():
            raise ValueError(f"{name} is the tensor that is called {names[p.data_ptr()]} too; give it once, as one direction.")
    estimator = METHODS[method](space_of(params), seed=seed, eps=eps, **settings)
    if state is not None:
        estimator.state = state.value
    runtime = TorchRuntime(params, "copy")

    def oracle(probes: Any) -> list[float]:
        losses = runtime.losses(probes, lambda: torch.as_tensor(loss_fn(), dtype=torch.float64))
        if not all(torch.isfinite(torch.tensor(losses, dtype=torch.float64))):
            raise FloatingPointError(f"loss_fn returned {losses}; the parameters are restored.")
        return losses

    with torch.no_grad():
        estimate = estimator.estimate(step, oracle)
        gradient = {name: estimate.gradient(name, p) for name, p in params.items()}
    if state is not None:
        state.value = estimate.state
    return gradient
