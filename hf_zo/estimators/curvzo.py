"""CurvZO: sparse perturbations, drawn where the gradient has been large (arXiv 2603.21725).

    v = m * z       m_b ~ Bernoulli(pi_b) by block, z ~ N(0, I);  s = [L(theta + eps v) - L(theta - eps v)] / (2 eps)
    g_b = s v_b / pi_b                            Horvitz-Thompson: E[g] is the gradient                        (12, 13)
    c_b = s^2 |v_b|^2 / |v|^2,  C = (1 - alpha) C + alpha c       scores: online traces of the empirical Fisher   (5, 7, 8)
    pi_b = min(1, tau sqrt(C_b)),  sum pi = B     the allocation that minimises sum F_b / pi_b                  (15 - 17)
    B = lambda K + (1 - lambda) N H               K = (sum sqrt C)^2 / sum C, H the entropy of sqrt C over log N  (18 - 20)

A block is a native tensor (the paper's experiments) or, for adapter-sized sets, a single coordinate; the formulas are the
same. Equal scores give B = N, which is dense MeZO, and so does a budget of N: bit for bit.

What reweighting costs: E|g|^2 = sum_b (d_b + 2) G_b / pi_b + sum_{b != b'} d_b pi_b' G_b' / pi_b, where G_b is the squared
gradient of a block. The second sum is not in the paper's bound; it dominates for many blocks and rewards *rare* probing
of steep blocks, so the rule above raises the variance over dense MeZO (1.4 times at half the budget on a 337-block model).
``reweight="none"`` estimates Pi * gradient instead, along which the same rule does help.

Differs from the paper, whose formulas were rebuilt from its sentences, and which publishes neither alpha nor lambda: the
first observation sets the level of the equal initial scores, so that scaling the loss changes nothing; probabilities are
kept above ``floor``, without which one draw of a neglected block could move it by any amount; a draw that selects nothing
measures the clean loss, applies nothing and is counted in the state. Scores carry the probability they were drawn with,
E[c_b] ~ pi_b, which pulls the rule towards uniform; ``debias`` takes that out (41):

    c_b = s^2 (|v_b|^2 - pi_b d_b) / (pi_b (d_b + 2 - d_b pi_b)),   E[c_b] = G_b, of larger variance
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch

from .. import noise
from ..directions import DenseDirection, Direction, Probe
from .base import Estimate, Estimator, Oracle

Reweight = Literal["ht", "partial", "none"]
Granularity = Literal["block", "coordinate"]
_EXPONENT: dict[str, float] = {"ht": 1.0, "partial": 0.5, "none": 0.0}


class BlockDirection(DenseDirection):
    """Dense noise times one weight per tensor; where the weight is 0 nothing is drawn."""

    def __init__(self, dense: DenseDirection, weights: Mapping[str, float]) -> None:
        super().__init__(dense.space, dense.seed, dense.step, dense.index, dense.kind)
        self.weights = weights

    def streams(self, name: str) -> list[tuple[float, int]]:
        """The weighted noise stream of tensor ``name``, none where the weight is 0."""
        weight = self.weights[name]
        return [(weight, self.key(name))] if weight else []

    def moves(self, name: str) -> bool:
        """Whether the weight of tensor ``name`` is not 0."""
        return bool(self.weights[name])

    def sample(self, name: str) -> torch.Tensor:
        """The direction of tensor ``name``."""
        return super().sample(name) * self.weights[name]


class CoordinateDirection(Direction):
    """Dense noise times one weight per coordinate."""

    def __init__(self, dense: DenseDirection, weights: Mapping[str, torch.Tensor]) -> None:
        self.dense = dense
        self.weights = weights

    def sample(self, name: str) -> torch.Tensor:
        """The direction of tensor ``name``."""
        return self.dense.sample(name) * self.weights[name]


class CurvZO(Estimator):
    """Two-sided differences along randomly selected blocks or coordinates.

    Args:
        ema: alpha, the share of a new score in its average, in [0, 1]; default 0.1 (not published). With 0 scores stay
            equal and every block or coordinate is drawn with the same probability: with a fixed budget, the uniform
            control of the paper's ablation (the adaptive budget of equal scores is N, dense MeZO).
        mix: lambda, between effective support (1) and entropy (0); default 0.5 (not published).
        reweight: ``"ht"`` divides by the probability (paper), ``"none"`` does not, ``"partial"`` divides by its root.
        budget: B, expected number of selected blocks or coordinates, at least 1; None adapts it (paper).
        granularity: ``"block"``, one block per tensor, or ``"coordinate"``, which keeps one score per parameter.
        floor: least probability, in (0, 1]; default 0.02, a choice of this package.
        debias: take the probability of drawing out of the scores.
        **common: see `Estimator`.

    Raises:
        ValueError: if a setting lies outside its domain.
    """

    name = "curvzo"
    paper = "arXiv 2603.21725"
    perturbs = "tensors (or coordinates) drawn by past sensitivity"
    cost = "2"
    memory = "1 number per tensor; by coordinate: 1 per parameter"
    use = "when few tensors matter, without reweighting; its reweighted form has more variance than MeZO"

    def __init__(
        self,
        *args: Any,
        ema: float = 0.1,
        mix: float = 0.5,
        reweight: Reweight = "ht",
        budget: float | None = None,
        granularity: Granularity = "block",
        floor: float = 0.02,
        debias: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(*args, **common)
        if self.entries == "factorised":
            raise ValueError("zo_direction='factorised': the scores of curvzo need independent entries; use 'gaussian'.")
        if debias and self.entries == "rademacher":
            raise ValueError("zo_direction='rademacher': curvzo_debias reads the sizes of entries; unset it.")
        if not 0 <= ema <= 1:
            raise ValueError(f"curvzo_ema must lie in [0, 1], got {ema}.")
        if not 0 <= mix <= 1:
            raise ValueError(f"curvzo_mix must lie in [0, 1], got {mix}.")
        if reweight not in _EXPONENT:
            raise ValueError(f"curvzo_reweight={reweight!r} does not exist; choose one of {', '.join(_EXPONENT)}.")
        if budget is not None and mix != 0.5:
            raise ValueError(
                f"curvzo_mix={mix} adapts a budget, and curvzo_budget={budget} is fixed; leave one of them at its default."
            )
        if budget is not None and not 1 <= budget < math.inf:
            raise ValueError(f"curvzo_budget must be at least 1 block or coordinate, or None, got {budget}.")
        if granularity not in ("block", "coordinate"):
            raise ValueError(f"curvzo_granularity must be 'block' or 'coordinate', got {granularity!r}.")
        if not 0 < floor <= 1:
            raise ValueError(f"curvzo_floor must lie in (0, 1], got {floor}.")
        self.ema = ema
        self.mix = mix
        self.reweight = reweight
        self.budget = budget
        self.granularity = granularity
        self.floor = floor
        self.debias = debias
        sizes = [math.prod(spec.shape) for spec in self.space.values()]
        self._sizes = torch.tensor(sizes, dtype=torch.float64)

    @property
    def forwards(self) -> int:
        """2; the rare step that selects nothing takes 1."""
        return 2

    def probabilities(self) -> torch.Tensor:
        """Inclusion probability of every block, or of every coordinate in the order of the space; fp64."""
        scores = self.state.get("scores")
        if scores is None:
            units = len(self.space) if self.granularity == "block" else int(self._sizes.sum())
            scores = torch.ones(units, dtype=torch.float64, device=self._device())
        scores = scores.to(self._device(), torch.float64).clamp(min=0)
        budget = min(self.budget or adaptive_budget(scores, self.mix), len(scores))
        return allocate(scores.sqrt(), budget).clamp(min=self.floor)

    def estimate(self, step: int, oracle: Oracle) -> Estimate:
        """Draw a mask, measure both sides of it, and score what was selected."""
        dense = self.dense_direction(step, 0)
        probabilities = self.probabilities()
        mask = self._draw(step) < probabilities
        weight = mask / probabilities ** _EXPONENT[self.reweight]
        scale = self._share(probabilities)
        before, empty_draws = self.state.get("scores"), self.state.get("empty_draws", 0)
        if not mask.any():
            (loss,) = oracle([Probe()])
            scores = before if before is None else before * (1 - self.ema)
            state = {"scores": scores, "empty_draws": empty_draws + 1}
            return Estimate(step=step, terms=(), loss=loss, projected_gradients=(0.0,), scale=scale, state=state)
        probe, applied = self._along(dense, mask.double()), self._along(dense, weight)
        plus, minus = oracle([Probe(((radius, probe),)) for radius in (self.eps, -self.eps)])
        response = self.clipped((plus - minus) / (2 * self.eps))
        scores = self._scores(response, dense, mask, probabilities)
        before = torch.full_like(scores, response**2 / len(scores)) if before is None else before.to(scores)
        after = (1 - self.ema) * before + self.ema * scores
        return Estimate(
            step=step,
            terms=[(response, applied)],
            loss=(plus + minus) / 2,
            projected_gradients=(response,),
            scale=scale,
            state={"scores": after.to(self._score_dtype), "empty_draws": empty_draws},
        )

    @property
    def _score_dtype(self) -> torch.dtype:
        return torch.float64 if self.granularity == "block" else torch.float32

    def _device(self) -> torch.device:
        """Block scores live on the host, coordinate scores beside the first tensor."""
        if self.granularity == "block" or not self.space:
            return torch.device("cpu")
        return next(iter(self.space.values())).device

    def _draw(self, step: int) -> torch.Tensor:
        """One uniform number per unit, keyed by tensor, so that the order of tensors changes nothing."""
        counts = [1] * len(self.space) if self.granularity == "block" else self._sizes.long().tolist()
        keys = [noise.stream_key(self.seed, step, 0, "mask", name) for name in self.space]
        drawn = [noise.uniform(key, n, self._device()) for key, n in zip(keys, counts, strict=True)]
        return torch.cat([torch.empty(0, dtype=torch.float64, device=self._device()), *drawn])

    def _along(self, dense: DenseDirection, weights: torch.Tensor) -> Direction:
        if self.granularity == "block":
            return BlockDirection(dense, dict(zip(self.space, weights.tolist(), strict=True)))
        return CoordinateDirection(dense, self._by_tensor(weights.float()))

    def _by_tensor(self, units: torch.Tensor) -> dict[str, torch.Tensor]:
        parts = units.split(self._sizes.long().tolist())
        return {n: part.view(spec.shape).to(spec.device) for (n, spec), part in zip(self.space.items(), parts, strict=True)}

    def _scores(self, response: float, dense: DenseDirection, mask: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
        """c of every unit, fp64."""
        if self.granularity == "block":
            chosen = [name for name, on in zip(self.space, mask.tolist(), strict=True) if on]
            energies = [
                noise.energy(dense.key(n), math.prod(self.space[n].shape), self.space[n].device, self.kind) for n in chosen
            ]
            energy, sizes = torch.zeros_like(probabilities), self._sizes
            energy[mask] = torch.stack([e.to(energies[0].device) for e in energies]).cpu()
        else:
            z = torch.cat([dense.sample(name).reshape(-1).to(mask.device) for name in self.space])
            energy, sizes = z.double() ** 2 * mask, torch.ones((), dtype=torch.float64, device=mask.device)
        if self.debias:
            denominator = probabilities * (sizes + 2 - sizes * probabilities)
            return response**2 * (energy - probabilities * sizes) / denominator
        total = math.fsum(energy.tolist()) if self.granularity == "block" else _sum_of_small(energy)
        return response**2 * energy / total if total else torch.zeros_like(energy)

    def _share(self, probabilities: torch.Tensor) -> float:
        """Mean over parameters of the factor between estimate and gradient."""
        if self.reweight == "ht":
            return 1.0
        kept = probabilities ** (1 - _EXPONENT[self.reweight])
        return float((kept * self._sizes).sum() / self._sizes.sum()) if self.granularity == "block" else float(kept.mean())


def _sum_of_small(values: torch.Tensor) -> float:
    """Sum of many numbers below 2^31, in whole multiples of 2^-32: a floating sum would depend on the number of threads.

    In two halves, as 2^31 numbers near 1 would not fit into 64 bits.
    """
    units = (values * 2.0**32).round().long()
    high, low = torch.stack([(units >> 16).sum(), (units & 0xFFFF).sum()]).tolist()
    return float((high << 16) + low) * 2.0**-32


def adaptive_budget(scores: torch.Tensor, mix: float) -> float:
    """B of equations 18 to 20, in [1, N], from N scores that are not negative; N if all of them are zero."""
    n, root = len(scores), scores.sqrt()
    total = _sum(root)
    if n < 2 or total == 0:
        return float(n)
    p = root / total
    support = total**2 / _sum(scores)
    entropy = -_sum(torch.xlogy(p, p)) / math.log(n)
    return min(max(mix * support + (1 - mix) * n * entropy, 1.0), float(n))


def allocate(weights: torch.Tensor, budget: float) -> torch.Tensor:
    """Water-filling: ``min(1, tau * weights)`` with tau such that the sum is ``budget``, exactly, in O(N log N).

    Weights below 1e-12 of the largest count as that, so that a budget which exceeds the positive weights is still spent.

    Args:
        weights: N numbers that are not negative, fp64. All zero: as if they were equal.
        budget: in (0, N].
    """
    n, largest = len(weights), float(weights.max()) if len(weights) else 0.0
    if budget >= n * (1 - 1e-12):  # rounding of an entropy must not keep equal scores from dense MeZO
        return torch.ones_like(weights)
    weights = (weights / largest).clamp(min=1e-12) if largest > 0 else torch.ones_like(weights)
    ordered = weights.sort(descending=True).values
    # tail[k]: sum of all but the k largest, added up from the smallest. tau_k serves if it saturates no more than k.
    tail = ordered.flip(0).cumsum(0).flip(0)
    tau = (budget - torch.arange(n, dtype=weights.dtype, device=weights.device)) / tail
    k = int((tau * ordered <= 1).to(torch.uint8).argmax())
    return (weights * tau[k]).clamp(max=1.0)


def _sum(values: torch.Tensor) -> float:
    """A sum in a fixed order, whatever the number of threads."""
    return float(values.cumsum(0)[-1])
