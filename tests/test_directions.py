"""Directions: every family goes through one `displace`, and the dense fast path is no other arithmetic."""

import math

import pytest
import torch

from hf_zo import noise
from hf_zo.directions import DenseDirection, Direction, LowRankDirection, Probe, TensorSpec, displace, space_of

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
PARAMS = {
    "embed": torch.randn(50, 8, generator=torch.Generator().manual_seed(1)),
    "a": torch.randn(8, 6, generator=torch.Generator().manual_seed(2)),
    "b": torch.randn(8, 6, generator=torch.Generator().manual_seed(3)),
    "bias": torch.randn(6, generator=torch.Generator().manual_seed(4)),
}
SPACE = space_of(PARAMS)


class LowRank(Direction):
    """U V^T for matrices, dense for vectors: the shape of LOZO's direction."""

    def __init__(self, space, seed, rank=2):
        self.space, self.seed, self.rank = space, seed, rank

    def sample(self, name):
        shape = self.space[name].shape
        if len(shape) < 2:
            return noise.sample(noise.stream_key(self.seed, 0, 0, "u", name), shape)
        u = noise.sample(noise.stream_key(self.seed, 0, 0, "u", name), (shape[0], self.rank))
        v = noise.sample(noise.stream_key(self.seed, 0, 0, "v", name), (shape[1], self.rank))
        return u @ v.T


def dense(index=0, kind="gaussian", step=0, seed=0, space=SPACE):
    return DenseDirection(space, seed, step, index, kind)


def reference(theta, name, terms, decay=1.0):
    """The formula of `displace`, with nothing but torch."""
    wide = torch.float64 if theta.dtype == torch.float64 else torch.float32
    value = theta.to(wide) * decay
    for a, direction in terms:
        value = value + direction.sample(name).to(wide) * a
    return value


TERMS = {
    "none": [],
    "one dense": [(0.1, dense())],
    "three dense": [(0.1, dense(0)), (-0.02, dense(1)), (3.0, dense(2))],
    "rademacher": [(0.1, dense(0, "rademacher")), (0.3, dense(1, "rademacher"))],
    "mixed kinds": [(0.1, dense(0)), (-0.02, dense(1, "rademacher")), (0.3, dense(2))],
    "low rank": [(0.1, LowRank(SPACE, 5))],
    "low rank and dense": [(0.1, LowRank(SPACE, 5)), (-0.02, dense(1)), (0.3, dense(2, "rademacher"))],
}


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decay", [1.0, 0.99])
def test_displace_equals_the_dense_reference(terms, dtype, decay):
    for name, p in PARAMS.items():
        theta = p.to(dtype)
        clean = theta.clone()
        expected = reference(theta, name, TERMS[terms], decay).to(dtype)
        out = torch.empty_like(theta)
        assert displace(out, theta, name, TERMS[terms], decay=decay) is out
        assert torch.equal(out, expected)
        assert torch.equal(theta, clean)
        assert torch.equal(displace(theta, theta, name, TERMS[terms], decay=decay), expected)


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_is_the_same_on_every_path(terms, dtype):
    theta = PARAMS["a"].to(dtype)
    value = reference(theta, "a", TERMS[terms], 0.99)
    expected = noise.round_stochastically(value, 77, torch.empty_like(theta))
    assert torch.equal(displace(torch.empty_like(theta), theta, "a", TERMS[terms], decay=0.99, rounding_key=77), expected)
    # and in place
    assert torch.equal(displace(theta, theta, "a", TERMS[terms], decay=0.99, rounding_key=77), expected)


@pytest.mark.parametrize("second", [dense(1), dense(1, "rademacher"), LowRank(SPACE, 3)], ids=["dense", "mixed", "generic"])
def test_terms_are_added_in_order(second):
    """fp32 addition does not associate: a huge pair that cancels leaves other bits than the small terms alone."""
    theta, first = PARAMS["a"], dense(0)
    terms = [(1e6, first), (1 / 3, second), (-1e6, first)]
    forward = displace(torch.empty_like(theta), theta, "a", terms)
    assert torch.equal(forward, reference(theta, "a", terms))
    other = [(1e6, first), (-1e6, first), (1 / 3, second)]
    assert not torch.equal(forward, displace(torch.empty_like(theta), theta, "a", other))


def test_sample_is_repeatable_and_independent_of_order():
    direction = dense(3)
    forward = {name: direction.sample(name) for name in SPACE}
    backward = {name: dense(3).sample(name) for name in reversed(SPACE)}
    for name in SPACE:
        assert torch.equal(forward[name], backward[name])
        assert torch.equal(forward[name], direction.sample(name))
        assert forward[name].dtype == torch.float32
        assert forward[name].shape == PARAMS[name].shape


def test_sample_does_not_depend_on_the_other_tensors():
    alone = space_of({"b": PARAMS["b"]})
    assert torch.equal(dense(space=alone).sample("b"), dense().sample("b"))


def test_sample_touches_no_global_generator():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    dense().sample("embed")
    assert torch.equal(torch.get_rng_state(), before)


def test_equal_shapes_get_unrelated_noise():
    big = {name: TensorSpec((300, 1000), torch.device("cpu")) for name in ("layers.0.w", "layers.1.w", "layers.10.w")}
    z = torch.stack([dense(space=big).sample(name).flatten() for name in big]).double()
    n = z.shape[1]
    assert (z @ z.T / n).fill_diagonal_(0).abs().max() < 5 / math.sqrt(n)


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
def test_seed_step_and_index_each_change_the_direction(kind):
    space = {"w": TensorSpec((300, 1000), torch.device("cpu"))}
    directions = [
        dense(space=space, kind=kind),
        dense(space=space, kind=kind, seed=1),
        dense(space=space, kind=kind, step=1),
        dense(space=space, kind=kind, index=1),
    ]
    z = torch.stack([d.sample("w").flatten() for d in directions]).double()
    n = z.shape[1]
    assert (z @ z.T / n).fill_diagonal_(0).abs().max() < 5 / math.sqrt(n)


def test_direction_is_the_documented_stream():
    key = noise.stream_key(1, 2, 3, "direction", "a")
    assert dense(3, step=2, seed=1).key("a") == key
    assert torch.equal(dense(3, step=2, seed=1).sample("a"), noise.sample(key, (8, 6)))


def test_space_describes_the_tensors():
    assert list(SPACE) == list(PARAMS)
    assert SPACE["embed"] == TensorSpec((50, 8), torch.device("cpu"))


def test_a_probe_without_terms_is_the_point_itself():
    theta = PARAMS["a"].to(torch.bfloat16)
    assert torch.equal(displace(torch.empty_like(theta), theta, "a", Probe().terms), theta)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(50, 6), (50, 3, 7), (50,)])
def test_rows_alone_are_those_of_the_whole(shape, dtype):
    """Any rows in any order, also repeated ones, by every implementation and for every kind of direction."""
    space = {"w": TensorSpec(shape, torch.device("cpu"))}
    theta = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.1).to(dtype)
    rows = torch.tensor([3, 49, 3, 0, 17])
    dense = [(0.3, DenseDirection(space, 1, 2, 0, kind)) for kind in ("gaussian", "rademacher")]
    low_rank = (-0.2, LowRankDirection(space, 1, 2, 0, 2))
    matrices_only = [dense, [low_rank], [low_rank, dense[0]]] if len(shape) > 1 else []
    for terms in ([dense[0]], [dense[1]], *matrices_only):
        whole = displace(torch.empty_like(theta), theta, "w", terms)
        assert torch.equal(displace(torch.empty_like(theta[rows]), theta[rows], "w", terms, rows=rows), whole[rows])


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
def test_rows_are_rounded_like_the_whole(kind, monkeypatch):
    theta = torch.randn(40, 30, generator=torch.Generator().manual_seed(1)).bfloat16()
    rows = torch.tensor([39, 2, 2, 11])
    for _ in range(2):
        whole = noise.displace(torch.empty_like(theta), theta, [5, 6], [1e-3, 2e-3], kind=kind, rounding_key=7)
        part = noise.displace(
            torch.empty_like(theta[rows]), theta[rows], [5, 6], [1e-3, 2e-3], kind=kind, rounding_key=7, rows=rows
        )
        assert torch.equal(part, whole[rows])
        monkeypatch.setattr(noise, "_kernel", lambda: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (300, 200), (40, 3, 11)])
@pytest.mark.parametrize("rounding_key", [None, 7])
def test_low_rank_displacements_are_the_same_from_both_implementations(shape, dtype, rounding_key, monkeypatch):
    """The kernel, alone and in parallel, the torch fallback in pieces of any size, and rows on their own."""
    theta = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.1).to(dtype)
    space = {"w": TensorSpec(shape, torch.device("cpu"))}
    low_rank = [LowRankDirection(space, 1, 2, 0, rank) for rank in (3, 2)]
    terms = [(0.1, low_rank[0]), (0.2, low_rank[1]), (-1e-3, LowRankDirection(space, 1, 3, 0, 1, power=1.0))]

    def apply(rows=None):
        chosen = theta if rows is None else theta[rows]
        return displace(torch.empty_like(chosen), chosen, "w", terms, decay=0.9, rounding_key=rounding_key, rows=rows)

    fast, rows = apply(), torch.tensor([0, shape[0] - 1, shape[0] // 2, 0])
    assert torch.equal(apply(rows), fast[rows])
    torch.set_num_threads(2)
    assert torch.equal(apply(), fast)
    monkeypatch.setattr(noise, "_kernel", lambda: None)
    for chunk in (1 << 22, 100):
        monkeypatch.setattr(noise, "_CHUNK", chunk)
        assert torch.equal(apply(), fast)
        assert torch.equal(apply(rows), fast[rows])
    expected = 0.9 * theta.double() + sum(a * d.sample("w").double() for a, d in terms)
    torch.testing.assert_close(fast.double(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-7)
