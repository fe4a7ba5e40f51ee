"""The start of a run: what is noted, what is stored, and which models are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import Sentences, assert_same_weights, collate, load_base, tiny_llama, trained_of, trainer_of, weights_of
from transformers import BertConfig, BertForSequenceClassification, BertModel

from hf_zo import Trajectory, TrajectoryError, ZOTrainer, ZOTrainingArguments, cli, replay
from hf_zo.adapters import draw_adapter
from hf_zo.hub.model_card import facts_of
from hf_zo.trajectory import LOG_NAME


def test_the_wrong_model_is_named(run: Path) -> None:
    trajectory = Trajectory.read(run / "out")
    other = load_base(run)
    with torch.no_grad():
        other.model.norm.weight[3] += 1e-6
    with pytest.raises(TrajectoryError, match=r"not those the run started from, .*base.*content hash"):
        replay(other, trajectory)
    with pytest.raises(TrajectoryError, match=r"dtype bfloat16, the run had float32.*--approximate"):
        replay(load_base(run, dtype=torch.bfloat16), trajectory)
    with pytest.raises(TrajectoryError, match=r"model.embed_tokens.weight is missing"):
        replay(torch.nn.Linear(2, 2), trajectory)
    close = replay(load_base(run, dtype=torch.bfloat16), trajectory, approximate=True)
    final = load_base(run).from_pretrained(run / "out")
    start = weights_of(load_base(run))
    for name, p in close.named_parameters():
        moved = (dict(final.named_parameters())[name] - start[name]).norm()
        assert (p.float() - dict(final.named_parameters())[name]).norm() < 0.05 * moved + 0.01 * start[name].norm()


def test_a_drawn_adapter_is_a_key_and_a_foreign_one_is_stored(tmp_path: Path) -> None:
    def adapted(draw: bool) -> Any:
        torch.manual_seed(0)
        model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        return draw_adapter(model, 42) if draw else model

    for draw in (True, False):
        args = trainer_of(tmp_path / str(draw), "mezo").args
        trainer = ZOTrainer(adapted(draw), args, train_dataset=Sentences(), data_collator=collate)
        trainer.train()
        trainer.save_model()
        trajectory = Trajectory.read(tmp_path / str(draw))
        assert bool(trajectory.initial) is not draw
        assert all("lora_A" in name for name in trajectory.initial)
        torch.manual_seed(7)
        other = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        assert_same_weights(weights_of(replay(other, trajectory)), weights_of(trainer.model))


@pytest.mark.parametrize("adapted", [False, True], ids=["all weights", "lora"])
def test_a_head_that_is_drawn_at_every_load_is_stored(adapted: bool, tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
    BertModel(BertConfig(**sizes)).save_pretrained(tmp_path / "base")
    rows = [{"input_ids": torch.tensor([1, 2 + i % 3]), "attention_mask": torch.ones(2), "labels": i % 3} for i in range(9)]
    ends = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model: Any = BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)  # not the default
        if adapted:
            config = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
            model = draw_adapter(get_peft_model(model, config), 42)
        ends.append(model)
    trained, other = ends
    arguments = ZOTrainingArguments(str(tmp_path / "run"), max_steps=3, learning_rate=1e-3, use_cpu=True, report_to="none")
    ZOTrainer(trained, arguments, train_dataset=rows).train()
    trajectory = Trajectory.read(tmp_path / "run" / LOG_NAME)
    assert_same_weights(trained_of(replay(other, trajectory)), trained_of(trained))
    command = ["replay", str(tmp_path / "base"), str(tmp_path / "run"), "-o", str(tmp_path / "rebuilt")]
    assert cli.main(command) == 0


def test_of_several_adapters_the_active_one_is_noted(tmp_path: Path) -> None:
    def adapted() -> Any:
        model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"]))
        model.add_adapter("second", LoraConfig(r=2, target_modules=["v_proj"]))
        model.set_adapter("second")
        return model

    args = trainer_of(tmp_path, "mezo").args
    trainer = ZOTrainer(adapted(), args, train_dataset=Sentences(), data_collator=collate)
    trainer.train()
    trajectory = Trajectory.read(tmp_path / LOG_NAME)
    assert (trajectory.header["adapter_name"], trajectory.header["adapter"]["r"]) == ("second", 2)
    assert facts_of(trainer)["adapter"]["rank"] == 2  # the card's
    assert_same_weights(weights_of(replay(adapted(), trajectory)), weights_of(trainer.model))
