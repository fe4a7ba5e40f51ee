"""KerZOO: kernel moments as exact rationals, cancellation on a cubic, second moment, the control arm."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from hf_zo.directions import Probe, displace, space_of
from hf_zo.estimators.kerzoo import _COEFFICIENTS, KerZOO, kernel

D = 6


def moment(order: str, power: int, square: bool = False) -> Fraction:
    """E[r^power K] or E[r^power K^2] over U[-1, 1], exactly, for C = 1."""
    poly = {2 * k + 1: Fraction(c) for k, c in enumerate(_COEFFICIENTS[order])}
    if square:
        product: dict[int, Fraction] = {}
        for i, a in poly.items():
            for j, b in poly.items():
                product[i + j] = product.get(i + j, Fraction(0)) + a * b
        poly = product
    return sum((c * Fraction(1, p + power + 1) for p, c in poly.items() if (p + power) % 2 == 0), Fraction(0))


@pytest.mark.parametrize(
    ("order", "first", "third", "fifth", "k2", "rk2"),
    [
        ("1", 1, Fraction(3, 5), Fraction(3, 7), 3, Fraction(9, 5)),
        ("3", 1, 0, Fraction(-5, 21), Fraction(75, 4), Fraction(25, 4)),
        ("5", 1, 0, 0, None, None),
    ],
)
def test_kernel_moments_are_exact(order: str, first: int, third, fifth, k2, rk2) -> None:
    assert moment(order, 1) == first
    assert moment(order, 3) == third
    assert moment(order, 5) == fifth
    if k2 is not None:
        assert moment(order, 0, square=True) == k2
        assert moment(order, 2, square=True) == rk2
    else:
        assert float(moment(order, 0, square=True)) == pytest.approx(57.42, abs=0.01)
        assert float(moment(order, 2, square=True)) == pytest.approx(13.25, abs=0.01)


@pytest.mark.parametrize("a", [Fraction(1), Fraction(1, 2), Fraction(1, 4)])
@pytest.mark.parametrize("order", ["3", "5"])
def test_a_rescaled_kernel_keeps_its_moments(order: str, a: Fraction) -> None:
    """K(r/a)/a over U[-a, a]: E[r K_a] = E[r K] and E[r^3 K_a] = a^2 E[r^3 K] = 0; checked on a fine exact grid."""
    n = 2000
    r = (2 * np.arange(n) + 1) / n - 1  # midpoints of [-1, 1]
    values = np.array([kernel(order, x) for x in r]) / float(a)
    assert np.mean(r * float(a) * values) == pytest.approx(1, abs=1e-4)
    assert np.mean((r * float(a)) ** 3 * values) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("order", ["1", "3", "5"])
@pytest.mark.parametrize("a", [1.0, 0.5, 0.25])
def test_the_scale_is_what_a_kernel_passes_on(order: str, a: float) -> None:
    """Of a loss of slope 1 in r: E[r K(r)] over U[-a, a], 1 at a = 1, and C when the kernel is stretched."""
    n = 2000
    r = ((2 * np.arange(n) + 1) / n - 1) * a
    mean = np.mean([x * kernel(order, x) for x in r])
    space = space_of({"w": torch.zeros(3)})
    for rescale, expected in ((False, mean), (True, 1.0)):
        estimator = KerZOO(space, seed=0, eps=1e-3, order=order, range=a, half_life=1, rescale=rescale)
        scale = estimator.estimate(10_000, lambda probes: [1.0] * len(probes)).scale  # a has long been reached
        assert scale == pytest.approx(4 * expected, abs=1e-4)


def drawn(estimator: KerZOO, loss, steps: int) -> torch.Tensor:
    """Estimates of ``steps`` steps at theta = 0, which is fp32 here: fp64 is displaced many times as slowly."""
    out = torch.empty(steps, D, dtype=torch.float64)
    zero = torch.zeros(D)
    for t in range(steps):

        def oracle(probes: list[Probe]) -> list[float]:
            return [float(loss(displace(torch.empty_like(zero), zero, "w", p.terms))) for p in probes]

        out[t] = estimator.estimate(t, oracle).gradient("w", zero)
    return out


G = torch.linspace(0.5, 1.5, D, dtype=torch.float64)


def test_second_moment_of_the_default() -> None:
    """E|g/C|^2 = (6.25 (d + 2) / n + (n - 1) / n) |gradient|^2 within 3 %, and the mean within 5 standard errors."""
    estimator = KerZOO(space_of({"w": G}), eps=1e-3)
    gradients = drawn(estimator, lambda w: (G * w).sum(), 25_000) / 4.0
    assert ((gradients.mean(0) - G).abs() < 5 * gradients.std(0) / len(gradients) ** 0.5).all()
    measured = float(gradients.pow(2).sum(1).mean() / G.pow(2).sum())
    assert measured == pytest.approx(6.25 * (D + 2) / 3 + 2 / 3, rel=0.03)


@pytest.mark.parametrize(
    ("settings", "biased"),
    [
        ({}, False),
        ({"order": "richardson", "num_directions": 1}, False),
        ({"order": "1", "constant": 1.0}, True),
    ],
)
def test_third_order_bias_on_a_cubic(settings: dict, biased: bool) -> None:
    """L = <g, w> + sum w^3 / 6 with eps = 1: the bias eps^2/2 grad(Laplacian) = 1/2 is cancelled by K3 and by Richardson.

    K1 keeps E[r^3 K1] / E[r K1] = 3/5 of it.
    """
    estimator = KerZOO(space_of({"w": G}), eps=1.0, **settings)
    gradients = drawn(estimator, lambda w: (G * w).sum() + (w**3).sum() / 6, 12_000) / estimator_scale(estimator)
    bias = gradients.mean(0) - G
    error = gradients.std(0) / len(gradients) ** 0.5
    expected = 0.6 * 0.5 if biased else 0.0
    assert ((bias - expected).abs() < 5 * error).all()
    assert (5 * error < 0.5).all()  # enough draws to tell the two apart on average
    assert abs(float(bias.mean()) - expected) < 5 * float(error.mean()) / D**0.5


@pytest.mark.parametrize(
    ("settings", "residual"),
    [({}, -5 / 21), ({"order": "5"}, 0.0), ({"order": "richardson", "num_directions": 1}, -1 / 4)],
)
def test_what_is_left_of_a_quintic(settings: dict, residual: float) -> None:
    """Of L = w^5 at 0 along the direction 1, the estimate over C is eps^4 E[r^5 K], and Richardson's -eps^4 / 4.

    MeZO's is eps^4: cancelling the third order turns the sign of the fifth.
    """
    eps = 0.5
    estimator = KerZOO({}, eps=eps, **settings)
    scale = estimator_scale(estimator) * eps**4
    responses = [
        np.mean(estimator.estimate(t, lambda probes: [p.terms[0][0] ** 5 for p in probes]).projected_gradients) / scale
        for t in range(20_000)
    ]
    error = np.std(responses) / len(responses) ** 0.5
    assert np.mean(responses) == pytest.approx(residual, abs=4 * error + 1e-9)
    assert 4 * error < 0.1  # enough draws to tell the kernels apart


def estimator_scale(estimator: KerZOO) -> float:
    return 1.0 if estimator.order == "richardson" else estimator.constant


def test_the_range_shrinks_by_halves() -> None:
    estimator = KerZOO({}, range=0.25, half_life=10, num_directions=200)
    assert max(map(abs, estimator.radii(0))) <= 1.0
    assert max(map(abs, estimator.radii(0))) > 0.9
    at_ten = max(map(abs, estimator.radii(10)))
    assert 0.55 < at_ten <= 0.625
    assert 0.2 < max(map(abs, estimator.radii(10_000))) <= 0.2500001


def test_without_rescaling_the_effective_rate_drifts() -> None:
    """Un-rescaled K3 on U[-a, a]: E[r K] / C = 15/4 (5 a^2 / 3 - 7 a^4 / 5), 1.234 at a = 1/2; rescaled it stays 1."""
    for rescale, expected in ((False, 1.234), (True, 1.0)):
        estimator = KerZOO(space_of({"w": G}), range=0.5, half_life=1, rescale=rescale, eps=1e-3)
        estimator.half_life = 1e-9  # at the final range from the first step on
        responses = [
            np.mean(estimator.estimate(t, lambda probes: [p.terms[0][0] for p in probes]).projected_gradients)
            for t in range(1, 20_001)
        ]
        error = np.std(responses) / len(responses) ** 0.5
        assert np.mean(responses) / 4.0 == pytest.approx(expected, abs=5 * error / 4.0)


def test_forwards_equal_oracle_calls() -> None:
    for settings, forwards in (({}, 6), ({"num_directions": 2}, 4), ({"order": "richardson", "num_directions": 1}, 4)):
        estimator = KerZOO({}, **settings)
        counted = []
        estimator.estimate(0, lambda probes, counted=counted: counted.append(len(probes)) or [0.0] * len(probes))
        assert sum(counted) == estimator.forwards == forwards


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"num_directions": 0}, "zo_num_directions"),
        ({"order": "2"}, "kerzoo_order"),
        ({"constant": 0.0}, "kerzoo_constant"),
        ({"range": 0.0}, "kerzoo_range"),
        ({"range": 1.5}, "kerzoo_range"),
        ({"half_life": 0}, "kerzoo_half_life"),
        ({"order": "richardson", "constant": 2.0}, "kerzoo_order='richardson'.*kerzoo_constant"),
    ],
)
def test_settings_outside_their_domain(settings: dict, field: str) -> None:
    with pytest.raises(ValueError, match=field):
        KerZOO({}, **settings)
