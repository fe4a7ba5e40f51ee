"""BSZO: the filter against the closed form, its gains, its variants, and the mean of its estimate."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hf_zo.directions import Probe, displace, space_of
from hf_zo.estimators.bszo import BSZO, Posterior

D = 6
G = torch.linspace(0.5, 1.5, D, dtype=torch.float64)
ZERO = torch.zeros(D)  # fp32, which is displaced much faster than fp64


def linear(probes: list[Probe]) -> list[float]:
    return [float(G @ displace(torch.empty_like(ZERO), ZERO, "w", p.terms).double()) + 3.0 for p in probes]


def quadratic(probes: list[Probe]) -> list[float]:
    points = [displace(torch.empty_like(ZERO), ZERO, "w", p.terms).double() for p in probes]
    return [float(G @ w + 0.5 * (w**2 * torch.arange(1, D + 1)).sum()) for w in points]


def given(values: list[float]):
    """An oracle that answers 0 at the clean point and ``eps * value`` at the next probes, whatever they are."""
    answers = iter(values)

    def oracle(probes: list[Probe]) -> list[float]:
        return [next(answers) * p.terms[0][0] if p.terms else 0.0 for p in probes]

    return oracle


def means(estimator: BSZO, answers: list[float]) -> list[float]:
    return [weight for weight, _ in estimator.estimate(0, given(answers)).terms]


def test_sequential_updates_equal_the_batch_posterior() -> None:
    """P = (I / s_p^2 + sum a a^T / (s_n^2 |a|^2))^-1 and mu = P sum a y / (s_n^2 |a|^2), for directions that are no axes."""
    generator = np.random.default_rng(0)
    for k in (1, 2, 5):
        posterior, prior, noise = Posterior(k, 1.7), 1.7, 0.6
        precision, weighted = np.eye(k) / prior**2, np.zeros(k)
        for _ in range(12):
            a, y = generator.normal(size=k), generator.normal()
            posterior.observe(a, y, noise)
            precision += np.outer(a, a) / (noise**2 * (a @ a))
            weighted += a * y / (noise**2 * (a @ a))
        np.testing.assert_allclose(posterior.covariance, np.linalg.inv(precision), atol=1e-8)
        np.testing.assert_allclose(posterior.mean, np.linalg.inv(precision) @ weighted, atol=1e-8)


def test_the_covariance_stays_positive_and_shrinks() -> None:
    generator = np.random.default_rng(1)
    posterior = Posterior(4, 36.0)
    trace = np.trace(posterior.covariance)
    for _ in range(10_000):
        posterior.observe(generator.normal(size=4), generator.normal(), 10 ** generator.uniform(-4, 2))
        assert (posterior.covariance == posterior.covariance.T).all()
        assert np.linalg.eigvalsh(posterior.covariance).min() > -1e-12
        assert np.trace(posterior.covariance) <= trace + 4e-10 + 1e-15
        trace = np.trace(posterior.covariance)


def test_gains_with_fixed_noise() -> None:
    """1/2 at equal deviations and 2/3 for an axis seen twice: y = [2, 4] with m = 3 gives [4/3, 2]; scale is gamma k."""
    space = space_of({"w": G})
    once = BSZO(space, samples=2, prior=1.0, noise=1.0, adaptive=False).estimate(0, given([2.0, 4.0]))
    assert [w for w, _ in once.terms] == pytest.approx([1.0, 2.0])
    assert once.scale == pytest.approx(1.0)
    twice = BSZO(space, samples=3, prior=1.0, noise=1.0, adaptive=False).estimate(0, given([2.0, 4.0]))
    gains = sorted(w / y for (w, _), y in zip(twice.terms, (2.0, 4.0), strict=True))
    assert gains == pytest.approx([1 / 2, 2 / 3])
    assert twice.scale == pytest.approx(1 / 2 + 2 / 3)
    assert twice.projected_gradients == pytest.approx((2.0, 4.0))
    wide = BSZO(space, samples=2, prior=2.0, noise=1.0, adaptive=False).estimate(0, given([2.0, 4.0]))
    assert wide.scale == pytest.approx(2 * 4 / 5)


@pytest.mark.parametrize(("clip", "expected"), [(None, (4.0, -8.0)), (5.0, (4.0, -5.0)), (1.0, (1.0, -1.0))])
@pytest.mark.parametrize(("two_sided", "losses", "loss"), [(False, [1.0, 2.0, -1.0], 1.0), (True, [2.0, 0.0, 0.0, 4.0], 1.5)])
def test_clip_bounds_every_response(
    two_sided: bool, losses: list[float], loss: float, clip: float | None, expected: tuple[float, float]
) -> None:
    fixed: dict[str, Any] = {"samples": 2, "prior": 1.0, "noise": 1.0, "adaptive": False, "eps": 0.25}
    estimate = BSZO(space_of({"w": G}), two_sided=two_sided, clip=clip, **fixed).estimate(0, lambda probes: losses)
    assert estimate.projected_gradients == expected
    assert [w for w, _ in estimate.terms] == pytest.approx([s / 2 for s in expected])
    assert estimate.loss == loss  # the loss is reported as measured


@pytest.mark.parametrize(("size", "gain"), [(0.1, 0.990), (1.0, 0.447), (10.0, 0.0058)])
def test_learnt_noise_clips_smoothly_at_the_prior(size: float, gain: float) -> None:
    """The stationary gain for responses of constant size: near 1 well below sigma_p, small well above."""
    estimator = BSZO(space_of({"w": G}), num_directions=1, samples=1, prior=1.0)
    generator = np.random.default_rng(2)
    for t in range(400):
        y = size * generator.choice([-1.0, 1.0])
        estimate = estimator.estimate(t, given([y]))
        estimator.commit(estimate)
    assert estimate.terms[0][0] / y == pytest.approx(1 / (1 + max(0.01, size**2)), rel=1e-6)
    if size <= 1:
        assert 1 / (1 + max(0.01, size**2)) == pytest.approx(gain, rel=0.15)


def test_noise_is_learnt_over_steps_and_committed_with_them() -> None:
    estimator = BSZO(space_of({"w": G}), prior=2.0, noise=3.0)
    first = estimator.estimate(0, linear)
    assert estimator.state == {}
    y = first.projected_gradients
    q = 9.0
    posterior = Posterior(2, 2.0)
    for j in range(3):
        i = j if j < 2 else int(np.diag(posterior.covariance).argmax())
        a = np.eye(2)[i]
        q = 0.9 * q + 0.1 * posterior.residual(a, y[i]) ** 2
        posterior.observe(a, y[i], max(0.3, q**0.5))
    assert first.state["noise_variance"] == pytest.approx(q)
    estimator.commit(first)
    resumed = BSZO(space_of({"w": G}), prior=2.0, noise=3.0)
    resumed.state = dict(estimator.state)
    assert resumed.estimate(1, linear).terms[0][0] == estimator.estimate(1, linear).terms[0][0]
    fresh = BSZO(space_of({"w": G}), prior=2.0, noise=3.0).estimate(1, linear)
    assert fresh.terms[0][0] != estimator.estimate(1, linear).terms[0][0]


@pytest.mark.parametrize("two_sided", [False, True])
def test_measuring_again_gives_the_cached_estimate(two_sided: bool) -> None:
    """Third and fourth version of the authors' code agree where the loss is deterministic."""
    space = space_of({"w": G})
    cached = BSZO(space, samples=5, two_sided=two_sided, prior=1.0).estimate(3, quadratic)
    measured = BSZO(space, samples=5, two_sided=two_sided, prior=1.0, cache=False).estimate(3, quadratic)
    assert [w for w, _ in cached.terms] == pytest.approx([w for w, _ in measured.terms], rel=1e-12)
    assert cached.loss == measured.loss


def test_mean_of_the_estimate() -> None:
    """E[g] = gamma k gradient on a linear loss with fixed noise, within 5 standard errors; gamma = 1/2, k = 2.

    The second moment of the sum of two directions is gamma^2 (k (d + 2) + k (k - 1)) |gradient|^2, within 3 %.
    """
    estimator = BSZO(space_of({"w": G}), samples=2, prior=1.0, noise=1.0, adaptive=False, eps=1e-3)
    drawn = torch.stack([estimator.estimate(t, linear).gradient("w", ZERO) for t in range(20_000)]).double()
    assert ((drawn.mean(0) - G).abs() < 5 * drawn.std(0) / len(drawn) ** 0.5).all()
    measured = float(drawn.pow(2).sum(1).mean() / G.pow(2).sum())
    assert measured == pytest.approx(0.25 * (2 * (D + 2) + 2), rel=0.03)


def test_two_sided_differences_cancel_curvature() -> None:
    """One-sided responses contain (eps/2) z^T H z; the mean of it is (eps/2) tr H = 10.5 at eps = 1 here."""
    sums = []
    for two_sided in (False, True):
        estimator = BSZO(space_of({"w": G}), eps=1.0, two_sided=two_sided)
        sums.append(np.array([estimator.estimate(t, quadratic).projected_gradients for t in range(4000)]))
    one, two = (x.mean() for x in sums)
    assert one == pytest.approx(10.5, abs=5 * sums[0].std() / 8000**0.5)
    assert two == pytest.approx(0.0, abs=5 * sums[1].std() / 8000**0.5)


def test_scaling_the_loss_scales_the_estimate() -> None:
    space = space_of({"w": G})
    small = BSZO(space, prior=1.0, noise=0.5).estimate(0, linear)
    large = BSZO(space, prior=8.0, noise=4.0).estimate(0, lambda probes: [8 * x for x in linear(probes)])
    assert [8 * w for w, _ in small.terms] == pytest.approx([w for w, _ in large.terms], rel=1e-7)


def test_automatic_deviations() -> None:
    estimator = BSZO({"w": space_of({"w": torch.empty(2000, 3000, device="meta")})["w"]})
    assert estimator.prior == pytest.approx(6**0.5)
    assert estimator.noise == estimator.prior
    assert BSZO(space_of({"w": G}), prior=2.0).noise == 2.0


@pytest.mark.parametrize(
    ("keywords", "forwards"),
    [
        ({}, 3),
        ({"num_directions": 3, "samples": 5}, 4),
        ({"cache": False}, 4),
        ({"two_sided": True}, 4),
        ({"two_sided": True, "cache": False}, 6),
    ],
)
def test_forwards_equal_oracle_calls(keywords: dict[str, Any], forwards: int) -> None:
    estimator = BSZO(space_of({"w": G}), **keywords)
    counted: list[int] = []
    estimate = estimator.estimate(0, lambda probes: counted.append(len(probes)) or linear(probes))
    assert sum(counted) == estimator.forwards == forwards
    if not estimator.two_sided:
        assert estimate.loss == 3.0  # the clean point


@pytest.mark.parametrize(
    ("keywords", "field"),
    [
        ({"num_directions": 0}, "zo_num_directions"),
        ({"num_directions": 4}, "bszo_samples"),
        ({"prior": 0.0}, "bszo_prior"),
        ({"prior": "large"}, "bszo_prior"),
        ({"noise": -1.0}, "bszo_noise"),
        ({"noise": float("nan")}, "bszo_noise"),
    ],
)
def test_settings_outside_their_domain(keywords: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=field):
        BSZO({}, **keywords)
