"""MeZO against the identities of its analysis (I1 to I4 of the specification), measured through `MeZO.estimate`.

Many seeds at once: with a tensor of shape (rows, d) every row is a direction of its own, and an oracle that returns one loss
per row lets the estimator do its arithmetic on all rows together.
"""

import math

import numpy as np
import pytest
import torch

from hf_zo.directions import Probe, TensorSpec, displace, space_of
from hf_zo.estimators import METHODS, hyperparameters
from hf_zo.estimators.mezo import MeZO

D = 10
RNG = np.random.default_rng(0)
ROOT = RNG.normal(size=(D, D))
HESSIAN = ROOT @ ROOT.T / D
THETA = RNG.normal(size=D)
SLOPE = RNG.normal(size=D)


def quadratic(theta):
    """1/2 theta^T H theta + slope^T theta along the last axis."""
    return 0.5 * ((theta @ HESSIAN) * theta).sum(-1) + theta @ SLOPE


GRADIENT = HESSIAN @ THETA + SLOPE


def rows_estimator(rows, **settings):
    return MeZO({"w": TensorSpec((rows, D), torch.device("cpu"))}, **settings)


def estimate_rows(estimator, loss, theta, step=0):
    """One estimate per row, fp64; ``loss`` maps (rows, d) to (rows,)."""
    drawn = {}

    def z(direction):
        if direction.index not in drawn:
            drawn[direction.index] = direction.sample("w").numpy().astype(np.float64)
        return drawn[direction.index]

    def oracle(probes):
        return [loss(theta + sum(a * z(d) for a, d in probe.terms)) for probe in probes]

    estimate = estimator.estimate(step, oracle)
    return sum(weight[:, None] * z(direction) for weight, direction in estimate.terms), estimate


# ---- moments -------------------------------------------------------------------------------------------------------


def test_unbiased_on_a_quadratic_over_seeds():
    """I1, seed by seed and step by step, with the gradient formed the way the optimizer forms it, in fp64."""
    seeds = 20_000
    params = {"w": torch.from_numpy(THETA)}
    space, total, squares = space_of(params), np.zeros(D), np.zeros(D)

    def oracle(probes):
        return [float(quadratic(THETA + sum(a * d.sample("w").numpy().astype(np.float64) for a, d in p.terms))) for p in probes]

    for seed in range(seeds):
        estimate = MeZO(space, seed=seed // 100).estimate(seed % 100, oracle)
        g = estimate.gradient("w", params["w"])
        assert g.dtype == torch.float64
        total += g.numpy()
        squares += g.numpy() ** 2
    mean = total / seeds
    error = np.sqrt((squares / seeds - mean**2) / seeds)
    assert (np.abs(mean - GRADIENT) < 5 * error).all()
    assert np.linalg.norm(mean - GRADIENT) < 5 * math.sqrt((D + 1) / seeds) * np.linalg.norm(GRADIENT)


@pytest.mark.parametrize(("direction", "excess"), [("gaussian", D + 1), ("rademacher", D - 1)])
@pytest.mark.parametrize("n", [1, 3])
def test_second_moment(direction, excess, n):
    """I2 and I3: E|g|^2 = |gradient|^2 (1 + (d+1)/n); Rademacher entries have (d-1)."""
    estimator = rows_estimator(200_000, num_directions=n, direction=direction)
    g, _ = estimate_rows(estimator, quadratic, THETA)
    square = (GRADIENT**2).sum()
    assert (g**2).sum(-1).mean() / square == pytest.approx(1 + excess / n, rel=0.03)
    error = math.sqrt(excess / n / 200_000)
    assert np.linalg.norm(g.mean(0) - GRADIENT) < 5 * error * math.sqrt(square)


@pytest.mark.parametrize("rank", [1, 3])
def test_factorised_moments(rank):
    """E[s z] = G within 5 standard errors, E|s z|^2 = |G|^2 (mn + 2 + 2 (m + n + 1) / r), unit variance; U and V are fresh.

    The fourth moment is large: the second is known to a standard error of 1 to 3 %, which the draws themselves tell.
    """
    m, n, draws = 4, 5, 20_000
    gradient = torch.randn(m, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    params = {"w": torch.zeros(m, n, dtype=torch.float64), "b": torch.zeros(3, dtype=torch.float64)}
    estimator = MeZO(space_of(params), direction="factorised", direction_rank=rank, eps=1e-3)

    def oracle(probes):
        return [float((gradient * displace(torch.empty(m, n).double(), params["w"], "w", p.terms)).sum()) for p in probes]

    z = torch.stack([estimator.direction_of(t, 0).sample("w").double() for t in range(draws)])
    assert float(z.pow(2).mean()) == pytest.approx(1, abs=0.02)
    assert all(int(torch.linalg.matrix_rank(x.float())) == rank for x in z[:50])
    drawn = (gradient * z).sum((1, 2), keepdim=True) * z  # what the estimator makes of a linear loss
    for t in range(50):
        torch.testing.assert_close(estimator.estimate(t, oracle).gradient("w", params["w"]), drawn[t], rtol=1e-4, atol=1e-4)
    error = drawn.std(0) / draws**0.5
    assert ((drawn.mean(0) - gradient).abs() < 5 * error).all()
    predicted = m * n + 2 + 2 * (m + n + 1) / rank
    squares = drawn.pow(2).sum((1, 2)) / gradient.pow(2).sum()
    error = float(squares.std()) / draws**0.5
    assert error < 0.04 * predicted
    assert abs(float(squares.mean()) - predicted) < 4 * error
    spaces = [torch.linalg.svd(x)[2][0] for x in z[:2]]
    assert abs(float(spaces[0] @ spaces[1])) < 0.999  # V is not held from step to step
    bias = estimator.direction_of(0, 0).sample("b")
    assert torch.equal(bias, estimator.dense_direction(0, 0).sample("b"))


def test_rademacher_norm_is_the_response():
    """|z|^2 = d exactly, so a single estimate has |g|^2 = d s^2: nothing but the response is random in its length."""
    g, estimate = estimate_rows(rows_estimator(1000, direction="rademacher"), lambda x: x @ SLOPE, THETA)
    assert (g**2).sum(-1) == pytest.approx(D * estimate.projected_gradients[0] ** 2, rel=1e-9)


@pytest.mark.parametrize("eps", [0.3, 1.0])
def test_cubic_bias(eps):
    """I4: on a cubic, E[g] - gradient = eps^2/2 times the gradient of the Laplacian, exactly."""
    rows, cubic, mixed = 400_000, RNG.normal(size=D), 0.7

    def loss(x):
        return x @ SLOPE + (x**3) @ cubic + mixed * x[..., 0] ** 2 * x[..., 1]

    theta = 0.1 * THETA
    gradient = SLOPE + 3 * cubic * theta**2
    gradient[0] += mixed * 2 * theta[0] * theta[1]
    gradient[1] += mixed * theta[0] ** 2
    laplacian_gradient = 6 * cubic
    laplacian_gradient[1] += 2 * mixed
    g, _ = estimate_rows(rows_estimator(rows, eps=eps), loss, theta)
    bias, error = g.mean(0) - gradient, g.std(0) / math.sqrt(rows)
    predicted = eps**2 / 2 * laplacian_gradient
    assert (np.abs(bias - predicted) < 5 * error).all()
    assert (np.abs(predicted) > 10 * error).any()  # no bias at all would not pass


def test_directional_derivative_of_a_smooth_loss():
    """s tends to z . gradient as eps shrinks."""
    estimator = rows_estimator(100, eps=1e-4)
    _, estimate = estimate_rows(estimator, lambda x: np.sin(x).sum(-1), THETA)
    z = estimator.dense_direction(0, 0).sample("w").numpy().astype(np.float64)
    assert estimate.projected_gradients[0] == pytest.approx(z @ np.cos(THETA), rel=1e-6, abs=1e-6)


# ---- the contract --------------------------------------------------------------------------------------------------

SPACE = {"w": TensorSpec((4, 3), torch.device("cpu")), "b": TensorSpec((3,), torch.device("cpu"))}


def estimator(**settings):
    return MeZO(SPACE, **settings)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_forwards_counts_the_probes(n):
    asked = []

    def oracle(probes):
        asked.extend(probes)
        return [0.0] * len(probes)

    mezo = estimator(num_directions=n, eps=0.01)
    mezo.estimate(3, oracle)
    assert mezo.forwards == len(asked) == 2 * n
    for i, (plus, minus) in enumerate(zip(asked[::2], asked[1::2], strict=True)):
        ((a, up),), ((b, down),) = plus.terms, minus.terms
        assert (a, b) == (0.01, -0.01)
        assert up is down
        assert (up.seed, up.step, up.index, up.kind) == (0, 3, i, "gaussian")


def test_the_numbers_of_an_estimate():
    losses = [1.0, 0.5, 2.0, 3.0]
    estimate = estimator(num_directions=2, eps=0.25).estimate(7, lambda probes: losses)
    assert estimate.step == 7
    assert estimate.projected_gradients == (1.0, -2.0)
    assert [w for w, _ in estimate.terms] == [0.5, -1.0]
    assert [d.index for _, d in estimate.terms] == [0, 1]
    assert estimate.loss == 1.625
    assert estimate.scale == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_gradient_is_wide_and_follows_the_terms(dtype):
    estimate = estimator(num_directions=2, eps=0.25).estimate(0, lambda probes: [1.0, 0.5, 2.0, 3.0])
    g = estimate.gradient("w", torch.ones(4, 3, dtype=dtype))
    z = [d.sample("w") for _, d in estimate.terms]
    assert g.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(g, (0.5 * z[0].to(g.dtype)) + (-1.0 * z[1].to(g.dtype)))


def test_swapping_the_signs_of_the_probes_negates_the_response():
    """What eps -> -eps would do: the pair changes places, s changes sign, and s z with the mirrored z stays."""

    def oracle(probes):
        return [math.tanh(sum(a * float(d.sample("b").sum()) for a, d in probe.terms) + 0.3) for probe in probes]

    def mirrored(probes):
        return oracle([Probe(tuple((-a, d) for a, d in probe.terms)) for probe in probes])

    mezo = estimator(num_directions=3, eps=0.1)
    as_is, swapped = mezo.estimate(0, oracle), mezo.estimate(0, mirrored)
    assert swapped.projected_gradients == tuple(-s for s in as_is.projected_gradients)
    assert any(as_is.projected_gradients)
    assert swapped.loss == pytest.approx(as_is.loss)


def test_equal_losses_give_a_zero_estimate():
    estimate = estimator().estimate(0, lambda probes: [0.7] * len(probes))
    assert estimate.projected_gradients == (0.0,)
    assert not estimate.gradient("w", torch.ones(4, 3)).any()


@pytest.mark.parametrize(("clip", "expected"), [(None, (4.0, -8.0)), (5.0, (4.0, -5.0)), (1.0, (1.0, -1.0))])
def test_clip_bounds_every_response(clip, expected):
    estimate = estimator(num_directions=2, eps=0.25, clip=clip).estimate(0, lambda probes: [2.0, 0.0, 0.0, 4.0])
    assert estimate.projected_gradients == expected
    assert [w for w, _ in estimate.terms] == [s / 2 for s in expected]
    assert estimate.loss == 1.5  # the loss is reported as measured


def test_the_same_step_gives_the_same_directions():
    def directions(**settings):
        return estimator(**settings).estimate(5, lambda probes: [0.0] * len(probes)).terms

    ((_, a),), ((_, b),), ((_, other),) = directions(seed=1), directions(seed=1), directions(seed=2)
    assert torch.equal(a.sample("w"), b.sample("w"))
    assert not torch.equal(a.sample("w"), other.sample("w"))


def test_estimating_changes_no_state():
    mezo = estimator()
    estimate = mezo.estimate(0, lambda probes: [1.0, 0.0])
    assert mezo.state == {}
    mezo.commit(estimate)
    assert mezo.state == {}


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"eps": 0.0}, "zo_eps"),
        ({"eps": -1e-3}, "zo_eps"),
        ({"eps": math.inf}, "zo_eps"),
        ({"eps": math.nan}, "zo_eps"),
        ({"clip": 0.0}, "zo_clip"),
        ({"clip": -1.0}, "zo_clip"),
        ({"clip": math.nan}, "zo_clip"),
        ({"direction": "cauchy"}, "zo_direction"),
        ({"num_directions": 0}, "zo_num_directions"),
        ({"num_directions": -1}, "zo_num_directions"),
    ],
)
def test_settings_outside_their_domain_name_the_field(settings, field):
    with pytest.raises(ValueError, match=field):
        estimator(**settings)


def test_a_wrong_number_of_losses_is_an_error():
    with pytest.raises(ValueError, match="zip"):
        estimator(num_directions=2).estimate(0, lambda probes: [1.0, 2.0, 3.0])


# ---- the register --------------------------------------------------------------------------------------------------


def test_register_knows_the_settings():
    assert METHODS["mezo"] is MeZO
    found = hyperparameters("mezo")
    common = {"seed": 0, "eps": 1e-3, "clip": None, "direction": "gaussian", "direction_rank": 16}
    assert found == {"num_directions": 1, "per_example": False, **common}


def test_unknown_method_lists_those_that_exist():
    with pytest.raises(ValueError, match=r"zo_method='sgd'.*mezo"):
        hyperparameters("sgd")
