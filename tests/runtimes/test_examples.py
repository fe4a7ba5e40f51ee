"""Directions of examples: the losses they give, their moments, and what they do not go with."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import Sentences, collate, model_of, trainer_of, weights_of
from transformers import BertConfig, BertForSequenceClassification

from hf_zo import ZOTrainer, ZOTrainingArguments
from hf_zo.directions import ExampleDirections, displace, space_of
from hf_zo.estimators.mezo import MeZO
from hf_zo.packing import numbered
from hf_zo.tasks import option_loss

D, EXAMPLES = 10, 6
GRADIENTS = torch.randn(EXAMPLES, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.5


def linear(probes: list[Any]) -> list[float]:
    """Losses <g_e, theta + a z_e> of every example at theta = 0."""
    losses = []
    for probe in probes:
        ((a, family),) = probe.terms
        losses += (a * (family.each("w", range(EXAMPLES)).double() * GRADIENTS).sum(1)).tolist()
    return losses


@pytest.mark.parametrize(("kind", "excess"), [("gaussian", 1), ("rademacher", -1)])
def test_moments(kind: Any, excess: int) -> None:
    """E[g] = gradient, E|g|^2 = |gradient|^2 + (d + 1) sum_e |gradient_e|^2 / n (Rademacher d - 1); 5 and 4 standard errors."""
    estimator = MeZO(space_of({"w": GRADIENTS[0]}), per_example=True, direction=kind, num_directions=2)
    drawn = torch.stack([estimator.estimate(t, linear).gradient("w", GRADIENTS[0]) for t in range(4000)])
    error = drawn.std(0) / len(drawn) ** 0.5
    assert ((drawn.mean(0) - GRADIENTS.sum(0)).abs() < 5 * error).all()
    squares = drawn.pow(2).sum(1)
    predicted = float(GRADIENTS.sum(0).pow(2).sum() + (D + excess) * GRADIENTS.pow(2).sum() / 2)
    error = float(squares.std()) / len(squares) ** 0.5
    assert error < 0.02 * predicted
    assert abs(float(squares.mean()) - predicted) < 4 * error


def test_directions_of_examples() -> None:
    """They differ, do not depend on how many there are, and add up with their weights."""
    family = ExampleDirections(space_of({"w": torch.zeros(3, 5)}), 1, 2, 0)
    four, six, last = (family.each("w", range(*which)) for which in ((4,), (6,), (4, 6)))
    assert torch.equal(four, six[:4])
    assert torch.equal(last, six[4:])
    assert not torch.equal(six[0], six[1])
    weights = [0.5, -2.0, 0.0, 1.0]
    torch.testing.assert_close(family.weighted(weights).sample("w"), torch.einsum("e,eij->ij", torch.tensor(weights), four))


@pytest.mark.parametrize("settings", [{}, {"zo_packing": False}], ids=["packed", "padded"])
def test_losses_are_those_of_each_example_alone(settings: dict[str, Any], tmp_path: Any) -> None:
    """What the hooks give for a window equals the loss of every example with the displaced weights written."""
    trainer = trainer_of(tmp_path, "mezo-per-example", "lora", gradient_accumulation_steps=2, **settings)
    trainer.create_optimizer()
    rows = list(Sentences(rows=8))
    window = [collate(rows[:4]), collate(rows[4:])]
    estimator = trainer._zo_optimizer.estimator
    asked: list[Any] = []

    def oracle(probes: Any) -> list[float]:
        asked.extend(probes)
        losses.extend(trainer._measure(trainer.model, probes, window, None))
        return losses

    losses: list[float] = []
    with torch.no_grad():
        trainer.model.eval()
        estimator.estimate(0, oracle)
        params = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
        clean = {name: p.clone() for name, p in params.items()}
        labels = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in window)
        expected = []
        for probe in asked:
            ((a, family),) = probe.terms
            for e, row in enumerate(rows):
                one = family.weighted([float(i == e) for i in range(8)])
                for name, p in params.items():
                    displace(p, clean[name], name, [(a, one)])
                alone = collate([row])
                expected.append(float(trainer.model(**alone).loss) * int((alone["labels"][:, 1:] != -100).sum()) / labels)
            for name, p in params.items():
                p.copy_(clean[name])
    assert len(losses) == 4 * 8
    assert losses == pytest.approx(expected, rel=1e-5)


def test_a_classifier(tmp_path: Any) -> None:
    """Rows with a label each, computed in groups by length; pooler and head, whose bias is trained too, see one token a row."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=3
    )
    model = get_peft_model(
        BertForSequenceClassification(config),
        LoraConfig(r=2, target_modules=["query", "value", "pooler.dense"], init_lora_weights=False, task_type="SEQ_CLS"),
    )
    rows = [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor(i % 3)}
        for i, ids in enumerate(torch.randint(5, 64, (n,)) for n in (30, 4, 31, 5, 6, 29, 30, 4))
    ]

    def padded(rows: list[Any]) -> dict[str, torch.Tensor]:
        batch = {k: torch.nn.utils.rnn.pad_sequence([r[k] for r in rows], True) for k in ("input_ids", "attention_mask")}
        return {**batch, "labels": torch.stack([r["labels"] for r in rows])}

    ends = {}
    for packing in (True, False):
        arguments = ZOTrainingArguments(
            str(tmp_path), zo_per_example=True, max_steps=2, per_device_train_batch_size=8, learning_rate=1e-2,
            zo_packing=packing, report_to="none", use_cpu=True, save_strategy="no", logging_steps=1,
        )  # fmt: skip
        trainer = ZOTrainer(copy.deepcopy(model), arguments, train_dataset=rows, data_collator=padded)
        trainer.train()
        assert any(name.endswith("bias") for name in trainer._zo_optimizer.params)
        ends[packing] = [e["loss"] for e in trainer.state.log_history if "loss" in e]
        assert trainer._packing._grouped is packing
    assert ends[True] == pytest.approx(ends[False], abs=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zo_method": "lozo"}, "zo_method='lozo'"),
        ({"zo_runtime": "vllm"}, "zo_runtime='vllm'"),
        ({"torch_compile": True}, "torch_compile=True"),
        ({"zo_objective": "f1"}, "zo_objective='f1'"),
        ({"zo_direction": "factorised"}, "zo_direction"),
    ],
)
def test_what_it_does_not_go_with(settings: dict[str, Any], message: str, tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=message):
        ZOTrainingArguments(str(tmp_path), zo_per_example=True, **settings)


def test_whole_weights_are_refused(tmp_path: Any) -> None:
    trainer = trainer_of(tmp_path, "mezo", "full", zo_per_example=True)
    with pytest.raises(ValueError, match="zo_per_example=True displaces linear layers"):
        trainer.train()


def of_ones_own(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.zeros(())


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"trainer_kwargs": {"compute_loss_func": of_ones_own}}, "compute_loss_func"),
        ({"trainer_kwargs": {"objective_fn": of_ones_own}}, "objective_fn"),
    ],
)
def test_a_loss_that_is_no_cross_entropy_is_refused(settings: dict[str, Any], field: str, tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=rf"(?s)^(?=.*{field})(?=.*zo_per_example=True)"):
        trainer_of(tmp_path, "mezo-per-example", "lora", **settings)


def test_the_loss_of_options_is_taken(tmp_path: Any) -> None:
    trainer_of(tmp_path, "mezo-per-example", "lora", trainer_kwargs={"compute_loss_func": option_loss})


def test_a_loss_that_is_nearly_the_cross_entropy_is_noticed(tmp_path: Any) -> None:
    class Own(ZOTrainer):
        def compute_loss(self, *args: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            loss, outputs = super().compute_loss(*args, return_outputs=True, **kwargs)
            return (1.005 * loss, outputs) if return_outputs else 1.005 * loss

    trainer = trainer_of(tmp_path, "mezo-per-example", "lora", trainer_class=Own)
    with pytest.raises(ValueError, match="mean cross-entropy"):
        trainer.train()


def test_the_matrix_has_adapters_in_every_form() -> None:
    assert any("lora_A" in name for name, p in model_of("lora").named_parameters() if p.requires_grad)


def test_rows_that_are_not_there() -> None:
    with pytest.raises(ValueError, match=r"zo_per_example=True numbers the rows of input_ids.*inputs_embeds, labels.*unset it"):
        numbered({"inputs_embeds": torch.zeros(2, 3, 4), "labels": torch.zeros(2, 3)}, 0)


def test_autocast_does_not_disturb(tmp_path):
    run = trainer_of(tmp_path, "mezo", "lora", zo_per_example=True, bf16=True, max_steps=2)
    before = weights_of(run.model)
    run.train()
    assert any(not torch.equal(p, before[name]) for name, p in weights_of(run.model).items())
