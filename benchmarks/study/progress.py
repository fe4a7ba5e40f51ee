"""Where cells are kept, which rows they see, what has been run and what can run now."""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_zo.tasks import TASKS, load_rows

from .grid import Cell, Grid, GridError

TOO_HIGH = 1.5  # times the lowest development loss: where a rate ends there, larger ones are not tried
DEVELOPMENT_KEY = 7041  # of the draw of development rows, the same in every cell


@dataclass(frozen=True)
class Folders:
    """Where things are on this machine.

    Attributes:
        results: of all grids; a grid has a folder in it.
        model: written by save_pretrained.
        data: holds ``<task>/train.jsonl[.gz]`` and so on; None for the Hub.
    """

    results: Path
    model: Path
    data: Path | None = None

    def file(self, grid: Grid, cell: Cell) -> Path:
        """Result of a cell."""
        return self.results / grid.name / f"{cell.name}.json"


@dataclass(frozen=True)
class Rows:
    """Rows of a cell: ``scored`` are the development rows in phase ``tune``, the validation split in phase ``final``."""

    train: list[dict[str, Any]]
    scored: list[dict[str, Any]]
    split: str


def rows_of(grid: Grid, cell: Cell, data: Path | None) -> Rows:
    """Draw the rows of a cell.

    Development rows are cut off the training rows by a fixed key: no cell trains on them, nor, where a task has groups
    (MultiRC's questions), on others of their groups. A tuning cell does not open the validation split.

    Raises:
        GridError: if development rows would leave nothing to train on.
        ValueError: for bad rows, with file and line.
        FileNotFoundError: if a split is missing.
    """
    task, folder = TASKS[cell.task], data / cell.task if data else None
    everything = load_rows(task, "train", folder)
    groups: dict[Hashable, list[dict[str, Any]]] = {}
    for number, row in enumerate(everything):
        groups.setdefault(task.group(row) if task.group is not None else number, []).append(row)
    drawn, development = iter(np.random.default_rng(DEVELOPMENT_KEY).permutation(len(groups))), list[dict[str, Any]]()
    of_groups = list(groups.values())
    while len(development) < min(grid.dev_samples, len(everything)):
        development += of_groups[next(drawn)]
    rest = [row for i in drawn for row in of_groups[i]]
    if not rest:
        raise GridError(
            f"dev_samples={grid.dev_samples} leaves no training row: {cell.task} has {len(everything)}; give fewer."
        )
    sample = np.random.default_rng(cell.seed).permutation(len(rest))[: grid.train_samples]
    train = [rest[i] for i in sample]
    if cell.phase == "tune":
        return Rows(train, development, "dev")
    return Rows(train, load_rows(task, "validation", folder, grid.eval_samples, DEVELOPMENT_KEY), "validation")


def read_cell(file: Path) -> dict[str, Any] | None:
    """A finished cell, None if there is none."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def score_of(result: Mapping[str, Any]) -> float:
    """Score at the end of the run; the last one measured if it broke off."""
    return float(result["evaluations"][-1]["score"])


def best_multiplier(tuned: Sequence[Mapping[str, Any]]) -> float:
    """The multiplier with the lowest development loss among those whose score is within a standard error of the best.

    The standard error is that of a share near a half. Runs that diverged do not count; where all did it is the smallest. An
    arm that has nothing to tune has the multiplier 1.
    """
    if not tuned:
        return 1.0
    fine = [result for result in tuned if result["status"] == "ok"]
    if not fine:
        return min(float(result["config"]["multiplier"]) for result in tuned)
    least = max(map(score_of, fine)) - 0.5 / math.sqrt(fine[0]["config"]["dev_samples"])
    level = [result for result in fine if score_of(result) >= least]
    return float(min(level, key=lambda result: float(result["evaluations"][-1]["loss"]))["config"]["multiplier"])


def tuning(grid: Grid, folders: Folders, group: tuple[str, str, str]) -> tuple[list[dict[str, Any]], Cell | None]:
    """Tuning results of an arm, from small rates to large, and the cell to run next; None when it is tuned.

    The search starts in the middle. A larger rate is tried unless the largest one so far diverged or ended at `TOO_HIGH` times
    the lowest loss, or neither of the two largest is the best; a smaller one, while the smallest so far is the best, and once
    in any case: where all rates are too large, the best of them is a matter of luck. Nothing is run where there is no rate.

    Raises:
        GridError: if a result was made under other conditions than the grid now names.
    """
    cells = sorted(grid.tune_cells(group), key=lambda cell: cell.multiplier)
    results = [checked(grid, folders, cell) for cell in cells]
    there = [result for result in results if result is not None]
    if not grid.has_rate(group[2]):
        return there, None
    middle = (len(cells) - 1) // 2
    tried = [i for i, result in enumerate(results) if result is not None]
    if not there:
        return [], cells[middle]
    low, high = tried[0], tried[-1]
    missing = [cell for cell, result in zip(cells[low:high], results[low:high], strict=True) if result is None]
    if missing:
        return there, missing[0]
    if high + 1 < len(cells) and not _too_large(there):
        return there, cells[high + 1]
    smaller = low and (low >= middle or best_multiplier(there) == cells[low].multiplier)
    return there, cells[low - 1] if smaller else None


def _too_large(tuned: Sequence[Mapping[str, Any]]) -> bool:
    """Whether rates beyond these, from small to large, are not worth a run."""
    if tuned[-1]["status"] != "ok":
        return True
    losses = [result["evaluations"][-1]["loss"] for result in tuned if result["status"] == "ok"]
    worse = best_multiplier(tuned) not in (result["config"]["multiplier"] for result in tuned[-2:])
    return worse or losses[-1] > TOO_HIGH * min(losses)


def runnable(grid: Grid, folders: Folders, phases: Sequence[str] = ("tune", "final")) -> list[Cell]:
    """Cells without a result that can run now: of each arm the next one to tune it by, or all final ones once it is tuned.

    Without final cells, as in a pilot, arms that have no rate to tune are scored on development rows too.

    Raises:
        GridError: if a result was made under other conditions than the grid now names.
    """
    found: list[Cell] = []
    for group in grid.groups():
        tuned, following = tuning(grid, folders, group)
        if not tuned and "final" not in phases:
            following = following or grid.tune_cells(group)[0]
        if following is not None and "tune" in phases:
            found.append(following)
        if following is None and "final" in phases:
            final = grid.final_cells(group, best_multiplier(tuned))
            found += [cell for cell in final if checked(grid, folders, cell) is None]
    return found


def checked(grid: Grid, folders: Folders, cell: Cell) -> dict[str, Any] | None:
    """The result of a cell, None if there is none.

    Raises:
        GridError: if it was made under other conditions than the grid now names.
    """
    result = read_cell(folders.file(grid, cell))
    if result is None:
        return None
    wanted, there = grid.config(cell), result["config"]
    changed = [f"{k}: {there.get(k)!r} there, {v!r} in the grid" for k, v in wanted.items() if there.get(k) != v]
    if changed:
        raise GridError(
            f"{folders.file(grid, cell)} was made under other conditions ({'; '.join(changed)}). Rename the grid, or delete "
            "the file to run the cell again."
        )
    return result
