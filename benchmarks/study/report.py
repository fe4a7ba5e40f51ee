"""From outcomes to a page: tables, learning curves and the verdicts on claims. Everything but `write_report` is pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from .arms import FORWARDS_PER_FIRST_ORDER_STEP
from .cell import DIVERGED, DIVERGED_AT_ONCE
from .claims import CLAIMS, Claim
from .outcomes import BASELINE, Outcome, Result, Tables, compared, mean_and_error, outcomes, over_tasks, paired, read_results
from .progress import TOO_HIGH

SIGNIFICANT = 0.05


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


def _conditions(c: Result) -> str:
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
