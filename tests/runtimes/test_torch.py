"""TorchRuntime: the loss at each probe is that of weights written by hand, and afterwards nothing has happened.

Models are tiny and random, but of the real classes, so that their own ways of reading weights are met.
"""

from __future__ import annotations

import logging
import random

import numpy as np
import pytest
import torch
from runtimes.models import DTYPES, EPS, EXACT, Small, bits, build, by_hand, equal, hooks_of, probes_of, small
from torch import nn

from hf_zo import noise
from hf_zo.directions import DenseDirection, Direction, Probe, space_of
from hf_zo.runtimes import TorchRuntime
from hf_zo.runtimes.torch import evaluation_mode

# ---- losses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("restore", EXACT)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
def test_losses_are_those_of_written_weights(restore, dtype, kind):
    model, params, measure = small(dtype)
    probes, before = probes_of(params, kind=kind), bits(params)
    expected = by_hand(params, probes, measure)
    runtime = TorchRuntime(params, restore, model)
    for _ in range(2):  # the first call of `transient` audits
        assert runtime.losses(probes, measure) == expected
        assert equal(bits(params), before)
    assert len(set(expected)) > 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_in_place_losses(dtype):
    model, params, measure = small(dtype)
    probes = probes_of(params)
    expected = by_hand(params, probes, measure)
    before = {name: p.detach().clone() for name, p in params.items()}
    assert TorchRuntime(params, "in_place", model).losses(probes, measure) == pytest.approx(expected, rel=1e-6)
    for name, p in params.items():
        assert (p - before[name]).abs().max() < 1e-6  # near, but not promised to be exact


@pytest.mark.parametrize("restore", ["copy", "transient", "in_place"])
def test_losses_are_fp64_and_may_be_asked_for_repeatedly(restore):
    model, params, _ = small(torch.float64)
    runtime, x = TorchRuntime(params, restore, model), torch.ones(1, 6, dtype=torch.float64)
    probe = probes_of(params, eps=1e-9)[0]

    def measure():
        return model(x).square().sum()

    first, second = runtime.losses([probe, Probe()], measure)
    assert isinstance(first, float)
    assert 0 < abs(first - second) < 1e-6
    assert runtime.losses([probe], measure) == pytest.approx([first], rel=1e-12)


class LowRank(Direction):
    def __init__(self, space):
        self.space = space

    def sample(self, name):
        shape = self.space[name].shape
        u = noise.sample(noise.stream_key(0, 0, 0, "u", name), (shape[0], 1))
        v = noise.sample(noise.stream_key(0, 0, 0, "v", name), (1, int(np.prod(shape[1:]))))
        return (u @ v).view(shape)


@pytest.mark.parametrize("restore", EXACT)
def test_any_direction_can_be_measured(restore):
    model, params, measure = small()
    direction = LowRank(space_of(params))
    probes = [Probe(((EPS, direction),)), Probe(((-EPS, direction), (EPS, DenseDirection(space_of(params), 0, 0, 0))))]
    assert TorchRuntime(params, restore, model).losses(probes, measure) == by_hand(params, probes, measure)


@pytest.mark.parametrize("restore", EXACT)
def test_frozen_tensors_stay_where_they_are(restore):
    model, params, measure = small()
    chosen = {name: p for name, p in params.items() if name.startswith(("norm", "scale"))}
    probes = probes_of(chosen)
    assert TorchRuntime(chosen, restore, model).losses(probes, measure) == by_hand(chosen, probes, measure)


# ---- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("restore", EXACT)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=["RuntimeError", "KeyboardInterrupt"]
)
def test_restored_after_an_error_in_the_middle_of_any_forward(restore, dtype, error):
    """The k-th forward fails inside the model, between two of its modules, for every k of a first and a later step."""
    model, params, measure = small(dtype)
    probes, before, hooks = probes_of(params)[:2], bits(params), hooks_of(model)
    expected = by_hand(params, probes, measure)
    for audited in (False, True):
        k, failed = 0, True
        while failed:
            runtime = TorchRuntime(params, restore, model)
            if audited:
                runtime.losses(probes, measure)
            calls, failed = [], False

            def failing(calls=calls, k=k):
                model.fail = error if len(calls) == k else None
                calls.append(1)
                try:
                    return measure()
                finally:
                    model.fail = None

            try:
                runtime.losses(probes, failing)
            except type(error):
                failed = True
            assert equal(bits(params), before)
            assert all(p is params[name] for name, p in model.named_parameters())
            assert hooks_of(model) == hooks
            assert runtime.losses(probes, measure) == expected  # and it still works
            k += 1
        assert k > len(probes)


@pytest.mark.parametrize("restore", ["copy", "transient", "in_place"])
@pytest.mark.parametrize("k", [0, 1, 3, 5])
def test_restored_after_the_loss_itself_fails(restore, k):
    model, params, measure = small()
    before, values, calls = bits(params), {n: p.detach().clone() for n, p in params.items()}, []

    def failing():
        calls.append(1)
        loss = measure()
        if len(calls) > k:
            raise ZeroDivisionError
        return loss

    with pytest.raises(ZeroDivisionError):
        TorchRuntime(params, restore, model).losses(probes_of(params, eps=1.0), failing)
    if restore == "in_place":
        assert all((p - values[n]).abs().max() < 1e-5 for n, p in params.items())
    else:
        assert equal(bits(params), before)


@pytest.mark.parametrize("restore", ["copy", "transient", "in_place"])
def test_restored_when_a_direction_fails(restore):
    class Failing(DenseDirection):
        def sample(self, name):
            if name == "last.weight":
                raise MemoryError
            return super().sample(name)

        def key(self, name):
            if name == "last.weight":
                raise MemoryError
            return super().key(name)

    model, params, measure = small()
    before, values = bits(params), {n: p.detach().clone() for n, p in params.items()}
    probe = Probe(((1.0, Failing(space_of(params), 0, 0, 0)),))
    with pytest.raises(MemoryError):
        TorchRuntime(params, restore, model).losses([Probe(), probe], measure)
    if restore == "in_place":
        assert all((p - values[n]).abs().max() < 1e-5 for n, p in params.items())
    else:
        assert equal(bits(params), before)
    assert all(p is params[name] for name, p in model.named_parameters())
    assert hooks_of(model) == 0


def test_an_error_that_the_model_itself_handles():
    """A child that fails and a parent that goes on without it: the child's weights are back all the same."""

    class Tolerant(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = Small(), nn.Linear(6, 3)
            self.a.fail = ValueError("not today")
            self.clean, self.found = [self.a.scale], []

        def forward(self, x):
            try:
                return self.a(x)
            except ValueError:
                self.found.append(self.a._parameters["scale"] is self.clean[0])
                return self.b(x)

    model, x = Tolerant(), torch.linspace(-1, 1, 12).view(2, 6)
    params, probes = dict(model.named_parameters()), probes_of(dict(model.named_parameters()))
    runtime = TorchRuntime(params, "transient", model)
    expected = by_hand(params, probes, lambda: model(x).square().sum())
    assert runtime.losses(probes, lambda: model(x).square().sum()) == expected
    model.found.clear()
    assert runtime.losses(probes, lambda: model(x).square().sum()) == expected
    assert model.found == [True] * len(probes)


# ---- choices -------------------------------------------------------------------------------------------------------


def test_unknown_restore_mode_lists_those_that_exist():
    with pytest.raises(ValueError, match=r"zo_restore='undo'.*copy, transient, in_place"):
        TorchRuntime({}, "undo")


def test_transient_needs_a_model():
    with pytest.raises(ValueError, match=r"zo_restore='transient'.*'copy'"):
        TorchRuntime({"w": torch.ones(3)}, "transient")


def test_auto():
    model = build("llama")
    params = dict(model.named_parameters())
    total = sum(p.numel() for p in params.values())
    norms = {name: p for name, p in params.items() if "norm" in name}
    assert sum(p.numel() for p in norms.values()) <= total / 20
    assert TorchRuntime(params, "auto", model).restore == "transient"
    assert TorchRuntime(norms, "auto", model).restore == "copy"
    assert TorchRuntime(params, "auto").restore == "copy"


def test_in_place_drifts_in_bf16_and_says_so(caplog):
    """Table 0.4 of the specification: 100 cycles at 1e-3 move bf16 weights of 0.02 by 4 %; the exact modes by nothing."""
    w = (torch.randn(200, 250, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    start, drift = w.clone(), {}
    for restore in ("in_place", "copy"):
        caplog.clear()
        params = {"w": start.clone()}
        with caplog.at_level(logging.WARNING, "hf_zo"):
            runtime = TorchRuntime(params, restore)
        assert ("drifts" in caplog.text) == (restore == "in_place")
        for step in range(100):
            direction = DenseDirection(space_of(params), 0, step, 0)
            runtime.losses([Probe(((1e-3, direction),)), Probe(((-1e-3, direction),))], lambda: torch.zeros(()))
        drift[restore] = float((params["w"].double() - start.double()).square().mean().sqrt())
    assert drift["copy"] == 0
    assert 0 < drift["in_place"] < 1.5 * 7.8e-4
    assert drift["in_place"] > 1e-4


def test_in_place_in_fp32_drifts_within_the_table(caplog):
    params = {"w": torch.randn(200, 250, generator=torch.Generator().manual_seed(0)) * 0.02}
    start = params["w"].clone()
    runtime = TorchRuntime(params, "in_place")
    assert not caplog.records
    for step in range(100):
        direction = DenseDirection(space_of(params), 0, step, 0)
        runtime.losses([Probe(((1e-3, direction),)), Probe(((-1e-3, direction),))], lambda: torch.zeros(()))
    assert 0 < float((params["w"] - start).double().square().mean().sqrt()) < 1.5 * 1.2e-8


# ---- random states -------------------------------------------------------------------------------------------------


def random_states():
    return random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2], torch.get_rng_state().tolist()


@pytest.mark.parametrize("restore", ["copy", "transient", "in_place"])
def test_every_probe_sees_the_same_random_numbers(restore):
    model, params, measure = small()
    drawn = []

    def noisy():
        drawn.append((random.random(), np.random.rand(), float(torch.rand(()))))
        return measure() + drawn[-1][2]

    runtime = TorchRuntime(params, restore, model)
    probes = probes_of(params)
    for _ in range(2):
        before = random_states()
        drawn.clear()
        runtime.losses(probes, noisy)
        assert random_states() == before
        assert len(set(drawn[-len(probes) :])) == 1


@pytest.mark.parametrize("restore", ["copy", "transient", "in_place"])
def test_random_states_are_put_back_after_an_error(restore):
    model, params, _ = small()

    def failing():
        random.random(), np.random.rand(), torch.rand(3)
        raise ZeroDivisionError

    before = random_states()
    with pytest.raises(ZeroDivisionError):
        TorchRuntime(params, restore, model).losses(probes_of(params), failing)
    assert random_states() == before


@pytest.mark.parametrize("restore", EXACT)
def test_a_model_with_dropout_on_gives_comparable_probes(restore):
    """The mask is the same at both probes: without displacement there is no difference."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 50), nn.Dropout(0.5), nn.Linear(50, 1)).train()
    params, x = dict(model.named_parameters()), torch.ones(2, 6)
    losses = TorchRuntime(params, restore, model).losses([Probe(), Probe()], lambda: model(x).sum())
    assert losses[0] == losses[1]


# ---- evaluation mode -----------------------------------------------------------------------------------------------


class Flags(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 100), nn.Dropout(0.5))
        self.frozen = nn.Dropout(0.5)
        self.seen = []
        self.fail = False

    def forward(self, x):
        self.seen.append((self.training, self.inner.training, self.inner[1].training))
        if self.fail:
            raise ZeroDivisionError
        return self.inner(x)


def flagged():
    model = Flags().train()
    model.frozen.eval()  # somebody's choice, to be kept
    return model


def flags(model):
    return {name: module.training for name, module in model.named_modules()}


def test_evaluation_mode_turns_dropout_off():
    model = flagged()
    with evaluation_mode(model):
        out = model(torch.ones(1, 4))
        assert torch.equal(out, model.inner[0](torch.ones(1, 4)))
    assert model.seen == [(False, False, False)]
    assert not torch.equal(model(torch.ones(1, 4)), out)  # it is on again


def test_the_root_counts_as_training_outside_of_its_forward():
    model = flagged()
    with evaluation_mode(model):
        assert model.training
        model(torch.ones(1, 4))
        assert model.training
        model(torch.ones(1, 4))
    assert model.seen == [(False, False, False)] * 2


def test_the_root_counts_as_training_even_after_eval():
    model = flagged().eval()
    with evaluation_mode(model):
        assert model.training
        model(torch.ones(1, 4))
    assert not any(flags(model).values())


@pytest.mark.parametrize("train", [True, False])
def test_flags_are_put_back(train):
    model = flagged().train(train)
    model.frozen.eval()
    before = flags(model)
    with evaluation_mode(model):
        model(torch.ones(1, 4))
    assert flags(model) == before
    assert hooks_of(model) == 0


def test_flags_are_put_back_after_an_error():
    model = flagged()
    before = flags(model)
    model.fail = True
    with pytest.raises(ZeroDivisionError), evaluation_mode(model):
        model(torch.ones(1, 4))
    assert flags(model) == before
    assert hooks_of(model) == 0


def test_the_root_counts_as_training_after_an_error_that_was_handled():
    model = flagged()
    model.fail = True
    with evaluation_mode(model):
        with pytest.raises(ZeroDivisionError):
            model(torch.ones(1, 4))
        assert model.training
        assert not model.inner.training


def test_flags_are_put_back_after_an_interrupt():
    model = flagged()
    before = flags(model)
    model.inner.register_forward_hook(lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt), evaluation_mode(model):
        model(torch.ones(1, 4))
    assert flags(model) == before
    assert hooks_of(model) == 1
