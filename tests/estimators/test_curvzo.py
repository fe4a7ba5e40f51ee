"""CurvZO: moments of scores and estimates, exact water-filling, the budget's limits, and MeZO where everything is selected."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_zo import noise
from hf_zo.directions import Probe, TensorSpec, displace, space_of
from hf_zo.estimators import Estimate
from hf_zo.estimators.curvzo import CurvZO, _sum_of_small, adaptive_budget, allocate
from hf_zo.estimators.mezo import MeZO

GRADIENT = {
    "a": torch.tensor([1.0, -0.5], dtype=torch.float64),
    "b": torch.tensor([[0.3, 0.2], [0.7, -0.1]], dtype=torch.float64),
    "c": torch.tensor([2.0], dtype=torch.float64),
}
SIZES = torch.tensor([g.numel() for g in GRADIENT.values()], dtype=torch.float64)
ENERGY = torch.stack([g.pow(2).sum() for g in GRADIENT.values()])
SCORES = torch.tensor([1.0, 0.36, 0.25], dtype=torch.float64)  # of the blocks
ORIGIN = {n: torch.zeros(g.shape) for n, g in GRADIENT.items()}  # fp32, which is displaced much faster than fp64


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.reshape(-1) for t in tensors.values()])


def linear(probes: list[Probe]) -> list[float]:
    """The loss <gradient, theta> at theta = 0."""
    losses = []
    for probe in probes:
        moved = {n: displace(torch.empty_like(zero), zero, n, probe.terms) for n, zero in ORIGIN.items()}
        losses.append(float(flat(GRADIENT) @ flat(moved).double()))
    return losses


def estimator_of(scores: torch.Tensor | None = SCORES, **keywords: Any) -> CurvZO:
    estimator = CurvZO(space_of(GRADIENT), eps=1e-3, **keywords)
    estimator.state = {"scores": scores, "empty_draws": 0} if scores is not None else {}
    return estimator


class Drawn:
    """Selections and dense directions of many steps, as `CurvZO` draws them, and what follows from them on the linear loss.

    Much faster than as many estimates; the first of those are made and compared. ``s``: responses, [steps]; ``v``: the masked
    direction, [steps, parameters]; ``energy``, ``squared``: |v|^2 and s^2 |v|^2 by block or coordinate.
    """

    def __init__(self, estimator: CurvZO, steps: int) -> None:
        block = estimator.granularity == "block"
        self.probabilities = estimator.probabilities()
        self.sizes = SIZES if block else torch.ones(7, dtype=torch.float64)  # of a block or coordinate
        self.selected = torch.stack([estimator._draw(t) for t in range(steps)]) < self.probabilities
        z = torch.stack([flat({n: estimator.dense_direction(t, 0).sample(n) for n in GRADIENT}) for t in range(steps)]).double()
        self.v = z * self.by_parameter(self.selected)
        self.s = self.v @ flat(GRADIENT)
        # Energies of blocks are those of `noise.energy`, which rounds to 16 binary places.
        squares = ((self.v * 2.0**16).round() * 2.0**-16 if block else self.v) ** 2
        self.energy = torch.stack([e.sum(1) for e in squares.split(self.sizes.long().tolist(), 1)], 1)
        self.squared = self.s[:, None] ** 2 * self.energy
        self.estimates = [estimator.estimate(t, linear) for t in range(200)]
        torch.testing.assert_close(gradients_of(self.estimates).float(), self.gradients()[:200].float())

    def by_parameter(self, units: torch.Tensor) -> torch.Tensor:
        """What is given by block or coordinate, by parameter."""
        return torch.repeat_interleave(units, self.sizes.long(), -1)

    def gradients(self) -> torch.Tensor:
        """Reweighted estimates."""
        return self.s[:, None] * self.v / self.by_parameter(self.probabilities)

    def check_scores(self, scores: torch.Tensor) -> None:
        """``scores`` over s^2 are those of the estimates that select something; an average must keep nothing of the past."""
        measured = torch.stack([e.state["scores"].double() / e.projected_gradients[0] ** 2 for e in self.estimates if e.terms])
        some = self.selected[:200].any(1)
        assert some.tolist() == [bool(e.terms) for e in self.estimates]
        torch.testing.assert_close(measured, scores[:200][some] / self.s[:200][some][:, None] ** 2, rtol=1e-3, atol=1e-6)


@cache
def blocks() -> Drawn:
    """Reweighted draws with an average that keeps nothing of the past, so that states are scores of single steps."""
    return Drawn(estimator_of(budget=1.5, ema=1.0), 30_000)


@cache
def coordinates() -> Drawn:
    return Drawn(estimator_of(COORDINATE_SCORES, granularity="coordinate", budget=3.0, ema=1.0), 12_000)


def gradients_of(estimates: list[Estimate]) -> torch.Tensor:
    return torch.stack([flat({n: e.gradient(n, zero) for n, zero in ORIGIN.items()}) for e in estimates]).double()


def assert_mean(values: torch.Tensor, expected: torch.Tensor) -> None:
    error = values.std(0) / len(values) ** 0.5
    assert ((values.mean(0) - expected).abs() < 5 * error + 1e-12).all(), (values.mean(0), expected, error)


BLOCK_P = allocate(SCORES.sqrt(), 1.5)  # 1.5 * (1, 0.6, 0.5) / 2.1
COORDINATE_SCORES = torch.tensor([4.0, 1.0, 0.04, 0.09, 0.25, 1.0, 0.16], dtype=torch.float64)
COORDINATE_P = allocate(COORDINATE_SCORES.sqrt(), 3.0)


def test_reweighted_estimates_are_unbiased_with_the_stated_second_moment() -> None:
    """E[g] = gradient; E|g|^2 = sum (d_b + 2) G_b / pi_b + sum_{b != b'} d_b pi_b' G_b' / pi_b, within 3 %."""
    g = blocks().gradients()
    assert_mean(g, flat(GRADIENT))
    spill = (SIZES / BLOCK_P)[:, None] * (BLOCK_P * ENERGY)[None, :]
    spill.fill_diagonal_(0)
    predicted = float(((SIZES + 2) * ENERGY / BLOCK_P).sum() + spill.sum())
    assert float(g.pow(2).sum(1).mean()) == pytest.approx(predicted, rel=0.03)


def test_reweighted_coordinates() -> None:
    """Coordinate form: E[g] = gradient and E[g_i^2] = ((3 - pi_i) g_i^2 + sum_j pi_j g_j^2) / pi_i, within 5 errors."""
    g, gradient = coordinates().gradients(), flat(GRADIENT)
    assert_mean(g, gradient)
    shared = (COORDINATE_P * gradient**2).sum()
    assert_mean(g**2, ((3 - COORDINATE_P) * gradient**2 + shared) / COORDINATE_P)


@pytest.mark.parametrize(("reweight", "power"), [("none", 1.0), ("partial", 0.5)])
def test_other_weights(reweight: str, power: float) -> None:
    """Without reweighting the estimate is the reweighted one times pi, so its mean is Pi * gradient; "partial": sqrt(pi)."""
    estimator = estimator_of(budget=1.5, reweight=reweight)
    kept = BLOCK_P**power
    assert estimator.estimate(0, linear).scale == pytest.approx(float((kept * SIZES).sum() / SIZES.sum()))
    for t, reweighted in enumerate(blocks().estimates[:100]):
        expected = gradients_of([reweighted]) * torch.repeat_interleave(kept, SIZES.long())
        torch.testing.assert_close(gradients_of([estimator.estimate(t, linear)]).float(), expected.float())


def test_block_scores() -> None:
    """c_b |v|^2 / s^2 is the energy of the block, and E[s^2 |v_b|^2] = pi_b ((d_b + 2 - d_b pi_b) G_b + d_b sum pi G)."""
    drawn = blocks()
    drawn.check_scores(drawn.squared / drawn.energy.sum(1, keepdim=True))
    predicted = BLOCK_P * ((SIZES + 2 - SIZES * BLOCK_P) * ENERGY + SIZES * (BLOCK_P * ENERGY).sum())
    assert_mean(drawn.squared, predicted)
    torch.testing.assert_close(drawn.squared.mean(0), predicted, rtol=0.05, atol=0)


@pytest.mark.parametrize("granularity", ["block", "coordinate"])
def test_debiased_scores_estimate_the_squared_gradient(granularity: str) -> None:
    """E[c] = G_b whatever the probabilities (by coordinate, equation 41)."""
    scores, budget = (SCORES, 1.5) if granularity == "block" else (COORDINATE_SCORES, 3.0)
    expected = ENERGY if granularity == "block" else flat(GRADIENT) ** 2
    estimator = estimator_of(scores, budget=budget, granularity=granularity, debias=True, ema=1.0)
    drawn = Drawn(estimator, 8000)
    p, sizes = drawn.probabilities, drawn.sizes
    scores = drawn.s[:, None] ** 2 * (drawn.energy - p * sizes) / (p * (sizes + 2 - sizes * p))
    drawn.check_scores(scores)
    # A draw that selects nothing has s = 0 and with it a score of 0.
    assert_mean(scores, expected)


def test_coordinate_scores() -> None:
    """E[s^2 v_i^2] = pi_i ((3 - pi_i) g_i^2 + sum_j pi_j g_j^2), equation 6."""
    drawn = coordinates()
    drawn.check_scores(drawn.squared / drawn.energy.sum(1, keepdim=True))
    gradient = flat(GRADIENT)
    assert_mean(
        drawn.squared,
        COORDINATE_P * ((3 - COORDINATE_P) * gradient**2 + (COORDINATE_P * gradient**2).sum()),
    )


@pytest.mark.parametrize("granularity", ["block", "coordinate"])
@pytest.mark.parametrize("budget", [None, 1000.0])
def test_selecting_everything_is_mezo_bit_for_bit(granularity: str, budget: float | None) -> None:
    """Equal scores (the start) and a budget of N or more."""
    space = space_of(GRADIENT)
    ours = CurvZO(space, eps=1e-3, seed=3, granularity=granularity, budget=budget).estimate(5, linear)
    mezo = MeZO(space, eps=1e-3, seed=3).estimate(5, linear)
    assert ours.projected_gradients == mezo.projected_gradients
    for name, g in GRADIENT.items():
        assert torch.equal(ours.gradient(name, g), mezo.gradient(name, g))


@pytest.mark.parametrize(("clip", "expected"), [(None, 4.0), (5.0, 4.0), (1.0, 1.0)])
def test_clip_bounds_the_response(clip: float | None, expected: float) -> None:
    estimate = CurvZO(space_of(GRADIENT), eps=0.25, clip=clip).estimate(0, lambda probes: [3.0, 1.0])
    assert estimate.projected_gradients == (expected,)
    assert [w for w, _ in estimate.terms] == [expected]
    assert float(estimate.state["scores"].sum()) == pytest.approx(expected**2)
    assert estimate.loss == 2.0  # the loss is reported as measured


@pytest.mark.parametrize(("granularity", "budget"), [("block", 1.5), ("coordinate", 3.0)])
def test_rademacher_entries_are_signs_where_selected(granularity: str, budget: float) -> None:
    scores = SCORES if granularity == "block" else COORDINATE_SCORES
    estimator = estimator_of(scores, granularity=granularity, budget=budget, reweight="none", direction="rademacher")
    applied = [direction for t in range(20) for _, direction in estimator.estimate(t, linear).terms]
    assert {x for d in applied for x in flat({n: d.sample(n) for n in GRADIENT}).tolist()} == {-1.0, 0.0, 1.0}


@pytest.mark.parametrize("sizes", [[19_700_000 + i for i in range(340)], [3 << 31, 5]])
def test_scores_of_more_parameters_than_their_energies_add_up_in_64_bits(
    sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their energies, of 6.7e9 and 6.4e9 parameters, are more than 2^64 units of 2^-32."""
    space = {f"w{i}": TensorSpec((n,), torch.device("cpu")) for i, n in enumerate(sizes)}
    monkeypatch.setattr(noise, "energy", lambda key, n, *more: torch.tensor(float(n), dtype=torch.float64))
    estimate = CurvZO(space, eps=0.5, ema=1.0).estimate(0, lambda probes: [3.0, 1.0])
    assert estimate.projected_gradients == (2.0,)
    torch.testing.assert_close(estimate.state["scores"], 4 * torch.tensor(sizes, dtype=torch.float64) / sum(sizes))


def test_many_small_numbers_add_up_exactly() -> None:
    values = torch.rand(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).mul(2**32).round() * 2.0**-32
    assert _sum_of_small(values) == math.fsum(values.tolist())
    assert _sum_of_small(torch.full((1,), 2.0**30, dtype=torch.float64).expand(2**10)) == 2.0**40  # 2^72 units


def test_averages_of_scores() -> None:
    """C = (1 - alpha) C + alpha c, with 0 for what was not selected; the first observation sets the level."""
    estimator = estimator_of(None, ema=0.25)
    first = estimator.estimate(0, linear)
    s = first.projected_gradients[0]
    assert float(first.state["scores"].sum()) == pytest.approx(s**2)  # 3/4 of three equal parts and 1/4 of shares
    estimator.budget = 1.0
    estimator.commit(first)
    before = first.state["scores"]
    second = next(e for t in range(1, 50) if 0 < sum(map(bool, weights_of(e := estimator.estimate(t, linear)))) < 3)
    off = torch.tensor([not w for w in weights_of(second)])
    assert torch.equal(second.state["scores"][off], 0.75 * before[off])
    assert (second.state["scores"][~off] != 0.75 * before[~off]).all()
    assert estimator.state is first.state  # committed by the optimizer alone


def test_scores_that_keep_nothing_draw_uniformly() -> None:
    estimator = CurvZO(space_of(GRADIENT), ema=0.0, budget=1.5)
    drawn = torch.zeros(3)
    for t in range(2000):
        assert torch.equal(estimator.probabilities(), torch.full((3,), 0.5, dtype=torch.float64))
        estimate = estimator.estimate(t, linear)
        drawn += torch.tensor([bool(w) for w in weights_of(estimate)] or [False] * 3)
        estimator.commit(estimate)
    assert (drawn / 2000 - 0.5).abs().max() < 5 * (0.25 / 2000) ** 0.5


def weights_of(estimate: Estimate) -> list[float]:
    return list(estimate.terms[0][1].weights.values()) if estimate.terms else []


def test_a_draw_that_selects_nothing_applies_nothing_and_is_counted() -> None:
    counted = []
    estimator = CurvZO(space_of(GRADIENT), budget=1.0, floor=1e-3)
    estimator.state = {"scores": torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64), "empty_draws": 4}
    share = 0
    for t in range(2000):
        estimate = estimator.estimate(t, lambda probes: counted.append(len(probes)) or [7.0] * len(probes))
        if not estimate.terms:
            share += 1
            assert counted[-1] == 1
            assert estimate.loss == 7.0
            assert estimate.state["empty_draws"] == 5
            assert torch.equal(estimate.state["scores"], 0.9 * estimator.state["scores"])
            assert not estimate.gradient("b", GRADIENT["b"]).any()
    assert share / 2000 == pytest.approx((2 / 3) ** 3, abs=5 * (0.2 / 2000) ** 0.5)


def test_the_mask_does_not_depend_on_the_order_of_tensors() -> None:
    turned = dict(reversed(GRADIENT.items()))
    a, b = (CurvZO(space_of(g), budget=1.5) for g in (GRADIENT, turned))
    for t in range(50):
        of_a, of_b = (weights_by_name(e.estimate(t, linear)) for e in (a, b))
        assert of_a == of_b


def weights_by_name(estimate: Estimate) -> dict[str, float]:
    return dict(estimate.terms[0][1].weights) if estimate.terms else {}


# ---- allocation and budget -----------------------------------------------------------------------------------------

WEIGHTS = st.lists(st.floats(0, 1e6), min_size=1, max_size=60).map(lambda x: torch.tensor(x, dtype=torch.float64))


@settings(max_examples=300, deadline=None)
@given(WEIGHTS, st.floats(0.01, 1.2))
def test_water_filling(weights: torch.Tensor, share: float) -> None:
    n = len(weights)
    budget = max(share * n, 0.5)
    p = allocate(weights, budget)
    assert float(p.sum()) == pytest.approx(min(budget, n), abs=1e-9 * n)
    assert (p >= 0).all()
    assert (p <= 1).all()
    order = weights.argsort()
    assert (p[order].diff() >= -1e-12).all()  # monotone
    inner = (p < 1) & (weights > 1e-11 * weights.max())
    ratios = p[inner] / weights[inner]
    torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios), rtol=1e-9, atol=0)  # one tau for all below 1


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=30), st.floats(1e-6, 1e6))
def test_water_filling_ignores_scale(weights: list[float], factor: float) -> None:
    w = torch.tensor(weights, dtype=torch.float64)
    torch.testing.assert_close(allocate(w, 1.5), allocate(w * factor, 1.5), rtol=1e-6, atol=0)


def test_water_filling_of_zeros_is_uniform() -> None:
    assert allocate(torch.zeros(8, dtype=torch.float64), 2.0).tolist() == [0.25] * 8


def test_limits_of_the_budget() -> None:
    equal, one_hot = torch.full((40,), 0.3, dtype=torch.float64), torch.zeros(40, dtype=torch.float64)
    one_hot[7] = 5.0
    assert adaptive_budget(equal, 0.5) == pytest.approx(40)
    assert adaptive_budget(one_hot, 0.5) == 1.0  # 0.5 by the formula, raised to one block
    assert adaptive_budget(one_hot, 1.0) == pytest.approx(1.0)
    assert adaptive_budget(torch.zeros(40, dtype=torch.float64), 0.5) == 40
    scores = torch.tensor([4.0, 1.0, 1.0], dtype=torch.float64)
    assert adaptive_budget(scores, 1.0) == pytest.approx(16 / 6)
    p = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    assert adaptive_budget(scores, 0.0) == pytest.approx(3 * float(-(p * p.log()).sum()) / float(torch.tensor(3.0).log()))


def test_nothing_falls_below_the_floor() -> None:
    estimator = CurvZO(space_of(GRADIENT), budget=1.0, floor=0.1)
    estimator.state = {"scores": torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64), "empty_draws": 0}
    assert estimator.probabilities().tolist() == pytest.approx([1.0, 0.1, 0.1])


@pytest.mark.parametrize("budget", [None, 1.5])
def test_negative_scores_count_as_zero(budget: float | None) -> None:
    """Debiased scores can be."""
    negative, zero = (
        estimator_of(torch.tensor([1.0, least, 0.2], dtype=torch.float64), budget=budget, floor=0.1).probabilities()
        for least in (-0.1, 0.0)
    )
    assert torch.equal(negative, zero)
    assert zero.isfinite().all()
    assert float(zero[1]) == 0.1


@pytest.mark.parametrize(
    ("keywords", "field"),
    [
        ({"ema": -0.1}, "curvzo_ema"),
        ({"ema": 1.1}, "curvzo_ema"),
        ({"mix": -0.1}, "curvzo_mix"),
        ({"reweight": "some"}, "curvzo_reweight"),
        ({"budget": 0.5}, "curvzo_budget"),
        ({"mix": 0.3, "budget": 4.0}, r"curvzo_mix=0\.3.*curvzo_budget=4"),
        ({"granularity": "row"}, "curvzo_granularity"),
        ({"floor": 0.0}, "curvzo_floor"),
        ({"debias": True, "direction": "rademacher"}, "curvzo_debias"),
    ],
)
def test_settings_outside_their_domain(keywords: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=field):
        CurvZO({}, **keywords)
