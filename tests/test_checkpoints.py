"""Saving and resuming where a run is not the plain one: the best weights, retries, changed settings, weights that get lost."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import (
    Recorder,
    Sentences,
    arguments_of,
    assert_same_weights,
    collate,
    model_of,
    tiny_llama,
    trainer_of,
    weights_of,
)
from torch.utils.data import SequentialSampler
from transformers import MistralConfig, MistralForCausalLM

from hf_zo import ModelCardCallback, Trajectory, TrajectoryError, ZOTrainer, replay
from hf_zo.checkpoints import last_complete_checkpoint
from hf_zo.hub.model_card import facts_of
from hf_zo.trajectory import LOG_NAME, SEALED_NAME

SAVING: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
BEST: dict[str, Any] = {
    **SAVING, "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "learning_rate": 0.5
}  # fmt: skip


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
    more = {"eval_dataset": Sentences(8, seed=1), "callbacks": [ModelCardCallback()]}
    trainer = trainer_of(tmp_path, "mezo", form, **BEST, zo_save_weights=keeps, trainer_kwargs=more)
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
    more = {"eval_dataset": Sentences(8, seed=1)}
    trainer = trainer_of(tmp_path, "mezo", "lora", torch.bfloat16, **BEST, trainer_kwargs=more)
    trainer.train()
    trainer.save_model()
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.bfloat16}
    replay(model_of("lora", torch.bfloat16), Trajectory.read(tmp_path / SEALED_NAME))


def choosing(folder: Path, form: str, **more: Any) -> tuple[Any, dict[int, dict[str, torch.Tensor]]]:
    """A trainer that loads its best weights at the end, and the weights after every step that it takes."""
    trainer = trainer_of(folder, "mezo", form, trainer_kwargs={"eval_dataset": Sentences(8, seed=1)}, **{**BEST, **more})
    after: dict[int, dict[str, torch.Tensor]] = {}

    def see(hook: str, step: int, kwargs: Any) -> None:
        if hook == "on_step_end":
            after[step] = weights_of(trainer.model)

    trainer.add_callback(Recorder(see))
    return trainer, after


@pytest.mark.parametrize("form", ["full", "lora"])
def test_the_best_weights_are_not_those_of_an_older_run_in_the_same_folder(form: str, tmp_path: Path) -> None:
    choosing(tmp_path, form, seed=1)[0].train()
    assert (tmp_path / "checkpoint-1" / "optimizer.pt").is_file()
    trainer, after = choosing(tmp_path, form, zo_save_weights=False)
    trainer.train()
    assert not [file for pattern in ("*model*", "optimizer.pt") for file in tmp_path.glob(f"checkpoint-*/{pattern}")]
    assert_same_weights(weights_of(trainer.model), after[trainer.state.best_global_step])


def test_best_weights_that_are_not_those_of_the_run_are_noticed(tmp_path: Path) -> None:
    trainer, _ = choosing(tmp_path, "full")

    def replace(hook: str, step: int, kwargs: Any) -> None:
        if hook == "on_save":
            file = tmp_path / f"checkpoint-{step}" / "model.safetensors"
            changed = load_file(file)
            changed["model.norm.weight"] += 1
            save_file(changed, file, metadata={"format": "pt"})

    trainer.add_callback(Recorder(replace))
    with pytest.raises(TrajectoryError, match="are not those of the run"):
        trainer.train()


@pytest.mark.parametrize("form", ["full", "lora"])
def test_best_weights_cannot_be_walked_to_from_the_middle_of_a_run(form: str, tmp_path: Path) -> None:
    """Of an adapter the trajectory holds the start; of whole weights it is gone once later ones are loaded."""
    choosing(tmp_path, form, max_steps=2, seed=5)[0].train()
    resumed, after = choosing(tmp_path, form, max_steps=6, seed=5, zo_save_weights=False)
    if form == "full":
        with pytest.raises(ValueError, match=r"^zo_save_weights=False.*zo_save_weights=True"):
            resumed.train(resume_from_checkpoint=True)
        assert not after
    else:
        resumed.train(resume_from_checkpoint=True)
        assert 2 < resumed.state.best_global_step < 6
        assert_same_weights(weights_of(resumed.model), after[resumed.state.best_global_step])


def test_no_copy_of_the_start_stays_behind(tmp_path: Path) -> None:
    trainer, _ = choosing(tmp_path, "full", zo_save_weights=False, max_steps=2)
    meanwhile: list[bool] = []

    def look(hook: str, step: int, kwargs: Any) -> None:
        if hook == "on_step_end":
            meanwhile.append(any(tmp_path.glob("_trajectory.start*")))

    trainer.add_callback(Recorder(look))
    trainer.train()
    assert meanwhile == [True, True]
    assert not list(tmp_path.glob("_trajectory.start*"))


def test_checkpoints_of_a_second_run_hold_all_steps_to_them(tmp_path: Path) -> None:
    """Whatever the best step of the first was."""
    trainer, _ = choosing(tmp_path, "lora")
    trainer.train()
    assert trainer.state.best_global_step < 4
    trainer.train()
    assert [len(Trajectory.read(tmp_path / f"checkpoint-{n}").steps) for n in (1, 2, 3, 4)] == [1, 2, 3, 4]


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


def test_the_same_trainer_resumes_a_checkpoint_without_weights(tmp_path: Path) -> None:
    """The state that it has come to by then is not that of the checkpoint."""
    trainer = trainer_of(tmp_path, "lozo-momentum", "lora", zo_save_weights=False, **SAVING)
    trainer.train()
    end, spent = weights_of(trainer.model), trainer._zo_optimizer.forward_passes
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_weights(weights_of(trainer.model), end)
    assert trainer._zo_optimizer.forward_passes == spent


def test_the_last_checkpoint_is_that_of_the_highest_step(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


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


def test_a_run_that_is_resumed_from_weights_alone_writes_no_trajectory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its average starts anew, which no replay knows."""
    options = {**SAVING, "save_only_model": True}
    trainer_of(tmp_path, "lozo-momentum", **{**options, "max_steps": 2}).train()
    again = trainer_of(tmp_path, "lozo-momentum", **options)
    again.train(resume_from_checkpoint=True)
    again.save_model()
    assert "has no state of the method, so this run writes no trajectory" in caplog.text
    assert not list(tmp_path.glob("trajectory*"))
    assert not (tmp_path / "checkpoint-4" / SEALED_NAME).exists()
