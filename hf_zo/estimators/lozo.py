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

from ..directions import Direction, LowRankDirection, Probe
from .base import Estimate, Estimator, Oracle

logger = logging.getLogger(__name__)


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
        if self.entries != "gaussian":
            raise ValueError(f"zo_direction={self.entries!r}: the factors of lozo are Gaussian; leave it at 'gaussian'.")
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
        return LowRankDirection(self.space, self.seed, step, step // self.interval, self.rank, power=float(scaled))

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
        if self.state["interval"] != now.interval and len(self.space[name].shape) > 1:
            before = LowRankDirection(self.space, self.seed, 0, self.state["interval"], self.rank)
            _, n, _ = now.matrix(name)
            old = old @ (before.right(name).T @ now.right(name)) / n
        return self.momentum * old + (1 - self.momentum) * fresh
