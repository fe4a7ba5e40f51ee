"""KerZOO: kernel-weighted finite differences (arXiv 2505.18886).

    g = 1/n sum_i [L(theta + eps r_i z_i) - L(theta - eps r_i z_i)] / (2 eps) K(r_i) z_i       r_i ~ U[-a, a]

    K1(r) = 3 C r        K3(r) = C (15/4) r (5 - 7 r^2)        K5(r) = C (105/64) r (99 r^4 - 126 r^2 + 35)

The kernels have E[r K] = C and, from K3 on, E[r^3 K] = 0 over U[-1, 1] (for K5 also E[r^5 K] = 0): the third-order term of
the difference cancels in the mean. So E[g] = C * gradient, and lr * C is the effective learning rate. The price is variance:
for K3, E|g/C|^2 = (6.25 (d + 2) / n + (n - 1) / n) |gradient|^2, and noise of the loss counts 18.75 times.

Differs from the paper: K5 uses 105/64, since the printed 195/64 misses E[r K] = C (it gives 13/7 C). Directions are Gaussian
instead of on the unit sphere: a unit-norm step over a whole model changes the loss by less than a float resolves, and with
Gaussian ones the mean is C * gradient without a factor 1/d. The schedule that shrinks the range a is not published; here a_t
approaches ``range`` from 1 by halves. With ``rescale`` the kernel is stretched along, K(r/a)/a, which keeps both moments;
without it, as the paper can be read, a < 1 loses the cancellation and the effective rate drifts.

``order="richardson"`` is a control arm: s = [4 s(eps/2) - s(eps)] / 3 along one z cancels the third-order term exactly and
costs no kernel variance. If bias were what KerZOO gains from, this would gain more.
"""

from __future__ import annotations

from typing import Any

from .. import noise
from ..directions import Probe
from .base import Estimate, Estimator, Oracle

_COEFFICIENTS: dict[str, tuple[float, ...]] = {
    "1": (3.0,),
    "3": (75 / 4, -105 / 4),
    "5": (105 * 35 / 64, -105 * 126 / 64, 105 * 99 / 64),
}


def kernel(order: str, r: float) -> float:
    """K(r) for C = 1: an odd polynomial of the given order."""
    return sum(c * r ** (2 * k + 1) for k, c in enumerate(_COEFFICIENTS[order]))


def response(order: str, a: float) -> float:
    """E[r K(r)] for C = 1 and r ~ U[-a, a]: how much of a slope a kernel that is not stretched passes on."""
    return sum(c * a ** (2 * k + 2) / (2 * k + 3) for k, c in enumerate(_COEFFICIENTS[order]))


class KerZOO(Estimator):
    """Kernel-weighted two-sided differences at random radii.

    Args:
        num_directions: n, default 3 (paper).
        order: ``"1"``, ``"3"`` (paper's default), ``"5"``, or ``"richardson"``.
        constant: C, default 4 (paper); multiplies the mean, so a learning rate of MeZO corresponds to lr / C here.
        range: radius range a that the schedule approaches, in (0, 1]; default 1, no shrinking (the paper's is not published).
        half_life: steps in which the distance to ``range`` halves; default 1000, a choice of this package.
        rescale: stretch the kernel with the range.
        **common: see `Estimator`.

    Raises:
        ValueError: if a setting lies outside its domain.
    """

    name = "kerzoo"
    paper = "arXiv 2505.18886"
    perturbs = "all entries, dense, at random radii"
    cost = "2n (n=3); richardson 4n"
    memory = "none"
    use = "to check claims about bias; at equal forward passes its variance is 6.25 times MeZO's"

    def __init__(
        self,
        *args: Any,
        num_directions: int = 3,
        order: str | int = "3",
        constant: float = 4.0,
        range: float = 1.0,
        half_life: int = 1000,
        rescale: bool = True,
        **common: Any,
    ) -> None:
        super().__init__(*args, **common)
        if num_directions < 1:
            raise ValueError(f"zo_num_directions must be at least 1, got {num_directions}.")
        if str(order) not in (*_COEFFICIENTS, "richardson"):
            raise ValueError(f"kerzoo_order={order!r} does not exist; choose one of 1, 3, 5, richardson.")
        if not constant > 0:
            raise ValueError(f"kerzoo_constant must be positive, got {constant}.")
        if not 0 < range <= 1:
            raise ValueError(f"kerzoo_range must lie in (0, 1], got {range}.")
        if half_life < 1:
            raise ValueError(f"kerzoo_half_life must be at least 1, got {half_life}.")
        unused = {"constant": constant != 4.0, "range": range != 1.0, "half_life": half_life != 1000, "rescale": not rescale}
        if str(order) == "richardson" and any(unused.values()):
            named = ", ".join(f"kerzoo_{name}" for name, given in unused.items() if given)
            raise ValueError(f"kerzoo_order='richardson' has no kernel and makes nothing of {named}; leave it at its default.")
        self.num_directions = num_directions
        self.order = str(order)
        self.constant = constant
        self.range = range
        self.half_life = half_life
        self.rescale = rescale

    @property
    def forwards(self) -> int:
        """2n, or 4n for the control arm."""
        return (4 if self.order == "richardson" else 2) * self.num_directions

    def range_at(self, step: int) -> float:
        """The range a_t of a step."""
        return self.range + (1 - self.range) * 0.5 ** (step / self.half_life)

    def radii(self, step: int) -> list[float]:
        """The r_i of a step."""
        a = self.range_at(step)
        u = noise.uniform(noise.stream_key(self.seed, step, 0, "radius", ""), self.num_directions)
        return [a * (2 * x - 1) for x in u.tolist()]

    def estimate(self, step: int, oracle: Oracle) -> Estimate:
        """Measure both sides of every direction at its radius and weigh them by the kernel."""
        directions = [self.direction_of(step, i) for i in range(self.num_directions)]
        if self.order == "richardson":
            radii = [x for _ in directions for x in (1.0, 0.5)]
            points = [(r, d) for d in directions for r in (1.0, 0.5)]
        else:
            radii = self.radii(step)
            points = list(zip(radii, directions, strict=True))
        losses = oracle([Probe(((sign * self.eps * r, d),)) for r, d in points for sign in (1, -1)])
        differences = [(plus - minus) / (2 * self.eps) for plus, minus in zip(losses[::2], losses[1::2], strict=True)]
        if self.order == "richardson":
            pairs = zip(differences[::2], differences[1::2], strict=True)
            responses = [self.clipped((4 * half / 0.5 - whole) / 3) for whole, half in pairs]
        else:
            a = self.range_at(step) if self.rescale else 1.0  # by which the kernel is stretched
            responses = [
                self.clipped(self.constant * s * kernel(self.order, r / a) / a) for s, r in zip(differences, radii, strict=True)
            ]
            passed_on = 1.0 if self.rescale else response(self.order, self.range_at(step))
        return Estimate(
            step=step,
            terms=[(s / self.num_directions, d) for s, d in zip(responses, directions, strict=True)],
            loss=sum(losses) / len(losses),
            projected_gradients=tuple(responses),
            scale=1.0 if self.order == "richardson" else self.constant * passed_on,
        )
