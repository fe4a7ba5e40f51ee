"""LoZO against its moment identities, a dense reference of its momentum, and its own keys."""

from __future__ import annotations

import logging

import pytest
import torch

from hf_zo.directions import Probe, displace, space_of
from hf_zo.estimators.lozo import LoZO

M, N = 4, 5


def linear(gradient: dict[str, torch.Tensor]):
    """An oracle of the loss sum <gradient, theta> at theta = 0, in fp64."""

    def oracle(probes: list[Probe]) -> list[float]:
        losses = []
        for probe in probes:
            total = 0.0
            for name, g in gradient.items():
                zero = torch.zeros_like(g)
                total += float((g * displace(torch.empty_like(g), zero, name, probe.terms)).sum())
            losses.append(total)
        return losses

    return oracle


def samples(estimator: LoZO, gradient: dict[str, torch.Tensor], steps: range) -> torch.Tensor:
    oracle = linear(gradient)
    return torch.stack([estimator.estimate(t, oracle).gradient("w", gradient["w"]) for t in steps])


def drawn_at_once(estimator: LoZO, gradient: dict[str, torch.Tensor], steps: int) -> torch.Tensor:
    """The same numbers as `samples`, of which the first are compared, from U and V alone; steps x m x n."""
    directions = [estimator.direction(t) for t in range(steps)]
    u = torch.stack([d.left("w") for d in directions]).double()
    v = torch.stack([d.right("w") for d in directions]).double()
    z = u @ v.mT
    drawn = (z * gradient["w"]).sum((1, 2), keepdim=True) * z / u.shape[2]
    torch.testing.assert_close(samples(estimator, gradient, range(50)), drawn[:50], rtol=1e-5, atol=1e-5)
    return drawn


@pytest.fixture
def gradient() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"w": torch.randn(M, N, generator=generator, dtype=torch.float64)}


@pytest.mark.parametrize("rank", [1, 2])
def test_unbiased_and_second_moment(rank: int, gradient: dict[str, torch.Tensor]) -> None:
    """E[s U V^T / r] = G within 5 standard errors; E|.|^2 = |G|^2 (mn + 2 + 2 (m + n + 1) / r) within 3 %.

    The fourth moment is large: 40,000 draws give a standard error of about 1 % on the second.
    """
    estimator = LoZO(space_of(gradient), rank=rank, interval=1, eps=1e-3)
    drawn = drawn_at_once(estimator, gradient, 40_000)
    error = drawn.std(0) / len(drawn) ** 0.5
    assert ((drawn.mean(0) - gradient["w"]).abs() < 5 * error).all()
    predicted = M * N + 2 + 2 * (M + N + 1) / rank
    measured = float(drawn.pow(2).sum((1, 2)).mean() / gradient["w"].pow(2).sum())
    assert measured == pytest.approx(predicted, rel=0.03)


def test_conditional_mean_within_an_interval(gradient: dict[str, torch.Tensor]) -> None:
    """E[g | V] = G V V^T / r."""
    estimator = LoZO(space_of(gradient), rank=2, interval=20_000, eps=1e-3)
    drawn = drawn_at_once(estimator, gradient, 20_000)
    v = estimator.direction(0).right("w").double()
    expected = gradient["w"] @ v @ v.T / 2
    assert ((drawn.mean(0) - expected).abs() < 5 * drawn.std(0) / len(drawn) ** 0.5).all()


def test_v_is_held_for_an_interval_and_u_is_new_every_step(gradient: dict[str, torch.Tensor]) -> None:
    estimator = LoZO(space_of(gradient), rank=2, interval=3)
    v = [estimator.direction(t).right("w") for t in range(7)]
    u = [estimator.direction(t).left("w") for t in range(7)]
    assert all(torch.equal(v[t], v[0]) for t in (1, 2))
    assert all(torch.equal(v[t], v[3]) for t in (4, 5))
    assert not torch.equal(v[2], v[3])
    assert not torch.equal(v[5], v[6])
    assert all(not torch.equal(u[t], u[t + 1]) for t in range(6))


def test_steps_within_an_interval_are_an_adapter() -> None:
    """W = W_k + A V^T with A -= lr s U / r, merged where V changes, walks where the weights walk."""
    weight = torch.linspace(-1, 1, M * N, dtype=torch.float64).view(M, N)
    estimator = LoZO(space_of({"w": weight}), rank=2, interval=3, eps=1e-3)
    target = torch.eye(M, N, dtype=torch.float64)

    def oracle(probes: list[Probe]) -> list[float]:
        points = (displace(torch.empty_like(weight), weight, "w", probe.terms) for probe in probes)
        return [float((point - target).pow(2).sum()) for point in points]

    base, adapter = weight.clone(), torch.zeros(M, 2, dtype=torch.float64)
    v = torch.zeros(N, 2, dtype=torch.float64)
    for t in range(8):
        if t % 3 == 0:
            base, adapter = base + adapter @ v.mT, torch.zeros_like(adapter)
        u, v = (factor("w").double() for factor in (estimator.direction(t).left, estimator.direction(t).right))
        estimate = estimator.estimate(t, oracle)
        adapter = adapter - 0.01 * estimate.projected_gradients[0] * u / 2
        weight = weight - 0.01 * estimate.gradient("w", weight)
        torch.testing.assert_close(base + adapter @ v.mT, weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_applied_direction_is_the_probed_one_at_boundaries(momentum: float, gradient: dict[str, torch.Tensor]) -> None:
    """On steps 0, 1, nu - 1, nu, nu + 1 the new part of the estimate has cosine 1 with what was probed."""
    interval = 3
    estimator = LoZO(space_of(gradient), rank=2, interval=interval, momentum=momentum)
    oracle = linear(gradient)
    for t in range(interval + 2):
        estimate = estimator.estimate(t, oracle)
        probed = estimator.direction(t).sample("w").double()
        applied = estimate.gradient("w", gradient["w"])
        if momentum and t > 0:
            kept = estimator.state["left"]["w"]
            if t % interval == 0:
                kept = kept @ (estimator.direction(t - 1).right("w").T @ estimator.direction(t).right("w")) / N
            applied = applied - momentum * (kept @ estimator.direction(t).right("w").T).double() / 2
        cosine = (probed * applied).sum() / probed.norm() / applied.norm() * (1 if estimate.projected_gradients[0] > 0 else -1)
        assert float(cosine) > 1 - 1e-6
        estimator.commit(estimate)


def test_momentum_equals_the_dense_reference(gradient: dict[str, torch.Tensor]) -> None:
    """Inside an interval LoZO-M is the moving average of the plain estimates, the first of them taken whole."""
    both = {**gradient, "b": torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))}
    plain = LoZO(space_of(both), rank=2, interval=50)
    averaging = LoZO(space_of(both), rank=2, interval=50, momentum=0.7)
    oracle = linear(both)
    reference: dict[str, torch.Tensor] = {}
    for t in range(6):
        one, averaged = plain.estimate(t, oracle), averaging.estimate(t, oracle)
        for name, g in both.items():
            fresh = one.gradient(name, g)
            reference[name] = fresh if t == 0 else 0.7 * reference[name] + 0.3 * fresh
            torch.testing.assert_close(averaged.gradient(name, g), reference[name], rtol=1e-5, atol=1e-5)
        averaging.commit(averaged)


@pytest.mark.parametrize(("shape", "rank"), [((5, 2), 2), ((5, 4), 8), ((4, 5), 2)])
def test_momentum_is_projected_on_a_new_v(shape: tuple[int, int], rank: int) -> None:
    """N <- N (V_old^T V_new) / n, also where N has the shape of the matrix."""
    gradient = {"w": torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))}
    estimator, oracle = LoZO(space_of(gradient), seed=3, rank=rank, interval=2, momentum=0.7), linear(gradient)
    average, before = torch.zeros(()), torch.zeros(())
    for t in range(5):
        estimate = estimator.estimate(t, oracle)
        u, v = (factor("w").double() for factor in (estimator.direction(t).left, estimator.direction(t).right))
        fresh = estimate.projected_gradients[0] * u
        if t and t % 2 == 0:
            average = average @ (before.T @ v) / shape[1]
        average, before = 0.7 * average + 0.3 * fresh if t else fresh, v
        torch.testing.assert_close(estimate.gradient("w", gradient["w"]), average @ v.T / v.shape[1], rtol=1e-5, atol=1e-5)
        estimator.commit(estimate)


def test_estimating_does_not_change_the_state(gradient: dict[str, torch.Tensor]) -> None:
    estimator = LoZO(space_of(gradient), momentum=0.5)
    oracle = linear(gradient)
    estimator.commit(estimator.estimate(0, oracle))
    before = estimator.state["left"]["w"].clone()
    first, second = estimator.estimate(1, oracle), estimator.estimate(1, oracle)
    assert torch.equal(estimator.state["left"]["w"], before)
    assert torch.equal(first.gradient("w", gradient["w"]), second.gradient("w", gradient["w"]))


def test_unscaled_estimates_are_r_times_larger_and_say_so(gradient: dict[str, torch.Tensor]) -> None:
    oracle = linear(gradient)
    scaled = LoZO(space_of(gradient), rank=4).estimate(3, oracle)
    unscaled = LoZO(space_of(gradient), rank=4, scale_by_rank=False).estimate(3, oracle)
    torch.testing.assert_close(unscaled.gradient("w", gradient["w"]), 4 * scaled.gradient("w", gradient["w"]))
    assert (scaled.scale, unscaled.scale) == (1.0, 4.0)


@pytest.mark.parametrize(("clip", "expected"), [(None, 4.0), (5.0, 4.0), (1.0, 1.0)])
def test_clip_bounds_the_response(clip: float | None, expected: float, gradient: dict[str, torch.Tensor]) -> None:
    estimate = LoZO(space_of(gradient), eps=0.25, clip=clip).estimate(0, lambda probes: [3.0, 1.0])
    assert estimate.projected_gradients == (expected,)
    assert [w for w, _ in estimate.terms] == [expected]
    assert estimate.loss == 2.0  # the loss is reported as measured


@pytest.mark.parametrize("shape", [(), (6,), (3, 4), (2, 3, 4), (2, 3, 2, 2), (1, 9)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    tensor = {"w": torch.zeros(shape)}
    direction = LoZO(space_of(tensor), rank=2).direction(0)
    drawn = direction.sample("w")
    assert drawn.shape == shape
    if len(shape) > 1:
        assert torch.linalg.matrix_rank(drawn.reshape(shape[0], -1)) <= 2


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_an_empty_matrix_is_stepped_over(momentum: float, shape: tuple[int, int], gradient: dict[str, torch.Tensor]) -> None:
    both = {**gradient, "empty": torch.zeros(shape, dtype=torch.float64)}
    settings: dict = {"interval": 2, "momentum": momentum, "eps": 1e-3}
    estimator, alone = LoZO(space_of(both), **settings), LoZO(space_of(gradient), **settings)
    for t in range(4):  # beyond a new V
        estimate, expected = estimator.estimate(t, linear(both)), alone.estimate(t, linear(gradient))
        assert torch.equal(estimate.gradient("w", gradient["w"]), expected.gradient("w", gradient["w"]))
        assert estimate.gradient("empty", both["empty"]).shape == shape
        estimator.commit(estimate)
        alone.commit(expected)


def test_a_rank_above_a_dimension_is_clipped_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    tensors = {"wide": torch.zeros(8, 8), "narrow": torch.zeros(2, 8)}
    with caplog.at_level(logging.WARNING):
        estimator = LoZO(space_of(tensors), rank=4)
    assert "narrow" in caplog.text
    assert "wide" not in caplog.text
    assert estimator.direction(0).left("narrow").shape == (2, 2)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"rank": 0}, "lozo_rank"),
        ({"interval": 0}, "lozo_interval"),
        ({"momentum": 1.0}, "lozo_momentum"),
        ({"momentum": -0.1}, "lozo_momentum"),
        ({"direction": "rademacher"}, "zo_direction"),
    ],
)
def test_settings_outside_their_domain(settings: dict, field: str) -> None:
    with pytest.raises(ValueError, match=field):
        LoZO({}, **settings)
