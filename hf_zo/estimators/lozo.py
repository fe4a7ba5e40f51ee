"""LoZO: low-rank perturbations whose right factor is held for several steps (Chen et al. 2024, arXiv 2410.07698).

    probe    W +- eps U_t V_k^T          U_t (m x r) ~ N(0,1) every step, V_k (n x r) ~ N(0,1) every nu steps, k = t // nu
    g      = s U_t V_k^T / r             s = [L(+) - L(-)] / (2 eps)
    LoZO-M   N = beta N + (1 - beta) s U_t,  g = N V_k^T / r;  where V changes, N (V_old^T V_new) / n replaces N

E[g] is the gradient, E[g | V] = G V V^T / r: within an interval the run descends in a subspace, which is what makes momentum
cheap (m r numbers for an m x n matrix). E|g|^2 = |G|^2 (mn + 2 + 2 (m + n + 1) / r), slightly above MeZO's. Tensors with one
dimension get dense noise; those with three or more are taken as (first dimension) x (all others).

Differs from the authors' code (optsuite/LOZO): they omit 1/r, so learning rates from there belong to ``scale_by_rank=False``
or must be multiplied by r; on the steps that refresh V they update along a direction that was not probed, here U and V have
keys of their own and cannot get out of step; V is regenerated from its key, so nothing is lost on resume. LoZO-M follows the
authors' RoBERTa code: no bias correction, and the first step takes N = s U_0.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from .. import noise
from ..directions import Direction, Probe, Space
from .base import Estimate, Estimator, Oracle

logger = logging.getLogger(__name__)


class LowRankDirection(Direction):
    """``U V^T`` for tensors with two or more dimensions, dense noise for the others."""

    def __init__(self, space: Space, seed: int, step: int, interval: int, rank: int, scaled: bool = False) -> None:
        self.space = space
        self.seed = seed
        self.step = step
        self.interval = interval
        self.rank = rank
        self.scaled = scaled  # by 1 / r, as the estimate is

    def matrix(self, name: str) -> tuple[int, int, int]:
        """``(m, n, r)`` of a tensor; r is at most the smaller of m and n."""
        shape = self.space[name].shape
        m, n = shape[0], torch.Size(shape[1:]).numel()
        return m, n, min(self.rank, m, n)

    def left(self, name: str) -> torch.Tensor:
        """U of the step, m x r; for tensors with fewer than two dimensions the dense noise itself."""
        spec = self.space[name]
        key = noise.stream_key(self.seed, self.step, 0, "direction", name)
        shape = spec.shape
        if len(shape) > 1:
            m, _, r = self.matrix(name)
            shape = (m, r)
        return noise.sample(key, shape, spec.device)

    def right(self, name: str) -> torch.Tensor:
        """V of the interval, n x r."""
        _, n, r = self.matrix(name)
        key = noise.stream_key(self.seed, self.interval, 0, "subspace", name)
        return noise.sample(key, (n, r), self.space[name].device)

    def sample(self, name: str) -> torch.Tensor:
        """The direction of tensor ``name``."""
        return self.expanded(name, self.left(name))

    def expanded(self, name: str, left: torch.Tensor) -> torch.Tensor:
        """``left V^T`` in the tensor's shape; tensors with fewer than two dimensions have no V."""
        shape = self.space[name].shape
        return left if len(shape) < 2 else noise.product(left, self.right_t(name)).view(shape)

    def right_t(self, name: str) -> torch.Tensor:
        """``V^T``, over r where the direction is scaled."""
        right = self.right(name)
        return (right / right.shape[1] if self.scaled else right).T.contiguous()

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """U and V^T; None for tensors with fewer than two dimensions."""
        return None if len(self.space[name].shape) < 2 else (self.left(name), self.right_t(name))


class _Momentum(Direction):
    """``N V^T`` with N from the method's state."""

    def __init__(self, left: Mapping[str, torch.Tensor], subspace: LowRankDirection) -> None:
        self.left = left
        self.subspace = subspace

    def sample(self, name: str) -> torch.Tensor:
        """The averaged direction of tensor ``name``, responses included."""
        return self.subspace.expanded(name, self.left[name])

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """N and V^T; None for tensors with fewer than two dimensions."""
        return None if len(self.subspace.space[name].shape) < 2 else (self.left[name], self.subspace.right_t(name))


class LoZO(Estimator):
    """Low-rank two-sided differences, with optional momentum in the subspace.

    Args:
        rank: r, default 2 (argparse default of the authors' code; their OPT-13B runs use 1 and 2, RoBERTa 4). Clipped to a
            tensor's smaller dimension, with a warning that names the tensor.
        interval: nu, steps that share a V; default 50 (the authors' code; 50 and 100 in their runs).
        momentum: beta of LoZO-M, 0 for none; the authors' RoBERTa code uses 0.7.
        scale_by_rank: divide the estimate of matrices by r, as in the paper. False reproduces the authors' code, which sees
            r times the learning rate.
        **common: see `Estimator`. Directions are Gaussian.

    Raises:
        ValueError: if a setting lies outside its domain.
    """

    name = "lozo"
    paper = "arXiv 2410.07698"
    perturbs = "all tensors, by U V^T of rank r"
    cost = "2"
    memory = "none; LoZO-M: m r per m x n matrix"
    use = "as MeZO, where momentum is wanted at little memory; not for tensors with few rows"

    def __init__(
        self,
        *args: Any,
        rank: int = 2,
        interval: int = 50,
        momentum: float = 0.0,
        scale_by_rank: bool = True,
        **common: Any,
    ) -> None:
        super().__init__(*args, **common)
        if rank < 1:
            raise ValueError(f"lozo_rank must be at least 1, got {rank}.")
        if interval < 1:
            raise ValueError(f"lozo_interval must be at least 1, got {interval}.")
        if not 0 <= momentum < 1:
            raise ValueError(f"lozo_momentum must lie in [0, 1), got {momentum}.")
        if self.kind != "gaussian":
            raise ValueError(f"zo_direction={self.kind!r}: the factors of lozo are Gaussian; leave it at 'gaussian'.")
        self.rank = rank
        self.interval = interval
        self.momentum = momentum
        self.scale_by_rank = scale_by_rank
        for tensor, spec in self.space.items():
            if len(spec.shape) > 1 and rank > min(spec.shape[0], torch.Size(spec.shape[1:]).numel()):
                logger.warning("lozo_rank=%d exceeds a dimension of %s %s and is clipped there.", rank, tensor, spec.shape)

    @property
    def forwards(self) -> int:
        """2."""
        return 2

    def direction(self, step: int, scaled: bool = False) -> LowRankDirection:
        """The direction of a step, over r if ``scaled``."""
        return LowRankDirection(self.space, self.seed, step, step // self.interval, self.rank, scaled)

    def estimate(self, step: int, oracle: Oracle) -> Estimate:
        """Measure both sides of ``U V^T``; with momentum, average within the subspace."""
        probe, applied = self.direction(step), self.direction(step, self.scale_by_rank)
        plus, minus = oracle([Probe(((radius, probe),)) for radius in (self.eps, -self.eps)])
        response = self.clipped((plus - minus) / (2 * self.eps))
        common: dict[str, Any] = {
            "step": step,
            "loss": (plus + minus) / 2,
            "projected_gradients": (response,),
            "scale": 1.0 if self.scale_by_rank else float(self.rank),
        }
        if self.momentum == 0:
            return Estimate(terms=[(response, applied)], **common)
        left = {name: self._average(name, response, applied) for name in self.space}
        state = {"left": left, "interval": applied.interval}
        return Estimate(terms=[(1.0, _Momentum(left, applied))], state=state, **common)

    def _average(self, name: str, response: float, now: LowRankDirection) -> torch.Tensor:
        """N after this step (for tensors with fewer than two dimensions, the average of ``s z``)."""
        fresh = now.left(name) * response
        if not self.state:
            return fresh
        old = self.state["left"][name].to(fresh.device)
        if self.state["interval"] != now.interval and fresh.shape != self.space[name].shape:
            before = LowRankDirection(self.space, self.seed, 0, self.state["interval"], self.rank)
            _, n, _ = now.matrix(name)
            old = old @ (before.right(name).T @ now.right(name)) / n
        return self.momentum * old + (1 - self.momentum) * fresh
