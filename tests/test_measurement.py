"""What a probe measures: windows of micro-batches, losses of every kind, modules in evaluation mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import Sentences, arguments_of, collate, tiny_llama, trainer_of
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, PretrainedConfig

from hf_zo import ZOTrainer


class Classifier(nn.Module):
    """A plain module that knows nothing of num_items_in_batch: its loss is a mean over its batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = PretrainedConfig()
        self.embed = nn.Embedding(64, 8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.head(self.drop(self.embed(input_ids).mean(1)))
        if labels is None:  # compute_loss_func and label smoothing keep the labels to themselves
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def bert() -> nn.Module:
    torch.manual_seed(0)
    shape = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    return BertForSequenceClassification(BertConfig(vocab_size=64, num_labels=3, **shape)).eval()


CLASSES = [{"input_ids": torch.arange(i, i + 6) % 64, "labels": torch.tensor(i % 3)} for i in range(20)]


def test_accumulation_of_mean_losses_weighs_micro_batches_by_their_examples(tmp_path: Path) -> None:
    """The last window of an epoch holds micro-batches of 6 and 2 examples; it equals one batch of 8."""
    ends = []
    for size, steps in ((12, 1), (6, 2)):
        model = Classifier()
        arguments = arguments_of(
            tmp_path, "mezo", max_steps=4, per_device_train_batch_size=size, gradient_accumulation_steps=steps, zo_eps=0.1
        )
        trainer = ZOTrainer(model, arguments, train_dataset=CLASSES)
        trainer.train()
        ends.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert ends[0] == pytest.approx(ends[1], rel=1e-6)


def test_objective_functions_weigh_micro_batches_by_their_examples(tmp_path: Path) -> None:
    """Whatever the labels are: the mean over the window's examples, not over its label tokens."""
    losses = []
    for size, steps in ((12, 1), (5, 3)):
        arguments = arguments_of(
            tmp_path,
            "mezo",
            max_steps=2,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            learning_rate=0.0,
        )
        trainer = ZOTrainer(
            tiny_llama(),
            arguments,
            train_dataset=Sentences(12),
            data_collator=collate,
            objective_fn=lambda model, inputs: inputs["input_ids"].float().mean(),
        )
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_model_that_ignores_the_number_of_items_is_averaged_over_the_window(tmp_path: Path) -> None:
    """BERT's classifier takes num_items_in_batch and returns a mean all the same; four batches of two are one of eight."""
    losses = []
    for size, micro_batches in ((8, 1), (2, 4)):
        arguments = arguments_of(
            tmp_path, "mezo", max_steps=1, per_device_train_batch_size=size, gradient_accumulation_steps=micro_batches
        )
        trainer = ZOTrainer(bert(), arguments, train_dataset=CLASSES[:8])
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize("where", range(4))
@pytest.mark.parametrize("model", [Classifier, bert])
def test_a_micro_batch_without_labels_changes_nothing(model: Any, where: int, tmp_path: Path) -> None:
    """The mean over no label is NaN, and tells nothing of whether a model divides by the number of items, as BERT does not."""
    rows = [{**row, "labels": torch.tensor(-100)} if i == where else row for i, row in enumerate(CLASSES[:4])]
    losses = []
    for size, micro_batches in ((4, 1), (1, 4)):
        arguments = arguments_of(
            tmp_path, "mezo", max_steps=2, per_device_train_batch_size=size, gradient_accumulation_steps=micro_batches
        )
        trainer = ZOTrainer(model(), arguments, train_dataset=rows)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_the_accuracy_of_tokens_is_that_of_whole_batches(tmp_path: Path) -> None:
    logged = []
    for packing in (True, False):
        run = trainer_of(tmp_path, zo_objective="accuracy", zo_packing=packing, zo_eps=0.3, logging_steps=1)
        run.train()
        logged.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    assert len(set(logged[0])) > 1
    assert logged[0] == logged[1]


def test_compute_loss_func_and_label_smoothing_are_honoured(tmp_path: Path) -> None:
    def doubled(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        loss = nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch
        return 2 * loss

    first = {}
    for name, kwargs, more in (
        ("plain", {}, {}),
        ("doubled", {"compute_loss_func": doubled}, {}),
        ("smoothed", {}, {"label_smoothing_factor": 0.3}),
    ):
        trainer = ZOTrainer(Classifier(), arguments_of(tmp_path, "mezo", max_steps=1, **more), train_dataset=CLASSES, **kwargs)
        trainer.train()
        first[name] = trainer.state.log_history[0]["loss"]
    assert first["doubled"] == pytest.approx(2 * first["plain"], rel=1e-6)
    assert first["smoothed"] != pytest.approx(first["plain"], rel=1e-3)


def test_dropout_is_off_in_both_probes_and_callbacks_see_training(tmp_path: Path) -> None:
    model = Classifier()
    trainer = ZOTrainer(model, arguments_of(tmp_path, "mezo", max_steps=2, zo_eps=1e-6), train_dataset=CLASSES)
    inside: list[tuple[bool, bool]] = []
    model.drop.register_forward_pre_hook(lambda module, args: inside.append((module.training, model.training)))
    losses = []
    compute_loss = trainer.compute_loss

    def seeing(*args: Any, **kwargs: Any) -> torch.Tensor:
        assert model.training  # what trainers file their metrics by
        losses.append(float(compute_loss(*args, **kwargs)))
        return torch.tensor(losses[-1])

    trainer.compute_loss = seeing
    model.train()
    trainer.train()
    assert inside
    assert set(inside) == {(False, False)}
    assert losses[-2] == pytest.approx(losses[-1], abs=1e-5)  # dropout would differ by far more
    assert model.drop.training


def test_sequence_classification_in_bf16(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_labels=3
    )
    model = BertForSequenceClassification(config).to(torch.bfloat16)
    trainer = ZOTrainer(model, arguments_of(tmp_path, "mezo", max_steps=2), train_dataset=CLASSES)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert any(loss != float(torch.tensor(loss).bfloat16()) for loss in losses)  # not quantised to bf16
