"""estimate_gradient: a gradient from losses alone, and nothing left behind."""

import random

import numpy as np
import pytest
import torch

from hf_zo import EstimatorState, estimate_gradient
from hf_zo.directions import DenseDirection, space_of

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def make_params(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in {"w": (6, 5), "b": (5,)}.items()}


def loss_of(params):
    x = torch.linspace(-1, 1, 18).view(3, 6)

    def loss():
        return torch.tanh(x.double() @ params["w"].double() + params["b"].double()).square().sum()

    return loss


def bits(params):
    return {name: p.detach().clone().view(torch.uint8) for name, p in params.items()}


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_params_are_bitwise_what_they_were(dtype, requires_grad):
    params = {name: p.requires_grad_(requires_grad) for name, p in make_params(dtype).items()}
    before, places = bits(params), {name: p.data_ptr() for name, p in params.items()}
    gradient = estimate_gradient(loss_of(params), params, num_directions=3, eps=1e-2)
    assert equal(bits(params), before)
    assert {name: p.data_ptr() for name, p in params.items()} == places
    for name, p in params.items():
        assert gradient[name].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert gradient[name].shape == p.shape
        assert gradient[name].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("call", [1, 2])
def test_params_are_restored_when_the_loss_raises(dtype, error, call):
    params = make_params(dtype)
    before, loss, calls = bits(params), loss_of(params), []

    def failing():
        calls.append(bits(params))
        if len(calls) == call:
            raise error
        return loss()

    with pytest.raises(error):
        estimate_gradient(failing, params, eps=1.0)
    assert not equal(calls[-1], before)  # it was displaced when it failed
    assert equal(bits(params), before)


@pytest.mark.parametrize("direction", ["gaussian", "rademacher"])
@pytest.mark.parametrize("n", [1, 3])
def test_is_the_sum_of_responses_times_directions(n, direction):
    params, eps = make_params(torch.float64), 1e-2
    loss, clean = loss_of(params), {name: p.clone() for name, p in params.items()}
    found = estimate_gradient(loss, params, seed=5, step=9, eps=eps, num_directions=n, direction=direction)
    expected = {name: torch.zeros_like(p) for name, p in params.items()}
    for i in range(n):
        z = {name: DenseDirection(space_of(params), 5, 9, i, direction).sample(name).double() for name in params}
        at = []
        for radius in (eps, -eps):
            for name, p in params.items():
                p.copy_(clean[name] + radius * z[name])
            at.append(float(loss()))
        for name in params:
            expected[name] += (at[0] - at[1]) / (2 * eps) / n * z[name]
    for name in params:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-12)


def test_approaches_the_gradient():
    params = {name: p.requires_grad_() for name, p in make_params(torch.float64).items()}
    loss_of(params)().backward()
    found = estimate_gradient(loss_of(params), params, num_directions=1000, eps=1e-4)
    for name, p in params.items():
        # one entry of the mean of n deviates by |gradient| / sqrt(n)
        norm = torch.sqrt(sum(q.grad.square().sum() for q in params.values()))
        assert (found[name] - p.grad).abs().max() < 5 * norm * (2 / 1000) ** 0.5


def test_seed_and_step_choose_the_direction():
    params = make_params()
    loss = loss_of(params)
    base = estimate_gradient(loss, params, seed=1, step=2)
    assert equal(estimate_gradient(loss, params, seed=1, step=2), base)
    assert not equal(estimate_gradient(loss, params, seed=2, step=2), base)
    assert not equal(estimate_gradient(loss, params, seed=1, step=3), base)


def test_clip_bounds_the_response():
    params = make_params()
    found = estimate_gradient(loss_of(params), params, clip=1e-3)
    z = DenseDirection(space_of(params), 0, 0, 0).sample("w")
    assert torch.allclose(found["w"].abs(), 1e-3 * z.abs())


def test_loss_may_be_a_number_or_a_tensor():
    params = make_params(torch.float64)
    loss = loss_of(params)
    as_tensor = estimate_gradient(loss, params)
    assert equal(estimate_gradient(lambda: float(loss()), params), as_tensor)
    assert equal(estimate_gradient(lambda: loss().view(1), params), as_tensor)


def test_losses_are_subtracted_in_fp64():
    """A difference of 1e-10 next to 1 survives."""
    p = {"w": torch.zeros(1, dtype=torch.float64)}
    found = estimate_gradient(lambda: 1.0 + 1e-9 * float(p["w"]), p, eps=0.1)
    z = DenseDirection(space_of(p), 0, 0, 0).sample("w").double()
    assert float(found["w"] / (z * z)) == pytest.approx(1e-9, rel=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("call", [1, 2])
def test_a_non_finite_loss_raises_and_restores(bad, call):
    params, calls = make_params(), []
    before, loss = bits(params), loss_of(params)

    def broken():
        calls.append(1)
        return bad if len(calls) == call else loss()

    with pytest.raises(FloatingPointError, match="restored"):
        estimate_gradient(broken, params)
    assert equal(bits(params), before)


def test_unknown_method_lists_those_that_exist():
    params = make_params()
    with pytest.raises(ValueError, match=r"'adam'.*mezo"):
        estimate_gradient(loss_of(params), params, method="adam")


def test_unknown_hyperparameter_is_named():
    params = make_params()
    with pytest.raises(TypeError, match=r"'mezo' has no hyperparameter beta, rank"):
        estimate_gradient(loss_of(params), params, rank=2, beta=1)
    with pytest.raises(TypeError, match=r"per_example here; it has clip, direction, .*num_directions") as refused:
        estimate_gradient(loss_of(params), params, per_example=True)
    assert str(refused.value).count("per_example") == 1


@pytest.mark.parametrize(
    ("settings", "field"), [({"eps": 0.0}, "zo_eps"), ({"num_directions": 0}, "zo_num_directions"), ({"clip": -1.0}, "zo_clip")]
)
def test_values_outside_their_domain_are_named(settings, field):
    params = make_params()
    before = bits(params)
    with pytest.raises(ValueError, match=field):
        estimate_gradient(loss_of(params), params, **settings)
    assert equal(bits(params), before)


def test_a_tensor_under_two_names_is_refused():
    """One tensor is one direction: as two, its gradient would be the noise of the last one."""
    params = make_params()
    with pytest.raises(ValueError, match="again is the tensor that is called w too"):
        estimate_gradient(lambda: 0.0, {**params, "again": params["w"]})


def test_global_random_states_stay_and_both_probes_see_the_same_numbers():
    params, seen = make_params(), []
    loss = loss_of(params)

    def noisy():
        seen.append((random.random(), np.random.rand(), float(torch.rand(()))))
        return loss() + seen[-1][2]

    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    estimate_gradient(noisy, params, num_directions=2)
    assert len(seen) == 4
    assert len(set(seen)) == 1
    assert random.getstate() == before[0]
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), before[1], strict=True))
    assert torch.equal(torch.get_rng_state(), before[2])


def test_no_graph_is_built():
    params = {name: p.requires_grad_() for name, p in make_params().items()}
    enabled = []

    def loss():
        enabled.append(torch.is_grad_enabled())
        return loss_of(params)()

    gradient = estimate_gradient(loss, params)
    assert enabled == [False, False]
    assert torch.is_grad_enabled()
    assert not any(g.requires_grad for g in gradient.values())


def test_state_is_handed_through():
    params = make_params()
    state = EstimatorState()
    estimate_gradient(loss_of(params), params, state=state)
    assert state.value == {}  # MeZO has none


def test_state_of_a_stateful_method(monkeypatch):
    from hf_zo.estimators import METHODS, Estimate
    from hf_zo.estimators.mezo import MeZO

    class Counting(MeZO):
        def estimate(self, step, oracle):
            found = super().estimate(step, oracle)
            count = {"steps": self.state.get("steps", 0) + 1}
            return Estimate(found.step, found.terms, found.loss, found.projected_gradients, state=count)

    monkeypatch.setitem(METHODS, "counting", Counting)
    params, state = make_params(), EstimatorState()
    for step in range(3):
        estimate_gradient(loss_of(params), params, method="counting", step=step, state=state)
    assert state.value == {"steps": 3}
