"""Promises 4 and 5 with real processes: gloo ranks, and SIGKILL.

Starting a process costs seconds, so all runs of two ranks share one launch, and what needs no process of its own (the run of
one process, the uninterrupted run, the resumed run) happens here.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import (
    CASES,
    COMBINATIONS,
    FORMS,
    LOSS_NOISE,
    Recorder,
    assert_same_weights,
    relative_distance,
    trained_of,
    trainer_of,
    weights_of,
)
from test_head import trainer as fitting_trainer

from hf_zo import Trajectory
from hf_zo.trajectory import LOG_NAME

WORKER = str(Path(__file__).parent / "worker.py")
STEPS = 4
FITS = {"zo_fit_depth": True, "zo_parallel": "directions", "learning_rate": 1e-3}
SAME = {"max_steps": STEPS, "learning_rate": 1e-3, "zo_eps": 0.5}

pytestmark = pytest.mark.slow
every_case = pytest.mark.parametrize("case", CASES)
every_combination = pytest.mark.parametrize(("case", "form"), COMBINATIONS)
every_form = pytest.mark.parametrize("form", FORMS)


def _job(case: str, form: str, output_dir: Path, **options: Any) -> dict[str, Any]:
    output_dir.mkdir(parents=True, exist_ok=True)
    return {"case": case, "form": form, "output_dir": str(output_dir), "options": options}


def _jobs(folder: Path, jobs: list[dict[str, Any]]) -> str:
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    return str(file)


def _final(output_dir: Path, rank: int) -> dict[str, Any]:
    return torch.load(output_dir / f"final-{rank}.pt", weights_only=True)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the results of all runs on two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    jobs = [
        _job(case, form, folder / f"{parallel}-{case}-{form}", zo_parallel=parallel, **SAME)
        for case, form in COMBINATIONS
        for parallel in ("data", "directions")
    ]
    jobs += [_job("mezo", form, folder / f"skip-{form}", zo_nonfinite="skip", infinite_on_rank=1) for form in FORMS]
    jobs += [_job("mezo", "full", folder / f"parting-{rank}", parting_rank=rank) for rank in (1, 2)]
    jobs.append(_job("fits", "full", folder / "fits", **FITS))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    done = subprocess.run([*launch, WORKER, _jobs(folder, jobs)], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


@every_combination
@pytest.mark.parametrize("parallel", ["data", "directions"])
def test_two_ranks_equal_one_process(case: str, form: str, parallel: str, two_ranks: Path, tmp_path: Path) -> None:
    """Promise 4: on the pooled batch (data) or on the same batch (directions); only losses cross the wire."""
    single = trainer_of(tmp_path, case, form, per_device_train_batch_size=8 if parallel == "data" else 4, **SAME)
    start = trained_of(single.model)
    single.train()
    ranks = [_final(two_ranks / f"{parallel}-{case}-{form}", rank) for rank in range(2)]
    assert_same_weights(ranks[0]["weights"], ranks[1]["weights"])
    distance = relative_distance(trained_of(single.model), ranks[0]["weights"], start)
    assert distance < 1e-4 * LOSS_NOISE.get(case, 1.0)
    losses = [[e["loss"] for e in log if "loss" in e] for log in (single.state.log_history, *(r["log"] for r in ranks))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[1] == losses[2]
    assert not ranks[0]["ddp"]
    # Of examples with directions of their own, every loss: of 4 probes for 8 or 4 of them.
    assert 0 < ranks[0]["carried"] <= (300 if "per-example" in case else 64) * STEPS
    if (case, parallel) == ("mezo", "data"):  # two losses and their weight
        assert ranks[0]["carried"] == 24 * STEPS


def test_two_ranks_start_from_one_fit(two_ranks: Path, tmp_path: Path) -> None:
    """Output layer, middle blocks and basis: those that rank 0 has made, the same as a process alone makes."""
    single = fitting_trainer(tmp_path, **FITS)
    untrained = weights_of(single.model)
    single.train()
    ranks = [_final(two_ranks / "fits", rank) for rank in range(2)]
    assert_same_weights(ranks[0]["weights"], ranks[1]["weights"])
    moved = {name: p for name, p in weights_of(single.model).items() if not torch.equal(p, untrained[name])}
    assert any("lm_head" in name for name in moved)
    assert relative_distance(moved, ranks[0]["weights"], untrained) < 1e-4


@every_form
def test_ranks_skip_together(form: str, two_ranks: Path) -> None:
    """An infinite loss on one rank is skipped by both, once, and they stay equal."""
    first, second = _final(two_ranks / f"skip-{form}", 0), _final(two_ranks / f"skip-{form}", 1)
    assert first["skipped"] == second["skipped"] == 1
    assert_same_weights(first["weights"], second["weights"])
    assert all(entry["loss"] > 0 for entry in first["log"] if "loss" in entry)


def test_ranks_that_part_are_stopped(two_ranks: Path) -> None:
    """The weights of one rank are changed after the first step; the check of the third one finds it. There is no rank 2."""
    for rank in range(2):
        assert "The processes' weights differ" in _final(two_ranks / "parting-1", rank)["told"]
        assert "step 2)" in _final(two_ranks / "parting-1", rank)["told"]
        assert not _final(two_ranks / "parting-2", rank)["told"]


@pytest.fixture(scope="module")
def forking() -> Iterator[Any]:
    """A process that has everything imported and forks for each job."""
    with subprocess.Popen(
        [sys.executable, WORKER, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


@every_combination
def test_sigkill_at_a_random_moment_and_resume(case: str, form: str, forking: Any, tmp_path: Path) -> None:
    """Promise 5: killed without warning and resumed, the run ends bitwise where the uninterrupted one ends."""
    options: dict[str, Any] = {"max_steps": 8, "save_strategy": "steps", "save_steps": 1}
    whole = trainer_of(tmp_path / "whole", case, form, torch.bfloat16, **options)
    whole.train()
    chance = random.Random(f"{case} {form}")
    deadly_step, delay = chance.randint(1, 6), chance.uniform(0, 0.05)
    job = _job(case, form, tmp_path / "killed", dtype="bfloat16", **options)
    print(json.dumps(job), file=forking.stdin, flush=True)
    pid = 0
    for line in forking.stdout:
        word, _, value = line.strip().partition(" ")
        if word == "pid":
            pid = int(value)
        elif word == "step" and int(value) == deadly_step:
            time.sleep(delay)
            os.kill(pid, signal.SIGKILL)
        elif word == "ended":
            assert int(value) == signal.SIGKILL
            break
    assert not (tmp_path / "killed" / "final-0.pt").exists()
    # A record is written with the step it belongs to: the kill loses at most the one in flight.
    logged = Trajectory.read(tmp_path / "killed" / LOG_NAME, cut_torn_end=True).steps
    assert deadly_step <= len(logged) <= options["max_steps"]
    resumed = trainer_of(tmp_path / "killed", case, form, torch.bfloat16, **options)
    # Killed in the first save there may be nothing complete to resume from: then the run starts anew.
    complete = any((tmp_path / "killed").glob("checkpoint-*/trainer_state.json"))
    resumed.train(resume_from_checkpoint=complete or None)
    assert_same_weights(weights_of(whole.model), weights_of(resumed.model))


def test_a_torn_checkpoint_is_left_out(tmp_path: Path) -> None:
    """A kill during a save leaves the newest folder without its state; resuming takes the one before."""
    options: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    whole = trainer_of(tmp_path, **options)
    whole.train()
    (tmp_path / "checkpoint-4" / "trainer_state.json").unlink()
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text('{"torn": ')
    resumed = trainer_of(tmp_path, **options)
    started: list[int] = []
    resumed.add_callback(Recorder(lambda hook, step, kwargs: started.append(step) if hook == "on_step_begin" else None))
    resumed.train(resume_from_checkpoint=True)
    assert started == [2, 3]
    assert_same_weights(weights_of(whole.model), weights_of(resumed.model))
