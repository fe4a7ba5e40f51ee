"""Saving and resuming where a run is not the plain one: the best weights, retries, changed settings, weights that get lost."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import Sentences, arguments_of, assert_same_weights, collate, model_of, tiny_llama, trainer_of, weights_of
from torch.utils.data import SequentialSampler
from transformers import MistralConfig, MistralForCausalLM

from hf_zo import ModelCardCallback, Trajectory, TrajectoryError, ZOTrainer, replay
from hf_zo.hub.model_card import facts_of
from hf_zo.trajectory import LOG_NAME, SEALED_NAME

SAVING: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


def failing_once_at(trainer: Any, step: int) -> Any:
    """The trainer, which runs out of memory in one step and then begins again with a smaller batch."""
    compute_loss, failed = trainer.compute_loss, []

    def failing(*args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == step and not failed:
            failed.append(step)
            raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")
        return compute_loss(*args, **kwargs)

    trainer.compute_loss = failing
    return trainer


@pytest.mark.parametrize("form", ["full", "lora"])
@pytest.mark.parametrize("keeps", [True, False])
def test_trajectory_and_card_are_of_the_best_weights(form: str, keeps: bool, tmp_path: Path) -> None:
    best = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "learning_rate": 0.5, "save_steps": 1}
    more = {"eval_dataset": Sentences(8, seed=1), "callbacks": [ModelCardCallback()]}
    trainer = trainer_of(tmp_path, "mezo", form, **{**SAVING, **best}, zo_save_weights=keeps, trainer_kwargs=more)
    trainer.train()
    trainer.save_model()
    kept = trainer.state.best_global_step
    assert kept < 4
    trajectory = Trajectory.read(tmp_path / SEALED_NAME)
    assert len(trajectory.steps) == kept
    assert len(Trajectory.read(tmp_path / LOG_NAME).steps) == 4
    assert_same_weights(weights_of(replay(model_of(form), trajectory)), weights_of(trainer.model))
    facts = facts_of(trainer)
    assert facts["results"]["loss"] == pytest.approx(trainer.evaluate()["eval_loss"], abs=1e-6)
    assert facts["settings"]["weights"] == f"those after step {kept}, the best evaluation"
    assert (facts["settings"]["steps"], facts["forward_passes"]) == (4, 8)


def test_the_best_weights_keep_their_dtype(tmp_path: Path) -> None:
    """PEFT loads a 16-bit adapter as fp32."""
    best = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "learning_rate": 0.5, "save_steps": 1}
    more = {"eval_dataset": Sentences(8, seed=1)}
    trainer = trainer_of(tmp_path, "mezo", "lora", torch.bfloat16, **{**SAVING, **best}, trainer_kwargs=more)
    trainer.train()
    trainer.save_model()
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.bfloat16}
    replay(model_of("lora", torch.bfloat16), Trajectory.read(tmp_path / SEALED_NAME))


@pytest.mark.parametrize("case", ["mezo", "lozo-momentum"])
def test_checkpoints_of_a_retry_hold_weights(case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its steps do not begin at the base model: along a trajectory nobody could walk to its weights."""
    options = {**SAVING, "auto_find_batch_size": True, "zo_save_weights": False}
    trainer = failing_once_at(trainer_of(tmp_path, case, **options), step=3)
    trainer.train()
    trainer.save_model()
    assert "so it writes no trajectory" in caplog.text
    assert not list(tmp_path.glob("trajectory*"))
    assert not (tmp_path / "checkpoint-4" / SEALED_NAME).exists()
    again = trainer_of(tmp_path, case, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_weights(weights_of(again.model), weights_of(trainer.model))


def test_a_retry_before_the_first_step_is_logged(tmp_path: Path) -> None:
    trainer = failing_once_at(trainer_of(tmp_path, "mezo", auto_find_batch_size=True, **SAVING), step=0)
    trainer.train()
    trainer.save_model()
    assert_same_weights(weights_of(replay(tiny_llama(), Trajectory.read(tmp_path))), weights_of(trainer.model))
    assert facts_of(trainer)["settings"]["examples per step"] == trainer._train_batch_size < trainer.args.train_batch_size


def test_a_second_run_is_logged_if_its_start_can_be_stored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = trainer_of(tmp_path / "full", "mezo", zo_save_weights=False, **SAVING)
    whole.train()
    whole.train()
    assert "weights that were trained before it, so it writes no trajectory" in caplog.text
    assert (tmp_path / "full" / "checkpoint-4" / "model.safetensors").is_file()
    adapter = trainer_of(tmp_path / "lora", "mezo", "lora", zo_save_weights=False, **SAVING)
    adapter.train()
    adapter.train()
    adapter.save_model()
    trajectory = Trajectory.read(tmp_path / "lora")
    assert len(trajectory.steps) == 4
    assert_same_weights(weights_of(replay(model_of("lora"), trajectory)), weights_of(adapter.model))


@pytest.mark.parametrize(
    ("case", "settings", "told"),
    [
        ("mezo", {"zo_clip": 0.01}, "clip was None, is 0.01"),
        ("mezo", {"zo_eps": 5e-3}, "eps was 0.01, is 0.005"),
        ("mezo", {"optim": "adamw_torch"}, "optimizer was None, is torch.optim.adamw.AdamW"),
        ("kerzoo", {"zo_method": "kerzoo"}, "method was mezo, is kerzoo"),
    ],
)
def test_resuming_by_another_rule(
    case: str, settings: dict[str, Any], told: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What the error of a diverged run recommends must not spoil its trajectory."""
    for keeps in (True, False):
        folder = tmp_path / f"keeps-{keeps}"
        trainer_of(folder, "mezo", zo_save_weights=keeps, **{**SAVING, "max_steps": 2}).train()
        other = trainer_of(folder, case, zo_save_weights=keeps, **{**SAVING, **settings})
        if not keeps:
            with pytest.raises(TrajectoryError, match=told.replace(".", r"\.")):
                other.train(resume_from_checkpoint=True)
        elif "optim" in settings:
            with pytest.raises(ValueError, match="different `optim`"):
                other.train(resume_from_checkpoint=True)
        else:
            with caplog.at_level(logging.WARNING):
                other.train(resume_from_checkpoint=True)
            assert f"by another rule ({told}), so it writes no trajectory" in caplog.text
            other.save_model()
            assert not list(folder.glob("trajectory*"))


def test_a_new_learning_rate_is_no_other_rule(tmp_path: Path) -> None:
    trainer_of(tmp_path, "mezo", **{**SAVING, "max_steps": 2}).train()
    slower = trainer_of(tmp_path, "mezo", **{**SAVING, "learning_rate": 1e-3})
    slower.train(resume_from_checkpoint=True)
    slower.save_model()
    assert_same_weights(weights_of(replay(tiny_llama(), Trajectory.read(tmp_path))), weights_of(slower.model))


class InOrder(ZOTrainer):
    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def test_batches_keep_their_form_when_a_run_is_resumed(tmp_path: Path) -> None:
    """Sequences beyond a sliding window cannot be packed. Those of the first batch are, and decide; later ones are not."""
    shape = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}

    def made() -> InOrder:
        torch.manual_seed(0)
        model = MistralForCausalLM(MistralConfig(**shape, num_key_value_heads=1, sliding_window=10, pad_token_id=0))
        rows = sorted(Sentences().rows, key=lambda row: -len(row["input_ids"]))
        return InOrder(model, arguments_of(tmp_path, "mezo", **SAVING), train_dataset=rows, data_collator=collate)

    whole, resumed = made(), made()
    assert len(whole.train_dataset[0]["input_ids"]) > 10 >= len(whole.train_dataset[12]["input_ids"])
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert whole._packing.choice == resumed._packing.choice
    assert whole._packing.form == "labelled"
    assert_same_weights(weights_of(whole.model), weights_of(resumed.model))


def test_weights_that_do_not_come_back_are_noticed(tmp_path: Path) -> None:
    """As transformers cannot load the experts that it saved."""
    trainer_of(tmp_path, "mezo", **{**SAVING, "max_steps": 2}).train()
    file = tmp_path / "checkpoint-2" / "model.safetensors"
    lost = "model.layers.0.mlp.up_proj.weight"
    save_file({name: t for name, t in load_file(file).items() if name != lost}, file, metadata={"format": "pt"})
    with pytest.raises(TrajectoryError, match="are not those of the run"):
        trainer_of(tmp_path, "mezo", **SAVING).train(resume_from_checkpoint=True)


def test_no_trajectory_on_request(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, "mezo", zo_trajectory=False)
    trainer.train()
    trainer.save_model()
    assert not list(tmp_path.glob("trajectory*"))


def test_resuming_a_run_without_trajectory_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    trainer_of(tmp_path, "mezo", zo_trajectory=False, **options).train()
    trainer_of(tmp_path, "mezo", **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "has no trajectory, so this run writes none" in caplog.text
    assert not (tmp_path / LOG_NAME).exists()
