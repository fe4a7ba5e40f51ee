"""Pushing over real HTTP to a Hub on loopback, and loading what was pushed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hub.server import Hub
from huggingface_hub import ModelCard, snapshot_download
from peft import PeftModel
from support import Recorder, Sentences, assert_same_weights, digest, tiny_llama, trainer_of, weights_of

from hf_zo import ModelCardCallback, PushToHubCallback, Trajectory, cli, replay
from hf_zo.hub import PushError

REPO = "user/tiny"


def pushing(folder: Path, hub: Hub, case: str = "zo_act", **more: Any) -> Any:
    strategy, wait = more.pop("strategy", "end"), 0.01
    push = PushToHubCallback(REPO, strategy=strategy, token=more.pop("token", hub.token), retries=2, wait=wait)
    callbacks = [push, ModelCardCallback(model_name=REPO, dataset="user/data", dataset_name="Data", license="mit")]
    options: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, **more}
    return trainer_of(folder, case, trainer_kwargs={"callbacks": callbacks, "eval_dataset": Sentences(8, 1)}, **options)


def download(hub: Hub, target: Path) -> Path:
    return Path(snapshot_download(REPO, local_dir=target, endpoint=hub.url, token=hub.token))


def test_an_adapter_is_pushed_and_loads(hub: Hub, tmp_path: Path) -> None:
    trainer = pushing(tmp_path / "out", hub)
    trainer.train()
    folder = download(hub, tmp_path / "copy")
    names = {p.name for p in folder.iterdir() if p.is_file()} - {".gitattributes"}
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "trajectory.safetensors",
        "README.md",
        "run_facts.json",
    } <= names
    assert not [name for name in names if name.startswith(("optimizer", "scheduler", "rng", "training_args", "trajectory.log"))]
    loaded = PeftModel.from_pretrained(tiny_llama(), folder).eval()
    row = Sentences()[0]["input_ids"][None]
    with torch.no_grad():
        assert torch.equal(loaded(row).logits, trainer.model.eval()(row).logits)
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "peft"
    assert "zeroth-order" in card.data.tags
    assert len(hub.commits) == 1


def test_what_is_pushed_replays(hub: Hub, tmp_path: Path) -> None:
    trainer = pushing(tmp_path / "out", hub, "lozo")
    trainer.train()
    folder = download(hub, tmp_path / "copy")
    again = replay(tiny_llama(), Trajectory.read(folder))
    assert_same_weights(weights_of(again), weights_of(tiny_llama().from_pretrained(folder)))
    assert_same_weights(weights_of(again), weights_of(trainer.model))


def test_every_save_pushes_clean_weights(hub: Hub, tmp_path: Path) -> None:
    """What arrives after step k is what the model is between steps k and k + 1."""
    trainer = pushing(tmp_path / "out", hub, "mezo", strategy="every_save")
    between: list[str] = []
    trainer.add_callback(
        Recorder(lambda hook, step, kwargs: between.append(digest(trainer.model)) if hook == "on_step_end" else None)
    )
    pushed: list[str] = []

    def look(hook: str, step: int, kwargs: Any) -> None:
        if hook == "on_save":
            pushed.append(digest(tiny_llama().from_pretrained(download(hub, tmp_path / f"copy{step}"))))

    trainer.add_callback(Recorder(look))
    trainer.train()
    assert pushed == [between[1], between[3]]
    assert [message for message, _ in hub.commits] == ["Step 2", "Step 4", "End of training"]


CHECKPOINTS = {"checkpoint": {"last-checkpoint"}, "all_checkpoints": {"checkpoint-2", "checkpoint-4"}}


@pytest.mark.parametrize(("strategy", "folders"), CHECKPOINTS.items())
def test_checkpoints_to_resume_from(strategy: str, folders: set[str], hub: Hub, tmp_path: Path) -> None:
    whole = pushing(tmp_path / "out", hub, "mezo", strategy=strategy)
    whole.train()
    folder = download(hub, tmp_path / "copy")
    assert {p.name for p in folder.iterdir() if p.is_dir() and "checkpoint" in p.name} == folders
    if strategy == "all_checkpoints":
        resumed = trainer_of(tmp_path / "again", "mezo", max_steps=4)
        resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
        assert_same_weights(weights_of(whole.model), weights_of(resumed.model))


def test_a_server_error_is_tried_again(hub: Hub, tmp_path: Path) -> None:
    trainer = pushing(tmp_path / "out", hub)
    trainer.add_callback(
        Recorder(lambda hook, step, kwargs: hub.failures.update({"/commit/": [500, 503]}) if hook == "on_save" else None)
    )
    trainer.train()
    assert hub.failures["/commit/"] == []
    assert len(hub.commits) == 1


def test_a_failed_push_in_the_middle_does_not_stop_the_run(hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = pushing(tmp_path / "out", hub, strategy="every_save")
    hub.failures["/commit/"] = [500] * 3
    trainer.train()
    assert trainer.state.global_step == 4
    assert "Training goes on; the next save tries again" in caplog.text
    assert [message for message, _ in hub.commits] == ["Step 4", "End of training"]


def test_a_wrong_token_shows_before_the_first_step(hub: Hub, tmp_path: Path) -> None:
    trainer = pushing(tmp_path / "out", hub, token="hf_wrong")
    with pytest.raises(PushError, match=r"user/tiny is not allowed \(HTTP 401\).*hf auth login"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_hub_that_goes_away_loses_nothing(hub: Hub, tmp_path: Path) -> None:
    """The last push fails: the error says where the run is, and pushing it later works."""
    trainer = pushing(tmp_path / "out", hub, "mezo")
    trainer.add_callback(
        Recorder(lambda hook, step, kwargs: hub.failures.update({"/commit/": [503] * 9}) if hook == "on_save" else None)
    )
    with pytest.raises(PushError, match=r"(?s)failed 3 times.*What has been run is in.*hf-zo push"):
        trainer.train()
    saved = tiny_llama().from_pretrained(tmp_path / "out")
    assert_same_weights(weights_of(saved), weights_of(trainer.model))
    hub.failures.clear()
    assert cli.main(["push", str(tmp_path / "out"), REPO]) == 0
    assert_same_weights(weights_of(tiny_llama().from_pretrained(download(hub, tmp_path / "copy"))), weights_of(trainer.model))


def test_offline(tmp_path: Path, hub: Hub) -> None:
    trainer = pushing(tmp_path / "out", hub)
    hub.close()
    with pytest.raises(PushError, match=r"(?s)failed 3 times.*offline"):
        trainer.train()


def test_commands_name_what_is_wrong(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["push", str(tmp_path), REPO]) == 2
    assert "holds neither weights nor an adapter" in capsys.readouterr().err
    assert cli.main(["card", str(tmp_path)]) == 2
    assert "run_facts.json" in capsys.readouterr().err


def test_push_refuses_a_name_that_is_none(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert cli.main(["push", str(tmp_path), "bad name!"]) == 2
    assert "could not be pushed to bad name!" in capsys.readouterr().err
    assert not hub.repos


def test_what_is_private_is_not_pushed_to_a_public_repository(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert cli.main(["push", str(tmp_path), "user/mine", "--private"]) == 0
    assert hub.private == {"user/mine": True}
    assert cli.main(["push", str(tmp_path), "user/mine", "--private"]) == 0  # again
    hub.repos["user/theirs"], hub.private["user/theirs"] = {}, False
    assert cli.main(["push", str(tmp_path), "user/theirs", "--private"]) == 2
    assert "user/theirs exists and is public" in capsys.readouterr().err
    assert not hub.repos["user/theirs"]


def test_an_unknown_strategy() -> None:
    with pytest.raises(ValueError, match=r"strategy='always' does not exist; choose one of end, every_save"):
        PushToHubCallback(REPO, strategy="always")
    with pytest.raises(TypeError, match="does not take author"):
        ModelCardCallback(author="me")


def test_a_plain_trainer_is_told(tmp_path: Path) -> None:
    from transformers import Trainer

    args = trainer_of(tmp_path, "mezo").args
    trainer = Trainer(tiny_llama(), args, train_dataset=Sentences(), callbacks=[ModelCardCallback()])
    with pytest.raises(TypeError, match="ModelCardCallback serves a ZOTrainer"):
        trainer.train()


@pytest.mark.parametrize("form", ["full", "lora"])
def test_the_trainers_own_push_carries_card_and_trajectory(form: str, hub: Hub, tmp_path: Path) -> None:
    options = {"push_to_hub": True, "hub_strategy": "every_save", "hub_always_push": True}
    told = {"hub_model_id": REPO, "hub_token": hub.token}
    trainer = trainer_of(tmp_path / "out", "mezo", form, max_steps=4, save_strategy="steps", save_steps=2, **options, **told)
    pushed: list[list[int]] = []

    def look(hook: str, step: int, kwargs: Any) -> None:
        if hook == "on_save":
            trainer._finish_current_push()
            folder = download(hub, tmp_path / f"copy{step}")
            assert not ModelCard.load(folder / "README.md").data.get("optimizer")
            assert "MeZO" in (folder / "README.md").read_text()
            pushed.append([step, len(Trajectory.read(folder / "trajectory.safetensors").steps)])

    trainer.add_callback(Recorder(look))
    trainer.train()
    assert pushed == [[2, 2], [4, 4]]


@pytest.mark.parametrize("form", ["full", "lora"])
def test_push_to_hub_uploads_weights_that_checkpoints_leave_out(form: str, hub: Hub, tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "zo_save_weights": False}
    trainer = trainer_of(tmp_path / "out", "mezo", form, max_steps=2, **options, hub_model_id=REPO, hub_token=hub.token)
    trainer.train()
    assert not list((tmp_path / "out" / "checkpoint-2").glob("*model*"))
    trainer.push_to_hub()
    file = {"full": "model.safetensors", "lora": "adapter_model.safetensors"}[form]
    assert (download(hub, tmp_path / "copy") / file).is_file()


@pytest.mark.parametrize("by", ["trainer", "callback"])
def test_the_start_that_best_weights_are_walked_to_from_is_not_pushed(by: str, hub: Hub, tmp_path: Path) -> None:
    best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "zo_save_weights": False}
    if by == "callback":
        trainer = pushing(tmp_path, hub, "mezo", strategy="every_save", **best)
    else:
        told = {"push_to_hub": True, "hub_strategy": "every_save", "hub_model_id": REPO, "hub_token": hub.token}
        saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "hub_always_push": True}
        trainer = trainer_of(tmp_path, "mezo", **best, **told, **saving, trainer_kwargs={"eval_dataset": Sentences(8, 1)})
    there: list[list[str]] = []
    trainer.add_callback(Recorder(lambda hook, step, kwargs: there.append([file.name for file in tmp_path.glob("*start*")])))
    trainer.train()
    assert {name[0] for (name,) in there} == {"_"}
    assert not list(tmp_path.glob("*start*"))
    assert "trajectory.safetensors" in hub.repos[REPO]
    assert not [path for path in hub.repos[REPO] if "start" in path]
