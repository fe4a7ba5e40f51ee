"""All methods on two small problems at the same number of forward passes, each at its best learning rate of one shared grid.

    python benchmarks/toy.py

An anisotropic quadratic (d = 200 in 10 blocks, curvatures from 0.01 to 1) and a logistic regression (10 classes, 20 features of
decaying scale, 400 examples), with exact losses and with noise of 2e-3 on every loss. The grid is relative: a rate is divided
by the scale that the method reports for its estimate, so that every method sees the same effective rates. ZO-Act needs a linear
layer with inputs, so it runs on the second problem only. Writes benchmarks/results/toy.json and toy.png; less than an
hour on one core.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from hardware import environment
from torch import nn

from hf_zo.adapters import attach, basis_of, calibrate
from hf_zo.anatomy import adapted_layers
from hf_zo.directions import Direction, Probe, space_of
from hf_zo.estimators import METHODS

mpl.use("Agg")
from matplotlib import pyplot as plt

FORWARDS = 3000
SEEDS = range(5)
RATES = [10 ** (k / 4) for k in range(-13, 2)]
NOISE = {"exact": (0.0, 1e-3), "noisy": (2e-3, 1e-2)}  # deviation of a loss, smoothing radius
POINTS = 60  # of a curve

ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "MeZO": ("mezo", {}),
    "MeZO n=3": ("mezo", {"num_directions": 3}),
    "LoZO": ("lozo", {}),
    "LoZO-M": ("lozo", {"momentum": 0.7}),
    "KerZOO": ("kerzoo", {}),
    "KerZOO a=1/2, not rescaled": ("kerzoo", {"range": 0.5, "rescale": False, "half_life": 500}),
    "Richardson": ("kerzoo", {"order": "richardson", "num_directions": 1}),
    "CurvZO": ("curvzo", {}),
    "CurvZO, no reweighting": ("curvzo", {"reweight": "none"}),
    "CurvZO B=N/4": ("curvzo", {"budget": 1 / 4}),  # times the number of blocks, in `run`
    "CurvZO B=N/4, no reweighting": ("curvzo", {"budget": 1 / 4, "reweight": "none"}),
    "BSZO": ("bszo", {"prior": 1.0}),
    "BSZO, fixed noise": ("bszo", {"prior": 1.0, "adaptive": False}),
    "ZO-Act, SGD": ("zo_act", {}),
}


@dataclass
class Problem:
    """Parameters at the start and a loss of one flat fp64 vector of them."""

    name: str
    params: dict[str, torch.Tensor]
    loss: Callable[[torch.Tensor], float]
    theta: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.theta = torch.cat([p.reshape(-1) for p in self.params.values()]).double()


def quadratic() -> Problem:
    """0.5 sum h_i theta_i^2 from a random start."""
    generator = torch.Generator().manual_seed(0)
    curvature = torch.logspace(-2, 0, 200, dtype=torch.float64)[torch.randperm(200, generator=generator)]
    # A block has curvatures of its own size: blocks differ, as the tensors of a network do.
    curvature = curvature.sort().values
    start = torch.randn(10, 5, 4, generator=generator, dtype=torch.float64)
    return Problem("quadratic", {f"block{i}": start[i] for i in range(10)}, lambda t: float(0.5 * (curvature * t * t).sum()))


def regression(rank: int | None = None) -> Problem:
    """Mean cross-entropy of a linear classifier in five tensors; with a rank, over B of an activation adapter."""
    generator = torch.Generator().manual_seed(1)
    scale = torch.logspace(0, -1.5, 20, dtype=torch.float64)
    x = torch.randn(400, 20, generator=generator, dtype=torch.float64) * scale
    truth = torch.randn(10, 20, generator=generator, dtype=torch.float64) / scale
    labels = (x @ truth.T + torch.randn(400, 10, generator=generator, dtype=torch.float64)).argmax(1)
    basis = torch.eye(20, dtype=torch.float64)
    if rank is not None:
        model = attach(nn.Sequential(nn.Linear(20, 10, bias=False)), rank, ["0"])
        calibrate(model, [{"x": x.float()}], lambda batch: model.base_model.model(batch["x"]))
        ((_, layer),) = adapted_layers(model)
        basis = basis_of(layer).double()
    inputs, width = x @ basis.T, len(basis)

    def loss(theta: torch.Tensor) -> float:
        return float(nn.functional.cross_entropy(inputs @ theta.view(10, width).T, labels))

    return Problem("regression", {f"classes{i}": torch.zeros(2, width, dtype=torch.float64) for i in range(5)}, loss)


def run(problem: Problem, arm: str, rate: float, noise: str, seed: int) -> list[float]:
    """Losses relative to the first, at `POINTS` equal distances of the budget; infinite after a divergence."""
    method, settings = ARMS[arm]
    deviation, eps = NOISE[noise]
    if "budget" in settings:
        settings = {**settings, "budget": settings["budget"] * len(problem.params)}
    estimator = METHODS[method](space_of(problem.params), seed=seed, eps=eps, **settings)
    generator = torch.Generator().manual_seed(seed)
    theta, spent, step = problem.theta.clone(), 0, 0
    first, curve = problem.loss(theta), []
    drawn: dict[int, torch.Tensor] = {}

    def flat(direction: Direction) -> torch.Tensor:
        if id(direction) not in drawn:
            drawn[id(direction)] = torch.cat([direction.sample(n).reshape(-1) for n in problem.params]).double()
        return drawn[id(direction)]

    def oracle(probes: Sequence[Probe]) -> list[float]:
        nonlocal spent
        spent += len(probes)
        errors = (deviation * torch.randn(len(probes), generator=generator, dtype=torch.float64)).tolist()
        points = [sum((a * flat(d) for a, d in p.terms), theta) for p in probes]
        return [problem.loss(point) + error for point, error in zip(points, errors, strict=True)]

    while spent < FORWARDS:
        drawn.clear()
        estimate = estimator.estimate(step, oracle)
        for weight, direction in estimate.terms:
            theta -= rate / max(nominal(estimator, estimate), 1e-9) * weight * flat(direction)
        estimator.commit(estimate)
        step += 1
        while len(curve) < POINTS and spent >= (len(curve) + 1) * FORWARDS / POINTS:
            now = problem.loss(theta) / first
            if not math.isfinite(now) or now > 1e3:
                return curve + [math.inf] * (POINTS - len(curve))
            curve.append(now)
    return curve


def nominal(estimator: Any, estimate: Any) -> float:
    """The scale that does not depend on what was measured: a learnt gain is part of the method."""
    return float(getattr(estimator, "num_directions", 1)) if estimator.name == "bszo" else float(estimate.scale)


def best(problem: Problem, arm: str, noise: str) -> dict[str, Any]:
    """The rate with the lowest mean final loss; rates are tried on one seed first and the three best on all."""
    trial = {rate: run(problem, arm, rate, noise, SEEDS[0])[-1] for rate in RATES}
    chosen = sorted(RATES, key=lambda rate: trial[rate])[:3]
    curves = {rate: torch.tensor([run(problem, arm, rate, noise, seed) for seed in SEEDS]) for rate in chosen}
    rate = min(chosen, key=lambda r: float(curves[r][:, -1].mean()))
    final = curves[rate][:, -1]
    return {
        "rate": rate,
        "edge_of_grid": rate in (RATES[0], RATES[-1]),
        "final": [round(float(x), 6) for x in final],
        "mean": float(final.mean()),
        "standard_error": float(final.std() / len(final) ** 0.5),
        "curve": [round(float(x), 6) for x in curves[rate].mean(0)],
    }


def plot(results: dict[str, Any], file: Path) -> None:
    """One panel per problem and kind of loss, mean over seeds."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), sharex=True)
    colours = plt.get_cmap("tab20")
    for row, problem in zip(axes, results, strict=True):
        for axis, noise in zip(row, NOISE, strict=True):
            for i, arm in enumerate(ARMS):
                if arm in results[problem][noise]:
                    curve = results[problem][noise][arm]["curve"]
                    x = [(k + 1) * FORWARDS / POINTS for k in range(POINTS)]
                    axis.semilogy(x, curve, color=colours(i), label=arm, linewidth=1.2)
            axis.set_title(f"{problem}, {noise} losses")
            axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("forward passes")
    for axis in axes[:, 0]:
        axis.set_ylabel("loss / first loss")
    figure.legend(*axes[1, 0].get_legend_handles_labels(), loc="lower center", ncols=4, fontsize=8)
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    figure.savefig(file, dpi=110)


def main() -> None:
    """Run all arms, write the results and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of toy.json and toy.png")
    folder, where = parser.parse_args().output, environment()
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    begin = time.time()
    results: dict[str, Any] = {}
    for problem in (quadratic(), regression()):
        results[problem.name] = {noise: {} for noise in NOISE}
        for noise in NOISE:
            for arm, (method, _) in ARMS.items():
                if method == "zo_act" and problem.name == "quadratic":
                    continue
                chosen = regression(rank=8) if method == "zo_act" else problem
                found = results[problem.name][noise][arm] = best(chosen, arm, noise)
                print(f"{problem.name} {noise} {arm}: {found['mean']:.4f} at {found['rate']:.1e}", flush=True)
    result = {
        "command": "python benchmarks/toy.py",
        "forwards": FORWARDS,
        "seeds": len(SEEDS),
        "grid": [float(f"{rate:.3e}") for rate in RATES],
        "seconds": round(time.time() - begin),
        "results": results,
        "environment": where,
    }
    (folder / "toy.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(results, folder / "toy.png")


if __name__ == "__main__":
    main()
