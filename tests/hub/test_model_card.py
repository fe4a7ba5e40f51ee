"""Model cards: only what was measured, valid metadata, and nothing that a first-order run would say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import PeftModel
from support import CASES, COMBINATIONS, Sentences, arguments_of, collate, tiny_llama, trainer_of

from hf_zo import ModelCardCallback, ZOTrainer, cli
from hf_zo.estimators import METHODS
from hf_zo.estimators.mezo import MeZO
from hf_zo.hub.model_card import _BIBTEX, FACTS_NAME, FIGURE_NAME, facts_of, render
from hf_zo.training_args import RECOMMENDED

ABOUT = {"dataset": "user/data", "dataset_name": "Data", "task_type": "text-classification"}


def finished(folder: Path, case: str, form: str = "full", **more: Any) -> Any:
    options: dict[str, Any] = {"max_steps": 6, "eval_strategy": "steps", "eval_steps": 3, **more}
    kwargs = {"callbacks": [ModelCardCallback(**ABOUT)], "eval_dataset": Sentences(8, 1)}
    trainer = trainer_of(folder, case, form, trainer_kwargs=kwargs, **options)
    trainer.train()
    trainer.save_model()
    return trainer


@pytest.mark.parametrize(("case", "form"), [c for c in COMBINATIONS if c[0] in (*METHODS, "mezo-adamw")])
def test_a_card_tells_the_truth(case: str, form: str, tmp_path: Path) -> None:
    """Promise 10."""
    trainer = finished(tmp_path, case, form)
    text = (tmp_path / "README.md").read_text()
    assert "adamw" not in text.lower()
    assert "backward pass" in text
    history = trainer.state.log_history
    forwards = [e["zo/forward_passes"] for e in history if "zo/forward_passes" in e][-1]
    evaluated = [e["eval_loss"] for e in history if "eval_loss" in e][-1]
    assert f"| forward passes of a batch | {forwards} |" in text
    assert f"| loss | {evaluated:.4g} |" in text
    assert f"| learning rate | {trainer.args.learning_rate:g} |" in text
    assert f"| eps | {trainer.args.zo_eps:g} |" in text
    assert "| steps | 6 |" in text
    assert "peak memory of a step" in text
    assert _BIBTEX[trainer.args.zo_method][2] in text
    assert str(tmp_path) not in text
    assert (tmp_path / FIGURE_NAME).read_bytes().startswith(b"\x89PNG")
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.library_name == ("peft" if form == "lora" or case == "zo_act" else "transformers")
    assert {"zeroth-order", "forward-only", trainer.args.zo_method} <= set(data.tags)
    assert data.datasets == ["user/data"]
    (result,) = data.eval_results
    assert (result.metric_type, result.dataset_name) == ("loss", "Data")
    assert result.metric_value == evaluated
    assert "on its evaluation data, 8 examples." in text


def test_a_card_says_what_a_replay_takes(tmp_path: Path) -> None:
    finished(tmp_path, "zo_act")
    text = (tmp_path / "README.md").read_text()
    assert "With the base model and the adapter, which holds the basis, they rebuild" in text
    facts = json.loads((tmp_path / FACTS_NAME).read_text())
    assert "hf-zo replay" in text
    assert not facts["quantized"]
    text = str(render({**facts, "quantized": True}, None, "trajectory.safetensors"))
    assert "hf-zo replay" not in text  # the command refuses such a base
    assert 'model = hf_zo.replay(model, hf_zo.Trajectory.read("trajectory.safetensors"))' in text


def test_a_method_of_ones_own_has_a_card_without_a_paper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(MeZO):
        name, perturbs = "mine", "what it likes"

    monkeypatch.setitem(METHODS, "mine", Mine)
    monkeypatch.setitem(RECOMMENDED, "mine", RECOMMENDED["mezo"])
    monkeypatch.setitem(CASES, "mine", {})
    finished(tmp_path, "mine")
    monkeypatch.delitem(METHODS, "mine")  # another process writes it again
    assert cli.main(["card", str(tmp_path)]) == 0
    text = (tmp_path / "README.md").read_text()
    assert "mine perturbs what it likes." in text
    assert "arxiv" not in text.lower()
    assert "Citation" not in text


def test_every_method_has_its_reference() -> None:
    assert set(_BIBTEX) == set(METHODS)
    for name, (_, _, arxiv, _) in _BIBTEX.items():
        assert METHODS[name].paper == f"arXiv {arxiv}"


def test_the_licence_is_the_base_models(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    for license_, expected in (("cc-by-4.0", "cc-by-4.0"), (None, None)):
        header = yaml.safe_dump({"license": license_} if license_ else {"language": "en"})
        (tmp_path / "base" / "README.md").write_text(f"---\n{header}---\n# Base\n")
        model = tiny_llama().from_pretrained(tmp_path / "base")
        args = trainer_of(tmp_path / "out", "mezo").args
        trainer = ZOTrainer(
            model, args, train_dataset=Sentences(), data_collator=collate, callbacks=[ModelCardCallback(model_name="user/fine")]
        )
        trainer.train()
        card = ModelCard.load(tmp_path / "out" / "README.md")
        assert card.data.license == expected
        assert "`base` fine-tuned" in card.text
        assert 'from_pretrained("user/fine")' in card.text


def test_nothing_is_claimed_that_was_not_measured(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, "mezo")
    trainer.train()
    trainer.create_model_card(dataset_tags=["user/data"], language=["en", "de"], tags="sentiment")
    text = (tmp_path / "README.md").read_text()
    assert "Results" not in text
    assert "memory" not in text
    assert "Not evaluated" in text
    told = ModelCard.load(tmp_path / "README.md").data
    assert told.eval_results is None
    assert (told.datasets, told.language) == (["user/data"], ["en", "de"])
    assert told.tags[-2:] == ["mezo", "sentiment"]


def test_of_an_adapter_that_was_passed_the_rank_is_told_alone(tmp_path: Path) -> None:
    finished(tmp_path, "zo_act")
    adapter = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    args = arguments_of(tmp_path, "mezo", zo_method="zo_act", learning_rate=1e-3)
    trainer = ZOTrainer(adapter, args, train_dataset=Sentences(), data_collator=collate)
    trainer.train()
    settings = facts_of(trainer)["settings"]
    assert settings["rank"] == 4
    assert not {"basis", "samples", "targets", "exclude_first_token"} & settings.keys()


def test_an_optimizer_that_was_given_has_its_own_rates(tmp_path: Path) -> None:
    model = tiny_llama()
    given = torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=0.3)
    data = {"train_dataset": Sentences(), "data_collator": collate}
    trainer = ZOTrainer(model, arguments_of(tmp_path, "mezo"), optimizers=(given, None), **data)
    trainer.train()
    settings = facts_of(trainer)["settings"]
    assert (settings["learning rate"], settings["weight decay"]) == (0.05, 0.3)


def test_what_was_spent_and_trained_does_not_depend_on_what_is_logged(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, "mezo", max_steps=5, logging_steps=500, trainer_kwargs={"callbacks": [ModelCardCallback()]})
    trainer.model.model.embed_tokens.requires_grad_(False)
    trainer.train()
    text = (tmp_path / "README.md").read_text()
    assert "| forward passes of a batch | 10 |" in text
    everything, embedded = sum(p.numel() for p in trainer.model.parameters()), 64 * 16
    assert f"{everything - embedded:,} parameters were trained of {everything:,}." in text
    (summary,) = (entry for entry in trainer.state.log_history if "train_runtime" in entry)
    assert (summary["zo/forward_passes"], summary["zo/skipped_steps"]) == (10, 0)


def test_the_card_command_writes_it_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished(tmp_path, "kerzoo")
    before = (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").unlink()
    assert cli.main(["card", str(tmp_path)]) == 0
    assert (tmp_path / "README.md").read_text() == before
    assert "## Replay" in before
    assert (tmp_path / FACTS_NAME).is_file()


def test_the_cards_replay_command_works(tmp_path: Path) -> None:
    """The command that the card shows, run as it stands, in the run's folder."""
    tiny_llama().save_pretrained(tmp_path / "base")
    model = tiny_llama().from_pretrained(tmp_path / "base")
    args = trainer_of(tmp_path / "out", "mezo").args
    trainer = ZOTrainer(model, args, train_dataset=Sentences(), data_collator=collate, callbacks=[ModelCardCallback()])
    trainer.train()
    trainer.save_model()
    text = (tmp_path / "out" / "README.md").read_text()
    command = next(line for line in text.splitlines() if line.startswith("hf-zo replay")).split()
    assert command[1:] == ["replay", "base", "trajectory.safetensors", "-o", "rebuilt"]
    command = ["replay", str(tmp_path / "base"), str(tmp_path / "out" / command[3]), "-o", str(tmp_path / "rebuilt")]
    assert cli.main(command) == 0
