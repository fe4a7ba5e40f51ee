"""What a grid refuses before anything runs, which cells follow from it, and that every arm gets the same budget."""

from pathlib import Path

import pytest
from benchmarks.made_up import write_rows
from study.arms import ARMS
from study.cell import write_cell
from study.grid import Cell, GridError
from study.progress import best_multiplier, checked, rows_of, runnable, tuning
from study.reading import check_places, read_grid

GRIDS = Path(__file__).parents[2] / "benchmarks" / "grids"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budgets": 3}, "field 'budgets' does not exist; there are model, tasks, arms"),
        ({"budget": None}, "lacks budget"),
        ({"model": "gpt5"}, "model 'gpt5' does not exist; there are smollm2, encoder"),
        ({"tasks": ["sst3"]}, "task 'sst3' does not exist; there are sst2"),
        ({"forms": ["lorax"]}, "form 'lorax' does not exist; there are base, lora"),
        ({"arms": ["mezzo"]}, "arm 'mezzo' does not exist; there are zero-shot"),
        ({"arms": [{"name": "mine", "like": "mezzo"}]}, "arm 'mezzo' does not exist"),
        ({"arms": [{"name": "mine", "base": "mezo"}]}, "field of an arm 'base' does not exist; there are name, like"),
        ({"arms": [{"name": "Mine_1", "like": "mezo"}]}, "name='Mine_1' becomes part of file names"),
        ({"arms": [{"name": "lozo", "like": "mezo"}]}, "name='lozo' is taken"),
        ({"arms": [{"name": "mezo", "settings": {"zo_clip": 1}}]}, "name='mezo' is taken"),
        ({"arms": ["mezo", "zero-shot", "mezo"]}, "arms: mezo stands there more than once"),
        ({"arms": [{"name": "mine", "like": "mezo", "rate": "fast"}]}, "arm 'mine': rate='fast' must be a positive number"),
        ({"arms": [{"name": "none", "like": "zero-shot", "rate": 1}]}, "arm 'none' takes no steps, and so no rate=1"),
        ({"arms": [{"name": "mine", "like": "mezo", "settings": [1]}]}, r"arm 'mine': settings=\[1\] must be a mapping"),
        ({"arms": [{"name": "mine", "like": "mezo", "settings": {"zo_method": "auto"}}]}, r"zo_method \(set by `like`\)"),
        ({"arms": ["mezo", "depth-probe"], "tasks": ["squad"]}, "arm 'depth-probe' tells options apart, and none"),
        ({"settings": "zo_clip"}, "settings='zo_clip' must be a mapping"),
        ({"seeds": 3}, "seeds=3 must be a list"),
        ({"multipliers": 10}, "multipliers=10 must be a list"),
        ({"checkpoints": 1}, "checkpoints=1 must be a list"),
        ({"tasks": "sst2"}, "tasks='sst2' must be a list"),
        ({"model": ["smollm2"]}, r"model .* does not exist"),
        ({"arms": [{"name": "mine", "like": "mezo", "settings": {"zo_epsilon": 1}}]}, "'zo_epsilon' does not exist.*zo_eps"),
        ({"arms": [{"name": "mine", "like": "mezo", "settings": {"seed": 1}}]}, r"seed \(set by `seeds`\)"),
        (
            {"arms": [{"name": "mine", "like": "mezo", "settings": {"zo_eps": -1}}]},
            "'mine' cannot run: zo_eps must be a positive",
        ),
        ({"arms": [{"name": "mine", "like": "mezo", "settings": {"lozo_rank": 4}}]}, "lozo_rank=4 belongs to zo_method='lozo'"),
        ({"arms": [{"name": "none", "like": "zero-shot", "settings": {"zo_eps": 1}}]}, "trains nothing and takes no settings"),
        ({"arms": [5]}, "5 is neither the name of an arm nor a mapping"),
        ({"forms": ["lora"]}, r"arm 'zero-shot' has the forms base, none of forms=\['lora'\]"),
        ({"budget": 1}, "budget=1 holds no step of arm 'mezo', which takes 2"),
        ({"budget": 1.5}, "budget=1.5 must be a whole number"),
        ({"batch_size": True}, "batch_size=True must be a whole number"),
        ({"seeds": []}, r"seeds=\[\] must not be empty"),
        ({"seeds": [1, 1]}, r"seeds=\[1, 1\] must not .* twice"),
        ({"seeds": [0, 1]}, "tuning_seed=0 is one of seeds"),
        ({"seeds": [-1]}, "must be whole numbers from 0"),
        ({"multipliers": [0]}, "must be positive numbers"),
        ({"checkpoints": [2]}, "must be fractions of the budget"),
        ({"schedule": "sawtooth"}, "schedule 'sawtooth' does not exist; there are linear"),
        ({"dtype": "int8"}, "dtype 'int8' does not exist"),
        ({"model": "encoder", "arms": ["in-context", "mezo"]}, "arm 'in-context' needs prompts"),
        ({"model": "encoder", "tasks": ["copa"]}, "tasks copa have no plain text form"),
    ],
)
def test_a_grid_that_cannot_run_is_refused(study, changes, message):
    with pytest.raises(GridError, match=message):
        study(**changes)


def test_a_file_that_is_no_yaml(tmp_path):
    (tmp_path / "torn.yaml").write_text("model: [smollm2")
    with pytest.raises(GridError, match=r"torn\.yaml is no YAML"):
        read_grid(tmp_path / "torn.yaml")


def test_a_file_that_is_no_mapping(tmp_path):
    (tmp_path / "list.yaml").write_text("- mezo\n")
    with pytest.raises(GridError, match="holds no mapping"):
        read_grid(tmp_path / "list.yaml")


def test_missing_places_are_told_before_anything_runs(study, tmp_path):
    grid, folders = study()
    check_places(grid, folders)
    with pytest.raises(GridError, match=r"`hf-zo demo-model .*nowhere` writes it, or say where it is with --model"):
        check_places(grid, type(folders)(folders.results, tmp_path / "nowhere", folders.data))
    with pytest.raises(FileNotFoundError, match=r"has no train\.jsonl"):
        check_places(grid, type(folders)(folders.results, folders.model, tmp_path))
    with pytest.raises(GridError, match="dev_samples=40 leaves no training row: sst2 has 40"):
        check_places(*study(dev_samples=40))


def test_every_arm_spends_the_same_budget(study):
    arms = [name for name in ARMS if name not in ("zero-shot", "in-context", "linear-probe", "depth-probe")]
    grid, _ = study(arms=arms, forms=["base", "lora", "full"], budget=120, train_samples=32)
    per_step = {arm: 2 for arm in arms} | {"first-order": 3, "kerzoo": 6, "mezo-n3": 6, "richardson": 4}
    per_step |= {"bszo": 3, "bszo-fixed-noise": 3}
    calibrated = ("zo-act", "zo-act-sgd", "zo-act-per-example", "zo-act-one-block")
    once = dict.fromkeys(calibrated, 3 * 8)  # three passes over 32 rows in batches of 4
    once |= {"mezo-probe": 8, "zo-act-probe": 4 * 8, "auto": 4 * 8}  # a linear probe takes one; middle blocks are counted
    for task, form, arm in grid.groups():
        for phase, seed in (("tune", 0), ("final", 1)):
            cost = grid.cost(Cell(phase, task, form, arm, 1.0, seed))
            assert (cost.per_step, cost.once) == (per_step[arm], once.get(arm, 0)), arm
            assert 120 - cost.per_step < cost.total <= 120
            assert cost.at(0) == cost.once


def test_arms_that_train_nothing_cost_nothing(study):
    grid, _ = study(arms=["zero-shot", "in-context"])
    assert {grid.cost(cell).total for cell in grid.cells().values()} == {0}
    assert {cell.multiplier for cell in grid.cells().values()} == {1.0}


def test_arms_that_fit_middle_blocks_are_left_out_where_a_task_has_no_options(study):
    grid, _ = study(arms=["linear-probe", "depth-probe"], tasks=["sst2", "squad"], budget=40)
    assert [(task, arm) for task, _, arm in grid.groups()] == [
        ("sst2", "linear-probe"), ("sst2", "depth-probe"), ("squad", "linear-probe"),
    ]  # fmt: skip


def test_an_arm_that_the_first_task_leaves_out_is_checked_as_well(study):
    with pytest.raises(GridError, match="arm 'zo-act-probe' cannot run: budget=12 holds no step"):
        study(arms=["zero-shot", "zo-act-probe"], tasks=["squad", "sst2"], budget=12)


def test_a_linear_probe_costs_one_pass_and_is_not_tuned(study):
    grid, _ = study(arms=["linear-probe"])
    assert {grid.cost(cell).total for cell in grid.cells().values()} == {4}
    assert {cell.multiplier for cell in grid.cells().values()} == {1.0}


def test_names_tell_cells_apart_and_survive_another_grid(study):
    grid, _ = study(multipliers=[0.3, 1, 10])
    cells = grid.cells()
    assert len(cells) == 3 + 3 * 2 + 1 + 2  # mezo: tune and final; zero-shot
    assert "tune_sst2_lora_mezo_x0.3_seed0" in cells
    assert "final_sst2_base_zero-shot_x1_seed2" in cells
    assert all(cell.name == name for name, cell in cells.items())
    assert cells.items() <= study(multipliers=[0.1, 0.3, 1, 10, 30], tasks=["sst2", "sst5"])[0].cells().items()


def test_variants_of_an_arm(study):
    mine = {"name": "mine", "like": "mezo", "settings": {"zo_eps": 0.5}, "rate": 1e-2}
    grid, _ = study(arms=["zero-shot", "first-order", "mezo", mine], settings={"zo_clip": 3.0})
    ours, mezo, first = (
        grid.arguments(Cell("tune", "sst2", "lora", arm, 10, 4), "x", 7) for arm in ("mine", "mezo", "first-order")
    )
    assert (ours.zo_eps, ours.zo_clip, ours.learning_rate, ours.direction_seed, ours.max_steps) == (0.5, 3.0, 0.1, 4, 7)
    assert (mezo.zo_eps, mezo.zo_clip, mezo.learning_rate) == (None, 3.0, pytest.approx(1e-3))
    assert not hasattr(first, "zo_clip")
    assert grid.arms["mine"].label == "mine"


def test_development_rows_are_never_trained_on_and_tuning_opens_no_validation_split(study):
    grid, folders = study(train_samples=24)
    tuned = rows_of(grid, Cell("tune", "sst2", "lora", "mezo", 1.0, 0), folders.data)
    development = {row["sentence"] for row in tuned.scored}
    assert (len(tuned.train), len(development), tuned.split) == (24, 8, "dev")
    samples = []
    for seed in range(5):
        rows = rows_of(grid, Cell("final", "sst2", "lora", "mezo", 1.0, seed), folders.data)
        samples.append([row["sentence"] for row in rows.train])
        assert not development & set(samples[-1])
        assert (rows.split, len(rows.scored)) == ("validation", 12)
        assert all(row["sentence"].startswith("validation") for row in rows.scored)
    assert len({tuple(sample) for sample in samples}) == 5
    (folders.data / "sst2" / "validation.jsonl").unlink()
    again = rows_of(grid, Cell("tune", "sst2", "lora", "mezo", 10.0, 0), folders.data)
    assert (again.train, again.scored) == (tuned.train, tuned.scored)


def test_every_seed_is_scored_on_the_same_validation_rows(study):
    grid, folders = study(eval_samples=6)
    cells = (Cell("final", "sst2", "lora", "mezo", 1.0, seed) for seed in (1, 2))
    first, second = (rows_of(grid, cell, folders.data).scored for cell in cells)
    assert len(first) == 6
    assert first == second


def test_no_row_is_trained_on_whose_group_is_scored(study):
    grid, folders = study(tasks=["multirc"], dev_samples=10, train_samples=1000)
    questions = [{"paragraph": 0, "question": i // 4, "answer": i} for i in range(40)]
    answers = [{"paragraph": "p", "question": "q", "answer": "a", "label": i % 2, "idx": q} for i, q in enumerate(questions)]
    for split in ("train", "validation"):
        write_rows(folders.data / "multirc", split, answers)
    rows = rows_of(grid, Cell("tune", "multirc", "lora", "mezo", 1.0, 0), folders.data)
    questions = [[row["idx"]["question"] for row in of_rows] for of_rows in (rows.train, rows.scored)]
    assert len(questions[1]) == 12  # whole questions, as exact match wants them
    assert len(rows.train) == 28
    assert not set(questions[0]) & set(questions[1])


def result_of(grid, cell, score, loss=1.0, status="ok"):
    evaluations = [{"forwards": 12, "split": "dev", "loss": loss, "score": score}]
    return {"config": grid.config(cell), "status": status, "evaluations": evaluations}


def test_the_best_multiplier_did_not_diverge_and_has_the_lowest_loss_of_those_that_score_alike(study):
    grid, _ = study(multipliers=[1, 3, 10, 30], dev_samples=25)  # a standard error of 0.1
    small, middle, large, wild = grid.tune_cells(("sst2", "lora", "mezo"))
    scores = [result_of(grid, small, 0.55, 0.7), result_of(grid, middle, 0.7, 0.9), result_of(grid, large, 0.65, 0.8)]
    assert best_multiplier([*scores, result_of(grid, wild, 0.9, status="diverged")]) == 10
    assert best_multiplier([result_of(grid, c, 0.9, status="diverged") for c in (wild, small, middle)]) == 1


def test_final_cells_wait_for_all_tuning_cells_of_their_arm(study):
    grid, folders = study(arms=["mezo"], forms=["lora"])
    low, high = grid.tune_cells(("sst2", "lora", "mezo"))
    assert runnable(grid, folders) == [low]
    write_cell(folders.file(grid, low), result_of(grid, low, 0.6))
    assert runnable(grid, folders) == [high]
    write_cell(folders.file(grid, high), result_of(grid, high, 0.8))
    assert runnable(grid, folders) == grid.final_cells(low.group, 10)
    assert runnable(grid, folders, ("tune",)) == []


@pytest.mark.parametrize(
    ("results", "following"),
    [
        ({}, 10),
        ({10: ("ok", 0.6)}, 30),
        ({3: ("ok", 0.6), 30: ("ok", 0.6)}, 10),
        ({10: ("ok", 0.9), 30: ("ok", 0.5)}, 100),  # one worse score may be chance
        ({10: ("ok", 0.6, 1.0), 30: ("ok", 0.6, 1.4)}, 100),
        ({10: ("ok", 0.6, 1.0), 30: ("ok", 0.6, 1.6)}, 3),
        ({3: ("ok", 0.6, 1.0), 10: ("ok", 0.6, 0.9), 30: ("ok", 0.6, 1.6)}, None),
        ({10: ("ok", 0.9), 30: ("ok", 0.5), 100: ("ok", 0.55)}, 3),
        ({10: ("ok", 0.6, 0.7), 30: ("ok", 0.6, 0.8), 100: ("ok", 0.65, 0.9)}, 3),
        ({3: ("ok", 0.6, 0.9), 10: ("ok", 0.6, 0.8), 30: ("ok", 0.55, 0.7)}, 100),
        ({3: ("ok", 0.5), 10: ("ok", 0.9), 30: ("ok", 0.55), 100: ("ok", 0.5)}, None),
        ({10: ("ok", 0.6, 0.9), 30: ("ok", 0.6, 0.8), 100: ("diverged", 0.5)}, 3),  # all may be too large
        ({3: ("ok", 0.6, 1.0), 10: ("ok", 0.6, 0.9), 30: ("ok", 0.6, 0.8), 100: ("diverged", 0.5)}, None),
        ({3: ("ok", 0.5), 10: ("diverged", 0.9)}, 1),
        ({3: ("diverged", 0.5, None), 10: ("ok", 0.6, 0.9), 30: ("ok", 0.6, 0.8)}, 100),
        ({10: ("diverged", 0.5)}, 3),
        ({1: ("diverged", 0.5), 3: ("diverged", 0.6), 10: ("diverged", 0.6)}, None),
    ],
)
def test_rates_are_tried_from_the_middle_while_they_get_better(study, results, following):
    grid, folders = study(arms=["mezo"], forms=["lora"], multipliers=[30, 10, 3, 1, 100])
    cells = {cell.multiplier: cell for cell in grid.tune_cells(("sst2", "lora", "mezo"))}
    for multiplier, (status, *told) in results.items():
        write_cell(folders.file(grid, cells[multiplier]), result_of(grid, cells[multiplier], *told, status=status))
    there, cell = tuning(grid, folders, cells[1].group)
    assert [result["config"]["multiplier"] for result in there] == sorted(results)
    assert cell == cells.get(following)
    final = [] if following else grid.final_cells(cells[1].group, best_multiplier(there))
    assert runnable(grid, folders) == [cell for cell in (cell, *final) if cell is not None]


def test_a_result_of_other_conditions_is_refused(study):
    grid, folders = study()
    cell = grid.tune_cells(("sst2", "lora", "mezo"))[0]
    write_cell(folders.file(grid, cell), result_of(grid, cell, 0.6))
    assert checked(grid, folders, cell)["evaluations"][0]["score"] == 0.6
    wider, _ = study(multipliers=[0.1, 1, 10], seeds=[1, 2, 3])
    assert checked(wider, folders, cell) is not None
    changed, _ = study(batch_size=2)
    with pytest.raises(GridError, match=r"batch_size: 4 there, 2 in the grid.*Rename the grid"):
        runnable(changed, folders)


@pytest.mark.parametrize("file", sorted(GRIDS.glob("*.yaml")), ids=lambda file: file.stem)
def test_committed_grids_can_be_read(file):
    grid = read_grid(file)
    if file.stem == "encoder":
        assert set(grid.arms) == set(ARMS) - {"in-context"}
        assert grid.tasks == ("sst2", "sst5")
