"""A grid names what is to be run; from it follow the cells, and what each of them costs.

A cell is one run: (phase, task, form, arm, multiplier, seed). Phase ``tune`` tries multipliers of an arm's learning rate with
one seed, from the middle outwards (`progress.tuning`), and is scored on development rows; phase ``final`` runs the best
multiplier with the other seeds and is scored on the validation split. Arms without a rate have only the latter.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from hf_zo import ZOTrainingArguments
from hf_zo.estimators import METHODS
from hf_zo.tasks import TASKS, Task
from hf_zo.tasks.finetune import ModelArguments

from .arms import FORMS, FORWARDS_PER_FIRST_ORDER_STEP, Arm

CALIBRATION_SWEEPS = 3  # passes of `hf_zo.adapters.calibrate` over its sequences
MIXED = {"bfloat16": "bf16", "float16": "fp16"}  # the Trainer's name of mixed precision

MODELS: dict[str, dict[str, Any]] = {
    "smollm2": {"head": "lm", "lora_target_modules": ["q_proj", "v_proj"]},
    "encoder": {"head": "classification", "lora_target_modules": ["query", "value"]},
}
"""The models of the study, as fields of `ModelArguments`; the folder of each is ``runs/<name>`` unless told otherwise."""


class GridError(ValueError):
    """A grid that cannot be run, with the field, its value and what there is instead."""


@dataclass(frozen=True)
class Cell:
    """One run."""

    phase: str
    task: str
    form: str
    arm: str
    multiplier: float
    seed: int

    @property
    def name(self) -> str:
        """Name of its file."""
        return f"{self.phase}_{self.task}_{self.form}_{self.arm}_x{self.multiplier:g}_seed{self.seed}"

    @property
    def group(self) -> tuple[str, str, str]:
        """What is tuned together."""
        return self.task, self.form, self.arm


@dataclass(frozen=True)
class Cost:
    """Forward passes of a batch of the training's size.

    Attributes:
        once: before the first step: ZO-Act's calibration, the passes of a fit.
        per_step: of a step.
        steps: as many as the budget holds.
    """

    once: int
    per_step: int
    steps: int

    def after(self, once: int, budget: int) -> Cost:
        """The cost when what comes before the first step has turned out to take ``once``: as many steps as are left."""
        return Cost(once, self.per_step, max(0, budget - once) // self.per_step if self.per_step else 0)

    @property
    def total(self) -> int:
        """Of the whole run."""
        return self.at(self.steps)

    def at(self, step: int) -> int:
        """After a step."""
        return self.once + self.per_step * step


@dataclass(frozen=True)
class Grid:
    """What is compared, and under which conditions.

    Attributes:
        name: of the folder of results; the grid file's stem.
        model: a key of `MODELS`.
        tasks: keys of `hf_zo.tasks.TASKS`.
        arms: by name.
        forms: keys of `FORMS`.
        multipliers: of every arm's learning rate.
        seeds: of the final cells: data sample, order, first adapter values and directions.
        budget: forward passes of a batch, per run.
        tuning_seed: of the tuning cells.
        batch_size: rows of a batch.
        train_samples: rows to train on, drawn by the seed; fewer where a task has fewer.
        dev_samples: development rows.
        eval_samples: validation rows; default all.
        checkpoints: fractions of the budget after which to evaluate; 1, the end, always belongs to them.
        schedule: of the learning rate.
        max_length: most tokens of a row.
        dtype: of the weights; not "auto", which depends on the machine: cells of a grid are compared. Where a first-order arm
            trains them all they are kept in fp32 and multiplied in 16 bits, which do not resolve AdamW's updates.
        lora_r, lora_alpha: of the LoRA forms.
    """

    name: str
    model: str
    tasks: tuple[str, ...]
    arms: Mapping[str, Arm]
    forms: tuple[str, ...]
    multipliers: tuple[float, ...]
    seeds: tuple[int, ...]
    budget: int
    tuning_seed: int = 0
    batch_size: int = 16
    train_samples: int = 1000
    dev_samples: int = 200
    eval_samples: int | None = None
    checkpoints: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    schedule: str = "linear"
    max_length: int = 256
    dtype: str = "float32"
    lora_r: int = 8
    lora_alpha: int = 16

    def has_rate(self, arm: str) -> bool:
        """Whether an arm takes steps, so that a learning rate is chosen for it."""
        return self.arms[arm].kind not in ("prompt", "probe")

    def tune_cells(self, group: tuple[str, str, str]) -> list[Cell]:
        """One per multiplier; a single one where there is no rate to tune."""
        task, form, arm = group
        multipliers = self.multipliers if self.has_rate(arm) else (1.0,)
        return [Cell("tune", task, form, arm, m, self.tuning_seed) for m in multipliers]

    def final_cells(self, group: tuple[str, str, str], multiplier: float) -> list[Cell]:
        """One per seed, at the chosen multiplier."""
        return [Cell("final", *group, multiplier, seed) for seed in self.seeds]

    def groups(self) -> list[tuple[str, str, str]]:
        """All (task, form, arm), a task after the other; an arm that needs options is left out where a task has none."""
        return [
            (task, form, name)
            for task in self.tasks
            for form in self.forms
            for name, arm in self.arms.items()
            if form in arm.rates and (TASKS[task].options is not None or not arm.needs_options)
        ]

    def cells(self) -> dict[str, Cell]:
        """Every cell that could be run, by name; of the final ones, those of one multiplier will be."""
        tune = [cell for group in self.groups() for cell in self.tune_cells(group)]
        final = [f for cell in tune for f in self.final_cells(cell.group, cell.multiplier)]
        return {cell.name: cell for cell in (*tune, *final)}

    def model_arguments(self, cell: Cell, folder: Path) -> ModelArguments:
        """The model of a cell."""
        lora = {"lora_r": self.lora_r, "lora_alpha": self.lora_alpha, "dtype": self.dtype}
        chosen = {**MODELS[self.model], **lora, **FORMS[cell.form]}
        if self._is_mixed(cell):
            chosen["dtype"] = "float32"
        if self.arms[cell.arm].fits_head and chosen["head"] == "lm":
            chosen["lora_target_modules"] = [*chosen["lora_target_modules"], "lm_head"]
        return ModelArguments(str(folder), **chosen)

    def cost(self, cell: Cell) -> Cost:
        """Forward passes of a cell as planned: those of a fit depend on the model, and are counted when it runs.

        Raises:
            GridError: if the budget holds no step.
        """
        arm = self.arms[cell.arm]
        if arm.kind == "prompt":
            return Cost(0, 0, 0)
        once, per_step = 0, FORWARDS_PER_FIRST_ORDER_STEP
        if arm.kind in ("zo", "probe"):
            arguments = self.arguments(cell, "unused", 1)
            per_step = METHODS[arguments.zo_method]({}, **arguments.estimator_kwargs()).forwards
            once = self._batches(arguments.zo_head_samples)
            if arm.kind == "probe":
                return Cost(once, 0, 0)
            if arguments.zo_method == "zo_act" and arguments.zo_act_basis == "activations":
                once += CALIBRATION_SWEEPS * self._batches(arguments.zo_act_samples)
        steps = (self.budget - once) // per_step
        if steps < 1:
            takes = f"{per_step} (and {once} before)"
            raise GridError(f"budget={self.budget} holds no step of arm {cell.arm!r}, which takes {takes}.")
        return Cost(once, per_step, steps)

    def _is_mixed(self, cell: Cell) -> bool:
        return self.arms[cell.arm].kind == "first-order" and cell.form == "full" and self.dtype in MIXED

    def _batches(self, samples: int) -> int:
        """Batches that so many training rows make."""
        return math.ceil(min(samples, self.train_samples) / self.batch_size)

    def arguments(self, cell: Cell, output_dir: str, steps: int) -> Any:
        """Training arguments of a cell: `ZOTrainingArguments`, or `TrainingArguments` for a first-order arm."""
        arm = self.arms[cell.arm]
        # Logits of 32 prompts with worked examples are 20 GB.
        evaluated = 8 if arm.demonstrations else max(32, 2 * self.batch_size)
        common: dict[str, Any] = {
            "output_dir": output_dir,
            "max_steps": steps,
            "learning_rate": arm.rates[cell.form] * cell.multiplier,
            "per_device_train_batch_size": self.batch_size,
            "per_device_eval_batch_size": evaluated,
            "lr_scheduler_type": self.schedule,
            "seed": cell.seed,
            "logging_steps": max(1, steps // 100),
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "remove_unused_columns": False,
            "logging_nan_inf_filter": False,  # a divergence must show
        }
        if arm.kind in ("zo", "probe"):
            return ZOTrainingArguments(**{**common, "zo_trajectory": False, **arm.settings})
        if arm.kind == "first-order":
            mixed = {MIXED[self.dtype]: True, "use_cpu": not torch.cuda.is_available()} if self._is_mixed(cell) else {}
            return TrainingArguments(**{**common, **mixed, **arm.settings})
        return ZOTrainingArguments(**{**common, "zo_trajectory": False})  # evaluates only

    def config(self, cell: Cell) -> dict[str, Any]:
        """What grid and study say of a cell; a result that was made under other conditions is refused. JSON types only.

        The code, the model's weights and the data are not among them: the first stands in a result as its ``revision``.
        """
        arm = self.arms[cell.arm]
        shared = ("model", "batch_size", "train_samples", "dev_samples", "eval_samples", "schedule", "max_length", "dtype")
        found = {
            "grid": self.name,
            **dataclasses.asdict(cell),
            **{name: getattr(self, name) for name in (*shared, "budget", "lora_r", "lora_alpha")},
            "checkpoints": list(self.checkpoints),
            "label": arm.label,
            "kind": arm.kind,
            "rate": arm.rates[cell.form],
            "rate_source": arm.source,
            "settings": dict(arm.settings),
            "demonstrations": arm.demonstrations,
            "curvzo_share": arm.curvzo_share,
        }
        return json.loads(json.dumps(found))


def metric_of(task: Task) -> str:
    """The one number of a task that arms are compared by."""
    return "f1" if "exact_match" in task.metrics else task.metrics[0]
