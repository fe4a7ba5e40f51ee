"""The promises of the step, each over every method in full-parameter and adapter form.

A method joins by a row in `support.CASES`; `test_every_method_is_here` fails until it has one.
"""

from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import (
    AVERAGING,
    CASES,
    COMBINATIONS,
    FORMS,
    LOSS_NOISE,
    Recorder,
    Sentences,
    assert_same_weights,
    digest,
    model_of,
    relative_distance,
    settings_of,
    trained_of,
    trainer_of,
    weights_of,
)

from hf_zo import NonFiniteLossError, Trajectory, replay
from hf_zo.adapters import basis_of
from hf_zo.anatomy import adapted_layers
from hf_zo.directions import ExampleDirections, displace, space_of
from hf_zo.estimators import METHODS
from hf_zo.optimizer import ZOOptimizer

every_case = pytest.mark.parametrize("case", CASES)
every_combination = pytest.mark.parametrize(("case", "form"), COMBINATIONS)
every_form = pytest.mark.parametrize("form", FORMS)
exact_modes = pytest.mark.parametrize("restore", ["copy", "transient"])
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])


def test_every_method_is_here() -> None:
    assert {settings_of(case)["zo_method"] for case in CASES} == set(METHODS)


@every_combination
@every_dtype
@exact_modes
def test_restore_is_bitwise(case: str, form: str, dtype: torch.dtype, restore: str, tmp_path: Path) -> None:
    """Promise 1: between training_step and optimizer.step every weight is what it was; then it moves."""
    trainer = trainer_of(tmp_path, case, form, dtype, zo_restore=restore)
    seen: dict[str, list[str]] = {"on_step_begin": [], "on_pre_optimizer_step": [], "on_step_end": []}
    trainer.add_callback(
        Recorder(lambda hook, step, kwargs: seen[hook].append(digest(trainer.model)) if hook in seen else None)
    )
    trainer.train()
    assert seen["on_step_begin"] == seen["on_pre_optimizer_step"]
    assert all(a != b for a, b in zip(seen["on_step_begin"], seen["on_step_end"], strict=True))


@every_combination
@pytest.mark.parametrize("restore", ["copy", "transient"])
@pytest.mark.parametrize("failing_call", [1, 2])
def test_restore_after_an_error_between_probes(case: str, form: str, restore: str, failing_call: int, tmp_path: Path) -> None:
    """Promise 1: an out-of-memory error in a probe leaves clean weights."""
    trainer = trainer_of(tmp_path, case, form, torch.bfloat16, zo_restore=restore, max_steps=2)
    compute_loss, calls = trainer.compute_loss, [0]

    def failing(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = compute_loss(*args, **kwargs)
        if trainer.state.global_step == 1:  # the audit of the first step is over
            calls[0] += 1
            if calls[0] == failing_call:
                raise torch.OutOfMemoryError("no memory for this probe")
        return loss

    trainer.compute_loss = failing
    clean: list[str] = []
    trainer.add_callback(
        Recorder(lambda hook, step, kwargs: clean.append(digest(trainer.model)) if hook == "on_step_begin" else None)
    )
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train()
    assert calls[0] == failing_call
    assert digest(trainer.model) == clean[1]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in trainer.model.modules())


@every_combination
def test_what_is_probed_is_what_is_applied(case: str, form: str, tmp_path: Path) -> None:
    """Promise 2: the update of every tensor lies in the span of the displacements that were probed, at every step."""
    options: dict[str, Any] = {"max_steps": 5, "weight_decay": 0.0, "optim": "sgd", "learning_rate": 0.1}
    trainer = trainer_of(tmp_path, case, form, zo_restore="copy", **{**options, **AVERAGING.get(case, {})})
    trainer.create_optimizer()
    losses = trainer._runtime.losses
    probed: list[list[Any]] = []

    def recording(probes: Any, measure: Any) -> Any:
        probed[-1].extend(probes)
        return losses(probes, measure)

    trainer._runtime.losses = recording
    before: list[dict[str, torch.Tensor]] = []
    checked = []

    def see(hook: str, step: int, kwargs: Any) -> None:
        if hook == "on_step_begin":
            probed.append(list(probed[-1]) if case in AVERAGING and probed else [])
            before.append(weights_of(trainer.model))
        if hook == "on_optimizer_step":
            for name, p in trainer.model.named_parameters():
                if not p.requires_grad:
                    continue
                start = before[-1][name].double()
                update = (p.detach().double() - start).reshape(-1)
                zero = torch.zeros(p.shape, dtype=torch.float64)
                points = [terms for probe in probed[-1] for terms in _of_examples(probe.terms, name)]
                span = torch.stack([displace(torch.empty_like(zero), zero, name, terms).reshape(-1) for terms in points], 1)
                if not span.any():  # a block that was not selected
                    assert not update.any()
                    checked.append(name)
                    continue
                fit = torch.linalg.lstsq(span, update[:, None], driver="gelsd").solution
                missed = (update - (span @ fit)[:, 0]).norm()
                rounding = 1e-7 * start.norm()  # of the fp32 weights themselves
                assert missed < 1e-5 * update.norm() + rounding, (name, step, float(missed), float(update.norm()))
                assert update.norm() > 100 * rounding, (name, step)
                checked.append(name)

    trainer.add_callback(Recorder(see))
    trainer.train()
    assert len(checked) == 5 * sum(p.requires_grad for p in trainer.model.parameters())


def _of_examples(terms: Any, name: str) -> list[Any]:
    """What each example is displaced by, where they have directions of their own; else what all are."""
    if not any(isinstance(direction, ExampleDirections) for _, direction in terms):
        return [terms]
    ((a, family),) = terms
    return [[(a, family.weighted([float(e == example) for e in range(4)]))] for example in range(4)]


@every_combination
def test_accumulation_equals_one_large_batch(case: str, form: str, tmp_path: Path) -> None:
    """Promise 3: four micro-batches with different numbers of labelled tokens are one batch four times as large."""
    ends = []
    for size, steps in ((8, 1), (2, 4)):
        trainer = trainer_of(
            tmp_path,
            case,
            form,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            learning_rate=1e-3,
            zo_eps=0.5,
        )
        start = trained_of(trainer.model)
        trainer.train()
        ends.append((trained_of(trainer.model), [e["loss"] for e in trainer.state.log_history if "loss" in e]))
    (large, losses), (small, losses_small) = ends
    assert losses == pytest.approx(losses_small, rel=1e-6)
    # Losses of 4 differ by the order of summation, one fp32 ulp or 5e-7; over 2 eps = 1 that is 5e-7 of a projected
    # gradient of about 0.05.
    assert relative_distance(large, small, start) < 1e-4 * LOSS_NOISE.get(case, 1.0)


@every_combination
def test_random_states_are_isolated(case: str, form: str, tmp_path: Path) -> None:
    """Promise 7: python, numpy and torch draw the same numbers after a step as before."""
    trainer = trainer_of(tmp_path, case, form, max_steps=2)

    def draw(*_: Any) -> None:
        torch.rand(1), np.random.random(), random.random()

    trainer.model.register_forward_hook(draw)
    states: list[Any] = []

    def see(hook: str, step: int, kwargs: Any) -> None:
        if hook in ("on_step_begin", "on_step_end"):
            states.append((random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()))

    trainer.add_callback(Recorder(see))
    trainer.train()
    assert len(states) == 4
    assert states[0] == states[1]
    assert states[2] == states[3]


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_updates_below_one_ulp_are_not_lost(case: str, dtype: torch.dtype) -> None:
    """Promise 8: 200 updates of about 1e-6 move 16-bit weights of about 0.02 by the distance they add up to."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter((0.02 * torch.randn(400, 400)).to(dtype))
    start = weight.detach().double()
    settings = settings_of(case)
    keywords = {"num_directions": settings.get("zo_num_directions"), "direction": settings.get("zo_direction", "gaussian")}
    estimator = METHODS[settings["zo_method"]](
        space_of({"w": weight}), eps=1e-3, **{k: v for k, v in keywords.items() if v is not None}
    )
    estimate = estimator.estimate(0, lambda probes: [0.001 * (i % 2 == 0) for i in range(len(probes))])
    reference = estimate.gradient("w", start)
    lr = 1e-6 / float(reference.pow(2).mean().sqrt())
    optimizer = ZOOptimizer([{"params": [weight], "lr": lr, "weight_decay": 0.0}], {weight: "w"}, estimator)
    for step in range(200):
        optimizer.stage(dataclasses.replace(estimate, step=step))
        optimizer.step()
    moved = weight.detach().double() - start
    along = float((moved * -reference).sum() / (200 * lr * reference.pow(2).sum()))
    assert along == pytest.approx(1.0, abs=0.02)


def test_a_run_whose_first_step_is_skipped_logs_the_losses_of_the_others(tmp_path: Path) -> None:
    """Promise 9: the Trainer adds losses up, and a NaN would stay in the sum for good."""
    trainer = trainer_of(tmp_path, "mezo", zo_nonfinite="skip")
    measure = trainer.compute_loss

    def spoiled(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.tensor(math.nan) if trainer.state.global_step == 0 else measure(*args, **kwargs)

    trainer.compute_loss = spoiled
    trainer.train()
    first, *others = [e for e in trainer.state.log_history if "loss" in e]
    assert math.isnan(first["loss"])
    assert first["zo/skipped_steps"] == 1
    assert len(others) > 2
    assert all(math.isfinite(e["loss"]) and e["loss"] > 0 for e in others)


@every_combination
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_nonfinite_loss_raises(case: str, form: str, bad: float, tmp_path: Path) -> None:
    """Promise 9: the error names step and remedies, weights are clean, nothing is logged as zero."""
    trainer = trainer_of(tmp_path, case, form)
    clean = _spoil(trainer, bad)
    with pytest.raises(NonFiniteLossError, match=r"step 2.*zo_nonfinite"):
        trainer.train()
    assert digest(trainer.model) == clean[2]
    assert all(entry["loss"] > 0 for entry in trainer.state.log_history if "loss" in entry)


@every_combination
def test_a_nonfinite_loss_is_skipped_and_counted(case: str, form: str, tmp_path: Path) -> None:
    """Promise 9: with zo_nonfinite="skip" the step leaves weights alone, is counted, and never logs as zero."""
    trainer = trainer_of(tmp_path, case, form, zo_nonfinite="skip")
    clean = _spoil(trainer, math.nan)
    trainer.train()
    assert clean[2] == clean[3]
    assert clean[1] != clean[2]
    assert digest(trainer.model) != clean[3]
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["zo/skipped_steps"] for entry in logs] == [0, 0, 1, 1]
    assert all(math.isfinite(entry["loss"]) and entry["loss"] > 0 for entry in logs)


def _spoil(trainer: Any, bad: float) -> list[str]:
    """Make the losses of step 2 (the third) ``bad``; returns the list of digests at the begin of each step."""
    compute_loss = trainer.compute_loss

    def spoiled(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = compute_loss(*args, **kwargs)
        if trainer.state.global_step != 2:
            return loss
        if isinstance(loss, tuple):  # the losses of examples are made from the outputs
            loss[1]["logits"].mul_(0).add_(bad)
            return loss
        return loss * 0 + bad

    trainer.compute_loss = spoiled
    clean: list[str] = []
    trainer.add_callback(
        Recorder(lambda hook, step, kwargs: clean.append(digest(trainer.model)) if hook == "on_step_begin" else None)
    )
    return clean


@every_combination
def test_resume_from_any_checkpoint_is_bitwise(case: str, form: str, tmp_path: Path) -> None:
    """Promise 5, in one process: from each checkpoint the run ends where the uninterrupted one ends."""
    options: dict[str, Any] = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3, "warmup_steps": 2}
    whole = trainer_of(tmp_path / "whole", case, form, **options)
    whole.train()
    for step in (3, 6):
        resumed = trainer_of(tmp_path / "whole", case, form, **options)
        with torch.no_grad():  # what the checkpoint does not bring back must show
            for p in resumed.model.parameters():
                if p.requires_grad:
                    p.zero_()
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert_same_weights(weights_of(whole.model), weights_of(resumed.model))
        assert resumed.state.log_history[-2]["loss"] == whole.state.log_history[-2]["loss"]


def test_the_matrix_trains_what_it_says() -> None:
    assert all(p.requires_grad for p in model_of("full").parameters())
    names = [name for name, p in model_of("lora").named_parameters() if p.requires_grad]
    assert names
    assert all("lora_" in name for name in names)


@every_combination
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_replay_is_bitwise(case: str, form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Promise 6: base model + trajectory = final weights, for every method and optimizer; also from the torn-off log."""
    trainer = trainer_of(tmp_path / "run", case, form, dtype, max_steps=7, warmup_steps=2, save_strategy="no")
    trainer.train()
    trainer.save_model()
    for source in ("trajectory.safetensors", "trajectory.log"):
        trajectory = Trajectory.read(tmp_path / "run" / source)
        assert len(trajectory.steps) == 7
        again = trainer_of(tmp_path / "again", case, form, dtype).model
        if case.startswith("zo_act"):  # the basis comes with the adapter
            for (_, mine), (_, theirs) in zip(adapted_layers(again), adapted_layers(trainer.model), strict=True):
                basis_of(mine).data.copy_(basis_of(theirs))
        replay(again, trajectory)
        assert_same_weights(weights_of(trainer.model), weights_of(again))


@every_combination
def test_resume_from_a_checkpoint_without_weights(case: str, form: str, tmp_path: Path) -> None:
    """Promises 5 and 6 together: checkpoints hold the trajectory alone, and the run ends where it would have."""
    options: dict[str, Any] = {
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "warmup_steps": 1,
    }
    more: dict[str, Any] = {"trainer_kwargs": {"eval_dataset": Sentences(8, seed=1)}}
    whole = trainer_of(tmp_path / "whole", case, form, torch.bfloat16, **options, **more)
    whole.train()
    light = trainer_of(tmp_path / "light", case, form, torch.bfloat16, zo_save_weights=False, **options, **more)
    light.train()
    assert_same_weights(weights_of(whole.model), weights_of(light.model))  # of the best checkpoint
    checkpoint = tmp_path / "light" / "checkpoint-4"
    assert not list(checkpoint.glob("*model*")) + list(checkpoint.glob("optimizer*"))
    resumed = trainer_of(tmp_path / "light", case, form, torch.bfloat16, zo_save_weights=False, **options, **more)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same_weights(weights_of(whole.model), weights_of(resumed.model))
    whole_log, resumed_log = (Trajectory.read(tmp_path / run / "trajectory.log").steps for run in ("whole", "light"))
    assert whole_log == resumed_log
    assert not (tmp_path / "light" / "trajectory.start.safetensors").exists()


@every_case
def test_bytes_of_a_step(case: str, tmp_path: Path) -> None:
    """At most 64 bytes a step in the log for every method at its defaults, and no more in the sealed file."""
    form = next(form for name, form in COMBINATIONS if name == case)
    allowed = 64 if case in METHODS else 160 if "per-example" in case else 96  # 4 probes of 4 examples
    trainer = trainer_of(tmp_path, case, form, max_steps=3)
    trainer.train()
    trainer.save_model()
    log = (tmp_path / "trajectory.log").stat().st_size
    sealed = (tmp_path / "trajectory.safetensors").stat().st_size
    extra = trainer_of(tmp_path, case, form, max_steps=23)
    extra.train()
    extra.save_model()
    assert ((tmp_path / "trajectory.log").stat().st_size - log) / 20 <= allowed
    assert ((tmp_path / "trajectory.safetensors").stat().st_size - sealed) / 20 <= allowed
