"""What keeps forward passes behind gradients? Variance, dimension, bias and capacity, measured with gradients.

    hf-zo demo-model runs/smollm2
    python benchmarks/gap.py --dataset_dir DATA [--steps 100]

SST-2 with prompts in fp32, three sets of trainable parameters: LoRA on q and v, ZO-Act's B on all linear layers, and one B of
rank 1. At the start and after a third of ``--steps`` first-order (Adam) steps it takes the gradients of 48 examples one by
one, and losses of the same examples along random directions and along the gradient. Writes benchmarks/results/gap.json;
about 40 minutes on one core.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import tempfile
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from hardware import environment
from rich.console import Console
from rich.table import Table
from study.arms import ARMS
from study.cell import trainer_of
from study.grid import Cell
from study.progress import Folders, rows_of
from study.reading import read_grid
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from transformers import set_seed

from hf_zo.tasks import TASKS
from hf_zo.tasks.finetune import trainer_parts

HERE = Path(__file__).parent
SETS = {  # form and arm of the study, and Adam's rate for the first-order steps
    "LoRA r 8 on q and v": ("lora", "mezo", 1e-3),
    "ZO-Act r 8 on all linear layers": ("base", "zo-act", 3e-4),
    "ZO-Act r 1 on one layer": ("base", "zo-act-one-block", 2e-2),
}
GRID = dataclasses.replace(read_grid(HERE / "grids" / "smollm2.yaml"), dtype="float32", arms=ARMS)
EXAMPLES, BATCH, DIRECTIONS = 48, 16, 10


class Space:
    """A model, what of it is trained, and losses and gradients of rows as functions of that."""

    def __init__(self, form: str, arm: str, folders: Folders, scratch: str) -> None:
        grid, task = GRID, TASKS["sst2"]
        cell = Cell("final", "sst2", form, arm, 1.0, seed=1)
        rows = rows_of(grid, cell, folders.data)
        set_seed(1)
        parts = trainer_parts(grid.model_arguments(cell, folders.model), task, rows.train, rows.scored, grid.max_length, 1)
        self.trainer = trainer_of(grid, cell, task, scratch, grid.cost(cell), parts)
        self.trainer.create_optimizer()  # calibrates ZO-Act's basis
        self.model = self.trainer.model.float().eval()
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.d = sum(p.numel() for p in self.params)
        self.rows = self.trainer.train_dataset

    def loss(self, rows: list[int]) -> torch.Tensor:
        """Mean loss of some training rows."""
        batch = self.trainer._prepare_inputs(self.trainer.data_collator([self.rows[i] for i in rows]))
        return self.trainer.compute_loss(self.model, batch)

    def gradient(self, rows: list[int]) -> torch.Tensor:
        """Its gradient, flat."""
        return parameters_to_vector(torch.autograd.grad(self.loss(rows), self.params))

    @torch.no_grad()
    def along(self, direction: torch.Tensor, radius: float, rows: list[int]) -> tuple[float, float]:
        """Mean loss of rows at both sides, in fp64 over batches."""
        start = parameters_to_vector(self.params)
        sides = []
        for sign in (1, -1):
            vector_to_parameters(start + sign * radius * direction, self.params)
            sides.append(self.pooled(rows))
        vector_to_parameters(start, self.params)
        return sides[0], sides[1]

    @torch.no_grad()
    def pooled(self, rows: list[int]) -> float:
        """Mean loss of rows, batch by batch."""
        batches = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
        return sum(float(self.loss(batch)) * len(batch) for batch in batches) / len(rows)


def measure(space: Space, eps: float) -> dict[str, Any]:
    """Everything but capacity, at the weights as they are."""
    order = torch.randperm(len(space.rows), generator=torch.Generator().manual_seed(2))[:EXAMPLES].tolist()
    gradients = torch.stack([space.gradient([row]) for row in order])
    mean = gradients.mean(0)
    squares = gradients.square().sum(1, dtype=torch.float64)
    # Unbiased, of products of different examples only: negative where the examples' gradients do not agree on anything.
    products = (EXAMPLES * (gradients @ mean).double() - squares) / (EXAMPLES - 1)
    signal, error_of_signal = float(products.mean()), float(2 * products.std() / EXAMPLES**0.5)
    noise = (float(squares.mean()) - signal) / BATCH
    generator, clean = torch.Generator().manual_seed(3), space.pooled(order)
    slopes: dict[str, list[float]] = {"exact": [], "at_eps": [], "at_tenth": []}
    curvatures = []
    for _ in range(DIRECTIONS):
        z = torch.randn(space.d, generator=generator)
        slopes["exact"].append(float(mean.double() @ z.double()))
        plus, minus = space.along(z, eps, order)
        slopes["at_eps"].append((plus - minus) / (2 * eps))
        curvatures.append((plus + minus - 2 * clean) / eps**2)
        plus, minus = space.along(z, eps / 10, order)
        slopes["at_tenth"].append((plus - minus) / (eps / 5))
    unit, radius = mean / mean.norm(), 0.1 * eps * math.sqrt(space.d)
    plus, minus = space.along(unit, radius, order)
    steepest = (plus + minus - 2 * clean) / radius**2

    def error(name: str) -> float:
        return math.dist(slopes[name], slopes["exact"]) / math.hypot(*slopes["exact"])

    most = signal + 2 * error_of_signal
    pooled = most + (space.d + 1) * (most + noise)
    apart = most + noise + (space.d + 1) * float(squares.mean()) / BATCH
    return {
        "loss": clean,
        "squared_gradient": signal,
        "squared_gradient_standard_error": error_of_signal,
        "noise_of_a_batch": noise,
        # With the squared gradient two standard errors higher.
        "batch_noise_to_signal_at_least": noise / most,
        "cosine_of_an_estimate_at_most": math.sqrt(most / pooled),
        "cosine_with_directions_of_examples_at_most": math.sqrt(most / apart),
        "trace_of_hessian": fmean(curvatures),
        "trace_standard_error": stdev(curvatures) / math.sqrt(DIRECTIONS),
        "curvature_along_gradient": steepest,
        "relative_error_of_differences_at_eps": error("at_eps"),
        "relative_error_of_differences_at_a_tenth_of_eps": error("at_tenth"),
    }


def descend(space: Space, rate: float, steps: int, generator: torch.Generator) -> list[float]:
    """First-order steps with Adam on batches of training rows; their losses."""
    optimizer, losses = torch.optim.Adam(space.params, rate), []
    for _ in range(steps):
        rows = torch.randperm(len(space.rows), generator=generator)[:BATCH].tolist()
        optimizer.zero_grad()
        loss = space.loss(rows)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    """Measure every set and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--dataset_dir", type=Path, help="holds sst2/train.jsonl[.gz]; default: the Hub")
    parser.add_argument("--steps", type=int, default=100, help="first-order steps, a third of them before the second point")
    parser.add_argument("--eps", type=float, default=1e-2, help="smoothing radius, the recommended one")
    arguments, where = parser.parse_args(), environment()
    torch.set_num_threads(1)
    sets: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, (form, arm, rate) in SETS.items():
            space = Space(form, arm, Folders(Path(scratch), arguments.model, arguments.dataset_dir), scratch)
            generator = torch.Generator().manual_seed(1)
            told: dict[str, Any] = {"parameters": space.d, "rate": rate, "start": measure(space, arguments.eps)}
            losses = descend(space, rate, arguments.steps // 3, generator)
            told["after_a_third"] = measure(space, arguments.eps)
            losses += descend(space, rate, arguments.steps - len(losses), generator)
            evaluated = space.trainer.evaluate()
            told |= {"losses": [round(x, 4) for x in losses], "accuracy": evaluated["eval_accuracy"]}
            sets[name] = told
            print(name, json.dumps({k: v for k, v in told.items() if k != "losses"}, indent=1), flush=True)
    result = {
        "command": f"python benchmarks/gap.py --steps {arguments.steps}",
        **where,
        "eps": arguments.eps,
        "sets": sets,
    }
    (HERE / "results" / "gap.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    table = Table(
        "set", "d", "point", "noise / signal >=", "cosine <=", "of examples <=", "trace / curvature", "error", "accuracy"
    )
    for name, told in sets.items():
        for point in ("start", "after_a_third"):
            x = told[point]
            table.add_row(
                name,
                f"{told['parameters']:,}",
                point,
                f"{x['batch_noise_to_signal_at_least']:.2f}",
                f"{x['cosine_of_an_estimate_at_most']:.5f}",
                f"{x['cosine_with_directions_of_examples_at_most']:.5f}",
                f"{x['trace_of_hessian'] / x['curvature_along_gradient']:.1f}",
                f"{x['relative_error_of_differences_at_eps']:.2f}",
                f"{told['accuracy']:.3f}",
            )
    Console().print(table)


if __name__ == "__main__":
    main()
