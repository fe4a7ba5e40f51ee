"""From cells to a page: tables, learning curves and the verdicts on claims. Everything but `write_report` is pure."""

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

from .arms import ARMS, FORWARDS_PER_FIRST_ORDER_STEP, WITHOUT_OPTIONS, WITHOUT_STEPS
from .cell import DIVERGED, DIVERGED_AT_ONCE
from .claims import CLAIMS, Claim
from .progress import TOO_HIGH, best_multiplier, score_of

Result = Mapping[str, Any]
SIGNIFICANT = 0.05
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


def verdict(claim: Claim, tables: Tables) -> tuple[str, str]:
    """(what was measured, verdict) of a claim, over all tasks and seeds in which both of its arms were run.

    Seeds of one task share what is particular to it, so that they are no independent pairs: differences are averaged over
    tasks, seed by seed, and the test asks whether these means differ from the margin.
    """
    if not claim.better:
        return "", "cannot be tested here"
    by_task: dict[tuple[str, str], dict[int, list[float]]] = {}  # by grid and task, points by seed
    models: dict[str, set[str]] = {}  # by task
    spent: dict[str, list[float]] = {claim.better: [], claim.worse: []}
    seen = set()  # arms of the form base stand in several tables
    for (grid, task, _), of_table in tables.items():
        by_arm = {o.arm: o for o in of_table}
        better, worse = by_arm.get(claim.better), by_arm.get(claim.worse)
        if better is None or worse is None or better.cells is worse.cells or (id(better.cells), id(worse.cells)) in seen:
            continue
        seen.add((id(better.cells), id(worse.cells)))
        common = set(better.scores) & set(worse.scores)
        for seed in common:
            by_task.setdefault((grid, task), {}).setdefault(seed, []).append(better.scores[seed] - worse.scores[seed])
        if common:
            models.setdefault(task, set()).add(better.cells[0]["config"]["model"])
        for o in (better, worse):
            spent[o.arm] += [cell["forward_passes"] for cell in o.cells if cell["config"]["seed"] in common]
    seeds = set.intersection(*map(set, by_task.values())) if by_task else set()
    if not seeds:
        return "", "not run"
    means = [fmean(fmean(of_task[seed]) for of_task in by_task.values()) for seed in sorted(seeds)]
    test = paired(means, [0.0] * len(means), claim.margin)
    where = "1 task" if len(models) == 1 else f"{len(models)} tasks"
    if (count := len(set.union(*models.values()))) > 1:
        where += f", {count} models"
    measured = f"{test.mean:+.1f} ± {_number(test.error)} points on {where}, p = {_number(test.p, 3)}"
    ours, theirs = (fmean(spent[arm]) for arm in (claim.better, claim.worse))
    if min(ours, theirs) < 0.9 * max(ours, theirs):
        measured += f"; {ours:,.0f} against {theirs:,.0f} forward passes"
    if math.isnan(test.p):
        return measured, "too few runs"
    if test.p >= SIGNIFICANT:
        return measured, "not reproduced: undecided"
    return measured, "reproduced" if test.mean > claim.margin else "not reproduced: the opposite"


# ---- the page ----------------------------------------------------------------------------------------------------------


def table(of_table: Sequence[Outcome], tuned: bool = True) -> str:
    """A Markdown table of outcomes; ``tuned`` adds the multiplier and what a run cost."""
    baseline = next((o for o in of_table if o.arm == BASELINE), None)
    head = ["arm", "score", "seeds", "against MeZO", "p", "forward passes"]
    head += ["rate (multiplier)", "seconds", "peak MB", "diverged"] if tuned else []
    lines = [_row(head), _row(["---"] * len(head))]
    for o in of_table:
        mean, error = mean_and_error(list(o.scores.values()))
        score = f"{mean:.1f} ± {_number(error)}" if o.scores else f"{_number(o.development)} (development)"
        test = compared(o, baseline)
        cells = [f"{o.label} (here: {o.same_as})" if o.same_as else o.label, score, str(len(o.scores))]
        cells += [f"{test.mean:+.1f} ± {_number(test.error)}", _number(test.p, 3)] if test else ["", ""]
        cells.append(_mean_of(o.cells, "forward_passes"))
        if tuned:
            rate = "" if o.rate is None else f"{o.rate:.2g} ({o.multiplier:g}{', **edge**' if o.edge else ''})"
            timed = [cell for cell in o.cells if "bfloat16" not in cell["environment"]]  # see `ProductsInFp32`
            seconds = _mean_of([cell for cell in timed if cell["train_seconds"]], "train_seconds")
            cells += [rate, seconds, _mean_of(timed, "peak_megabytes")]
            cells.append(f"{o.diverged} of {len(o.cells)}" if o.cells else "")
        lines.append(_row(cells))
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _number(value: float | None, digits: int = 1) -> str:
    return "?" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _mean_of(cells: Sequence[Result], key: str) -> str:
    return f"{fmean(cell[key] for cell in cells):,.0f}" if cells else ""


def claims_table(tables: Tables) -> str:
    """The claims, what was measured, and the verdicts, as Markdown."""
    head = ["claim", "source", "measured", "verdict", "what theory says"]
    lines = [_row(head), _row(["---"] * len(head))]
    lines += [_row([c.text, c.source, *verdict(c, tables), c.reason]) for c in CLAIMS]
    return "\n".join(lines)


def curve(cells: Sequence[Result]) -> list[tuple[float, float]]:
    """(forward passes, mean score in points) at the checkpoints that all runs of an arm reached."""
    most = max((cell["forward_passes"] for cell in cells), default=0)
    points = []
    for cell in cells:
        of_run = [(e["forwards"], 100 * e["score"]) for e in cell["evaluations"]]
        # A run that broke off was evaluated once more there.
        broke_off = cell["status"] != "ok" and cell["forward_passes"] < most
        points.append(of_run[:-1] if broke_off else of_run)
    return [(fmean(x for x, _ in at), fmean(y for _, y in at)) for at in zip(*points, strict=False)]


def page(results: Sequence[Result], figures: Mapping[str, str]) -> str:
    """The whole page; ``figures`` are the files of the learning curves by grid."""
    tables = outcomes(results)
    parts = [_INTRODUCTION]
    if not tables:
        parts.append("No cell has been run yet.")
    for (model, form, tasks), means in over_tasks(tables).items():
        parts.append(f"## Mean of {', '.join(tasks)}: {model}, {form}\n\n{table(means, tuned=False)}")
    for grid in dict.fromkeys(key[0] for key in tables):
        of_grid = next(r["config"] for r in results if r["config"]["grid"] == grid)
        parts.append(f"## {grid}\n\n{_conditions(of_grid)}")
        if grid in figures:
            parts.append(f"![Scores against forward passes, one panel per task and form]({figures[grid]})")
        for (_, task, form), of_table in ((key, value) for key, value in tables.items() if key[0] == grid):
            metric = next(r["metric"] for r in results if (r["config"]["grid"], r["config"]["task"]) == (grid, task))
            parts.append(f"### {task} ({metric}), {form}\n\n{table(of_table)}")
    parts.append(f"## Claims\n\n{_CLAIMS}\n\n{claims_table(tables)}")
    return "\n\n".join(parts) + "\n"


def _conditions(c: Mapping[str, Any]) -> str:
    return (
        f"Model {c['model']}, {c['budget']:,} forward passes of batches of {c['batch_size']}, {c['train_samples']:,} training "
        f"and {c['dev_samples']:,} development rows, {'all' if c['eval_samples'] is None else c['eval_samples']} validation "
        f"rows, {c['dtype']}, {c['schedule']} schedule."
    )


_INTRODUCTION = f"""# Does it learn?

Written by `make learning-report` from the JSON files in `results/learning/`; `learning.py` explains how they are made.

Scores are points (100 times the metric) on the validation split at the end of the run, mean ± standard error over seeds; of
arms that have only been tuned, the best on development rows. Seeds draw training rows, their order, first adapter values and
directions. Each arm's learning rate is one of the same multipliers of its own published or recommended one, chosen on
development rows with another seed: the one with the lowest loss among those that score within a standard error of the best.
The search goes from the middle of the multipliers to both sides while rates get better: not beyond one that diverged or ended
at {TOO_HIGH:g} times the lowest loss, nor beyond two that are not the best. **edge** marks an end of the multipliers that were
tried. Differences to MeZO are paired by seed, p is of the paired t-test.

The budget counts forward passes of a batch: a step of a first-order arm counts {FORWARDS_PER_FIRST_ORDER_STEP}, ZO-Act's
calibration and the passes over the training rows that probes need count too, evaluations do not. Seconds are those of
training, of what is calibrated and fitted before it, and of evaluations on the way, where they were measured; peak memory is
that of the whole process. A run has diverged if a loss was not finite, or if the last tenth of its losses is above
{DIVERGED:g} times the first tenth, or {DIVERGED_AT_ONCE:g} times the very first; it counts with the score it ended at. Cells
in bfloat16 on a processor that is faster in fp32 multiply in it and round the result, and say so; their seconds and memory,
which are not those of bfloat16, are left out of the tables. Processors and revisions differ from cell to cell
(`environment`), so seconds are no comparison of arms. Arms that train nothing, or what is
fitted before the first step alone, and ZO-Act, which brings its adapter, stand in the table of every form."""

_CLAIMS = f"""Differences of paired runs, averaged over tasks seed by seed (a task of each grid counts once, forms averaged):
mean ± standard error over seeds. Reproduced, or the opposite: the difference exceeds what is claimed (0 unless it says more),
or falls short of it, with p < {SIGNIFICANT:g} in the t-test over seeds; else it is undecided, as with three seeds all but large
differences are. Forward passes stand where the arms did not take equally many."""


def draw(grid: str, tables: Tables, file: Path) -> bool:
    """Learning curves of a grid, a panel per task and form; False if no final run is there."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    panels = {key[1:]: value for key, value in tables.items() if key[0] == grid and any(o.cells for o in value)}
    if not panels:
        return False
    forms, tasks = (list(dict.fromkeys(key[i] for key in panels)) for i in (1, 0))
    width = max(8.0, 5.5 * len(tasks))
    figure, axes = plt.subplots(len(forms), len(tasks), figsize=(width, 4 * len(forms)), squeeze=False)
    for axis in axes.flat:
        axis.set_visible(False)
    arms = list(dict.fromkeys(o.arm for value in panels.values() for o in value))
    colours = plt.get_cmap("tab20")
    for (task, form), of_table in panels.items():
        axis = axes[forms.index(form)][tasks.index(task)]
        axis.set_visible(True)
        for o in (o for o in of_table if not o.same_as):
            points = curve(o.cells)
            colour = colours(arms.index(o.arm) % 20)
            if any(passes for passes, _ in points):
                axis.plot(*zip(*points, strict=True), color=colour, label=o.label, linewidth=1.3, marker="o", markersize=4)
            elif points:  # nothing was trained
                axis.axhline(points[0][1], color=colour, label=o.label, linewidth=1, linestyle="--")
        axis.set_xlim(left=0)
        axis.set_title(f"{task}, {form}")
        axis.set_xlabel("forward passes")
        axis.set_ylabel("score")
        axis.grid(alpha=0.3)
    legend = {label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=int(width / 2.7), fontsize=8)
    figure.set_layout_engine("constrained")
    figure.savefig(file, dpi=110)
    plt.close(figure)
    return True


def write_report(results_folder: Path, output: Path) -> None:
    """Write the page, and one figure per grid beside its cells' folder."""
    results = read_results(results_folder)
    tables = outcomes(results)
    figures = {}
    for grid in dict.fromkeys(key[0] for key in tables):
        file = results_folder / f"{grid}.png"
        if draw(grid, tables, file):
            try:
                figures[grid] = file.resolve().relative_to(output.resolve().parent).as_posix()
            except ValueError:
                figures[grid] = str(file)
    output.write_text(page(results, figures), encoding="utf-8")
    print(output)
