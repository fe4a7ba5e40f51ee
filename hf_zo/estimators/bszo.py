"""BSZO: a Bayesian posterior over the projected gradient in a random subspace (arXiv 2601.01452).

    h = (z_1 .. z_k)^T gradient,   prior h ~ N(0, sigma_p^2 I),   y = a^T h + noise,   noise ~ N(0, sigma_n^2 |a|^2)
    K = P a / (a^T P a + sigma_n^2 |a|^2),   mu += K (y - a^T mu),   P -= K (P a)^T          one update per observation
    g = sum_i mu_i z_i                       (a sum: no 1/k)

The first k observations run along the axes, y_i = [L(theta + eps z_i) - L(theta)] / eps. Further ones, up to ``samples``,
are placed where the posterior is widest; P stays diagonal, so that is an axis again. The residual noise is learnt:

    q = (1 - alpha) q + alpha (y - a^T mu)^2 / |a|^2,   sigma_n = max(sigma_n0 / 10, sqrt(q))      before each update

E[g] = gamma k * gradient with the gain gamma = 1 - P_ii / sigma_p^2 averaged over axes: compare methods at equal
lr * gamma * k, which is what `Estimate.scale` reports. With learnt noise the gain is near 1 for |y| well below sigma_p and
about sigma_p^2 / mean y^2 far above: a smooth clip of the projected gradient at sigma_p, which is sqrt(parameters / 1e6)
for "auto".

Differs from the authors' code (AeonianQuill/BSZO): weights are not walked and restored in place; learning rate schedules and
weight decay act; ``cache=True`` (their third version) reuses the loss of an axis that is observed again, since on the same
batch it would come out the same, ``cache=False`` (their fourth) measures it again; eps defaults to this package's 1e-3
rather than 1e-4, which a bf16 weight does not resolve. A one-sided difference carries (eps/2) z^T H z; ``two_sided``
cancels it for k more forward passes and measures no clean loss.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np

from ..directions import Probe
from .base import Estimate, Estimator, Oracle


class Posterior:
    """Gaussian belief about h, updated one observation at a time (a Kalman filter with a constant state).

    Args:
        k: dimension.
        prior: standard deviation of every component before the first observation.
    """

    def __init__(self, k: int, prior: float) -> None:
        self.mean = np.zeros(k)
        self.covariance = prior**2 * np.eye(k)

    def residual(self, a: np.ndarray, y: float) -> float:
        """How far ``y`` lies from its expectation, per unit of ``a``."""
        return float((y - a @ self.mean) / np.linalg.norm(a))

    def observe(self, a: np.ndarray, y: float, noise: float) -> None:
        """Take in ``y = a . h + N(0, noise^2 |a|^2)``."""
        spread = self.covariance @ a
        gain = spread / (a @ spread + noise**2 * (a @ a))
        self.mean = self.mean + gain * (y - a @ self.mean)
        covariance = self.covariance - np.outer(gain, spread)
        # Symmetric and positive definite, whatever rounding does.
        self.covariance = (covariance + covariance.T) / 2 + 1e-10 * np.eye(len(a))


class BSZO(Estimator):
    """Sequential Bayesian estimate of k directional derivatives.

    Args:
        num_directions: k, default 2 (the authors' README).
        samples: m, observations per step, at least k; default 3 (the authors' README).
        prior: sigma_p, or ``"auto"`` for the root of the parameters in millions (the authors' README).
        noise: sigma_n0, or ``"auto"`` for sigma_p.
        adaptive: learn the residual noise, with rate alpha = 0.1 (the authors' README).
        cache: reuse the difference of an axis that is observed again.
        two_sided: central instead of forward differences.
        **common: see `Estimator`.

    Raises:
        ValueError: if a setting lies outside its domain.
    """

    name = "bszo"
    paper = "arXiv 2601.01452"
    perturbs = "k dense directions, weighed by their posterior"
    cost = "1+k (k=2); two-sided 2k"
    memory = "1 number"
    use = "where single losses are outliers: it clips them smoothly; otherwise MeZO with k directions"

    ALPHA = 0.1

    def __init__(
        self,
        *args: Any,
        num_directions: int = 2,
        samples: int = 3,
        prior: float | Literal["auto"] = "auto",
        noise: float | Literal["auto"] = "auto",
        adaptive: bool = True,
        cache: bool = True,
        two_sided: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(*args, **common)
        if num_directions < 1:
            raise ValueError(f"zo_num_directions must be at least 1, got {num_directions}.")
        if samples < num_directions:
            raise ValueError(f"bszo_samples={samples} must be at least zo_num_directions={num_directions}: one per axis.")
        self.num_directions = num_directions
        self.samples = samples
        size = sum(math.prod(spec.shape) for spec in self.space.values())
        self.prior = self._deviation("bszo_prior", prior, math.sqrt(size / 1e6))
        self.noise = self._deviation("bszo_noise", noise, self.prior)
        self.adaptive = adaptive
        self.cache = cache
        self.two_sided = two_sided

    @staticmethod
    def _deviation(field: str, value: float | str, automatic: float) -> float:
        if value == "auto":
            return automatic
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not 0 < number < math.inf:
            raise ValueError(f"{field} must be a positive number or 'auto', got {value!r}.")
        return number

    @property
    def forwards(self) -> int:
        """1 + k, two-sided 2k; without ``cache`` the further samples come on top."""
        measured = self.num_directions if self.cache else self.samples
        return 2 * measured if self.two_sided else 1 + measured

    def estimate(self, step: int, oracle: Oracle) -> Estimate:
        """Observe every axis, then the widest ones again, filtering as the numbers come in."""
        k = self.num_directions
        directions = [self.direction_of(step, i) for i in range(k)]
        signs = (1.0, -1.0) if self.two_sided else (1.0,)

        def along(i: int) -> list[Probe]:
            return [Probe(((sign * self.eps, directions[i]),)) for sign in signs]

        first = [] if self.two_sided else [Probe()]
        losses = list(oracle(first + [probe for i in range(k) for probe in along(i)]))
        clean = sum(losses) / len(losses) if self.two_sided else losses[0]

        def difference(measured: list[float]) -> float:
            if self.two_sided:
                return self.clipped((measured[0] - measured[1]) / (2 * self.eps))
            return self.clipped((measured[0] - clean) / self.eps)

        n = len(signs)
        observed = [difference(losses[len(first) + n * i : len(first) + n * (i + 1)]) for i in range(k)]
        posterior = Posterior(k, self.prior)
        variance = self.state.get("noise_variance", self.noise**2)
        for j in range(self.samples):
            i = j if j < k else int(np.diag(posterior.covariance).argmax())
            y = observed[i] if j < k or self.cache else difference(list(oracle(along(i))))
            axis = np.eye(k)[i]
            noise = self.noise
            if self.adaptive:
                variance = (1 - self.ALPHA) * variance + self.ALPHA * posterior.residual(axis, y) ** 2
                noise = max(0.1 * self.noise, math.sqrt(variance))
            posterior.observe(axis, y, noise)
        return Estimate(
            step=step,
            terms=[(float(mu), direction) for mu, direction in zip(posterior.mean, directions, strict=True)],
            loss=clean,
            projected_gradients=tuple(observed),
            scale=float(k - np.trace(posterior.covariance) / self.prior**2),
            state={"noise_variance": variance} if self.adaptive else {},
        )
