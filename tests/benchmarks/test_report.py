"""The report's numbers, from cells made up for the purpose."""

import math
from pathlib import Path

import pytest
from study.arms import ARMS
from study.claims import CLAIMS, Claim
from study.outcomes import outcomes, over_tasks, paired, read_results, two_sided_p
from study.report import curve, draw, page, table, verdict, write_report

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def cell(
    arm, score, phase="final", seed=1, multiplier=1, form="lora", task="sst2", status="ok", forwards=20, grid="made-up", **more
):
    config = {
        "grid": grid, "task": task, "form": form, "arm": arm, "phase": phase, "seed": seed, "multiplier": multiplier,
        "label": ARMS[arm].label, "kind": ARMS[arm].kind, "rate": 1e-4, "model": "smollm2", "batch_size": 16,
        "train_samples": 1000, "dev_samples": 200, "schedule": "linear", "budget": 20,
        "eval_samples": None, "dtype": "bfloat16",
    }  # fmt: skip
    evaluations = [
        {"forwards": 0, "split": "dev", "loss": 1.0, "score": 0.5},
        {"forwards": forwards, "split": "dev", "loss": 0.5, "score": score},
    ]
    if ARMS[arm].kind == "prompt":
        evaluations = evaluations[1:]
    return {
        "config": config, "status": status, "metric": "accuracy", "evaluations": evaluations, "forward_passes": forwards,
        "train_seconds": 10.0 * seed, "peak_megabytes": 500, "environment": {}, **more,
    }  # fmt: skip


def tuned(arm, scores, **more):
    return [cell(arm, score, "tune", 0, m, **more) for m, score in scores.items()]


RESULTS = [
    *tuned("mezo", {1: 0.6, 3: 0.7, 10: 0.65}),
    *(cell("mezo", score, seed=seed, multiplier=3) for seed, score in ((1, 0.70), (2, 0.72), (3, 0.74))),
    cell("mezo", 0.99, seed=1, multiplier=10),  # of an earlier choice
    *tuned("kerzoo", {1: 0.6, 3: 0.61, 10: 0.65}),
    *(cell("kerzoo", score, seed=seed, multiplier=10) for seed, score in ((1, 0.60), (2, 0.64), (3, 0.68))),
    *tuned("zo-act", {1: 0.8}, form="base"),
    *(cell("zo-act", score, seed=seed, form="base") for seed, score in ((1, 0.75), (2, 0.78))),
    cell("zo-act", 0.5, seed=3, form="base", status="diverged"),
    *tuned("lozo", {1: 0.8, 3: 0.7}),
    cell("zero-shot", 0.55, "tune", 0, form="base"),
    *(cell("zero-shot", 0.55, seed=seed, form="base", forwards=0, train_seconds=0.0) for seed in (1, 2, 3)),
]


def by_arm():
    (of_table,) = outcomes(RESULTS).values()
    return {o.arm: o for o in of_table}


def test_outcomes_take_the_tuned_multiplier_and_flag_the_edge():
    found = by_arm()
    assert list(found) == ["zero-shot", "mezo", "lozo", "kerzoo", "zo-act"]
    assert (found["mezo"].multiplier, found["mezo"].edge, found["mezo"].rate) == (3, False, pytest.approx(3e-4))
    assert found["mezo"].scores == {1: 70, 2: 72, 3: 74}
    assert (found["kerzoo"].multiplier, found["kerzoo"].edge) == (10, True)
    assert (found["zo-act"].edge, found["zo-act"].diverged, found["zo-act"].scores[3]) == (False, 1, 50)
    assert (found["lozo"].multiplier, found["lozo"].edge, found["lozo"].scores) == (1, True, {})
    assert found["zero-shot"].rate is None


def test_the_development_score_is_the_best_of_all_multipliers():
    better, chosen = tuned("lozo", {1: 0.72, 3: 0.70})
    better["evaluations"][-1]["loss"] = 0.6  # the other one has 0.5
    (of_table,) = outcomes([better, chosen]).values()
    assert [(o.multiplier, o.development) for o in of_table] == [(3, 72)]


def test_seconds_and_memory_of_emulated_cells_are_left_out():
    emulated = {"environment": {"bfloat16": "products in fp32, rounded"}, "train_seconds": 999.0, "peak_megabytes": 9999}
    runs = [*tuned("mezo", {1: 0.6}), cell("mezo", 0.7, seed=1), cell("mezo", 0.7, seed=2, **emulated)]
    for results, shown in ((runs, ["10", "500"]), (runs[:1] + runs[2:], ["", ""])):
        (of_table,) = outcomes(results).values()
        assert [c.strip() for c in table(of_table).splitlines()[-1].strip("|").split("|")][7:9] == shown


def test_the_table():
    (of_table,) = outcomes(RESULTS).values()
    lines = {
        line.split(" | ")[0].strip("| "): [c.strip() for c in line.strip("|").split("|")]
        for line in table(of_table).splitlines()
    }
    assert lines["arm"][:3] == ["arm", "score", "seeds"]
    # scores 60, 64, 68: mean 64, standard deviation 4; against 70, 72, 74: -10, -8, -6
    t = -8 / (2 / math.sqrt(3))
    assert lines["KerZOO"] == [
        "KerZOO", "64.0 ± 2.3", "3", "-8.0 ± 1.2", f"{two_sided_p(t, 2):.3f}", "20", "0.001 (10, **edge**)", "20", "500",
        "0 of 3",
    ]  # fmt: skip
    assert lines["MeZO"][1:7] == ["72.0 ± 1.2", "3", "", "", "20", "0.0003 (3)"]
    assert lines["ZO-Act"][-1] == "1 of 3"
    assert lines["LoZO"][1:] == ["80.0 (development)", "0", *[""] * 7]  # no rate: tuning may not have ended
    assert lines["zero-shot"][6:8] == ["", ""]


@pytest.mark.parametrize(
    ("t", "degrees", "p"),
    [(12.706, 1, 0.05), (4.303, 2, 0.05), (3.182, 3, 0.05), (2.776, 4, 0.05), (2.228, 10, 0.05), (3.169, 10, 0.01),
     (63.657, 1, 0.01), (1.699, 29, 0.1), (0, 5, 1)],
)  # fmt: skip
def test_p_values_are_those_of_the_printed_tables(t, degrees, p):
    assert two_sided_p(t, degrees) == pytest.approx(p, rel=2e-3)
    assert two_sided_p(-t, degrees) == two_sided_p(t, degrees)
    assert math.isnan(two_sided_p(math.nan, degrees))


def test_paired_differences():
    test = paired([70.0, 72.0, 77.0], [69.0, 70.0, 74.0])
    assert (test.mean, test.pairs) == (2, 3)
    assert test.error == pytest.approx(1 / math.sqrt(3))
    assert test.p == pytest.approx(two_sided_p(2 * math.sqrt(3), 2))
    assert math.isnan(paired([70.0, 72.0], [69.0, 71.0]).p)
    assert paired([70.0, 72.0], [70.0, 72.0]).p == 1.0
    assert math.isnan(paired([70.0], [69.0]).p)
    assert paired([70.0, 72.0, 77.0], [69.0, 70.0, 74.0], margin=2.0).p == 1.0


def test_means_over_tasks_are_of_arms_that_ran_on_all_of_them():
    rte = {"task": "rte", "grid": "another"}
    other = [*tuned("mezo", {1: 0.5}, **rte), *(cell("mezo", 0.5 + s / 100, seed=s, **rte) for s in (1, 2))]
    begun = [*tuned("mezo", {1: 0.5}, task="cola"), cell("zero-shot", 0.5, task="cola", form="base")]  # no final baseline
    results = [*RESULTS, *other, *begun, cell("lozo", 0.6, **rte)]
    means = over_tasks(outcomes(results))
    assert "## Mean of rte, sst2: smollm2, lora" in page(results, {})
    assert list(means) == [("smollm2", "lora", ("rte", "sst2"))]
    ((mezo,),) = means.values()
    assert mezo.arm == "mezo"
    assert mezo.scores == {1: pytest.approx(60.5), 2: pytest.approx(62)}


def test_an_arm_that_was_only_tuned_on_a_task_keeps_its_mean_over_the_others():
    final = [cell(arm, 0.7, task=task) for arm, task in (("mezo", "sst2"), ("mezo", "rte"), ("mezo", "cola"))]
    final += [cell("lozo", 0.6, task=task) for task in ("sst2", "rte")]
    means = over_tasks(outcomes([*final, *tuned("lozo", {1: 0.5}, task="cola")]))
    assert {tasks: [o.arm for o in of_tasks] for (_, _, tasks), of_tasks in means.items()} == {
        ("cola", "rte", "sst2"): ["mezo"],
        ("rte", "sst2"): ["mezo", "lozo"],
    }


def test_a_task_counts_once_in_a_mean_from_the_grid_with_most_arms():
    rte = [*tuned("mezo", {1: 0.5}, task="rte"), cell("mezo", 0.4, task="rte")]
    for name in ("a-longer-run", "the-longer-run"):  # before and after the other grid
        longer = [*tuned("mezo", {1: 0.5}, grid=name), cell("mezo", 0.99, grid=name)]
        (means,) = over_tasks(outcomes([*RESULTS, *longer, *rte])).values()
        assert {o.arm: o.scores[1] for o in means} == {"mezo": pytest.approx((70 + 40) / 2)}


def test_where_a_task_has_no_options_a_probed_arm_counts_as_what_is_left_of_it():
    def three(arm, score, task, form="base"):
        return [*tuned(arm, {1: 0.5}, task=task, form=form), cell(arm, score, task=task, form=form, forwards=10)]

    sst2 = [*three("linear-probe", 0.7, "sst2"), *three("depth-probe", 0.9, "sst2"), *three("mezo", 0.6, "sst2", "lora")]
    squad = [*three("linear-probe", 0.4, "squad"), *three("mezo", 0.2, "squad", "lora")]
    for order in (sst2 + squad, squad + sst2):
        (means,) = over_tasks(outcomes(order)).values()
        assert {o.arm: pytest.approx(o.scores[1]) for o in means} == {"mezo": 40, "linear-probe": 55, "depth-probe": 65}
    rte = [*three("linear-probe", 0.6, "rte"), *three("mezo", 0.5, "rte", "lora")]  # has options: the probed arm was not run
    means = over_tasks(outcomes(sst2 + squad + rte))
    assert {tasks: {o.arm for o in of_tasks} for (_, _, tasks), of_tasks in means.items()} == {
        ("rte", "squad", "sst2"): {"mezo", "linear-probe"},
        ("squad", "sst2"): {"mezo", "linear-probe", "depth-probe"},
    }


def test_the_recipe_is_its_fit_where_that_takes_the_budget():
    def two(arm, score, task, form="base", **more):
        final = [cell(arm, score + seed / 100, seed=seed, task=task, form=form, **more) for seed in (1, 2)]
        return [*tuned(arm, {1: 0.5}, task=task, form=form), *final]

    sst2 = [*two("depth-probe", 0.8, "sst2", forwards=30), *two("mezo", 0.6, "sst2", "lora")]
    squad = [*two("linear-probe", 0.4, "squad", forwards=20), *two("mezo", 0.2, "squad", "lora")]
    tables = outcomes(sst2 + squad)
    found = {task: {o.arm: o for o in of_table} for (_, task, _), of_table in tables.items()}
    assert found["sst2"]["auto"].scores == found["sst2"]["depth-probe"].scores
    assert found["squad"]["auto"].scores == found["squad"]["linear-probe"].scores
    assert "| the recipe, zo_method=auto (here: linear probe) | 41.5 ± 0.5 |" in page(sst2 + squad, {})
    assert {o.arm: pytest.approx(o.scores[1]) for o in over_tasks(tables)["smollm2", "lora", ("squad", "sst2")]}["auto"] == 61
    claims = [Claim("", "", "auto", other) for other in ("mezo", "depth-probe")]
    assert [verdict(claim, outcomes(sst2))[0].partition(" points")[0] for claim in claims] == ["+20.0 ± 0.0", ""]
    begun = [*sst2, *tuned("auto", {1: 0.7}, form="base")]
    assert [o.scores for o in outcomes(begun)["made-up", "sst2", "lora"] if o.arm == "auto"] == [{}]
    short = [*two("depth-probe", 0.8, "sst2", forwards=10), *two("mezo", 0.6, "sst2", "lora")]  # room for steps
    for results in (short, [*short, cell("depth-probe", 0.8, seed=3, form="base", forwards=30)]):
        assert "auto" not in {o.arm for o in outcomes(results)["made-up", "sst2", "lora"]}


def test_verdicts():
    tables = outcomes(RESULTS)
    worse = Claim("x", "y", "kerzoo", "mezo")
    assert verdict(worse, tables) == (
        f"-8.0 ± 1.2 points on 1 task, p = {two_sided_p(-8 / (2 / 3**0.5), 2):.3f}",
        "not reproduced: the opposite",
    )
    assert verdict(Claim("x", "y", "mezo", "kerzoo"), tables)[1] == "reproduced"
    assert verdict(Claim("x", "y", "mezo", "kerzoo", margin=8.5), tables)[1] == "not reproduced: undecided"
    assert verdict(Claim("x", "y", "kerzoo", "mezo", margin=-20), tables)[1] == "reproduced"
    assert verdict(Claim("x", "y", "zo-act", "mezo"), tables)[1] == "not reproduced: undecided"  # within the noise
    assert verdict(Claim("x", "y", "bszo", "mezo"), tables) == ("", "not run")
    assert verdict(Claim("x", "y"), tables) == ("", "cannot be tested here")
    free = verdict(Claim("x", "y", "mezo", "zero-shot"), tables)[0]
    assert free.endswith(" against 0 forward passes")
    assert all(arm in ARMS for claim in CLAIMS for arm in (claim.better, claim.worse) if arm)


def test_curves_end_where_the_first_run_ends():
    runs = [cell("mezo", 0.7), {**cell("mezo", 0.9), "evaluations": cell("mezo", 0.9)["evaluations"][:1]}]
    assert curve(runs[:1]) == [(0, 50), (20, 70)]
    assert curve(runs) == [(0, 50)]
    # One that broke off was evaluated where it did, which is no checkpoint.
    broken = cell("mezo", 0.3, status="diverged", forwards=7)
    assert curve([runs[0], broken]) == [(0, 50)]
    assert curve([broken]) == [(0, 50), (7, 30)]  # alone, it ends there


def test_a_figure_tells_what_trains_nothing_from_what_was_scored_at_its_end_only(tmp_path, monkeypatch):
    from matplotlib import pyplot as plt

    fit = {
        **cell("linear-probe", 0.8, form="base", forwards=7),
        "evaluations": cell("mezo", 0.8, forwards=7)["evaluations"][1:],
    }
    other = [
        cell("mezo", 0.7),
        fit,
        cell("zero-shot", 0.5, form="base", forwards=0),
        cell("mezo", 0.6, form="full", task="rte"),
    ]
    monkeypatch.setattr(plt, "close", lambda figure: None)
    plt.figure()  # not this one
    assert draw("made-up", outcomes(other), tmp_path / "figure.png")
    figure = plt.gcf()
    panels = {axis.get_title(): axis for axis in figure.axes if axis.get_visible()}
    assert set(panels) == {"sst2, lora", "rte, full"}
    lines = {line.get_label(): list(map(float, line.get_xdata())) for line in panels["sst2, lora"].lines}
    assert lines == {"MeZO": [0, 20], "linear probe": [7], "zero-shot": [0, 1]}
    assert panels["sst2, lora"].get_xlim()[0] == 0


def test_the_page_says_what_was_not_run():
    empty = page([], {})
    assert "No cell has been run yet." in empty
    assert empty.count("| not run |") == sum(bool(claim.better) for claim in CLAIMS)
    full = page(RESULTS, {"made-up": "made-up.png"})
    assert "](made-up.png)" in full
    assert "### sst2 (accuracy), lora" in full
    assert "| KerZOO is better than MeZO |" in full
    assert "-8.0 ± 1.2 points on 1 task" in full


def test_the_report_is_written_with_its_figures(tmp_path):
    import json

    folder = tmp_path / "results" / "learning"
    (folder / "made-up").mkdir(parents=True)
    for i, result in enumerate(RESULTS):
        (folder / "made-up" / f"{i}.json").write_text(json.dumps(result))
    write_report(folder, tmp_path / "LEARNING.md")
    assert (folder / "made-up.png").stat().st_size > 10_000
    assert "](results/learning/made-up.png)" in (tmp_path / "LEARNING.md").read_text()


def test_a_verdict_averages_over_tasks_seed_by_seed():
    """What is particular to a task is no noise of seeds, and a task whose arms stand in two tables counts once."""
    differences = {"sst2": (0.10, 0.11, 0.12), "rte": (0.50, 0.51, 0.52)}
    results = []
    for task, of_seeds in differences.items():
        for arm, form in (("mezo", "lora"), ("mezo", "full"), ("linear-probe", "base")):
            results += tuned(arm, {1: 0.5}, task=task, form=form)
            plus = of_seeds if form == "base" else (0.0, 0.0, 0.0)
            results += [cell(arm, 0.2 + plus[s - 1], seed=s, task=task, form=form) for s in (1, 2, 3)]
    claim = Claim("x", "y", "linear-probe", "mezo")
    encoder = [{**r, "config": {**r["config"], "grid": "e", "model": "encoder"}} for r in results]
    assert verdict(claim, outcomes([*results, *encoder]))[0].startswith("+31.0 ± 0.6 points on 2 tasks, 2 models, p")
    measured, found = verdict(claim, outcomes(results))
    assert measured == f"+31.0 ± 0.6 points on 2 tasks, p = {two_sided_p(31 * 3**0.5, 2):.3f}"
    assert found == "reproduced"
    fewer = [r for r in results if (r["config"]["task"], r["config"]["seed"]) != ("rte", 3)]
    assert verdict(Claim("x", "y", "linear-probe", "mezo"), outcomes(fewer))[0].startswith("+30.5 ± 0.5 points on 2 tasks")


def test_the_committed_page_is_that_of_the_committed_cells():
    results = read_results(BENCHMARKS / "results" / "learning")
    grids = dict.fromkeys(r["config"]["grid"] for r in results)
    figures = {g: f"results/learning/{g}.png" for g in grids if (BENCHMARKS / "results" / "learning" / f"{g}.png").is_file()}
    assert page(results, figures) == (BENCHMARKS / "LEARNING.md").read_text(encoding="utf-8"), "run: make learning-report"
