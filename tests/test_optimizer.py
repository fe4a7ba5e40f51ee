"""ZOOptimizer: applies what was staged, once, with the group's learning rate and decay, and forgets nothing on a save."""

import io

import pytest
import torch

from hf_zo import noise
from hf_zo.directions import DenseDirection, space_of
from hf_zo.estimators import Estimate
from hf_zo.estimators.mezo import MeZO
from hf_zo.optimizer import ZOOptimizer

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Counting(MeZO):
    """A method with state: how many estimates were applied, and the last response."""

    def estimate(self, step, oracle):
        found = super().estimate(step, oracle)
        state = {"applied": self.state.get("applied", 0) + 1, "ema": torch.tensor([found.projected_gradients[0]])}
        return Estimate(found.step, found.terms, found.loss, found.projected_gradients, found.scale, state)


def make_params(dtype=torch.float32, scale=0.02):
    generator = torch.Generator().manual_seed(0)
    shapes = {"layer.weight": (40, 30), "layer.bias": (30,), "head.weight": (7, 30)}
    return {
        name: torch.nn.Parameter((torch.randn(shape, generator=generator) * scale).to(dtype)) for name, shape in shapes.items()
    }


def make(params, lr=0.1, weight_decay=0.0, inner=None, estimator=None, **settings):
    decayed = [p for name, p in params.items() if name.endswith("weight")]
    others = [p for name, p in params.items() if not name.endswith("weight")]
    groups = [
        {"params": decayed, "lr": lr, "weight_decay": weight_decay},
        {"params": others, "lr": lr, "weight_decay": 0.0},
    ]
    estimator = estimator or MeZO(space_of(params), seed=3, num_directions=2, **settings)
    names = {p: name for name, p in params.items()}
    return ZOOptimizer(groups, names, estimator, None if inner is None else inner(groups))


def estimate(optimizer, step, losses=(0.9, 0.4, 0.1, 0.5)):
    return optimizer.estimator.estimate(step, lambda probes: list(losses)[: len(probes)])


def step(optimizer, number, losses=(0.9, 0.4, 0.1, 0.5)):
    found = estimate(optimizer, number, losses)
    optimizer.stage(found, forward_passes=4)
    optimizer.step()
    return found


def values(params):
    return {name: p.detach().clone() for name, p in params.items()}


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in b)


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


ADAMW = {"lr": 1e-3, "betas": (0.8, 0.95)}


def adamw(groups):
    return torch.optim.AdamW([dict(group) for group in groups], **ADAMW)


# ---- streamed SGD --------------------------------------------------------------------------------------------------


def test_streamed_step_is_the_exact_formula():
    """(1 - lr wd) p + sum_i (-lr w_i) z_i, one fp32 operation after the other."""
    params = make_params()
    before, lr, wd = values(params), 0.1, 0.3
    found = step(make(params, lr, wd), 0)
    for name, p in params.items():
        decay = 1.0 - lr * (wd if name.endswith("weight") else 0.0)
        expected = before[name] * decay
        for weight, direction in found.terms:
            expected = expected + direction.sample(name) * (-lr * weight)
        assert torch.equal(p, expected)


def test_streamed_step_is_sgd_with_decoupled_decay():
    """p - lr (g + wd p), the formula of methods.md, in fp64 arithmetic within fp32 rounding."""
    params = make_params()
    before, lr, wd = values(params), 0.1, 0.3
    found = step(make(params, lr, wd), 0)
    for name, p in params.items():
        gradient = sum(w * d.sample(name).double() for w, d in found.terms)
        decay = wd if name.endswith("weight") else 0.0
        expected = before[name].double() - lr * (gradient + decay * before[name].double())
        largest = (before[name].double().abs() + lr * gradient.abs()).max()
        assert (p.double() - expected).abs().max() < 4 * 2.0**-24 * largest
        assert (p - before[name]).abs().max() > 1e-3


def test_decay_acts_on_its_own_group_only():
    params = make_params()
    before = values(params)
    optimizer = make(params, lr=0.5, weight_decay=0.5)
    step(optimizer, 0, losses=(1.0, 1.0, 1.0, 1.0))  # the estimate is zero: what moves is decay
    for name, p in params.items():
        assert torch.equal(p, before[name] * (0.75 if name.endswith("weight") else 1.0))


@pytest.mark.parametrize("inner", [None, adamw])
def test_without_a_direction_there_is_no_decay(inner):
    params = make_params()
    optimizer = make(params, lr=0.5, weight_decay=0.5, inner=inner)
    step(optimizer, 0)  # AdamW has a momentum now
    before = values(params)
    optimizer.stage(Estimate(step=1, terms=(), loss=1.0, projected_gradients=(0.0,), state={"drawn": 1}))
    optimizer.step()
    assert equal(before, params)
    assert optimizer.estimator.state == {"drawn": 1}


def test_learning_rate_is_read_from_the_group_at_each_step():
    """A scheduler writes there."""
    params, moved = make_params(), {}
    optimizer = make(params)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: [1.0, 0.5][min(t, 1)])
    for t in range(2):
        before = values(params)
        found = step(optimizer, t)
        scheduler.step()
        z = found.gradient("head.weight", params["head.weight"])
        moved[t] = float(((before["head.weight"] - params["head.weight"].detach()) * z).sum() / (z * z).sum())
    assert moved[0] == pytest.approx(0.1, rel=1e-5)
    assert moved[1] == pytest.approx(0.05, rel=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_learning_rate_changes_no_bit(dtype):
    params = make_params(dtype)
    before = values(params)
    optimizer = make(params, lr=0.0, weight_decay=0.1)
    for t in range(5):
        step(optimizer, t)
    assert equal(params, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inner", [None, adamw], ids=["sgd", "adamw"])
def test_storage_and_dtype_stay(dtype, inner):
    params = make_params(dtype)
    before, places = values(params), {name: p.data_ptr() for name, p in params.items()}
    optimizer = make(params, inner=inner)
    for t in range(3):
        step(optimizer, t)
    for name, p in params.items():
        assert p.data_ptr() == places[name]
        assert p.dtype == dtype
        assert p.requires_grad
        assert p.grad is None
        assert not torch.equal(p, before[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_keyed_by_step_and_name(dtype):
    """The same losses give the same bits, whatever the global generators say."""
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        params = make_params(dtype)
        optimizer = make(params, lr=1e-4)
        for t in range(3):
            step(optimizer, t)
        results.append(values(params))
    assert equal(results[0], results[1])

    params = make_params(dtype)
    theta = values(params)
    optimizer = make(params, lr=1e-4)
    found = step(optimizer, 5)
    for name, p in params.items():
        value = theta[name].float()
        for weight, direction in found.terms:
            value = value + direction.sample(name) * (-1e-4 * weight)
        key = noise.stream_key(3, 5, 0, "rounding", name)
        assert torch.equal(p, noise.round_stochastically(value, key, torch.empty_like(theta[name])))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inner", [None, torch.optim.SGD], ids=["sgd", "inner"])
def test_updates_far_below_one_ulp_arrive(dtype, inner):
    """methods.md 0.4: 200 equal steps of 1e-6 on bf16 weights of 0.02 move the intended distance, 1 +- 0.02.

    Rounding to nearest moves a fiftieth of it in bf16.
    """
    steps, lr = 200, 1e-6
    w = torch.nn.Parameter((torch.randn(150, 200, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype))
    start, params = w.detach().clone(), {"w": w}
    estimator = MeZO(space_of(params), seed=1)
    groups = [{"params": [w], "lr": lr, "weight_decay": 0.0}]
    optimizer = ZOOptimizer(groups, {w: "w"}, estimator, inner and inner(groups, lr=lr))
    direction = DenseDirection(space_of(params), 1, 0, 0)
    for t in range(steps):
        optimizer.stage(Estimate(t, [(1.0, direction)], 0.0, (1.0,)))
        optimizer.step()
    z = direction.sample("w").double()
    moved = -((w.detach().double() - start.double()) * z).sum() / (z * z).sum()
    assert float(moved) / (steps * lr) == pytest.approx(1.0, abs=0.02)


# ---- inner optimizers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inner_adamw_is_torch_adamw(dtype, weight_decay):
    params, twins = make_params(dtype), make_params(dtype)
    optimizer = make(params, 1e-3, weight_decay, adamw)
    groups = [
        {"params": [p for name, p in twins.items() if name.endswith("weight")], "weight_decay": weight_decay, "lr": 1e-3},
        {"params": [p for name, p in twins.items() if not name.endswith("weight")], "weight_decay": 0.0, "lr": 1e-3},
    ]
    reference = torch.optim.AdamW(groups, **ADAMW)
    for t in range(5):
        found = step(optimizer, t, losses=(0.9 + 0.1 * t, 0.4, 0.1, 0.5))
        for name, twin in twins.items():
            twin.grad = sum(w * d.sample(name).to(dtype) for w, d in found.terms)
        reference.step()
    assert equal(params, twins)


def test_inner_optimizer_follows_the_schedule():
    params, twins = make_params(), make_params()
    optimizer = make(params, inner=lambda groups: torch.optim.SGD([dict(g) for g in groups], lr=0.1))
    reference = torch.optim.SGD(twins.values(), lr=0.1)
    for t, lr in enumerate((0.1, 0.03, 0.0)):
        for group in optimizer.param_groups + reference.param_groups:
            group["lr"] = lr
        found = step(optimizer, t)
        for name, twin in twins.items():
            twin.grad = found.gradient(name, twin)
        reference.step()
    assert equal(params, twins)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_inner_optimizer_of_narrow_weights_works_in_fp32(dtype):
    """Weights of 16 bits are widened, updated with fp32 gradients and moments, and rounded with the step's own bits."""
    params, lr = make_params(dtype), 1e-5
    before = values(params)
    optimizer = make(params, lr, inner=adamw)
    found = step(optimizer, 4)
    for name, p in params.items():
        twin = torch.nn.Parameter(before[name].float())
        twin.grad = found.gradient(name, twin)
        torch.optim.AdamW([twin], **{**ADAMW, "lr": lr}, weight_decay=0.0).step()
        key = noise.stream_key(3, 4, 0, "rounding", name)
        assert torch.equal(p, noise.round_stochastically(twin.detach(), key, torch.empty_like(before[name])))
    assert all(s["exp_avg"].dtype == torch.float32 for s in optimizer.inner.state.values())


def test_groups_of_the_inner_optimizer_are_taken_over():
    params = make_params(torch.bfloat16)
    optimizer = make(params, 0.1, 0.3, adamw)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert [p for group in optimizer.param_groups for p in group["params"]] == [
        params["layer.weight"],
        params["head.weight"],
        params["layer.bias"],
    ]


# ---- staging -------------------------------------------------------------------------------------------------------


def test_step_without_an_estimate_is_an_error():
    params = make_params()
    before, optimizer = values(params), make(params)
    with pytest.raises(RuntimeError, match="staged"):
        optimizer.step()
    step(optimizer, 0)
    after = values(params)
    with pytest.raises(RuntimeError, match="staged"):
        optimizer.step()  # an estimate is applied once
    assert equal(params, after)
    assert not equal(params, before)


def test_closures_are_refused():
    optimizer = make(make_params())
    optimizer.stage(estimate(optimizer, 0))
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(lambda: 0.0)


@pytest.mark.parametrize("inner", [None, adamw], ids=["sgd", "adamw"])
def test_a_skipped_step_is_counted_and_does_nothing(inner):
    params = make_params()
    optimizer = make(params, 0.1, 0.3, inner, Counting(space_of(params)))
    step(optimizer, 0)
    before, state = values(params), dict(optimizer.estimator.state)
    optimizer.stage(None, forward_passes=3)
    optimizer.step()
    assert equal(params, before)
    assert optimizer.skipped_steps == 1
    assert optimizer.forward_passes == 4 + 3
    assert optimizer.estimator.state == state
    if inner is not None:
        assert {int(s["step"]) for s in optimizer.inner.state.values()} == {1}
    with pytest.raises(RuntimeError, match="staged"):
        optimizer.step()


def test_method_state_moves_with_the_weights():
    params = make_params()
    optimizer = make(params, estimator=Counting(space_of(params)))
    found = estimate(optimizer, 0)
    assert optimizer.estimator.state == {}
    optimizer.stage(found)
    assert optimizer.estimator.state == {}
    optimizer.step()
    assert optimizer.estimator.state == found.state
    assert optimizer.estimator.state["applied"] == 1


def test_staging_leaves_the_weights():
    params = make_params()
    before, optimizer = values(params), make(params)
    optimizer.stage(estimate(optimizer, 0))
    assert equal(params, before)


def test_reset_forgets_all_since_construction():
    params = make_params()
    optimizer = make(params, inner=adamw, estimator=Counting(space_of(params)))
    step(optimizer, 0)
    optimizer.stage(None, forward_passes=3)
    optimizer.step()
    optimizer.stage(estimate(optimizer, 1))
    optimizer.reset()
    assert not optimizer.inner.state
    assert (optimizer.skipped_steps, optimizer.forward_passes, optimizer.estimator.state) == (0, 0, {})
    with pytest.raises(RuntimeError, match="staged"):
        optimizer.step()


# ---- saving and loading --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inner", [None, adamw], ids=["sgd", "adamw"])
def test_state_survives_a_file(dtype, inner):
    """Three steps, saved and loaded into a new optimizer, three more: bitwise the uninterrupted six."""

    def build():
        params = make_params(dtype)
        return params, make(params, 1e-2, 0.1, inner, Counting(space_of(params)))

    whole, optimizer = build()
    for t in range(6):
        step(optimizer, t, losses=(0.9, 0.4 + 0.05 * t))

    first, optimizer_1 = build()
    for t in range(3):
        step(optimizer_1, t, losses=(0.9, 0.4 + 0.05 * t))
    optimizer_1.stage(None)
    optimizer_1.step()
    optimizer_1.param_groups[0]["lr"] = 1e-2
    saved = through_a_file(optimizer_1.state_dict())

    second, optimizer_2 = build()
    with torch.no_grad():
        for name, p in second.items():
            p.copy_(first[name])
    optimizer_2.param_groups[0]["lr"] = 123.0
    optimizer_2.load_state_dict(saved)
    assert optimizer_2.skipped_steps == 1
    assert optimizer_2.forward_passes == 12
    assert optimizer_2.estimator.state["applied"] == 3
    assert optimizer_2.param_groups[0]["lr"] == 1e-2
    for t in range(3, 6):
        step(optimizer_2, t, losses=(0.9, 0.4 + 0.05 * t))
    assert equal(second, whole)
    assert optimizer_2.estimator.state == optimizer.estimator.state


def test_saving_while_staged_does_not_count_the_estimate():
    params = make_params()
    optimizer = make(params, estimator=Counting(space_of(params)))
    step(optimizer, 0)
    optimizer.stage(estimate(optimizer, 1))
    saved = through_a_file(optimizer.state_dict())
    assert saved["estimator"]["applied"] == 1
    optimizer.step()  # saving disturbs nothing
    assert optimizer.estimator.state["applied"] == 2


def test_loading_drops_what_was_staged():
    params = make_params()
    optimizer = make(params)
    saved = through_a_file(optimizer.state_dict())
    optimizer.stage(estimate(optimizer, 0))
    optimizer.load_state_dict(saved)
    with pytest.raises(RuntimeError, match="staged"):
        optimizer.step()


def test_loading_does_not_tie_the_method_to_the_loaded_dictionary():
    params = make_params()
    optimizer = make(params, estimator=Counting(space_of(params)))
    step(optimizer, 0)
    saved = through_a_file(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    step(optimizer, 1)
    assert saved["estimator"]["applied"] == 1


def test_a_first_order_checkpoint_is_refused_with_advice():
    params = make_params()
    first_order = torch.optim.AdamW(params.values()).state_dict()
    with pytest.raises(ValueError, match=r"first-order run.*new run"):
        make(params).load_state_dict(first_order)


@pytest.mark.parametrize(("saved", "loaded"), [(None, adamw), (adamw, None)], ids=["sgd to adamw", "adamw to sgd"])
def test_another_optim_is_refused_with_advice(saved, loaded):
    params = make_params()
    with pytest.raises(ValueError, match=r"optim.*resume with the one"):
        make(params, inner=loaded).load_state_dict(make(params, inner=saved).state_dict())


def test_other_groups_are_refused():
    params = make_params()
    state = make(params).state_dict()
    state["param_groups"] = state["param_groups"][:1]
    with pytest.raises(ValueError, match="group"):
        make(params).load_state_dict(state)


def test_it_is_a_torch_optimizer():
    optimizer = make(make_params(), lr=0.25)
    assert isinstance(optimizer, torch.optim.Optimizer)
    torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.5)
    assert optimizer.param_groups[0]["lr"] == 0.125
    optimizer.zero_grad()
