"""Weights that are displaced without being written to: in models of many kinds, and where they are read by others."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from runtimes.models import (
    ADAPTERS,
    CONFIGS,
    EPS,
    adapted,
    bits,
    build,
    by_hand,
    equal,
    hooks_of,
    loss_of,
    probes_of,
    small,
    trainable,
)
from torch import nn
from torch.nn import functional

from hf_zo.directions import DenseDirection, Probe, displace, space_of
from hf_zo.runtimes import TorchRuntime


def check_transient(model, measure):
    params = trainable(model)
    probes, before = probes_of(params), bits(params)
    expected = by_hand(params, probes, measure)
    runtime = TorchRuntime(params, "transient", model)
    for _ in range(2):
        assert runtime.losses(probes, measure) == expected
        assert equal(bits(params), before)
    assert max(expected) - min(expected) > 1e-5  # the probes differ at all
    assert hooks_of(model) == 0
    assert runtime._transient.copied == set()
    return runtime._transient


@pytest.mark.parametrize("name", CONFIGS)
def test_models(name):
    model = build(name)
    whole = check_transient(model, loss_of(model)).whole
    # only Mamba reads weights behind their owner's back: its block calls the convolution's kernel itself
    assert bool(whole) == (name == "mamba")
    if name == "mamba":
        assert any("conv1d.weight" in tensor for tensor in whole)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba", "t5"])
def test_models_in_bf16(name):
    model = build(name, torch.bfloat16)
    check_transient(model, loss_of(model))


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters(name):
    model = adapted(ADAPTERS[name]())
    params = trainable(model)
    assert len(params) < len(dict(model.named_parameters()))
    whole = check_transient(model, loss_of(model)).whole
    if name == "ia3":  # its vectors live in a ParameterDict that never runs
        assert whole == set(params)
        assert all("ia3_l" in tensor for tensor in whole)


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_by_copy(name):
    model = adapted(ADAPTERS[name]())
    params, measure = trainable(model), loss_of(model)
    probes, before = probes_of(params), bits(params)
    assert TorchRuntime(params, "copy", model).losses(probes, measure) == by_hand(params, probes, measure)
    assert equal(bits(params), before)


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "t5", "bert"])
@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_have_one_noise(name, tied):
    """Both ends of the model see the same displaced matrix, and see it displaced."""
    model = build(name, tie_word_embeddings=tied)
    params = trainable(model)
    inputs = model.encoder if name == "t5" else model
    embedding, head = inputs.get_input_embeddings(), model.get_output_embeddings()
    assert (embedding.weight is head.weight) == tied
    seen = {}
    embedding.register_forward_hook(lambda m, args, out: seen.__setitem__("in", m.weight.clone()))
    head.register_forward_hook(lambda m, args, out: seen.__setitem__("out", m.weight.clone()))
    direction = DenseDirection(space_of(params), 11, 0, 0)
    by_id = {id(p): n for n, p in params.items()}
    expected = {}
    for key, module in (("in", embedding), ("out", head)):
        theta = module.weight.detach()
        expected[key] = displace(torch.empty_like(theta), theta, by_id[id(module.weight)], [(EPS, direction)])
    TorchRuntime(params, "transient", model).losses([Probe(((EPS, direction),))], loss_of(model))
    assert torch.equal(seen["in"], expected["in"])
    assert torch.equal(seen["out"], expected["out"])
    assert torch.equal(seen["in"], seen["out"]) == tied


def test_an_embedding_is_displaced_where_it_is_read(monkeypatch):
    """A lookup of a few rows displaces these rows; a lookup of many, or any other use, the whole matrix."""
    drawn = []

    def counting(out, theta, name, terms, **kwargs):
        drawn.append(len(theta))
        return displace(out, theta, name, terms, **kwargs)

    embedding = nn.Embedding(100, 8)
    params = {"weight": embedding.weight}
    probe = Probe(((EPS, DenseDirection(space_of(params), 1, 0, 0)),))
    theta = embedding.weight.detach()
    whole = displace(torch.empty_like(theta), theta, "weight", probe.terms)
    few, many = torch.tensor([[3, 7, 3]]), torch.arange(100)[None]
    scaled = embedding.weight.detach() * 0 + 2

    class Uses(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) + 0 * (self.weight * scaled).sum()

    other = Uses(100, 8, _weight=embedding.weight.detach().clone())
    for module, ids, expected in ((embedding, few, [3]), (embedding, many, [100]), (other, few, [3, 100])):
        seen = []

        def measure(module=module, ids=ids, seen=seen):
            seen.append(module(ids).detach().clone())
            return seen[-1].sum()

        runtime = TorchRuntime({"weight": module.weight}, "transient", module)
        runtime._transient.audited = True
        with monkeypatch.context() as patch:
            patch.setattr("hf_zo.runtimes.transient.displace", counting)
            drawn.clear()
            runtime.losses([probe], measure)
        assert drawn == expected
        torch.testing.assert_close(seen[0], whole[ids], rtol=0, atol=1e-6)
        assert torch.equal(seen[0], whole[ids]) or module is other


def test_a_module_that_returns_its_weight_keeps_it():
    """Scratch memory is used again by the next module, but not while somebody still reads it."""

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 6))

        def forward(self):
            return {"rows": self.weight[1:]}

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.first, self.second = Table(), nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self):
            rows = self.table()["rows"]
            return (self.second(self.first(torch.ones(6))) * rows).sum()

    torch.manual_seed(0)
    model = Model()
    params = dict(model.named_parameters())
    runtime = TorchRuntime(params, "transient", model)
    assert runtime.losses(probes_of(params), model) == by_hand(params, probes_of(params), model)
    assert not runtime._transient.copied


def test_a_module_that_runs_twice_and_one_inside_itself():
    class Recursive(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.weight = nn.Parameter(torch.randn(5, 5))
            self.shared = nn.Linear(5, 5)

        def forward(self, x, depth=2):
            x = self.shared(self.shared(x)) @ self.weight
            if depth:
                x = self(torch.tanh(x), depth - 1)
            return x @ self.weight

    model, x = Recursive(), torch.ones(2, 5)
    check_transient(model, lambda: torch.tanh(model(x)).sum())


# ---- what `transient` leaves alone ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_transient_never_writes_to_the_weights(name):
    model = build(name)
    params, plain = trainable(model), loss_of(model)
    runtime = TorchRuntime(params, "transient", model)
    runtime.losses(probes_of(params), plain)  # the audit of the first step does write
    before, places = bits(params), {n: p.data_ptr() for n, p in params.items()}
    versions = {n: p._version for n, p in params.items()}

    def measure():
        assert equal(bits(params), before)
        loss = plain()
        assert equal(bits(params), before)
        return loss

    middle = next(m for m in model.modules() if isinstance(m, nn.Linear))
    inside = []
    middle.register_forward_hook(lambda *args: inside.append(equal(bits(params), before)))
    runtime.losses(probes_of(params), measure)
    assert inside
    assert all(inside)
    assert {n: p._version for n, p in params.items()} == versions
    assert {n: p.data_ptr() for n, p in params.items()} == places


@pytest.mark.parametrize("restore", ["copy", "transient", "in_place"])
def test_parameters_are_the_same_objects_afterwards(restore):
    model, params, measure = small()
    places = {name: p.data_ptr() for name, p in params.items()}
    TorchRuntime(params, restore, model).losses(probes_of(params), measure)
    for name, p in model.named_parameters():
        assert p is params[name]
        assert p.data_ptr() == places[name]
        assert p.requires_grad


def test_hooks_are_gone_and_those_of_the_user_stay():
    model, params, measure = small()
    calls = []
    model.first.register_forward_hook(lambda m, args, out: calls.append(m.weight))
    before = hooks_of(model)
    runtime = TorchRuntime(params, "transient", model)
    runtime.losses(probes_of(params), measure)
    assert hooks_of(model) == before == 1
    calls.clear()
    runtime.losses(probes_of(params)[:1], measure)
    assert calls[0] is not params["first.weight"]  # the user's hooks see the displaced weights
    measure()
    assert calls[1] is params["first.weight"]


# ---- the audit -----------------------------------------------------------------------------------------------------


class Cached(nn.Module):
    """Reads the first layer's weight through storage that it captured when it was built."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.third = nn.Linear(6, 2)
        self.captured = [self.first.weight.data]

    def forward(self, x):
        x = torch.tanh(self.first(x))
        return self.third(torch.tanh(self.second(x) + functional.linear(x, self.captured[0])))


class Foreign(nn.Module):
    """Keeps the Parameter of another module in a plain list and reads it while that module does not run."""

    def __init__(self, owner):
        super().__init__()
        self.own = nn.Linear(6, 6)
        self.parameters_of_others = [owner.weight]

    def forward(self, x):
        return self.own(x) + functional.linear(x, self.parameters_of_others[0])


def test_a_weight_that_hooks_cannot_reach_is_copied_with_a_warning(caplog):
    model, x = Cached(), torch.linspace(-1, 1, 12).view(2, 6)
    params = dict(model.named_parameters())
    probes, before = probes_of(params), bits(params)
    expected = by_hand(params, probes, lambda: model(x).sum())
    runtime = TorchRuntime(params, "transient", model)
    with caplog.at_level(logging.WARNING, "hf_zo"):
        for _ in range(2):
            assert runtime.losses(probes, lambda: model(x).sum()) == expected
            assert equal(bits(params), before)
    assert runtime._transient.copied == {"first.weight"}
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "first.weight" in warning
    assert "copy" in warning
    assert hooks_of(model) == 0


def test_a_parameter_held_by_another_module_is_copied_with_a_warning(caplog):
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    model.append(Foreign(model[0]))
    params, x = dict(model.named_parameters()), torch.linspace(-1, 1, 12).view(2, 6)
    probes = probes_of(params)
    expected = by_hand(params, probes, lambda: model(x).square().sum())
    runtime = TorchRuntime(params, "transient", model)
    with caplog.at_level(logging.WARNING, "hf_zo"):
        assert runtime.losses(probes, lambda: model(x).square().sum()) == expected
    assert runtime._transient.copied == {"0.weight"}
    assert "0.weight" in caplog.text


@pytest.mark.parametrize("called", [False, True])
def test_a_weight_read_by_the_parent_is_displaced_for_the_whole_forward(called, caplog):
    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.child = nn.Linear(6, 6)
            self.other = nn.Linear(6, 2)

        def forward(self, x):
            outside = self.other(functional.linear(x, self.child.weight))
            return outside + self.other(self.child(x)) if called else outside

    model, x = Parent(), torch.linspace(-1, 1, 12).view(2, 6)
    with caplog.at_level(logging.INFO, "hf_zo"):
        transient = check_transient(model, lambda: model(x).square().sum())
    assert "child.weight" in transient.whole
    assert not any(name.startswith("other") for name in transient.whole)
    assert "child.weight" in caplog.text


def test_tensors_of_a_module_that_never_runs_are_displaced_for_the_whole_forward():
    """Whoever may read them, whichever way."""
    model, _, measure = small()
    model.idle = nn.Linear(6, 8)
    params = dict(model.named_parameters())
    runtime = TorchRuntime(params, "transient", model)
    runtime.losses(probes_of(params), measure)
    assert runtime._transient.whole == {"idle.weight", "idle.bias"}


def test_reading_shape_or_dtype_from_outside_is_no_read():
    class Curious(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.child = nn.Linear(6, 6)

        def forward(self, x):
            w = self.child.weight
            return self.child(x.to(w.dtype).to(w.device)[:, : w.shape[1]]) * w.size(0) * w.dim()

    model, x = Curious(), torch.linspace(-1, 1, 12).view(2, 6)
    assert check_transient(model, lambda: model(x).square().sum()).whole == set()


def test_forwards_of_the_audit_see_the_same_random_numbers():
    """What differs between them is the weights alone, so noise neither hides a tensor nor accuses one."""
    model, x, drawn = Cached(), torch.linspace(-1, 1, 12).view(2, 6), []
    params = dict(model.named_parameters())

    def noisy():
        drawn.append(float(torch.randn(())))
        return model(x).sum() + 10 * drawn[-1]

    runtime, probes = TorchRuntime(params, "transient", model), probes_of(params)
    runtime.losses(probes, noisy)
    assert runtime._transient.copied == {"first.weight"}
    assert len(drawn) > len(probes)
    assert len(set(drawn)) == 1


def test_the_audit_is_done_once():
    model, params, measure = small()
    runtime, calls = TorchRuntime(params, "transient", model), []

    def counted():
        calls.append(1)
        return measure()

    probes = probes_of(params)
    runtime.losses(probes, counted)
    assert len(calls) > len(probes)
    calls.clear()
    runtime.losses(probes, counted)
    assert len(calls) == len(probes)


def test_a_non_finite_loss_is_reported_as_it_is():
    model, params, measure = small()
    for restore in ("copy", "transient"):
        losses = TorchRuntime(params, restore, model).losses(probes_of(params)[:2], lambda: measure() * float("nan"))
        assert np.isnan(losses).all()
