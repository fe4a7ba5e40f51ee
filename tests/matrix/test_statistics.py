"""Unbiasedness of every method against autograd, on a quadratic: E[estimate] / scale = gradient within five standard errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_zo.directions import Probe, displace, space_of
from hf_zo.estimators import METHODS

# What makes the mean of a method comparable: no state that the draws themselves move, and for LoZO a V of its own per draw.
SETTINGS: dict[str, dict[str, Any]] = {
    "mezo": {},
    "lozo": {"interval": 1},
    "kerzoo": {},
    "curvzo": {"budget": 1.2},
    "bszo": {"prior": 1.0, "noise": 0.5, "adaptive": False},
    "zo_act": {},
}
DRAWS = 3000


def test_every_method_is_here() -> None:
    assert set(SETTINGS) == set(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_unbiased_on_a_quadratic(method: str) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (2, 3), "b": (4,)}
    theta = {n: torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for n, s in shapes.items()}
    root = torch.randn(10, 10, generator=generator, dtype=torch.float64) / 3
    hessian = root @ root.T
    linear = torch.randn(10, generator=generator, dtype=torch.float64)

    def loss(point: dict[str, torch.Tensor]) -> torch.Tensor:
        flat = torch.cat([point[n].reshape(-1) for n in shapes])
        return 0.5 * flat @ hessian @ flat + linear @ flat

    gradients = torch.autograd.grad(loss(theta), list(theta.values()))
    expected = torch.cat([g.reshape(-1) for g in gradients])
    here = {n: t.detach().float() for n, t in theta.items()}  # which is displaced much faster than fp64

    def oracle(probes: list[Probe]) -> list[float]:
        return [
            float(loss({n: displace(torch.empty_like(t), t, n, p.terms).double() for n, t in here.items()})) for p in probes
        ]

    estimator = METHODS[method](space_of(here), eps=1e-2, **SETTINGS[method])
    if method == "curvzo":
        estimator.state = {"scores": torch.tensor([1.0, 0.25], dtype=torch.float64), "empty_draws": 0}
    drawn = torch.empty(DRAWS, 10, dtype=torch.float64)
    for step in range(DRAWS):
        estimate = estimator.estimate(step, oracle)
        drawn[step] = torch.cat([estimate.gradient(n, t).reshape(-1) for n, t in here.items()]) / estimate.scale
    error = drawn.std(0) / DRAWS**0.5
    assert ((drawn.mean(0) - expected).abs() < 5 * error).all()
    assert (error < 0.2 * expected.norm()).all()  # enough draws to see a bias
