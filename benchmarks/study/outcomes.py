"""What cells come to: scores of an arm by seed, means over tasks, and paired tests. All but `read_results` is pure."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from hf_zo.tasks import TASKS

from .arms import ARMS, WITHOUT_OPTIONS, WITHOUT_STEPS
from .progress import best_multiplier, score_of

Result = Mapping[str, Any]
BASELINE = "mezo"


@dataclass
class Outcome:
    """An arm on one task, or on the mean of several.

    Attributes:
        arm, label: its name, and as in the tables.
        multiplier: of its learning rate, see `best_multiplier`.
        edge: whether that is an end of the multipliers that were tried.
        rate: the learning rate it makes.
        scores: in points by seed, on the validation split.
        development: points on development rows, the best of all multipliers.
        cells: the final results behind them.
        same_as: label of the arm whose runs these are, where this one was not run but comes to the same.
    """

    arm: str
    label: str
    multiplier: float | None
    edge: bool
    rate: float | None
    scores: dict[int, float] = field(default_factory=dict)
    development: float | None = None
    cells: list[Result] = field(default_factory=list)
    same_as: str | None = None

    @property
    def diverged(self) -> int:
        """How many of the final runs did."""
        return sum(cell["status"] != "ok" for cell in self.cells)


Tables = Mapping[tuple[str, str, str], list[Outcome]]
"""Outcomes by (grid, task, form)."""


@dataclass(frozen=True)
class Paired:
    """Mean difference over pairs, its standard error and the two-sided p of the paired t-test; NaN with fewer than 2."""

    mean: float
    error: float
    p: float
    pairs: int


def paired(ours: Sequence[float], theirs: Sequence[float], margin: float = 0.0) -> Paired:
    """Compare two equally long lists of scores; the test asks whether the difference is ``margin``."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean, error = mean_and_error(differences)
    if len(differences) < 2:
        return Paired(mean, error, math.nan, len(differences))
    if error == 0:  # scores are shares of few rows: equal differences do not show that there is no noise
        return Paired(mean, error, 1.0 if mean == margin else math.nan, len(differences))
    return Paired(mean, error, two_sided_p((mean - margin) / error, len(differences) - 1), len(differences))


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; NaN where there are too few."""
    mean = fmean(values) if values else math.nan
    return mean, stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def two_sided_p(t: float, degrees: int) -> float:
    """Probability that Student's t with whole degrees of freedom exceeds ``|t|`` (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    if math.isnan(t):
        return math.nan
    angle = math.atan(abs(t) / math.sqrt(degrees))
    odd = degrees % 2
    term, total = math.cos(angle) if odd else 1.0, 0.0
    for k in range(odd, degrees - 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (k + 1) / (k + 2)
    inside = 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
    return min(1.0, max(0.0, 1 - inside))


def read_results(folder: Path) -> list[Result]:
    """All cells below a folder."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*/*.json"))]


def outcomes(results: Iterable[Result]) -> dict[tuple[str, str, str], list[Outcome]]:
    """Outcomes by (grid, task, form), in the order of `ARMS`; arms of the form ``base`` stand with every other form."""
    by_group: dict[tuple[str, str, str, str], list[Result]] = {}
    for result in results:
        config = result["config"]
        by_group.setdefault((config["grid"], config["task"], config["form"], config["arm"]), []).append(result)
    found: dict[tuple[str, str, str], list[Outcome]] = {}
    for (grid, task, form, _), group in by_group.items():
        found.setdefault((grid, task, form), []).append(outcome(group))
    for (grid, task, form), of_base in list(found.items()):
        others = [key for key in found if key[:2] == (grid, task) and key[2] != "base"]
        if form == "base" and others:
            for key in others:
                found[key] = [*found[key], *of_base]
            del found[grid, task, form]
    order = list(ARMS)
    for (_, task, _), of_table in found.items():
        of_table.extend(stand_ins(task, of_table))
        of_table.sort(key=lambda o: (order.index(o.arm) if o.arm in order else len(order), o.arm))
    return dict(sorted(found.items()))


def on_task(arm: str, task: str) -> str:
    """What an arm is on a task; see `WITHOUT_OPTIONS`."""
    return arm if TASKS[task].options is not None else WITHOUT_OPTIONS.get(arm, arm)


def stand_ins(task: str, of_table: Sequence[Outcome]) -> list[Outcome]:
    """Outcomes of arms that were not run, as they come to the same as others that were.

    `WITHOUT_STEPS` tells which others where the budget ends before the first step, `WITHOUT_OPTIONS` where a task has none.
    """
    there, by_arm = {o.arm for o in of_table}, {o.arm: o for o in of_table if o.cells}
    found = []
    for arm, fit in WITHOUT_STEPS.items():
        same = by_arm.get(on_task(arm, task))
        fitted = by_arm.get(on_task(fit, task))
        if same is None and fitted is not None:
            spent = all(cell["forward_passes"] >= cell["config"]["budget"] for cell in fitted.cells)
            same = fitted if spent else None
        if same is not None and arm not in there:
            found.append(replace(same, arm=arm, label=ARMS[arm].label, same_as=same.label))
    return found


def outcome(group: Sequence[Result]) -> Outcome:
    """One arm on one task in one form, from all its cells."""
    config = group[0]["config"]
    tuned = [r for r in group if r["config"]["phase"] == "tune"]
    tried = {float(r["config"]["multiplier"]) for r in tuned}
    best = best_multiplier(tuned) if tuned else None
    final = [r for r in group if r["config"]["phase"] == "final" and best in (None, r["config"]["multiplier"])]
    return Outcome(
        arm=config["arm"],
        label=config["label"],
        multiplier=best,
        edge=len(tried) > 1 and best in (min(tried), max(tried)),
        # Without a final run tuning may not have ended, and what is best so far is no choice.
        rate=None if best is None or not final or config["kind"] in ("prompt", "probe") else config["rate"] * best,
        scores={r["config"]["seed"]: 100 * score_of(r) for r in final},
        development=max((100 * score_of(r) for r in tuned), default=None),
        cells=final,
    )


def over_tasks(tables: Tables) -> dict[tuple[str, str, tuple[str, ...]], list[Outcome]]:
    """Means over tasks of a model, in all its grids, by (model, form, tasks): one list for every set of tasks of an arm.

    Tasks are those that the baseline was run on, each in the grid that has most arms of it. A list has all arms that were run
    on its tasks, over the seeds that they were run with on each. Where a task has no options, `WITHOUT_OPTIONS` tells which arm
    stands for one that needs them.
    """
    by_model: dict[tuple[str, str], dict[str, dict[str, Outcome]]] = {}
    for (_, task, form), of_table in tables.items():
        model = next((cell["config"]["model"] for o in of_table if o.arm == BASELINE for cell in o.cells), None)
        if model is not None:
            of_tasks = by_model.setdefault((model, form), {})
            of_tasks[task] = max(of_tasks.get(task, {}), {o.arm: o for o in of_table}, key=len)
    found: dict[tuple[str, str, tuple[str, ...]], list[Outcome]] = {}
    for (model, form), of_tasks in by_model.items():
        labels = {o.arm: o.label for by_arm in of_tasks.values() for o in by_arm.values()}
        there = {arm: _where(arm, of_tasks) for arm in labels}
        sets = sorted({tuple(t) for t in there.values() if len(t) > 1}, key=len, reverse=True)
        for tasks, (arm, label) in itertools.product(sets, labels.items()):
            parts = [there[arm][task] for task in tasks if task in there[arm]]
            seeds = set.intersection(*(set(o.scores) for o in parts)) if len(parts) == len(tasks) else set()
            if seeds:
                scores = {seed: fmean(o.scores[seed] for o in parts) for seed in sorted(seeds)}
                cells = [cell for o in parts for cell in o.cells]
                mean = Outcome(arm, label, None, False, None, scores, cells=cells)
                found.setdefault((model, form, tasks), []).append(mean)
    return found


def _where(arm: str, of_tasks: Mapping[str, Mapping[str, Outcome]]) -> dict[str, Outcome]:
    """The tasks that an arm, or what stands for it, was run on to the end, with what came of it."""
    same = {task: by_arm.get(arm, by_arm.get(on_task(arm, task))) for task, by_arm in of_tasks.items()}
    return {task: o for task, o in same.items() if o is not None and o.scores}


def compared(ours: Outcome, baseline: Outcome | None) -> Paired | None:
    """Paired by seed; None where there is no pair, or nothing to compare."""
    if baseline is None or ours.arm == baseline.arm:
        return None
    seeds = sorted(set(ours.scores) & set(baseline.scores))
    return paired([ours.scores[s] for s in seeds], [baseline.scores[s] for s in seeds]) if seeds else None
