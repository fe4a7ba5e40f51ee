"""MeZO: simultaneous perturbation with regenerated noise (Malladi et al. 2023, arXiv 2305.17333).

    s_i = [L(theta + eps z_i) - L(theta - eps z_i)] / (2 eps)          z_i ~ N(0, I)      (Definition 1)
    g   = 1/n sum_i s_i z_i                                                                (n-SPSA)

E[g] equals the gradient on any quadratic and E|g|^2 = (1 + (d+1)/n) |gradient|^2: the price of two forwards is the
dimension, paid back by small steps. Nothing is stored but seeds.

Differs from the paper's code: the noise of a tensor is keyed by step and name instead of one reseeded global stream,
n > 1 needs no gradient buffers, and the smoothing radius is applied to a copy or to scratch weights, so nothing drifts.
Rademacher entries are an option; they have E|g|^2 = (1 + (d-1)/n) |gradient|^2.
"""

from __future__ import annotations

from typing import Any

from ..directions import Probe
from .base import Estimate, Estimator, Oracle


class MeZO(Estimator):
    """n-SPSA with two-sided differences.

    Args:
        num_directions: n, directions averaged per step. The paper uses 1 and finds little gain from more at equal budget
            (its appendix on n-SPSA).
        **common: see `Estimator`.
    """

    name = "mezo"
    paper = "arXiv 2305.17333"
    perturbs = "all entries, dense"
    cost = "2n (n=1)"
    memory = "none"
    use = "the baseline; start here, with prompts and many small steps"

    def __init__(self, *args: Any, num_directions: int = 1, **common: Any) -> None:
        super().__init__(*args, **common)
        if num_directions < 1:
            raise ValueError(f"zo_num_directions must be at least 1, got {num_directions}.")
        self.num_directions = num_directions

    @property
    def forwards(self) -> int:
        """2n."""
        return 2 * self.num_directions

    def estimate(self, step: int, oracle: Oracle) -> Estimate:
        """Measure ``theta + eps z_i`` and ``theta - eps z_i`` and average ``s_i z_i``."""
        directions = [self.direction_of(step, i) for i in range(self.num_directions)]
        losses = oracle([Probe(((radius, d),)) for d in directions for radius in (self.eps, -self.eps)])
        responses = [
            self.clipped((plus - minus) / (2 * self.eps)) for plus, minus in zip(losses[::2], losses[1::2], strict=True)
        ]
        return Estimate(
            step=step,
            terms=[(s / self.num_directions, d) for s, d in zip(responses, directions, strict=True)],
            loss=sum(losses) / len(losses),
            projected_gradients=tuple(responses),
        )
