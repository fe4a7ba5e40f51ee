"""The contract between a method and the rest: probes out, losses back, an estimate down.

An `Estimator` decides at which points the loss is measured and what follows from the numbers. It sees neither model nor
batch nor device: losses come from an *oracle*, and the estimate leaves as a linear combination of regenerable directions.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, get_args

import torch

from .. import noise
from ..directions import DenseDirection, Direction, Entries, LowRankDirection, Probe, Space, Terms, displace

Oracle = Callable[[Sequence[Probe]], Sequence[float]]
"""Measures the loss of the current window at each probe, in fp64. May be called more than once in a step.

For probes along `ExampleDirections`, which a step asks for at once, the examples' contributions to it: as many numbers per
probe as the window has examples, probe by probe.
"""


@dataclass(frozen=True)
class Estimate:
    """A gradient estimate ``sum_i w_i * direction_i`` and the numbers it was made from.

    Attributes:
        step: the optimizer step it belongs to.
        terms: the weights ``w_i`` and their directions.
        loss: loss to report, the mean over the probes unless a method measures the clean point.
        projected_gradients: the finite-difference responses, one per direction (MeZO's name for them).
        scale: known factor in ``E[estimate] = scale * gradient``; lr times scale is the effective learning rate.
        state: the method's state after this step. `Estimator.commit` adopts it when the update is applied, never before:
            a checkpoint taken in between must not have counted the observation.
    """

    step: int
    terms: Terms
    loss: float
    projected_gradients: tuple[float, ...]
    scale: float = 1.0
    state: dict[str, Any] = field(default_factory=dict)

    def gradient(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """The estimate of one tensor: fp32 (fp64 for fp64 tensors), of the shape and on the device of ``like``."""
        zero = torch.zeros(like.shape, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
        return displace(zero, zero, name, self.terms)


class Estimator(ABC):
    """A zeroth-order method.

    Args:
        space: names, shapes and devices of the trainable tensors.
        seed: key of all directions.
        eps: smoothing radius.
        clip: bound on the absolute projected gradient, None for none.
        direction: ``"gaussian"`` or ``"rademacher"`` entries, independent; or ``"factorised"``: matrices along
            ``U V^T / sqrt(r)`` with fresh Gaussian U and V, whose entries have variance 1 too, other tensors densely. So
            E[s z] is the gradient still, and E|s z|^2 = |G|^2 (mn + 2 + 2 (m + n + 1) / r) for one m x n matrix.
        direction_rank: r of ``"factorised"``, clipped to a tensor's smaller dimension; 16 to 64 in arXiv 2605.28760, whose
            other tensors stay frozen.

    Raises:
        ValueError: if a setting lies outside its domain.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    perturbs: ClassVar[str]
    """What a probe changes."""
    cost: ClassVar[str]
    """Forward passes of the batch per step, as a formula."""
    memory: ClassVar[str]
    """Memory beyond that of inference that lasts from step to step."""
    use: ClassVar[str]
    """When to use the method, and when not."""

    def __init__(
        self,
        space: Space,
        *,
        seed: int = 0,
        eps: float = 1e-3,
        clip: float | None = None,
        direction: Entries = "gaussian",
        direction_rank: int = 16,
    ) -> None:
        if not (eps > 0 and math.isfinite(eps)):
            raise ValueError(f"zo_eps must be a positive number, got {eps}.")
        if clip is not None and not clip > 0:
            raise ValueError(f"zo_clip must be positive or None, got {clip}.")
        if direction not in get_args(Entries):
            raise ValueError(f"zo_direction must be 'gaussian', 'rademacher' or 'factorised', got {direction!r}.")
        if direction_rank < 1:
            raise ValueError(f"zo_direction_rank must be at least 1, got {direction_rank}.")
        self.space = space
        self.seed = seed
        self.eps = eps
        self.clip = clip
        self.entries = direction
        self.direction_rank = direction_rank
        self.state: dict[str, Any] = {}

    @property
    @abstractmethod
    def forwards(self) -> int:
        """Loss evaluations per step."""

    def measured(self, losses: int) -> int:
        """Forward passes that gave so many losses."""
        return losses

    @abstractmethod
    def estimate(self, step: int, oracle: Oracle) -> Estimate:
        """Estimate the gradient at step ``step``. Reads `state` and must not change it."""

    def commit(self, estimate: Estimate) -> None:
        """Adopt the state that belongs to an estimate which is being applied."""
        self.state = estimate.state

    @property
    def kind(self) -> noise.Kind:
        """Entries of the noise that directions are made of."""
        return "rademacher" if self.entries == "rademacher" else "gaussian"

    def direction_of(self, step: int, index: int) -> Direction:
        """Direction number ``index`` of a step, of variance 1 in every entry."""
        if self.entries == "factorised":
            return LowRankDirection(self.space, self.seed, step, step, self.direction_rank, index=index, power=0.5)
        return self.dense_direction(step, index)

    def dense_direction(self, step: int, index: int) -> DenseDirection:
        """Direction number ``index`` of a step with independent entries."""
        return DenseDirection(self.space, self.seed, step, index, self.kind)

    def clipped(self, response: float) -> float:
        """Limit a projected gradient to ``[-clip, clip]``."""
        return response if self.clip is None else max(-self.clip, min(self.clip, response))
