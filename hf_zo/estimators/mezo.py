"""MeZO: simultaneous perturbation with regenerated noise (Malladi et al. 2023, arXiv 2305.17333).

    s_i = [L(theta + eps z_i) - L(theta - eps z_i)] / (2 eps)          z_i ~ N(0, I)      (Definition 1)
    g   = 1/n sum_i s_i z_i                                                                (n-SPSA)

E[g] equals the gradient on any quadratic and E|g|^2 = (1 + (d+1)/n) |gradient|^2: the price of two forwards is the
dimension, paid back by small steps. Nothing is stored but seeds.

With ``per_example`` every example e of the batch is displaced along a direction of its own, in the same two forward passes,

    s_e = [L_e(theta + eps z_e) - L_e(theta - eps z_e)] / (2 eps)      L = sum_e L_e
    g   = sum_e s_e z_e                                                E|g|^2 = |gradient|^2 + (d+1) sum_e |gradient L_e|^2

(Gaussian). MeZO's factor d + 1 stands before |sum_e gradient L_e|^2, which is larger by up to the number of examples, the
more so the more their gradients agree. Independent perturbations within a batch are Flipout's idea (arXiv 1803.04386);
EGGROLL (arXiv 2511.16652) evaluates a population of low-rank ones so. It takes trainables that are small in every example:
adapter matrices.

Differs from the paper's code: the noise of a tensor is keyed by step and name instead of one reseeded global stream,
n > 1 needs no gradient buffers, and the smoothing radius is applied to a copy or to scratch weights, so nothing drifts.
Rademacher entries are an option; they have E|g|^2 = (1 + (d-1)/n) |gradient|^2.
"""

from __future__ import annotations

from typing import Any

from ..directions import ExampleDirections, Probe
from .base import Estimate, Estimator, Oracle


class MeZO(Estimator):
    """n-SPSA with two-sided differences.

    Args:
        num_directions: n, directions averaged per step. The paper uses 1 and finds little gain from more at equal budget
            (its appendix on n-SPSA).
        per_example: a direction of its own for every example of the batch; losses are then those of examples, as
            contributions to the loss of the batch, and ``clip`` bounds the projected gradient of an example's own loss.
        **common: see `Estimator`.
    """

    name = "mezo"
    paper = "arXiv 2305.17333"
    perturbs = "all entries, dense"
    cost = "2n (n=1)"
    memory = "none"
    use = "the baseline; free answers, on LoRA; with prompts and many small steps"

    def __init__(self, *args: Any, num_directions: int = 1, per_example: bool = False, **common: Any) -> None:
        super().__init__(*args, **common)
        if num_directions < 1:
            raise ValueError(f"zo_num_directions must be at least 1, got {num_directions}.")
        if per_example and self.entries == "factorised":
            raise ValueError("zo_per_example draws independent entries; set zo_direction to 'gaussian' or 'rademacher'.")
        self.num_directions = num_directions
        self.per_example = per_example

    @property
    def forwards(self) -> int:
        """2n."""
        return 2 * self.num_directions

    def estimate(self, step: int, oracle: Oracle) -> Estimate:
        """Measure ``theta + eps z_i`` and ``theta - eps z_i`` and average ``s_i z_i``."""
        if self.per_example:
            return self._estimate_per_example(step, oracle)
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

    def _estimate_per_example(self, step: int, oracle: Oracle) -> Estimate:
        """The same with a family of directions, one per example, in place of each direction."""
        n = self.num_directions
        families = [ExampleDirections(self.space, self.seed, step, i, self.kind) for i in range(n)]
        losses = oracle([Probe(((radius, family),)) for family in families for radius in (self.eps, -self.eps)])
        examples = len(losses) // (2 * n)
        rows = [losses[i : i + examples] for i in range(0, len(losses), examples)]
        responses = [
            [self.clipped((p - m) / (2 * self.eps) * examples) / examples for p, m in zip(plus, minus, strict=True)]
            for plus, minus in zip(rows[::2], rows[1::2], strict=True)
        ]
        return Estimate(
            step=step,
            terms=[(1 / n, family.weighted(s)) for s, family in zip(responses, families, strict=True)],
            loss=sum(losses) / (2 * n),
            projected_gradients=tuple(sum(s) for s in responses),
        )

    def measured(self, losses: int) -> int:
        """Forward passes that gave so many losses."""
        return self.forwards if self.per_example else losses
