"""ZO-Act: MeZO's estimator on the activation-informed adapter of `hf_zo.adapters` (arXiv 2607.01125).

    W = W0 + B V^T,   s = [L(B + eps Z) - L(B - eps Z)] / (2 eps),   b = s Z,   B <- Adam(b)         V fixed, Z ~ N(0, I)

E[b] = (dL/dW) V and E|b|^2 = (k + 2) |(dL/dW) V|^2 with k = sum d_out r: the dimension that the variance grows with is that
of B, while V keeps most of the gradient. W0 is never written, so it may be quantised and does not drift.

The paper publishes no code, rank, rate, radius or Adam coefficients. Here: rank 8, Adam with torch's coefficients, rates
from this package's own runs. With one direction Adam sees b^2 = s^2 Z^2, mostly noise, and takes steps of nearly constant
length: average more directions (``num_directions``) or decay the rate.
"""

from __future__ import annotations

from .mezo import MeZO


class ZOAct(MeZO):
    """n-SPSA over the B factors; the basis, which makes the method, is made by `hf_zo.adapters`.

    Args:
        **common: see `MeZO`.
    """

    name = "zo_act"
    paper = "arXiv 2607.01125"
    perturbs = "B of an adapter W0 + B V^T, V from activations"
    cost = "2n (n=1), after a calibration of 3 passes over 64 sequences"
    memory = "A and B of the adapter, Adam's two moments of B"
    use = "adapters, also on a quantised base; not for models without linear layers"
