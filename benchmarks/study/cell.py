"""One cell: load model and rows, train within the budget, evaluate on the way, and tell what happened.

A cell is written when it is finished, as one file and in one go, so that what is there is complete. Runs that diverge are
results too: the status says so, and the error is kept.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from hardware import environment
from transformers import AutoConfig, AutoTokenizer, Trainer, TrainerCallback, set_seed

from hf_zo import ZOTrainer
from hf_zo.tasks import TASKS, GenerateToEvaluate, Task
from hf_zo.tasks.finetune import trainer_parts
from hf_zo.trainer import NonFiniteLossError

from .arithmetic import ProductsInFp32, fp32_is_faster
from .grid import Cell, Cost, Grid, metric_of
from .progress import Folders, rows_of

DIVERGED, DIVERGED_AT_ONCE = 2.0, 4.0
"""A run has diverged if a loss was not finite, or if the mean of the last tenth of its losses exceeds that of the first tenth,
or the very first loss, this many times: a single loss is noisy, and a tenth may hold the divergence. A loss here is the mean
over a hundredth of the run."""

_PROMPT_TOKENS = 2048  # most tokens of a prompt with demonstrations


class _GeneratingZOTrainer(GenerateToEvaluate, ZOTrainer):
    pass


class _GeneratingTrainer(GenerateToEvaluate, Trainer):
    pass


class _AtCheckpoints(TrainerCallback):
    """Logs and evaluates after the given steps."""

    def __init__(self, steps: Sequence[int]) -> None:
        self.steps = set(steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            control.should_log = control.should_evaluate = True


def run_cell(grid: Grid, cell: Cell, folders: Folders) -> dict[str, Any]:
    """Run a cell in this process and return its result: JSON types only."""
    begin, where = time.time(), environment()
    emulated = grid.dtype == "bfloat16" and not torch.cuda.is_available() and fp32_is_faster()
    with ProductsInFp32() if emulated else nullcontext():
        found = _run(grid, cell, folders)
    found["environment"] = {**where, **({"bfloat16": "products in fp32, rounded"} if emulated else {})}
    return {**found, "seconds": round(time.time() - begin, 1), "peak_megabytes": peak_megabytes()}


def _run(grid: Grid, cell: Cell, folders: Folders) -> dict[str, Any]:
    arm, task, cost = grid.arms[cell.arm], TASKS[cell.task], grid.cost(cell)
    rows = rows_of(grid, cell, folders.data)
    model_arguments = grid.model_arguments(cell, folders.model)
    set_seed(cell.seed)  # of a new head
    max_length, shown = grid.max_length, 0
    if arm.demonstrations:
        task, shown = with_demonstrations(task, rows.train[: arm.demonstrations], folders.model, grid.max_length)
        max_length = _PROMPT_TOKENS
    parts = trainer_parts(model_arguments, task, rows.train, rows.scored, max_length, cell.seed)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = trainer_of(grid, cell, task, scratch, cost, parts)
        if arm.curvzo_share is not None:
            tensors = sum(p.requires_grad for p in trainer.model.parameters())
            trainer.args.curvzo_budget = max(1.0, arm.curvzo_share * tensors)
        status, error, evaluated, seconds = "ok", None, list[dict[str, Any]](), 0.0
        if arm.kind in ("zo", "probe"):
            started = time.time()
            cost = cost.after(trainer.create_optimizer().forward_passes, grid.budget)  # calibrates and fits
            seconds = time.time() - started
            trainer.args.max_steps = max(cost.steps, 1)
        ends = sorted({round(fraction * cost.steps) for fraction in (*grid.checkpoints, 1.0)})
        trainer.add_callback(_AtCheckpoints(ends))
        if 0 in ends:
            evaluated.append({**trainer.evaluate(), "step": 0})
        if cost.steps:
            started = time.time()
            try:
                trainer.train()
            except NonFiniteLossError as caught:
                status, error = "diverged", str(caught)
                trainer.evaluate()  # of the weights as they are: a run does not keep the score it had before
            seconds += time.time() - started
            evaluated += [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    losses = [[forwards_of(entry, cost), round(entry["loss"], 5)] for entry in history]
    if status == "ok":
        error = divergence([loss for _, loss in losses], [entry["eval_loss"] for entry in evaluated])
        status = "diverged" if error else "ok"
    return {
        "name": cell.name,
        "config": grid.config(cell),
        "status": status,
        "error": error,
        "learning_rate": arm.rates[cell.form] * cell.multiplier if cost.steps else None,
        "zo_eps": getattr(trainer.args, "zo_eps", None) if arm.kind == "zo" else None,
        "trained_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad) if cost.steps else 0,
        "demonstrations": shown,
        "rows": {"train": len(rows.train), rows.split: len(rows.scored)},
        "metric": metric_of(task),
        "losses": [[forwards, finite(loss)] for forwards, loss in losses],
        "evaluations": [
            {
                "forwards": forwards_at(entry["step"], history, cost),
                "split": rows.split,
                "loss": finite(entry["eval_loss"]),
                "score": entry[f"eval_{metric_of(task)}"],
            }
            for entry in evaluated
        ],
        "steps": trainer.state.global_step,
        "forward_passes": forwards_at(trainer.state.global_step, history, cost),
        "train_seconds": round(seconds, 1),
    }


def trainer_of(grid: Grid, cell: Cell, task: Task, scratch: str, cost: Cost, parts: dict[str, Any]) -> Any:
    """The trainer of a cell: `ZOTrainer`, or the transformers Trainer on the same data, prompts and loss."""
    generates = task.options is None
    if grid.arms[cell.arm].kind == "first-order":
        build: Any = _GeneratingTrainer if generates else Trainer
    else:
        build = _GeneratingZOTrainer if generates else ZOTrainer
    return build(args=grid.arguments(cell, scratch, max(cost.steps, 1)), **parts)


def forwards_of(entry: dict[str, Any], cost: Cost) -> int:
    """Forward passes at a log entry: as counted by the optimizer, else by the step."""
    if "zo/forward_passes" in entry:
        return int(entry["zo/forward_passes"])
    return cost.at(entry["step"])


def forwards_at(step: int, history: Sequence[dict[str, Any]], cost: Cost) -> int:
    """Forward passes after a step; checkpoints are logged, so that there is an entry for each."""
    entry = next((entry for entry in history if entry["step"] == step), None)
    return forwards_of(entry, cost) if entry else cost.at(step)


def divergence(losses: Sequence[float], evaluated: Sequence[float] = ()) -> str | None:
    """What is wrong with a run's losses, None if nothing is."""
    wrong = [x for x in (*losses, *evaluated) if not math.isfinite(x)]
    if wrong:
        return f"a loss of {wrong[0]}"
    tenth = max(1, len(losses) // 10)
    end = fmean(losses[-tenth:]) if losses else 0.0
    for times, start in ((DIVERGED, losses[:tenth]), (DIVERGED_AT_ONCE, losses[:1])):
        if start and end > times * fmean(start):
            first = f"that of the first {len(start)} log entries, {fmean(start):.3f}"
            return f"the loss ended at {end:.3f}, above {times:g} times {first}"
    return None


def peak_megabytes() -> int:
    """Highest resident memory of this process so far; a process runs one cell."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1 << 20 if sys.platform == "darwin" else 1 << 10)


def finite(value: float) -> float | None:
    """None for what JSON has no number for."""
    return value if math.isfinite(value) else None


def with_demonstrations(task: Task, rows: Sequence[Any], model: Path, room: int) -> tuple[Task, int]:
    """The task with worked examples before each prompt, as many as leave ``room`` tokens, and their number."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    positions = getattr(AutoConfig.from_pretrained(model), "max_position_embeddings", _PROMPT_TOKENS)
    limit = min(_PROMPT_TOKENS, tokenizer.model_max_length, positions)
    shown: list[str] = []
    for row in rows:
        more = [*shown, task.prompt(row) + right_answer(task, row)]
        if len(tokenizer("\n\n".join(more))["input_ids"]) + room > limit:
            break
        shown = more
    text = "".join(f"{example}\n\n" for example in shown)
    return dataclasses.replace(task, prompt=lambda row: text + task.prompt(row)), len(shown)


def right_answer(task: Task, row: Any) -> str:
    """What should follow the prompt of a row."""
    if task.options is None:
        assert task.answers is not None
        return f" {task.answers(row)[0].strip()}"
    return task.options(row)[task.target(row) if task.target else row[task.label]]


def write_cell(file: Path, result: dict[str, Any]) -> None:
    """Write a result in one go: a reader finds all of it or none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(f".{os.getpid()}.tmp")
    scratch.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(scratch, file)
