"""Replay: bits do not depend on the machine's threads, and what is damaged does not pass for the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import assert_same_weights, load_base, tiny_llama, trainer_of, weights_of

from hf_zo import Trajectory, TrajectoryError, replay
from hf_zo.trajectory import LOG_NAME, Step, projected_gradients


def test_replay_does_not_depend_on_threads(run: Path) -> None:
    final = weights_of(load_base(run).from_pretrained(run / "out"))
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        assert_same_weights(weights_of(replay(load_base(run), Trajectory.read(run / "out"))), final)


def test_until(run: Path) -> None:
    """The weights after k steps are those of a run that is stopped there, schedule included."""
    trajectory = Trajectory.read(run / "out")
    walked: list[int] = []
    short = replay(load_base(run), trajectory, until=4, on_step=walked.append)
    assert walked == [0, 1, 2, 3]
    header = {key: value for key, value in trajectory.header.items() if key != "final_hash"}
    again = replay(load_base(run), Trajectory(header, trajectory.steps[:4]))
    assert_same_weights(weights_of(short), weights_of(again))
    with pytest.raises(AssertionError, match="differ"):
        assert_same_weights(weights_of(short), weights_of(replay(load_base(run), trajectory)))


def test_a_damaged_loss_does_not_pass_for_the_run(run: Path) -> None:
    trajectory = Trajectory.read(run / "out")
    step = trajectory.steps[5]
    trajectory.steps[5] = Step((step.losses[0] + 1e-7, *step.losses[1:]), step.learning_rates)
    with pytest.raises(TrajectoryError, match="differ from those of the run"):
        replay(load_base(run), trajectory)
    trajectory.steps[5] = Step(step.losses[:1], step.learning_rates)
    with pytest.raises(TrajectoryError, match=r"Step 5 .* too few losses"):
        replay(load_base(run), trajectory)
    trajectory.steps[5] = Step((*step.losses, 1.0), step.learning_rates)
    with pytest.raises(TrajectoryError, match=r"Step 5 .* more losses"):
        replay(load_base(run), trajectory)


def test_a_log_does_not_choose_what_is_imported(run: Path) -> None:
    trajectory = Trajectory.read(run / "out")
    trajectory.header["optimizer"] = "os.system"
    with pytest.raises(TrajectoryError, match=r"os\.system, which replay does not rebuild"):
        replay(load_base(run), trajectory)


def test_projected_gradients_are_those_that_were_logged(run: Path, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, "curvzo", max_steps=5)
    trainer.train()
    logged = [e["zo/projected_gradient"] for e in trainer.state.log_history if "zo/projected_gradient" in e]
    found = projected_gradients(Trajectory.read(tmp_path / LOG_NAME))
    assert [values[-1] for values in found] == pytest.approx(logged, rel=1e-12)


def test_skipped_steps_are_replayed_as_skipped(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, "mezo", zo_nonfinite="skip", max_steps=5)
    compute_loss = trainer.compute_loss

    def spoiled(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = compute_loss(*args, **kwargs)
        return loss * torch.nan if trainer.state.global_step == 2 else loss

    trainer.compute_loss = spoiled
    trainer.train()
    trainer.save_model()
    trajectory = Trajectory.read(tmp_path)
    assert [step.skipped for step in trajectory.steps] == [False, False, True, False, False]
    assert projected_gradients(trajectory)[2] == ()
    assert_same_weights(weights_of(replay(tiny_llama(), trajectory)), weights_of(trainer.model))
